"""An int8 cache gives back what it says: within half a step, by the formula in its files, at the cost it records."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from routesae.harvest.cache import quantise
from routesae.harvest.cache.quantise import LARGEST, Encoding, decode, encoded, piece_rows, row_statistics

Doubles = npt.NDArray[np.float64]
HALF_MAX = float(np.finfo(np.float16).max)
D = 24


def plain(rows: int, seed: int = 0, scale: float = 5.0) -> Tensor:
    """Rows whose channels have means and deviations of their own."""
    generator = torch.Generator().manual_seed(seed)
    spread_D, mean_D = torch.rand(D, generator=generator) + 0.2, torch.randn(D, generator=generator) * 3
    return (torch.randn(rows, D, generator=generator) * spread_D * scale + mean_D).half()


def with_sinks(rows: int = 400) -> Tensor:
    """One row in 200 is 27,600 in one channel and 2,000 in another, as SmolLM2's are."""
    hidden_nD = plain(rows)
    hidden_nD[::200, 7], hidden_nD[::200, 11] = 27_600, -2_000
    return hidden_nD


def constant_channels(rows: int = 50) -> Tensor:
    hidden_nD = plain(rows)
    hidden_nD[:, 3], hidden_nD[:, 4] = 1000, 0
    return hidden_nD


def constant_rows(rows: int = 50) -> Tensor:
    hidden_nD = plain(rows)
    hidden_nD[::3], hidden_nD[1] = 0, 7
    return hidden_nD


HIDDEN = {
    "plain": plain(300),
    "sinks": with_sinks(),
    "constant channels": constant_channels(),
    "constant rows": constant_rows(),
    "one row": plain(1),
    "all rows the same": plain(1).expand(40, D).contiguous(),
    "all rows constant": torch.arange(9.0).half()[:, None].expand(9, D).contiguous(),
    "zeros": torch.zeros(5, D, dtype=torch.float16),
    "the smallest numbers": torch.randn(60, D, generator=torch.Generator().manual_seed(4)).mul(1e-7).half(),
    "the largest numbers": (torch.rand(60, D, generator=torch.Generator().manual_seed(3)) * 2 - 1).mul(65_504).half(),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "CPU_PIECE_VALUES", 7 * D)


def encode(hidden_nD: Tensor) -> tuple[Tensor, Encoding, Tensor]:
    """And the rows that are read back."""
    q_nD, encoding = encoded(hidden_nD, row_statistics(hidden_nD)[1])
    read_nD = torch.empty_like(hidden_nD)
    decode(q_nD, encoding.scale_n, encoding.channels, torch.empty(q_nD.shape), read_nD)
    return q_nD, encoding, read_nD


def naive_channels(h_nD: Doubles) -> tuple[Doubles, Doubles]:
    """The docstring's equations, a loop over nothing but rows."""
    std_n = h_nD.std(axis=1, ddof=1)
    weights = [1 / (1 + (std / std_n.mean() if std_n.mean() else 0) ** 2) for std in std_n]
    mean_D = sum(w * row for w, row in zip(weights, h_nD, strict=True)) / sum(weights)
    square_D = sum(w * (row - mean_D) ** 2 for w, row in zip(weights, h_nD, strict=True)) / sum(weights)
    return np.asarray(mean_D), np.sqrt(square_D)


@pytest.mark.parametrize("name", HIDDEN)
def test_every_value_comes_back_within_half_a_step_and_float16s_rounding(name: str) -> None:
    hidden_nD = HIDDEN[name]
    q_nD, found, read = encode(hidden_nD)
    h_nD, read_nD = hidden_nD.double().numpy(), read.double().numpy()
    step_nD = found.channels.std_D.double().numpy() * found.scale_n.double().numpy()[:, None]
    assert q_nD.dtype == torch.int8
    assert int(q_nD.abs().max()) <= LARGEST
    steps = np.where(np.abs(h_nD) + step_nD / 2 < HALF_MAX, 0.5, 1.0)  # beyond float16 it is one nearer to 0
    rounding_nD = np.maximum(np.abs(read_nD) * 2.0**-11, 2.0**-25)  # of float16, at most
    float32_nD = 1e-6 * (np.abs(h_nD) + np.abs(found.channels.mean_D.double().numpy()) + step_nD * LARGEST)
    assert np.isfinite(read_nD).all()
    assert (np.abs(read_nD - h_nD) <= steps * step_nD + rounding_nD + float32_nD).all()


@pytest.mark.parametrize("name", HIDDEN)
def test_the_numbers_are_those_of_the_equations(name: str) -> None:
    hidden_nD = HIDDEN[name]
    found_q_nD, found, found_read_nD = encode(hidden_nD)
    mean_D, std_D = (each.numpy() for each in found.channels)
    naive_mean_D, naive_std_D = naive_channels(hidden_nD.double().numpy())
    assert np.allclose(mean_D, naive_mean_D, rtol=1e-5, atol=1e-5 * naive_std_D.max())
    assert np.allclose(std_D, naive_std_D, rtol=1e-5, atol=1e-5 * np.abs(naive_mean_D).max())
    # With those channels the rest is exact: numpy rounds each float32 operation as torch does.
    z_nD = (hidden_nD.float().numpy() - mean_D) / np.where(std_D > 0, std_D, np.float32(1))
    scale_n = np.abs(z_nD).max(axis=1) / np.float32(LARGEST)
    q_nD = np.round(z_nD / np.where(scale_n > 0, scale_n, np.float32(1))[:, None])
    assert np.array_equal(found.scale_n.numpy(), scale_n)
    with np.errstate(over="ignore"):
        beyond_nD = np.isinf((q_nD * scale_n[:, None] * std_D + mean_D).astype(np.float16))
    q_nD -= np.sign(q_nD) * beyond_nD
    assert np.array_equal(found_q_nD.numpy(), q_nD)
    read_nD = (q_nD * scale_n[:, None] * std_D + mean_D).astype(np.float16)
    assert np.array_equal(found_read_nD.numpy(), read_nD)


def test_a_value_that_rounding_up_would_put_beyond_float16_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel 1 varies much and row 0 is far out in channel 0, so that one of its steps in channel 1 is 80,000."""
    monkeypatch.setattr(quantise, "CPU_PIECE_VALUES", 1 << 15)
    hidden_nD = torch.zeros(50_000, D, dtype=torch.float16)
    hidden_nD[::2, 1], hidden_nD[1::2, 1] = 30_000, -30_000
    hidden_nD[:, 0] = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).half()
    hidden_nD[0, 0], hidden_nD[0, 1] = 2000, 60_000
    _, found, read_nD = encode(hidden_nD)
    step = float(found.scale_n[0] * found.channels.std_D[1])
    assert step / 2 < 60_000
    assert round(60_000 / step) * step > 65_520
    assert read_nD.isfinite().all()


def test_a_few_huge_rows_do_not_coarsen_the_others() -> None:
    """By plain statistics channel 7 would have a step of hundreds, and the rest of the rows be lost in it."""
    hidden_nD = with_sinks()
    others = torch.ones(len(hidden_nD), dtype=torch.bool)
    others[::200] = False
    alone, beside = (
        (encode(rows_nD)[2].double() - rows_nD.double()).square().sum(dim=1)
        for rows_nD in (hidden_nD[others], hidden_nD)
    )
    assert float(beside[others].mean()) < 1.5 * float(alone.mean())


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_recorded_as_lost_is_what_was_lost(name: str) -> None:
    h_nD = HIDDEN[name].double().numpy()
    _, found, read_nD = encode(HIDDEN[name])
    error_n = ((read_nD.double().numpy() - h_nD) ** 2).sum(axis=1)
    spread = ((h_nD - h_nD.mean(axis=0)) ** 2).sum()
    assert float(found.fvu) == pytest.approx(error_n.sum() / spread if spread > 1e-9 else 0, rel=1e-4, abs=1e-12)
    own_n = ((h_nD - h_nD.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    shares = [error / own if own else 0 for error, own in zip(error_n, own_n, strict=True)]
    assert float(found.norm_mse) == pytest.approx(np.mean(shares), rel=1e-4, abs=1e-12)


def test_the_statistics_are_of_the_rows_that_are_read_back() -> None:
    _, found, read_nD = encode(HIDDEN["sinks"])
    mean_n, std_n = row_statistics(read_nD)
    assert torch.equal(found.mean_n, mean_n)
    assert torch.equal(found.std_n, std_n)


def test_no_rows_are_no_trouble() -> None:
    q_nD, found, _ = encode(torch.empty(0, D, dtype=torch.float16))
    assert q_nD.shape == (0, D)
    assert found.scale_n.shape == (0,)
    assert all(torch.equal(each, torch.zeros(D)) for each in found.channels)
    assert (float(found.fvu), float(found.norm_mse)) == (0, 0)


def test_pieces_are_too_small_for_torch_to_start_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for width in (1, 576, 2048, 1 << 20):
        rows = piece_rows(width, torch.device("cpu"))
        assert rows == 1 or rows * width < 1 << 15
