"""RouteSAE: a router picks the layer each token is read from; one shared SAE reconstructs it (2503.08200).

    x̃^ℓ the normalised hidden state of layer ℓ
    r = W_r · agg_ℓ(x̃^ℓ),  agg the sum or the mean over the layers
    w = softmax(r)
    hard:  ℓ* = argmax w,  x = w_ℓ* · x̃^ℓ*          soft:  x = Σ_ℓ w_ℓ x̃^ℓ
    f, x̂ = the shared SAE on x;  the loss is the shared SAE's, with x the target

The router's scale w_ℓ* is divided out again when the reconstruction goes back into the LM. In hard routing the
router's only gradient runs through w_ℓ*, which NormMSE nearly cancels; so watch its shares and entropy.

Dimension letters: L layers, N tokens, D width, F latents, K active latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from routesae.train.saes.normalise import normalise
from routesae.train.saes.sae import SAE, Forward, Recipe
from routesae.train.saes.topk import TopK


class Routes(NamedTuple):
    """Where each token goes under hard routing: at_N, an index into the recipe's layers, and scale_N = w_ℓ*."""

    at_N: Tensor
    scale_N: Tensor


class RouteSAE(SAE):
    """A linear router over the layers in front of one shared TopK."""

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe)
        self.shared = TopK(recipe, generator)
        bound = recipe.width**-0.5  # that of a linear layer, as in the published code
        router_LD = (torch.rand(len(recipe.layers), recipe.width, generator=generator) * 2 - 1) * bound
        self.router_LD = nn.Parameter(router_LD)

    def forward(self, hidden_LND: Tensor) -> Forward:
        routing_NL = self.routing(hidden_LND)
        x_ND = self._routed(hidden_LND, routing_NL)
        return self.shared.autoencode(x_ND)._replace(routing_NL=routing_NL)

    def loss(self, out: Forward, dead_F: Tensor) -> Tensor:
        return self.shared.loss(out, dead_F)

    def initialise(self, hidden_LND: Tensor) -> None:
        with torch.no_grad():
            self.shared.centre(self._routed(hidden_LND, self.routing(hidden_LND)))

    def project_gradient(self) -> None:
        self.shared.project_gradient()

    def normalise_decoder(self) -> None:
        self.shared.normalise_decoder()

    def routing(self, hidden_LND: Tensor) -> Tensor:
        """w_NL, the router's softmax over the layers."""
        layers_ND = (normalise(hidden_ND).x_ND for hidden_ND in hidden_LND)
        gathered_ND = next(layers_ND)
        for x_ND in layers_ND:
            gathered_ND.add_(x_ND)
        if self.recipe.aggregate == "mean":
            gathered_ND.div_(len(hidden_LND))
        return torch.softmax(gathered_ND @ self.router_LD.T, dim=1)

    def routes(self, routing_NL: Tensor) -> Routes:
        """Hard routes of each token."""
        scale_N, at_N = routing_NL.max(dim=1)
        return Routes(at_N, scale_N)

    def _routed(self, hidden_LND: Tensor, routing_NL: Tensor) -> Tensor:
        if self.recipe.routing == "soft":
            return _Weighted.apply(hidden_LND, routing_NL)  # type: ignore[no-any-return, no-untyped-call]
        at_N, scale_N = self.routes(routing_NL)
        chosen_ND = hidden_LND[at_N, torch.arange(hidden_LND.shape[1], device=hidden_LND.device)]
        return normalise(chosen_ND).x_ND * scale_N[:, None]


class _Weighted(torch.autograd.Function):
    """Σ_ℓ w_ℓ x̃^ℓ; backward normalises each layer again instead of keeping [L, N, D] in float32."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden_LND: Tensor, routing_NL: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_LND)
        x_ND = torch.zeros(hidden_LND.shape[1:], device=hidden_LND.device)
        for at, hidden_ND in enumerate(hidden_LND):
            x_ND.addcmul_(normalise(hidden_ND).x_ND, routing_NL[:, at, None])
        return x_ND

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[None, Tensor]:
        (hidden_LND,) = ctx.saved_tensors  # type: ignore[attr-defined]
        products = [(normalise(hidden_ND).x_ND * grads[0]).sum(1) for hidden_ND in hidden_LND]
        return None, torch.stack(products, dim=1)
