"""Views of an SAE at another sparsity: the published equation, the same weights, refusals that name what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.analyze.scores.run import analyze, at_sparsity
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.reporting import WrongInput
from routesae.tests.hidden import Normalised
from routesae.train.run import train
from routesae.train.saes import SAE, SAES, Crosscoder, Recipe, RouteSAE, SingleLayerSAE, build
from routesae.train.settings import settings_of

WIDTH, LATENTS, TOKENS = 16, 48, 20
LAYERS = {"routesae": (2, 3, 5), "crosscoder": (2, 3), "mlsae": (2, 3), "random": (2, 3)}
ANY_BUT_GATED = tuple(name for name in SAES if name != "gated")
SPARSITIES: tuple[dict[str, Any], ...] = ({"infer_k": 5}, {"theta": 0.4})


def random_sae(name: str, **changes: Any) -> SAE:
    generator = torch.Generator().manual_seed(1)
    nested = {"prefixes": (12, LATENTS)} if name == "matryoshka" else {}
    recipe = Recipe(
        sae=name, layers=LAYERS.get(name, (3,)), width=WIDTH, latents=LATENTS, k=9, sparsity=None, **nested, **changes
    )
    sae = build(recipe, generator).requires_grad_(False).eval()
    for biases in (parameter for key, parameter in sae.named_parameters() if ".b_" in f".{key}"):
        biases.normal_(0, 0.3, generator=generator)
    return sae


def random_x(sae: SAE) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(sae.recipe.layers), TOKENS, WIDTH, generator=generator)


def pre_activations(sae: SAE, input_ND: Tensor) -> Tensor:
    """z by the equation."""
    if isinstance(sae, Crosscoder):
        return input_ND @ sae.W_enc_FD.T + sae.b_enc_F
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(dictionary, SingleLayerSAE)
    return (input_ND - dictionary.b_dec_D) @ dictionary.W_enc_FD.T + dictionary.b_enc_F


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
@pytest.mark.parametrize("name", ANY_BUT_GATED)
def test_a_view_has_the_latents_of_the_equation(name: str, sparsity: dict[str, Any]) -> None:
    sae = random_sae(name)
    out = at_sparsity(sae, **sparsity)(Normalised(random_x(sae)))
    z_NF = pre_activations(sae, out.x_ND)
    if k := sparsity.get("infer_k"):
        floor_N1 = z_NF.sort(1, descending=True).values[:, k - 1 : k]
        expected_NF = torch.where(z_NF >= floor_N1, z_NF.clamp(min=0), 0)
    else:
        expected_NF = torch.where(z_NF > sparsity["theta"], z_NF, 0)
    torch.testing.assert_close(out.latents.dense(), expected_NF, atol=1e-5, rtol=1e-5)
    W_dec, b_dec = (
        (sae.W_dec_FD, sae.b_dec_D)
        if isinstance(sae, Crosscoder)
        else ((d := getattr(sae, "shared", sae)).W_dec_FD, d.b_dec_D)
    )
    torch.testing.assert_close(out.reconstruction_ND, expected_NF @ W_dec + b_dec, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ANY_BUT_GATED)
def test_a_view_reads_what_the_sae_reads_shares_its_weights_and_leaves_it_as_it_was(name: str) -> None:
    sae = random_sae(name)
    x_LND, before = random_x(sae), copy.deepcopy(sae)
    expected = sae(Normalised(x_LND))
    view = at_sparsity(sae, infer_k=5)
    assert type(view) is type(sae)
    own = {parameter.data_ptr() for parameter in sae.parameters()}
    assert {parameter.data_ptr() for parameter in view.parameters()} <= own
    torch.testing.assert_close(view(Normalised(x_LND)).x_ND, expected.x_ND)
    assert torch.equal(sae(Normalised(x_LND)).reconstruction_ND, before(Normalised(x_LND)).reconstruction_ND)


def test_topk_at_its_own_k_is_itself() -> None:
    sae = random_sae("topk")
    torch.testing.assert_close(  # the training pass sums over all pairs of so small a dictionary
        at_sparsity(sae, infer_k=9)(Normalised(random_x(sae))).reconstruction_ND,
        sae(Normalised(random_x(sae)))[1],
    )


def test_more_latents_than_there_are_are_refused() -> None:
    with pytest.raises(WrongInput, match=r"--infer-k 49 is more than the SAE's 48 latents"):
        at_sparsity(random_sae("topk"), infer_k=49)


@pytest.mark.parametrize(("name", "changes"), [("gated", {}), ("routesae", {"routed": "gated"})])
def test_gated_saes_have_no_other_sparsity(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(WrongInput, match="--theta is not for a gated SAE"):
        at_sparsity(random_sae(name, **changes), theta=1.0)


# ------------------------------------------------------------------------------------------------- the whole stage


@pytest.fixture(scope="module")
def saes(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saes")
    settings = {"sae": ["topk", "routesae"], "layer": 3, "latents": 64, "k": 8, "batch_tokens": 1024, "device": "cpu"}
    train(settings_of({**settings, "cache": str(tiny_cache.path), "out": str(out)}))
    return out


def scored(cache: Cache, out: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = AnalyzeSettings(cache=str(cache.path), out=str(out), device="cpu", **changes)
    rows: list[dict[str, Any]] = analyze(settings)["saes"]
    return rows


def test_a_sweep_has_a_row_for_each_sae_and_value_and_its_own_k_scores_as_the_sae(
    tiny_cache: Cache, saes: Path
) -> None:
    metrics = ("NormMSE", "L0", "KLDiv", "Recovered")
    rows = scored(tiny_cache, saes, metrics=metrics, infer_k=(4, 8, 16), theta=(0.5,))
    assert [(row["variant"], row.get("infer_k"), row.get("theta")) for row in rows] == [
        (name, *value) for name in ("routesae", "topk") for value in ((4, None), (8, None), (16, None), (None, 0.5))
    ]
    plain = {row["variant"]: row for row in scored(tiny_cache, saes, metrics=metrics)}
    for name in ("routesae", "topk"):
        by_k = {row["infer_k"]: row for row in rows if row["variant"] == name and "infer_k" in row}
        for metric in metrics:
            assert by_k[8][metric] == pytest.approx(plain[name][metric], rel=1e-6, abs=1e-7)
        assert by_k[4]["L0"] < by_k[8]["L0"] < by_k[16]["L0"]
        assert all(len({by_k[k][metric] for k in by_k}) == 3 for metric in metrics)


def test_a_gated_sae_among_others_is_left_out_with_a_warning(
    tiny_cache: Cache, saes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"sae": "gated", "layer": 3, "latents": 64, "k": 8, "batch_tokens": 4096, "name": "slow-gate"}
    train(settings_of({**settings, "cache": str(tiny_cache.path), "out": str(tmp_path), "device": "cpu"}))
    topk, gated = str(saes / "topk_layer3_64_k8"), str(tmp_path / "slow-gate")
    rows = scored(tiny_cache, saes, saes=(gated, topk), metrics=("L0",), infer_k=(4, 16, 65))
    assert [(row["variant"], row["infer_k"]) for row in rows] == [("topk", 4), ("topk", 16)]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "left out: slow-gate: --infer-k is not for a gated SAE, whose latents are not a function of one number",
        "left out: topk_layer3_64_k8: --infer-k 65 is more than the SAE's 64 latents; lower it",
    ]
    with pytest.raises(WrongInput, match=r"slow-gate: --infer-k is not for a gated SAE"):
        scored(tiny_cache, tmp_path, saes=(gated,), infer_k=(4,))
