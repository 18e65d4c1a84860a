"""Gated: one path decides which latents are active, another how much, with the encoder's rows shared (2404.16014).

    π' = W_enc (x − b_dec);   π = π' + b_gate
    f = 1[π > 0] · ReLU(e^r π' + b_mag)                                        (eq. 5–7)
    x̂ = W_decᵀ f + b_dec,   rows of W_dec of unit norm
    loss = NormMSE(x, x̂) + λ · mean over tokens of ‖ReLU(π)‖₁
           + NormMSE(x, W_decᵀ ReLU(π) + b_dec) with W_dec and b_dec held fixed   (eq. 8)

b_gate starts where k latents are active on a sample of the data; the paper starts at zero, with half of them active.
With --recipe published: NormMSE + λ times the mean of f over tokens and latents, and no auxiliary term. b_gate then
has no gradient at all (nothing differentiable reaches it), which is what the published RouteSAE code does.

Dimension letters: N tokens, D width, F latents, P pairs of a token and a latent: all, or those that can be active.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.train.losses import mean_over_rows, norm_mse
from routesae.train.saes.penalty import SteeredSAE
from routesae.train.saes.sae import Forward
from routesae.train.sparse.kernels import encode_above, encode_pairs
from routesae.train.sparse.pairs import AllPairs, Latents, Pairs
from routesae.train.sparse.search import Encoder


class _Gate(torch.autograd.Function):
    """ReLU(π) and f. By hand, since where most latents are active what autograd stores is most of a step's time."""

    @staticmethod
    def forward(ctx: Any, shared_P: Tensor, b_gate: Tensor, e_r: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor]:
        gate_P = (shared_P + b_gate).relu_()
        f_P = _where_positive(gate_P, torch.addcmul(b_mag, e_r, shared_P).relu_())
        ctx.save_for_backward(shared_P, e_r, gate_P, f_P)
        return gate_P, f_P

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shared_P, e_r, gate_P, f_P = ctx.saved_tensors
        g_gate_P, g_f_P = grads
        d_gate_P, d_f_P = _where_positive(gate_P, g_gate_P), _where_positive(f_P, g_f_P)
        d_b_gate, d_b_mag = d_gate_P.sum_to_size(e_r.shape), d_f_P.sum_to_size(e_r.shape)
        d_shared_P = torch.addcmul(d_gate_P, d_f_P, e_r)
        return d_shared_P, d_b_gate, (d_f_P * shared_P).sum_to_size(e_r.shape), d_b_mag


def _where_positive(of_P: Tensor, values_P: Tensor) -> Tensor:
    """values where `of` is above 0, else 0: ReLU's own gradient, several times as fast as a mask."""
    kept_P: Tensor = torch.ops.aten.threshold_backward(values_P, of_P, 0)
    return kept_P


class Gated(SteeredSAE):
    architecture = "gated"
    other_sparsity = False  # its gate and its magnitude are two numbers, not one z
    start_bias = "b_gate_F"
    tensors: ClassVar = {"b_gate": "b_gate_F", "b_mag": "b_mag_F", "r_mag": "r_mag_F"}
    b_gate_F: nn.Parameter
    b_mag_F: nn.Parameter
    r_mag_F: nn.Parameter

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        pairs, shared_P = encode_above(x_ND, self.encoder(), -self.b_gate_F.detach(), self.k)
        biases = (pairs.at(self.b_gate_F), pairs.at(self.r_mag_F.exp()), pairs.at(self.b_mag_F))
        gate_P, f_P = _Gate.apply(shared_P, *biases)  # type: ignore[no-untyped-call]
        reconstruction_ND = pairs.decode(f_P, self.W_dec_FD, self.b_dec_D)
        latents = Latents(f_P, pairs)
        out = Forward(x_ND, reconstruction_ND, latents, weights_N=weights_N)
        if not self.training:
            return out
        self.steer(latents.active_counts.sum() / len(x_ND))
        if self.recipe.published:
            return out._replace(penalty=mean_over_rows(pairs.by_token(f_P) / self.recipe.latents, weights_N))
        by_gate_ND = pairs.decode(gate_P, self.W_dec_FD.detach(), self.b_dec_D.detach())
        penalty = mean_over_rows(pairs.by_token(gate_P), weights_N)
        return out._replace(penalty=penalty, auxiliary=norm_mse(x_ND, by_gate_ND, weights_N))

    def encoder(self) -> Encoder:
        # The two paths have biases of their own.
        return Encoder(self.W_enc_FD, None, self.b_dec_D, self.arithmetic)

    def traced(self, x_ND: Tensor, latents: Latents) -> Latents:
        *pair, f_M = latents.active()
        pairs = Pairs(len(x_ND), self.recipe.latents, *pair)
        e_r_M, b_mag_M = pairs.at(self.r_mag_F.exp()), pairs.at(self.b_mag_F)
        shared_M = encode_pairs(x_ND, self.encoder(), pairs, ((f_M - b_mag_M) / e_r_M).detach())
        return Latents(torch.addcmul(b_mag_M, e_r_M, shared_M), pairs)

    def latents_of(self, x_ND: Tensor) -> Latents:
        shared_NF = F.linear(x_ND - self.b_dec_D, self.W_enc_FD)
        magnitude_NF = (self.r_mag_F.exp() * shared_NF + self.b_mag_F).relu_()
        return Latents(magnitude_NF.mul_(shared_NF + self.b_gate_F > 0), AllPairs())
