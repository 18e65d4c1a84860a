"""What every SAE variant is to the trainer and to analyze: what it is built from, and what it gives back.

Dimension letters: L layers, N tokens, D width, F latents, K active latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from routesae.reporting import WrongInput
from routesae.train.losses import Objective
from routesae.train.ranks.distributed import local_rows
from routesae.train.saes.normalise import NORMALIZATIONS, NormalisedLayers, as_layers
from routesae.train.saes.routers import ROUTERS
from routesae.train.sparse.kernels import AnyLatents
from routesae.train.sparse.search import row_products

ROUTINGS = ("hard", "soft")
AGGREGATES = ("sum", "mean")
PUBLISHED_DECODER_STEPS = 10  # the published RouteSAE code's `steps`: how rarely it renormalises the decoder


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an SAE is built from and its objective; with its weights, all that is needed to have it again.

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
    """Active latents a token: exactly (topk), on average (batchtopk, matryoshka), aimed at (the others)."""
    sparsity: float | None = None
    """λ of the penalty; None for one that is steered until k latents are active."""
    pre_act_loss: float = 0.0
    """jumprelu: weight of what pulls dead latents' pre-activations up to their thresholds."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: sizes of the nested dictionaries, the last one F."""
    normalize: str = "token"
    routing: str = "hard"
    aggregate: str = "sum"
    routed: str = "topk"
    """routesae: the variant its layers share."""
    router: str = "published"
    """routesae: how the router learns (routesae.train.saes.routers.ROUTERS)."""
    balance: float = 0.0
    """routesae: weight of the load-balancing term."""
    published: bool = False
    """Train by the objective of the published RouteSAE code."""

    def __post_init__(self) -> None:
        if not isinstance(self.sae, str):
            raise WrongInput(f"SAE {self.sae!r} is no name")
        if not self.layers or not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise WrongInput(f"layers {self.layers!r} are not one or more whole numbers")
        for name in ("width", "latents", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise WrongInput(f"{name} {value!r} is not a whole number above 0")
        if self.latents * self.width * len(self.layers) >= 2**60:  # torch itself cannot count further
            raise WrongInput(f"latents {self.latents} of width {self.width} are more than any memory holds")
        if self.k > self.latents:
            raise WrongInput(
                f"--k {self.k} is more than the SAE's {self.latents} latents; lower it or give more --latents"
            )
        named = {"normalize": NORMALIZATIONS, "routing": ROUTINGS, "aggregate": AGGREGATES, "router": ROUTERS}
        for name, values in named.items():
            if getattr(self, name) not in values:
                raise WrongInput(f"--{name} {getattr(self, name)!r} is none of {', '.join(values)}")
        for name in ("sparsity", "pre_act_loss", "balance"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise WrongInput(f"--{name.replace('_', '-')} {value!r} is not a number of 0 or more")
        sizes = self.prefixes
        if sizes and not (
            all(type(size) is int and size > 0 for size in sizes)
            and list(sizes) == sorted(set(sizes))
            and sizes[-1] == self.latents
        ):
            raise WrongInput(f"--prefixes {sizes} must rise and end with the SAE's {self.latents} latents")


class Forward(NamedTuple):
    """One pass over N tokens.

    x_ND: the SAE's own input, which is the target too: normalised, for routesae routed and scaled, for a crosscoder
    the layers side by side [N, L·D], for mlsae every layer's rows [L·N, D]. reconstruction_ND: of x_ND.
    penalty: what λ weighs; None where the variant has none. auxiliary: further terms of the objective.
    weights_N: each row's weight in the mean, summing to 1; None where all count alike.
    routing_NL: the router's softmax over the layers; None where there is no router.
    """

    x_ND: Tensor
    reconstruction_ND: Tensor
    latents: AnyLatents
    penalty: Tensor | None = None
    auxiliary: Tensor | None = None
    weights_N: Tensor | None = None
    routing_NL: Tensor | None = None


class SAE(nn.Module, ABC):
    """A sparse autoencoder over x: the normalised hidden states of `recipe.layers`, in that order, float32. What
    takes an x takes a plain x_LND too.

    A new variant is a file with a subclass and a line in routesae.train.saes.SAES.

    one_layer: whether it reads one layer, chosen with --layer, or all that were harvested.
    penalised: whether a penalty makes it sparse, weighted by --sparsity.
    """

    one_layer: ClassVar[bool] = False
    proposal: torch.dtype | None = None  # of the encoder's product; None: what is fastest (sparse/search.py)
    penalised: ClassVar[bool] = False

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.k = recipe.k  # the trainer lowers it to recipe.k step by step where k is annealed
        self.chunk_rows: int | None = None  # tokens encoded at a time; None: what is fastest

    @abstractmethod
    def forward(self, x: NormalisedLayers) -> Forward:
        """Reconstruct, with gradients where they are enabled. What a variant learns from a batch beside gradients
        (a threshold, λ) it learns here, in training mode only."""

    @abstractmethod
    def loss(self, out: Forward, dead_F: Tensor, sparsity_factor: float = 1.0) -> Objective:
        """The training objective of a pass.

        dead_F (bool) marks latents not active for `dead_after_tokens`; sparsity_factor, 0 to 1, warms λ up.
        """

    @abstractmethod
    def initialise(self, x: NormalisedLayers | Tensor) -> None:
        """Set what starts from the data, given a sample of it."""

    @abstractmethod
    def decoders(self) -> list[nn.Parameter]:
        """Decoder weights whose rows are kept at unit norm."""

    @abstractmethod
    def fold_scale(self, scale: float) -> None:
        """Make an SAE of x = scale·h one of h: same latents, reconstructions divided by `scale`."""

    @abstractmethod
    def files(self) -> dict[str, dict[str, Tensor]]:
        """What to store: {file name: {tensor name: tensor}}, the names and shapes those of DESIGN §5."""

    @abstractmethod
    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        """The inverse. Raises WrongInput naming a tensor that is missing or of another shape."""

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is another than the run's, and by which factor."""
        return {}

    @torch.no_grad()
    def project_gradient(self) -> None:
        """After backward: take out of the decoder's gradient what would only change its rows' norms."""
        if self.recipe.published:
            return
        for decoder in self.decoders():
            assert decoder.grad is not None
            W_dec_FD, grad_FD = local_rows(decoder), local_rows(decoder.grad)
            row_F = torch.arange(len(grad_FD), device=grad_FD.device)
            along_F = row_products(row_F, row_F, W_dec_FD, grad_FD)  # no third [F, D] is made
            grad_FD.addcmul_(W_dec_FD, along_F[:, None], value=-1)

    @torch.no_grad()
    def normalise_decoder(self, step: int, *, last: bool = False) -> None:
        """After optimiser step `step`, counted from 1: the decoder's rows back to unit norm.

        The published code does so at every tenth step only, and after the last.
        """
        if self.recipe.published and (step - 1) % PUBLISHED_DECODER_STEPS and not last:
            return
        for W_dec_FD in map(local_rows, self.decoders()):
            W_dec_FD.div_(torch.linalg.vector_norm(W_dec_FD, dim=1, keepdim=True))

    def __call__(self, x: NormalisedLayers | Tensor) -> Forward:
        out: Forward = super().__call__(as_layers(x))
        return out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
