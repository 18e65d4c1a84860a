"""Which arithmetic pays on which device."""

from __future__ import annotations

import pytest
import torch

from routesae.machine.device import has_bfloat16_units
from routesae.train.sparse.policy import Arithmetic, arithmetic


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"avx512_bf16": True}, True),  # Zen 4 and 5; Sapphire Rapids in a guest without AMX
        ({"bf16": True, "neon": True}, True),  # Arm
        ({"amx_bf16": False, "avx512_f": True, "avx2": True}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_cpu_proposes_in_bfloat16_where_it_multiplies_it_natively(
    capabilities: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    arithmetic.cache_clear()
    assert has_bfloat16_units() is native
    assert arithmetic("cpu").proposal == (torch.bfloat16 if native else torch.float32)
    assert arithmetic("cuda").proposal == torch.float32  # autocast decides there
    arithmetic.cache_clear()


def test_a_torch_that_cannot_tell_what_the_cpu_does_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_bfloat16_units() is False


def test_cuda_sums_over_active_pairs_only_where_its_bandwidth_makes_that_faster() -> None:
    products, bytes_a_second, bytes_a_number = 989e12, 3.35e12, 4  # an H100's, of bfloat16; rows are float32
    crossing = 2 * bytes_a_second / (bytes_a_number * products)
    assert arithmetic("cuda").sparse_below == pytest.approx(crossing, rel=0.01)
    assert arithmetic("cpu").sparse_below == pytest.approx(1 / 12)


def test_rows_at_once_are_those_asked_for_or_what_a_cpus_caches_hold_or_all() -> None:
    chosen = Arithmetic(torch.float32, 1 / 12)
    assert chosen.rows_at_once(10_000, "cpu", torch.float32) == 512
    assert chosen.rows_at_once(10_000, "cpu", torch.bfloat16) == 2048
    assert chosen.rows_at_once(100, "cpu", torch.bfloat16) == 100
    assert chosen.rows_at_once(10_000, "cuda", torch.float32) == 10_000
    assert chosen._replace(chunk_rows=7).rows_at_once(10_000, "cuda", torch.float32) == 7
