"""Encoding into latents and decoding them, for the pairs of a token and a latent that matter and no others.

    z = W_enc (x − b_dec) + b_enc,   f = a function of z, one number at a time,   x̂ = W_decᵀ f + b_dec

An SAE's equation is written once, over "pairs": all N·F of them (`AllPairs`, plain autograd), or the M that can be
active (`Pairs`, found by routesae.train.sparse.search), whose gradients are written by hand here. Decoding them is an
embedding bag, both weight gradients are embedding bags over the same pairs grouped by latent, and nothing of size
[N, F] or [M, D] is ever made. PyTorch's own operators serve CPU and CUDA alike; all of it is float32, or wider.

Dimension letters: N tokens, D width, F latents, K active latents, M pairs; P: [N, F] of all pairs, or [M].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from routesae.train.ranks.distributed import batch_kth_largest, batch_least, batch_rows, batch_sum
from routesae.train.sparse.search import (
    Encoder,
    all_above,
    pre_activations,
    row_products,
    topk_of,
)

# Above this share of all pairs a dense product is faster than bags over the pairs (benchmarks/steps.py).
SPARSE_BELOW = 1 / 12
PROBE_ROWS = 128  # that the share is estimated from
# From so many pairs a token on, a CPU sums rows a few columns at a time: those of all rows then lie near a core, and
# each is read again and again (benchmarks/steps.py: up to twice as fast; with fewer pairs no faster).
MANY_PAIRS, COLUMNS = 64, 64
BATCHTOPK_ROOM = 1.25  # pairs looked at for each that a batch keeps
BATCHTOPK_PROBE = 512  # tokens that say where those begin


class Active(NamedTuple):
    """The M pairs of a token and a latent active on it, by token, and its activations values_M > 0."""

    tokens_M: Tensor
    latents_M: Tensor
    values_M: Tensor


class Latents(NamedTuple):
    """The active latents of N tokens, K candidates each: values_NK ≥ 0 (zero: not active), indices_NK int64."""

    values_NK: Tensor
    indices_NK: Tensor

    def active_counts(self, latents: int) -> Tensor:
        """int64 [F]: on how many of the N tokens each latent is active."""
        return _counted(self.indices_NK.flatten(), self.values_NK.flatten() > 0, latents)

    def dense(self, latents: int) -> Tensor:
        """f_NF, for what has to see every latent."""
        return self.values_NK.new_zeros(len(self.values_NK), latents).scatter_(1, self.indices_NK, self.values_NK)

    def active(self) -> Active:
        at_M = torch.nonzero(self.values_NK.flatten() > 0).squeeze(1)
        tokens_M = torch.div(at_M, self.values_NK.shape[1], rounding_mode="floor")
        return Active(tokens_M, self.indices_NK.flatten()[at_M], self.values_NK.flatten()[at_M])


@dataclass(frozen=True, eq=False)
class DenseLatents:
    """All latents of N tokens: values_NF ≥ 0 (zero: not active)."""

    values_NF: Tensor

    @cached_property
    def _counts(self) -> Tensor:
        signs_NF = torch.sign(self.values_NF.detach())  # as a product: summing booleans takes twice as long
        return (signs_NF.new_ones(len(signs_NF)) @ signs_NF).long()

    def active_counts(self, latents: int) -> Tensor:
        """int64 [F]: on how many of the N tokens each latent is active."""
        return self._counts

    def dense(self, latents: int) -> Tensor:
        return self.values_NF

    def active(self) -> Active:
        tokens_M, latents_M = torch.nonzero(self.values_NF > 0, as_tuple=True)
        return Active(tokens_M, latents_M, self.values_NF[tokens_M, latents_M])


class RaggedLatents(NamedTuple):
    """The active latents of N tokens, as many as each has: values_M ≥ 0 (zero: not active) of `pairs`."""

    values_M: Tensor
    pairs: Pairs

    def active_counts(self, latents: int) -> Tensor:
        """int64 [F]: on how many of the N tokens each latent is active."""
        return _counted(self.pairs.latents_M, self.values_M > 0, latents)

    def dense(self, latents: int) -> Tensor:
        f_NF = self.values_M.new_zeros(self.pairs.tokens, latents)
        return f_NF.index_put_((self.pairs.tokens_M, self.pairs.latents_M), self.values_M)

    def active(self) -> Active:
        at_M = torch.nonzero(self.values_M > 0).squeeze(1)
        return Active(self.pairs.tokens_M[at_M], self.pairs.latents_M[at_M], self.values_M[at_M])


def _counted(latents_M: Tensor, active_M: Tensor, latents: int) -> Tensor:
    """int64 [F]: how many of the pairs that are active each latent has; exact, as the sums are float64."""
    return torch.bincount(latents_M, weights=active_M.double(), minlength=latents).long()


AnyLatents = Latents | DenseLatents | RaggedLatents


class AllPairs:
    """Every token with every latent: what is per pair is a matrix [N, F]."""

    def at(self, v_F: Tensor) -> Tensor:
        """A latent's number for each of its pairs."""
        return v_F

    def by_token(self, v_NF: Tensor, weight_F: Tensor | None = None) -> Tensor:
        """[N]: the sum over each token's pairs, weighted by latent where weight_F is given."""
        return v_NF.sum(1) if weight_F is None else v_NF @ weight_F

    def decode(self, f_NF: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
        """x̂_ND = W_decᵀ f + b_dec."""
        return f_NF @ W_dec_FD + b_dec_D

    def latents(self, f_NF: Tensor) -> DenseLatents:
        return DenseLatents(f_NF)


class Pairs:
    """M pairs of a token and a latent, ordered by token; what is per pair is a vector [M].

    tokens, latents: N and F. offsets_N: where each token's pairs begin.
    """

    def __init__(
        self, tokens: int, latents: int, tokens_M: Tensor, latents_M: Tensor, offsets_N: Tensor | None = None
    ):
        self.tokens, self.latents_in_all = tokens, latents
        self.tokens_M, self.latents_M = tokens_M, latents_M
        if offsets_N is None:
            counts_N = torch.bincount(tokens_M, minlength=tokens)
            offsets_N = torch.cumsum(counts_N, 0) - counts_N
        self.offsets_N = offsets_N

    @classmethod
    def of(cls, indices_NK: Tensor, latents: int) -> Pairs:
        """Each token with its K latents."""
        n, k = indices_NK.shape
        token_N = torch.arange(n, device=indices_NK.device)
        return cls(n, latents, token_N.repeat_interleave(k), indices_NK.flatten(), token_N * k)

    def where(self, kept_M: Tensor) -> Pairs:
        """Some of them; kept_M: their places, ascending."""
        return Pairs(self.tokens, self.latents_in_all, self.tokens_M[kept_M], self.latents_M[kept_M])

    def at(self, v_F: Tensor) -> Tensor:
        """A latent's number for each of its pairs."""
        return v_F.index_select(0, self.latents_M)

    def by_token(self, v_M: Tensor, weight_F: Tensor | None = None) -> Tensor:
        """[N]: the sum over each token's pairs, weighted by latent where weight_F is given."""
        v_M = v_M if weight_F is None else v_M * self.at(weight_F)
        return v_M.new_zeros(self.tokens).index_add(0, self.tokens_M, v_M)

    def decode(self, f_M: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
        """x̂_ND = W_decᵀ f + b_dec."""
        reconstruction_ND: Tensor = _Decode.apply(f_M, W_dec_FD, self)  # type: ignore[no-untyped-call]
        return reconstruction_ND + b_dec_D

    def latents(self, f_M: Tensor) -> RaggedLatents:
        return RaggedLatents(f_M, self)

    def rows_by_token(self, weights_M: Tensor, rows_FD: Tensor) -> Tensor:
        """[N, D]: for each token the sum of its latents' rows, weighted."""
        return self._sums(self.latents_M, rows_FD, self.offsets_N, weights_M)

    @cached_property
    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs sorted by latent: their order_M, tokens_M, and where each latent's begin, offsets_F.

        Sorted once; every weight gradient uses it. Stable, so that a run is repeatable bit for bit.
        """
        narrow = torch.int16 if self.latents_in_all < 2**15 else torch.int32  # half the passes of a radix sort
        order_M = torch.argsort(self.latents_M.to(narrow), stable=True)
        counts_F = torch.bincount(self.latents_M, minlength=self.latents_in_all)
        return order_M, self.tokens_M.index_select(0, order_M), torch.cumsum(counts_F, 0) - counts_F

    def rows_by_latent(self, weights_M: Tensor, rows_ND: Tensor) -> Tensor:
        """[F, D]: for each latent the sum of its tokens' rows, weighted; zero where it has none."""
        order_M, tokens_M, offsets_F = self._grouped
        weights_M = weights_M.index_select(0, order_M)  # several times faster than [order_M] on a CPU
        return self._sums(tokens_M, rows_ND, offsets_F, weights_M)

    def _sums(self, indices_M: Tensor, rows_RD: Tensor, offsets_B: Tensor, weights_M: Tensor) -> Tensor:
        """[B, D]: of each of B bags, the weighted sum of the rows that its indices name."""
        if rows_RD.device.type != "cpu" or len(indices_M) < MANY_PAIRS * self.tokens:
            return F.embedding_bag(indices_M, rows_RD, offsets_B, mode="sum", per_sample_weights=weights_M)
        sums_BD = rows_RD.new_empty(len(offsets_B), rows_RD.shape[1])
        for first in range(0, rows_RD.shape[1], COLUMNS):
            part = slice(first, first + COLUMNS)
            rows_RC = rows_RD[:, part].contiguous()
            sums_BD[:, part] = F.embedding_bag(
                indices_M, rows_RC, offsets_B, mode="sum", per_sample_weights=weights_M
            )
        return sums_BD


class _Decode(torch.autograd.Function):
    """W_decᵀ f over pairs."""

    @staticmethod
    def forward(ctx: Any, f_M: Tensor, W_dec_FD: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(f_M, W_dec_FD)
        ctx.pairs = pairs
        return pairs.rows_by_token(f_M, W_dec_FD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (f_M, W_dec_FD), pairs = ctx.saved_tensors, ctx.pairs
        g_ND = grads[0].contiguous()
        df_M = row_products(pairs.tokens_M, pairs.latents_M, W_dec_FD, g_ND) if ctx.needs_input_grad[0] else None
        return df_M, pairs.rows_by_latent(f_M, g_ND) if ctx.needs_input_grad[1] else None, None


class _Encode(torch.autograd.Function):
    """z over pairs: given already, since finding the pairs took it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor | None,
        b_dec_D: Tensor | None,
        pairs: Pairs,
        z_M: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, W_enc_FD, b_dec_D)
        ctx.pairs = pairs
        return z_M.view_as(z_M)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x_ND, W_enc_FD, b_dec_D), pairs = ctx.saved_tensors, ctx.pairs
        (dz_M,) = grads
        db_F = torch.bincount(pairs.latents_M, weights=dz_M, minlength=len(W_enc_FD)).to(dz_M.dtype)
        dW_FD = pairs.rows_by_latent(dz_M, x_ND)
        db_dec_D = None
        if b_dec_D is not None:
            # dW = Σ dz (x − b_dec): the bias's part is one outer product, not a subtraction for every token.
            dW_FD.addr_(db_F, b_dec_D, alpha=-1)
            db_dec_D = -(db_F @ W_enc_FD)
        dx_ND = pairs.rows_by_token(dz_M, W_enc_FD) if ctx.needs_input_grad[0] else None
        return dx_ND, dW_FD, db_F if ctx.needs_input_grad[2] else None, db_dec_D, None, None


def encode_pairs(x_ND: Tensor, encoder: Encoder, pairs: Pairs, z_M: Tensor) -> Tensor:
    """z_M, differentiable in x and the encoder. z_M: of these very x and encoder, as the search gives it."""
    return _Encode.apply(x_ND, *encoder[:3], pairs, z_M)  # type: ignore[no-any-return, no-untyped-call]


def encode_topk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Pairs, Tensor]:
    """Each token with its k largest latents, and their pre-activations z_M, differentiable."""
    with torch.no_grad():
        z_NK, indices_NK = topk_of(x_ND, encoder, k)
        pairs = Pairs.of(indices_NK, len(encoder.W_enc_FD))
    return pairs, encode_pairs(x_ND, encoder, pairs, z_NK.flatten())


def encode_batchtopk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Pairs, Tensor]:
    """The pairs of the k·N largest pre-activations of the batch, those above 0, and z_M, differentiable."""
    with torch.no_grad():
        tokens_M, latents_M, z_M = _batchtopk(x_ND, encoder, k)
        pairs = Pairs(len(x_ND), len(encoder.W_enc_FD), tokens_M, latents_M)
    return pairs, encode_pairs(x_ND, encoder, pairs, z_M)


def _batchtopk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A few tokens say above which value enough pairs lie; where they were too few, all above 0 are looked at."""
    n, f = len(x_ND), len(encoder.W_enc_FD)
    wanted = k * batch_rows(n)
    probe_nD = x_ND[:: max(1, n // BATCHTOPK_PROBE)]
    z_nK, _ = topk_of(probe_nD, encoder, min(4 * k, f))
    enough = min(round(BATCHTOPK_ROOM * k * len(probe_nD)), z_nK.numel())
    floor = batch_least(torch.kthvalue(-z_nK.flatten(), enough).values.neg().clamp(min=0))
    for bound in (floor, torch.zeros_like(floor)):
        tokens_M, latents_M, z_M = all_above(x_ND, encoder, bound.expand(f))
        found = int(batch_sum(torch.tensor(len(z_M))))
        if found >= wanted or not bool(bound > 0):
            break
    if found <= wanted:
        return tokens_M, latents_M, z_M
    least = batch_kth_largest(z_M, wanted)
    kept = torch.nonzero(z_M >= least).squeeze(1)
    return tokens_M.index_select(0, kept), latents_M.index_select(0, kept), z_M.index_select(0, kept)


def encode_above(x_ND: Tensor, encoder: Encoder, floor_F: Tensor) -> tuple[Pairs | AllPairs, Tensor]:
    """Pairs that hold at least every z above its latent's floor, and their z, differentiable.

    All pairs where more than `SPARSE_BELOW` of them lie above.
    """
    with torch.no_grad():
        probe_nF = torch.cat([z_nF > floor_F for _, z_nF in pre_activations(x_ND[:PROBE_ROWS], encoder, x_ND.dtype)])
        dense = bool(probe_nF.count_nonzero() > SPARSE_BELOW * probe_nF.numel())
    if dense:
        return AllPairs(), encode_all(x_ND, encoder)
    with torch.no_grad():
        tokens_M, latents_M, z_M = all_above(x_ND, encoder, floor_F)
        pairs = Pairs(len(x_ND), len(floor_F), tokens_M, latents_M)
    return pairs, encode_pairs(x_ND, encoder, pairs, z_M)


def encode_all(x_ND: Tensor, encoder: Encoder) -> Tensor:
    """z_NF by plain autograd."""
    centred_ND = x_ND if encoder.b_dec_D is None else x_ND - encoder.b_dec_D
    return F.linear(centred_ND, encoder.W_enc_FD, encoder.b_enc_F)


# ----------------------------------------------------------------------------------------------- in use, no gradient


@torch.no_grad()
def topk_latents(x_ND: Tensor, encoder: Encoder, k: int) -> Latents:
    """ReLU(TopK(z, k))."""
    z_NK, indices_NK = topk_of(x_ND, encoder, k)
    return Latents(z_NK.relu_(), indices_NK)


@torch.no_grad()
def threshold_latents(x_ND: Tensor, encoder: Encoder, threshold_F: Tensor) -> DenseLatents:
    """z where z > threshold and z > 0, else 0."""
    values_NF = x_ND.new_empty(len(x_ND), len(encoder.W_enc_FD))
    for rows, z_nF in pre_activations(x_ND, encoder, x_ND.dtype):
        values_NF[rows] = torch.where(z_nF > threshold_F.clamp(min=0), z_nF, 0)
    return DenseLatents(values_NF)


@torch.no_grad()
def decode(latents: AnyLatents, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """x̂_ND = W_decᵀ f + b_dec."""
    if isinstance(latents, DenseLatents):
        return latents.values_NF @ W_dec_FD + b_dec_D
    if isinstance(latents, RaggedLatents):
        return latents.pairs.rows_by_token(latents.values_M, W_dec_FD) + b_dec_D
    return Pairs.of(latents.indices_NK, len(W_dec_FD)).rows_by_token(latents.values_NK.flatten(), W_dec_FD) + b_dec_D


# -------------------------------------------------------------------------------------------------- steps and jumps


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_P, threshold_P)
        ctx.bandwidth = bandwidth
        return torch.where(z_P > threshold_P, z_P, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z_P, threshold_P = ctx.saved_tensors
        (g_P,) = grads
        near_P = rectangle(z_P, threshold_P, ctx.bandwidth)
        d_threshold = (g_P * near_P).sum_to_size(threshold_P.shape) * (-threshold_P / ctx.bandwidth)
        return torch.where(z_P > threshold_P, g_P, 0), d_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_P, threshold_P)
        ctx.bandwidth = bandwidth
        return (z_P > threshold_P).to(z_P.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z_P, threshold_P = ctx.saved_tensors
        (g_P,) = grads
        near_P = rectangle(z_P, threshold_P, ctx.bandwidth)
        return None, (g_P * near_P).sum_to_size(threshold_P.shape) * (-1 / ctx.bandwidth), None


def rectangle(z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
    """bool: K((z − θ)/ε), the kernel that stands for the derivative of a step (2407.14435, eq. 11–12)."""
    return (z_P - threshold_P).abs() < bandwidth / 2


def jumprelu(z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
    """z·1[z > θ]; its gradient to z is exact, the one to θ is −θ/ε·K((z − θ)/ε) (2407.14435, eq. 11).

    threshold_P: of z's shape, or [F] for z_NF.
    """
    return _JumpReLU.apply(z_P, threshold_P, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def step(z_P: Tensor, threshold_P: Tensor, bandwidth: float) -> Tensor:
    """1[z > θ] as numbers; its gradient to θ is −1/ε·K((z − θ)/ε), and none to z (2407.14435, eq. 12)."""
    return _Step.apply(z_P, threshold_P, bandwidth)  # type: ignore[no-any-return, no-untyped-call]
