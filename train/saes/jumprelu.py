"""JumpReLU: each latent has a threshold of its own, learned (2407.14435).

    z = W_enc (x − b_dec) + b_enc
    f = z·1[z > θ]                                                              (eq. 3)
    loss = NormMSE(x, x̂) + μ·(L0/k − 1)²     with L0 the batch's mean, the default: target-L0 form
       or  NormMSE(x, x̂) + λ·L0              with --sparsity λ                  (eq. 9)
       and, with --pre-act-loss c, + c · Σ over dead latents of ReLU(θ − z)·‖d‖ (Anthropic, January 2025)

θ's gradients are the rectangle kernel's estimates (eq. 11–12; routesae.train.kernels). Two departures, for runs of
minutes rather than days: θ is learned itself, not its logarithm, so that it comes back from a file bit for bit; and
it starts at the value at which k latents are active on a sample of the data, where the paper starts at 0.001 with
almost half of them active.

With --recipe published: θ starts at 0.001, ε is 0.001, λ·L0 only, and L0's estimate looks at f instead of z.

Dimension letters: N tokens, D width, F latents.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.train.kernels import DenseLatents, jumprelu, step, threshold_latents
from routesae.train.losses import mean_over_rows
from routesae.train.saes.sae import Forward, Recipe
from routesae.train.saes.single import SingleLayerSAE

BANDWIDTH = 0.5  # ε, in units of z, whose inputs have norm √D
TARGET_WEIGHT = 1.0  # μ
SAMPLE_TOKENS = 1024  # that θ starts from
PUBLISHED_THRESHOLD = PUBLISHED_BANDWIDTH = 0.001


class JumpReLU(SingleLayerSAE):
    architecture = "jumprelu"
    tensors: ClassVar = {"b_enc": "b_enc_F", "threshold": "threshold_F"}
    threshold_F: nn.Parameter

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        with torch.no_grad():
            self.threshold_F.fill_(PUBLISHED_THRESHOLD)
        self.bandwidth = PUBLISHED_BANDWIDTH if recipe.published else BANDWIDTH

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        z_NF = F.linear(x_ND - self.b_dec_D, self.W_enc_FD, self.b_enc_F)
        threshold_F = self.threshold_F.clamp(min=0)
        f_NF = jumprelu(z_NF, threshold_F, self.bandwidth)
        active_NF = step(f_NF if self.recipe.published else z_NF, threshold_F, self.bandwidth)
        l0 = mean_over_rows(active_NF.sum(1), weights_N)
        penalty = l0 if self.recipe.sparsity is not None else (l0 / self.k - 1).square()
        return Forward(x_ND, f_NF @ self.W_dec_FD + self.b_dec_D, DenseLatents(f_NF), penalty, weights_N=weights_N)

    def penalty_weight(self, sparsity_factor: float) -> float:
        return sparsity_factor * (TARGET_WEIGHT if self.recipe.sparsity is None else self.recipe.sparsity)

    def loss(self, out: Forward, dead_F: Tensor, sparsity_factor: float = 1.0) -> Tensor:
        loss = super().loss(out, dead_F, sparsity_factor)
        dead = torch.nonzero(dead_F).squeeze(1) if self.recipe.pre_act_loss else dead_F[:0]
        if len(dead) == 0:
            return loss
        z_Nd = F.linear(out.x_ND - self.b_dec_D, self.W_enc_FD[dead], self.b_enc_F[dead])
        short_Nd: Tensor = (self.threshold_F[dead].clamp(min=0) - z_Nd).relu() * self.W_dec_FD[dead].norm(dim=1)
        return loss + self.recipe.pre_act_loss * mean_over_rows(short_Nd.sum(1), out.weights_N)

    @torch.no_grad()
    def centre(self, x_ND: Tensor) -> None:
        super().centre(x_ND)
        if self.recipe.published:
            return
        z_NF = F.linear(x_ND[:SAMPLE_TOKENS] - self.b_dec_D, self.W_enc_FD, self.b_enc_F)
        active = min(self.k * len(z_NF), z_NF.numel() - 1)
        self.threshold_F.fill_(torch.kthvalue(-z_NF.flatten(), active + 1).values.neg())

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> DenseLatents:
        return threshold_latents(x_ND, self.W_enc_FD, self.b_enc_F, self.b_dec_D, self.threshold_F)
