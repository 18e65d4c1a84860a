"""λ, the weight of a sparsity penalty: given with --sparsity and warmed up, or steered until k latents are active.

    log λ ← log λ + 1/20·clip(log(L0/k), −1, 1)   at every training batch

A λ that works on one LM, layer and width is of no use on the next, while "about k active latents" means the same
everywhere; so steering is the default of the variants whose papers sweep λ (vanilla, gated, crosscoder).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from routesae.train.distributed import batch_mean
from routesae.train.saes.sae import Recipe

RATE = 0.05


class PenaltyWeight(nn.Module):
    """λ as a module, so that a steered one is checkpointed with the weights."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.fixed = recipe.sparsity
        # About a tenth of NormMSE where k latents of a √D-long input are active: Σf ≈ √(k·D). Over L layers side by
        # side a single latent explains L times less at first and its norms sum to √L, so that at more than this all
        # latents of a crosscoder died within ten steps, before λ could be steered.
        layers = len(recipe.layers) if recipe.sae == "crosscoder" else 1
        start = 0.1 / (math.sqrt(recipe.k * recipe.width * layers) * layers)
        self.register_buffer("steered", torch.tensor(start))
        self.steered: Tensor

    @torch.no_grad()
    def steer(self, l0: Tensor, k: int) -> None:
        """l0: the mean number of active latents over the tokens of a training batch."""
        if self.fixed is None:
            ratio = (batch_mean(l0) / k).clamp(min=1e-3)
            self.steered *= torch.exp(RATE * ratio.log().clamp(-1, 1))

    def forward(self, sparsity_factor: float) -> Tensor | float:
        return self.steered.clone() if self.fixed is None else self.fixed * sparsity_factor
