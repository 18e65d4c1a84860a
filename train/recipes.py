"""What settings come to on a cache: a run's settings and a cache in; a recipe, and a name for its folder, out."""

from __future__ import annotations

from routesae.harvest.cache.reader import Cache
from routesae.reporting import WrongInput
from routesae.train.saes import SINGLE_LAYER, Recipe
from routesae.train.saes.matryoshka import default_prefixes
from routesae.train.saes.routers import CONTROLS
from routesae.train.settings import RunSettings

DEFAULT_EXPANSION = 8
# Keeps a router off a single layer: the published one sent 40 to 99 % of tokens to its largest at 0, 39 to 91 % at
# 0.001, and 13 to 15 % at 0.01, with a KLDiv no worse than the spread over seeds (benchmarks/RESULTS.md).
DEFAULT_BALANCE = 0.01


def make_recipe(run: RunSettings, cache: Cache) -> Recipe:
    """Raises WrongInput where the settings do not fit the cache."""
    manifest = cache.manifest
    layers = manifest.layers
    if run.sae in SINGLE_LAYER:
        layers = (run.layer if run.layer is not None else layers[len(layers) // 2],)
    latents = run.latents or (run.expansion or DEFAULT_EXPANSION) * manifest.width
    if run.anneal_k_from is not None and run.anneal_k_from > latents:
        raise WrongInput(f"--anneal-k-from {run.anneal_k_from} is more than the SAE's {latents} latents; lower it")
    nested = "matryoshka" in (run.sae, run.routed)
    return Recipe(
        sae=run.sae,
        layers=layers,
        width=manifest.width,
        latents=latents,
        k=run.k,
        sparsity=run.sparsity,
        pre_act_loss=run.pre_act_loss or 0.0,
        prefixes=(run.prefixes or default_prefixes(latents)) if nested else (),
        normalize=run.normalize,
        routing=run.routing or "hard",
        aggregate=run.aggregate or "sum",
        routed=run.routed or "topk",
        router=run.router or "published",
        balance=_balance(run),
        published=run.recipe == "published",
    )


def _balance(run: RunSettings) -> float:
    if run.balance is not None:
        return run.balance
    learned = run.sae == "routesae" and run.routing != "soft" and run.router not in CONTROLS
    return DEFAULT_BALANCE if learned and run.recipe != "published" else 0.0


def default_name(recipe: Recipe) -> str:
    """topk_layer15_4608_k64, routesae_hard_4608_k64, …_top2, …_lambda0.01: what a person tells runs apart by."""
    where = {"routesae": recipe.routing}.get(recipe.sae, f"layers{recipe.layers[0]}-{recipe.layers[-1]}")
    if recipe.sae in SINGLE_LAYER:
        where = f"layer{recipe.layers[0]}"
    parts = [recipe.sae, where, str(recipe.latents), f"k{recipe.k}"]
    if recipe.sae == "routesae":
        parts += [recipe.routed] * (recipe.routed != "topk") + [recipe.router] * (recipe.router != "published")
    parts += [f"lambda{recipe.sparsity:g}"] if recipe.sparsity is not None else []
    parts += ["published"] * recipe.published
    return "_".join(parts)
