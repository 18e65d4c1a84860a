"""Scores from the cache alone, against float64 numpy over all held-out tokens at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from routesae.harvest.cache.reader import Cache
from routesae.reporting import Progress, WrongInput
from routesae.tests.hidden import Normalised
from routesae.train import evaluate
from routesae.train.evaluate import CacheScores, entropy, score_all_on_cache, score_on_cache
from routesae.train.saes import SAE, Recipe, RouteSAE, SingleLayerSAE, build

LATENTS, K = 64, 6
Doubles = npt.NDArray[np.float64]


def topk(cache: Cache, layer: int = 3, width: int | None = None) -> SingleLayerSAE:
    width = width or cache.manifest.width
    recipe = Recipe(sae="topk", layers=(layer,), width=width, latents=LATENTS, k=K)
    sae = build(recipe, torch.Generator().manual_seed(0))
    assert isinstance(sae, SingleLayerSAE)
    with torch.no_grad():  # some latents never fire, some once, and the ReLU cuts some of the top k
        sae.b_enc_F[:5] = -100
        sae.b_enc_F[5:] = torch.linspace(-4, -0.5, LATENTS - 5)
    return sae


def routesae(cache: Cache, routing: str) -> RouteSAE:
    width, layers = cache.manifest.width, cache.manifest.layers
    recipe = Recipe(sae="routesae", layers=layers, width=width, latents=LATENTS, k=K, routing=routing)
    sae = build(recipe, torch.Generator().manual_seed(0))
    assert isinstance(sae, RouteSAE)
    with torch.no_grad():
        sae.router_LD.mul_(3)
    return sae


def variant(cache: Cache, name: str, **changes: Any) -> SAE:
    """One that a batch has been through, with a few latents that never fire; in training mode still."""
    layers = (3,) if name in ("batchtopk", "jumprelu", "vanilla", "gated") else cache.manifest.layers
    recipe = Recipe(sae=name, layers=layers, width=cache.manifest.width, latents=LATENTS, k=K, **changes)
    sae = build(recipe, torch.Generator().manual_seed(0))
    x_LND = torch.randn(len(layers), 200, cache.manifest.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.initialise(Normalised(x_LND))
        for key, parameter in sae.named_parameters():
            if key.endswith(("b_enc_F", "b_gate_F")):
                parameter.add_(torch.linspace(-1, 0, LATENTS))
                parameter[:5] = -100
        sae(Normalised(x_LND))
    return sae


def stored(cache: Cache, first_row: int, after_row: int, layers: tuple[int, ...]) -> Doubles:
    """Every kept token of those rows, read through zarr."""
    import zarr

    group, pieces = zarr.open_group(str(cache.path), mode="r"), []
    for index in range(cache.manifest.shard_count):
        shard: Any = group[f"shard-{index:05d}"]
        row = shard.attrs["rows"][0] + shard["order"][:] // cache.manifest.context
        inside = (first_row <= row) & (row < after_row)
        pieces.append(np.stack([shard[f"layer_{layer:02d}"][:][inside] for layer in layers]))
    return np.concatenate(pieces, axis=1).astype(np.float64)


class Naive(NamedTuple):
    """The scores, by their formulas."""

    norm_mse: float
    fvu: float
    l0: float
    dead: float
    density_F: Doubles
    shares_L: Doubles | None


def naive_scores(sae: SAE, hidden_LND: Doubles) -> Naive:
    """One array over all tokens, in float64, from the weights alone."""
    recipe = sae.recipe
    weights = {key.removeprefix("shared."): value.double().numpy() for key, value in sae.state_dict().items()}
    std = hidden_LND.std(2, ddof=1, keepdims=True) + 1e-6
    normalised_LND = (hidden_LND - hidden_LND.mean(2, keepdims=True)) / std
    x_ND, shares_L = normalised_LND[0], None
    if recipe.sae in ("mlsae", "random"):
        x_ND = np.concatenate(list(normalised_LND))
    if recipe.sae == "crosscoder":
        x_ND = np.concatenate(list(normalised_LND), axis=1)
    if recipe.sae == "routesae":
        exp_NL = np.exp(normalised_LND.sum(0) @ weights["router_LD"].T)
        w_NL = exp_NL / exp_NL.sum(1, keepdims=True)
        at_N = w_NL.argmax(1)
        x_ND = np.einsum("nl,lnd->nd", w_NL, normalised_LND)
        if recipe.routing == "hard":
            x_ND = normalised_LND[at_N, np.arange(len(at_N))] * w_NL.max(1)[:, None]
        shares_L = np.array([(at_N == at).mean() for at in range(len(recipe.layers))])
    if recipe.sae == "crosscoder":
        W_dec, b_dec = weights["W_dec_FD"], weights["b_dec_D"]
        f_NF = np.maximum(x_ND @ weights["W_enc_FD"].T + weights["b_enc_F"], 0)
    else:
        W_dec, b_dec = weights["W_dec_FD"], weights["b_dec_D"]
        z_NF = (x_ND - b_dec) @ weights["W_enc_FD"].T + weights.get("b_enc_F", 0.0)
        threshold = weights.get("threshold", weights.get("threshold_F", 0.0))
        if recipe.sae in ("batchtopk", "jumprelu", "vanilla"):
            f_NF = np.where(z_NF > np.maximum(threshold, 0), z_NF, 0)
        elif recipe.sae == "gated":
            magnitude_NF = np.exp(weights["r_mag_F"]) * z_NF + weights["b_mag_F"]
            f_NF = np.where(z_NF + weights["b_gate_F"] > 0, np.maximum(magnitude_NF, 0), 0)
        else:
            kept_NF = z_NF >= np.sort(z_NF, axis=1)[:, -recipe.k, None]
            f_NF = np.where(kept_NF & (z_NF > 0), z_NF, 0)
    errors_N = ((x_ND - f_NF @ W_dec - b_dec) ** 2).sum(1)
    return Naive(
        norm_mse=(errors_N / (x_ND**2).sum(1)).mean(),
        fvu=errors_N.sum() / ((x_ND - x_ND.mean(0)) ** 2).sum(),
        l0=(f_NF > 0).sum(1).mean(),
        dead=((f_NF > 0).sum(0) == 0).mean(),
        density_F=(f_NF > 0).mean(0),
        shares_L=shares_L,
    )


def assert_scores_are(scores: CacheScores, naive: Naive, tokens: int) -> None:
    assert scores.tokens == tokens
    assert scores.norm_mse == pytest.approx(naive.norm_mse, rel=1e-4)
    assert scores.fvu == pytest.approx(naive.fvu, rel=1e-4)
    assert scores.l0 == pytest.approx(naive.l0, abs=0.01)
    assert scores.dead == pytest.approx(naive.dead)


# A batch of 4096 is all held-out tokens at once; 100 leaves a short last one, which a mean of batch means would
# weigh too much.
@pytest.mark.parametrize("batch_tokens", [100, 4096])
def test_topk_scores_are_those_of_all_held_out_tokens_at_once(
    tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    first, after = tiny_cache.manifest.train_rows, tiny_cache.manifest.rows
    sae = topk(tiny_cache)
    hidden_LND = stored(tiny_cache, first, after, (3,))
    tokens = hidden_LND.shape[1]
    assert 100 < tokens < 4096
    assert tokens % 100 > 0
    naive = naive_scores(sae, hidden_LND)
    assert naive.l0 < K - 0.5
    assert naive.dead >= 5 / LATENTS
    assert 1 in np.rint(naive.density_F * tokens)  # rare, but not dead
    scores = score_on_cache(sae, tiny_cache, first, after)
    assert_scores_are(scores, naive, tokens)
    assert scores.layer_shares is None
    assert scores.routing_entropy is None


@pytest.mark.parametrize("batch_tokens", [100, 4096])
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_routesae_scores_are_those_of_all_held_out_tokens_at_once(
    tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch, routing: str, batch_tokens: int
) -> None:
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    first, after = tiny_cache.manifest.train_rows, tiny_cache.manifest.rows
    sae = routesae(tiny_cache, routing)
    hidden_LND = stored(tiny_cache, first, after, tiny_cache.manifest.layers)
    naive = naive_scores(sae, hidden_LND)
    scores = score_on_cache(sae, tiny_cache, first, after)
    assert_scores_are(scores, naive, hidden_LND.shape[1])
    assert naive.shares_L is not None
    assert (naive.shares_L > 0).sum() > 1
    assert scores.layer_shares is not None
    assert list(scores.layer_shares) == list(tiny_cache.manifest.layers)
    assert list(scores.layer_shares.values()) == pytest.approx(naive.shares_L.tolist(), abs=2 / scores.tokens)
    nonzero_L = naive.shares_L[naive.shares_L > 0]
    assert scores.routing_entropy == pytest.approx(-(nonzero_L * np.log(nonzero_L)).sum(), abs=0.02)


@pytest.mark.parametrize("batch_tokens", [100, 4096])
@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "vanilla", "gated", "crosscoder", "mlsae", "random"])
def test_every_other_variants_scores_are_those_of_all_held_out_tokens_at_once(
    tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str, batch_tokens: int
) -> None:
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    first, after = tiny_cache.manifest.train_rows, tiny_cache.manifest.rows
    sae = variant(tiny_cache, name)
    hidden_LND = stored(tiny_cache, first, after, sae.recipe.layers)
    naive = naive_scores(sae, hidden_LND)
    assert 0.5 < naive.l0 < LATENTS - 5
    assert naive.dead >= 5 / LATENTS
    learned = {key: value.clone() for key, value in sae.state_dict().items()}
    scores = score_on_cache(sae, tiny_cache, first, after)
    assert_scores_are(scores, naive, hidden_LND.shape[1])
    assert scores.layer_shares is None
    assert all(torch.equal(value, learned[key]) for key, value in sae.state_dict().items())  # none learned from it


def test_top2_is_scored_at_each_tokens_one_layer_in_use(tiny_cache: Cache) -> None:
    sae = variant(tiny_cache, "routesae", router="top2")
    scores = score_on_cache(sae, tiny_cache, 0, 50)
    assert scores.layer_shares is not None
    assert sum(scores.layer_shares.values()) == pytest.approx(1)
    hidden_LND = stored(tiny_cache, 0, 50, sae.recipe.layers)
    assert scores.tokens == hidden_LND.shape[1]
    weights = {key.removeprefix("shared."): value.double().numpy() for key, value in sae.state_dict().items()}
    std = hidden_LND.std(2, ddof=1, keepdims=True) + 1e-6
    x_LND = (hidden_LND - hidden_LND.mean(2, keepdims=True)) / std
    at_N = (x_LND.sum(0) @ weights["router_LD"].T).argmax(1)
    x_ND = x_LND[at_N, np.arange(len(at_N))]  # unscaled
    z_NF = (x_ND - weights["b_dec_D"]) @ weights["W_enc_FD"].T + weights["b_enc_F"]
    f_NF = np.where(z_NF >= np.sort(z_NF, axis=1)[:, -K, None], np.maximum(z_NF, 0), 0)
    errors_N = ((x_ND - f_NF @ weights["W_dec_FD"] - weights["b_dec_D"]) ** 2).sum(1)
    assert scores.norm_mse == pytest.approx((errors_N / (x_ND**2).sum(1)).mean(), rel=1e-4)


def test_scores_are_of_the_asked_rows_only(tiny_cache: Cache) -> None:
    # Rows 100 to 140 straddle two shards of 128 rows.
    sae = topk(tiny_cache, layer=5)
    hidden_LND = stored(tiny_cache, 100, 140, (5,))
    scores = score_on_cache(sae, tiny_cache, 100, 140)
    assert_scores_are(scores, naive_scores(sae, hidden_LND), hidden_LND.shape[1])


def test_scoring_twice_gives_the_same_numbers(tiny_cache: Cache) -> None:
    sae = routesae(tiny_cache, "hard")
    first, second = (score_on_cache(sae, tiny_cache, 0, 50).to_dict() for _ in range(2))
    assert first == second


def test_saes_scored_together_score_as_alone_and_the_cache_is_read_once(
    tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = {f"topk {layer}": topk(tiny_cache, layer) for layer in (2, 4)}
    several = {name: variant(tiny_cache, name) for name in ("crosscoder", "mlsae", "jumprelu")}
    saes = {
        **single,
        "hard": routesae(tiny_cache, "hard"),
        **several,
        "raw": variant(tiny_cache, "gated", normalize="none"),
    }
    alone = {name: score_on_cache(sae, tiny_cache, 100, 140) for name, sae in saes.items()}
    passes, of_batches = [], evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda *given: passes.append(1) or of_batches(*given))
    together = score_all_on_cache(saes, tiny_cache, 100, 140)
    assert len(passes) == 1
    assert list(together) == list(saes)
    for name in saes:
        assert together[name].to_dict() == alone[name].to_dict(), name
        assert torch.equal(together[name].by_row["errors"], alone[name].by_row["errors"])


def test_scoring_reports_every_token(tiny_cache: Cache) -> None:
    seen: list[Progress] = []
    scores = score_on_cache(topk(tiny_cache), tiny_cache, 0, 300, seen.append)
    assert [progress.done for progress in seen] == [*range(4096, scores.tokens, 4096), scores.tokens]
    assert {progress.total for progress in seen} == {scores.tokens}


def test_scores_as_a_dict_are_plain_json_without_the_densities(tiny_cache: Cache) -> None:
    import json

    given = score_on_cache(topk(tiny_cache), tiny_cache, 0, 50).to_dict()
    assert set(given) == {"tokens", "norm_mse", "fvu", "l0", "dead", "layer_shares", "routing_entropy"}
    assert json.loads(json.dumps(given)) == given


def test_entropy_is_0_on_one_layer_and_ln_l_when_even() -> None:
    assert entropy(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert entropy(torch.full((5,), 0.2)) == pytest.approx(np.log(5))
    assert entropy(torch.tensor([0.25, 0.75])) == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))


# ---------------------------------------------------------------------------------------------- wrong input


def test_an_sae_of_another_width_is_refused_with_both(tiny_cache: Cache) -> None:
    with pytest.raises(WrongInput, match=r"width 48 is not the 32 of"):
        score_on_cache(topk(tiny_cache, width=48), tiny_cache, 0, 10)


def test_an_sae_of_a_layer_that_is_not_there_is_refused(tiny_cache: Cache) -> None:
    with pytest.raises(WrongInput, match=r"layer 6 was not harvested; .* holds layers 2, 3, 4, 5"):
        score_on_cache(topk(tiny_cache, layer=6), tiny_cache, 0, 10)


def test_rows_without_a_kept_token_are_refused(tiny_cache: Cache) -> None:
    with pytest.raises(WrongInput, match=r"no kept token in rows 9999 to 10000"):
        score_on_cache(topk(tiny_cache), tiny_cache, 9999, 10001)


def test_rows_of_a_missing_shard_are_refused_and_others_are_not(tiny_cache: Cache, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))
    shutil.rmtree(copy / "shard-00001")
    first, after = tiny_cache.manifest.shard_range(1)
    with pytest.raises(WrongInput, match="shard-00001"):
        score_on_cache(topk(tiny_cache), Cache(copy), first - 1, after)
    scores = [score_on_cache(topk(tiny_cache), cache, 0, first).norm_mse for cache in (Cache(copy), tiny_cache)]
    assert scores[0] == scores[1]
