"""Clamping: what a changed latent does to hidden states, and that each token is what recomputing everything gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.analyze.clamp.changes import Change, Clamp, active, parse_change
from routesae.analyze.clamp.steps import (
    Continuation,
    generate,
    greedy,
    replaying,
    require_cached_attention,
    sampling,
)
from routesae.analyze.inputs.lm import Kept, left_padded
from routesae.analyze.scores import replacement
from routesae.harvest.cache.reader import Cache
from routesae.harvest.lm.model import LanguageModel, find_blocks, load_lm
from routesae.harvest.lm.passes import Edit, capturing, clean_pass, logits, spliced_pass
from routesae.reporting import WrongInput
from routesae.train.evaluate import score_on_cache
from routesae.train.saes import SAE, Crosscoder, Recipe, RouteSAE, SingleLayerSAE, build
from routesae.train.saes.normalise import places_of
from routesae.train.sparse.pairs import AllPairs, Frame, Latents, Pairs

CPU = torch.device("cpu")
WIDTH, LATENTS, DEPTH = 32, 96, 4
FAMILIES = ("gemma2", "gpt2", "mixtral", "opt")
SPECIAL, STOP = 0, 1
KEPT = Kept(dropped_ids=(SPECIAL, STOP), skip_positions=1)
PROMPTS = ([5, 9, 30, SPECIAL, 17, 40, 22], [8, 61, 13], [33, 21, 70, 11, 90, 44, 12, 7, 3, 28, 56])
CHANGES = (
    Change(latent=3, how="add", value=9.0),
    Change(latent=40, how="set", value=-6.0),
    Change(latent=7, how="multiply", value=4.0),
    Change(latent=64, how="ablate"),
)


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> LanguageModel:
    return load_lm(str(tiny_model), device=CPU, lm_dtype="float32")


def tiny_lm(family: str) -> LanguageModel:
    """A random LM whose body, positions or past are not a Llama's; Gemma 2 has layers that see four tokens back."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MixtralConfig, OPTConfig

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    shape = {"vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "initializer_range": 0.3}
    opt = {"word_embed_proj_dim": WIDTH, "num_attention_heads": 4, "ffn_dim": 64, "init_std": 0.3}
    configs: dict[str, Any] = {
        "gemma2": Gemma2Config(**shape, **heads, sliding_window=4, final_logit_softcapping=2.0),
        "gpt2": GPT2Config(vocab_size=100, n_embd=WIDTH, n_layer=DEPTH, n_head=4, initializer_range=0.3),
        "mixtral": MixtralConfig(**shape, **heads, num_local_experts=4),
        "opt": OPTConfig(vocab_size=100, hidden_size=WIDTH, num_hidden_layers=DEPTH, **opt),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family]).eval().requires_grad_(False)
    return LanguageModel(model, find_blocks(model, family), WIDTH, CPU)


def random_sae(name: str, *, layers: tuple[int, ...] = (1, 2, 3), **changes: Any) -> SAE:
    """An SAE of random weights and biases over layers 1 to 3, or 2; its router sends tokens to every layer."""
    generator = torch.Generator().manual_seed(0)
    one_layer = name in ("topk", "gated", "batchtopk")
    recipe = Recipe(
        sae=name, layers=layers[1:2] if one_layer else layers, width=WIDTH, latents=LATENTS, k=12, **changes
    )
    sae = build(recipe, generator)
    with torch.no_grad():
        if isinstance(sae, Crosscoder):
            sae.b_enc_F.normal_(0, 0.3, generator=generator)
            sae.b_dec_D.normal_(0, 0.3, generator=generator)
            return sae.requires_grad_(False).eval()
        dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
        assert isinstance(dictionary, SingleLayerSAE)
        for own in dictionary.tensors.values():
            getattr(dictionary, own).normal_(0, 0.3, generator=generator)
        dictionary.b_dec_D.normal_(0, 0.3, generator=generator)
        if isinstance(sae, RouteSAE):
            sae.router_LD.normal_(0, 0.5, generator=generator)
    return sae.requires_grad_(False).eval()


def continued(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], clamp: Clamp | None, *, steps: int = 12, pick: Any = greedy
) -> list[Continuation]:
    return generate(lm, prompts, pick=pick, max_new_tokens=steps, stop_ids=(STOP,), kept=KEPT, clamp=clamp)


# ----------------------------------------------------------------- by hand: no cache, each step from its first token


def changed_by_hand(f_F: Tensor) -> Tensor:
    f_F = f_F.clone()
    f_F[3] += 9.0
    f_F[40] = -6.0
    f_F[7] *= 4.0
    f_F[64] = 0.0
    return f_F


def replaced_by_hand(sae: SAE, hidden_D: Tensor, scale: Tensor | float, error_term: bool) -> Tensor:
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(dictionary, SingleLayerSAE)
    mean, std = hidden_D.mean(), hidden_D.std() + 1e-6
    f_F = dictionary.encode_rows(((hidden_D - mean) / std * scale)[None]).dense()[0]

    def reconstruction(f_F: Tensor) -> Tensor:
        return (f_F @ dictionary.W_dec_FD + dictionary.b_dec_D) / scale * std + mean

    error_D = hidden_D - reconstruction(f_F) if error_term else 0
    return reconstruction(changed_by_hand(f_F)) + error_D


def crosscoder_by_hand(sae: Crosscoder, hidden: Mapping[int, Tensor], error_term: bool) -> dict[int, Tensor]:
    """{layer: hidden_D} that takes the place of each layer's output at one position."""
    layers = sae.recipe.layers
    mean = {layer: hidden[layer].mean() for layer in layers}
    std = {layer: hidden[layer].std() + 1e-6 for layer in layers}
    x_C = torch.cat([(hidden[layer] - mean[layer]) / std[layer] for layer in layers])
    f_F = (sae.W_enc_FD @ x_C + sae.b_enc_F).relu()
    new = {}
    for at, layer in enumerate(layers):
        columns = slice(at * WIDTH, (at + 1) * WIDTH)
        plain_D, moved_D = (
            (f @ sae.W_dec_FD[:, columns] + sae.b_dec_D[columns]) * std[layer] + mean[layer]
            for f in (f_F, changed_by_hand(f_F))
        )
        new[layer] = moved_D + (hidden[layer] - plain_D if error_term else 0)
    return new


def forward_by_hand(
    lm: LanguageModel, sae: SAE, ids: list[int], decided: Mapping[int, Any], error_term: bool
) -> tuple[dict[int, Tensor], Tensor]:
    """{layer: hidden_TD}, edits in, and the last logits, of the whole model with no cache.

    decided: {position: {layer: what the SAE's input is scaled by, or what takes the place}} of what is clamped.
    """
    hidden: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def change(module: Any, inputs: Any, output: Any) -> Any:
            out_BTD = (output[0] if isinstance(output, tuple) else output).clone()
            for position, by_layer in decided.items():
                if layer in by_layer:
                    how = by_layer[layer]
                    out_BTD[0, position] = (
                        how
                        if isinstance(sae, Crosscoder)
                        else replaced_by_hand(sae, out_BTD[0, position], how, error_term)
                    )
            hidden[layer] = out_BTD[0]
            return (out_BTD, *output[1:]) if isinstance(output, tuple) else out_BTD

        return change

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(lm.blocks, start=1)]
    try:
        last_V = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    finally:
        for handle in handles:
            handle.remove()
    return hidden, last_V


def decide(sae: SAE, hidden: Mapping[int, Tensor], position: int, error_term: bool) -> dict[int, Any]:
    here = {layer: hidden_TD[position] for layer, hidden_TD in hidden.items()}
    if isinstance(sae, Crosscoder):
        return dict(crosscoder_by_hand(sae, here, error_term))
    if not isinstance(sae, RouteSAE):
        return {sae.recipe.layers[len(sae.recipe.layers) // 2]: 1.0}
    x_LD = torch.stack(
        [(here[layer] - here[layer].mean()) / (here[layer].std() + 1e-6) for layer in sae.recipe.layers]
    )
    w_L = torch.softmax(sae.router_LD @ x_LD.sum(0), 0)
    return {sae.recipe.layers[int(w_L.argmax())]: w_L.max()}


def is_kept(ids: list[int], position: int) -> bool:
    return position >= 1 and ids[position] not in (SPECIAL, STOP)


def decide_all(
    lm: LanguageModel, sae: SAE, ids: list[int], prompt: int, error_term: bool, decided: dict[int, Any]
) -> None:
    """Fill in `decided` for every kept position: the prompt's from a pass without edits, each later one's from a pass
    in which those before it are clamped and it is not."""
    if not decided:
        clean, _ = forward_by_hand(lm, sae, ids[:prompt], {}, error_term)
        decided.update({at: decide(sae, clean, at, error_term) for at in range(prompt) if is_kept(ids, at)})
    for at in range(max(prompt, 1 + max(decided)), len(ids)):
        if is_kept(ids, at):
            clean, _ = forward_by_hand(lm, sae, ids[: at + 1], decided, error_term)
            decided[at] = decide(sae, clean, at, error_term)


def recomputed(lm: LanguageModel, sae: SAE, prompt: Sequence[int], steps: int, error_term: bool) -> Continuation:
    ids, log_p = list(prompt), []
    decided: dict[int, Any] = {}
    for _ in range(steps):
        decide_all(lm, sae, ids, len(prompt), error_term, decided)
        _, last_V = forward_by_hand(lm, sae, ids, decided, error_term)
        log_p_V = torch.log_softmax(last_V, 0)
        ids.append(int(log_p_V.argmax()))
        log_p.append(float(log_p_V.max()))
        if ids[-1] == STOP:
            break
    return Continuation(ids[len(prompt) :], log_p)


def require_equal(found: Continuation, expected: Continuation) -> None:
    assert found.token_ids == expected.token_ids
    assert found.log_p == pytest.approx(expected.log_p, abs=1e-4)


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("name", ["topk", "gated", "batchtopk", "routesae", "crosscoder", "mlsae"])
def test_each_token_is_that_of_recomputing_everything(llama: LanguageModel, name: str, error_term: bool) -> None:
    sae = random_sae(name)
    found = continued(llama, PROMPTS, Clamp(sae, CHANGES, error_term=error_term), steps=6)
    for prompt, clamped, clean in zip(PROMPTS, found, continued(llama, PROMPTS, None, steps=6), strict=True):
        require_equal(clamped, recomputed(llama, sae, prompt, 6, error_term))
        assert clamped.token_ids != clean.token_ids  # or nothing was put to the test


@pytest.mark.parametrize("name", ["routesae", "crosscoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_that_of_recomputing_everything_in_other_families(family: str, name: str) -> None:
    """Gemma 2's window of 4 has long passed the prompt, so the clean pass must leave more than that as it was."""
    lm, sae = tiny_lm(family), random_sae(name)
    for prompt, clamped in zip(PROMPTS, continued(lm, PROMPTS, Clamp(sae, CHANGES), steps=6), strict=True):
        require_equal(clamped, recomputed(lm, sae, prompt, 6, True))


def test_generated_tokens_of_a_routesae_go_to_several_layers(llama: LanguageModel) -> None:
    """What makes the tests above mean something for a router."""
    sae = random_sae("routesae")
    prompt = list(PROMPTS[0])
    ids = prompt + continued(llama, [prompt], Clamp(sae, CHANGES))[0].token_ids
    decided: dict[int, Any] = {}
    decide_all(llama, sae, ids, len(prompt), True, decided)
    assert len({layer for at, by_layer in decided.items() if at >= len(prompt) for layer in by_layer}) > 1


# --------------------------------------------------------------------------------------------------- what it changes


@pytest.mark.parametrize("name", ["topk", "gated", "routesae", "crosscoder", "mlsae"])
def test_no_change_and_the_error_term_is_the_lm_itself(llama: LanguageModel, name: str) -> None:
    assert continued(llama, PROMPTS, Clamp(random_sae(name), ())) == continued(llama, PROMPTS, None)


@pytest.mark.parametrize("name", ["topk", "gated", "routesae", "crosscoder", "mlsae"])
def test_no_change_and_no_error_term_is_the_splice_of_the_metrics(llama: LanguageModel, name: str) -> None:
    sae, prompt = random_sae(name), list(PROMPTS[2])
    ids_BT, kept_BT = torch.tensor([prompt]), torch.tensor([[is_kept(prompt, at) for at in range(len(prompt))]])
    clean = clean_pass(llama, ids_BT, sae.recipe.layers)
    final_BTD = spliced_pass(llama, ids_BT, clean, replacement.edits(sae, clean.hidden, kept_BT))
    expected_V = torch.log_softmax(logits(llama, final_BTD[0, -1:]), 1)[0]
    found_BV = one_step(llama, ids_BT, torch.ones_like(kept_BT), Clamp(sae, (), error_term=False))
    torch.testing.assert_close(found_BV[0], expected_V, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found_BV[0], torch.log_softmax(logits(llama, clean.final_BTD[0, -1:]), 1)[0], atol=1e-2)


def one_step(lm: LanguageModel, ids_BT: Tensor, mask_BT: Tensor, clamp: Clamp | None) -> Tensor:
    """log_p_BV of the token after `ids_BT`, each row's tokens at its right end as `mask_BT` says."""
    seen: list[Tensor] = []

    def pick(step: int, log_p_BV: Tensor) -> Tensor:
        seen.append(log_p_BV)
        return greedy(step, log_p_BV)

    rows = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT.bool(), strict=True)]
    generate(lm, rows, pick=pick, max_new_tokens=1, stop_ids=(), kept=KEPT, clamp=clamp)
    return seen[0]


def places_of_row(ids: list[int]) -> Tensor:
    return places_of(torch.tensor([ids]), torch.arange(len(ids)))


@pytest.mark.parametrize("rows_a_batch", [1, 6])
def test_a_random_router_agrees_on_every_token_in_the_cache_in_a_splice_and_in_generation(
    llama: LanguageModel, tiny_cache: Cache, rows_a_batch: int, set_threads: Callable[[int], None]
) -> None:
    """The cache holds float16 from batches of another shape; a splice reads rows; generation reads token by token."""
    manifest = tiny_cache.manifest
    first, kept = manifest.train_rows, Kept(manifest.dropped_ids, manifest.skip_positions)
    layers = manifest.layers
    recipe = Recipe(sae="routesae", layers=layers, width=WIDTH, latents=LATENTS, k=12, router="random")
    sae = build(recipe).requires_grad_(False).eval()
    set_threads(rows_a_batch % 2 + 1)
    routed_SL = score_on_cache(sae, tiny_cache, first, first + 3).by_row["routed"]
    assert routed_SL is not None
    for row in range(3):
        ids = tiny_cache.tokens()[first + row].tolist()
        batch_BT = torch.tensor([ids] * rows_a_batch)
        kept_BT = torch.tensor(
            [[at >= kept.skip_positions and one not in kept.dropped_ids for at, one in enumerate(ids)]]
            * len(batch_BT)
        )
        clean = clean_pass(llama, batch_BT, layers)
        edits = replacement.edits(sae, clean.hidden, kept_BT, places_of_row(ids).expand_as(batch_BT), zero=True)
        spliced_LT = torch.stack(
            [(edits[at](clean.hidden[at])[-1] == 0).all(1) if at in edits else kept_BT[0] & False for at in layers]
        )
        assert spliced_LT.sum() == kept_BT[0].sum() > 4
        assert spliced_LT.sum(1).tolist() == routed_SL[row].tolist()

        clamp, seen = Clamp(sae, [Change(latent=0, how="add", value=1e4)]), list[int]()

        def recorded(
            hidden: Mapping[int, Tensor], kept_BT: Tensor, place_BT: Tensor, of: Clamp = clamp, to: list[int] = seen
        ) -> dict[int, Edit]:
            moved = Clamp.edits(of, hidden, kept_BT, place_BT)
            to += [layer for layer, edit in moved.items() if bool((edit(hidden[layer]) != hidden[layer]).any())]
            return moved

        clamp.edits = recorded  # type: ignore[method-assign]
        following = [*ids[1:], 0]
        pick = partial(lambda step, log_p_BV, of: torch.tensor([of[step]]), of=following)
        generate(llama, [ids[:1]], pick=pick, max_new_tokens=len(ids), stop_ids=(), kept=kept, clamp=clamp)
        assert seen == [layers[at] for at in spliced_LT.T.nonzero()[:, 1].tolist()]


def fed(lm: LanguageModel, clamp: Clamp | None, layers: Sequence[int]) -> dict[int, Tensor]:
    """{layer: hidden_BTD} after one step over the padded prompts, edits in."""
    ids_BT, real_BT = left_padded(PROMPTS, CPU)
    hidden: dict[int, Tensor] = {}
    with torch.inference_mode():
        if clamp is None:
            with capturing(lm, layers, hidden.__setitem__):
                one_step(lm, ids_BT, real_BT, None)
            return hidden
        edits = clamp.edits(fed(lm, None, clamp.sae.recipe.layers), kept_of_prompts())
        return {layer: edits[layer](fed(lm, None, [layer])[layer]) for layer in layers if layer in edits}


def kept_of_prompts() -> Tensor:
    kept_BT = torch.zeros(len(PROMPTS), max(map(len, PROMPTS)), dtype=torch.bool)
    for row, prompt in enumerate(PROMPTS):
        for at in range(len(prompt)):
            kept_BT[row, at - len(prompt)] = is_kept(prompt, at)
    return kept_BT


@pytest.mark.parametrize("normalize", ["token", "none"])
def test_with_the_error_term_only_the_latents_direction_moves(llama: LanguageModel, normalize: str) -> None:
    sae = random_sae("topk", normalize=normalize)
    assert isinstance(sae, SingleLayerSAE)
    before_BTD = fed(llama, None, [2])[2]
    after_BTD = fed(llama, Clamp(sae, [Change(latent=5, how="add", value=2.5)]), [2])[2]
    std_BT1 = before_BTD.std(2, keepdim=True) if normalize == "token" else torch.ones(1)
    expected_BTD = 2.5 * std_BT1 * sae.W_dec_FD[5] * kept_of_prompts()[:, :, None]
    torch.testing.assert_close(after_BTD - before_BTD, expected_BTD, atol=1e-4, rtol=1e-4)


def test_a_routed_latent_moves_by_its_value_over_the_routers_scale(llama: LanguageModel) -> None:
    sae = random_sae("routesae")
    assert isinstance(sae, RouteSAE)
    before = fed(llama, None, (1, 2, 3))
    after = fed(llama, Clamp(sae, [Change(latent=5, how="add", value=2.5)]), (1, 2, 3))
    x_LBTD = torch.stack([(h - h.mean(2, keepdim=True)) / h.std(2, keepdim=True) for h in before.values()])
    w_BTL = torch.softmax(x_LBTD.sum(0) @ sae.router_LD.T, 2)
    moved = 0
    for at, layer in enumerate((1, 2, 3)):
        here_BT = kept_of_prompts() & (w_BTL.argmax(2) == at)
        moves_BT1 = 2.5 * before[layer].std(2, keepdim=True) / w_BTL.amax(2, keepdim=True)
        expected_BTD = moves_BT1 * sae.shared.W_dec_FD[5] * here_BT[:, :, None]
        torch.testing.assert_close(after[layer] - before[layer], expected_BTD, atol=1e-3, rtol=1e-3)
        moved += int(here_BT.sum())
    assert moved == int(kept_of_prompts().sum())


@pytest.mark.parametrize("how", ["multiply", "ablate", "add", "set"])
def test_a_change_reaches_inactive_latents_where_it_has_something_to_change(how: str) -> None:
    """topk's sparse latents: latent 5 is active on the first row, at 2, and not on the second."""
    sae = random_sae("topk")
    assert isinstance(sae, SingleLayerSAE)
    clamp = Clamp(sae, [Change(latent=5, how=how, value=3.0)])
    values_P, pairs = torch.tensor([1.0, 2.0, 4.0, 0.0]), Pairs.of(torch.tensor([[9, 5], [9, 5]]), LATENTS)
    nothing_ND = torch.zeros(2, WIDTH)
    moved_ND = clamp.changed(nothing_ND, Latents(values_P, pairs, frame=Frame()), nothing_ND)
    by = {"multiply": (4.0, 0.0), "ablate": (-2.0, 0.0), "add": (3.0, 3.0), "set": (1.0, 3.0)}[how]
    torch.testing.assert_close(moved_ND, torch.tensor(by)[:, None] * sae.W_dec_FD[5])


def test_the_values_of_latents_are_found_sparse_and_dense() -> None:
    sparse = Latents(torch.tensor([1.0, 2.0, 4.0, 3.0]), Pairs.of(torch.tensor([[9, 5], [2, 9]]), 12))
    wanted = torch.tensor([5, 9, 0])
    expected = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    assert torch.equal(active(sparse, wanted), expected)
    assert torch.equal(active(Latents(sparse.dense(), AllPairs()), wanted), expected)


# -------------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("name", ["topk", "routesae", "crosscoder", None])
def test_a_batch_is_its_rows_one_by_one(llama: LanguageModel, name: str | None) -> None:
    clamp = None if name is None else Clamp(random_sae(name), CHANGES)
    for prompt, together in zip(PROMPTS, continued(llama, PROMPTS, clamp), strict=True):
        require_equal(together, continued(llama, [prompt], clamp)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_one_by_one_in_other_families(family: str) -> None:
    lm, clamp = tiny_lm(family), Clamp(random_sae("routesae"), CHANGES)
    for prompt, together in zip(PROMPTS, continued(lm, PROMPTS, clamp), strict=True):
        require_equal(together, continued(lm, [prompt], clamp)[0])


def test_without_a_clamp_it_is_what_transformers_generates(llama: LanguageModel) -> None:
    for prompt, ours in zip(PROMPTS, continued(llama, PROMPTS, None), strict=True):
        theirs = llama.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=STOP, pad_token_id=STOP
        )
        assert ours.token_ids == theirs[0, len(prompt) :].tolist()


def test_a_text_ends_with_the_first_stop_id_and_the_others_go_on(llama: LanguageModel) -> None:
    free = continued(llama, PROMPTS, None)
    stop = free[0].token_ids[3]
    ended = generate(llama, PROMPTS, pick=greedy, max_new_tokens=12, stop_ids=(stop,), kept=KEPT)
    for before, after in zip(free, ended, strict=True):
        length = before.token_ids.index(stop) + 1 if stop in before.token_ids else 12
        require_equal(after, Continuation(before.token_ids[:length], before.log_p[:length]))
    assert len(ended[0].token_ids) <= 4
    assert max(len(text.token_ids) for text in ended) == 12


def test_replaying_a_text_scores_it_as_generating_it_did(llama: LanguageModel) -> None:
    clamp = Clamp(random_sae("routesae"), CHANGES)
    for own in (clamp, None):
        texts = continued(llama, PROMPTS, own)
        assert continued(llama, PROMPTS, own, pick=replaying(texts, CPU)) == texts
    clean = continued(llama, PROMPTS, None)
    again = continued(llama, PROMPTS, clamp, pick=replaying(clean, CPU))
    assert [text.token_ids for text in again] == [text.token_ids for text in clean]
    assert sum(again[0].log_p) < sum(clean[0].log_p) - 1


def test_draws_depend_on_seed_and_prompt_and_not_on_the_batch(llama: LanguageModel) -> None:
    def drawn(prompts: Sequence[Sequence[int]], numbers: list[int], seed: int) -> list[list[int]]:
        texts = continued(llama, prompts, None, pick=sampling(2.0, seed, numbers))
        return [text.token_ids for text in texts]

    together = drawn(PROMPTS, [0, 1, 2], seed=0)
    assert together == [drawn([prompt], [number], seed=0)[0] for number, prompt in enumerate(PROMPTS)]
    assert drawn(PROMPTS, [0, 1, 2], seed=1) != together
    twice = drawn([PROMPTS[0], PROMPTS[0]], [0, 1], seed=0)
    assert twice[0] != twice[1]


def test_a_low_temperature_draws_the_likeliest_token(llama: LanguageModel) -> None:
    assert continued(llama, PROMPTS, None, pick=sampling(1e-4, 0, [0, 1, 2])) == continued(llama, PROMPTS, None)


def test_draws_follow_the_probabilities_at_that_temperature() -> None:
    log_p_BV = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(4000, 3)
    drawn_B = sampling(0.5, 0, range(4000))(0, log_p_BV)
    share_V = torch.bincount(drawn_B, minlength=3) / 4000
    expected_V = torch.tensor([0.49, 0.04, 0.01]) / 0.54
    torch.testing.assert_close(share_V, expected_V, atol=0.025, rtol=0)  # 4 standard deviations at most


def test_an_lm_with_recurrent_layers_is_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(WrongInput, match="attention layers only"):
        require_cached_attention(LanguageModel(model, find_blocks(model, "mamba"), 32, CPU))
    for family in FAMILIES:
        require_cached_attention(tiny_lm(family))


# ------------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("how", "given", "expected"),
    [
        ("add", "12=3.5", Change(latent=12, how="add", value=3.5)),
        ("add", "12=-3", Change(latent=12, how="add", value=-3.0)),
        ("multiply", "0=0", Change(latent=0, how="multiply", value=0.0)),
        ("set", "7=1e2", Change(latent=7, how="set", value=100.0)),
        ("ablate", "7", Change(latent=7, how="ablate")),
    ],
)
def test_changes_are_read_and_written_alike(how: str, given: str, expected: Change) -> None:
    assert parse_change(how, given) == expected
    assert parse_change(how, str(expected).split()[1]) == expected


@pytest.mark.parametrize(
    ("how", "given"),
    [
        ("add", "12"),
        ("set", "=3"),
        ("set", "12=x"),
        ("multiply", "1.5=2"),
        ("ablate", "3=0"),
        ("ablate", ""),
        ("add", ""),
    ],
)
def test_a_malformed_change_is_refused_naming_it(how: str, given: str) -> None:
    with pytest.raises(WrongInput, match=rf"--{how} '{given}' is not LATENT.*such as"):
        parse_change(how, given)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(WrongInput, match=r"--set 3=.*not a finite number"):
        Clamp(random_sae("topk"), [parse_change("set", f"3={value}")])


@pytest.mark.parametrize("latent", [-1, LATENTS, 10**12])
def test_a_latent_outside_the_dictionary_is_refused(latent: int) -> None:
    with pytest.raises(WrongInput, match=rf"the SAE has 96 latents, 0 to 95, and no latent {latent}$"):
        Clamp(random_sae("topk"), [Change(latent=latent, how="ablate")])


def test_two_changes_to_one_latent_are_refused_naming_both() -> None:
    changes = [Change(latent=3, how="add", value=1.0), Change(latent=4, how="ablate"), Change(latent=3, how="ablate")]
    with pytest.raises(WrongInput, match="latent 3 is changed twice, by --add 3=1 and --ablate 3"):
        Clamp(random_sae("topk"), changes)


def test_soft_routing_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"soft routing.*no inverse"):
        Clamp(random_sae("routesae", routing="soft"), CHANGES)


def test_log_probabilities_are_of_the_tokens_chosen(llama: LanguageModel) -> None:
    (text,) = continued(llama, [PROMPTS[1]], None, steps=4)
    ids = torch.tensor([[*PROMPTS[1], *text.token_ids]])
    log_p_TV = torch.log_softmax(llama.model(input_ids=ids).logits[0], 1)
    start = len(PROMPTS[1]) - 1
    expected = [float(log_p_TV[start + at, token]) for at, token in enumerate(text.token_ids)]
    assert text.log_p == pytest.approx(expected, abs=1e-4)
    assert math.fsum(expected) < 0
