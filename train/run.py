"""The stage train: a cache in; an SAE in a folder out, with no LM in sight.

    shards → batches → SAE → loss → gradient → Adam → … → saes/NAME/

Dimension letters: N tokens a batch, L layers, F latents.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import torch

from routesae import __version__
from routesae.harvest.arrays import fsync, fsync_tree
from routesae.harvest.cache import Cache
from routesae.harvest.device import pick_device
from routesae.reporting import FailedRun, Report, WrongInput, silent
from routesae.train.batches import Plan, Selection, epoch_plans, load
from routesae.train.checkpoint import CONFIG, save_sae
from routesae.train.evaluate import CacheScores, active_counts, score_on_cache
from routesae.train.log import StepLog
from routesae.train.saes import SAE, SAES, SINGLE_LAYER, Recipe
from routesae.train.schedule import lr_factor
from routesae.train.settings import TrainSettings

log = logging.getLogger(__name__)

DEFAULT_EXPANSION = 8
INITIAL_SAMPLE_TOKENS = 8192  # what b_dec's geometric median is taken over
DEAD_AFTER_TOKENS = 10_000_000  # 2406.04093, appendix A.2


@dataclass(frozen=True)
class TrainResult:
    """folder: where the SAE is. held_out: its scores on the held-out rows; None where the cache has none."""

    folder: Path
    held_out: CacheScores | None


def train(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """Train one SAE on the cache's training rows and write it, whole or not at all.

    Raises WrongInput for a cache or setting that cannot be used, FailedRun where training cannot go on.
    """
    cache = Cache(settings.cache)
    device = pick_device(settings.device)
    recipe = make_recipe(settings, cache)
    selection = Selection(cache, 0, cache.manifest.train_rows, recipe.layers)
    if len(selection) == 0:
        raise WrongInput(f"{cache.path} has no kept token in its training rows; harvest more text")
    folder = Path(settings.out) / (settings.name or default_name(recipe))
    with _committed_folder(folder, overwrite=settings.overwrite) as partial:
        sae = SAES[recipe.sae](recipe, torch.Generator().manual_seed(settings.seed)).to(device)
        with (partial / "metrics.jsonl").open("w") as metrics:
            fit(sae, selection, settings, metrics, report)
        held_out = _held_out(sae, cache, report)
        if held_out is not None and not math.isfinite(held_out.norm_mse):
            raise FailedRun(f"training ended with a NormMSE of {held_out.norm_mse}; lower --lr {settings.lr}")
        save_sae(partial, sae, _source(settings, cache, held_out))
    return TrainResult(folder, held_out)


def make_recipe(settings: TrainSettings, cache: Cache) -> Recipe:
    """What the settings come to on this cache. Raises WrongInput where they do not fit it."""
    manifest = cache.manifest
    layers = manifest.layers
    if settings.sae in SINGLE_LAYER:
        layers = (settings.layer if settings.layer is not None else layers[len(layers) // 2],)
    return Recipe(
        sae=settings.sae,
        layers=layers,
        width=manifest.width,
        latents=settings.latents or (settings.expansion or DEFAULT_EXPANSION) * manifest.width,
        k=settings.k,
        routing=settings.routing or "hard",
        aggregate=settings.aggregate or "sum",
    )


def default_name(recipe: Recipe) -> str:
    """topk_layer15_4608_k64, routesae_hard_4608_k64: what a person tells runs apart by."""
    what = f"layer{recipe.layers[0]}" if recipe.sae in SINGLE_LAYER else recipe.routing
    return f"{recipe.sae}_{what}_{recipe.latents}_k{recipe.k}"


@contextmanager
def _committed_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder to write into that becomes `folder` when all went well, and is gone otherwise."""
    if folder.exists() and not overwrite:
        raise WrongInput(f"{folder} exists; give another --name, or --overwrite to replace it")
    if folder.exists() and not (folder / CONFIG).is_file():
        raise WrongInput(f"{folder} exists and is not an SAE, so it is not overwritten; give another --name")
    partial, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_tree(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _held_out(sae: SAE, cache: Cache, report: Report) -> CacheScores | None:
    first, after = cache.manifest.train_rows, cache.manifest.rows
    if first == after:
        log.warning("%s has no held-out rows; nothing to score the SAE on", cache.path)
        return None
    return score_on_cache(sae, cache, first, after, report)


def _source(settings: TrainSettings, cache: Cache, held_out: CacheScores | None) -> dict[str, Any]:
    """Everything needed to know where an SAE came from."""
    manifest = cache.manifest
    return {
        "settings": asdict(settings),
        "cache": {**manifest.to_dict(), "path": str(cache.path.resolve())},
        "model": manifest.model,
        "corpus": manifest.corpus,
        "context": manifest.context,
        "held_out": None if held_out is None else held_out.to_dict(),
        "versions": {"routesae": __version__, "torch": torch.__version__},
    }


def fit(sae: SAE, selection: Selection, settings: TrainSettings, metrics: TextIO, report: Report = silent) -> None:
    """The training loop: one pass of this is one step."""
    total_steps, plans = planned(selection, settings)
    run_tokens = total_steps * min(settings.batch_tokens, len(selection))
    dead_after = settings.dead_after_tokens or min(DEAD_AFTER_TOKENS, max(1, run_tokens // 4))
    sae.initialise(_initial_sample(selection, settings, sae.device))
    adam = torch.optim.Adam(sae.parameters(), lr=settings.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: lr_factor(step, total_steps))
    idle_tokens_F = torch.zeros(sae.recipe.latents, dtype=torch.int64, device=sae.device)
    log_lines = StepLog(sae, settings.lr, total_steps, metrics, report)
    with closing(load(selection, plans, settings.batch_tokens, sae.device)) as batches:
        for step, hidden_LND in enumerate(batches, start=1):
            out = sae(hidden_LND)
            loss = sae.loss(out, idle_tokens_F >= dead_after)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sae.project_gradient()
            adam.step()
            lr = float(schedule.get_last_lr()[0])
            schedule.step()
            sae.normalise_decoder()
            active_F = active_counts(out.latents.values_NK, out.latents.indices_NK, sae.recipe.latents) > 0
            idle_tokens_F = torch.where(active_F, 0, idle_tokens_F + hidden_LND.shape[1])
            log_lines.add(out, loss)
            if step % settings.log_every_steps == 0 or step == total_steps:
                log_lines.write(step, lr, (idle_tokens_F >= dead_after).double().mean())


def planned(selection: Selection, settings: TrainSettings) -> tuple[int, Iterator[Plan]]:
    """Steps of the run, and their batches: whole epochs, or as many batches as `tokens` needs."""
    epoch_steps = -(-len(selection) // settings.batch_tokens)
    if settings.tokens is None:
        epochs = settings.epochs or 1
        total_steps = epochs * epoch_steps
    else:
        total_steps = max(1, round(settings.tokens * epoch_steps / len(selection)))
        epochs = -(-total_steps // epoch_steps)
    plans = (
        epoch_plans(selection, seed=settings.seed, epoch=epoch, batch_tokens=settings.batch_tokens)
        for epoch in range(epochs)
    )
    return total_steps, islice(chain.from_iterable(plans), total_steps)


def _initial_sample(selection: Selection, settings: TrainSettings, device: torch.device) -> torch.Tensor:
    plans = epoch_plans(selection, seed=settings.seed, epoch=0, batch_tokens=INITIAL_SAMPLE_TOKENS)
    with closing(load(selection, islice(plans, 1), INITIAL_SAMPLE_TOKENS, device)) as batches:
        return next(batches).clone()
