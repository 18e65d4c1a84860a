"""Splicing into an LM's forward pass equals plain hooks on the whole model, runs less, and leaves no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routesae.analyze.scores.replacement import edits, require_spliceable, spliced_layers
from routesae.harvest.lm.model import LanguageModel, find_blocks, load_lm
from routesae.harvest.lm.passes import Edit, capturing, clean_pass, editing, logits, run_until, spliced_pass
from routesae.reporting import WrongInput
from routesae.tests.hidden import Normalised
from routesae.train.saes import SAE, Crosscoder, Recipe, RouteSAE, SingleLayerSAE, build
from routesae.train.saes.normalise import Hidden, normalise, places_of

CPU = torch.device("cpu")
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "opt")
ROWS, CONTEXT, WIDTH, DEPTH = 3, 12, 32, 4


def tiny_lm(family: str) -> LanguageModel:
    """A random LM of a family whose body or head does something that a Llama's does not.

    Gemma 2 scales its embeddings and caps its logits, GPT-2 adds position embeddings, a Mixtral's body gives
    router logits to its head, and OPT's head calls the decoder inside its body.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    shape = {"vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "initializer_range": 0.3}
    configs: dict[str, Any] = {
        "llama": LlamaConfig(**shape, **heads),
        "gemma2": Gemma2Config(**shape, **heads, sliding_window=4, final_logit_softcapping=2.0),
        "gpt2": GPT2Config(vocab_size=100, n_embd=WIDTH, n_layer=DEPTH, n_head=4, initializer_range=0.3),
        "mixtral": MixtralConfig(**shape, **heads, num_local_experts=4),
        "opt": OPTConfig(
            vocab_size=100,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            ffn_dim=64,
            init_std=0.3,
        ),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family]).eval().requires_grad_(False)
    return LanguageModel(model, find_blocks(model, family), WIDTH, CPU)


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> LanguageModel:
    return load_lm(str(tiny_model), device=CPU, lm_dtype="float32")


def token_ids() -> Tensor:
    return torch.randint(2, 100, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(1))


def tilted(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD * torch.linspace(0.2, 1.8, WIDTH)


def shifted(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD.roll(1, dims=2)


def identity(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD


def hooked_logits(lm: LanguageModel, ids_BT: Tensor, replaced: Mapping[int, Edit]) -> Tensor:
    """[B, T, V] of the whole model with plain forward hooks on the blocks."""

    def hook(edit: Edit) -> Callable[..., Any]:
        def change(module: nn.Module, inputs: Any, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return change

    handles = [lm.blocks[layer - 1].register_forward_hook(hook(edit)) for layer, edit in replaced.items()]
    try:
        out: Tensor = lm.model(input_ids=ids_BT, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return out


def spliced_logits(lm: LanguageModel, ids_BT: Tensor, replaced: Mapping[int, Edit]) -> Tensor:
    final_BTD = spliced_pass(lm, ids_BT, clean_pass(lm, ids_BT, sorted(replaced)), replaced)
    return logits(lm, final_BTD.flatten(0, 1)).view(*ids_BT.shape, -1)


@contextmanager
def counting(lm: LanguageModel) -> Iterator[Counter[int]]:
    """While open, counts how often a part inside each layer's block really ran."""
    calls: Counter[int] = Counter()

    def count(layer: int) -> Callable[..., None]:
        def ran(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[layer] += 1

        return ran

    handles = [next(block.children()).register_forward_hook(count(at)) for at, block in enumerate(lm.blocks, start=1)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def patches(lm: LanguageModel) -> dict[str, tuple[bool, int]]:
    """Of every module whether its forward is replaced, and how many hooks it has (transformers leaves its own)."""
    return {
        name: ("forward" in vars(module), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in lm.model.named_modules()
    }


def random_sae(name: str, layers: tuple[int, ...], *, seed: int = 0, **changes: Any) -> SAE:
    """An SAE of random weights and biases; its router, if any, sends tokens to every layer."""
    generator = torch.Generator().manual_seed(seed)
    nested = {"prefixes": (24, 96)} if name == "matryoshka" else {}
    sae = build(Recipe(sae=name, layers=layers, width=WIDTH, latents=96, k=12, **nested, **changes), generator)
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


def kept_positions() -> Tensor:
    """bool [B, T]: neither the first of a row nor two special tokens in its middle."""
    kept_BT = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    kept_BT[:, 0] = False
    kept_BT[1, 5:7] = False
    return kept_BT


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------ the passes


def test_logits_of_the_clean_pass_are_the_models_own(lm: LanguageModel) -> None:
    ids_BT = token_ids()
    clean = clean_pass(lm, ids_BT, [2])
    ours_NV = logits(lm, clean.final_BTD.flatten(0, 1))
    assert ours_NV.dtype == torch.float32
    torch.testing.assert_close(ours_NV, hooked_logits(lm, ids_BT, {}).flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_clean_pass_hands_out_the_hidden_states_of_transformers(lm: LanguageModel) -> None:
    ids_BT = token_ids()
    expected = lm.model(input_ids=ids_BT, output_hidden_states=True, use_cache=False).hidden_states
    clean = clean_pass(lm, ids_BT, [1, 3])
    assert sorted(clean.hidden) == [1, 3]
    for layer, hidden_BTD in clean.hidden.items():
        torch.testing.assert_close(hidden_BTD, expected[layer], atol=0, rtol=0)


@pytest.mark.parametrize(
    "replaced",
    [{1: tilted}, {3: tilted}, {DEPTH: tilted}, {2: tilted, 3: shifted}, {4: shifted, 1: tilted, 3: shifted}],
    ids=lambda replaced: "-".join(map(str, replaced)),
)
def test_spliced_pass_equals_hooks_on_the_whole_model(lm: LanguageModel, replaced: dict[int, Edit]) -> None:
    ids_BT = token_ids()
    expected_BTV = hooked_logits(lm, ids_BT, replaced)
    assert difference(expected_BTV, hooked_logits(lm, ids_BT, {})) > 1e-2  # or the edits prove nothing
    torch.testing.assert_close(spliced_logits(lm, ids_BT, replaced), expected_BTV, atol=1e-5, rtol=1e-5)


def test_splicing_the_identity_changes_nothing(lm: LanguageModel) -> None:
    ids_BT = token_ids()
    clean = clean_pass(lm, ids_BT, [2, 3])
    assert torch.equal(spliced_pass(lm, ids_BT, clean, {2: identity, 3: identity}), clean.final_BTD)


def test_blocks_up_to_the_first_spliced_layer_are_not_run(lm: LanguageModel) -> None:
    ids_BT = token_ids()
    clean = clean_pass(lm, ids_BT, [2])
    with counting(lm) as calls:
        spliced_pass(lm, ids_BT, clean, {2: tilted, 4: shifted})
    assert dict(calls) == {3: 1, 4: 1}


def test_clean_pass_runs_every_block_once(lm: LanguageModel) -> None:
    with counting(lm) as calls:
        clean_pass(lm, token_ids(), [1, 2, 4])
    assert dict(calls) == {1: 1, 2: 1, 3: 1, 4: 1}


def test_head_runs_no_block(lm: LanguageModel) -> None:
    with counting(lm) as calls:
        logits(lm, torch.randn(5, WIDTH))
    assert dict(calls) == {}


def test_a_spliced_pass_leaves_the_clean_one_as_it_was(lm: LanguageModel) -> None:
    ids_BT = token_ids()
    clean = clean_pass(lm, ids_BT, [1, 3])
    before = {layer: hidden_BTD.clone() for layer, hidden_BTD in clean.hidden.items()}
    sae = random_sae("topk", (1,))
    spliced_pass(lm, ids_BT, clean, edits(sae, clean.hidden, kept_positions(), zero=True))
    assert all(torch.equal(clean.hidden[layer], before[layer]) for layer in before)


# --------------------------------------------------------------------------------------------------- no trace


def test_lm_is_unpatched_after_use(lm: LanguageModel) -> None:
    ids_BT, before = token_ids(), patches(lm)
    before_BTV = hooked_logits(lm, ids_BT, {})
    spliced_logits(lm, ids_BT, {2: tilted, 3: shifted})
    assert patches(lm) == before
    assert torch.equal(hooked_logits(lm, ids_BT, {}), before_BTV)


@pytest.mark.parametrize("failing", [2, 3], ids=["first edit", "later edit"])
def test_lm_is_unpatched_after_an_edit_that_raises(lm: LanguageModel, failing: int) -> None:
    def broken(hidden_BTD: Tensor) -> Tensor:
        raise ArithmeticError

    ids_BT, before = token_ids(), patches(lm)
    before_BTV = hooked_logits(lm, ids_BT, {})
    with pytest.raises(ArithmeticError):
        spliced_logits(lm, ids_BT, {2: tilted, 3: tilted, failing: broken})
    assert patches(lm) == before
    assert torch.equal(hooked_logits(lm, ids_BT, {}), before_BTV)


def test_lm_is_unpatched_after_a_block_or_the_head_fails(lm: LanguageModel) -> None:
    ids_BT, before = token_ids(), patches(lm)
    clean = clean_pass(lm, ids_BT, [2])
    with pytest.raises(RuntimeError):
        spliced_pass(lm, ids_BT, clean, {2: lambda hidden_BTD: hidden_BTD[..., :-1]})
    with pytest.raises(RuntimeError):
        logits(lm, torch.zeros(3, WIDTH + 1))
    assert patches(lm) == before


def test_lm_is_unpatched_after_a_clean_pass_fails(lm: LanguageModel) -> None:
    before = patches(lm)
    with pytest.raises(IndexError):
        clean_pass(lm, torch.full((1, 4), 10_000), [2])
    assert patches(lm) == before


# ------------------------------------------------------------------------------------------ what is replaced


ONE_LAYER = ("vanilla", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")
WHERE = {name: ((3,), [3]) for name in ONE_LAYER}  # the layers an SAE reads, and those that it replaces
WHERE |= {"mlsae": ((2, 3, 5), [3]), "random": ((1, 2, 4, 5), [4]), "crosscoder": ((2, 3, 5), [2, 3, 5])}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", WHERE)
def test_kept_positions_are_replaced_and_no_others(llama: LanguageModel, name: str, zero: bool) -> None:
    layers, expected = WHERE[name]
    sae, kept_BT = random_sae(name, layers), kept_positions()
    clean = clean_pass(llama, token_ids(), layers)
    replaced = edits(sae, clean.hidden, kept_BT, zero=zero)
    assert sorted(replaced) == list(spliced_layers(sae)) == expected
    for layer, edit in replaced.items():
        changed_BTD = edit(clean.hidden[layer])
        assert torch.equal(changed_BTD[~kept_BT], clean.hidden[layer][~kept_BT])
        assert ((changed_BTD - clean.hidden[layer])[kept_BT].abs().amax(1) > 1e-3).all()
        assert bool((changed_BTD[kept_BT] == 0).all()) == zero


@pytest.mark.parametrize("name", [*ONE_LAYER, "mlsae", "random"])
def test_what_takes_the_place_is_what_the_saes_forward_pass_reconstructs(llama: LanguageModel, name: str) -> None:
    """An SAE in use, by its forward, gives what the splice puts in by encode and decode; in the LM's own scale."""
    layers, (layer,) = WHERE[name]
    sae, kept_BT = random_sae(name, layers), kept_positions()
    clean = clean_pass(llama, token_ids(), layers)
    hidden_mD = clean.hidden[layer][kept_BT]
    # The same hidden states at every layer, for those that read several.
    out = sae(hidden_mD if sae.one_layer else hidden_mD[:, None].expand(-1, len(layers), -1))
    expected_mD = sae.decode(out.latents)
    expected_mD = expected_mD if sae.one_layer else expected_mD[:, 0]
    found_BTD = edits(sae, clean.hidden, kept_BT)[layer](clean.hidden[layer])
    torch.testing.assert_close(found_BTD[kept_BT], expected_mD, atol=1e-4, rtol=1e-5)


def test_a_crosscoder_puts_in_what_it_read_in_the_clean_pass_whatever_the_stream_has_become(
    llama: LanguageModel,
) -> None:
    sae, kept_BT = random_sae("crosscoder", (2, 3, 5)), kept_positions()
    clean = clean_pass(llama, token_ids(), [2, 3, 5])
    for layer, edit in edits(sae, clean.hidden, kept_BT).items():
        elsewhere_BTD = torch.randn(clean.hidden[layer].shape, generator=torch.Generator().manual_seed(layer))
        found_BTD = edit(elsewhere_BTD)
        assert torch.equal(found_BTD[kept_BT], edit(clean.hidden[layer])[kept_BT])
        assert torch.equal(found_BTD[~kept_BT], elsewhere_BTD[~kept_BT])


@pytest.mark.parametrize("router", ["published", "top2", "frozen", "random"])
def test_only_the_published_router_and_its_frozen_control_scale_what_the_sae_reads(
    llama: LanguageModel, router: str
) -> None:
    """At each token's own layer stands the shared SAE's reconstruction of w·x over w, or of x."""
    layers = (2, 3, 5)
    sae, kept_BT = random_sae("routesae", layers, router=router), kept_positions()
    assert isinstance(sae, RouteSAE)
    clean = clean_pass(llama, token_ids(), layers)
    hidden_LND = torch.stack([clean.hidden[layer].flatten(0, 1) for layer in layers])
    place_BT = places_of(token_ids(), torch.arange(CONTEXT))
    given = Hidden(hidden_LND, place_N=place_BT.flatten())
    w_NL, at_N = sae.routing(given), sae.routes(given).at_R
    assert set(at_N[kept_BT.flatten()].tolist()) == {0, 1, 2}  # or the routes prove nothing
    scale_N1 = w_NL.amax(1, keepdim=True) if router in ("published", "frozen") else torch.ones(len(w_NL), 1)
    if router in ("published", "frozen"):
        assert scale_N1[kept_BT.flatten()].min() < 0.9  # or the scale proves nothing
    for at, layer in enumerate(layers):
        x_ND, mean_N1, std_N1 = normalise(hidden_LND[at])
        shared = sae.shared(Normalised((x_ND * scale_N1)[None])).reconstruction_ND / scale_N1
        here_BT = kept_BT & (at_N.view(kept_BT.shape) == at)
        expected_BTD = clean.hidden[layer].clone()
        expected_BTD[here_BT] = (shared * std_N1 + mean_N1).view(expected_BTD.shape)[here_BT]
        found_BTD = edits(sae, clean.hidden, kept_BT, place_BT)[layer](clean.hidden[layer])
        torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-4, rtol=1e-5)


def test_without_normalisation_the_sae_reads_the_hidden_states_as_they_are(llama: LanguageModel) -> None:
    sae, kept_BT = random_sae("topk", (3,), normalize="none"), kept_positions()
    clean = clean_pass(llama, token_ids(), [3])
    expected_mD = sae(clean.hidden[3][kept_BT][None]).reconstruction_ND
    found_mD = edits(sae, clean.hidden, kept_BT)[3](clean.hidden[3])[kept_BT]
    torch.testing.assert_close(found_mD, expected_mD, atol=1e-4, rtol=1e-5)


def test_routesae_replaces_each_kept_token_at_its_own_layer_only(llama: LanguageModel) -> None:
    sae, kept_BT, layers = random_sae("routesae", (2, 3, 5)), kept_positions(), (2, 3, 5)
    assert isinstance(sae, RouteSAE)
    clean = clean_pass(llama, token_ids(), layers)
    replaced = edits(sae, clean.hidden, kept_BT, zero=True)
    at_BT = torch.zeros(ROWS, CONTEXT, dtype=torch.int64)
    for row in range(ROWS):
        for position in range(CONTEXT):
            gathered_D = torch.zeros(WIDTH)
            for layer in layers:
                x_D = clean.hidden[layer][row, position]
                gathered_D += (x_D - x_D.mean()) / (x_D.std() + 1e-6)
            at_BT[row, position] = torch.softmax(sae.router_LD @ gathered_D, 0).argmax()
    assert set(at_BT[kept_BT].tolist()) == {0, 1, 2}  # or the routes prove nothing
    for at, layer in enumerate(layers):
        zeroed_BT = replaced[layer](clean.hidden[layer]).abs().amax(2) == 0
        assert torch.equal(zeroed_BT, kept_BT & (at_BT == at))


def test_routes_are_those_of_the_clean_pass_whatever_the_stream_has_become(llama: LanguageModel) -> None:
    sae = random_sae("routesae", (2, 3, 5))
    clean = clean_pass(llama, token_ids(), [2, 3, 5])
    replaced = edits(sae, clean.hidden, kept_positions(), zero=True)
    for layer, hidden_BTD in clean.hidden.items():
        elsewhere_BTD = torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(layer))
        routed_BT = replaced[layer](hidden_BTD).abs().amax(2) == 0
        assert torch.equal(replaced[layer](elsewhere_BTD).abs().amax(2) == 0, routed_BT)


def test_a_layer_that_no_token_is_routed_to_is_left_out(llama: LanguageModel) -> None:
    sae = random_sae("routesae", (2, 3, 5))
    assert isinstance(sae, RouteSAE)
    sae.router_LD.zero_()  # equal weights everywhere: argmax is the first layer
    clean = clean_pass(llama, token_ids(), [2, 3, 5])
    assert list(edits(sae, clean.hidden, kept_positions(), zero=True)) == [2]


def test_soft_routing_cannot_be_spliced() -> None:
    require_spliceable(random_sae("routesae", (2, 3)))
    with pytest.raises(WrongInput, match=r"soft routing.*no inverse"):
        require_spliceable(random_sae("routesae", (2, 3), routing="soft"))


def test_states_come_to_the_lms_device_wherever_its_blocks_are(llama: LanguageModel) -> None:
    elsewhere = replace(llama, device=torch.device("meta"))  # so the blocks, on the CPU, are on another device
    seen: dict[int, Tensor] = {}
    with capturing(elsewhere, (2, 3), seen.__setitem__):
        run_until(elsewhere, token_ids(), 3)
    clean = clean_pass(elsewhere, token_ids(), (2, 3))
    assert all(hidden_BTD.is_meta for hidden_BTD in (*seen.values(), *clean.hidden.values(), clean.final_BTD))
    with editing(elsewhere, {2: lambda hidden_BTD: seen.setdefault(4, hidden_BTD)}), suppress(RuntimeError):
        run_until(elsewhere, token_ids(), 3)
    assert seen[4].is_meta


def test_a_forward_that_stood_in_the_place_of_a_modules_own_stands_there_again(llama: LanguageModel) -> None:
    """As accelerate's does, where there is a device map."""
    ids = token_ids()
    expected = logits(llama, clean_pass(llama, ids, ()).final_BTD[0])
    own = llama.body.forward
    llama.body.forward = lambda *args, **kwargs: own(*args, **kwargs)
    try:
        before = llama.body.forward
        assert torch.equal(logits(llama, clean_pass(llama, ids, ()).final_BTD[0]), expected)
        assert llama.body.__dict__["forward"] is before
    finally:
        del llama.body.__dict__["forward"]
