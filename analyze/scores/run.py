"""Run `routesae analyze`: score SAEs on the held-out rows of a cache, one row of numbers for each SAE and sparsity.

The LM is loaded only if a metric needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from routesae import __version__
from routesae.analyze.contexts.file import read_facts
from routesae.analyze.inputs.identity import cache_identity, sae_identity, versions
from routesae.analyze.inputs.lm import lm_of_cache, load_lm_of
from routesae.analyze.inputs.saes import OpenSAE, open_saes
from routesae.analyze.interpret.run import SUMMARY
from routesae.analyze.scores.intervals import draws, measure
from routesae.analyze.scores.metrics import METRICS
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.analyze.scores.sparsity import Sparsity, at_sparsity
from routesae.harvest.cache.manifest import kept_positions
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.machine.files import BadFile, read_json
from routesae.reporting import Report, WrongInput, silent
from routesae.train.evaluate import score_all_on_cache
from routesae.train.saes import SAE

log = logging.getLogger(__name__)

DESCRIPTIONS = ("Features", "Score")  # columns that contexts and interpret add: see `described`


def analyze(settings: AnalyzeSettings, report: Report = silent) -> dict[str, Any]:
    """Returns the rows of the table under "saes", and beside them what they were computed from.

    Raises WrongInput if cache, SAEs, metrics and LM do not fit together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    device = pick_device(settings.device)
    opened = open_saes(settings.saes, Path(settings.out), cache, device)
    subjects = subjects_of(opened, settings.sparsities())
    first, after = held_out_rows(cache, settings.tokens)
    descriptions = {name: described(sae.beside) for name, sae in opened.items()}
    _warn_of_thresholds(opened)
    rows = {key: _first_columns(subject, opened[subject.name].folder) for key, subject in subjects.items()}
    saes = {key: subject.sae for key, subject in subjects.items()}
    metrics = [METRICS[name] for name in settings.metrics]
    drawn_RS = draws(after - first, settings.seed)
    if of_cache := [metric for metric in metrics if not metric.needs_lm]:
        for key, scores in score_all_on_cache(saes, cache, first, after, report).items():
            layers = saes[key].recipe.layers
            _add(rows[key], *measure(of_cache, scores.by_row, drawn_RS, layers=layers, dead=scores.dead))
    if of_lm := [metric for metric in metrics if metric.needs_lm]:
        zero_ablation = any(metric.zero_ablation for metric in of_lm)
        for key, row_sums in _row_sums_of_lm(settings, cache, saes, first, after, zero_ablation, report).items():
            _add(rows[key], *measure(of_lm, row_sums, drawn_RS))
    return {
        "routesae": __version__,
        "versions": versions(),
        "settings": settings.to_dict(),
        "device": str(device),
        "cache": cache_identity(cache),
        "rows_scored": [first, after],
        "tokens_scored": (after - first) * cache.manifest.context,
        "identities": {name: sae_identity(sae.folder, sae.sae) for name, sae in opened.items()},
        "saes": [row | descriptions[subjects[key].name] for key, row in rows.items()],
    }


class Subject(NamedTuple):
    """What one row of the results is of: the SAE called `name`, or a view of it at another sparsity than its own."""

    name: str
    sparsity: Sparsity | None
    sae: SAE


def subjects_of(opened: Mapping[str, OpenSAE], sparsities: Sequence[Sparsity | None]) -> dict[str, Subject]:
    """Every SAE at every sparsity; None stands for an SAE's own.

    Those that an SAE cannot have are left out with a warning. Raises WrongInput if nothing is left.
    """
    subjects = {}
    refusals = []
    for name, one in opened.items():
        for sparsity in sparsities:
            try:
                sae = one.sae if sparsity is None else at_sparsity(one.sae, sparsity)
                subjects[name if sparsity is None else f"{name}, {sparsity}"] = Subject(name, sparsity, sae)
            except WrongInput as refusal:
                refusals.append(f"{name}: {refusal}")
    if not subjects:
        raise WrongInput(refusals[0])
    for reason in dict.fromkeys(refusals):
        log.warning("left out: %s", reason)
    return subjects


def held_out_rows(cache: Cache, tokens: int | None) -> tuple[int, int]:
    """First held-out row and the one after the last to score: at least one row, and `tokens` tokens at most."""
    first, after = cache.manifest.train_rows, cache.manifest.rows
    if first == after:
        raise WrongInput(f"{cache.path} has no held-out rows: it is one row of tokens; harvest more text")
    if tokens is not None:
        after = min(after, first + max(1, tokens // cache.manifest.context))
    return first, after


def _first_columns(subject: Subject, folder: Path) -> dict[str, Any]:
    recipe, sparsity = subject.sae.recipe, subject.sparsity
    layers = recipe.layers
    row: dict[str, Any] = {
        "sae": subject.name,
        "folder": str(folder),
        "variant": recipe.sae,
        "layers": str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
        "latents": recipe.latents,
    }
    if sparsity is not None:
        row |= {"infer_k": sparsity.k} if sparsity.k is not None else {"theta": sparsity.theta}
    return row


def _add(row: dict[str, Any], numbers: Mapping[str, Any], intervals: Mapping[str, list[float]]) -> None:
    row |= numbers
    row.setdefault("intervals", {}).update(intervals)


def _row_sums_of_lm(
    settings: AnalyzeSettings,
    cache: Cache,
    saes: Mapping[str, SAE],
    first: int,
    after: int,
    zero_ablation: bool,
    report: Report,
) -> dict[str, dict[str, Any]]:
    """What the LM's metrics are computed from. SAEs that cannot be spliced are left out with a warning."""
    from routesae.analyze.scores.lm_scores import score_with_lm
    from routesae.analyze.scores.replacement import require_spliceable

    spliceable = {}
    for name, sae in saes.items():
        try:
            require_spliceable(sae)
            spliceable[name] = sae
        except WrongInput as refusal:
            if len(saes) == 1:
                raise
            log.warning("%s: left out of the LM's metrics: %s", name, refusal)
    if not spliceable:
        raise WrongInput(f"none of {', '.join(saes)} can be spliced into the LM; train one with --routing hard")
    manifest = cache.manifest
    loaded = load_lm_of([lm_of_cache(cache)], settings.model, device=settings.device, lm_dtype=settings.lm_dtype)
    token_ids_ST = cache.tokens()[first:after]
    kept_ST = kept_positions(token_ids_ST, dropped_ids=manifest.dropped_ids, skip_positions=manifest.skip_positions)
    return score_with_lm(
        loaded.lm,
        spliceable,
        token_ids_ST,
        kept_ST,
        batch_sequences=settings.batch_sequences,
        zero_ablation=zero_ablation,
        report=report,
    )


def described(folder: Path) -> dict[str, Any]:
    """What is known of the latents of the SAE in `folder`: Features, how many the published rule keeps, if contexts
    were collected; Score, the explainer's mean, if they were explained."""
    columns: dict[str, Any] = {}
    if (facts := read_facts(folder)) is not None:
        columns["Features"] = facts["features"]
    if (summary := folder / SUMMARY).is_file():
        try:
            columns["Score"] = read_json(summary)["score"]
        except (OSError, BadFile, KeyError, TypeError) as error:
            raise WrongInput(f"{summary} cannot be read ({error!r}); run routesae interpret again") from error
    return columns


def _warn_of_thresholds(opened: Mapping[str, OpenSAE]) -> None:
    """Warn if Features were counted by different rules, since their numbers then do not compare."""
    facts = {name: read_facts(sae.beside) for name, sae in opened.items()}
    thresholds = {name: of["settings"]["threshold"] for name, of in facts.items() if of is not None}
    if len(set(thresholds.values())) > 1:
        counted = ", ".join(f"{name} above {threshold:g}" for name, threshold in thresholds.items())
        log.warning("Features are not counted alike: %s; run routesae contexts with one --threshold", counted)
