"""Intervals cover what they claim to, are over rows, and are of the scores themselves."""

from __future__ import annotations

import numpy as np
import pytest

from routesae.analyze.scores.intervals import draws, measure
from routesae.analyze.scores.metrics import METRICS
from routesae.harvest.cache.reader import Cache
from routesae.train.evaluate import score_on_cache
from routesae.train.saes import Recipe, build


def test_intervals_of_a_mean_cover_the_truth_19_times_of_20() -> None:
    """300 samples of 60 rows whose tokens are all alike: drawn by token, intervals would be a third as wide."""
    random = np.random.Generator(np.random.PCG64(0))
    drawn_RS, covered = draws(60, seed=1), 0
    for _ in range(300):
        tokens_S = random.integers(4, 13, 60).astype(float)
        row_mean_S = random.normal(3, 1, 60)
        of_rows = {"shares": row_mean_S * tokens_S, "readings": tokens_S}
        ((low, high),) = measure([METRICS["NormMSE"]], of_rows, drawn_RS)[1].values()
        covered += low <= 3 <= high
    assert 0.90 < covered / 300 < 0.99  # 0.95 less a little, as percentile intervals of 60 are; s.d. 0.013


def test_an_interval_is_of_the_ratio_of_sums_and_not_of_a_mean_of_rows() -> None:
    """One long row that is bad: the mean over tokens is its own, whatever the 29 short ones are."""
    tokens_S, errors_S = np.array([1000.0] + [1.0] * 29), np.array([2000.0] + [0.0] * 29)
    drawn_RS = draws(30, seed=0)
    (numbers, intervals) = measure([METRICS["NormMSE"]], {"shares": errors_S, "readings": tokens_S}, drawn_RS)
    (low, high) = intervals["NormMSE"]
    assert numbers == {"NormMSE": 2000 / 1029}
    with_it = drawn_RS[:, 0] > 0
    assert 0.55 < with_it.mean() < 0.70  # 1 − (29/30)^30
    assert (low, high) == (0.0, pytest.approx(2, abs=0.06))


def test_draws_are_of_as_many_rows_as_there_are_and_fixed_by_the_seed() -> None:
    drawn_RS = draws(40, seed=3)
    assert drawn_RS.shape == (1000, 40)
    assert (drawn_RS.sum(1) == 40).all()
    assert np.abs(drawn_RS.mean(0) - 1).max() < 0.15  # no row more than another; s.d. 0.03
    assert np.array_equal(drawn_RS, draws(40, seed=3))
    assert not np.array_equal(drawn_RS, draws(40, seed=4))


def test_one_row_has_no_interval_and_dead_never_has() -> None:
    row_sums = {"shares": np.array([1.0]), "readings": np.array([2.0])}
    assert measure([METRICS["NormMSE"]], row_sums, draws(1, seed=0)) == ({"NormMSE": 0.5}, {})
    assert measure([METRICS["Dead"]], {}, draws(9, seed=0), dead=0.25) == ({"Dead": 0.25}, {})


def test_an_undefined_score_is_none_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """One token that equals the mean has no variance; JSON has no NaN and no infinity."""
    row_sums = {"errors": np.array([1.0, 0.0]), "deviations": np.zeros(2)}
    assert measure([METRICS["FVU"]], row_sums, draws(2, seed=0)) == ({"FVU": None}, {})
    assert "FVU is undefined on these rows" in caplog.text


@pytest.mark.parametrize("name", ["topk", "mlsae", "crosscoder", "routesae"])
def test_by_row_sums_come_to_the_scores_and_stand_at_their_rows(name: str, tiny_cache: Cache) -> None:
    """Each row's numbers are those of the row scored alone, though shards hold tokens shuffled."""
    first, after = 120, 136  # of two shards
    layers = (3,) if name == "topk" else tiny_cache.manifest.layers
    sae = build(Recipe(sae=name, layers=layers, width=32, latents=64, k=8))
    metrics = [METRICS[name] for name in ("NormMSE", "FVU", "L0", "Dead", "Routing")]

    scores = score_on_cache(sae, tiny_cache, first, after)
    of_rows = scores.by_row
    numbers = measure(metrics, of_rows, draws(after - first, 0), layers=layers, dead=scores.dead)[0]
    expected = {"NormMSE": scores.norm_mse, "FVU": scores.fvu, "L0": scores.l0, "Dead": scores.dead}
    assert numbers == {**expected, "Entropy": scores.routing_entropy, "Shares": scores.layer_shares}
    for row in (first, 127, 128, after - 1):
        alone = score_on_cache(sae, tiny_cache, row, row + 1).by_row
        for column in sorted(of_rows.keys() - {"deviations"}):  # from the mean of all rows, which is another one
            np.testing.assert_allclose(of_rows[column][row - first], alone[column][0], rtol=1e-5, err_msg=column)
    assert (of_rows["readings"] > 0).all()
