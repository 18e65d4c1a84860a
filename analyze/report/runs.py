"""Read what the folders of SAEs say of their runs, and make the table that compares the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from routesae.analyze.contexts.file import ContextsFile, read_contexts, read_facts
from routesae.analyze.inputs.identity import sae_identity
from routesae.analyze.inputs.saes import sae_folders
from routesae.analyze.interpret.ledger import SUMMARY
from routesae.analyze.interpret.settings import MODES
from routesae.analyze.interpret.summary import read_interpretations
from routesae.analyze.scores.metrics import HIGHER, METRICS, NEITHER
from routesae.analyze.scores.results import described
from routesae.reporting import WrongInput, visible
from routesae.train.folder.checkpoint import METRICS_FILE, load_sae, read_config, read_recipe
from routesae.train.saes import SAE, Recipe


class Column(NamedTuple):
    """A column of the table. better: LOWER, HIGHER or NEITHER."""

    name: str
    meaning: str
    better: int = NEITHER
    numeric: bool = True


COLUMNS = (
    Column("variant", "kind of SAE", numeric=False),
    Column("layers", "layers of the language model that it reads", numeric=False),
    Column("latents", "size of the dictionary"),
    Column("k", "active latents a token: exactly, on average or aimed at"),
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

    source: what it was trained from; {} for one from elsewhere. curve: the lines of metrics.jsonl. scores: by column
    of the table. shares: of tokens, by layer; None without a router. explanations: what interpret wrote, by latent.
    """

    name: str
    folder: Path
    recipe: Recipe
    source: Mapping[str, Any]
    curve: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Any]
    shares: Mapping[str, float] | None
    contexts: ContextsFile | None
    explanations: Mapping[int, Mapping[str, Any]]

    def load(self, device: torch.device) -> SAE:
        """Load the weights. Raises WrongInput where they are not those that the contexts were made with."""
        sae = load_sae(self.folder, device)
        if self.contexts is not None:
            weights = sae_identity(sae)["weights"]
            if self.contexts.facts["sae"].get("weights", weights) != weights:
                raise WrongInput(f"{self.folder} has other weights than its contexts; run routesae contexts again")
        return sae


def read_runs(
    references: Sequence[str], out: Path, scores_file: str | None, tokens_hash: str | None = None
) -> list[Run]:
    """Read the SAEs that `references` name, or all under `out`, with their contexts of a corpus.

    Raises WrongInput where one is missing or damaged, or there are contexts of several corpora and none is named.
    """
    scored = _read_scores(scores_file)
    places = sae_folders(references, out)
    return [_read_run(name, folder, beside, scored, tokens_hash) for name, (folder, beside) in places.items()]


def _read_run(
    name: str, folder: Path, beside: Path, scored: Mapping[str, Mapping[str, Any]], tokens_hash: str | None
) -> Run:
    """beside: the folder that contexts and interpret write into."""
    metadata = read_config(folder).get("metadata")
    ours = metadata.get("routesae") if isinstance(metadata, dict) else None
    source = (ours.get("source") if isinstance(ours, dict) else None) or {}
    held_out = source.get("held_out") or {}
    row = scored.get(str(folder.resolve()), scored.get(name, {}))
    known = {column: held_out.get(key) for column, key in HELD_OUT.items()}
    known |= {column.name: row[column.name] for column in COLUMNS if row.get(column.name) is not None}
    known |= described(beside, tokens_hash)
    if (beside / SUMMARY).is_file():
        summary = json.loads((beside / SUMMARY).read_bytes())  # `described` has read it already: it is whole
        known |= {mode: (summary.get(mode) or {}).get("balanced_accuracy") for mode in MODES}
    return Run(
        name=visible(name),
        folder=folder,
        recipe=read_recipe(folder),
        source=source,
        curve=_read_curve(folder / METRICS_FILE),
        scores={column: value for column, value in known.items() if value is not None},
        shares=row.get("Shares") or held_out.get("layer_shares"),
        contexts=read_contexts(beside, tokens_hash) if read_facts(beside, tokens_hash) is not None else None,
        explanations=read_interpretations(beside),
    )


def _read_curve(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    except ValueError as error:
        raise WrongInput(f"{path} cannot be read ({error}); copy the SAE's folder whole") from error
    return tuple(line for line in lines if isinstance(line, dict) and "tokens" in line)


def _read_scores(file: str | None) -> dict[str, Mapping[str, Any]]:
    """Rows of analyze --json, by the SAE's name and by its folder, without those at another sparsity."""
    if file is None:
        return {}
    try:
        rows = json.loads(Path(file).read_bytes())["saes"]
        rows = [row for row in rows if "infer_k" not in row and "theta" not in row]
        by_name = {row["sae"]: row for row in rows}
        return by_name | {str(Path(row["folder"]).resolve()): row for row in rows if "folder" in row}
    except FileNotFoundError:
        raise WrongInput(f"--scores {file} does not exist; write it with routesae analyze --json {file}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongInput(f"--scores {file} was not written by routesae analyze --json ({error!r})") from error


# ------------------------------------------------------------------------------------------------- the table


class Cell(NamedTuple):
    """text: for people. value: to sort by, or None. best: whether it is the best of its column."""

    text: str
    value: float | str | None
    best: bool


def table_of(runs: Sequence[Run]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns for which any run has a value, and a row for each run."""
    values = []
    for run in runs:
        layers = run.recipe.layers
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
        recipe = {"variant": run.recipe.sae, "layers": span, "latents": run.recipe.latents, "k": run.recipe.k}
        values.append({**recipe, **run.scores})
    columns = [column for column in COLUMNS if any(row.get(column.name) is not None for row in values)]
    best = {column.name: _best([row.get(column.name) for row in values], column.better) for column in columns}
    rows = [[_cell(column.name, row.get(column.name), best[column.name]) for column in columns] for row in values]
    return columns, rows


def _best(values: Sequence[Any], better: int) -> float | None:
    """The best value, or None where no direction is better or the values do not differ."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if better == NEITHER or len(set(numbers)) < 2:
        return None
    return max(numbers) if better == HIGHER else min(numbers)


def _cell(name: str, value: Any, best: float | None) -> Cell:
    if value is None or isinstance(value, str):
        return Cell(value or "–", value, best=False)
    if name == "Dead":
        text = f"{value:.1%}"
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return Cell(text, value, best=value == best)
