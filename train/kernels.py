"""The sparse encode → top-k → decode operation and its hand-written gradient.

    z = W_enc (x − b_dec) + b_enc,   f = ReLU(TopK(z, k)),   x̂ = W_decᵀ f + b_dec      (2406.04093, eq. 1–2)

Only the encoder's product is dense. With K of F latents active everything after it, and all of the backward
pass, touches N·K rows instead of N·F: decoding and both weight gradients are embedding bags, the weight
gradients over tokens grouped by latent. PyTorch's own operators serve CPU and CUDA alike.

Dimension letters: N tokens, D width, F latents, K active latents, M = N·K pairs of a token and a latent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows encoded at a time on a CPU: the [512, F] product stays near its cores while the top k are found.
CPU_CHUNK_ROWS = 512


class Latents(NamedTuple):
    """The active latents of N tokens: values_NK ≥ 0 (zero: not active) and indices_NK int64."""

    values_NK: Tensor
    indices_NK: Tensor


def topk_latents(x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, k: int) -> Latents:
    """ReLU(TopK(W_enc (x − b_dec) + b_enc, k)) without a gradient; [N, F] never exists whole on a CPU."""
    bias_F = b_enc_F - W_enc_FD @ b_dec_D
    n = len(x_ND)
    chunk = CPU_CHUNK_ROWS if x_ND.device.type == "cpu" else max(1, n)
    values_NK = x_ND.new_empty(n, k)
    indices_NK = torch.empty(n, k, dtype=torch.int64, device=x_ND.device)
    z_nF = x_ND.new_empty(min(chunk, n), len(W_enc_FD))
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        out = z_nF[: rows.stop - start]
        torch.addmm(bias_F, x_ND[rows], W_enc_FD.T, out=out)
        torch.topk(out, k, dim=1, sorted=False, out=(values_NK[rows], indices_NK[rows]))
    return Latents(values_NK.relu_(), indices_NK)


def decode(latents: Latents, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """x̂_ND = Σ_k values · W_dec[indices] + b_dec."""
    return weighted_rows(latents.indices_NK, latents.values_NK, W_dec_FD) + b_dec_D


def weighted_rows(indices_NK: Tensor, weights_NK: Tensor, rows_FD: Tensor) -> Tensor:
    """[N, D]: for each token the sum of its K rows of `rows_FD`, weighted."""
    return F.embedding_bag(indices_NK, rows_FD, mode="sum", per_sample_weights=weights_NK)


class ByLatent(NamedTuple):
    """The M pairs of token and latent, sorted by latent.

    tokens_M: the token of each pair; pairs_M: where the pair stood in the flattened [N, K]; offsets_F: where
    each latent's pairs begin.
    """

    tokens_M: Tensor
    pairs_M: Tensor
    offsets_F: Tensor


def group_by_latent(indices_NK: Tensor, latents: int) -> ByLatent:
    """Sort the pairs once; both weight gradients use it. Stable, so that a run is repeatable bit for bit."""
    flat_M = indices_NK.flatten()
    pairs_M = torch.argsort(flat_M.to(torch.int32), stable=True)
    counts_F = torch.bincount(flat_M, minlength=latents)
    offsets_F = torch.cumsum(counts_F, 0) - counts_F
    return ByLatent(torch.div(pairs_M, indices_NK.shape[1], rounding_mode="floor"), pairs_M, offsets_F)


def summed_by_latent(grouped: ByLatent, weights_NK: Tensor, rows_ND: Tensor) -> Tensor:
    """[F, D]: for each latent the sum of its tokens' rows, weighted; zero where it has none."""
    return F.embedding_bag(
        grouped.tokens_M,
        rows_ND,
        grouped.offsets_F,
        mode="sum",
        per_sample_weights=weights_NK.flatten()[grouped.pairs_M],
    )


def row_products(indices_NK: Tensor, rows_FD: Tensor, g_ND: Tensor) -> Tensor:
    """[N, K]: g_n · rows[indices_nk], the gradient of `weighted_rows` with respect to its weights."""
    n, k = indices_NK.shape
    offsets = torch.arange(0, n * k, k, device=g_ND.device)
    token_of_pair = torch.arange(n, device=g_ND.device).repeat_interleave(k)
    products_M = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_ND, rows_FD, indices_NK.flatten(), offsets, token_of_pair, 0
    )
    assert isinstance(products_M, Tensor)
    return products_M.view(n, k)


class _SparseAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        latents = topk_latents(x_ND, W_enc_FD, b_enc_F, b_dec_D, k)
        ctx.save_for_backward(x_ND, W_enc_FD, W_dec_FD, b_dec_D, *latents)
        ctx.mark_non_differentiable(latents.indices_NK)
        return decode(latents, W_dec_FD, b_dec_D), latents.values_NK, latents.indices_NK

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g_ND, g_values_NK, _ = grads
        x_ND, W_enc_FD, W_dec_FD, b_dec_D, values_NK, indices_NK = ctx.saved_tensors
        g_ND = g_ND.contiguous()
        # Through the decoder, then through the ReLU; what was not among the top k has no gradient.
        dz_NK = row_products(indices_NK, W_dec_FD, g_ND)
        if g_values_NK is not None:
            dz_NK = dz_NK + g_values_NK
        dz_NK = dz_NK * (values_NK > 0)
        grouped = group_by_latent(indices_NK, len(W_enc_FD))
        dW_dec_FD = summed_by_latent(grouped, values_NK, g_ND)
        db_enc_F = torch.bincount(indices_NK.flatten(), weights=dz_NK.flatten(), minlength=len(W_enc_FD))
        db_enc_F = db_enc_F.to(dz_NK.dtype)
        # dW_enc = Σ dz (x − b_dec): the bias's part is one outer product, not a subtraction for every token.
        dW_enc_FD = summed_by_latent(grouped, dz_NK, x_ND).addr_(db_enc_F, b_dec_D, alpha=-1)
        db_dec_D = g_ND.sum(0) - db_enc_F @ W_enc_FD
        dx_ND = weighted_rows(indices_NK, dz_NK, W_enc_FD) if ctx.needs_input_grad[0] else None
        return dx_ND, dW_enc_FD, db_enc_F, dW_dec_FD, db_dec_D, None


def sparse_autoencode(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int
) -> tuple[Tensor, Latents]:
    """x̂_ND and the active latents, differentiable in every tensor argument and through values_NK.

    The gradient is written by hand; `dense_autoencode` is what it must equal.
    """
    reconstruction_ND, values_NK, indices_NK = _SparseAutoencode.apply(  # type: ignore[no-untyped-call]
        x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, k
    )
    return reconstruction_ND, Latents(values_NK, indices_NK)


def dense_autoencode(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int
) -> tuple[Tensor, Latents]:
    """The same by plain autograd over [N, F]: the oracle of the tests and the peer in the benchmarks."""
    z_NF = (x_ND - b_dec_D) @ W_enc_FD.T + b_enc_F
    values_NK, indices_NK = torch.topk(z_NF, k, dim=1, sorted=False)
    values_NK = values_NK.relu()
    f_NF = torch.zeros_like(z_NF).scatter(1, indices_NK, values_NK)
    return f_NF @ W_dec_FD + b_dec_D, Latents(values_NK, indices_NK)
