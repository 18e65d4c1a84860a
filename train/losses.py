"""The terms that SAEs' objectives are made of.

Dimension letters: N tokens, D width, F latents.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from routesae.train.ranks.distributed import batch_mean
from routesae.train.sparse.kernels import encode_topk
from routesae.train.sparse.search import Encoder

AUXK_WEIGHT = 1 / 32  # 2406.04093, appendix A.2
_TINY = 1e-8  # keeps a token whose input or residual is exactly zero out of 0/0


def squared_error_shares(x_ND: Tensor, reconstruction_ND: Tensor) -> Tensor:
    """[N]: ‖x − x̂‖² / ‖x‖² of each token."""
    return (x_ND - reconstruction_ND).square().sum(1) / (x_ND.square().sum(1) + _TINY)


class Objective(NamedTuple):
    """total: what training lowers. norm_mse: the part of it that every variant has."""

    total: Tensor
    norm_mse: Tensor


def mean_over_rows(values_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The mean over the whole batch; weighted if weights_N, which sum to 1, are given."""
    return batch_mean(values_N.mean() if weights_N is None else (weights_N * values_N).sum())


class _NormMSE(torch.autograd.Function):
    """By hand, so that the residual is made once and its gradient is that residual scaled."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, reconstruction_ND: Tensor, weights_N: Tensor) -> Tensor:
        residual_ND = reconstruction_ND - x_ND
        size_N = torch.linalg.vector_norm(x_ND, dim=1).square() + _TINY
        share_N = torch.linalg.vector_norm(residual_ND, dim=1).square() / size_N
        ctx.save_for_backward(x_ND, residual_ND, size_N, share_N, weights_N)
        total: Tensor = (weights_N * share_N).sum()  # a product, @, would be rounded to bfloat16 under autocast
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_ND, residual_ND, size_N, share_N, weights_N = ctx.saved_tensors
        (g,) = grads
        scale_N = 2 * g * weights_N / size_N
        d_reconstruction_ND = residual_ND * scale_N[:, None]
        dx_ND = -d_reconstruction_ND - x_ND * (scale_N * share_N)[:, None] if ctx.needs_input_grad[0] else None
        return dx_ND, d_reconstruction_ND, g * share_N if ctx.needs_input_grad[2] else None


def norm_mse(x_ND: Tensor, reconstruction_ND: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """NormMSE: the mean over the batch's tokens of ‖x − x̂‖² / ‖x‖², weighted by weights_N if given."""
    if weights_N is None:
        weights_N = x_ND.new_full((len(x_ND),), 1 / len(x_ND))
    return batch_mean(_NormMSE.apply(x_ND, reconstruction_ND, weights_N))  # type: ignore[no-untyped-call]


def auxk(
    x_ND: Tensor,
    reconstruction_ND: Tensor,
    encoder: Encoder,
    W_dec_FD: Tensor,
    dead_d: Tensor,
    weights_N: Tensor | None = None,
) -> Tensor:
    """AuxK: how badly the dead latents alone, the top D/2 of them, model what the live ones leave over.

    2406.04093, appendix A.2: ‖e − ê‖² with e = x − x̂ held fixed, relative to ‖e‖² as in the authors' code.
    dead_d: their numbers. Zero where no latent is dead.
    """
    if len(dead_d) == 0:
        return x_ND.new_zeros(())
    assert encoder.b_enc_F is not None
    assert encoder.b_dec_D is not None
    x_ND, b_dec_D = x_ND.detach(), encoder.b_dec_D.detach()
    residual_ND = x_ND - reconstruction_ND.detach()
    of_dead = Encoder(encoder.W_enc_FD[dead_d], encoder.b_enc_F[dead_d], b_dec_D, encoder.chosen)
    pairs, z_M = encode_topk(x_ND, of_dead, min(x_ND.shape[1] // 2, len(dead_d)))
    modelled_ND = pairs.decode(z_M.relu(), W_dec_FD[dead_d], torch.zeros_like(b_dec_D))
    return norm_mse(residual_ND, modelled_ND, weights_N)
