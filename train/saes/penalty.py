"""λ, the weight of a sparsity penalty: given with --sparsity and warmed up, or steered until k latents are active.

    log λ ← log λ + 1/20·clip(log(L0/k), −1, 1)   at every training batch

A λ that works on one LM, layer and width is of no use on the next, while "about k active latents" means the same
everywhere; so steering is the default of the variants whose papers sweep λ (vanilla, gated, crosscoder).

It starts at λ = 2σ/‖x‖², σ = ‖x‖/√C the size of a pre-activation at the start (W_enc's rows have unit norm): an
active latent f lowers NormMSE by up to f²/‖x‖², which is then worth its penalty from f = 2σ on. At three times as
much latents die, at seven times most; at a fifth L0 first rises severalfold, and errors are larger at the end
(benchmarks/RESULTS.md). C: how many numbers an input has. A crosscoder's latent, as long in each of the L layers,
costs √L times as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from routesae.train.ranks.distributed import batch_mean
from routesae.train.saes.sae import Recipe

RATE = 0.05
START = 2.0
_TINY = 1e-6  # keeps inputs that are all zero out of 1/0


class PenaltyWeight(nn.Module):
    """λ as a module, so that a steered one is checkpointed with the weights."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.fixed = recipe.sparsity
        layers = len(recipe.layers) if recipe.sae == "crosscoder" else 1
        self.cost = math.sqrt(layers)  # what f = 1 adds to the penalty
        numbers = layers * recipe.width
        self.register_buffer("steered", torch.tensor(START / (numbers * self.cost)))  # for inputs of norm √C
        self.steered: Tensor

    @torch.no_grad()
    def start(self, x_NC: Tensor) -> None:
        """λ for inputs like x_NC, a sample of the normalised ones."""
        size = torch.linalg.vector_norm(x_NC, dim=1).mean().clamp(min=_TINY)
        self.steered.copy_(START / (size * math.sqrt(x_NC.shape[1]) * self.cost))

    @torch.no_grad()
    def steer(self, l0: Tensor, k: int) -> None:
        """l0: the mean number of active latents over the tokens of a training batch."""
        if self.fixed is None:
            ratio = (batch_mean(l0) / k).clamp(min=1e-3)
            self.steered *= torch.exp(RATE * ratio.log().clamp(-1, 1))

    def forward(self, sparsity_factor: float) -> Tensor | float:
        return self.steered.clone() if self.fixed is None else self.fixed * sparsity_factor
