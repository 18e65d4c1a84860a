"""The SAE variants: one file a family, equation first, and one line each here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from routesae.reporting import WrongInput
from routesae.train.saes.batchtopk import BatchTopK
from routesae.train.saes.crosscoder import Crosscoder
from routesae.train.saes.gated import Gated
from routesae.train.saes.jumprelu import JumpReLU
from routesae.train.saes.layers import MLSAE, RandomLayer
from routesae.train.saes.matryoshka import Matryoshka
from routesae.train.saes.routesae import RouteSAE
from routesae.train.saes.sae import SAE, Forward, Recipe
from routesae.train.saes.single import SingleLayerSAE
from routesae.train.saes.topk import TopK
from routesae.train.saes.vanilla import Vanilla

__all__ = [
    "PENALISED",
    "SAE",
    "SAES",
    "SINGLE_LAYER",
    "Crosscoder",
    "Forward",
    "Recipe",
    "RouteSAE",
    "SingleLayerSAE",
    "build",
]

SAES: dict[str, type[SAE]] = {
    "vanilla": Vanilla,
    "gated": Gated,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "routesae": RouteSAE,
    "crosscoder": Crosscoder,
    "mlsae": MLSAE,
    "random": RandomLayer,
}
SINGLE_LAYER = tuple(name for name, variant in SAES.items() if variant.one_layer)  # read one layer, --layer
PENALISED = tuple(name for name, variant in SAES.items() if variant.penalised)  # take --sparsity


def build(recipe: Recipe, generator: torch.Generator | None = None) -> SAE:
    """A new SAE, its weights drawn from `generator`. Raises WrongInput where the recipe names no variant."""
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
    shared = build(replace(recipe, sae=recipe.routed, layers=recipe.layers[:1]), generator)
    assert isinstance(shared, SingleLayerSAE)
    return RouteSAE(recipe, shared, generator)
