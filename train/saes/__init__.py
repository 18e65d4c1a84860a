"""The SAE variants: one file and one line each."""

from importlib import import_module
from typing import Any

import torch

from routesae.reporting import WrongInput
from routesae.train.saes.crosscoder import Crosscoder
from routesae.train.saes.routesae import RouteSAE
from routesae.train.saes.sae import SAE, Forward, Recipe
from routesae.train.saes.single import SingleLayerSAE

__all__ = ["PENALISED", "SAE", "SAES", "SINGLE_LAYER", "Crosscoder", "Forward", "Recipe", "RouteSAE"]
__all__ += ["SingleLayerSAE", "build"]


def _class(path: str) -> Any:
    """The class called "module.Class" in this folder."""
    module, _, name = path.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


SAES: dict[str, type[SAE]] = {
    "vanilla": _class("vanilla.Vanilla"),
    "gated": _class("gated.Gated"),
    "topk": _class("topk.TopK"),
    "batchtopk": _class("batchtopk.BatchTopK"),
    "jumprelu": _class("jumprelu.JumpReLU"),
    "matryoshka": _class("matryoshka.Matryoshka"),
    "hierarchical": _class("hierarchical.HierarchicalTopK"),
    "routesae": _class("routesae.RouteSAE"),
    "crosscoder": _class("crosscoder.Crosscoder"),
    "mlsae": _class("layers.MLSAE"),
    "random": _class("layers.RandomLayer"),
}
SINGLE_LAYER = [name for name, variant in SAES.items() if variant.one_layer]  # read one layer, --layer
PENALISED = [name for name, variant in SAES.items() if variant.penalised]  # take --sparsity


def build(recipe: Recipe, generator: torch.Generator | None = None) -> SAE:
    """A new SAE, its weights drawn from `generator`. Raises WrongInput if the recipe names no variant."""
    if recipe.sae not in SAES:
        raise WrongInput(f"SAE {recipe.sae!r} is none of {', '.join(SAES)}")
    if recipe.sae in SINGLE_LAYER and len(recipe.layers) != 1:
        raise WrongInput(f"layers {recipe.layers}, but a {recipe.sae} reads one")
    variant: Any = SAES[recipe.sae]
    if variant is not RouteSAE:
        built: SAE = variant(recipe, generator)
        return built
    if recipe.routed not in SINGLE_LAYER:
        raise WrongInput(f"--routed {recipe.routed!r} is none of {', '.join(SINGLE_LAYER)}")
    # What is shared reads one layer a token; which one it is differs from token to token.
    shared = build(recipe.replace(sae=recipe.routed, layers=recipe.layers[:1]), generator)
    assert isinstance(shared, SingleLayerSAE)
    return RouteSAE(recipe, shared, generator)
