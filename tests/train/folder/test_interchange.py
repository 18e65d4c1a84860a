"""SAELens both ways, against the real one: it opens what is saved here, and what it saves opens here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import load_sae, read_recipe, save_sae
from routesae.train.saes import SINGLE_LAYER, Recipe, RouteSAE, SingleLayerSAE, build


@pytest.fixture(autouse=True, scope="module")
def import_sae_lens() -> None:
    """Here, since its import takes seconds, in every process that collects these tests."""
    global sae_lens
    sae_lens = pytest.importorskip("sae_lens")


N, D, LATENTS, K = 30, 8, 24, 4
CPU = torch.device("cpu")
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
# SAELens adds 1e-5 to the std and not 1e-6: a relative 1e-5 at a std of 1, so rows here have one of about 5.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def hidden(layers: int = 1) -> Tensor:
    return torch.randn(layers, N, D, generator=torch.Generator().manual_seed(1)) * 5 + 2


def fill(module: torch.nn.Module) -> None:
    """Random weights everywhere, as a trained one has; thresholds above 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            if "threshold" in name:
                parameter.abs_()


# -------------------------------------------------------------------------------------- ours opened by SAELens


@pytest.mark.parametrize("normalize", ["token", "none"])
@pytest.mark.parametrize("name", SINGLE_LAYER)
def test_saelens_opens_an_sae_saved_here_and_gives_its_latents_and_reconstructions(
    tmp_path: Path, name: str, normalize: str
) -> None:
    sae = build(Recipe(sae=name, layers=(12,), width=D, latents=LATENTS, k=K, normalize=normalize))
    assert isinstance(sae, SingleLayerSAE)
    fill(sae)
    with torch.no_grad():
        sae(hidden()[0])  # batchtopk learns its threshold
    latents = sae.eval().encode(hidden()[0])
    save_sae(tmp_path, sae, {"model": "some/model", "context": 16, "corpus": "some.jsonl"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    f_NF = theirs.encode(hidden()[0])
    expected_NF = latents.dense()
    assert 0 < (expected_NF > 0).sum() < N * LATENTS
    torch.testing.assert_close(f_NF, expected_NF, **CLOSE)
    torch.testing.assert_close(theirs.decode(f_NF), sae.decode(latents), rtol=1e-4, atol=1e-3)
    assert theirs.cfg.metadata.hook_name == "blocks.11.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "some/model"


@pytest.mark.parametrize("routed", SINGLE_LAYER)
def test_saelens_opens_the_shared_sae_of_a_routesae(tmp_path: Path, routed: str) -> None:
    recipe = Recipe(sae="routesae", layers=(4, 6, 9), width=D, latents=LATENTS, k=K, routed=routed, router="top2")
    sae = build(recipe)
    assert isinstance(sae, RouteSAE)
    fill(sae)
    with torch.no_grad():
        sae(hidden(3).transpose(0, 1))
    latents = sae.eval().encode(hidden(3).transpose(0, 1))
    save_sae(tmp_path, sae, {})
    theirs = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    at_N = sae.routes(hidden(3).transpose(0, 1)).at_R
    assert len(at_N.unique()) > 1
    routed_ND = hidden(3)[at_N, torch.arange(N)]  # raw rows, each at its own layer
    f_NF = theirs.encode(routed_ND)
    torch.testing.assert_close(f_NF, latents.dense(), **CLOSE)
    torch.testing.assert_close(theirs.decode(f_NF), sae.decode(latents), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["crosscoder", "mlsae", "random"])
def test_what_saelens_has_no_word_for_it_refuses_rather_than_misreads(tmp_path: Path, name: str) -> None:
    save_sae(tmp_path, build(Recipe(sae=name, layers=(4, 6), width=D, latents=LATENTS, k=K)), {})
    if name == "crosscoder":
        with pytest.raises(Exception, match=r"crosscoder|sae_weights"):
            sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    else:  # one TopK, for any of its layers
        assert sae_lens.SAE.load_from_disk(tmp_path, device="cpu").cfg.architecture() == "topk"


# --------------------------------------------------------------------------------------------- theirs opened here


def theirs(architecture: str, **changes: Any) -> Any:
    kinds = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    }
    kind, config_kind = kinds[architecture]
    own = {"k": K} if architecture == "topk" else {}
    config = config_kind(d_in=D, d_sae=LATENTS, **{**own, **changes})
    config.metadata.hook_name = "blocks.11.hook_resid_post"
    config.metadata.model_name = "some/model"
    sae = kind(config)
    fill(sae)  # decoder rows of any norm
    return sae


CASES = [
    (architecture, changes)
    for architecture, more in {
        "standard": [{}],
        "gated": [{}],
        "topk": [{"rescale_acts_by_decoder_norm": True}, {"rescale_acts_by_decoder_norm": False}],
        "jumprelu": [{}],
    }.items()
    for changes in more
]


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("from_input", [True, False])
@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_an_sae_that_saelens_saved_gives_its_latents_and_reconstructions_here(
    tmp_path: Path, architecture: str, changes: dict[str, Any], from_input: bool, normalize: str
) -> None:
    other = theirs(architecture, apply_b_dec_to_input=from_input, normalize_activations=normalize, **changes)
    other.save_model(tmp_path)
    ours = load_sae(tmp_path, CPU)
    assert ours.recipe.layers == (12,)
    assert ours.recipe.normalize == ("token" if normalize == "layer_norm" else "none")
    with torch.no_grad():
        expected_NF = other.encode(hidden()[0])
        expected_ND = other.decode(expected_NF)
        latents = ours.encode(hidden()[0])
    assert 0 < (expected_NF > 0).sum() < N * LATENTS
    # Latents rescaled by decoder norms are what SAELens itself reports.
    torch.testing.assert_close(latents.dense(), expected_NF, **CLOSE)
    torch.testing.assert_close(ours.decode(latents), expected_ND, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_an_sae_that_saelens_trained_opens_here(tmp_path: Path, kind: str) -> None:
    classes = {
        "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
        "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
    }
    made, config = classes[kind]
    trained = made(config(d_in=D, d_sae=LATENTS, k=K, normalize_activations="none"))
    fill(trained)
    if kind == "batchtopk":
        trained.topk_threshold.fill_(0.7)
    trained.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    trained.save_inference_model(tmp_path)
    other = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    with torch.no_grad():
        out = load_sae(tmp_path, CPU)(hidden()[0])
        expected_NF = other.encode(hidden()[0])
    torch.testing.assert_close(out.latents.dense(), expected_NF, **CLOSE)
    torch.testing.assert_close(out.reconstruction_ND, other.decode(expected_NF).detach(), **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saelens_weights_of_any_precision_are_read_as_float32(tmp_path: Path, dtype: str) -> None:
    other = theirs("standard", dtype=dtype)
    other.save_model(tmp_path)
    ours = load_sae(tmp_path, CPU)
    assert isinstance(ours, SingleLayerSAE)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.W_enc_FD.T, other.W_enc.float())


def test_an_sae_of_saelens_saved_again_here_is_opened_by_both(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    other = theirs("gated", apply_b_dec_to_input=False)
    other.save_model(tmp_path / "theirs")
    save_sae(tmp_path / "ours", load_sae(tmp_path / "theirs", CPU), {"model": "some/model"})
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again.encode(hidden()[0]), other.encode(hidden()[0]), **CLOSE)
        torch.testing.assert_close(again(hidden()[0]), other(hidden()[0]), rtol=1e-4, atol=1e-3)
    assert read_recipe(tmp_path / "ours") == read_recipe(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.11.hook_resid_post", 12),
        ("blocks.11.hook_resid_pre", 11),
        ("blocks.0.hook_resid_pre", 0),
        ("model.layers.11", 12),
        ("transformer.h.3", 4),
        ("gpt_neox.layers.0", 1),
    ],
)
def test_a_hook_is_the_layer_whose_hidden_state_it_sees(tmp_path: Path, hook: str, layer: int) -> None:
    # Layer l is the output of the l-th block, and 0 the embeddings.
    theirs("standard").save_model(tmp_path)
    edit(tmp_path, {}, hook_name=hook)
    assert read_recipe(tmp_path).layers == (layer,)


# ------------------------------------------------------------------------------------------------- refusals


def edit(folder: Path, changes: dict[str, Any], **metadata: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    config["metadata"].update(metadata)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        (
            {"architecture": "transcoder"},
            {},
            "architecture 'transcoder': Input should be 'standard', 'gated', 'topk' or 'jumprelu'",
        ),
        ({"architecture": ["topk"]}, {}, "cfg.json"),
        (
            {"normalize_activations": "expected_average_only_in"},
            {},
            "'expected_average_only_in': Input should be 'none' or 'layer_norm'",
        ),
        (
            {"normalize_activations": "constant_norm_rescale"},
            {},
            "'constant_norm_rescale': Input should be 'none' or 'layer_norm'",
        ),
        ({"reshape_activations": "hook_z"}, {}, "'hook_z'"),
        ({}, {"hook_name": "blocks.3.attn.hook_z"}, r"'blocks.3.attn.hook_z' is not the output of a decoder block"),
        ({}, {"hook_name": "blocks.3.hook_mlp_out"}, "'blocks.3.hook_mlp_out' is not the output of a decoder block"),
        ({}, {"hook_name": "blocks.3.hook_resid_post.extra"}, "is not the output of a decoder block"),
        ({}, {"hook_name": None}, "hook_name None is not"),
        ({"d_in": D + 1}, {}, "where cfg.json says"),
        ({"d_sae": LATENTS + 1}, {}, "where cfg.json says"),
        ({"d_sae": 10**15}, {}, "where cfg.json says"),
        ({"d_sae": 10**18}, {}, "more than any memory"),
        ({"d_in": None}, {}, "d_in None: Input should be a valid integer"),
        ({"k": LATENTS + 1}, {}, f"--k {LATENTS + 1} is more"),
        ({"k": 0}, {}, "k 0"),
    ],
    ids=str,
)
def test_what_has_no_counterpart_here_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], metadata: dict[str, Any], message: str
) -> None:
    theirs("topk").save_model(tmp_path)
    edit(tmp_path, changes, **metadata)
    with pytest.raises(WrongInput, match=message) as refused:
        load_sae(tmp_path, CPU)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "missing"),
    [(a, "W_dec") for a in ("standard", "topk", "gated")]
    + [("gated", name) for name in ("b_gate", "b_mag", "r_mag", "b_dec")]
    + [("jumprelu", "threshold"), ("standard", "W_enc"), ("standard", "b_enc")],
)
@pytest.mark.parametrize("from_input", [True, False])
def test_a_missing_tensor_is_named(tmp_path: Path, architecture: str, missing: str, from_input: bool) -> None:
    theirs(architecture, apply_b_dec_to_input=from_input).save_model(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[missing]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(WrongInput, match=rf"{WEIGHTS} holds no '?{missing}"):
        load_sae(tmp_path, CPU)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_cut_file_is_named(tmp_path: Path, file: str, keep: float) -> None:
    theirs("jumprelu").save_model(tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(WrongInput, match=rf"{file}.* cannot be read"):
        load_sae(tmp_path, CPU)


def test_a_pickle_in_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    other = theirs("standard")
    other.save_model(tmp_path)
    torch.save(other.state_dict(), tmp_path / WEIGHTS)
    with pytest.raises(WrongInput, match=rf"{WEIGHTS} cannot be read"):
        load_sae(tmp_path, CPU)
