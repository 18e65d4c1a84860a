"""What a pass is to train: settings and a cache in; a job an SAE, and from which step on, out.

A folder that holds another SAE, or the rest of another run, is never written without being asked to.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import CONFIG, read_config
from routesae.train.recipes import default_name, make_recipe
from routesae.train.saes import Recipe
from routesae.train.settings import RunSettings, TrainSettings
from routesae.train.state import drop_checkpoints, newest_step, partial_folder, read_facts, require_same

log = logging.getLogger(__name__)


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


def folders(settings: TrainSettings) -> list[Path]:
    """Where each SAE of the settings is, or will be."""
    return [job.folder for job in jobs_of(settings, Cache(settings.cache), pick_device(settings.device))]


def jobs_of(settings: TrainSettings, cache: Cache, device: torch.device) -> list[Job]:
    passed = {name: getattr(settings, name) for name in ("batch_tokens", "epochs", "tokens", "dead_after_tokens")}
    passed |= {"sparsity_warmup": settings.sparsity_warmup, "seed": settings.seed}
    passed |= {"precision": str(precision_of(settings, device))}
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


def precision_of(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def is_finished(job: Job, settings: TrainSettings) -> bool:
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


def first_step(jobs: Sequence[Job], settings: TrainSettings) -> int:
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
