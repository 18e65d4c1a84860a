"""KLDiv, DeltaCE and Recovered equal a naive implementation, and depend on nothing that they should not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.analyze.scores import lm_scores
from routesae.analyze.scores.intervals import draws, measure
from routesae.analyze.scores.lm_scores import chunk_positions, score_with_lm
from routesae.analyze.scores.metrics import LM_METRICS, METRICS
from routesae.analyze.scores.run import at_sparsity
from routesae.harvest.cache.manifest import kept_positions
from routesae.harvest.lm.model import LanguageModel, find_blocks, load_lm
from routesae.reporting import Progress, WrongInput
from routesae.train.saes import SAE, Crosscoder, Recipe, RouteSAE, SingleLayerSAE, build
from routesae.train.saes.batchtopk import BatchTopK
from routesae.train.saes.gated import Gated
from routesae.train.saes.jumprelu import JumpReLU
from routesae.train.saes.topk import TopK
from routesae.train.saes.vanilla import Vanilla

CPU = torch.device("cpu")
ROWS, CONTEXT, WIDTH, VOCABULARY = 5, 12, 32, 100
SPECIAL = (0, 7)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> LanguageModel:
    return load_lm(str(tiny_model), device=CPU, lm_dtype="float32")


def other_family(name: str) -> LanguageModel:
    """A random LM: Gemma 2 scales its embeddings and caps its logits, GPT-2 adds position embeddings."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

    gemma2 = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=6, n_head=4, initializer_range=0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({"gemma2": gemma2, "gpt2": gpt2}[name]).eval().requires_grad_(False)
    return LanguageModel(model, find_blocks(model, name), WIDTH, CPU)


def rows_and_kept() -> tuple[Any, Any]:
    """int32 [S, T] with special tokens in the rows, and the bool [S, T] of what training would keep of them."""
    ids_ST = np.random.Generator(np.random.PCG64(3)).integers(8, VOCABULARY, (ROWS, CONTEXT), dtype=np.int32)
    ids_ST[:, 0] = SPECIAL[0]
    ids_ST[2, 4], ids_ST[3, 9:11] = SPECIAL[1], SPECIAL[0]
    return ids_ST, kept_positions(ids_ST, dropped_ids=SPECIAL, skip_positions=1)


def random_sae(name: str, layers: tuple[int, ...], *, seed: int = 0, **changes: Any) -> SAE:
    """An SAE of random weights and biases; its router, if any, sends tokens to every layer."""
    generator = torch.Generator().manual_seed(seed)
    nested = {"prefixes": (24, 96)} if "matryoshka" in (name, changes.get("routed")) else {}
    recipe = Recipe(sae=name, layers=layers, width=WIDTH, latents=96, **{"k": 12, **nested, **changes})
    sae = build(recipe, generator)
    with torch.no_grad():
        if isinstance(sae, Crosscoder):
            sae.b_enc_F.normal_(0, 0.3, generator=generator)
            sae.b_dec_D.normal_(0, 0.3, generator=generator)
            return sae.requires_grad_(False).eval()
        dictionary = dictionary_of(sae)
        for own in dictionary.tensors.values():
            getattr(dictionary, own).normal_(0, 0.3, generator=generator)
        dictionary.b_dec_D.normal_(0, 0.3, generator=generator)
        if isinstance(dictionary, BatchTopK):
            dictionary.threshold.fill_(0.7)
        if isinstance(sae, RouteSAE):
            sae.router_LD.normal_(0, 0.5, generator=generator)
    return sae.requires_grad_(False).eval()


def dictionary_of(sae: SAE) -> SingleLayerSAE:
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(dictionary, SingleLayerSAE)
    return dictionary


def identity_sae(name: str, layers: tuple[int, ...]) -> SAE:
    """Exactly its input: ReLU(x) − ReLU(−x), with every latent among the top k."""
    sae = build(Recipe(sae=name, layers=layers, width=WIDTH, latents=2 * WIDTH, k=2 * WIDTH))
    dictionary, eye_DD = dictionary_of(sae), torch.eye(WIDTH)
    with torch.no_grad():
        dictionary.W_enc_FD.copy_(torch.cat([eye_DD, -eye_DD]))
        dictionary.W_dec_FD.copy_(torch.cat([eye_DD, -eye_DD]))
    return sae.requires_grad_(False).eval()


def patches(lm: LanguageModel) -> list[tuple[bool, int]]:
    """Of every module whether its forward is replaced, and how many hooks it has."""
    return [("forward" in vars(module), len(module._forward_hooks)) for module in lm.model.modules()]


# ----------------------------------------------------------------------------------------- the naive reference


def naive_normalised(sae: SAE, hidden_D: Tensor) -> tuple[Tensor, float, float]:
    """x, and the std and mean that take it back."""
    if sae.recipe.normalize == "none":
        return hidden_D, 1.0, 0.0
    mean, std = float(hidden_D.mean()), float(hidden_D.std() + 1e-6)
    return (hidden_D - mean) / std, std, mean


def naive_latents(dictionary: SingleLayerSAE, x_D: Tensor) -> Tensor:
    """f of one token by the equations of DESIGN §5."""
    if isinstance(dictionary, Gated):
        pi_F = dictionary.W_enc_FD @ (x_D - dictionary.b_dec_D)
        magnitude_F = (dictionary.r_mag_F.exp() * pi_F + dictionary.b_mag_F).clamp(min=0)
        return torch.where(pi_F + dictionary.b_gate_F > 0, magnitude_F, torch.zeros(()))
    z_F = dictionary.W_enc_FD @ (x_D - dictionary.b_dec_D) + dictionary.b_enc_F
    if isinstance(dictionary, Vanilla):
        return z_F.clamp(min=0)
    if isinstance(dictionary, BatchTopK | JumpReLU):  # a matryoshka in use is a batchtopk
        own = dictionary.threshold if isinstance(dictionary, BatchTopK) else dictionary.threshold_F
        return torch.where(z_F > own.clamp(min=0), z_F, torch.zeros(()))
    assert isinstance(dictionary, TopK)
    f_F = torch.zeros_like(z_F)
    for latent in z_F.argsort(descending=True)[: dictionary.recipe.k].tolist():
        f_F[latent] = z_F[latent].clamp(min=0)
    return f_F


def naive_reconstruction(sae: SAE, hidden_D: Tensor, scale: float) -> Tensor:
    """One token, in the LM's own scale."""
    dictionary = dictionary_of(sae)
    x_D, std, mean = naive_normalised(sae, hidden_D)
    f_F = naive_latents(dictionary, x_D * scale)
    return (dictionary.W_dec_FD.T @ f_F + dictionary.b_dec_D) / scale * std + mean


def naive_crosscoded(sae: Crosscoder, hidden: Sequence[Tensor], layer: int, position: int) -> Tensor:
    """One token's reconstruction at one layer, from what all layers were in the clean pass."""
    layers = sae.recipe.layers
    W_enc_FLD, W_dec_FLD = (W_FC.view(-1, len(layers), WIDTH) for W_FC in (sae.W_enc_FD, sae.W_dec_FD))
    z_F = sae.b_enc_F.clone()
    for at, read in enumerate(layers):
        z_F += W_enc_FLD[:, at] @ naive_normalised(sae, hidden[read - 1][position])[0]
    at = layers.index(layer)
    x_D = W_dec_FLD[:, at].T @ z_F.clamp(min=0) + sae.b_dec_D.view(-1, WIDTH)[at]
    _, std, mean = naive_normalised(sae, hidden[layer - 1][position])
    return x_D * std + mean


def naive_hash(token_id: int, position: int) -> int:
    """31 bits of a token and its place, by Python's whole numbers."""
    mixed = (position * 2**32 + token_id) % 2**64
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9):
        mixed = mixed * factor % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**31


def naive_routes(sae: SAE, hidden: Sequence[Tensor], position: int, token_id: int) -> dict[int, float]:
    """{layer: scale} at which one token is replaced: its argmax of softmax(W_r Σ x̃), every layer, or the one."""
    layers = sae.recipe.layers
    if isinstance(sae, Crosscoder):
        return dict.fromkeys(layers, 1.0)
    if not isinstance(sae, RouteSAE):
        return {layers[len(layers) // 2]: 1.0}
    if sae.recipe.router == "random":
        return {layers[naive_hash(token_id, position) % len(layers)]: 1.0}
    gathered_D = torch.zeros(WIDTH)
    for layer in layers:
        gathered_D = gathered_D + naive_normalised(sae, hidden[layer - 1][position])[0]
    if sae.recipe.aggregate == "mean":
        gathered_D = gathered_D / len(layers)
    r_L = sae.router_LD @ gathered_D
    w_L = torch.softmax(r_L, 0)
    scaled = sae.recipe.router in ("published", "frozen")
    return {layers[int(w_L.argmax())]: float(w_L.max()) if scaled else 1.0}


def hooked(lm: LanguageModel, ids_T: Tensor, hook_of: Callable[[int], Callable[[Tensor], Tensor | None]]) -> Tensor:
    """Log-probabilities [T, V] of one sequence, whole model, a forward hook on every block."""

    def hook(layer: int) -> Callable[..., Any]:
        def run(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            changed_TD = hook_of(layer)(hidden_BTD[0])
            if changed_TD is None:
                return None
            return (changed_TD[None], *output[1:]) if isinstance(output, tuple) else changed_TD[None]

        return run

    handles = [block.register_forward_hook(hook(at)) for at, block in enumerate(lm.blocks, start=1)]
    with torch.no_grad():
        logits_TV = lm.model(input_ids=ids_T[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return torch.log_softmax(logits_TV.double(), dim=1)


def naive_pass(
    lm: LanguageModel, sae: SAE, ids_T: Tensor, kept_T: Sequence[bool], *, zero: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T, V] of one sequence as it is, and with its kept tokens replaced where they are routed."""
    hidden: list[Tensor] = []
    clean_TV = hooked(lm, ids_T, lambda layer: lambda hidden_TD: hidden.append(hidden_TD.clone()))  # type: ignore[func-returns-value]
    routes = [naive_routes(sae, hidden, position, token_id) for position, token_id in enumerate(ids_T.tolist())]

    def new(layer: int, position: int, hidden_D: Tensor) -> Tensor:
        if zero:
            return torch.zeros(WIDTH)
        if isinstance(sae, Crosscoder):
            return naive_crosscoded(sae, hidden, layer, position)
        return naive_reconstruction(sae, hidden_D, routes[position][layer])

    def replacing(layer: int) -> Callable[[Tensor], Tensor]:
        def change(hidden_TD: Tensor) -> Tensor:
            changed_TD = hidden_TD.clone()
            for position, places in enumerate(routes):
                if kept_T[position] and layer in places:
                    changed_TD[position] = new(layer, position, hidden_TD[position])
            return changed_TD

        return change

    return clean_TV, hooked(lm, ids_T, replacing)


def naive_scores(lm: LanguageModel, sae: SAE, ids_ST: Any, kept_ST: Any) -> dict[str, float]:
    kl = ce_clean = ce_spliced = ce_zero = 0.0
    for ids, kept in zip(ids_ST, kept_ST, strict=True):
        ids_T = torch.tensor(ids, dtype=torch.int64)
        p_TV, q_TV = naive_pass(lm, sae, ids_T, kept.tolist(), zero=False)
        _, zero_TV = naive_pass(lm, sae, ids_T, kept.tolist(), zero=True)
        kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
        for position, next_id in enumerate(ids_T[1:].tolist()):
            ce_clean -= float(p_TV[position, next_id])
            ce_spliced -= float(q_TV[position, next_id])
            ce_zero -= float(zero_TV[position, next_id])
    predictions = len(ids_ST) * (CONTEXT - 1)
    return {
        "KLDiv": kl / (len(ids_ST) * CONTEXT),
        "DeltaCE": (ce_spliced - ce_clean) / predictions,
        "Recovered": 1 - (ce_spliced - ce_clean) / (ce_zero - ce_clean),
    }


def published_kl_div(lm: LanguageModel, sae: SAE, ids_ST: Any, kept_ST: Any) -> float:
    """swei2001/RouteSAEs: F.kl_div of full logits [S, T, V] with reduction="batchmean"."""
    pairs = [
        naive_pass(lm, sae, torch.tensor(ids, dtype=torch.int64), kept.tolist(), zero=False)
        for ids, kept in zip(ids_ST, kept_ST, strict=True)
    ]
    p_STV, q_STV = torch.stack([p for p, _ in pairs]), torch.stack([q for _, q in pairs])
    return float(F.kl_div(q_STV, p_STV.exp(), reduction="batchmean"))


RowSums = dict[str, Any]


def numbers(row_sums: RowSums) -> dict[str, float]:
    """Everything that the LM's metrics write: KLDiv, KLDiv_seq, DeltaCE, CE_clean, Recovered."""
    return measure([METRICS[name] for name in LM_METRICS], row_sums, draws(len(row_sums["rows"]), seed=0, count=2))[0]


def as_dict(row_sums: RowSums) -> dict[str, float]:
    return {name: numbers(row_sums)[name] for name in LM_METRICS}


def scored(lm: LanguageModel, batch_sequences: int = 2, **saes: SAE) -> dict[str, RowSums]:
    return score_with_lm(lm, saes, *rows_and_kept(), batch_sequences=batch_sequences)


# ------------------------------------------------------------------------------------------------------ claims

SPLICED: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "topk at layer 2": ("topk", (2,), {}),
    "topk at layer 5": ("topk", (5,), {}),
    "topk, normalize none": ("topk", (3,), {"normalize": "none"}),
    "vanilla": ("vanilla", (3,), {}),
    "gated": ("gated", (3,), {}),
    "jumprelu": ("jumprelu", (3,), {}),
    "batchtopk": ("batchtopk", (3,), {}),
    "matryoshka": ("matryoshka", (3,), {}),
    "routesae, sum": ("routesae", (2, 3, 5), {}),
    "routesae, mean": ("routesae", (2, 3, 4, 5), {"aggregate": "mean"}),
    "routesae, top2": ("routesae", (2, 3, 5), {"router": "top2"}),
    "routesae, frozen": ("routesae", (2, 3, 5), {"router": "frozen"}),
    "routesae, random": ("routesae", (2, 3, 5), {"router": "random"}),
    "routesae, routed gated": ("routesae", (2, 3, 5), {"routed": "gated"}),
    "routesae, routed matryoshka": ("routesae", (2, 3, 5), {"routed": "matryoshka"}),
    "routesae, normalize none": ("routesae", (2, 3, 5), {"normalize": "none"}),
    "crosscoder": ("crosscoder", (2, 3, 5), {}),
    "crosscoder, normalize none": ("crosscoder", (2, 5), {"normalize": "none"}),
    "mlsae": ("mlsae", (2, 3, 4, 5), {}),
    "random": ("random", (2, 3, 5), {}),
}


@pytest.mark.parametrize("name", SPLICED)
def test_scores_equal_the_naive_ones_on_a_llama(llama: LanguageModel, name: str) -> None:
    variant, layers, changes = SPLICED[name]
    sae = random_sae(variant, layers, **changes)
    expected = naive_scores(llama, sae, *rows_and_kept())
    assert expected["KLDiv"] > 0.01  # or agreement proves nothing
    assert as_dict(scored(llama, sae=sae)["sae"]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
@pytest.mark.parametrize("name", ["topk at layer 2", "routesae, sum", "crosscoder"])
def test_scores_equal_the_naive_ones_on_other_families(family: str, name: str) -> None:
    lm, (variant, layers, changes) = other_family(family), SPLICED[name]
    sae = random_sae(variant, layers, **changes)
    expected = naive_scores(lm, sae, *rows_and_kept())
    assert expected["KLDiv"] > 0.01
    assert as_dict(scored(lm, sae=sae)["sae"]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", [name for name, (variant, _, _) in SPLICED.items() if variant == "routesae"])
def test_routes_of_the_random_weights_use_every_layer(llama: LanguageModel, name: str) -> None:
    """What the agreement above rests on: a router that used one layer would be a topk."""
    variant, layers, changes = SPLICED[name]
    sae = random_sae(variant, layers, **changes)
    ids_ST, kept_ST = rows_and_kept()
    used: set[int] = set()
    for ids, kept in zip(ids_ST, kept_ST, strict=True):
        hidden: list[Tensor] = []
        ids_T = torch.tensor(ids, dtype=torch.int64)
        hooked(llama, ids_T, lambda layer, hidden=hidden: lambda hidden_TD: hidden.append(hidden_TD))
        for position in np.flatnonzero(kept):
            used |= set(naive_routes(sae, hidden, int(position), int(ids[position])))
    assert used == set(layers)


@pytest.mark.parametrize(("variant", "layers"), [("topk", (3,)), ("routesae", (2, 3, 5)), ("mlsae", (2, 3, 5))])
def test_splicing_the_identity_costs_nothing(llama: LanguageModel, variant: str, layers: tuple[int, ...]) -> None:
    scores = scored(llama, sae=identity_sae(variant, layers))["sae"]
    assert as_dict(scores) == pytest.approx({"KLDiv": 0, "DeltaCE": 0, "Recovered": 1}, abs=1e-5)
    assert abs(numbers(scores)["KLDiv"]) < 1e-6


@pytest.mark.parametrize(("variant", "layers"), [("topk", (3,)), ("routesae", (2, 3, 5))])
def test_splicing_zeros_recovers_nothing(variant: str, layers: tuple[int, ...]) -> None:
    """In an LM whose hidden states have zero mean, an SAE of zero weights reconstructs zeros."""
    sae = random_sae(variant, layers)
    for parameter in dictionary_of(sae).parameters():
        parameter.zero_()
    lm = centred_llama()
    ids_ST = torch.arange(8, 8 + ROWS)[:, None]
    for _ in range(CONTEXT - 1):  # text that the LM itself would write, so that ablation costs it nats
        ids_ST = torch.cat([ids_ST, lm.model(input_ids=ids_ST).logits[:, -1:].argmax(2)], dim=1)
    kept_ST = kept_positions(ids_ST.numpy(), dropped_ids=(), skip_positions=1)
    scores = score_with_lm(lm, {"sae": sae}, ids_ST.int().numpy(), kept_ST, batch_sequences=2)["sae"]
    assert numbers(scores)["DeltaCE"] > 1
    assert numbers(scores)["Recovered"] == pytest.approx(0, abs=1e-6)


def centred_llama() -> LanguageModel:
    """Whatever enters its residual stream has zero mean; the norms' large epsilon keeps rounding small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=0.3,
        rms_norm_eps=0.1,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    embedding_VD = model.get_input_embeddings().weight
    embedding_VD.sub_(embedding_VD.mean(1, keepdim=True))
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.sub_(linear.weight.mean(0, keepdim=True))
    return LanguageModel(model, model.model.layers, WIDTH, CPU)


def test_kl_div_seq_is_the_published_batchmean(llama: LanguageModel) -> None:
    sae = random_sae("topk", (3,))
    found = numbers(scored(llama, sae=sae)["sae"])
    assert found["KLDiv_seq"] == found["KLDiv"] * CONTEXT
    assert found["KLDiv_seq"] == pytest.approx(published_kl_div(llama, sae, *rows_and_kept()), rel=TOLERANCE)


@pytest.mark.parametrize(("variant", "layers"), [("topk", (3,)), ("routesae", (2, 3, 5))])
def test_rows_without_a_kept_position_are_scored_unchanged(
    llama: LanguageModel, variant: str, layers: tuple[int, ...]
) -> None:
    ids_ST, kept_ST = rows_and_kept()
    sae = random_sae(variant, layers)
    kept_ST[2:4] = False
    expected = naive_scores(llama, sae, ids_ST, kept_ST)
    scores = score_with_lm(llama, {"sae": sae}, ids_ST, kept_ST, batch_sequences=2)["sae"]
    assert as_dict(scores) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("batch_sequences", [1, 3, 100])
def test_scores_do_not_depend_on_batch_sequences(llama: LanguageModel, batch_sequences: int) -> None:
    sae = random_sae("routesae", (2, 3, 5))
    expected = as_dict(scored(llama, sae=sae)["sae"])
    assert as_dict(scored(llama, batch_sequences, sae=sae)["sae"]) == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_scores_do_not_depend_on_the_chunk_of_logits(
    llama: LanguageModel, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae("routesae", (2, 3, 5))
    expected = as_dict(scored(llama, sae=sae)["sae"])
    monkeypatch.setattr(lm_scores, "CHUNK_POSITIONS", chunk)
    assert as_dict(scored(llama, sae=sae)["sae"]) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_logits_never_exist_for_more_positions_than_a_chunk(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(lm_scores, "CHUNK_POSITIONS", 7)
    handle = llama.model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out[..., 0].numel()))
    scored(llama, sae=random_sae("topk", (3,)))
    handle.remove()
    assert max(seen) == 7
    assert sum(seen) == 3 * ROWS * CONTEXT  # clean, spliced and zero, each position once


def test_a_chunk_of_logits_is_256_positions_on_a_cpu_and_what_half_of_its_free_memory_holds_on_a_gpu(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chunk_positions(49_152, None) == 256
    assert chunk_positions(128_256, 80 * 10**9) == 80 * 10**9 // 2 // (8 * 4 * 128_256) == 9746
    assert chunk_positions(128_256, 1000) == 1  # it is then for the allocator to refuse
    vocabulary, seen = llama.model.config.vocab_size, list[int]()
    monkeypatch.setattr(lm_scores, "free_memory", lambda device: 2 * 8 * 4 * vocabulary * 5)
    handle = llama.model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out[..., 0].numel()))
    scored(llama, sae=random_sae("topk", (3,)))
    handle.remove()
    assert max(seen) == 5


def test_saes_scored_together_score_as_alone(llama: LanguageModel) -> None:
    saes = {
        "a": random_sae("topk", (3,), seed=1),
        "b": random_sae("topk", (3,), seed=2),
        "c": random_sae("topk", (5,), seed=3),
        "r": random_sae("routesae", (2, 3, 5), seed=4),
        "s": random_sae("routesae", (2, 3, 5), seed=5),
    }
    together = scored(llama, **saes)
    for name, sae in saes.items():
        assert as_dict(together[name]) == pytest.approx(as_dict(scored(llama, sae=sae)["sae"]), abs=1e-7)
    assert len({scores["ce_zero"].sum() for scores in together.values()}) == 4  # a and b share a site, nobody else


def test_an_sae_named_like_a_site_does_not_borrow_its_zero_ablation(llama: LanguageModel) -> None:
    saes = {"topk": random_sae("topk", (3,)), "layer 3": random_sae("routesae", (2, 3, 5))}
    together = scored(llama, **saes)
    for name, sae in saes.items():
        assert as_dict(together[name]) == pytest.approx(as_dict(scored(llama, sae=sae)["sae"]), abs=1e-7)


def test_saes_of_one_layer_share_clean_and_zero_passes(llama: LanguageModel) -> None:
    calls: list[int] = []
    handle = llama.blocks[-1].mlp.register_forward_hook(lambda module, inputs, out: calls.append(1))
    scored(llama, ROWS, a=random_sae("topk", (3,), seed=1), b=random_sae("topk", (3,), seed=2))
    handle.remove()
    assert len(calls) == 4  # clean, a, b, zeros


def test_views_of_one_routesae_share_clean_and_zero_passes(llama: LanguageModel) -> None:
    calls: list[int] = []
    sae = random_sae("routesae", (2, 3, 5))
    views = {str(k): at_sparsity(sae, infer_k=k) for k in (4, 8, 16)}
    handle = llama.blocks[-1].mlp.register_forward_hook(lambda module, inputs, out: calls.append(1))
    together = scored(llama, ROWS, own=sae, **views)
    handle.remove()
    assert len(calls) == 6  # clean, four, zeros
    assert len({scores["kl"].sum() for scores in together.values()}) == 4
    assert len({scores["ce_zero"].sum() for scores in together.values()}) == 1


@pytest.mark.parametrize("sparsity", [{"infer_k": 5}, {"theta": 0.8}], ids=str)
@pytest.mark.parametrize("name", ["topk at layer 2", "jumprelu", "routesae, sum", "routesae, top2", "mlsae"])
def test_views_score_as_the_naive_ones_of_their_equation(
    llama: LanguageModel, name: str, sparsity: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def naive_view(dictionary: SingleLayerSAE, x_D: Tensor) -> Tensor:
        z_F = dictionary.W_enc_FD @ (x_D - dictionary.b_dec_D) + dictionary.b_enc_F
        floor = sparsity.get("theta") or float(z_F.sort(descending=True).values[sparsity["infer_k"]])
        return torch.where(z_F > floor, z_F.clamp(min=0), torch.zeros(()))

    variant, layers, changes = SPLICED[name]
    sae = random_sae(variant, layers, **changes)
    own = as_dict(scored(llama, sae=sae)["sae"])
    monkeypatch.setattr(f"{__name__}.naive_latents", naive_view)
    expected = naive_scores(llama, sae, *rows_and_kept())
    assert abs(expected["KLDiv"] - own["KLDiv"]) > 10 * TOLERANCE
    assert as_dict(scored(llama, sae=at_sparsity(sae, **sparsity))["sae"]) == pytest.approx(expected, abs=TOLERANCE)


def test_sums_by_row_are_those_of_each_row_alone(llama: LanguageModel) -> None:
    sae, (ids_ST, kept_ST) = random_sae("routesae", (2, 3, 5)), rows_and_kept()
    scores = scored(llama, sae=sae)["sae"]
    for row in range(ROWS):
        alone = score_with_lm(llama, {"sae": sae}, ids_ST[row : row + 1], kept_ST[row : row + 1], batch_sequences=1)
        expected = {name: float(one_S[0]) for name, one_S in alone["sae"].items()}
        assert {name: sums_S[row] for name, sums_S in scores.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("held", [1, 3])
def test_scores_do_not_depend_on_how_many_passes_are_held(
    llama: LanguageModel, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {str(seed): random_sae("topk", (3,), seed=seed) for seed in range(4)}
    expected = scored(llama, **saes)
    monkeypatch.setattr(lm_scores, "PASSES_HELD", held)
    found = scored(llama, **saes)
    assert {name: as_dict(scores) for name, scores in found.items()} == {
        name: as_dict(scores) for name, scores in expected.items()
    }


def test_zero_passes_run_only_where_recovered_is_wanted(llama: LanguageModel) -> None:
    calls: list[int] = []
    handle = llama.blocks[-1].mlp.register_forward_hook(lambda module, inputs, out: calls.append(1))
    saes = {"a": random_sae("topk", (3,))}
    scores = score_with_lm(llama, saes, *rows_and_kept(), batch_sequences=ROWS, zero_ablation=False)["a"]
    handle.remove()
    assert len(calls) == 2
    assert "ce_zero" not in scores
    assert scores["kl"] == pytest.approx(scored(llama, a=saes["a"])["a"]["kl"], abs=1e-7)


def test_soft_routing_is_refused_before_anything_runs(llama: LanguageModel) -> None:
    calls: list[int] = []
    handle = llama.blocks[0].register_forward_hook(lambda module, inputs, out: calls.append(1))
    with pytest.raises(WrongInput, match="soft routing"):
        scored(llama, a=random_sae("topk", (3,)), b=random_sae("routesae", (2, 3), routing="soft"))
    handle.remove()
    assert calls == []


def test_lm_is_unpatched_after_scoring_and_after_an_interrupt(llama: LanguageModel) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    sae, before = random_sae("routesae", (2, 3, 5)), patches(llama)
    expected = scored(llama, sae=sae)
    with pytest.raises(KeyboardInterrupt):
        score_with_lm(llama, {"sae": sae}, *rows_and_kept(), batch_sequences=2, report=interrupt)
    assert patches(llama) == before
    assert as_dict(scored(llama, sae=sae)["sae"]) == as_dict(expected["sae"])


def test_progress_ends_at_every_token_of_the_rows(llama: LanguageModel) -> None:
    seen: list[Progress] = []
    saes = {"sae": random_sae("topk", (3,))}
    score_with_lm(llama, saes, *rows_and_kept(), batch_sequences=2, report=seen.append)
    assert [progress.done for progress in seen] == [2 * CONTEXT, 4 * CONTEXT, ROWS * CONTEXT]
    assert {progress.total for progress in seen} == {ROWS * CONTEXT}


def test_clean_cross_entropy_is_the_models_own_loss(llama: LanguageModel) -> None:
    ids_ST, _ = rows_and_kept()
    ids = torch.tensor(ids_ST, dtype=torch.int64)
    loss = float(llama.model(input_ids=ids, labels=ids).loss)
    scores = scored(llama, sae=random_sae("topk", (3,)))["sae"]
    assert numbers(scores)["CE_clean"] == pytest.approx(loss, abs=1e-5)
    assert np.isfinite(scores["ce_spliced"]).all()
    assert scores["positions"].sum() == ROWS * CONTEXT
