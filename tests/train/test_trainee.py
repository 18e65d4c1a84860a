"""One step of an SAE: nowhere does it wait for the device but at its end, on sums over all pairs.

A CPU has nothing to wait for, so the operators that would wait are looked for among those that are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from routesae.train.jobs import Job
from routesae.train.log import StepLog
from routesae.train.saes import SAES, Recipe, build, normalise
from routesae.train.saes.matryoshka import default_prefixes
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import RunSettings
from routesae.train.sparse.policy import chosen
from routesae.train.trainee import Pace, Trainee

LAYERS, WIDTH, LATENTS, K, TOKENS = 3, 16, 64, 4, 48
# What a host must see: item(), bool(), int(), and how many elements there are where a mask is true.
WAITING = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "bincount", "kthvalue"}
WAITING |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"sae": name} for name in SAES},
    "jumprelu pre-act": {"sae": "jumprelu", "pre_act_loss": 0.01},
    "jumprelu published": {"sae": "jumprelu", "published": True, "sparsity": 0.1},
    "top2": {"sae": "routesae", "router": "top2", "balance": 0.1},
    "soft": {"sae": "routesae", "routing": "soft", "normalize": "dataset"},
    "random router": {"sae": "routesae", "router": "random"},
    "routed batchtopk": {"sae": "routesae", "routed": "batchtopk", "balance": 0.1},
    "mlsae published": {"sae": "mlsae", "published": True},
}


class Waits(TorchDispatchMode):
    """The operators called that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        ats = [at for at in args[1] if at is not None] if name in ("index", "index_put_") else []
        result = func(*args, **(kwargs or {}))
        sides = {one.device.type for one in (*args, *ats, result) if isinstance(one, torch.Tensor)}
        moves = len(sides) > 1 and name in ("_to_copy", "copy_", "index", "index_put_")
        if name in WAITING or moves or any(at.dtype == torch.bool for at in ats):
            self.found.append(name)
        return result


class Lists(TorchFunctionMode):
    """Tensors made of lists, which are copied to the device, also as an index."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        index = args[1] if name == "__getitem__" else None
        if name in ("tensor", "as_tensor") or any(
            isinstance(at, list) for at in (index, *(index if isinstance(index, tuple) else ()))
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def trainee_of(case: dict[str, Any], device: str, folder: Path, sparse_below: float) -> Iterator[tuple[Trainee, Any]]:
    """With a function that gives a batch."""
    layers = (1,) if SAES[case["sae"]].one_layer else tuple(range(1, LAYERS + 1))
    prefixes = default_prefixes(LATENTS) if case["sae"] == "matryoshka" else ()
    made = {"layers": layers, "width": WIDTH, "latents": LATENTS, "k": K, "prefixes": prefixes}
    how = chosen("cpu" if device == "cpu" else "cuda", bfloat16_units=False).replace(sparse_below=sparse_below)
    pace = Pace(total_steps=9, epoch_steps=9, dead_after_tokens=10**9, sparsity_warmup=0.1, arithmetic=how, seed=0)
    sae = build(Recipe(**{**made, **case}), torch.Generator().manual_seed(0)).to(device).train()
    with closing(StepLog(sae, folder, [], 1e-3)) as log:
        trainee = Trainee(sae, Job(RunSettings(sae="topk", lr=1e-3), sae.recipe, folder, {}), pace, log)
        trainee.dead_d = torch.arange(50, device=device)  # more than D/2

        def batch() -> Hidden:
            hidden_LND = torch.randn(LAYERS, TOKENS, WIDTH, device=device).half()
            mean_LN1, std_LN1 = torch.zeros(2, LAYERS, TOKENS, 1, device=device).add(1)
            return Hidden(hidden_LND, mean_LN1, std_LN1, layers=tuple(range(1, LAYERS + 1)))

        yield trainee, batch


def waits_of_a_step(case: dict[str, Any], device: str, folder: Path, sparse_below: float = -1.0) -> list[str]:
    """Of its second one: the first may move constants to the device."""
    with trainee_of(case, device, folder, sparse_below) as (trainee, batch):
        trainee.step(1, batch(), TOKENS)
        hidden = batch()
        with Waits() as waits, Lists(waits.found):
            trainee.step(2, hidden, TOKENS)
    return waits.found


@pytest.mark.parametrize("name", CASES)
def test_a_step_over_all_pairs_calls_no_operator_that_waits(name: str, tmp_path: Path) -> None:
    expected = ["_local_scalar_dense"] * (name == "random")  # which layer the whole batch reads is drawn on the host
    assert waits_of_a_step(CASES[name], "cpu", tmp_path) == expected


@pytest.mark.parametrize("name", CASES)
def test_what_a_step_does_where_it_is_not_on_a_cpu_needs_no_number_of_the_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on tensors without numbers, in which item() and nonzero() raise."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    normalise._on_device.cache_clear()
    assert waits_of_a_step(CASES[name], "meta", tmp_path) == ["_local_scalar_dense"] * (name == "random")


@pytest.mark.parametrize("name", ["topk", "routesae", "mlsae"])
def test_a_topk_over_active_pairs_waits_nowhere_either(name: str, tmp_path: Path) -> None:
    assert waits_of_a_step(CASES[name], "cpu", tmp_path, 1.1) == []


def test_what_waits_is_seen(tmp_path: Path) -> None:
    """batchtopk over active pairs, whose number is not known before, and what the recorder is to find."""
    assert "nonzero" in waits_of_a_step(CASES["batchtopk"], "cpu", tmp_path, 1.1)
    a = torch.arange(4)
    with Waits() as waits, Lists(waits.found):
        _ = bool((a > 1).any()), a[a > 1], torch.bincount(a), a.repeat_interleave(a), a[[0, 1]], torch.tensor([1])
    assert waits.found == [
        "_local_scalar_dense",
        "index",
        "bincount",
        "repeat_interleave",
        "__getitem__",
        "tensor",
    ]


def test_the_end_of_a_step_waits_once_and_only_where_a_latent_can_be_dead(tmp_path: Path) -> None:
    with trainee_of(CASES["topk"], "cpu", tmp_path, -1.0) as (trainee, batch):
        trainee.pace = trainee.pace.__class__(**{**vars(trainee.pace), "dead_after_tokens": 2 * TOKENS})
        found = []
        for step in (1, 2, 3):
            hidden = batch()
            with Waits() as waits:
                trainee.step(step, hidden, TOKENS)
            found.append(waits.found)
    assert found == [[], ["nonzero"], ["nonzero"]]
    assert trainee.dead_d.tolist() == torch.nonzero(trainee.idle_tokens_F >= 2 * TOKENS).flatten().tolist()
