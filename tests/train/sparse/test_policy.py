"""Which arithmetic pays on which device, and that a run keeps to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from routesae.machine.device import has_bfloat16_units
from routesae.reporting import WrongInput
from routesae.train.sparse.policy import Arithmetic, arithmetic, chosen, exactly


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
    assert arithmetic("cpu").proposal == ("bfloat16" if native else "float32")
    assert arithmetic("cuda").proposal == "float32"  # autocast decides there
    arithmetic.cache_clear()


def test_a_torch_that_cannot_tell_what_the_cpu_does_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_bfloat16_units() is False


@pytest.mark.parametrize(
    ("capability", "asked", "precision"),
    [
        ((7, 5), "auto", "float32"),  # a T4 emulates bfloat16
        ((8, 0), "auto", "bfloat16"),
        ((9, 0), "float32", "float32"),
        ((7, 5), "bfloat16", "bfloat16"),  # asked for by name
    ],
)
def test_a_gpu_multiplies_bfloat16_where_it_has_units_for_it_and_else_what_was_asked_for(
    capability: tuple[int, int], asked: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    units = has_bfloat16_units("cuda")
    assert chosen("cuda", bfloat16_units=units, precision=asked).precision == precision
    assert chosen("cpu", bfloat16_units=True, precision="auto").precision == "float32"


def test_cuda_sums_over_active_pairs_only_where_its_bandwidth_makes_that_faster() -> None:
    bytes_a_second, bytes_a_number = 3.35e12, 4  # an H100's; rows are float32
    for precision, units, products in (
        ("bfloat16", True, 989e12),
        ("float32", True, 495e12),
        ("float32", False, 67e12),
    ):
        crossing = 2 * bytes_a_second / (bytes_a_number * products)
        how = chosen("cuda", bfloat16_units=units, precision=precision)
        assert how.sparse_below == pytest.approx(crossing, rel=0.01)
        assert how.dense(64, round(64 / crossing * 0.98))
        assert not how.dense(64, round(64 / crossing * 1.02))
        assert not how.replace(max_memory=10**9).dense(64, 64)
    assert arithmetic("cpu").sparse_below == pytest.approx(1 / 12)


def test_rows_at_once_are_those_that_memory_holds_or_a_cpus_caches_or_all() -> None:
    cpu, cuda = (chosen(kind, bfloat16_units=True) for kind in ("cpu", "cuda"))
    assert cpu.rows_at_once(10_000, 64, torch.float32) == 512
    assert cpu.rows_at_once(10_000, 64, torch.bfloat16) == 2048
    assert cpu.rows_at_once(100, 64, torch.bfloat16) == 100
    assert cuda.rows_at_once(10_000, 64, torch.float32) == 10_000
    assert cuda.replace(max_memory=4 * 64 * 7 + 5).rows_at_once(10_000, 64, torch.float32) == 7


def test_threads_and_tf32_are_what_the_policy_says_only_while_it_is_applied() -> None:
    def now() -> tuple[int, str]:
        return torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision

    before = now()
    for kind, products in (("cuda", "tf32"), ("cpu", "ieee")):
        with chosen(kind, bfloat16_units=True, threads=3).applied():
            assert now() == (3, products)
            with exactly("cpu"):
                assert now() == (3, "ieee")
            assert now() == (3, products)
        assert now() == before
    with pytest.raises(KeyError), chosen("cpu", bfloat16_units=True, threads=2).applied():
        raise KeyError
    assert now() == before


def test_tf32_is_set_as_a_torch_before_2_9_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    products = SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    with chosen("cuda", bfloat16_units=True).applied():
        assert products.allow_tf32
        with exactly("cpu"):
            assert not products.allow_tf32
    assert vars(products) == {"allow_tf32": False}


def test_a_notebook_that_set_tf32_in_either_way_is_left_as_it_was() -> None:
    """torch raises where it is asked in the one way for what was set in the other."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with exactly("cpu"):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
        torch.set_float32_matmul_precision("high")
        with exactly("cpu"):
            assert products.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        products.fp32_precision = before


def test_exactly_is_float32_under_autocast_too() -> None:
    """As 1 + 2^-9 is no bfloat16."""
    a = torch.tensor([[1 + 2**-9]])
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exactly("cpu"):
            assert (a @ a).item() == (1 + 2**-9) ** 2


def test_what_was_chosen_is_kept_whole_and_said_in_a_line() -> None:
    every: list[dict[str, Any]] = [
        {"kind": "cuda", "bfloat16_units": True, "precision": "auto", "threads": 4, "max_memory": 10**6},
        {"kind": "cpu", "bfloat16_units": True, "threads": 1},
    ]
    for facts in every:
        how = chosen(facts.pop("kind"), **facts)
        assert Arithmetic(**how.to_dict()) == how
    assert str(how) == ("float32, proposals bfloat16, sums over active pairs below 1/12 of all, 1 thread")
    with pytest.raises(WrongInput, match="kind 'tpu' is not"):
        Arithmetic(**{**how.to_dict(), "kind": "tpu"})
