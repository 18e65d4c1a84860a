"""Encoding into latents and decoding them, sparse and dense, with the sparse gradient written by hand.

    z = W_enc (x − b_dec) + b_enc,   f = a few of the z,   x̂ = W_decᵀ f + b_dec

Where an SAE keeps K of F latents (topk: 2406.04093, eq. 1–2; batchtopk: 2412.06410, eq. 3–4), only the encoder's
product is dense: everything after it, and all of the backward pass, touches N·K rows instead of N·F. Decoding and
both weight gradients are embedding bags, the weight gradients over tokens grouped by latent. PyTorch's own operators
serve CPU and CUDA alike. Where autocast is on, the encoder's product runs in its precision and the rest in float32.

Dimension letters: N tokens, D width, F latents, K active latents, M pairs of a token and a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows encoded at a time on a CPU: the [512, F] product stays near its cores while the top k are found.
CPU_CHUNK_ROWS = 512
BATCHTOPK_ROOM = 3  # candidates a token in units of k: on cached rows few tokens have three times the mean


class Latents(NamedTuple):
    """The active latents of N tokens, sparse: values_NK ≥ 0 (zero: not active) and indices_NK int64."""

    values_NK: Tensor
    indices_NK: Tensor

    def active_counts(self, latents: int) -> Tensor:
        """int64 [F]: on how many of the N tokens each latent is active."""
        return torch.bincount(self.indices_NK[self.values_NK > 0], minlength=latents)

    def dense(self, latents: int) -> Tensor:
        """f_NF, for what has to see every latent."""
        return self.values_NK.new_zeros(len(self.values_NK), latents).scatter_(1, self.indices_NK, self.values_NK)


class DenseLatents(NamedTuple):
    """All latents of N tokens: values_NF ≥ 0 (zero: not active)."""

    values_NF: Tensor

    def active_counts(self, latents: int) -> Tensor:
        """int64 [F]: on how many of the N tokens each latent is active."""
        return (self.values_NF > 0).sum(0)

    def dense(self, latents: int) -> Tensor:
        return self.values_NF


AnyLatents = Latents | DenseLatents


def pre_activations(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, z_nF) of W_enc (x − b_dec) + b_enc, without a gradient, in the precision that autocast asks for.

    On a CPU a few rows at a time, in one buffer: [N, F] never exists whole, and z_nF is gone with the next.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):  # centred before it is rounded
        dtype = torch.get_autocast_dtype(device)
        x_ND, W_enc_FD, bias_F = (x_ND - b_dec_D).to(dtype), W_enc_FD.to(dtype), b_enc_F.to(dtype)
    else:
        bias_F = b_enc_F - W_enc_FD @ b_dec_D
    n = len(x_ND)
    chunk = CPU_CHUNK_ROWS if device == "cpu" else max(1, n)
    z_nF = x_ND.new_empty(min(chunk, n), len(W_enc_FD))
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        yield rows, torch.addmm(bias_F, x_ND[rows], W_enc_FD.T, out=z_nF[: rows.stop - start])


@torch.no_grad()
def topk_latents(x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, k: int) -> Latents:
    """ReLU(TopK(W_enc (x − b_dec) + b_enc, k))."""
    values_NK = x_ND.new_empty(len(x_ND), k)
    indices_NK = torch.empty(len(x_ND), k, dtype=torch.int64, device=x_ND.device)
    for rows, z_nF in pre_activations(x_ND, W_enc_FD, b_enc_F, b_dec_D):
        if z_nF.dtype == values_NK.dtype:
            torch.topk(z_nF, k, dim=1, sorted=False, out=(values_NK[rows], indices_NK[rows]))
        else:
            values_NK[rows], indices_NK[rows] = torch.topk(z_nF, k, dim=1, sorted=False)
    return Latents(values_NK.relu_(), indices_NK)


@torch.no_grad()
def batchtopk_latents(x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, k: int) -> Latents:
    """The k·N largest pre-activations of the batch, those above 0; a token may have any number of them.

    Each token's `BATCHTOPK_ROOM`·k largest are the candidates. Should a token have all of its candidates among
    the k·N, more of its latents might belong there, so the room is doubled and the search made again.
    """
    room = min(BATCHTOPK_ROOM * k, len(W_enc_FD))
    while True:
        values_NK, indices_NK = topk_latents(x_ND, W_enc_FD, b_enc_F, b_dec_D, room)
        if k * len(x_ND) >= values_NK.numel():
            return Latents(values_NK, indices_NK)
        least = torch.kthvalue(-values_NK.flatten(), k * len(x_ND)).values.neg()
        if room == len(W_enc_FD) or not bool((values_NK.amin(1) >= least).logical_and(values_NK.amin(1) > 0).any()):
            return Latents(torch.where(values_NK >= least, values_NK, 0), indices_NK)
        room = min(2 * room, len(W_enc_FD))


@torch.no_grad()
def threshold_latents(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, threshold_F: Tensor
) -> DenseLatents:
    """z where z > threshold and z > 0, else 0."""
    values_NF = x_ND.new_empty(len(x_ND), len(W_enc_FD))
    for rows, z_nF in pre_activations(x_ND, W_enc_FD, b_enc_F, b_dec_D):
        values_NF[rows] = torch.where(z_nF > threshold_F.clamp(min=0), z_nF, 0)
    return DenseLatents(values_NF)


def decode(latents: AnyLatents, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """x̂_ND = W_decᵀ f + b_dec."""
    if isinstance(latents, DenseLatents):
        return latents.values_NF @ W_dec_FD + b_dec_D
    rows_ND = F.embedding_bag(latents.indices_NK, W_dec_FD, mode="sum", per_sample_weights=latents.values_NK)
    return rows_ND + b_dec_D


class Pairs(NamedTuple):
    """The M pairs of a token and a latent that is active on it, ordered by token.

    offsets_N: where each token's pairs begin. at_M: where each stood in the flattened [N, K]; None: all do, in order.
    """

    tokens_M: Tensor
    latents_M: Tensor
    values_M: Tensor
    offsets_N: Tensor
    at_M: Tensor | None


def pairs_of(latents: Latents, *, ragged: bool) -> Pairs:
    """ragged: leave out what is not active. Worth it where tokens differ much in how many latents they have."""
    n, k = latents.indices_NK.shape
    device = latents.indices_NK.device
    indices_M, values_M = latents.indices_NK.flatten(), latents.values_NK.flatten()
    if not ragged:
        tokens_M = torch.arange(n, device=device).repeat_interleave(k)
        return Pairs(tokens_M, indices_M, values_M, torch.arange(0, n * k, k, device=device), None)
    at_M = torch.nonzero(values_M).squeeze(1)
    counts_N = (latents.values_NK > 0).sum(1)
    tokens_M = torch.div(at_M, k, rounding_mode="floor")
    return Pairs(tokens_M, indices_M[at_M], values_M[at_M], torch.cumsum(counts_N, 0) - counts_N, at_M)


def summed_by_token(pairs: Pairs, weights_M: Tensor, rows_FD: Tensor) -> Tensor:
    """[N, D]: for each token the sum of its latents' rows, weighted."""
    return F.embedding_bag(pairs.latents_M, rows_FD, pairs.offsets_N, mode="sum", per_sample_weights=weights_M)


class ByLatent(NamedTuple):
    """The same pairs sorted by latent: order_M of them, their tokens_M, and where each latent's begin, offsets_F."""

    order_M: Tensor
    tokens_M: Tensor
    offsets_F: Tensor


def group_by_latent(pairs: Pairs, latents: int) -> ByLatent:
    """Sort the pairs once; both weight gradients use it. Stable, so that a run is repeatable bit for bit."""
    order_M = torch.argsort(pairs.latents_M.to(torch.int32), stable=True)
    counts_F = torch.bincount(pairs.latents_M, minlength=latents)
    return ByLatent(order_M, pairs.tokens_M[order_M], torch.cumsum(counts_F, 0) - counts_F)


def summed_by_latent(grouped: ByLatent, weights_M: Tensor, rows_ND: Tensor) -> Tensor:
    """[F, D]: for each latent the sum of its tokens' rows, weighted; zero where it has none."""
    weights_M = weights_M[grouped.order_M]
    return F.embedding_bag(grouped.tokens_M, rows_ND, grouped.offsets_F, mode="sum", per_sample_weights=weights_M)


def row_products(pairs: Pairs, rows_FD: Tensor, g_ND: Tensor) -> Tensor:
    """[M]: g_token · rows[latent], the gradient of `summed_by_token` with respect to its weights."""
    products_M = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_ND, rows_FD, pairs.latents_M, pairs.offsets_N, pairs.tokens_M, 0
    )
    assert isinstance(products_M, Tensor)
    return products_M


class _SparseAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        W_dec_FD: Tensor,
        b_dec_D: Tensor,
        values_NK: Tensor,
        indices_NK: Tensor,
        ragged: bool,
    ) -> tuple[Tensor, Tensor]:
        pairs = pairs_of(Latents(values_NK, indices_NK), ragged=ragged)
        ctx.save_for_backward(x_ND, W_enc_FD, W_dec_FD, b_dec_D, *pairs)
        return summed_by_token(pairs, pairs.values_M, W_dec_FD) + b_dec_D, values_NK.view_as(values_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g_ND, g_values_NK = grads
        x_ND, W_enc_FD, W_dec_FD, b_dec_D, *saved = ctx.saved_tensors
        pairs = Pairs(*saved)
        g_ND = g_ND.contiguous()
        # Through the decoder, then through the ReLU; what was not selected has no gradient.
        dz_M = row_products(pairs, W_dec_FD, g_ND)
        if g_values_NK is not None:
            dz_M = dz_M + (g_values_NK.flatten() if pairs.at_M is None else g_values_NK.flatten()[pairs.at_M])
        dz_M = dz_M * (pairs.values_M > 0)
        grouped = group_by_latent(pairs, len(W_enc_FD))
        dW_dec_FD = summed_by_latent(grouped, pairs.values_M, g_ND)
        db_enc_F = torch.bincount(pairs.latents_M, weights=dz_M, minlength=len(W_enc_FD)).to(dz_M.dtype)
        # dW_enc = Σ dz (x − b_dec): the bias's part is one outer product, not a subtraction for every token.
        dW_enc_FD = summed_by_latent(grouped, dz_M, x_ND).addr_(db_enc_F, b_dec_D, alpha=-1)
        db_dec_D = g_ND.sum(0) - db_enc_F @ W_enc_FD
        dx_ND = summed_by_token(pairs, dz_M, W_enc_FD) if ctx.needs_input_grad[0] else None
        return dx_ND, dW_enc_FD, db_enc_F, dW_dec_FD, db_dec_D, None, None, None


def sparse_autoencode(
    x_ND: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor,
    selected: Latents,
    *,
    ragged: bool = False,
) -> tuple[Tensor, Latents]:
    """x̂_ND and the active latents, differentiable in every tensor argument and through values_NK.

    selected: of these very x and weights, by `topk_latents` or `batchtopk_latents`; ragged as in `pairs_of`. The
    gradient is written by hand; `dense_autoencode` is what it must equal.
    """
    reconstruction_ND, values_NK = _SparseAutoencode.apply(  # type: ignore[no-untyped-call]
        x_ND, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, *selected, ragged
    )
    return reconstruction_ND, Latents(values_NK, selected.indices_NK)


def dense_autoencode(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, k: int
) -> tuple[Tensor, Latents]:
    """A topk by plain autograd over [N, F]: the oracle of the tests and the peer in the benchmarks."""
    z_NF = (x_ND - b_dec_D) @ W_enc_FD.T + b_enc_F
    values_NK, indices_NK = torch.topk(z_NF, k, dim=1, sorted=False)
    values_NK = values_NK.relu()
    f_NF = torch.zeros_like(z_NF).scatter(1, indices_NK, values_NK)
    return f_NF @ W_dec_FD + b_dec_D, Latents(values_NK, indices_NK)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_NF, threshold_F)
        ctx.bandwidth = bandwidth
        return torch.where(z_NF > threshold_F, z_NF, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z_NF, threshold_F = ctx.saved_tensors
        (g_NF,) = grads
        near_NF = rectangle(z_NF, threshold_F, ctx.bandwidth)
        d_threshold_F = (g_NF * near_NF).sum(0) * (-threshold_F / ctx.bandwidth)
        return torch.where(z_NF > threshold_F, g_NF, 0), d_threshold_F, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_NF, threshold_F)
        ctx.bandwidth = bandwidth
        return (z_NF > threshold_F).to(z_NF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z_NF, threshold_F = ctx.saved_tensors
        (g_NF,) = grads
        near_NF = rectangle(z_NF, threshold_F, ctx.bandwidth)
        return None, (g_NF * near_NF).sum(0) * (-1 / ctx.bandwidth), None


def rectangle(z_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """bool: K((z − θ)/ε), the kernel that stands for the derivative of a step (2407.14435, eq. 11–12)."""
    return (z_NF - threshold_F).abs() < bandwidth / 2


def jumprelu(z_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """z·1[z > θ]; its gradient to z is exact, the one to θ is −θ/ε·K((z − θ)/ε) (2407.14435, eq. 11)."""
    return _JumpReLU.apply(z_NF, threshold_F, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def step(z_NF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """1[z > θ] as numbers; its gradient to θ is −1/ε·K((z − θ)/ε), and none to z (2407.14435, eq. 12)."""
    return _Step.apply(z_NF, threshold_F, bandwidth)  # type: ignore[no-any-return, no-untyped-call]
