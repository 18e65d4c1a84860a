"""The stage analyze: a cache, SAEs and the names of metrics in; one row of numbers an SAE out.

The LM is loaded only where a metric needs it, and only if it is the one the cache was harvested from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routesae import __version__
from routesae.harvest.cache import Cache, Manifest
from routesae.harvest.device import pick_device, pick_lm_dtype
from routesae.harvest.tokens import kept_positions
from routesae.reporting import Report, WrongInput, silent
from routesae.train.checkpoint import find_saes, load_sae
from routesae.train.evaluate import CacheScores, require_fit, score_on_cache
from routesae.train.hub import fetch_sae
from routesae.train.saes import SAE

if TYPE_CHECKING:
    from routesae.analyze.metrics import LMScores
    from routesae.harvest.lm import LanguageModel

log = logging.getLogger(__name__)

# What each metric adds to a row, from the cache alone or from the LM; the only list of metrics there is.
CACHE_METRICS: dict[str, Callable[[CacheScores], dict[str, Any]]] = {
    "NormMSE": lambda scores: {"NormMSE": scores.norm_mse},
    "FVU": lambda scores: {"FVU": scores.fvu},
    "L0": lambda scores: {"L0": scores.l0},
    "Dead": lambda scores: {"Dead": scores.dead},
    "Routing": lambda scores: {"Entropy": scores.routing_entropy, "Shares": scores.layer_shares},
}
LM_METRICS: dict[str, Callable[[LMScores], dict[str, Any]]] = {
    "KLDiv": lambda scores: {"KLDiv": scores.kl_div, "KLDiv_seq": scores.kl_div_seq},
    "DeltaCE": lambda scores: {"DeltaCE": scores.delta_ce, "CE_clean": scores.ce_clean},
    "Recovered": lambda scores: {"Recovered": scores.recovered},
}
METRICS = (*CACHE_METRICS, *LM_METRICS)


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings:
    """What `routesae analyze` was asked for. Raises WrongInput where a value is impossible."""

    cache: str = "shards"
    saes: tuple[str, ...] = ()
    """SAE folders or hub references; none for every SAE under `out`."""
    out: str = "saes"
    metrics: tuple[str, ...] = tuple(CACHE_METRICS)
    tokens: int | None = None
    """Held-out tokens to score on, in whole rows; None for all."""
    batch_sequences: int = 8
    model: str | None = None
    """Where the LM is now; None for where the manifest says it was."""
    device: str = "auto"
    lm_dtype: str = "auto"

    def __post_init__(self) -> None:
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise WrongInput(f"--metric {unknown[0]!r} is none of {', '.join(METRICS)}")
        if self.tokens is not None and self.tokens < 1:
            raise WrongInput(f"--tokens {self.tokens} is below 1")
        if self.batch_sequences < 1:
            raise WrongInput(f"--batch-sequences {self.batch_sequences} is below 1")


def analyze(settings: AnalyzeSettings, report: Report = silent) -> dict[str, Any]:
    """Everything a program wants of the scores: the rows, and what they were computed from.

    Raises WrongInput where cache, SAEs, metrics and LM do not fit together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    device = pick_device(settings.device)
    given = {fetch_sae(sae): sae for sae in settings.saes}
    folders = list(given) or find_saes(Path(settings.out))
    fetched = {folder: sae for folder, sae in given.items() if folder != Path(sae)}  # what is named by a commit here
    saes = {fetched.get(folder) or _name(folder, folders): load_sae(folder, device) for folder in folders}
    for folder, sae in zip(folders, saes.values(), strict=True):
        try:
            require_fit(sae, cache)
        except WrongInput as misfit:
            raise WrongInput(f"{folder}: {misfit}") from misfit
    first, after = held_out_rows(cache, settings.tokens)
    rows: dict[str, dict[str, Any]] = {name: _identity(sae) for name, sae in saes.items()}
    if wanted := [metric for metric in settings.metrics if metric in CACHE_METRICS]:
        for name, sae in saes.items():
            scores = score_on_cache(sae, cache, first, after, report)
            for metric in wanted:
                rows[name] |= CACHE_METRICS[metric](scores)
    if wanted := [metric for metric in settings.metrics if metric in LM_METRICS]:
        for name, lm_scores in _lm_scores(settings, cache, saes, (first, after), wanted, report).items():
            for metric in wanted:
                rows[name] |= LM_METRICS[metric](lm_scores)
    return {
        "routesae": __version__,
        "settings": asdict(settings),
        "cache": {"path": str(cache.path.resolve()), **cache.manifest.to_dict()},
        "rows_scored": [first, after],
        "tokens_scored": (after - first) * cache.manifest.context,
        "saes": [
            {"sae": name, "folder": str(folder), **row}
            for folder, (name, row) in zip(folders, rows.items(), strict=True)
        ],
    }


def _name(folder: Path, folders: Sequence[Path]) -> str:
    same_name = [other for other in folders if other.name == folder.name]
    return folder.name if len(same_name) == 1 and folder.name else str(folder)


def _identity(sae: SAE) -> dict[str, Any]:
    layers = sae.recipe.layers
    return {
        "variant": sae.recipe.sae,
        "layers": str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
        "latents": sae.recipe.latents,
    }


def held_out_rows(cache: Cache, tokens: int | None) -> tuple[int, int]:
    """First held-out row and the one after the last to score; at least one row where there is one."""
    first, after = cache.manifest.train_rows, cache.manifest.rows
    if first == after:
        raise WrongInput(f"{cache.path} has no held-out rows: it is one row of tokens; harvest more text")
    if tokens is not None:
        after = min(after, first + max(1, tokens // cache.manifest.context))
    return first, after


def _lm_scores(
    settings: AnalyzeSettings,
    cache: Cache,
    saes: Mapping[str, SAE],
    rows: tuple[int, int],
    metrics: Sequence[str],
    report: Report,
) -> dict[str, LMScores]:
    from routesae.analyze.metrics import score_with_lm
    from routesae.analyze.replacement import require_spliceable

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
        zero_ablation="Recovered" in metrics,
        report=report,
    )


def load_harvested_lm(cache: Cache, model: str, device: str, lm_dtype: str) -> LanguageModel:
    """The whole LM that the cache was harvested from. Raises WrongInput where `model` is another one."""
    from routesae.harvest import lm
    from routesae.harvest.tokens import tokenizer_hash

    manifest = cache.manifest
    revision = manifest.revision if model == manifest.model else None
    config, tokenizer = lm.load_config(model, revision), lm.load_tokenizer(model, revision)
    _require_same("config", lm.config_hash(config), manifest.config_hash, model, manifest)
    _require_same("tokenizer", tokenizer_hash(tokenizer), manifest.tokenizer_hash, model, manifest)
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
