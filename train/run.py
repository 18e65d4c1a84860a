"""The stage train: a cache in; SAEs in folders out, all of them from one pass over the batches, with no LM in sight.

    shards → batches → normalised → each SAE: loss → gradient → Adam → … → saes/NAME/

Dimension letters: L layers, N tokens a batch.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from routesae import __version__
from routesae.harvest.arrays import fsync, fsync_tree
from routesae.harvest.cache import Cache
from routesae.harvest.device import pick_device
from routesae.reporting import FailedRun, Progress, Report, Stopped, WrongInput, silent
from routesae.train.batches import Plan, Selection, epoch_plans, load
from routesae.train.checkpoint import CONFIG, read_config, save_sae
from routesae.train.evaluate import CacheScores, score_on_cache
from routesae.train.log import StepLog
from routesae.train.recipes import default_name, make_recipe
from routesae.train.saes import SAE, Recipe, build
from routesae.train.saes.normalise import dataset_scale
from routesae.train.settings import RunSettings, TrainSettings
from routesae.train.state import (
    drop_checkpoints,
    load_checkpoint,
    newest_step,
    partial_folder,
    read_facts,
    require_same,
    save_checkpoint,
)
from routesae.train.stop import stop_requests
from routesae.train.trackers import open_trackers, require_trackers
from routesae.train.trainee import Inputs, Pace, Trainee

log = logging.getLogger(__name__)

INITIAL_SAMPLE_TOKENS = 8192  # what b_dec's geometric median is taken over
DEAD_AFTER_TOKENS = 10_000_000  # 2406.04093, appendix A.2


@dataclass(frozen=True)
class TrainResult:
    """folder: where the SAE is. held_out: its scores on the held-out rows; None where the cache has none."""

    folder: Path
    held_out: CacheScores | None


@dataclass(frozen=True)
class Job:
    """One SAE to be. identity: all that decides its weights, as JSON; a run resumed must have the same."""

    settings: RunSettings
    recipe: Recipe
    folder: Path
    identity: dict[str, Any]

    @property
    def partial(self) -> Path:
        return partial_folder(self.folder)


def train(settings: TrainSettings, report: Report = silent) -> list[TrainResult]:
    """Train the settings' SAEs on the cache's training rows and write each, whole or not at all.

    With `resume`, SAEs that are finished already are left as they are and have no result.
    Raises WrongInput for a cache or setting that cannot be used, FailedRun where training cannot go on, Stopped
    where it was asked to stop and left a checkpoint.
    """
    require_trackers(settings.log)
    cache = Cache(settings.cache)
    device = pick_device(settings.device)
    jobs = _jobs(settings, cache, device)
    layers = sorted({layer for job in jobs for layer in job.recipe.layers})
    selection = Selection(cache, 0, cache.manifest.train_rows, layers)
    if len(selection) == 0:
        raise WrongInput(f"{cache.path} has no kept token in its training rows; harvest more text")
    jobs = [job for job in jobs if not _finished(job, settings)]
    if not jobs:
        return []
    first_step = _first_step(jobs, settings)
    with ExitStack() as stack:
        trainees = [_trainee(job, settings, selection, device, stack) for job in jobs]
        if first_step == 0:
            _initialise(trainees, _initial_sample(selection, settings, device), selection.layers)
        for trainee in trainees if first_step else []:
            facts = read_facts(trainee.folder, first_step)
            load_checkpoint(trainee, first_step, facts)
        fit(trainees, selection, settings, first_step, [job.identity for job in jobs], report)
    return [_finish(trainee, job, settings, cache, report) for trainee, job in zip(trainees, jobs, strict=True)]


def folders(settings: TrainSettings) -> list[Path]:
    """Where each SAE of the settings is, or will be."""
    return [job.folder for job in _jobs(settings, Cache(settings.cache), pick_device(settings.device))]


def _jobs(settings: TrainSettings, cache: Cache, device: torch.device) -> list[Job]:
    passed = {name: getattr(settings, name) for name in ("batch_tokens", "epochs", "tokens", "dead_after_tokens")}
    passed |= {"sparsity_warmup": settings.sparsity_warmup, "seed": settings.seed}
    passed |= {"precision": str(_precision(settings, device))}
    origin = {**cache.manifest.to_dict(), "lm_weights": cache.weights_hash()}
    jobs = []
    for run in settings.runs:
        recipe = make_recipe(run, cache)
        cache.require_layers(recipe.layers)
        own = {name: value for name, value in asdict(run).items() if name != "name"}
        identity = {"run": own, "recipe": asdict(recipe), "pass": passed, "cache": origin}
        jobs.append(Job(run, recipe, Path(settings.out) / (run.name or default_name(recipe)), identity))
    for job in jobs:
        if sum(other.folder == job.folder for other in jobs) > 1:
            raise WrongInput(f"two SAEs of this run would be {job.folder}; name each in its [[run]] of a --config")
    return jobs


def _precision(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def _finished(job: Job, settings: TrainSettings) -> bool:
    """Whether --resume finds this SAE trained already. Raises WrongInput where its folder must not be written."""
    if not job.folder.exists():
        return False
    if not (job.folder / CONFIG).is_file():
        raise WrongInput(f"{job.folder} exists and is not an SAE, so it is not overwritten; give another --name")
    if settings.resume and newest_step([job.partial]):
        return False  # a stopped --overwrite: what is there is replaced once the new one is done
    if settings.resume:
        source = read_config(job.folder).get("metadata", {}).get("routesae", {}).get("source", {})
        require_same(job.folder, source.get("identity", {}), job.identity)
        drop_checkpoints(job.folder)  # where a kill came just before that
        log.info("%s is trained already", job.folder)
        return True
    if not settings.overwrite:
        raise WrongInput(f"{job.folder} exists; give another --name, or --overwrite to replace it")
    return False


def _first_step(jobs: Sequence[Job], settings: TrainSettings) -> int:
    """Steps already done; makes the partial folders. Raises WrongInput where what is there must not be lost."""
    steps = {job.folder.name: newest_step([job.partial]) for job in jobs}
    stopped = {name: step for name, step in steps.items() if step}
    if stopped and not settings.resume and not settings.overwrite:
        name, step = next(iter(stopped.items()))
        raise WrongInput(f"{name} was stopped after step {step}; --resume goes on there, --overwrite starts again")
    if settings.resume and stopped:
        if absent := [job.folder.name for job in jobs if not job.partial.exists()]:
            raise WrongInput(f"--resume: {absent[0]} was not stopped with {', '.join(stopped)}; train it apart")
        for job in jobs:
            if steps[job.folder.name]:
                then = read_facts(job.partial, steps[job.folder.name])["identity"]
                require_same(job.folder, then, job.identity)
        if step := newest_step([job.partial for job in jobs]):
            return step
        if all(steps.values()):
            stood = ", ".join(f"{name} after step {step}" for name, step in steps.items())
            raise WrongInput(f"--resume: they were not stopped together ({stood}); train them apart")
    for job in jobs:
        shutil.rmtree(job.partial, ignore_errors=True)
        job.partial.mkdir(parents=True)
    return 0


def _trainee(
    job: Job, settings: TrainSettings, selection: Selection, device: torch.device, stack: ExitStack
) -> Trainee:
    sae = build(job.recipe, torch.Generator().manual_seed(settings.seed)).to(device).train()
    total_steps, _ = planned(selection, settings)
    run_tokens = total_steps * min(settings.batch_tokens, len(selection))
    pace = Pace(
        total_steps=total_steps,
        dead_after_tokens=settings.dead_after_tokens or min(DEAD_AFTER_TOKENS, max(1, run_tokens // 4)),
        sparsity_warmup=settings.sparsity_warmup,
        precision=_precision(settings, device),
        seed=settings.seed,
    )
    trackers = open_trackers(settings.log, job.folder.name, job.partial, asdict(job.settings))
    step_log = StepLog(sae, job.partial, trackers)
    stack.callback(step_log.close)
    return Trainee(sae, job.settings, pace, job.partial, step_log)


@torch.no_grad()
def _initialise(trainees: Sequence[Trainee], hidden_LND: torch.Tensor, layers: Sequence[int]) -> None:
    inputs = Inputs(hidden_LND, layers)
    for trainee in trainees:
        if trainee.sae.recipe.normalize == "dataset":
            own = [list(layers).index(layer) for layer in trainee.sae.recipe.layers]
            trainee.scale = dataset_scale(hidden_LND[own])
        trainee.sae.initialise(inputs(trainee.sae.recipe, trainee.scale))


def fit(
    trainees: Sequence[Trainee],
    selection: Selection,
    settings: TrainSettings,
    first_step: int,
    identities: Sequence[dict[str, Any]],
    report: Report = silent,
) -> None:
    """The training loop: one pass of this is one step of every SAE."""
    total_steps, plans = planned(selection, settings)
    remaining = islice(plans, first_step, None)
    device = trainees[0].sae.device
    stage = f"train {trainees[0].sae.recipe.sae}" if len(trainees) == 1 else f"train {len(trainees)} SAEs"
    with stop_requests() as stop, closing(load(selection, remaining, settings.batch_tokens, device)) as batches:
        for step, hidden_LND in enumerate(batches, start=first_step + 1):
            inputs = Inputs(hidden_LND, selection.layers)
            for trainee in trainees:
                trainee.step(step, inputs)
            last = step == total_steps
            if last or step % settings.log_every_steps == 0:
                shown = {trainee.name: trainee.log.write(step, trainee.dead_share) for trainee in trainees}
                report(Progress(stage, step, total_steps, "steps", _facts(shown)))
            request = stop()
            if last or request or step % settings.checkpoint_every_steps == 0:
                save_checkpoint(trainees, step, identities)
            if request and not last:
                code = 0 if request == signal.SIGTERM else 130
                raise Stopped(f"stopped after step {step} of {total_steps}; the same with --resume goes on", code)


def _facts(shown: dict[str, dict[str, str]]) -> dict[str, str]:
    if len(shown) == 1:
        return next(iter(shown.values()))
    return {name: facts["NormMSE"] for name, facts in shown.items()}


def _finish(trainee: Trainee, job: Job, settings: TrainSettings, cache: Cache, report: Report) -> TrainResult:
    """Score, save, and give the folder its name."""
    sae = trainee.sae.eval()
    if sae.recipe.normalize == "dataset":
        sae.fold_scale(trainee.scale)
        sae.recipe = replace(sae.recipe, normalize="none")
    held_out = _held_out(sae, cache, report)
    if held_out is not None and not math.isfinite(held_out.norm_mse):
        raise FailedRun(f"training ended with a NormMSE of {held_out.norm_mse}; lower --lr {job.settings.lr}")
    save_sae(job.partial, sae, _source(settings, job, cache, held_out))
    fsync_tree(job.partial)
    replaced = job.folder.with_name(f".{job.folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if job.folder.exists():
        job.folder.rename(replaced)
    job.partial.rename(job.folder)
    fsync(job.folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    drop_checkpoints(job.folder)
    return TrainResult(job.folder, held_out)


def _held_out(sae: SAE, cache: Cache, report: Report) -> CacheScores | None:
    first, after = cache.manifest.train_rows, cache.manifest.rows
    if first == after:
        log.warning("%s has no held-out rows; nothing to score the SAE on", cache.path)
        return None
    return score_on_cache(sae, cache, first, after, report)


def _source(settings: TrainSettings, job: Job, cache: Cache, held_out: CacheScores | None) -> dict[str, Any]:
    """Everything needed to know where an SAE came from."""
    manifest = cache.manifest
    return {
        "settings": {**asdict(settings), "runs": None, "run": asdict(job.settings)},
        "identity": job.identity,
        "cache": {**manifest.to_dict(), "path": str(cache.path.resolve())},
        "model": manifest.model,
        "corpus": manifest.corpus,
        "context": manifest.context,
        "held_out": None if held_out is None else held_out.to_dict(),
        "versions": {"routesae": __version__, "torch": torch.__version__},
    }


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
