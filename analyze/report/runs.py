"""Read what the folders of SAEs say of their runs, and make the table that compares the runs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from routesae.analyze.contexts.file import ContextsFile, read_contexts
from routesae.analyze.inputs.saes import sae_folders
from routesae.analyze.interpret.settings import MODES
from routesae.analyze.interpret.summary import read_interpretations, read_summary
from routesae.analyze.scores.metrics import HIGHER, METRICS, NEITHER
from routesae.analyze.scores.results import described, read_results
from routesae.harvest.settings import layer_list
from routesae.reporting import WrongInput, best_row, visible
from routesae.train.folder.checkpoint import Numbers, Source, load_sae, read_recipe, read_source
from routesae.train.log import read_metrics
from routesae.train.saes import SAE, Recipe

log = logging.getLogger(__name__)


class Column(NamedTuple):
    """A column of the table. better: LOWER, HIGHER or NEITHER."""

    name: str
    meaning: str
    better: int = NEITHER
    numeric: bool = True


RECIPE = (
    Column("variant", "kind of SAE", numeric=False),
    Column("layers", "layers of the language model that it reads", numeric=False),
    Column("latents", "size of the dictionary"),
    Column("k", "active latents a token: exactly, on average or aimed at"),
)
MEASURED = (
    *(Column(metric.column, metric.meaning, metric.better) for metric in METRICS.values()),
    Column("Features", "latents that the published rule keeps", HIGHER),
    Column("Score", "mean monosemanticity by the explainer, 1 to 5", HIGHER),
    Column("detection", "balanced accuracy of explanations on texts", HIGHER),
    Column("fuzzing", "balanced accuracy of explanations on tokens", HIGHER),
)
HELD_OUT = {"NormMSE": "norm_mse", "FVU": "fvu", "L0": "l0", "Dead": "dead", "Entropy": "routing_entropy"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One SAE and what is known of it.

    curve: the lines of metrics.jsonl. scores: by column of the table. intervals: 95 %, of those that have any.
    shares: of tokens, by layer; None without a router. explanations: what interpret wrote, by latent.
    """

    name: str
    folder: Path
    recipe: Recipe
    source: Source
    curve: Sequence[Numbers]
    scores: Mapping[str, Any]
    intervals: Mapping[str, tuple[float, float]]
    shares: Mapping[str, float] | None
    contexts: ContextsFile | None
    explanations: Mapping[int, Mapping[str, Any]]

    def load(self, device: torch.device) -> SAE:
        """Load the weights. Raises WrongInput where they are not those that the contexts were made with."""
        sae = load_sae(self.folder, device)
        if self.contexts is not None and self.contexts.facts["sae"]["weights"] != sae.hashes:
            raise WrongInput(f"{self.folder} has other weights than its contexts; run routesae contexts again")
        return sae


def read_runs(
    references: Sequence[str], out: Path, scores_file: str | None, tokens_hash: str | None = None
) -> list[Run]:
    """Read the SAEs that `references` name, or all under `out`, with their contexts of a corpus.

    Raises WrongInput where one is missing or damaged, or there are contexts of several corpora and none is named.
    """
    scored: dict[str, Mapping[str, Any]] = {}
    for row in [] if scores_file is None else read_results(Path(scores_file))["saes"]:
        if "infer_k" not in row and "theta" not in row:
            scored[row["sae"]] = scored[str(Path(row["folder"]).resolve())] = row
    places = sae_folders(references, out)
    runs = [_read_run(name, folder, beside, scored, tokens_hash) for name, (folder, beside) in places.items()]
    if scores_file and not any(key in scored for run in runs for key in (run.name, str(run.folder.resolve()))):
        log.warning("--scores %s has scores of none of these SAEs as they were trained", scores_file)
    return runs


def _read_run(
    name: str, folder: Path, beside: Path, scored: Mapping[str, Mapping[str, Any]], tokens_hash: str | None
) -> Run:
    """beside: the folder that contexts and interpret write into."""
    row = scored.get(str(folder.resolve()), scored.get(name, {}))
    source, summary = read_source(folder), read_summary(beside)
    held_out = source.held_out or {}
    known: dict[str, Any] = {column: held_out.get(key) for column, key in HELD_OUT.items()}
    known |= {name: value for name, value in row.items() if value is not None} | described(beside, tokens_hash)
    known |= {mode: tested.balanced_accuracy for mode in MODES if (tested := getattr(summary, mode, None))}
    shares = row.get("Shares") or held_out.get("layer_shares")
    scores = {column.name: known[column.name] for column in MEASURED if known.get(column.name) is not None}
    if odd := [name for name, value in scores.items() if not isinstance(value, int | float)]:
        raise WrongInput(f"{odd[0]} {scores[odd[0]]!r} of {name} is not a number")
    return Run(
        name=visible(name),
        folder=folder,
        recipe=read_recipe(folder),
        source=source,
        curve=read_metrics(folder),
        scores=scores,
        intervals={column: (ends[0], ends[-1]) for column, ends in row.get("intervals", {}).items() if ends},
        shares=shares if isinstance(shares, dict) else None,
        contexts=read_contexts(beside, tokens_hash),
        explanations=read_interpretations(beside),
    )


# ------------------------------------------------------------------------------------------------- the table


class Cell(NamedTuple):
    """text: for people. value: to sort by, or None. note: its interval, in words. best: better than all others,
    beyond their intervals."""

    text: str
    value: float | str | None
    note: str
    best: bool


def table_of(runs: Sequence[Run]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns for which any run has a value, and a row for each run."""
    values = []
    for run in runs:
        span = layer_list(run.recipe.layers).replace("-", "–")
        recipe = {"variant": run.recipe.sae, "layers": span, "latents": run.recipe.latents, "k": run.recipe.k}
        values.append({**recipe, **run.scores, "intervals": run.intervals})
    columns = [column for column in RECIPE + MEASURED if any(row.get(column.name) is not None for row in values)]
    best = {}
    for column in columns:  # without intervals nobody knows whether a difference is one
        known = all(column.name in run.intervals for run in runs if column.name in run.scores)
        best[column.name] = best_row(values, column.name, column.better) if known else None
    rows = [
        [_cell(run, column.name, row.get(column.name), best[column.name] == at) for column in columns]
        for at, (run, row) in enumerate(zip(runs, values, strict=True))
    ]
    return columns, rows


def _cell(run: Run, name: str, value: Any, best: bool) -> Cell:
    if value is None or isinstance(value, str):
        return Cell(value or "–", value, "", best=False)
    if name == "Dead":
        text = f"{value:.1%}"
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    low, high = run.intervals.get(name, (None, None))
    return Cell(text, value, "" if low is None else f"95 % interval: {low:.4g} to {high:.4g}", best)
