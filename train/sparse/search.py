"""Find which latents are active on which tokens, and their exact pre-activations.

    z = W_enc (x − b_dec) + b_enc

In an SAE that keeps K of F latents only this product is dense. It runs a few rows at a time, in one buffer, and is
searched while those rows are still in the cores' caches. Nothing here has a gradient.

Where the device multiplies bfloat16 faster than float32 (sparse/policy.py, CUDA under autocast), the product only
proposes. Its error, about 1/350 of a pre-activation's standard deviation, is far smaller than the margin of the
search, and every pre-activation returned is computed anew in x's precision.

Dimension letters: N tokens, n rows at a time, D width, F latents, K candidates, M pairs of a token and a latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routesae.train.ranks.distributed import KEYS
from routesae.train.sparse.policy import Arithmetic, arithmetic, exactly

GROUP = 8  # latents of which only the largest is looked at first
SPARE = 8  # candidates beyond k, and an eighth of k more
MARGIN = 2**-5  # below a floor, in standard deviations of a pre-activation: ten of the proposal's errors
_KEYS_WITH_PLACE = {torch.int16: (torch.int32, 16), torch.int32: (torch.int64, 32)}
_COLUMNS = 32  # a bfloat16 product is fastest where its inner size is a multiple of this


class Encoder(NamedTuple):
    """z = W_enc (x − b_dec) + b_enc; a bias that is None is zero. chosen: how the sums are done; None for what is
    fastest on the device. narrow_FC: W_enc as a narrower product takes it, with room for a column of biases."""

    W_enc_FD: Tensor
    b_enc_F: Tensor | None = None
    b_dec_D: Tensor | None = None
    chosen: Arithmetic | None = None
    narrow_FC: Tensor | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        return arithmetic(self.W_enc_FD.device.type) if self.chosen is None else self.chosen

    def raised(self, by: Tensor) -> Encoder:
        """With `by`, [F] or one number, added to every pre-activation."""
        return self._replace(b_enc_F=by.expand(len(self.W_enc_FD)) if self.b_enc_F is None else self.b_enc_F + by)

    def narrowed(self, dtype: torch.dtype) -> Encoder:
        """With W_enc cast once, however often it is searched; what is raised from it shares the cast."""
        f, width = self.W_enc_FD.shape
        narrow_FC = self.W_enc_FD.new_zeros(f, (width // _COLUMNS + 1) * _COLUMNS, dtype=dtype)
        narrow_FC[:, :width] = self.W_enc_FD
        return self._replace(narrow_FC=narrow_FC)

    def bias(self) -> Tensor:
        """[F]: b_enc − W_enc b_dec."""
        bias_F = self.W_enc_FD.new_zeros(len(self.W_enc_FD)) if self.b_enc_F is None else self.b_enc_F
        if self.b_dec_D is None:
            return bias_F
        with exactly(self.W_enc_FD.device.type):  # bfloat16 would round it for all tokens alike
            return bias_F - self.W_enc_FD @ self.b_dec_D


@torch.no_grad()
def pre_activations(x_ND: Tensor, encoder: Encoder, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, z_nF), on a CPU a few rows at a time; the next overwrites z_nF.

    dtype: that of x, or a narrower one for proposals.
    """
    n, width = x_ND.shape
    chunk = encoder.arithmetic.rows_at_once(n, len(encoder.W_enc_FD), dtype)
    z_nF = torch.empty(chunk, len(encoder.W_enc_FD), dtype=dtype, device=x_ND.device)
    slices = (slice(start, min(start + chunk, n)) for start in range(0, n, max(1, chunk)))
    if dtype == x_ND.dtype:
        bias_F = encoder.bias()
        for rows in slices:
            yield rows, torch.addmm(bias_F, x_ND[rows], encoder.W_enc_FD.T, out=z_nF[: rows.stop - rows.start])
        return
    # The bias as one more column, with a one in x: cheaper than adding it to the product.
    W_enc_FC = encoder.narrowed(dtype).narrow_FC if encoder.narrow_FC is None else encoder.narrow_FC
    assert W_enc_FC is not None
    W_enc_FC[:, width] = 0 if encoder.b_enc_F is None else encoder.b_enc_F
    x_nC = x_ND.new_zeros(chunk, W_enc_FC.shape[1], dtype=dtype)
    x_nC[:, width] = 1
    for rows in slices:
        part_nC = x_nC[: rows.stop - rows.start]
        # Centred before it is rounded: hidden states have a few large entries that hardly vary.
        part_nC[:, :width] = x_ND[rows] if encoder.b_dec_D is None else x_ND[rows] - encoder.b_dec_D
        yield rows, torch.mm(part_nC, W_enc_FC.T, out=z_nF[: len(part_nC)])


def largest(z_nF: Tensor, k: int) -> Tensor:
    """int64 [n, k]: the places of each row's k largest, in no order; of values up to 0 any may be taken.

    The k largest are in the k groups of the largest maxima, so that most values are only compared with those of
    their group; the groups' maxima are searched in the same way.
    """
    return _largest(z_nF.view(KEYS[z_nF.element_size()]), k)  # as integers, positive numbers keep their order


def _largest(keys_nF: Tensor, k: int) -> Tensor:
    n, f = keys_nF.shape
    group = math.gcd(f, GROUP)
    groups = f // group
    if groups < 2 * k or group == 1:
        return _select(keys_nF, k)
    at_nK = _largest(keys_nF.view(n, group, groups).amax(1), k)
    members_nC = (at_nK[:, None, :] + groups * torch.arange(group, device=at_nK.device)[:, None]).flatten(1)
    return members_nC.gather(1, _select(keys_nF.gather(1, members_nC), k))


def _select(keys_nF: Tensor, k: int) -> Tensor:
    """int64 [n, k]: the places of each row's k largest whole numbers, in no order.

    On a CPU by numpy, whose partition is vectorised and three times as fast as torch.topk: of each number with its
    place in the low bits.
    """
    f = keys_nF.shape[1]
    wide, bits = _KEYS_WITH_PLACE.get(keys_nF.dtype, (torch.int64, 0))
    if keys_nF.device.type != "cpu" or f > 1 << bits:
        return torch.topk(keys_nF, k, dim=1, sorted=False).indices
    packed_nF = keys_nF.to(wide).bitwise_left_shift_(bits).bitwise_or_(torch.arange(f, dtype=wide)).numpy()
    threads = torch.get_num_threads()
    parts = np.array_split(packed_nF, min(threads, len(packed_nF)) or 1)
    list(_threads(threads).map(lambda part_nF: part_nF.partition(f - k, axis=1), parts))
    return torch.from_numpy(np.bitwise_and(packed_nF[:, f - k :], (1 << bits) - 1, dtype=np.int64))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="select")


@torch.no_grad()
def topk_of(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """(z_NK, indices_NK): the k largest pre-activations of each token, those above 0 exactly, in no order."""
    dtype = encoder.arithmetic.proposes(x_ND)
    exact = dtype == x_ND.dtype
    room = k if exact else min(k + k // 8 + SPARE, len(encoder.W_enc_FD))
    proposing = encoder if exact else encoder.raised(_margin(x_ND, encoder).max())
    z_NK = x_ND.new_empty(len(x_ND), room)
    indices_NK = torch.empty(len(x_ND), room, dtype=torch.int64, device=x_ND.device)
    for rows, z_nF in pre_activations(x_ND, proposing, dtype):
        indices_NK[rows] = largest(z_nF, room)
        if exact:
            z_NK[rows] = z_nF.gather(1, indices_NK[rows])
    if exact:
        return z_NK, indices_NK
    token_M = torch.arange(len(x_ND), device=x_ND.device).repeat_interleave(room)
    z_NK = row_products(token_M, indices_NK.flatten(), encoder.W_enc_FD, x_ND).view(-1, room)
    z_NK += encoder.bias().index_select(0, indices_NK.flatten()).view_as(z_NK)
    best_NK = largest(z_NK, k)
    return z_NK.gather(1, best_NK), indices_NK.gather(1, best_NK)


@torch.no_grad()
def all_above(x_ND: Tensor, encoder: Encoder, floor_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_M, latents_M, z_M) of every pre-activation above its latent's floor; by token."""
    dtype = encoder.arithmetic.proposes(x_ND)
    exact = dtype == x_ND.dtype
    floor_F = floor_F.to(x_ND.dtype)
    above = encoder.raised(-floor_F)
    if not exact:
        above = above.raised(_margin(x_ND, above))
    parts = []
    for rows, z_nF in pre_activations(x_ND, above, dtype):
        tokens_m, latents_m = _positive(z_nF)
        z_m = z_nF[tokens_m, latents_m] + floor_F[latents_m] if exact else z_nF.new_empty(0)
        parts.append((tokens_m + rows.start, latents_m, z_m))
    tokens_M, latents_M, z_M = (torch.cat(of_rows) for of_rows in zip(*parts, strict=True))
    if exact:
        return tokens_M, latents_M, z_M
    z_M = row_products(tokens_M, latents_M, encoder.W_enc_FD, x_ND)
    z_M += encoder.bias().index_select(0, latents_M)
    kept = torch.nonzero(z_M > floor_F.index_select(0, latents_M)).squeeze(1)
    return tokens_M.index_select(0, kept), latents_M.index_select(0, kept), z_M.index_select(0, kept)


def _margin(x_ND: Tensor, encoder: Encoder) -> Tensor:
    """[F]: how far a proposal may lie from its pre-activation."""
    longest = torch.linalg.vector_norm(x_ND, dim=1).max()
    if encoder.b_dec_D is not None:
        longest = longest + torch.linalg.vector_norm(encoder.b_dec_D)
    spread_F = torch.linalg.vector_norm(encoder.W_enc_FD, dim=1) * (longest / x_ND.shape[1] ** 0.5)
    margin_F: Tensor = MARGIN * (spread_F if encoder.b_enc_F is None else spread_F + encoder.b_enc_F.abs() / 8)
    return margin_F


def _positive(z_nF: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the values above 0, by row: groups that have one first, then their members."""
    n, f = z_nF.shape
    group = math.gcd(f, 2 * GROUP)
    groups = f // group
    keys_nF = z_nF.view(KEYS[z_nF.element_size()])
    row_Q, at_Q = torch.nonzero(keys_nF.view(n, group, groups).amax(1) > 0, as_tuple=True)
    columns_QG = at_Q[:, None] + groups * torch.arange(group, device=at_Q.device)
    members_QG = keys_nF.flatten().take(row_Q[:, None] * f + columns_QG)
    of_M, at_M = torch.nonzero(members_QG > 0, as_tuple=True)
    return row_Q[of_M], columns_QG[of_M, at_M]


def row_products(tokens_M: Tensor, latents_M: Tensor, rows_FD: Tensor, rows_ND: Tensor) -> Tensor:
    """[M]: rows_ND[token] · rows_FD[latent] of every pair, without making [M, D]."""
    products_M = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_ND, rows_FD, latents_M, tokens_M[:1], tokens_M, 0
    )
    assert isinstance(products_M, Tensor)
    return products_M
