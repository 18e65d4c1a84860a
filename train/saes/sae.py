"""What every SAE variant is to the trainer and to analyze: what it is built from, and what it gives back.

Dimension letters: L layers, N tokens, D width, F latents, K active latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from routesae.reporting import WrongInput
from routesae.train.kernels import Latents

ROUTINGS = ("hard", "soft")
AGGREGATES = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an SAE is built from; with its weights, all that is needed to have it again.

    Raises WrongInput where the parts do not fit.
    """

    sae: str
    """Name in the registry (routesae.train.saes.SAES)."""
    layers: tuple[int, ...]
    """Layers of the cache it reads."""
    width: int
    """D, numbers a hidden state."""
    latents: int
    """F, size of the dictionary."""
    k: int
    """Latents active a token."""
    routing: str = "hard"
    aggregate: str = "sum"

    def __post_init__(self) -> None:
        if not isinstance(self.sae, str):
            raise WrongInput(f"SAE {self.sae!r} is no name")
        if not self.layers or not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise WrongInput(f"layers {self.layers!r} are not one or more whole numbers")
        for name in ("width", "latents", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise WrongInput(f"{name} {value!r} is not a whole number above 0")
        if self.k > self.latents:
            raise WrongInput(
                f"--k {self.k} is more than the SAE's {self.latents} latents; lower it or give more --latents"
            )
        if self.routing not in ROUTINGS:
            raise WrongInput(f"--routing {self.routing!r} is none of {', '.join(ROUTINGS)}")
        if self.aggregate not in AGGREGATES:
            raise WrongInput(f"--aggregate {self.aggregate!r} is none of {', '.join(AGGREGATES)}")


class Forward(NamedTuple):
    """One pass over N tokens.

    x_ND: the SAE's own input, normalised (for routesae: routed and scaled), which is the target too.
    reconstruction_ND: of x_ND. routing_NL: the router's softmax over the layers; None where there is no router.
    """

    x_ND: Tensor
    reconstruction_ND: Tensor
    latents: Latents
    routing_NL: Tensor | None = None


class SAE(nn.Module, ABC):
    """A sparse autoencoder over hidden_LND: the hidden states of `recipe.layers`, in that order, any float dtype.

    A new variant is a file with a subclass and a line in routesae.train.saes.SAES.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe

    @abstractmethod
    def forward(self, hidden_LND: Tensor) -> Forward:
        """Reconstruct, with gradients where they are enabled."""

    @abstractmethod
    def loss(self, out: Forward, dead_F: Tensor) -> Tensor:
        """The training objective of a pass; dead_F (bool) marks latents not active for `dead_after_tokens`."""

    @abstractmethod
    def initialise(self, hidden_LND: Tensor) -> None:
        """Set biases from a sample of the data."""

    @abstractmethod
    def project_gradient(self) -> None:
        """After backward: take out of the decoder's gradient what would only change its rows' norms."""

    @abstractmethod
    def normalise_decoder(self) -> None:
        """After an optimiser step: the decoder's rows back to unit norm."""

    def __call__(self, hidden_LND: Tensor) -> Forward:
        out: Forward = super().__call__(hidden_LND)
        return out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
