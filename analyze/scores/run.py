"""The stage analyze: a cache, SAEs and the names of metrics in; one row of numbers an SAE and sparsity out.

Every number has a 95 % confidence interval where there is one (routesae.analyze.scores.intervals). The LM is loaded
only where a metric needs it, and only if it is the one the cache was harvested from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from routesae import __version__
from routesae.analyze.contexts.file import read_facts
from routesae.analyze.scores.identity import cache_identity, sae_identity, versions
from routesae.analyze.scores.intervals import draws, measure
from routesae.analyze.scores.metrics import METRICS, Metric
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.analyze.scores.sparsity import Sparsity, at_sparsity, has_other_sparsities
from routesae.harvest.cache.manifest import Manifest, kept_positions
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.reporting import Report, WrongInput, silent
from routesae.train.evaluate import require_fit, score_all_on_cache
from routesae.train.folder.checkpoint import find_saes, load_sae
from routesae.train.folder.hub import fetch_sae
from routesae.train.saes import SAE

if TYPE_CHECKING:
    from routesae.harvest.lm.model import LanguageModel

log = logging.getLogger(__name__)

DESCRIPTIONS = ("Features", "Score")  # columns of what contexts and interpret have found: see `described`
INTERPRETATIONS = "interpretations.json"  # the summary that `routesae interpret` writes into an SAE's folder


def analyze(settings: AnalyzeSettings, report: Report = silent) -> dict[str, Any]:
    """Everything a program wants of the scores: the rows, and what they were computed from.

    Raises WrongInput where cache, SAEs, metrics and LM do not fit together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    device = pick_device(settings.device)
    opened = open_saes(settings.saes, Path(settings.out), cache, device)
    subjects = subjects_of(opened, settings.sparsities())
    known = {name: described(sae.beside) for name, sae in opened.items()}
    _warn_of_thresholds(opened)
    first, after = held_out_rows(cache, settings.tokens)
    rows = {key: _identity(subject, opened[subject.name].folder) for key, subject in subjects.items()}
    saes = {key: subject.sae for key, subject in subjects.items()}
    drawn_RS = draws(after - first, settings.seed)
    metrics = [METRICS[name] for name in settings.metrics]
    if of_cache := [metric for metric in metrics if not metric.needs_lm]:
        for key, scores in score_all_on_cache(saes, cache, first, after, report).items():
            row_sums = {
                name.rpartition("_")[0]: sums for name, sums in scores.by_row._asdict().items() if sums is not None
            }
            layers = saes[key].recipe.layers
            _add(rows[key], *measure(of_cache, row_sums, drawn_RS, layers=layers, dead=scores.dead))
    if of_lm := [metric for metric in metrics if metric.needs_lm]:
        for key, row_sums in _lm_row_sums(settings, cache, saes, (first, after), of_lm, report).items():
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
        "saes": [row | known[subjects[key].name] for key, row in rows.items()],
    }


def _add(row: dict[str, Any], numbers: Mapping[str, Any], intervals: Mapping[str, list[float]]) -> None:
    row |= numbers
    row.setdefault("intervals", {}).update(intervals)


class Subject(NamedTuple):
    """What one row of the results is of: an SAE, or a view of it at another sparsity than its own."""

    name: str
    sparsity: Sparsity | None
    sae: SAE


def subjects_of(opened: Mapping[str, OpenSAE], sparsities: Sequence[Sparsity | None]) -> dict[str, Subject]:
    """Every SAE at every sparsity. Raises WrongInput naming those that have no other than their own."""
    fixed = [name for name, one in opened.items() if not has_other_sparsities(one.sae)]
    given = [sparsity for sparsity in sparsities if sparsity is not None]
    if fixed and given:
        raise WrongInput(
            f"{given[0].flag} is not for gated SAEs, whose gate and magnitude are two numbers: {', '.join(fixed)}; "
            "name the others with --sae"
        )
    subjects = {}
    for name, one in opened.items():
        for sparsity in sparsities:
            try:
                sae = one.sae if sparsity is None else at_sparsity(one.sae, sparsity)
            except WrongInput as refusal:
                raise WrongInput(f"{name}: {refusal}") from refusal
            subjects[name if sparsity is None else f"{name}, {sparsity}"] = Subject(name, sparsity, sae)
    return subjects


class OpenSAE(NamedTuple):
    """An SAE, where it is and where files about it go: into the same folder, unless that is the hub's cache."""

    folder: Path
    beside: Path
    sae: SAE


def open_saes(given: Sequence[str], out: Path, cache: Cache, device: torch.device) -> dict[str, OpenSAE]:
    """The SAEs given, or all under `out`, by a name that tells them apart.

    Raises WrongInput where there is none, or one cannot be loaded or does not fit the cache.
    """
    references = {fetch_sae(sae): sae for sae in given}
    folders = list(references) or find_saes(out)
    opened = {}
    for folder in folders:
        reference = references.get(folder)
        fetched = reference is not None and folder != Path(reference)
        name = reference if reference is not None and fetched else _name(folder, folders)  # not by a commit
        beside = out / name.replace("/", "--") if fetched else folder
        opened[name] = OpenSAE(folder, beside, load_sae(folder, device))
        try:
            require_fit(opened[name].sae, cache)
        except WrongInput as misfit:
            raise WrongInput(f"{folder}: {misfit}") from misfit
    return opened


def described(folder: Path) -> dict[str, Any]:
    """What `contexts` and `interpret` found of the SAE in `folder`: Features, the latents that the published rule
    keeps, and Score, the explainer's mean; each only where its file is there."""
    found: dict[str, Any] = {}
    if (facts := read_facts(folder)) is not None:
        found["Features"] = facts["features"]
    if (summary := folder / INTERPRETATIONS).is_file():
        try:
            found["Score"] = json.loads(summary.read_bytes())["score"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WrongInput(f"{summary} cannot be read ({error!r}); run routesae interpret again") from error
    return found


def _warn_of_thresholds(opened: Mapping[str, OpenSAE]) -> None:
    """Counts of Features compare only where the rule was the same one."""
    found = {name: read_facts(sae.beside) for name, sae in opened.items()}
    given = {name: facts["settings"]["threshold"] for name, facts in found.items() if facts is not None}
    if len(set(given.values())) > 1:
        counted = ", ".join(f"{name} above {threshold:g}" for name, threshold in given.items())
        log.warning("Features are not counted alike: %s; run routesae contexts with one --threshold", counted)


def _name(folder: Path, folders: Sequence[Path]) -> str:
    same_name = [other for other in folders if other.name == folder.name]
    return folder.name if len(same_name) == 1 and folder.name else str(folder)


def _identity(subject: Subject, folder: Path) -> dict[str, Any]:
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


def held_out_rows(cache: Cache, tokens: int | None) -> tuple[int, int]:
    """First held-out row and the one after the last to score; at least one row where there is one."""
    first, after = cache.manifest.train_rows, cache.manifest.rows
    if first == after:
        raise WrongInput(f"{cache.path} has no held-out rows: it is one row of tokens; harvest more text")
    if tokens is not None:
        after = min(after, first + max(1, tokens // cache.manifest.context))
    return first, after


def _lm_row_sums(
    settings: AnalyzeSettings,
    cache: Cache,
    saes: Mapping[str, SAE],
    rows: tuple[int, int],
    metrics: Sequence[Metric],
    report: Report,
) -> dict[str, dict[str, Any]]:
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
    lm = load_harvested_lm(cache, settings.model or manifest.model, settings.device, settings.lm_dtype)
    token_ids_ST = cache.tokens()[slice(*rows)]
    kept_ST = kept_positions(token_ids_ST, dropped_ids=manifest.dropped_ids, skip_positions=manifest.skip_positions)
    return score_with_lm(
        lm,
        spliceable,
        token_ids_ST,
        kept_ST,
        batch_sequences=settings.batch_sequences,
        zero_ablation=any(metric.zero_ablation for metric in metrics),
        report=report,
    )


def load_harvested_tokenizer(cache: Cache, model: str) -> Any:
    """The tokenizer that the cache's text went through. Raises WrongInput where `model`'s is another one."""
    from routesae.harvest.corpus.tokens import tokenizer_hash
    from routesae.harvest.lm import model as lm

    manifest = cache.manifest
    tokenizer = lm.load_tokenizer(model, manifest.revision if model == manifest.model else None)
    _require_same("tokenizer", tokenizer_hash(tokenizer), manifest.tokenizer_hash, model, manifest)
    return tokenizer


def load_harvested_lm(cache: Cache, model: str, device: str, lm_dtype: str) -> LanguageModel:
    """The whole LM that the cache was harvested from. Raises WrongInput where `model` is another one."""
    from routesae.harvest.lm import model as lm

    manifest = cache.manifest
    revision = manifest.revision if model == manifest.model else None
    _require_same("config", lm.config_hash(lm.load_config(model, revision)), manifest.config_hash, model, manifest)
    load_harvested_tokenizer(cache, model)
    picked = pick_device(device)
    loaded = lm.load_lm(model, revision, device=picked, lm_dtype=pick_lm_dtype(lm_dtype, picked))
    _require_same("weights", lm.weights_hash(loaded), cache.weights_hash(), model, manifest)
    return loaded


def _require_same(what: str, found: str, recorded: str | None, model: str, manifest: Manifest) -> None:
    if found != recorded:
        import transformers

        raise WrongInput(
            f"model {model!r} is not the one the cache was harvested from: its {what} differs (harvested from "
            f"{manifest.model!r} with transformers {manifest.versions.get('transformers')}, now "
            f"{transformers.__version__}); give that model with --model"
        )
