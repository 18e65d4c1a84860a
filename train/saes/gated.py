"""Gated: one path decides which latents are active, another how much, with the encoder's rows shared (2404.16014).

    π' = W_enc (x − b_dec);   π = π' + b_gate
    f = 1[π > 0] · ReLU(e^r π' + b_mag)                                        (eq. 5–7)
    x̂ = W_decᵀ f + b_dec,   rows of W_dec of unit norm
    loss = NormMSE(x, x̂) + λ · mean over tokens of ‖ReLU(π)‖₁
           + NormMSE(x, W_decᵀ ReLU(π) + b_dec) with W_dec and b_dec held fixed   (eq. 8)

With --recipe published: NormMSE + λ times the mean of f over tokens and latents, and no auxiliary term. b_gate then
has no gradient at all (nothing differentiable reaches it), which is what the published RouteSAE code does.

Dimension letters: N tokens, D width, F latents.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.train.kernels import DenseLatents
from routesae.train.losses import mean_over_rows, norm_mse
from routesae.train.saes.penalty import PenaltyWeight
from routesae.train.saes.sae import Forward, Recipe
from routesae.train.saes.single import SingleLayerSAE


class Gated(SingleLayerSAE):
    architecture = "gated"
    tensors: ClassVar = {"b_gate": "b_gate_F", "b_mag": "b_mag_F", "r_mag": "r_mag_F"}
    b_gate_F: nn.Parameter
    b_mag_F: nn.Parameter
    r_mag_F: nn.Parameter

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        self.penalty = PenaltyWeight(recipe)

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        shared_NF = F.linear(x_ND - self.b_dec_D, self.W_enc_FD)
        gate_NF = (shared_NF + self.b_gate_F).relu()
        f_NF = torch.where(gate_NF > 0, (self.r_mag_F.exp() * shared_NF + self.b_mag_F).relu(), 0)
        out = Forward(x_ND, f_NF @ self.W_dec_FD + self.b_dec_D, DenseLatents(f_NF), weights_N=weights_N)
        if not self.training:
            return out
        self.penalty.steer((f_NF > 0).sum(1), self.k)
        if self.recipe.published:
            return out._replace(penalty=mean_over_rows(f_NF.mean(1), weights_N))
        by_gate_ND = gate_NF @ self.W_dec_FD.detach() + self.b_dec_D.detach()
        penalty = mean_over_rows(gate_NF.sum(1), weights_N)
        return out._replace(penalty=penalty, auxiliary=norm_mse(x_ND, by_gate_ND, weights_N))

    def penalty_weight(self, sparsity_factor: float) -> Tensor | float:
        weight: Tensor | float = self.penalty(sparsity_factor)
        return weight

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> DenseLatents:
        shared_NF = F.linear(x_ND - self.b_dec_D, self.W_enc_FD)
        magnitude_NF = (self.r_mag_F.exp() * shared_NF + self.b_mag_F).relu_()
        return DenseLatents(magnitude_NF.mul_(shared_NF + self.b_gate_F > 0))
