"""RouteSAE: a router picks the layer each token is read from; one shared SAE reconstructs it (2503.08200).

    hard:  x = x^ℓ* (scaled by w_ℓ* with the published router)          soft:  x = Σ_ℓ w_ℓ x^ℓ
    f, x̂ = the shared SAE on x, of any variant over one layer (--routed)
    loss = the shared SAE's, with x the target, + the load-balancing term + what the router learns by

How w comes about and is learned: routesae.train.saes.routers. The scale is divided out again when the
reconstruction goes back into the LM; the published code forgets to apply it there, so that its SAE then reads an
input of another norm than it was trained on.

Dimension letters: L layers, N tokens, D width, F latents, R rows: a token's reading of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from routesae.reporting import WrongInput
from routesae.train.losses import Objective
from routesae.train.saes.normalise import Hidden, NormalisedLayers
from routesae.train.saes.routers import CONTROLS, balance_loss, hashed_layers, rows
from routesae.train.saes.sae import SAE, Forward, Reading, Recipe
from routesae.train.saes.single import SingleLayerSAE, checked
from routesae.train.sparse.pairs import Latents
from routesae.train.sparse.search import Encoder

ROUTER = "router.safetensors"


class Routes(NamedTuple):
    """Where each token goes under hard routing: at_N, an index into the recipe's layers, and x's scale_N."""

    at_N: Tensor
    scale_N: Tensor


class RouteSAE(SAE):
    """A linear router over the layers in front of one shared SAE."""

    lens_opens = "The SAE that its layers share"

    def __init__(self, recipe: Recipe, shared: SingleLayerSAE, generator: torch.Generator | None = None):
        super().__init__(recipe)
        self.shared = shared
        bound = recipe.width**-0.5  # that of a linear layer, as in the published code
        router_LD = (torch.rand(len(recipe.layers), recipe.width, generator=generator) * 2 - 1) * bound
        self.router_LD = nn.Parameter(router_LD, requires_grad=recipe.router not in CONTROLS)

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        w_NL = self._weights(x, training=training)
        if self.recipe.routing == "soft":
            return Reading(x.weighted(w_NL), None, None, w_NL)
        read = rows(self.recipe.router, w_NL, training=training)
        x_RD, frame = x.rows(read.at_R, read.token_R)
        if read.scale_R is not None:
            scale_R1 = read.scale_R[:, None]
            x_RD, frame = x_RD * scale_R1, frame._replace(scale=scale_R1.detach())
        balance = self.recipe.balance if training else 0.0
        auxiliary = balance * balance_loss(w_NL, read.at_R) if balance else None
        return Reading(x_RD, frame, read.weights_R, w_NL, auxiliary)

    def autoencode(self, x_RC: Tensor, weights_R: Tensor | None = None) -> Forward:
        self.shared.k, self.shared.chunk_rows, self.shared.proposal = self.k, self.chunk_rows, self.proposal
        return self.shared.autoencode(x_RC, weights_R)

    def latents_of(self, x_RC: Tensor) -> Latents:
        return self.shared.encode_rows(x_RC)

    def decode_rows(self, latents: Latents) -> Tensor:
        return self.shared.decode_rows(latents)

    def encoder(self) -> Encoder:
        return self.shared.encoder()

    @property
    def other_sparsity(self) -> bool:  # type: ignore[override]
        """Whether the shared SAE has other sparsities."""
        return self.shared.other_sparsity

    def at_sparsity(self, chosen: Callable[[Tensor, Encoder], Latents]) -> SAE:
        view = super().at_sparsity(chosen)
        view._modules = {"shared": self.shared.at_sparsity(chosen)}  # what splicing encodes with
        return view

    def loss(self, out: Forward, dead_F: Tensor, sparsity_factor: float = 1.0) -> Objective:
        return self.shared.loss(out, dead_F, sparsity_factor)

    def centre(self, x: NormalisedLayers) -> None:
        with torch.no_grad():
            self.shared.start_from(self.read(x, training=False).x_RC)

    @torch.no_grad()
    def routing(self, hidden: Hidden | Tensor) -> Tensor:
        """w_NL in use, the router's softmax over the layers."""
        return self._weights(self.normalised(hidden), training=False)

    def _weights(self, x: NormalisedLayers, *, training: bool) -> Tensor:
        if self.recipe.router == "random":
            return nn.functional.one_hot(self._random_layers(x, training), len(x)).float()
        gathered_ND = x.total() / len(x) if self.recipe.aggregate == "mean" else x.total()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would move tokens to other layers
            r_NL = gathered_ND @ self.router_LD.T
        return torch.softmax(r_NL, dim=1)

    def _random_layers(self, x: NormalisedLayers, training: bool) -> Tensor:
        if training:
            return torch.randint(len(x), (x.tokens,)).to(x.device)  # the trainer seeds the generator for every step
        if x.place_N is None:
            raise WrongInput("--router random goes by each token's id and position; give them with the hidden states")
        return hashed_layers(x.place_N, len(x))

    @torch.no_grad()
    def routes(self, hidden: Hidden | Tensor) -> Routes:
        """Where each token goes in use."""
        read = rows(self.recipe.router, self.routing(hidden), training=False)
        scale_R = torch.ones_like(read.at_R, dtype=torch.float32) if read.scale_R is None else read.scale_R
        return Routes(read.at_R, scale_R)

    def rate_factors(self) -> dict[nn.Parameter, float]:
        return self.shared.rate_factors()

    def decoders(self) -> list[nn.Parameter]:
        return self.shared.decoders()

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        self.shared.fold_scale(scale)
        self.shared.recipe = replace(self.shared.recipe, normalize="none")
        self.router_LD.mul_(scale)

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {**self.shared.files(), ROUTER: {"router": self.router_LD.detach()}}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        self.shared.load_files(files)
        shape = (len(self.recipe.layers), self.recipe.width)
        router_LD = checked(files[ROUTER], {"router": shape}, ROUTER)["router"]
        self.router_LD = nn.Parameter(router_LD, requires_grad=self.router_LD.requires_grad)
