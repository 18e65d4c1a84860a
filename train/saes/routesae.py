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

from typing import NamedTuple

import torch
from torch import Tensor, nn

from routesae.reporting import WrongInput
from routesae.train.losses import Objective
from routesae.train.saes.normalise import NormalisedLayers, as_layers
from routesae.train.saes.routers import CONTROLS, balance_loss, hashed_layers, rows
from routesae.train.saes.sae import SAE, Forward, Recipe
from routesae.train.saes.single import SingleLayerSAE, checked

ROUTER = "router.safetensors"


class Routes(NamedTuple):
    """Where each token goes under hard routing: at_N, an index into the recipe's layers, and x's scale_N."""

    at_N: Tensor
    scale_N: Tensor


class RouteSAE(SAE):
    """A linear router over the layers in front of one shared SAE."""

    def __init__(self, recipe: Recipe, shared: SingleLayerSAE, generator: torch.Generator | None = None):
        super().__init__(recipe)
        self.shared = shared
        bound = recipe.width**-0.5  # that of a linear layer, as in the published code
        router_LD = (torch.rand(len(recipe.layers), recipe.width, generator=generator) * 2 - 1) * bound
        self.router_LD = nn.Parameter(router_LD, requires_grad=recipe.router not in CONTROLS)

    def forward(self, x: NormalisedLayers) -> Forward:
        self.shared.k, self.shared.chunk_rows, self.shared.proposal = self.k, self.chunk_rows, self.proposal
        w_NL = self.routing(x)
        if self.recipe.routing == "soft":
            return self.shared.autoencode(x.weighted(w_NL))._replace(routing_NL=w_NL)
        read = rows(self.recipe.router, w_NL, training=self.training)
        x_RD = x.rows(read.at_R, read.token_R)
        if read.scale_R is not None:
            x_RD = x_RD * read.scale_R[:, None]
        out = self.shared.autoencode(x_RD, read.weights_R)._replace(routing_NL=w_NL)
        if not (self.training and self.recipe.balance):
            return out
        balance = self.recipe.balance * balance_loss(w_NL, read.at_R)
        return out._replace(auxiliary=balance if out.auxiliary is None else out.auxiliary + balance)

    def loss(self, out: Forward, dead_F: Tensor, sparsity_factor: float = 1.0) -> Objective:
        return self.shared.loss(out, dead_F, sparsity_factor)

    @torch.no_grad()
    def initialise(self, x: NormalisedLayers | Tensor) -> None:
        x = as_layers(x)
        w_NL = self.routing(x)
        if self.recipe.routing == "soft":
            self.shared.centre(x.weighted(w_NL))
        else:
            routes = self.routes(x)
            token_N = torch.arange(x.tokens, device=x.device)
            self.shared.centre(x.rows(routes.at_N, token_N) * routes.scale_N[:, None])

    def routing(self, x: NormalisedLayers | Tensor) -> Tensor:
        """w_NL, the router's softmax over the layers."""
        x = as_layers(x)
        if self.recipe.router == "random":
            return nn.functional.one_hot(self._random_layers(x), len(x)).float()
        gathered_ND = x.total() / len(x) if self.recipe.aggregate == "mean" else x.total()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would move tokens to other layers
            r_NL = gathered_ND @ self.router_LD.T
        return torch.softmax(r_NL, dim=1)

    def _random_layers(self, x: NormalisedLayers) -> Tensor:
        if self.training:
            return torch.randint(len(x), (x.tokens,)).to(x.device)  # the trainer seeds the generator for every step
        if x.place_N is None:
            raise WrongInput("--router random goes by each token's id and position; give them with the hidden states")
        return hashed_layers(x.place_N, len(x))

    @torch.no_grad()
    def routes(self, x: NormalisedLayers | Tensor) -> Routes:
        """Where each token goes in use."""
        x = as_layers(x)
        read = rows(self.recipe.router, self.routing(x), training=False)
        scale_R = read.scale_R if read.scale_R is not None else torch.ones(len(read.at_R), device=x.device)
        return Routes(read.at_R, scale_R)

    def rate_factors(self) -> dict[nn.Parameter, float]:
        return self.shared.rate_factors()

    def decoders(self) -> list[nn.Parameter]:
        return self.shared.decoders()

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        self.shared.fold_scale(scale)
        self.router_LD.mul_(scale)

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {**self.shared.files(), ROUTER: {"router": self.router_LD.detach()}}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        self.shared.load_files(files)
        shape = (len(self.recipe.layers), self.recipe.width)
        router_LD = checked(files[ROUTER], {"router": shape}, ROUTER)["router"]
        self.router_LD = nn.Parameter(router_LD, requires_grad=self.router_LD.requires_grad)
