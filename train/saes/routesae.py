"""RouteSAE: a router picks the layer each token is read from; one shared SAE reconstructs it (2503.08200).

    g = agg_ℓ(x^ℓ), the sum or the mean;   r = W_r g;   w = softmax(r) ∈ R^L;   ℓ* = argmax w
    hard:  x = x^ℓ* (scaled by w_ℓ* with the published router)          soft:  x = Σ_ℓ w_ℓ x^ℓ
    f, x̂ = the shared SAE on x, of any variant over one layer (--routed)
    loss = the shared SAE's, with x the target, + the load-balancing term + what the router learns by

    published  x = w_ℓ*·x^ℓ*. The router's only gradient runs through the scale w_ℓ*, which NormMSE nearly cancels:
               input and target are scaled alike, and only the SAE's biases see it
    top2       each token's loss is the mean of its two likeliest layers' losses, weighted by w over the two
    frozen     control: the router keeps its first weights
    random     control: a layer that depends on nothing that matters. Training draws one for each token; in use it is
               a hash of the token's id and position, so that batches, splicing and generation agree

Only `published` and `frozen` scale x by w. The scale is divided out again when the reconstruction goes back into the
LM; the published code forgets to apply it there, so that its SAE then reads an input of another norm than it was
trained on. A load-balancing term, --balance b, adds b·L·Σ_ℓ f_ℓ P_ℓ with f_ℓ the share of tokens at layer ℓ and P_ℓ
the mean of w_ℓ (2101.03961, eq. 4).

Dimension letters: L layers, N tokens, D width, F latents, R rows: a token's reading of one layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from routesae.reporting import WrongInput
from routesae.train.ranks.distributed import batch_mean
from routesae.train.saes.normalise import Hidden, NormalisedLayers
from routesae.train.saes.sae import CONTROLS, SAE, Reading, Recipe
from routesae.train.saes.single import SingleLayerSAE, checked
from routesae.train.sparse.pairs import counted
from routesae.train.sparse.policy import exactly

ROUTER = "router.safetensors"
_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # of splitmix64, as int64


class Routes(NamedTuple):
    """Where tokens are read under hard routing: token_R and its layer at_R, an index into the recipe's layers.

    In use a row is a token. scale_R: what x is multiplied by, or None. weights_R: the rows' weights in the loss,
    summing to 1, or None if all count alike.
    """

    token_R: Tensor
    at_R: Tensor
    scale_R: Tensor | None = None
    weights_R: Tensor | None = None


class RouteSAE(SAE):
    """A linear router over the layers in front of one shared SAE."""

    lens_opens = "The SAE that its layers share"

    def __init__(self, recipe: Recipe, shared: SingleLayerSAE, generator: torch.Generator | None = None):
        super().__init__(recipe)
        self.shared = shared
        self.other_sparsity = shared.other_sparsity
        bound = recipe.width**-0.5  # that of a linear layer, as in the published code
        router_LD = (torch.rand(len(recipe.layers), recipe.width, generator=generator) * 2 - 1) * bound
        self.router_LD = nn.Parameter(router_LD, requires_grad=recipe.router not in CONTROLS)

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        w_NL = self._weights(x, training=training)
        if self.recipe.routing == "soft":
            return Reading(x.weighted(w_NL), None, None, w_NL)
        routes = self._routes(w_NL, training=training)
        x_RD, frame = x.rows(routes.at_R, routes.token_R)
        if routes.scale_R is not None:
            scale_R1 = routes.scale_R[:, None]
            x_RD, frame = x_RD * scale_R1, frame._replace(scale=scale_R1.detach())
        balance = self.recipe.balance if training else 0.0
        auxiliary = balance * balance_loss(w_NL, routes.at_R) if balance else None
        return Reading(x_RD, frame, routes.weights_R, w_NL, auxiliary)

    def _weights(self, x: NormalisedLayers, *, training: bool) -> Tensor:
        """w_NL."""
        if self.recipe.router == "random":
            if training:  # the trainer seeds the generator for every step
                at_N = torch.randint(len(x), (x.tokens,), device=x.device)
            elif x.place_N is None:
                raise WrongInput("--router random goes by each token's id and position; give them with `Hidden`")
            else:
                at_N = hashed_layers(x.place_N, len(x))
            return torch.zeros(x.tokens, len(x), device=x.device).scatter_(1, at_N[:, None], 1.0)
        gathered_ND = x.total() / len(x) if self.recipe.aggregate == "mean" else x.total()
        with exactly(x.device.type):  # bfloat16 would move tokens to other layers
            r_NL = gathered_ND @ self.router_LD.T
        return torch.softmax(r_NL, dim=1)

    def _routes(self, w_NL: Tensor, *, training: bool) -> Routes:
        token_N = torch.arange(len(w_NL), device=w_NL.device)
        if training and self.recipe.router == "top2" and w_NL.shape[1] > 1:
            top = w_NL.topk(2, dim=1)
            share_N2 = top.values / top.values.sum(1, keepdim=True)
            token_R = token_N.repeat_interleave(2)
            return Routes(token_R, top.indices.flatten(), None, share_N2.flatten() / len(w_NL))
        at_N = w_NL.argmax(1)
        scaled = self.recipe.router in ("published", "frozen")
        return Routes(token_N, at_N, w_NL.gather(1, at_N[:, None]).squeeze(1) if scaled else None)

    @torch.no_grad()
    def routing(self, hidden: Hidden | Tensor) -> Tensor:
        """w_NL in use, the router's softmax over the layers."""
        return self._weights(self.normalised(hidden), training=False)

    def routes(self, hidden: Hidden | Tensor) -> Routes:
        """Where each token goes in use."""
        return self._routes(self.routing(hidden), training=False)

    @property
    def dictionary(self) -> SingleLayerSAE:
        return self.shared

    def centre(self, x: NormalisedLayers) -> None:
        with torch.no_grad():
            drawn = self.recipe.router == "random"  # the sample has no ids and positions
            self.shared.start_from(self.read(x, training=drawn).x_RC)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        self.shared.fold_scale(scale)
        self.shared.recipe = self.shared.recipe.replace(normalize="none")
        self.router_LD.mul_(scale)

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {**self.shared.files(), ROUTER: {"router": self.router_LD.detach()}}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        self.shared.load_files(files)
        shape = (len(self.recipe.layers), self.recipe.width)
        router_LD = checked(files[ROUTER], {"router": shape}, ROUTER)["router"]
        self.router_LD = nn.Parameter(router_LD, requires_grad=self.router_LD.requires_grad)


def hashed_layers(place_N: Tensor, layers: int) -> Tensor:
    """int64 [N]: an index of a layer for each of `places_of`, spread evenly; exact, as all is whole numbers."""
    for factor in _MIX:
        place_N = place_N * factor  # int64 wraps around
        place_N = place_N ^ (place_N >> 31 & 0x1FFFFFFFF)
    return (place_N & 0x7FFFFFFF) % layers


def balance_loss(w_NL: Tensor, at_R: Tensor) -> Tensor:
    """L·Σ_ℓ f_ℓ P_ℓ: 1 where tokens and probabilities are spread evenly, L where one layer has all."""
    layers = w_NL.shape[1]
    share_L = batch_mean(counted(at_R, layers, torch.ones_like(at_R)) / len(at_R))
    return layers * (share_L * batch_mean(w_NL.mean(0))).sum()
