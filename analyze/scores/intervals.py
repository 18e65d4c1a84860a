"""Scores and their 95 % confidence intervals, from sums over each row of tokens.

A percentile bootstrap over rows (Efron & Tibshirani 1993, chapter 13): rows are drawn with replacement, as many as
there are, and the metric is computed anew from each draw. Rows are drawn and not tokens, since the tokens of a row
depend on each other. Every metric of every SAE is computed from the same draws. With fewer than some thirty rows an
interval is too narrow: harvest or score more.

Dimension letters: S rows of tokens, R draws, L layers.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from routesae.analyze.scores.metrics import Metric

log = logging.getLogger(__name__)
DRAWS = 1000
ENDS = (2.5, 97.5)  # percentiles between which 95 % of the draws lie

Array = npt.NDArray[np.float64]


def draws(rows: int, seed: int, count: int = DRAWS) -> Array:
    """[R, S]: how often each row is in each draw."""
    random = np.random.Generator(np.random.PCG64(seed))
    return random.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)


def measure(
    metrics: Iterable[Metric],
    row_sums: Mapping[str, Any],
    drawn_RS: Array,
    *,
    layers: Sequence[int] = (),
    dead: float | None = None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The numbers of each metric by column, and [low, high] of those that have an interval.

    row_sums: by the names of routesae.analyze.scores.metrics, [S] or [S, L], tensors or arrays. layers: of a number
    that has a value for each of them. dead: the share of dead latents, which is no sum over rows. A number is None if
    it does not apply or is undefined on these rows. A single row has no interval.
    """
    whole = {name: np.asarray(sums_S.sum(0))[None] for name, sums_S in row_sums.items()}
    drawn = {name: drawn_RS @ np.asarray(sums_S) for name, sums_S in row_sums.items()}
    if dead is not None:
        whole["dead"] = np.array([dead])
    numbers: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    with np.errstate(divide="ignore", invalid="ignore"):  # some draws may hold no token, or no loss, of the divisor
        for metric in metrics:
            for name, function in metric.numbers.items():
                value = function(whole)
                if value is None or not np.isfinite(value).all():
                    if value is not None:
                        log.warning("%s is undefined on these rows: it divides by zero or a score is NaN", name)
                    numbers[name] = None
                elif value.ndim > 1:
                    numbers[name] = dict(zip(layers, value[0].tolist(), strict=True))
                else:
                    numbers[name] = float(value[0])
                    if metric.by_row and drawn_RS.shape[1] > 1:
                        of_draws: Any = function(drawn)
                        low, high = np.nanpercentile(of_draws, ENDS)
                        if np.isfinite([low, high]).all():
                            intervals[name] = [float(low), float(high)]
    return numbers, intervals
