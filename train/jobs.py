"""The SAEs that a run is to train, and whether their folders may be written.

A folder that holds another SAE, or the rest of another run, is only written with --resume or --overwrite.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from routesae.harvest.cache.reader import Cache
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import CONFIG, load_sae, read_source
from routesae.train.folder.hub import fetch_sae
from routesae.train.optimiser import peak_lr
from routesae.train.saes import SAE, SINGLE_LAYER, Recipe, build
from routesae.train.saes.matryoshka import default_prefixes
from routesae.train.settings import RunSettings, TrainSettings
from routesae.train.state import drop_checkpoints, load_checkpoint, newest_step, require_same

log = logging.getLogger(__name__)
DEFAULT_EXPANSION = 8
# Keeps a router off a single layer: the published one sent 40 to 99 % of tokens to its largest at 0, 39 to 91 % at
# 0.001, and 13 to 15 % at 0.01, with a KLDiv no worse than the spread over seeds. top2 knows what a layer costs, and
# spreading it costs features (benchmarks/RESULTS.md).
DEFAULT_BALANCE = 0.01

ALIKE = ("sae", "routed", "layers", "width", "normalize", "routing", "aggregate")  # what --from must share
DECISIVE = ("batch_tokens", "epochs", "tokens", "window", "dead_after_tokens", "sparsity_warmup", "precision", "seed")


@dataclass(frozen=True)
class Job:
    """One SAE to train.

    identity: all that decides its weights, as JSON has it; a run may only be resumed with the same. It is kept in
    checkpoints and in the finished SAE's cfg.json.
    """

    settings: RunSettings
    recipe: Recipe
    folder: Path
    identity: dict[str, Any]

    @property
    def lr(self) -> float:
        """Adam's peak learning rate."""
        assert self.settings.lr is not None  # jobs_of puts it there
        return self.settings.lr

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def partial(self) -> Path:
        """Where the SAE is while it is trained."""
        return self.folder.with_name(f".{self.name}.partial")


def folders(settings: TrainSettings) -> list[Path]:
    """Where each SAE of the settings is, or will be."""
    return [job.folder for job in jobs_of(settings, Cache(settings.cache))]


def jobs_of(settings: TrainSettings, cache: Cache) -> list[Job]:
    """Raises WrongInput for settings that do not fit the cache, and for two SAEs of one name."""
    shared = {name: getattr(settings, name) for name in DECISIVE}
    origin = {**cache.manifest.to_dict(), "lm_weights": cache.manifest.weights_hash}
    jobs: dict[Path, Job] = {}
    for run in settings.runs:
        source = source_of(run)
        recipe = make_recipe(run, cache, source.recipe if source else None)
        cache.require_layers(recipe.layers)
        with torch.device("meta"):
            build(recipe)  # refuses parts that do not fit, before a folder is made
        folder = Path(settings.out) / (run.name or default_name(recipe))
        if folder in jobs:
            raise WrongInput(f"two SAEs of this run would be {folder}; name each in its [[run]] of a --config")
        run = run.replace(lr=run.lr or peak_lr(recipe.latents, published=recipe.published))
        decisive = {name: value for name, value in run.to_dict().items() if name != "name"}
        decisive["warm_start"] = dict(source.hashes) if source else None  # what it is, wherever that lies
        identity = {"run": decisive, "recipe": recipe.to_dict(), "pass": shared, "cache": origin}
        jobs[folder] = Job(run, recipe, folder, json.loads(json.dumps(identity)))
    return list(jobs.values())


def is_finished(job: Job, settings: TrainSettings) -> bool:
    """Whether --resume finds this SAE trained already. Raises WrongInput if its folder must not be written."""
    if not job.folder.exists():
        return False
    if not (job.folder / CONFIG).is_file():
        raise WrongInput(f"{job.folder} exists and is not an SAE, so it is not overwritten; give another --name")
    if settings.overwrite or (settings.resume and newest_step([job.partial])):
        return False  # the SAE there is replaced once the new one is finished, also if an --overwrite was stopped
    if not settings.resume:
        raise WrongInput(f"{job.folder} exists; give another --name, or --overwrite to replace it")
    require_same(job.folder, read_source(job.folder).identity, job.identity)
    drop_checkpoints(job.folder)  # left by a run that was killed just before it dropped them
    log.info("%s is trained already", job.folder)
    return True


def first_step(jobs: Sequence[Job], settings: TrainSettings) -> int:
    """How many steps are done already. Raises WrongInput if work would be lost."""
    steps = {job.name: newest_step([job.partial]) for job in jobs if not settings.overwrite}
    stopped = {name: step for name, step in steps.items() if step}
    if stopped and not settings.resume:
        name, step = next(iter(stopped.items()))
        raise WrongInput(f"{name} was stopped after step {step}; --resume continues it, --overwrite starts again")
    if stopped:
        if absent := [job.name for job in jobs if not job.partial.exists()]:
            raise WrongInput(f"--resume: {absent[0]} was not stopped with {', '.join(stopped)}; train it separately")
        for job in jobs:
            if step := steps[job.name]:
                require_same(job.folder, load_checkpoint(job.partial, step)[1], job.identity)
        if step := newest_step([job.partial for job in jobs]):
            return step
        if all(steps.values()):
            shown = ", ".join(f"{name} after step {step}" for name, step in steps.items())
            raise WrongInput(f"--resume: the SAEs were not stopped together ({shown}); train them separately")
    return 0


def source_of(run: RunSettings) -> SAE | None:
    """The SAE that --from names, on the CPU. Raises WrongInput if it cannot be had."""
    return None if run.warm_start is None else load_sae(fetch_sae(run.warm_start), torch.device("cpu"))


def make_recipe(run: RunSettings, cache: Cache, source: Recipe | None = None) -> Recipe:
    """Raises WrongInput where the settings do not fit the cache, or the SAE to begin from."""
    manifest = cache.manifest
    layers = manifest.layers
    if run.sae in SINGLE_LAYER:
        middle = source.layers[0] if source else layers[len(layers) // 2]
        layers = (run.layer if run.layer is not None else middle,)
    usual = source.latents if source and run.expansion is None else DEFAULT_EXPANSION * manifest.width
    latents = run.latents or (run.expansion * manifest.width if run.expansion else usual)
    if run.anneal_k_from is not None and run.anneal_k_from > latents:
        raise WrongInput(f"--anneal-k-from {run.anneal_k_from} is more than the SAE's {latents} latents; lower it")
    for name in ("routing", "aggregate", "router", "balance") if len(manifest.layers) == 1 else ():
        if value := getattr(run, name):
            raise WrongInput(f"--{name} {value}: {cache.path} has one layer, and nothing to route; leave it out")
    nested = "matryoshka" in (run.sae, run.routed)
    published = run.recipe == "published"
    router = run.router or usual_router(soft=run.routing == "soft", published=published)
    spread = run.sae == "routesae" and run.routing != "soft" and router == "published" and not published
    worked_out = {
        "layers": layers,
        "width": manifest.width,
        "latents": latents,
        "prefixes": default_prefixes(latents) if nested else (),
        "router": router,
        "balance": DEFAULT_BALANCE if spread else 0.0,
        "published": published,
    }
    asked = {name: value for name, value in vars(run).items() if name in Recipe.kinds and value not in (None, ())}
    recipe = Recipe(**{**worked_out, **asked})
    if source:
        # A dataset's scale is in the weights of an SAE that is saved.
        alike = recipe.replace(normalize="none") if recipe.normalize == "dataset" else recipe
        for name in ALIKE:
            if (theirs := getattr(source, name)) != getattr(alike, name):
                raise WrongInput(
                    f"--from {run.warm_start} has {name} {theirs}, and this run {getattr(recipe, name)}; begin from "
                    "an SAE of the same variant, layers and normalisation"
                )
        if source.latents > latents:
            raise WrongInput(
                f"--from {run.warm_start} has {source.latents} latents; give --latents {source.latents} or more"
            )
    return recipe


def usual_router(*, soft: bool, published: bool) -> str:
    """The router where none is asked for: top2 wherever it can be had (benchmarks/RESULTS.md)."""
    return "published" if soft or published else "top2"


def default_name(recipe: Recipe) -> str:
    """What a person tells runs apart by: topk_layer15_4608_k64, routesae_hard_4608_k64, …_random_mean."""
    where = {"routesae": recipe.routing}.get(recipe.sae, f"layers{recipe.layers[0]}-{recipe.layers[-1]}")
    if recipe.sae in SINGLE_LAYER:
        where = f"layer{recipe.layers[0]}"
    parts = [recipe.sae, where, str(recipe.latents), f"k{recipe.k}"]
    usual = {"normalize": "token"}
    if recipe.sae == "routesae":
        router = usual_router(soft=recipe.routing == "soft", published=recipe.published)
        usual |= {"routed": "topk", "router": router, "aggregate": "sum"}
    words = [word for name, default in usual.items() if (word := getattr(recipe, name)) != default]
    parts += ["published-router" if word == "published" else word for word in words]
    parts += [f"frozen-{recipe.freeze}"] if recipe.freeze != "none" else []
    parts += [f"lambda{recipe.sparsity:g}"] if recipe.sparsity is not None else []
    parts += ["published"] * recipe.published
    return "_".join(parts)
