"""SAE folders in; of each, all that lies in them of a run, and the table that compares the runs, out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from routesae.analyze.contexts.file import CONTEXTS, ContextsFile, read_contexts
from routesae.analyze.interpret.run import SUMMARY, read_interpretations
from routesae.analyze.interpret.settings import MODES
from routesae.analyze.scores.identity import sae_identity
from routesae.analyze.scores.metrics import METRICS
from routesae.analyze.scores.run import described
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import METRICS_FILE, find_saes, load_sae, read_config, read_recipe
from routesae.train.folder.hub import fetch_sae
from routesae.train.saes import SAE, Recipe

# A column of the table, what it says beside its name, and which way is better: -1 less, 1 more, 0 neither.
COLUMNS: dict[str, tuple[str, int]] = {
    "variant": ("", 0),
    "layers": ("layers of the language model that it reads", 0),
    "latents": ("size of the dictionary", 0),
    "k": ("active latents a token, exactly, on average or aimed at", 0),
    **{metric.column: (metric.meaning, metric.better) for metric in METRICS.values()},
    "Features": ("latents that the published rule keeps", 1),
    "Score": ("mean monosemanticity by the explainer, 1 to 5", 1),
    "detection": ("balanced accuracy of explanations on texts", 1),
    "fuzzing": ("balanced accuracy of explanations on tokens", 1),
}
HELD_OUT = {"NormMSE": "norm_mse", "FVU": "fvu", "L0": "l0", "Dead": "dead", "Entropy": "routing_entropy"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One SAE and what is known of it.

    source: what it was trained from; {} for one from elsewhere. curve: the lines of metrics.jsonl. scores: by column
    of the table. shares: of tokens, by layer; None without a router. explanations: by latent, as interpret has them.
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
        """Its weights. Raises WrongInput where the contexts are of others."""
        sae = load_sae(self.folder, device)
        if self.contexts is not None:
            found = sae_identity(self.folder, sae)["weights"]
            if self.contexts.facts["sae"].get("weights", found) != found:
                raise WrongInput(f"{self.folder} has other weights than its contexts; run routesae contexts again")
        return sae


def read_runs(given: Sequence[str], out: Path, scores_file: str | None) -> list[Run]:
    """The SAEs given, or all under `out`. Raises WrongInput where there is none, or a file is damaged."""
    scored = _read_scores(scores_file)
    fetched = {reference: fetch_sae(reference) for reference in given}
    places = list(fetched.items()) if fetched else [(folder.name, folder) for folder in find_saes(out)]
    runs = []
    for reference, folder in places:
        local = not given or folder == Path(reference)
        same_name = sum(other.name == folder.name for _, other in places) > 1
        name = (str(folder) if same_name else folder.resolve().name) if local else reference
        beside = folder if local else out / name.replace("/", "--")  # where contexts puts what is of the hub's
        runs.append(_read_run(name, folder, beside, scored))
    return runs


def _read_run(name: str, folder: Path, beside: Path, scored: Mapping[str, Mapping[str, Any]]) -> Run:
    recipe = read_recipe(folder)
    metadata = read_config(folder).get("metadata")
    ours = metadata.get("routesae") if isinstance(metadata, dict) else None
    source = (ours.get("source") if isinstance(ours, dict) else None) or {}
    held_out = source.get("held_out") or {}
    scores = {column: held_out[key] for column, key in HELD_OUT.items() if held_out.get(key) is not None}
    row = scored.get(str(folder.resolve()), scored.get(name, {}))
    scores |= {column: row[column] for column in COLUMNS if row.get(column) is not None}
    scores |= {**described(beside), **_explained(beside)}
    return Run(
        name=name,
        folder=folder,
        recipe=recipe,
        source=source,
        curve=_read_curve(folder / METRICS_FILE),
        scores=scores,
        shares=row.get("Shares") or held_out.get("layer_shares"),
        contexts=read_contexts(beside) if (beside / CONTEXTS).is_file() else None,
        explanations=read_interpretations(beside),
    )


def _explained(folder: Path) -> dict[str, float]:
    """What detection and fuzzing came to, where they were asked for."""
    if not (folder / SUMMARY).is_file():
        return {}
    summary = json.loads((folder / SUMMARY).read_bytes())  # `described` has read it already: it is whole
    found = {mode: (summary.get(mode) or {}).get("balanced_accuracy") for mode in MODES}
    return {mode: value for mode, value in found.items() if value is not None}


def _read_curve(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    except ValueError as error:
        raise WrongInput(f"{path} cannot be read ({error}); copy the SAE's folder whole") from error
    return tuple(line for line in lines if isinstance(line, dict) and "tokens" in line)


def _read_scores(file: str | None) -> dict[str, Mapping[str, Any]]:
    """Rows of analyze --json, by the SAE's name and by its folder; an SAE at another sparsity is not that SAE."""
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
        raise WrongInput(f"--scores {file} is not what routesae analyze --json writes ({error!r})") from error


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Column:
    name: str
    meaning: str
    numeric: bool


@dataclass(frozen=True, kw_only=True)
class Cell:
    """text: for a person. value: to sort by; None where there is none. best: of its column."""

    text: str
    value: float | str | None
    best: bool = False


def table_of(runs: Sequence[Run]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns of which any run has something, and a row a run."""
    values = [{**_identity(run), **run.scores} for run in runs]
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in values)]
    best = {name: _best([row.get(name) for row in values], COLUMNS[name][1]) for name in names}
    rows = [
        [_cell(name, row.get(name), best=best[name] is not None and row.get(name) == best[name]) for name in names]
        for row in values
    ]
    columns = [
        Column(name=name, meaning=COLUMNS[name][0], numeric=name not in ("variant", "layers")) for name in names
    ]
    return columns, rows


def _identity(run: Run) -> dict[str, Any]:
    recipe = asdict(run.recipe)
    layers = recipe["layers"]
    shown = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
    return {"variant": recipe["sae"], "layers": shown, "latents": recipe["latents"], "k": recipe["k"]}


def _best(values: Sequence[Any], direction: int) -> float | None:
    """The best of several that differ."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not direction or len(set(numbers)) < 2:
        return None
    return max(numbers) if direction > 0 else min(numbers)


def _cell(name: str, value: Any, *, best: bool) -> Cell:
    if value is None:
        return Cell(text="–", value=None)
    if isinstance(value, str):
        return Cell(text=value, value=value)
    if name == "Dead":
        return Cell(text=f"{value:.1%}", value=value, best=best)
    text = f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return Cell(text=text, value=value, best=best)
