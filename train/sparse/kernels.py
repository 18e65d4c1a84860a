"""Choose the pairs of a token and a latent that an SAE's equation runs over, and give their z, differentiable.

    z = W_enc (x − b_dec) + b_enc

Dimension letters: N tokens, D width, F latents, K active latents, M pairs; P: [N, F] of all pairs, or [M].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from routesae.train.ranks.distributed import batch_kth_largest, batch_least, batch_rows, batch_sum
from routesae.train.sparse.pairs import AllPairs, Latents, Pairs, counted
from routesae.train.sparse.search import Encoder, all_above, largest, pre_activations, topk_of

PROBE_ROWS = 128  # that the share is estimated from
BATCHTOPK_ROOM = 1.25  # pairs looked at for each that a batch keeps
BATCHTOPK_PROBE = 512  # tokens that say where those begin


class _Encode(torch.autograd.Function):
    """z over pairs. Its value comes from the search for the pairs; only the gradients are computed here."""

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
        db_F = counted(pairs.latents_M, len(W_enc_FD), dz_M)
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


def encode_topk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Pairs | AllPairs, Tensor]:
    """Each token with its k largest latents, and their pre-activations z_P, differentiable.

    All pairs where k is a larger share of the latents than the device's arithmetic is faster for, and memory is not
    limited; z is then 0 but for the k largest.
    """
    f = len(encoder.W_enc_FD)
    if encoder.arithmetic.dense(k, f):
        return AllPairs(), _largest_alone(encode_all(x_ND, encoder), k)
    z_NK, indices_NK = topk_of(x_ND, encoder, k)
    pairs = Pairs.of(indices_NK, f)
    return pairs, encode_pairs(x_ND, encoder, pairs, z_NK.flatten())


def encode_batchtopk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Pairs | AllPairs, Tensor]:
    """The pairs that hold the k·N largest pre-activations of the batch, as far as they are above 0, and z_P.

    All pairs as in encode_topk; z is then 0 but for those. Over `Pairs` it waits for the device, as their number is
    not known before. Between ranks all that tie for the last place are kept.
    """
    if encoder.arithmetic.dense(k, len(encoder.W_enc_FD)):
        z_NF = encode_all(x_ND, encoder)
        if (kept := k * batch_rows(len(x_ND))) != k * len(x_ND):
            return AllPairs(), z_NF.masked_fill(z_NF < batch_kth_largest(z_NF.detach(), kept), 0)
        return AllPairs(), _largest_alone(z_NF.view(1, -1), kept).view_as(z_NF)
    tokens_M, latents_M, z_M = _batchtopk(x_ND, encoder, k)
    pairs = Pairs(len(x_ND), len(encoder.W_enc_FD), tokens_M, latents_M)
    return pairs, encode_pairs(x_ND, encoder, pairs, z_M)


@torch.no_grad()
def _batchtopk(x_ND: Tensor, encoder: Encoder, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate from a few tokens above which value enough pairs lie; if there are too few, look at all above 0."""
    n, f = len(x_ND), len(encoder.W_enc_FD)
    kept_pairs = k * batch_rows(n)
    if (proposal := encoder.arithmetic.proposes(x_ND)) != x_ND.dtype:
        encoder = encoder.narrowed(proposal)
    probe_nD = x_ND[:: max(1, n // BATCHTOPK_PROBE)]
    z_nK, _ = topk_of(probe_nD, encoder, min(4 * k, f))
    enough = min(round(BATCHTOPK_ROOM * k * len(probe_nD)), z_nK.numel())
    floor = batch_least(torch.kthvalue(-z_nK.flatten(), enough).values.neg().clamp(min=0))
    for bound in (floor, torch.zeros_like(floor)):
        tokens_M, latents_M, z_M = all_above(x_ND, encoder, bound.expand(f))
        count = int(batch_sum(torch.tensor(len(z_M))))
        if count >= kept_pairs or not bool(bound > 0):
            break
    if count <= kept_pairs:
        return tokens_M, latents_M, z_M
    least = batch_kth_largest(z_M, kept_pairs)
    kept = torch.nonzero(z_M >= least).squeeze(1)
    return tokens_M.index_select(0, kept), latents_M.index_select(0, kept), z_M.index_select(0, kept)


def encode_above(x_ND: Tensor, encoder: Encoder, floor_F: Tensor, k: int) -> tuple[Pairs | AllPairs, Tensor]:
    """Pairs that hold at least every z above its latent's floor, and their z, differentiable.

    All pairs where more of them lie above than the device's arithmetic is faster for. So it is at once if k, how many
    are to be active on a token, is more; else some rows are looked at, which waits for the device.
    """
    if encoder.arithmetic.dense(k, len(floor_F)):
        return AllPairs(), encode_all(x_ND, encoder)
    probe_nF = torch.cat([z_nF > floor_F for _, z_nF in pre_activations(x_ND[:PROBE_ROWS], encoder, x_ND.dtype)])
    if bool(probe_nF.count_nonzero() > encoder.arithmetic.sparse_below * probe_nF.numel()):
        return AllPairs(), encode_all(x_ND, encoder)
    tokens_M, latents_M, z_M = all_above(x_ND, encoder, floor_F)
    pairs = Pairs(len(x_ND), len(floor_F), tokens_M, latents_M)
    return pairs, encode_pairs(x_ND, encoder, pairs, z_M)


def _largest_alone(z_RF: Tensor, k: int) -> Tensor:
    """z where it is among the k largest of its row, else 0."""
    if k == z_RF.shape[1]:
        return z_RF
    with torch.no_grad():
        is_small_RF = torch.ones_like(z_RF, dtype=torch.bool).scatter_(1, largest(z_RF.detach(), k), False)
    return z_RF.masked_fill(is_small_RF, 0)


def encode_all(x_ND: Tensor, encoder: Encoder) -> Tensor:
    """z_NF by plain autograd."""
    centred_ND = x_ND if encoder.b_dec_D is None else x_ND - encoder.b_dec_D
    return F.linear(centred_ND, encoder.W_enc_FD, encoder.b_enc_F)


# ----------------------------------------------------------------------------------------------- in use, no gradient


def topk_latents(x_ND: Tensor, encoder: Encoder, k: int) -> Latents:
    """ReLU(TopK(z, k))."""
    z_NK, indices_NK = topk_of(x_ND, encoder, k)
    return Latents(z_NK.relu_().flatten(), Pairs.of(indices_NK, len(encoder.W_enc_FD)))


def threshold_latents(x_ND: Tensor, encoder: Encoder, threshold_F: Tensor) -> Latents:
    """z where z > threshold and z > 0, else 0."""
    values_NF = x_ND.new_empty(len(x_ND), len(encoder.W_enc_FD))
    for rows, z_nF in pre_activations(x_ND, encoder, x_ND.dtype):
        values_NF[rows] = torch.where(z_nF > threshold_F.clamp(min=0), z_nF, 0)
    return Latents(values_NF, AllPairs())
