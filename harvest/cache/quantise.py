"""A row's mean and standard deviation, and layers in half the bytes: float16 into int8 and back.

    mean = Σ_d h_d / D        std = √(Σ_d (h_d − mean)² / (D − 1))        in float32, of the values as stored

That is what a trainer needs to normalise a row without reading it first (routesae.train.saes.normalise adds its
epsilon). And of a shard's float16 layer, with --dtype int8:

    ĥ_nd = m_d + s_d · (t_n · q_nd)          q_nd = round((h_nd − m_d) / (s_d · t_n)), a whole number of ±127
    t_n = max_d |h_nd − m_d| / s_d / 127     `token_scale`: a row's own range
    m_d = Σ_n w_n h_nd / Σ_n w_n             `channel_mean`
    s_d = √(Σ_n w_n (h_nd − m_d)² / Σ_n w_n)   `channel_std`
    w_n = 1 / (1 + (σ_n / mean σ)²)          σ_n: the row's own standard deviation over D

over the rows of the shard alone, so that a shard stays a function of its rows. The weights keep a few huge rows
(27,600 and more, near an attention sink) from setting a channel's mean and step for all others: with w = 1 the error
of SmolLM2's layer 12, as NormMSE counts it, is four times as large (benchmarks/RESULTS.md, int8).

ĥ is computed in float32, every operation rounded by itself, and rounded to float16: the same bits on any device and
for any piece of the rows. |ĥ − h| is at most half of s_d · t_n and float16's rounding; where that would be beyond
float16's largest number, q is one nearer to 0.

Dimension letters: n rows of a shard, m rows of a piece, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
INFINITE_FROM = 65_520  # what float16 rounds to infinity
# torch starts threads for 32,768 values and more; a reader's thread must not, and so few stay in a core's cache.
CPU_PIECE_VALUES = (1 << 15) - 1
GPU_PIECE_VALUES = 1 << 24


class Channels(NamedTuple):
    """Float32 [D]: what a layer's rows in one shard are measured from, and in; [m, D] for rows of several shards."""

    mean_D: Tensor
    std_D: Tensor


class Encoding(NamedTuple):
    """What a layer's int8 numbers stand for, and what was lost.

    mean_n and std_n: of the rows that are read back. fvu: Σ‖h−ĥ‖² / Σ‖h−mean‖² over the rows, mean the plain one of
    each channel. norm_mse: mean over the rows of ‖h−ĥ‖² / ‖h−h̄‖², h̄ the row's mean, which is what NormMSE makes of it
    where rows are normalised. Both float64 and on the rows' device; 0 where there is nothing to lose.
    """

    scale_n: Tensor
    channels: Channels
    mean_n: Tensor
    std_n: Tensor
    fvu: Tensor
    norm_mse: Tensor


def row_statistics(hidden_mD: Tensor, scratch_mD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """mean_m and std_m, float32, of rows of any float dtype; std unbiased and without an epsilon.

    scratch_mD: float32, overwritten; may be the rows themselves.
    """
    x_mD = hidden_mD.float()
    mean_m = x_mD.mean(dim=1)
    # Through the norm of what is centred already: torch.var_mean is many times slower on a CPU.
    centred_mD = torch.sub(x_mD, mean_m[:, None], out=scratch_mD)
    return mean_m, torch.linalg.vector_norm(centred_mD, dim=1) / max(1, x_mD.shape[1] - 1) ** 0.5


def piece_rows(width: int, device: torch.device) -> int:
    """Rows to work on at a time."""
    return max(1, (CPU_PIECE_VALUES if device.type == "cpu" else GPU_PIECE_VALUES) // width)


def encoded(hidden_nD: Tensor, std_n: Tensor) -> tuple[Tensor, Encoding]:
    """q_nD, int8, of a layer's float16 rows, all finite, whose standard deviations are std_n; and its meaning."""
    n, width = hidden_nD.shape
    rows = piece_rows(width, hidden_nD.device)
    relative_n = _ratio(std_n.double(), std_n.double().sum() / max(1, n))  # 0 where all rows are constant
    channels, spread = _channels(hidden_nD, (1 / (1 + relative_n.square())).float(), rows)
    q_nD = torch.empty((n, width), dtype=torch.int8, device=hidden_nD.device)
    scale_n, mean_n, read_std_n, error_n = (torch.empty_like(std_n) for _ in range(4))
    for start in range(0, n, rows):
        piece = slice(start, start + rows)
        q_nD[piece], scale_n[piece], read_mD = _encoded_piece(hidden_nD[piece], channels)
        mean_n[piece], read_std_n[piece] = row_statistics(read_mD)
        error_n[piece] = (hidden_nD[piece].float() - read_mD.float()).square_().sum(dim=1)
    fvu = _ratio(error_n.double().sum(), spread)
    norm_mse = _ratio(error_n.double(), std_n.double().square() * (width - 1)).sum() / max(1, n)
    return q_nD, Encoding(scale_n, channels, mean_n, read_std_n, fvu, norm_mse)


def decode(q_mD: Tensor, scale_m: Tensor, channels: Channels, scratch_mD: Tensor, out_mD: Tensor) -> None:
    """Write ĥ into out_mD, float16. scratch_mD: float32."""
    # Not addcmul: where that multiplies and adds in one rounding depends on the machine and a value's place.
    scratch_mD.copy_(q_mD).mul_(scale_m[:, None]).mul_(channels.std_D).add_(channels.mean_D)
    out_mD.copy_(scratch_mD)


def _encoded_piece(hidden_mD: Tensor, channels: Channels) -> tuple[Tensor, Tensor, Tensor]:
    """q_mD, scale_m, and the rows as they are read back."""
    unit_D = torch.where(channels.std_D > 0, channels.std_D, 1)  # std 0: all of them are the mean
    z_mD = (hidden_mD.float() - channels.mean_D).div_(unit_D)
    scale_m = z_mD.abs().amax(dim=1).div_(LARGEST)
    z_mD.div_(torch.where(scale_m > 0, scale_m, 1)[:, None])
    q_mD = z_mD.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    read_mD = torch.empty_like(hidden_mD)
    decode(q_mD, scale_m, channels, z_mD, read_mD)
    beyond_mD = z_mD.abs_() >= INFINITE_FROM  # not read_mD.isinf(), which takes as long as all before
    if beyond_mD.any():
        q_mD -= q_mD.sign() * beyond_mD
        decode(q_mD, scale_m, channels, z_mD, read_mD)
    return q_mD, scale_m, read_mD


def _channels(hidden_nD: Tensor, weight_n: Tensor, rows: int) -> tuple[Channels, Tensor]:
    """And Σ‖h−mean‖², mean the plain one of each channel. Both in two passes: a variance as a difference of squares
    would lose what is small beside its mean."""
    n, width = hidden_nD.shape
    total = weight_n.double().sum()
    plain_D, weighted_D, square_D = (
        torch.zeros(width, dtype=torch.float64, device=hidden_nD.device) for _ in range(3)
    )
    for start in range(0, n, rows):
        x_mD = hidden_nD[start : start + rows].float()
        plain_D += x_mD.sum(dim=0)
        weighted_D += x_mD.mul_(weight_n[start : start + rows, None]).sum(dim=0)
    mean_D = _ratio(weighted_D, total).float()
    spread = torch.zeros((), dtype=torch.float64, device=hidden_nD.device)
    for start in range(0, n, rows):
        x_mD = (hidden_nD[start : start + rows].float() - mean_D).square_()
        spread += x_mD.sum()
        square_D += x_mD.mul_(weight_n[start : start + rows, None]).sum(dim=0)
    spread -= (plain_D / max(1, n) - mean_D).square().sum() * n  # moved from the weighted mean to the plain one
    return Channels(mean_D, _ratio(square_D, total).sqrt().float()), spread


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where the whole is."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)
