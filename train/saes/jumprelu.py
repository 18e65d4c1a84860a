"""JumpReLU: each latent has a threshold of its own, learned (2407.14435).

    z = W_enc (x − b_dec) + b_enc
    f = z·1[z > θ]                                                              (eq. 3)
    loss = NormMSE(x, x̂) + μ·(L0/k − 1)²     with L0 the batch's mean, the default: target-L0 form
       or  NormMSE(x, x̂) + λ·L0              with --sparsity λ                  (eq. 9)
       and, with --pre-act-loss c, + c · Σ over dead latents of ReLU(θ − z)·‖d‖ (Anthropic, January 2025)

θ's gradients are the rectangle kernel's estimates (eq. 11–12). Two departures, for runs of
minutes rather than days: θ is learned itself, not its logarithm, so that a file gives it back bit for bit; and it
starts at the value at which k latents are active on a sample of the data, where the paper starts at 0.001 with
almost half of them active.

With --recipe published: θ starts at 0.001, ε is 0.001, λ·L0 only, and L0's estimate looks at f instead of z.

Dimension letters: N tokens, D width, F latents, P pairs of a token and a latent: all, or those that can be active.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.train.losses import Objective, mean_over_rows
from routesae.train.saes.sae import Forward, Recipe
from routesae.train.saes.single import SingleLayerSAE, least_active
from routesae.train.sparse.kernels import encode_above, encode_all, threshold_latents
from routesae.train.sparse.pairs import AllPairs, Latents, Pairs

BANDWIDTH = 0.5  # ε, in units of z, whose inputs have norm √D
TARGET_WEIGHT = 1.0  # μ
PUBLISHED_THRESHOLD = PUBLISHED_BANDWIDTH = 0.001


class JumpReLU(SingleLayerSAE):
    architecture = "jumprelu"
    penalised = True
    tensors: ClassVar = {"b_enc": "b_enc_F", "threshold": "threshold_F"}
    threshold_F: nn.Parameter

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        with torch.no_grad():
            self.threshold_F.fill_(PUBLISHED_THRESHOLD)
        self.bandwidth = PUBLISHED_BANDWIDTH if recipe.published else BANDWIDTH

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        threshold_F = self.threshold_F.clamp(min=0)
        # What lies within half a bandwidth below its threshold is not active, and yet moves the threshold.
        floor_F = threshold_F.detach() - self.bandwidth / 2
        encoder = self.encoder()
        may_be_few = self.recipe.published and not encoder.arithmetic.dense(self.k, len(floor_F))
        pairs: Pairs | AllPairs
        if may_be_few and bool((floor_F < 0).any()):  # the published estimate then counts every f of 0 as near
            pairs, z_P = AllPairs(), encode_all(x_ND, encoder)
        else:
            pairs, z_P = encode_above(x_ND, encoder, floor_F, self.k)
        threshold_P = pairs.at(threshold_F)
        f_P = jumprelu(z_P, threshold_P, self.bandwidth)
        active_P = step(f_P if self.recipe.published else z_P, threshold_P, self.bandwidth)
        l0 = mean_over_rows(pairs.by_token(active_P), weights_N)
        penalty = l0 if self.recipe.sparsity is not None else (l0 / self.k - 1).square()
        reconstruction_ND = pairs.decode(f_P, self.W_dec_FD, self.b_dec_D)
        return Forward(x_ND, reconstruction_ND, Latents(f_P, pairs), penalty, weights_N=weights_N)

    def penalty_weight(self, sparsity_factor: float) -> float:
        return sparsity_factor * (TARGET_WEIGHT if self.recipe.sparsity is None else self.recipe.sparsity)

    def objective(self, out: Forward, dead_d: Tensor, sparsity_factor: float) -> Objective:
        objective = super().objective(out, dead_d, sparsity_factor)
        if len(dead_d) == 0 or not self.recipe.pre_act_loss:
            return objective
        z_Nd = F.linear(out.x_ND - self.b_dec_D, self.W_enc_FD[dead_d], self.b_enc_F[dead_d])
        short_Nd: Tensor = (self.threshold_F[dead_d].clamp(min=0) - z_Nd).relu() * self.W_dec_FD[dead_d].norm(dim=1)
        revival = self.recipe.pre_act_loss * mean_over_rows(short_Nd.sum(1), out.weights_N)
        return objective._replace(total=objective.total + revival)

    @torch.no_grad()
    def start_from(self, x_ND: Tensor) -> None:
        super().start_from(x_ND)
        if not self.recipe.published:
            self.threshold_F.copy_(least_active(x_ND - self.b_dec_D, self.W_enc_FD, self.k))

    def latents_of(self, x_ND: Tensor) -> Latents:
        return threshold_latents(x_ND, self.encoder(), self.threshold_F)


class _Jump(torch.autograd.Function):
    """z·1[z > θ], or with `counts` 1[z > θ] alone."""

    @staticmethod
    def forward(ctx: Any, z_P: Tensor, threshold_P: Tensor, bandwidth: float, counts: bool) -> Tensor:
        ctx.save_for_backward(z_P, threshold_P)
        ctx.bandwidth, ctx.counts = bandwidth, counts
        above_P = z_P > threshold_P
        return above_P.to(z_P.dtype) if counts else torch.where(above_P, z_P, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z_P, threshold_P = ctx.saved_tensors
        (g_P,) = grads
        # K((z − θ)/ε), the rectangle kernel that stands for the derivative of a step.
        near_P = (z_P - threshold_P).abs() < ctx.bandwidth / 2
        near = (g_P * near_P).sum_to_size(threshold_P.shape)
        if ctx.counts:
            return None, near * (-1 / ctx.bandwidth), None, None
        return torch.where(z_P > threshold_P, g_P, 0), near * (-threshold_P / ctx.bandwidth), None, None


def jumprelu(z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
    """z·1[z > θ]; its gradient to z is exact, the one to θ is −θ/ε·K((z − θ)/ε) (2407.14435, eq. 11).

    threshold_P: of z's shape, or [F] for z_NF.
    """
    return _Jump.apply(z_P, threshold_P, bandwidth, False)  # type: ignore[no-any-return, no-untyped-call]


def step(z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
    """1[z > θ] as numbers; its gradient to θ is −1/ε·K((z − θ)/ε), and none to z (2407.14435, eq. 12)."""
    return _Jump.apply(z_P, threshold_P, bandwidth, True)  # type: ignore[no-any-return, no-untyped-call]
