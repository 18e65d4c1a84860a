"""How sure a score is: what it is made of, by row of tokens, in; its 95 % confidence interval out.

A percentile bootstrap over rows (Efron & Tibshirani 1993, chapter 13): rows are drawn with replacement, as many as
there are, and the score is computed anew of each draw. Tokens of a row belong together, so it is rows that are drawn.
Every score of every SAE is computed of the same draws. Dead has no interval: a draw repeats rows, so it sees fewer
different ones than there are, and finds more latents dead. Where rows are few (below some thirty) an interval is too
narrow: harvest or score more.

Dimension letters: S rows of tokens, R draws, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from routesae.analyze.scores.metrics import LMScores
from routesae.train.evaluate import CacheScores

DRAWS = 1000
ENDS = (2.5, 97.5)  # percentiles between which 95 % of the draws lie

Array = npt.NDArray[np.float64]
Sums = Mapping[str, Array]
"""What the sums over the rows of each draw are: [R], or [R, L]."""


def _recovered(sums: Sums) -> Array:
    return 1 - (sums["ce_spliced"] - sums["ce_clean"]) / (sums["ce_zero"] - sums["ce_clean"])


def _entropy(sums: Sums) -> Array:
    shares_RL = sums["routed"] / sums["routed"].sum(1, keepdims=True)
    terms_RL: Array = shares_RL * np.log(np.where(shares_RL > 0, shares_RL, 1))
    entropy_R: Array = -terms_RL.sum(1)
    return entropy_R


# Each score as a function of sums over rows, by the name it has among the results.
SCORES: dict[str, Callable[[Sums], Array]] = {
    "NormMSE": lambda sums: sums["shares"] / sums["readings"],
    "FVU": lambda sums: sums["errors"] / sums["deviations"],
    "L0": lambda sums: sums["active"] / sums["readings"],
    "Entropy": _entropy,
    "KLDiv": lambda sums: sums["kl"] / sums["positions"],
    "KLDiv_seq": lambda sums: sums["kl"] / sums["rows"],
    "DeltaCE": lambda sums: (sums["ce_spliced"] - sums["ce_clean"]) / sums["predictions"],
    "CE_clean": lambda sums: sums["ce_clean"] / sums["predictions"],
    "Recovered": _recovered,
}


def draws(rows: int, seed: int, count: int = DRAWS) -> Array:
    """[R, S]: how often each row is in each draw."""
    random = np.random.Generator(np.random.PCG64(seed))
    return random.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)


def intervals(names: Iterable[str], of_rows: Mapping[str, Array], draws_RS: Array) -> dict[str, list[float]]:
    """[low, high] of each score that has an interval; none where there is a single row.

    of_rows: what the scores are made of, for each row, [S] or [S, L].
    """
    wanted = [name for name in names if name in SCORES] if draws_RS.shape[1] > 1 else []
    sums = {name: draws_RS @ values for name, values in of_rows.items()} if wanted else {}
    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of rows that a token or a loss is missing from
        for name in wanted:
            low, high = np.nanpercentile(SCORES[name](sums), ENDS)
            found[name] = [float(low), float(high)]
    return found


def rows_of_cache_scores(scores: CacheScores) -> dict[str, Array]:
    """What CacheScores are made of, by row."""
    named = {name.rpartition("_")[0]: sums for name, sums in scores.by_row._asdict().items() if sums is not None}
    return {name: sums.numpy() for name, sums in named.items()}


def rows_of_lm_scores(scores: LMScores) -> dict[str, Array]:
    """What LMScores are made of, by row."""
    one_S = np.ones(len(scores.kl_S))
    counts = {"rows": one_S, "positions": scores.context * one_S, "predictions": (scores.context - 1) * one_S}
    losses = {"kl": scores.kl_S, "ce_clean": scores.ce_clean_S, "ce_spliced": scores.ce_spliced_S}
    return {**counts, **losses, **({} if scores.ce_zero_S is None else {"ce_zero": scores.ce_zero_S})}
