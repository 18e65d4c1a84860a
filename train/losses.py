"""The objectives: an input and its reconstruction in; one number out.

Dimension letters: N tokens, D width, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routesae.train.kernels import sparse_autoencode, topk_latents

AUXK_WEIGHT = 1 / 32  # 2406.04093, appendix A.2
_TINY = 1e-8  # keeps a token whose input or residual is exactly zero out of 0/0


def squared_error_shares(x_ND: Tensor, reconstruction_ND: Tensor) -> Tensor:
    """[N]: ‖x − x̂‖² / ‖x‖² of each token."""
    return (x_ND - reconstruction_ND).square().sum(1) / (x_ND.square().sum(1) + _TINY)


def mean_over_rows(values_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The mean; weighted where weights_N, which sum to 1, are given."""
    return values_N.mean() if weights_N is None else (weights_N * values_N).sum()


def norm_mse(x_ND: Tensor, reconstruction_ND: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """NormMSE: the mean over tokens of ‖x − x̂‖² / ‖x‖², weighted by weights_N where given."""
    return mean_over_rows(squared_error_shares(x_ND, reconstruction_ND), weights_N)


def auxk(
    x_ND: Tensor,
    reconstruction_ND: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor,
    dead_F: Tensor,
    weights_N: Tensor | None = None,
) -> Tensor:
    """AuxK: how badly the dead latents alone, the top D/2 of them, model what the live ones leave over.

    2406.04093, appendix A.2: ‖e − ê‖² with e = x − x̂ held fixed, relative to ‖e‖² as in the authors' code.
    Zero where no latent is dead.
    """
    dead = torch.nonzero(dead_F).squeeze(1)
    if len(dead) == 0:
        return x_ND.new_zeros(())
    x_ND, b_dec_D = x_ND.detach(), b_dec_D.detach()
    residual_ND = x_ND - reconstruction_ND.detach()
    weights = (W_enc_FD[dead], b_enc_F[dead], W_dec_FD[dead], b_dec_D)
    selected = topk_latents(x_ND, *weights[:2], b_dec_D, min(x_ND.shape[1] // 2, len(dead)))
    with_bias_ND, _ = sparse_autoencode(x_ND, *weights, selected)
    return norm_mse(residual_ND, with_bias_ND - b_dec_D, weights_N)
