"""Pairs of a token and a latent: the few of an SAE's N·F numbers that matter, and decoding from those alone.

An SAE's equation is written once, over "pairs": all N·F of them (`AllPairs`, plain autograd), or the M that can be
active (`Pairs`, found by routesae.train.sparse.search), whose gradients are written by hand. Decoding M pairs is an
embedding bag, both weight gradients are embedding bags over the same pairs grouped by latent, and nothing of size
[N, F] or [M, D] is ever made. PyTorch's own operators serve CPU and CUDA alike. Sums over `Pairs` are float32, or
wider; under autocast dense products multiply in its precision and sum in float32.

Dimension letters: N tokens, D width, F latents, K latents a token, M pairs; P: [N, F] of all pairs, or [M].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from routesae.train.sparse.policy import COLUMNS, MANY_PAIRS, exactly
from routesae.train.sparse.search import row_products


class Frame(NamedTuple):
    """How rows that an SAE read go back to the LM's units: h = x / scale · std + mean; None parts are left out.

    Each part is [R, 1] for R rows, for a crosscoder [R, L, 1].
    """

    mean: Tensor | None = None
    std: Tensor | None = None
    scale: Tensor | None = None

    def moved(self, dx: Tensor) -> Tensor:
        """A difference of two x, as one of two hidden states."""
        dx = dx if self.scale is None else dx / self.scale
        return dx if self.std is None else dx * self.std

    def undo(self, x: Tensor) -> Tensor:
        """x, or a reconstruction of it, in the LM's units."""
        hidden = self.moved(x)
        return hidden if self.mean is None else hidden + self.mean


class Top(NamedTuple):
    """Activations, in the units of the SAE's normalised input, and their latents, both [..., n], strongest first."""

    values: Tensor
    indices: Tensor


@dataclass(eq=False)
class Latents:
    """The latents of N tokens: values_P ≥ 0 (zero: not active) of `pairs`, [M] of `Pairs` or [N, F] of `AllPairs`.

    frame: how their reconstruction goes back to the LM's units; None if it cannot. lead: the leading dimensions "..."
    of the hidden states [..., D] or [..., L, D] that they were encoded from; None for N rows as they are. layers: L,
    if each token has latents of each layer (mlsae, random), whose rows follow one another; "..." then ends with L.

    For people: `indices` and `values` [..., K], `top(n)` [..., n], `dense()` [..., F].
    """

    values_P: Tensor
    pairs: Pairs | AllPairs
    frame: Frame | None = None
    lead: tuple[int, ...] | None = None
    layers: int | None = None

    @cached_property
    def active_counts(self) -> Tensor:
        """int64 [F]: on how many of the N tokens each latent is active."""
        return self.pairs.active_counts(self.values_P.detach())

    def shaped(self, rows: Tensor) -> Tensor:
        """A number or more for each of the rows [R, *], as [..., *]."""
        if self.lead is None:
            return rows
        if self.layers is None:
            return rows.reshape(*self.lead, *rows.shape[1:])
        return rows.reshape(self.layers, *self.lead, *rows.shape[1:]).movedim(0, len(self.lead))

    def dense(self) -> Tensor:
        """f, [..., F], for what has to see every latent."""
        return self.shaped(self.pairs.dense(self.values_P))

    def top(self, n: int) -> Top:
        """The n strongest latents of each token. Where fewer are active, values of 0 follow, with idle latents."""
        f_RF = self.pairs.dense(self.values_P)
        values_Rn, indices_Rn = f_RF.topk(min(n, f_RF.shape[1]), dim=1)
        return Top(self.shaped(values_Rn), self.shaped(indices_Rn))

    @cached_property
    def _active(self) -> Top:
        tokens_M, _, _ = self.active()
        return self.top(int(torch.bincount(tokens_M).max()) if len(tokens_M) else 0)

    @property
    def values(self) -> Tensor:
        """[..., K], of `indices`."""
        return self._active.values

    @property
    def indices(self) -> Tensor:
        """int64 [..., K], strongest first; K: the most that are active on any token. A value of 0: not active."""
        return self._active.indices

    def active(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens_M, latents_M, values_M) of the pairs whose latent is active, by token."""
        return self.pairs.active(self.values_P)


class AllPairs:
    """Every token with every latent: what is per pair is a matrix [N, F]."""

    def at(self, v_F: Tensor) -> Tensor:
        """A latent's number for each of its pairs."""
        return v_F

    def by_token(self, v_NF: Tensor, weight_F: Tensor | None = None) -> Tensor:
        """[N]: the sum over each token's pairs, weighted by latent if weight_F is given."""
        wide = torch.promote_types(v_NF.dtype, torch.float32)  # bfloat16 holds no sum of many
        if weight_F is None:
            return v_NF.sum(1, dtype=wide)
        with exactly(v_NF.device.type):
            return v_NF.to(wide) @ weight_F

    def decode(self, f_NF: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
        """x̂_ND = W_decᵀ f + b_dec."""
        return f_NF @ W_dec_FD + b_dec_D

    def decode_parts(self, f_NF: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Sequence[Tensor]:
        """W_decᵀ f [N, D] of the latents up to the first end alone, of those from there to the second, and so on."""
        return [f_NF[:, first:end] @ W_dec_FD[first:end] for first, end in pairwise((0, *ends))]

    def active_counts(self, f_NF: Tensor) -> Tensor:
        signs_NF = torch.sign(f_NF).float()  # as a product: summing booleans takes twice as long
        with exactly(f_NF.device.type):
            return (signs_NF.new_ones(len(signs_NF)) @ signs_NF).long()

    def dense(self, f_NF: Tensor) -> Tensor:
        return f_NF

    def active(self, f_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens_M, latents_M = torch.nonzero(f_NF > 0, as_tuple=True)
        return tokens_M, latents_M, f_NF[tokens_M, latents_M]


class Pairs:
    """M pairs of a token and a latent, ordered by token, as AllPairs; what is per pair is a vector [M].

    tokens, latents: N and F. offsets_N: where each token's pairs begin.
    """

    def __init__(self, tokens: int, latents: int, tokens_M: Tensor, latents_M: Tensor):
        self.tokens, self.latents, self.tokens_M, self.latents_M = tokens, latents, tokens_M, latents_M
        self.offsets_N = _first_of_each(tokens_M, tokens)

    @classmethod
    def of(cls, indices_NK: Tensor, latents: int) -> Pairs:
        """Each token with its K latents."""
        n, k = indices_NK.shape
        return cls(n, latents, torch.arange(n, device=indices_NK.device).repeat_interleave(k), indices_NK.flatten())

    def at(self, v_F: Tensor) -> Tensor:
        return v_F.index_select(0, self.latents_M)

    def by_token(self, v_M: Tensor, weight_F: Tensor | None = None) -> Tensor:
        v_M = v_M if weight_F is None else v_M * self.at(weight_F)
        return v_M.new_zeros(self.tokens).index_add(0, self.tokens_M, v_M)

    def decode(self, f_M: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
        reconstruction_ND: Tensor = _Decode.apply(f_M, W_dec_FD, self)  # type: ignore[no-untyped-call]
        return reconstruction_ND + b_dec_D

    def decode_parts(self, f_M: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Sequence[Tensor]:
        """As AllPairs'. Waits for the device, as the number of pairs in the parts is not known before."""
        if not ends:
            return ()
        bounds = torch.tensor(ends, device=self.latents_M.device)
        part_M, order_M = torch.sort(torch.bucketize(self.latents_M, bounds, right=True), stable=True)
        order_M = order_M[: int((part_M < len(ends)).sum())]
        tokens_M = part_M[: len(order_M)] * self.tokens + self.tokens_M[order_M]
        parts = Pairs(len(ends) * self.tokens, self.latents, tokens_M, self.latents_M[order_M])  # N tokens each
        return torch.split(parts.decode(f_M[order_M], W_dec_FD, W_dec_FD.new_zeros(())), self.tokens)

    def active_counts(self, f_M: Tensor) -> Tensor:
        return counted(self.latents_M, self.latents, (f_M > 0).long())

    def dense(self, f_M: Tensor) -> Tensor:
        return f_M.new_zeros(self.tokens, self.latents).index_put_((self.tokens_M, self.latents_M), f_M)

    def active(self, f_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_M = torch.nonzero(f_M > 0).squeeze(1)
        return self.tokens_M[at_M], self.latents_M[at_M], f_M[at_M]

    def rows_by_token(self, weights_M: Tensor, rows_FD: Tensor) -> Tensor:
        """[N, D]: for each token the sum of its latents' rows, weighted."""
        return self._sums(self.latents_M, rows_FD, self.offsets_N, weights_M)

    @cached_property
    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs sorted by latent: their order_M, tokens_M, and where each latent's begin, offsets_F.

        Sorted once; every weight gradient uses it. Stable, so that a run is repeatable bit for bit.
        """
        narrow = torch.int16 if self.latents < 2**15 else torch.int32  # half the passes of a radix sort
        latents_M, order_M = torch.sort(self.latents_M.to(narrow), stable=True)
        return order_M, self.tokens_M.index_select(0, order_M), _first_of_each(latents_M, self.latents)

    def rows_by_latent(self, weights_M: Tensor, rows_ND: Tensor) -> Tensor:
        """[F, D]: for each latent the sum of its tokens' rows, weighted; zero if it has none."""
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


def _first_of_each(sorted_M: Tensor, size: int) -> Tensor:
    """int64 [size]: where each number's run begins."""
    return torch.searchsorted(sorted_M, torch.arange(size, dtype=sorted_M.dtype, device=sorted_M.device))


def counted(at_M: Tensor, size: int, counts_M: Tensor) -> Tensor:
    """[size]: the sums of the counts at each number from 0 on. torch.bincount waits for the device, twice."""
    return counts_M.new_zeros(size).index_add_(0, at_M, counts_M)


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
