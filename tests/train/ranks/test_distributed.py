"""Two processes that train together, with gloo on this machine: what one process alone gives, to rounding."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import cycle, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from routesae.harvest.cache.reader import Cache
from routesae.reporting import Progress, WrongInput
from routesae.tests.processes import Command
from routesae.train import run
from routesae.train.loading.batches import Block, Selection, epoch_plans, largest_share, share_of, tokens_of
from routesae.train.log import read_metrics
from routesae.train.ranks import distributed
from routesae.train.ranks.distributed import ALONE, SMALL_NUMBERS, Ranks, batch_kth_largest, batch_mean, batch_rows
from routesae.train.run import planned, step_tokens, train
from routesae.train.settings import TrainSettings, settings_of

STEPS = 200
RUNS: dict[str, dict[str, Any]] = {
    "topk": {"sae": "topk"},
    "batchtopk": {"sae": "batchtopk"},
    "matryoshka": {"sae": "matryoshka"},
    "jumprelu": {"sae": "jumprelu", "pre_act_loss": 1e-3},
    "gated": {"sae": "gated"},
    "vanilla": {"sae": "vanilla"},
    "crosscoder": {"sae": "crosscoder"},
    "mlsae": {"sae": "mlsae"},
    "random": {"sae": "random"},
    "routesae": {"sae": "routesae"},
    "top2": {"sae": "routesae", "router": "top2", "balance": 0.1, "routed": "jumprelu"},
    "soft": {"sae": "routesae", "routing": "soft", "routed": "batchtopk"},
    "dataset": {"sae": "topk", "normalize": "dataset"},
    "published": {"sae": "crosscoder", "recipe": "published", "sparsity": 0.01},
}
SHARED: dict[str, Any] = {
    "latents": 127,  # not to be divided by two
    "k": 3,
    "lr": 2e-3,
    "log_every_steps": 1,
    "dead_after_tokens": 200,
    "sparsity_warmup": 0.5,
    "device": "cpu",
}


def batch_that_leaves_one(cache: Cache) -> int:
    """Tokens a batch so that an epoch ends with a batch of a single token, fewer than there are ranks."""
    tokens = len(Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers))
    return next(batch for batch in range(120, tokens) if tokens % batch == 1)


def config(folder: Path, cache: Cache, names: Sequence[str], steps: int = STEPS, **changes: Any) -> Path:
    batch = batch_that_leaves_one(cache)
    given = {**SHARED, "batch_tokens": batch, "tokens": steps * batch, "cache": str(cache.path), **changes}
    if not {"jumprelu", "top2"} & set(names):  # the others have no penalty whose weight rises
        del given["sparsity_warmup"]
    runs = "".join(f"\n[[run]]\nname = {json.dumps(name)}\n{toml(RUNS[name])}" for name in names)
    path = folder / f"{folder.name}-{len(names)}.toml"
    path.write_text(toml(given) + runs)
    return path


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(world: int, folder: Path, *arguments: str | list[str]) -> list[Command]:
    """`routesae train` as torchrun starts it, without torchrun, which would end the others with the first.

    Lists among the arguments are for one rank each.
    """
    own = [argument for argument in arguments if isinstance(argument, list)] or [[]] * world
    shared_arguments = [argument for argument in arguments if isinstance(argument, str)]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Command(
            *("train", *own[rank], *shared_arguments),
            cwd=folder,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def ended(ranks: list[Command]) -> list[tuple[int, str, str]]:
    """Of each: exit code, standard output, and what it said that a person reads."""
    found = []
    for rank in ranks:
        output, errors = rank.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        said = [line for line in errors.splitlines() if line.startswith("routesae: ")]
        found.append((rank.returncode, output, "\n".join(said)))
    return found


def newest(out: Path) -> int:
    return max((int(path.stem[5:]) for path in out.glob(".*.partial/step-*")), default=0)


def wait_for(step: int, out: Path, ranks: list[Command]) -> None:
    deadline = time.monotonic() + 90
    while newest(out) < step:
        assert all(rank.poll() is None for rank in ranks), ended(ranks)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_curve(folder: Path, other: Path) -> bool:
    """Loss, NormMSE, L0, dead share and routing to 1e-5 at every step; returns whether that is so of all steps.

    Where two latents of a token are alike to rounding, or one stands at its threshold, what rounding decides changes
    that token's reconstruction, and the runs part: seen once in some 100,000 rows. That is let pass after ten steps.
    """
    parted = False
    for one, two in zip(lines(folder), lines(other), strict=True):
        assert one.keys() == two.keys()
        for name in ("step", "tokens", "lr"):
            assert one[name] == two[name]
        compared = one.keys() & {"loss", "norm_mse", "l0", "dead", "routing_entropy", "layer_shares"}
        alike = all(one[name] == pytest.approx(two[name], rel=1e-5) for name in compared)
        assert alike or one["step"] > 10, (folder.name, one, two)
        parted = parted or not alike
        assert one["norm_mse"] == pytest.approx(two["norm_mse"], rel=0.05), (folder.name, one["step"])
    return not parted


def train_alone(path: Path, out: Path, **changes: Any) -> None:
    train(settings_of({"out": str(out), **changes}, str(path)))


# ------------------------------------------------------------------------------------------------- the same curves


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["batchtopk", "random"], 70),  # of topk and top2, those stopped and resumed below
        pytest.param(list(RUNS), 200, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_two_processes_started_by_torchrun_give_the_curves_of_one(
    tiny_cache: Cache, tmp_path: Path, names: list[str], steps: int
) -> None:
    """Over more than an epoch, dead latents, steered penalties and batches of a single token among the steps."""
    path = config(tmp_path, tiny_cache, names, steps)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "routesae", "train", "--config", str(path), "--out", str(tmp_path / "two")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("held-out NormMSE") == len(names)  # said once, by rank 0
    train_alone(path, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").glob("[!.]*/")) == sorted(names)
    curve = lines(tmp_path / "one" / names[0])
    assert any(two["tokens"] - one["tokens"] == 1 for one, two in pairwise(curve))
    assert curve[-1]["step"] >= steps
    alike = [assert_same_curve(tmp_path / "two" / name, tmp_path / "one" / name) for name in names]
    assert sum(alike) >= len(names) / 2
    assert any(line["dead"] > 0 for line in curve)  # AuxK had something to do


# ------------------------------------------------------------------------------------------------ ending together


@pytest.mark.parametrize("then", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_sigterm_to_one_process_stops_both_at_the_same_step_and_another_number_goes_on(
    tiny_cache: Cache, tmp_path: Path, then: int
) -> None:
    path, out = config(tmp_path, tiny_cache, ["topk", "top2"], 50, checkpoint_every_steps=20), tmp_path / "out"
    arguments = ("--config", str(path), "--out", str(out))
    ranks = start(2, tmp_path, *arguments)
    wait_for(20, out, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    (code, _, said), (other_code, other_output, other_said) = ended(ranks)
    assert (code, other_code, other_output, other_said) == (0, 0, "", "")
    stopped = newest(out)
    assert f"stopped after step {stopped} of " in said
    assert 20 <= stopped < 50
    if then == 1:
        train_alone(path, out, resume=True)
    else:
        assert [code for code, _, _ in ended(start(then, tmp_path, *arguments, "--resume"))] == [0] * then
    train_alone(path, tmp_path / "one")
    for name in ("topk", "top2"):
        assert_same_curve(out / name, tmp_path / "one" / name)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_line_and_one_alone_goes_on(tiny_cache: Cache, tmp_path: Path) -> None:
    path, out = config(tmp_path, tiny_cache, ["batchtopk"], checkpoint_every_steps=20), tmp_path / "out"
    ranks = start(2, tmp_path, "--config", str(path), "--out", str(out))
    wait_for(20, out, ranks)
    ranks[1].kill()
    (code, output, said), _ = ended(ranks)
    assert (code, output) == (1, "")
    assert said.startswith("routesae: another process of this run is gone")
    assert len(said.splitlines()) == 1
    train_alone(path, out, resume=True)
    train_alone(path, tmp_path / "one")
    assert_same_curve(out / "batchtopk", tmp_path / "one" / "batchtopk")


@pytest.mark.slow
@pytest.mark.parametrize("seen_by", ["rank 0", "both"])
def test_what_is_wrong_is_said_once_and_ends_both(tiny_cache: Cache, tmp_path: Path, seen_by: str) -> None:
    (tmp_path / "out" / "topk").mkdir(parents=True)
    path, absent = config(tmp_path, tiny_cache, ["topk"]), str(tmp_path / "absent")
    cache = str(tiny_cache.path) if seen_by == "rank 0" else absent
    ranks = start(2, tmp_path, "--config", str(path), "--out", str(tmp_path / "out"), "--cache", cache)
    (code, _, said), (other_code, _, other_said) = ended(ranks)
    assert (code, other_code) == (2, 2)
    assert ("exists and is not an SAE" if seen_by == "rank 0" else absent) in said
    assert other_said == ""


@pytest.mark.slow
def test_a_process_that_cannot_read_its_rows_ends_both_after_a_checkpoint_of_the_last_whole_step(
    tiny_cache: Cache, tmp_path: Path
) -> None:
    path, out = config(tmp_path, tiny_cache, ["topk"], checkpoint_every_steps=20), tmp_path / "out"
    copy = shutil.copytree(tiny_cache.path, tmp_path / "of-rank-1")
    caches = [["--cache", str(tiny_cache.path)], ["--cache", str(copy)]]
    ranks = start(2, tmp_path, *caches, "--config", str(path), "--out", str(out))
    wait_for(20, out, ranks)
    for file in copy.glob("shard-*/layer_*/c/0/0"):
        os.truncate(file, 4096)
    (code, _, said), (other_code, _, other_said) = ended(ranks)
    assert (code, other_code, said) == (1, 1, "")
    assert "of-rank-1/shard-0" in other_said
    stopped = newest(out)
    assert stopped == len(lines(out / ".topk.partial"))  # of the last step that both took
    train_alone(path, out, resume=True)
    train_alone(path, tmp_path / "one")
    assert_same_curve(out / "topk", tmp_path / "one" / "topk")


# ------------------------------------------------------------------------------------------------------- divided


@pytest.mark.parametrize("then", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_divided_between_two_processes_give_the_curves_and_a_checkpoint_of_one(
    tiny_cache: Cache, tmp_path: Path, then: int
) -> None:
    """then: how many go on; two divide what the checkpoint holds anew."""
    names = ["topk", "top2", "published"]
    path, out = config(tmp_path, tiny_cache, names, 50, checkpoint_every_steps=20), tmp_path / "out"
    arguments = ("--config", str(path), "--out", str(out), "--shard")
    ranks = start(2, tmp_path, *arguments)
    wait_for(20, out, ranks)
    ranks[0].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ended(ranks)] == [0, 0]
    whole = load_file(next((out / ".topk.partial").glob("step-*")))
    assert whole["sae.W_dec_FD"].shape == whole["adam.1.exp_avg"].shape == (127, 32)
    if then == 1:
        train_alone(path, out, resume=True)
    else:
        assert [code for code, _, _ in ended(start(then, tmp_path, *arguments, "--resume"))] == [0] * then
    train_alone(path, tmp_path / "one")
    for name in names:
        assert_same_curve(out / name, tmp_path / "one" / name)


@pytest.mark.parametrize("how", ["shard", "cpu_offload"])
def test_an_sae_divided_among_one_is_trained_stopped_and_saved_as_the_same_bytes(
    tiny_cache: Cache, tmp_path: Path, how: str
) -> None:
    names = ["topk", "top2", "gated"]
    path = config(tmp_path, tiny_cache, names, tokens=3000, checkpoint_every_steps=10)

    def interrupt(progress: Progress) -> None:
        if progress.done == 12:
            raise KeyboardInterrupt

    train_alone(path, tmp_path / "plain")
    divided = settings_of({"out": str(tmp_path / "divided"), how: True, "resume": True}, str(path))
    with pytest.raises(KeyboardInterrupt):
        train(divided, interrupt)
    assert newest(tmp_path / "divided") == 10
    train(divided)
    for name in names:
        for file in (tmp_path / "plain" / name).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "divided" / name / file.name).read_bytes()
    assert not dist.is_initialized()


# ------------------------------------------------------------------------------------------------- the parts of it


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_ranks_shares_of_a_batch_are_all_of_it_once_and_alike_in_size(tiny_cache: Cache, world: int) -> None:
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (4,))
    for plan in epoch_plans(selection, seed=1, epoch=0, batch_tokens=700):
        shares = [share_of(plan, rank, world) for rank in range(world)]
        sizes = [tokens_of(share) for share in shares]
        assert rows_of([block for share in shares for block in share]) == rows_of(plan)
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= largest_share(700, world)
    few = [Block(0, 5, 5 + world - 1)] if world > 1 else []
    assert [share_of(few, rank, world) for rank in range(world)] == [few] * world
    assert tokens_of(few) <= largest_share(world, world)


def rows_of(plan: list[Block]) -> list[tuple[int, int]]:
    return [(block.shard, row) for block in plan for row in range(block.first, block.after)]


@pytest.mark.parametrize("window", [None, 2])
def test_the_tokens_of_a_step_are_those_of_its_batch(tiny_cache: Cache, window: int | None) -> None:
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (4,))
    settings = TrainSettings(runs=settings_of({}).runs, batch_tokens=900, tokens=20_000, window=window)
    total, plans = planned(selection, settings)
    found = list(islice(cycle(step_tokens(selection, settings)), total))
    assert found == [tokens_of(plan) for plan in plans]
    assert len(set(found)) >= 2


@pytest.mark.parametrize("k", [1, 7, 500, 1000])
def test_the_kth_largest_of_all_ranks_values_is_read_from_counts_of_their_digits(
    monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """As a rank whose peer holds a copy of its values: each is there twice."""
    monkeypatch.setattr(distributed, "_reduce", lambda counts: counts * 2)
    values_M = torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 40  # down to denormal numbers
    values_M[:40] = values_M[40:80]
    with Ranks(0, 2).one_batch(1, 2):
        found = batch_kth_largest(values_M, k)
    assert found == values_M.repeat(2).sort(descending=True).values[k - 1]
    assert batch_kth_largest(values_M, min(k, 500)) == values_M.sort(descending=True).values[min(k, 500) - 1]


def test_a_mean_of_the_batch_weighs_each_ranks_rows_and_keeps_its_part_of_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This rank has 3 of 7 tokens, two rows each; the other one's rows add 10 to the sum."""
    monkeypatch.setattr(distributed, "_reduce", lambda part: part + 10 / 14)
    values = torch.arange(6.0, requires_grad=True)
    with Ranks(0, 2).one_batch(3, 7):
        mean = batch_mean(values.mean())
        assert batch_rows(6) == 14
    (mean**2).backward()
    assert float(mean.detach()) == pytest.approx(25 / 14)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([2 * 25 / 14 / 14] * 6)
    assert batch_rows(6) == 6
    assert batch_mean(values[0]) is not None
    assert ALONE.largest(3) == 3


def test_every_gradient_is_summed_however_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank whose peer holds a copy of its gradients: each is doubled once, some when their sum is waited for."""

    class UnderWay(NamedTuple):
        tensor: torch.Tensor

        def wait(self) -> None:
            self.tensor.mul_(2)

    def all_reduce(tensor: torch.Tensor, async_op: bool = False) -> UnderWay | None:
        found = UnderWay(tensor)
        return found if async_op else found.wait()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    shapes = [(5,), (SMALL_NUMBERS - 1,), (2, 3), (SMALL_NUMBERS // 4, 4), (), (SMALL_NUMBERS + 1, 2)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    before = [torch.randn(shape) for shape in shapes]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad.clone()
    Ranks(0, 2).sum_gradients([*parameters, torch.nn.Parameter(torch.zeros(3))])  # the last one has none
    for parameter, grad in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * grad)


def test_a_batch_of_fewer_tokens_than_processes_is_refused(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "joined_ranks", lambda *_, **__: nullcontext(Ranks(0, 8)))
    monkeypatch.setattr(Ranks, "largest", lambda _, number: number)
    path = config(tmp_path, tiny_cache, ["topk"], batch_tokens=7)
    with pytest.raises(WrongInput, match="--batch-tokens 7 is below the 8 processes"):
        train_alone(path, tmp_path / "out")


def test_a_gpu_for_every_process_or_a_word_on_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks(5, 8).device("auto") == torch.device("cuda:1")
    assert Ranks(5, 8).device("cpu") == torch.device("cpu")
    assert ALONE.device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(WrongInput, match="--device cuda:1 is one GPU for 8 processes"):
        Ranks(5, 8).device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(WrongInput, match=r"last CUDA device is cuda:1; start fewer processes"):
        Ranks(5, 8).device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")  # it too, or it would wait for the others on its GPU
    with pytest.raises(WrongInput, match=r"--device cuda:2 is not here: the last CUDA device is cuda:1"):
        Ranks(0, 8).device("auto")


@pytest.mark.parametrize(("visible", "gpus", "index"), [(None, 4, 3), ("5", 1, 0)])
def test_a_process_takes_its_gpu_first_and_waits_minutes_for_others_there_and_a_day_on_the_cpu(
    visible: str | None, gpus: int, index: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, Any]] = []

    class Gloo:
        def _set_default_timeout(self, timeout: timedelta) -> None:
            calls.append(("cpu timeout", timeout))

    class World:
        def _get_backend(self, device: torch.device) -> Gloo:
            assert device.type == "cpu"
            return Gloo()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda **options: calls.append(("init", options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(("destroy", None)))
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=World()))
    caplog.set_level("INFO", "routesae")  # so that what a rank does to it is undone
    launched = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with distributed.joined_ranks("auto") as ranks:
        assert ranks == Ranks(3, 4)
        assert ranks.device("auto") == torch.device("cuda", index)
    gpu = torch.device("cuda", index)
    nccl = {"backend": "cpu:gloo,cuda:nccl", "timeout": timedelta(minutes=10), "device_id": gpu}
    assert calls == [("set_device", gpu), ("init", nccl), ("cpu timeout", timedelta(days=1)), ("destroy", None)]
    calls.clear()
    with distributed.joined_ranks("cpu"):
        pass
    assert calls == [("init", {"backend": "gloo", "timeout": timedelta(days=1)}), ("destroy", None)]


def test_two_processes_on_one_gpu_and_a_torch_that_cannot_divide_are_wrong_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(WrongInput, match="two processes share a GPU"), distributed._peer_errors():
        raise RuntimeError("NCCL error\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 7000")
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms")
    with pytest.raises(WrongInput, match="--shard and --cpu-offload need a later torch than"):
        distributed.joined_ranks("cpu", dividing=True).__enter__()
