"""Every metric of `routesae analyze`: one record each, from which flags, table, intervals, page and docs are made.

A metric is a function of sums over rows of tokens. One function therefore gives both the score, from the sums over
all rows, and its confidence interval, from the sums over rows drawn with replacement. These are the sums, each an
array [R] of R draws (R = 1 for the score itself), by the name that the functions below use:

    readings     inputs that the SAE read: the kept tokens, times the layers for mlsae and random
    shares       ‖x−x̂‖²/‖x‖² of each reading; errors: ‖x−x̂‖²; deviations: ‖x−mean‖²; active: active latents
    routed       [R, L] tokens routed to each layer; missing without a router
    dead         no sum: the share of latents that are active on no token
    rows         rows of tokens; positions: all of their positions; predictions: positions with a next token
    kl           KL(P_clean ‖ P_spliced) of each position, in nats
    documents    labelled documents; probe_k: those whose label is told from k latents, probe_input: from the input
    of_letter    [R, 26] readings of words by first letter; by_input, by_latents: those that a probe of the input or
                 the letter's main latents take for it; recognised, recognised_by_latents: those that they do rightly
    absorbed     [R, 26] shares of the readings that the probe recognises which other latents stand in for;
                 fully_absorbed: those that one latent stands in for alone
    ce_clean     cross-entropy of each prediction, in nats; ce_spliced: spliced; ce_zero: with zeros spliced in

This module imports no torch, so that the command line knows the names of the metrics at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]
    Sums = Mapping[str, Array]
    Function = Callable[[Sums], Array | None]

LOWER, NEITHER, HIGHER = -1, 0, 1


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What one name of --metric computes.

    column: its name in the results, if that is not the metric's. value: [R], or None if it does not apply to the SAE.
    details: further numbers that are written beside it, [R] or one a layer [R, L], in the same unit.
    drawn: what its sums are over and its interval draws: rows of tokens, documents that have a label, or words.
    zero_ablation: whether the LM also runs with zeros in the SAE's place.
    by_row: whether it is a function of sums over rows, and so has an interval.
    """

    name: str
    meaning: str
    better: int
    value: Function
    column: str = ""
    details: Mapping[str, Function] = field(default_factory=dict)
    unit: str = ""
    needs_lm: bool = False
    drawn: str = "rows"
    zero_ablation: bool = False
    by_row: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)

    @property
    def numbers(self) -> dict[str, Function]:
        """The functions of all that it adds to a row of the results, by column."""
        return {self.column: self.value, **self.details}


def _route_shares(sums: Sums) -> Array | None:
    return sums["routed"] / sums["routed"].sum(-1, keepdims=True) if "routed" in sums else None


def _route_entropy(sums: Sums) -> Array | None:
    import torch

    shares_RL = _route_shares(sums)
    return None if shares_RL is None else torch.special.entr(torch.from_numpy(shares_RL)).sum(-1).numpy()


def _kl_div(sums: Sums) -> Array:
    return sums["kl"] / sums["positions"]


def _mean_ce(sums: Sums, of: str) -> Array:
    return sums[f"ce_{of}"] / sums["predictions"]


def _delta_ce(sums: Sums) -> Array:
    return _mean_ce(sums, "spliced") - _mean_ce(sums, "clean")


def _mean_over_letters(part: Array, whole: Array) -> Array:
    """[R] of [R, 26], over the letters that there are; in a draw one may be missing."""
    shares_RA: Array = part / whole.clip(min=1)  # 0 where the letter is missing
    mean_R: Array = shares_RA.sum(-1) / (whole > 0).sum(-1)
    return mean_R


def _letter_f1(sums: Sums, of: str, right: str) -> Array:
    return _mean_over_letters(2 * sums[right], sums["of_letter"] + sums[of])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="NormMSE",
            meaning="mean of the squared error over the squared norm of the SAE's input",
            better=LOWER,
            value=lambda sums: sums["shares"] / sums["readings"],
        ),
        Metric(
            name="FVU",
            meaning="fraction of the variance of the SAE's input that it leaves unexplained",
            better=LOWER,
            value=lambda sums: sums["errors"] / sums["deviations"],
        ),
        Metric(
            name="L0",
            meaning="mean number of active latents a token",
            better=NEITHER,
            value=lambda sums: sums["active"] / sums["readings"],
        ),
        Metric(
            name="Dead",
            meaning="share of latents that are active on none of the tokens",
            better=LOWER,
            value=lambda sums: sums["dead"],
            by_row=False,  # a draw repeats rows, so it sees fewer different ones and finds more latents dead
        ),
        Metric(
            name="Routing",
            meaning="entropy of the shares of tokens routed to each layer, in nats",
            better=NEITHER,
            column="Entropy",
            unit="nats",
            value=_route_entropy,
            details={"Shares": _route_shares},
        ),
        Metric(
            name="Probe",
            meaning="share of documents whose label is told from one latent a label; also from 5, 20, the input",
            better=HIGHER,
            column="Probe_1",
            value=lambda sums: sums["probe_1"] / sums["documents"],
            details={
                "Probe_5": lambda sums: sums["probe_5"] / sums["documents"],
                "Probe_20": lambda sums: sums["probe_20"] / sums["documents"],
                "Probe_input": lambda sums: sums["probe_input"] / sums["documents"],
            },
            drawn="documents",
        ),
        Metric(
            name="Absorption",
            meaning="share of words' first letters that other latents stand in for; and how well it tells them",
            better=LOWER,
            value=lambda sums: _mean_over_letters(sums["absorbed"], sums["recognised"]),
            details={
                "Absorption_full": lambda sums: _mean_over_letters(sums["fully_absorbed"], sums["recognised"]),
                "Letter_F1": lambda sums: _letter_f1(sums, "by_latents", "recognised_by_latents"),
                "Letter_F1_input": lambda sums: _letter_f1(sums, "by_input", "recognised"),
            },
            drawn="words",
        ),
        Metric(
            name="KLDiv",
            meaning="mean KL divergence of the LM's next token, clean against spliced, in nats",
            better=LOWER,
            unit="nats",
            value=_kl_div,
            details={"KLDiv_seq": lambda sums: _kl_div(sums) * (sums["positions"] / sums["rows"])},
            needs_lm=True,
        ),
        Metric(
            name="DeltaCE",
            meaning="cross-entropy of the LM, spliced minus clean, in nats a token",
            better=LOWER,
            unit="nats",
            value=_delta_ce,
            details={"CE_clean": lambda sums: _mean_ce(sums, "clean")},
            needs_lm=True,
        ),
        Metric(
            name="Recovered",
            meaning="share of the loss between zero ablation and clean that the SAE recovers",
            better=HIGHER,
            value=lambda sums: 1 - _delta_ce(sums) / (_mean_ce(sums, "zero") - _mean_ce(sums, "clean")),
            needs_lm=True,
            zero_ablation=True,
        ),
    )
}
# Those that any cache has what they need for.
CACHE_METRICS = tuple(name for name, metric in METRICS.items() if metric.drawn == "rows" and not metric.needs_lm)
LM_METRICS = tuple(name for name, metric in METRICS.items() if metric.needs_lm)
