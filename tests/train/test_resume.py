"""Passes of several SAEs and runs that were stopped: the same bytes as one SAE alone in a run left to itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, Progress, Stopped, WrongInput
from routesae.tests.processes import Command
from routesae.train.folder.checkpoint import load_sae, read_recipe
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.log import read_metrics
from routesae.train.optimiser import lr_factor
from routesae.train.run import TrainResult, train
from routesae.train.saes import SAES, Recipe, build
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import RunSettings, TrainSettings
from routesae.train.sparse import search
from routesae.train.sparse.policy import chosen
from routesae.train.state import checkpoint_file, drop_checkpoints, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
STEPS = 8
SMALL: dict[str, Any] = {"latents": 64, "k": 8, "lr": 3e-3}
RUNS: dict[str, RunSettings] = {
    name: RunSettings(**{**SMALL, **changes}, name=name)
    for name, changes in {
        **{sae: {"sae": sae} for sae in SAES},
        "layer5": {"sae": "topk", "layer": 5},
        "published-router": {"router": "published", "balance": 0.01},
        "soft": {"routing": "soft", "aggregate": "mean"},
        "frozen": {"router": "frozen"},
        "hashed": {"router": "random"},
        "routed-jumprelu": {"routed": "jumprelu", "pre_act_loss": 1e-3},
        "routed-batchtopk-dataset": {"routed": "batchtopk", "normalize": "dataset"},
        "dataset": {"sae": "topk", "normalize": "dataset"},
        "raw": {"sae": "topk", "normalize": "none"},
        "annealed": {"sae": "topk", "anneal_k_from": 40},
        "clipped": {"sae": "gated", "clip": 1e-3, "sparsity": 0.01},
        "published": {"recipe": "published"},
        "published-vanilla": {"sae": "vanilla", "recipe": "published", "sparsity": 0.01},
    }.items()
}
Contents = dict[str, bytes]


class Pass:
    """Runs by name over the tiny cache, in one pass of 8 steps."""

    def __init__(self, cache: Path):
        self.cache = str(cache)

    def __call__(self, names: list[str], out: Path, report: Any = None, **changes: Any) -> list[TrainResult]:
        runs = changes.pop("runs", None) or tuple(RUNS[name] for name in names)
        given = {"cache": self.cache, "batch_tokens": 1000, "log_every_steps": 3, "dead_after_tokens": 2000}
        given |= {"sparsity_warmup": 0.5, "device": "cpu", "out": str(out), "checkpoint_every_steps": 100}
        settings = TrainSettings(runs=runs, **{**given, **changes})
        return train(settings, report) if report else train(settings)


@pytest.fixture(scope="module")
def run(tiny_cache: Cache) -> Pass:
    return Pass(tiny_cache.path)


@pytest.fixture(scope="module")
def alone(run: Pass, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an SAE that was trained alone and never stopped; trained where first asked for."""
    out = tmp_path_factory.mktemp("alone")

    def folder(name: str) -> Path:
        if not (out / name).exists():
            run([name], out)
        return out / name

    return folder


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder)


def compared(folder: Path) -> dict[str, Any]:
    """All files of an SAE, less what a clock or the command itself puts in."""
    found: dict[str, Any] = contents(folder)
    found["metrics.jsonl"] = [{**line, "tokens_per_second": None, "data_wait": None} for line in lines(folder)]
    config = json.loads(found["cfg.json"])
    del config["metadata"]["routesae"]["hash"]
    asked = config["metadata"]["routesae"]["source"]["settings"]
    for name in ("out", "resume", "overwrite", "log_every_steps", "checkpoint_every_steps"):
        del asked[name]
    found["cfg.json"] = config
    return found


def assert_same(folder: Path, other: Path) -> None:
    found, expected = compared(folder), compared(other)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Have the next runs see SIGTERM after so many of their steps; after none with None."""

    def set_stop(steps: int | None) -> None:
        @contextmanager
        def requests() -> Iterator[Callable[[], signal.Signals | None]]:
            done = 0

            def request() -> signal.Signals | None:
                nonlocal done
                done += 1
                return signal.SIGTERM if done == steps else None

            yield request

        monkeypatch.setattr("routesae.train.run.stop_requests", requests)

    return set_stop


Stop = Callable[[int | None], None]


def stopped(run: Pass, stop_after: Stop, names: list[str], out: Path, steps: int, **changes: Any) -> None:
    stop_after(steps)
    with pytest.raises(Stopped):
        run(names, out, **changes)
    stop_after(None)


def killed(run: Pass, names: list[str], out: Path, step: int, **changes: Any) -> None:
    """Ends as a kill would right after the line of `step` was written: no checkpoint of that step."""

    def interrupt(progress: Progress) -> None:
        if progress.done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(names, out, interrupt, **changes)


# --------------------------------------------------------------------------------------------------- one pass


def test_a_pass_of_every_variant_gives_each_the_bytes_it_gets_alone(
    run: Pass, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    results = run(list(RUNS), tmp_path)
    assert [result.folder.name for result in results] == list(RUNS)
    for result in results:
        assert_same(result.folder, alone(result.folder.name))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(RUNS)


def test_the_variants_compared_are_all_there_are_and_differ(alone: Callable[[str], Path]) -> None:
    assert {run.sae for run in RUNS.values()} == set(SAES)
    weights = [
        b"".join(data for name, data in sorted(contents(alone(name)).items()) if name.endswith("safetensors"))
        for name in RUNS
    ]
    assert len(set(weights)) == len(RUNS)


def test_a_pass_tells_its_progress_by_sae(run: Pass, tmp_path: Path) -> None:
    """Two of one variant too, which only a setting tells apart."""
    seen: list[Progress] = []
    runs = (RunSettings(sae="topk", latents=64, k=4), RunSettings(sae="topk", latents=64, k=8), RUNS["routesae"])
    run([], tmp_path, seen.append, runs=runs)
    training = [progress for progress in seen if progress.stage.startswith("train")]
    assert {progress.stage for progress in training} == {"train 3 SAEs"}
    assert set(training[-1].facts) == {"topk_layer4_64_k4", "topk_layer4_64_k8", "routesae"}


def test_two_runs_that_would_be_one_folder_are_refused(run: Pass, tmp_path: Path) -> None:
    for runs in (
        (RunSettings(name="x", **SMALL), RunSettings(sae="topk", name="x", **SMALL)),
        (RunSettings(**SMALL), RunSettings(**{**SMALL, "lr": 1e-3})),  # default names do not hold the rate
    ):
        with pytest.raises(WrongInput, match=rf"two SAEs of this run would be {tmp_path}/.*name each"):
            run([], tmp_path, runs=runs)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path, name: str
) -> None:
    steps = random.Random(name).randrange(1, STEPS)
    stopped(run, stop_after, [name], tmp_path, steps)
    assert [path.name for path in tmp_path.iterdir()] == [f".{name}.partial"]
    run([name], tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same(tmp_path / name, alone(name))


def test_a_pass_stopped_after_every_step_goes_on_to_the_same_bytes(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path
) -> None:
    names = ["topk", "batchtopk", "jumprelu", "published-router", "annealed", "random"]
    for step in range(1, STEPS):
        stopped(run, stop_after, names, tmp_path, 1, resume=step > 1)
        assert {path.name for path in tmp_path.glob(".*.partial/step-*")} == {f"step-{step:08d}.safetensors"}
    run(names, tmp_path, resume=True)
    for name in names:
        assert_same(tmp_path / name, alone(name))


def test_resume_without_anything_to_go_on_from_begins(
    run: Pass, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    run(["topk"], tmp_path, resume=True)
    assert_same(tmp_path / "topk", alone("topk"))


def test_lines_written_after_the_checkpoint_are_cut_and_a_checkpoint_right_after_that_is_whole(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path
) -> None:
    """Killed at 6, after its line; resumed from 4, stopped at 5, before a line; resumed again."""
    stopped(run, stop_after, ["topk"], tmp_path, 4)
    killed(run, ["topk"], tmp_path, 6, resume=True)
    partial = tmp_path / ".topk.partial"
    assert [line["step"] for line in lines(partial)] == [3, 6]
    stopped(run, stop_after, ["topk"], tmp_path, 1, resume=True)
    assert [line["step"] for line in lines(partial)] == [3]
    tensors = load_checkpoint(partial, 5)[0]
    assert tensors["log.counts"][0] == (partial / "metrics.jsonl").stat().st_size
    run(["topk"], tmp_path, resume=True)
    assert_same(tmp_path / "topk", alone("topk"))


def test_checkpoints_come_as_often_as_asked_and_only_the_newest_is_kept(
    run: Pass, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[list[str]] = []

    def drop(folder: Path, **but: int) -> None:
        drop_checkpoints(folder, **but)
        kept.append(sorted(path.stem for path in folder.glob("step-*")))

    monkeypatch.setattr("routesae.train.run.drop_checkpoints", drop)
    run(["topk"], tmp_path, checkpoint_every_steps=3)
    assert kept == [["step-00000003"], ["step-00000006"], ["step-00000008"], []]
    assert sorted(path.name for path in (tmp_path / "topk").iterdir()) == [
        "cfg.json",
        "metrics.jsonl",
        "sae_weights.safetensors",
    ]


def test_a_kill_between_the_checkpoints_of_two_saes_falls_back_to_the_step_that_both_have(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path
) -> None:
    names = ["topk", "published-router"]
    stopped(run, stop_after, names, tmp_path, 3)
    older = shutil.copytree(tmp_path, tmp_path.with_name("older"))
    stopped(run, stop_after, names, tmp_path, 3, resume=True)
    both, lacking = tmp_path / ".topk.partial", tmp_path / ".published-router.partial"
    checkpoint_file(lacking, 6).rename(lacking / ".step-00000006.safetensors")  # it was being written
    for partial in (both, lacking):
        shutil.copy(checkpoint_file(older / partial.name, 3), checkpoint_file(partial, 3))
    begun: list[int] = []
    run(names, tmp_path, lambda progress: begun.append(progress.done), resume=True)
    assert begun[0] == 6  # the first line after step 3
    for name in names:
        assert_same(tmp_path / name, alone(name))
        assert not list((tmp_path / name).glob(".*"))


def test_a_kill_between_the_first_checkpoints_of_two_saes_begins_again(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path
) -> None:
    names = ["topk", "published-router"]
    stopped(run, stop_after, names, tmp_path, 3)
    checkpoint_file(tmp_path / ".published-router.partial", 3).unlink()
    run(names, tmp_path, resume=True)
    for name in names:
        assert_same(tmp_path / name, alone(name))


def test_a_kill_between_the_saving_of_two_saes_leaves_the_first_and_saves_the_second(
    run: Pass, alone: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from routesae.train.folder.checkpoint import save_sae

    def save_one_only(folder: Path, *arguments: Any) -> None:
        if folder.name == ".published-router.partial":
            raise KeyboardInterrupt
        save_sae(folder, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr("routesae.train.run.save_sae", save_one_only)
        with pytest.raises(KeyboardInterrupt):
            run(["topk", "published-router"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".published-router.partial", "topk"]
    before = contents(tmp_path / "topk")
    results = run(["topk", "published-router"], tmp_path, resume=True)
    assert [result.folder.name for result in results] == ["published-router"]
    assert contents(tmp_path / "topk") == before
    for name in ("topk", "published-router"):
        assert_same(tmp_path / name, alone(name))


def test_a_finished_sae_is_left_as_it_is(run: Pass, tmp_path: Path) -> None:
    run(["topk"], tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "topk").iterdir()}
    assert run(["topk"], tmp_path, resume=True) == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "topk").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["topk"]


def test_a_kill_before_a_finished_saes_checkpoints_are_dropped_leaves_them_to_resume(
    run: Pass, alone: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: Path, but: int | None = None) -> None:
        if but is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("routesae.train.run.drop_checkpoints", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(["topk"], tmp_path)
    assert checkpoint_file(tmp_path / "topk", 8).exists()
    assert run(["topk"], tmp_path, resume=True) == []
    assert_same(tmp_path / "topk", alone("topk"))


def test_a_stopped_overwrite_goes_on_and_then_replaces_the_old_sae(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path
) -> None:
    for seed in (1, 0):  # the old one with another seed; then with the same settings
        shutil.rmtree(tmp_path / "topk", ignore_errors=True)
        run(["topk"], tmp_path, seed=seed)
        old = contents(tmp_path / "topk")
        stopped(run, stop_after, ["topk"], tmp_path, 3, overwrite=True)
        assert contents(tmp_path / "topk") == old
        (result,) = run(["topk"], tmp_path, resume=True)
        assert_same(result.folder, alone("topk"))
        assert [path.name for path in tmp_path.iterdir()] == ["topk"]


def test_a_caller_who_has_autocast_on_trains_the_same_weights(run: Pass, tmp_path: Path) -> None:
    """Autocast keeps its copies of weights until the outermost of it ends, which here is after the run."""
    with torch.autocast("cpu", torch.bfloat16):
        run(["topk"], tmp_path / "in", precision="bfloat16")
    run(["topk"], tmp_path, precision="bfloat16")
    assert weights(tmp_path / "in" / "topk") == weights(tmp_path / "topk")


# ----------------------------------------------------------------------------------- how sums are done, kept by a run


def test_a_run_resumed_on_another_machine_does_sums_as_it_began_and_says_so(
    run: Pass,
    stop_after: Stop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    set_threads: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Begun with two threads on a CPU that multiplies bfloat16 natively, continued on one that does not."""
    caplog.set_level("INFO")
    seen: list[tuple[int, set[torch.dtype]]] = []
    inner = search.pre_activations

    def watched(x_ND: torch.Tensor, encoder: search.Encoder, dtype: torch.dtype) -> Any:
        seen.append((torch.get_num_threads(), dtype))
        return inner(x_ND, encoder, dtype)

    monkeypatch.setattr(search, "pre_activations", watched)
    runs = (RunSettings(sae="topk", latents=256, k=8, name="topk"),)

    def on(native: bool, threads: int) -> None:
        set_threads(threads)
        monkeypatch.setattr("routesae.train.run.has_bfloat16_units", lambda _: native)

    on(True, 2)
    run([], tmp_path / "whole", runs=runs)
    assert set(seen) == {(2, torch.bfloat16)}
    stop_after(3)
    with pytest.raises(Stopped):
        run([], tmp_path, runs=runs)
    stop_after(None)
    on(False, 1)
    seen.clear()
    caplog.clear()
    run([], tmp_path, runs=runs, resume=True)
    assert set(seen) == {(2, torch.bfloat16)}
    assert torch.get_num_threads() == 1  # again
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("training on")]
    assert said == [
        "training on cpu: float32, proposals bfloat16, sums over active pairs below 1/12 of all, 2 threads"
    ]
    assert_same(tmp_path / "topk", tmp_path / "whole" / "topk")
    kept = json.loads((tmp_path / "topk" / "cfg.json").read_text())["metadata"]["routesae"]["source"]["arithmetic"]
    assert kept == chosen("cpu", bfloat16_units=True, threads=2).to_dict()
    seen.clear()
    run([], tmp_path / "new", runs=runs)
    assert set(seen) == {(1, torch.float32)}  # a new run does as its own machine is fast at


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 1}, r"pass\.seed \(was 0, now 1\)"),
        ({"batch_tokens": 500}, r"pass\.batch_tokens \(was 1000, now 500\)"),
        ({"epochs": 2}, r"pass\.epochs \(was None, now 2\)"),
        ({"precision": "bfloat16"}, r"pass\.precision \(was auto, now bfloat16\)"),
        ({"sparsity_warmup": 0.25}, r"pass\.sparsity_warmup \(was 0\.5, now 0\.25\)"),
        ({"run": {"k": 4}}, r"recipe\.k \(was 8, now 4\), run\.k \(was 8, now 4\)"),
        ({"run": {"lr": 1e-3}}, r"run\.lr \(was 0\.003, now 0\.001\)"),
        ({"run": {"layer": 5}}, r"recipe\.layers \(was \[4\], now \[5\]\)"),
        ({"run": {"sae": "batchtopk"}}, r"recipe\.sae \(was topk, now batchtopk\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
def test_resuming_with_another_setting_is_refused_naming_it(
    run: Pass, stop_after: Stop, tmp_path: Path, changes: dict[str, Any], differing: str, finished: bool
) -> None:
    if finished:
        run(["topk"], tmp_path)
    else:
        stopped(run, stop_after, ["topk"], tmp_path, 3)
    before = contents(tmp_path)
    own = RunSettings(**{"sae": "topk", "name": "topk", **SMALL, **changes.get("run", {})})
    passed = {name: value for name, value in changes.items() if name != "run"}
    with pytest.raises(WrongInput, match=rf"--resume: topk was begun with other settings: .*{differing}"):
        run([], tmp_path, runs=(own,), resume=True, **passed)
    assert contents(tmp_path) == before


def test_resuming_on_another_cache_is_refused_and_on_the_same_one_elsewhere_is_not(
    tiny_settings: Callable[..., HarvestSettings], run: Pass, stop_after: Stop, tmp_path: Path
) -> None:
    other = harvest(tiny_settings(out=str(tmp_path / "other"), seed=1))
    stopped(run, stop_after, ["topk"], tmp_path / "saes", 3)
    with pytest.raises(WrongInput, match=r"topk was begun with other settings: cache\..* \(was .*, now "):
        run(["topk"], tmp_path / "saes", cache=str(other.path), resume=True)
    moved = shutil.copytree(run.cache, tmp_path / "moved")
    run(["topk"], tmp_path / "saes", cache=str(moved), resume=True)


def test_lines_and_checkpoints_may_come_at_other_steps_after_a_stop(
    run: Pass, alone: Callable[[str], Path], stop_after: Stop, tmp_path: Path
) -> None:
    stopped(run, stop_after, ["published-router"], tmp_path, 4)
    run(["published-router"], tmp_path, log_every_steps=1, checkpoint_every_steps=2, resume=True)
    assert [line["step"] for line in lines(tmp_path / "published-router")] == [3, 5, 6, 7, 8]
    for file in ("sae_weights.safetensors", "router.safetensors"):
        assert (tmp_path / "published-router" / file).read_bytes() == (alone("published-router") / file).read_bytes()


def test_resuming_with_an_sae_that_was_never_begun_is_refused(run: Pass, stop_after: Stop, tmp_path: Path) -> None:
    stopped(run, stop_after, ["topk"], tmp_path, 3)
    before = contents(tmp_path)
    with pytest.raises(WrongInput, match="--resume: vanilla was not stopped with topk; train it separately"):
        run(["topk", "vanilla"], tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_resuming_saes_that_stand_at_different_steps_loses_neither(
    run: Pass, stop_after: Stop, tmp_path: Path
) -> None:
    stopped(run, stop_after, ["topk"], tmp_path, 3)
    stopped(run, stop_after, ["vanilla"], tmp_path, 5)
    before = contents(tmp_path)
    with pytest.raises(
        WrongInput, match=r"--resume: .*topk after step 3, vanilla after step 5.*train them separately"
    ):
        run(["topk", "vanilla"], tmp_path, resume=True)
    assert contents(tmp_path) == before


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def alter_an_identity(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(rb"\"k\": 8") > 0
    path.write_bytes(data.replace(rb"\"k\": 8", rb"\"k\": 9"))


def lose_a_tensor(path: Path) -> None:
    """As somebody would who means it: the checksum is right."""
    tensors, *facts = load_checkpoint(path.parent, 3)
    del tensors["adam.0.exp_avg"]
    save_checkpoint(path.parent, 3, tensors, *facts)


def reshape_a_tensor(path: Path) -> None:
    tensors, *facts = load_checkpoint(path.parent, 3)
    tensors["sae.W_dec_FD"] = tensors["sae.W_dec_FD"][:, :3].contiguous()
    save_checkpoint(path.parent, 3, tensors, *facts)


def rename(path: Path) -> None:
    path.rename(path.with_name("step-00000004.safetensors"))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("step-00000003.safetensors", cut, r"step-00000003\.safetensors cannot be read"),
        (
            "step-00000003.safetensors",
            flip_a_bit,
            r"cannot be read \(it was altered: its checksum differs\)",
        ),
        (
            "step-00000003.safetensors",
            alter_an_identity,
            r"cannot be read \(it was altered: its checksum differs\)",
        ),
        ("step-00000003.safetensors", lose_a_tensor, r"\.topk\.partial does not fit this SAE \(adam\.0\.exp_avg\)"),
        ("step-00000003.safetensors", reshape_a_tensor, r"\.topk\.partial does not fit this SAE \(sae\.W_dec_FD\)"),
        (
            "step-00000003.safetensors",
            rename,
            r"step-00000004\.safetensors is not a checkpoint of step 4 in format 4",
        ),
        ("step-00000003.safetensors", lambda path: save_file({}, path), r"is not a checkpoint of step 3 in format 4"),
        ("metrics.jsonl", Path.unlink, r"metrics\.jsonl has 0 bytes, fewer than at its checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    run: Pass, stop_after: Stop, tmp_path: Path, file: str, damage: Callable[[Path], Any], message: str
) -> None:
    stopped(run, stop_after, ["topk"], tmp_path, 3)
    damage(tmp_path / ".topk.partial" / file)
    with pytest.raises(FailedRun, match=message):
        run(["topk"], tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [".topk.partial"]


def test_a_checkpoint_of_the_older_format_is_refused_with_what_to_do_and_overwrite_starts_again(
    run: Pass, stop_after: Stop, tmp_path: Path
) -> None:
    stopped(run, stop_after, ["topk"], tmp_path, 3)
    old = checkpoint_file(tmp_path / ".topk.partial", 3)
    save_file(load_file(old), old, metadata={"format": "3", "step": "3", "identity": "{}", "hash": "0"})
    with pytest.raises(FailedRun, match=rf"{old} is not a checkpoint of step 3 in format 4; delete {old.parent} and"):
        run(["topk"], tmp_path, resume=True)
    run(["topk"], tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["topk"]


# ----------------------------------------------------------------------------------------------- real processes

REAL = ["--sae", "topk", "--sae", "jumprelu", "--sae", "routesae", "--router", "top2", "--checkpoint-every", "3"]
REAL += ["--latents", "64", "--k", "8", "--batch-tokens", "500", "--log-every-steps", "5", "--device", "cpu"]


def process(cache: Path, out: Path, *more: str) -> Command:
    return Command("train", "--cache", cache, *REAL, "--out", out, *more, cwd=out.parent)


def newest(out: Path) -> int:
    return max((int(path.stem[5:]) for path in out.glob(".*.partial/step-*")), default=0)


def wait_for_checkpoint(child: Command, out: Path, after: int, *, or_end: bool = False) -> None:
    deadline = time.monotonic() + 60
    while newest(out) <= after:
        if child.poll() is not None:
            assert or_end, child.communicate()
            return
        assert time.monotonic() < deadline
        time.sleep(0.002)


def weights(out: Path) -> Contents:
    return {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}


def test_a_pass_killed_and_stopped_at_random_moments_goes_on_to_the_same_bytes(
    tiny_cache: Cache, tmp_path: Path
) -> None:
    length = ("--epochs", "5")  # about 80 steps
    whole, out = tmp_path / "whole", tmp_path / "killed"
    rng = random.Random()
    stood = []
    for asked, code in [(signal.SIGKILL, -9), (signal.SIGTERM, 0)]:
        child = process(tiny_cache.path, out, *length, "--resume")
        wait_for_checkpoint(child, out, newest(out))
        time.sleep(rng.random() * 0.1)
        child.send_signal(asked)
        output, errors = child.communicate(timeout=60)
        assert (child.returncode, output) == (code, ""), errors
        assert "Traceback" not in errors
        said = [line for line in errors.splitlines() if line.startswith("routesae: ")]
        assert [f"stopped after step {newest(out)} of " in line for line in said] == [True] * (code >= 0)
        assert all("--resume goes on" in line for line in said)
        stood.append(newest(out))
    assert stood == sorted(stood)
    for folder, more in ((out, ["--resume"]), (whole, [])):
        ended = CliRunner().invoke(
            main, ["train", "--cache", str(tiny_cache.path), *REAL, "--out", str(folder), *length, *more]
        )
        assert ended.exit_code == 0, ended.output
    assert len(weights(whole)) == 4
    for folder in whole.glob("*/"):
        assert_same(out / folder.name, folder)
        assert 0 < stood[0] <= stood[-1] < lines(folder)[-1]["step"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
def test_forty_kills_at_random_moments_lose_nothing(tiny_cache: Cache, tmp_path: Path) -> None:
    """While it starts, reads, steps, writes checkpoints, scores and saves; each run goes on where the last one was
    killed, and once it has ended another begins."""
    length = ("--epochs", "12")  # about 190 steps
    whole = tmp_path / "whole"
    ended = CliRunner().invoke(main, ["train", "--cache", str(tiny_cache.path), *REAL, "--out", str(whole), *length])
    assert ended.exit_code == 0, ended.output
    rng, kills, stood = random.Random(0), 0, set()
    for runs in count():
        out = tmp_path / f"killed-{runs}"
        while True:
            child = process(tiny_cache.path, out, *length, "--resume")
            if kills < 40:
                if rng.random() < 0.7:  # the others die while they start
                    wait_for_checkpoint(child, out, newest(out), or_end=True)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=rng.random())
            child.kill() if kills < 40 else None
            _, errors = child.communicate(timeout=120)
            if child.returncode == 0:
                break
            assert child.returncode == -9, errors
            kills += 1
            stood.add(newest(out))
        for folder in whole.glob("[!.]*/"):
            assert_same(out / folder.name, folder)
        if kills >= 40:
            break
    assert len(stood) > 10


# -------------------------------------------------------------------- rate, normalisation over the cache, precision


def test_the_logged_rate_is_as_scheduled(run: Pass, tmp_path: Path) -> None:
    run(["topk"], tmp_path, log_every_steps=1, epochs=3)
    found = [line["lr"] for line in lines(tmp_path / "topk")]
    assert found == pytest.approx([3e-3 * lr_factor(step, 3 * STEPS) for step in range(3 * STEPS)])
    assert found[0] == pytest.approx(3e-3)  # a warm-up of 5 % of 24 steps is one
    assert found[-1] == pytest.approx(3e-3 / 5)


def test_the_annealed_k_is_that_of_each_step_and_ends_at_k(run: Pass, tmp_path: Path) -> None:
    run(["annealed"], tmp_path, log_every_steps=1, epochs=2)
    found = [line["l0"] for line in lines(tmp_path / "annealed")]
    assert found == sorted(found, reverse=True)
    assert 30 < found[0] < 40
    assert found[8:] == pytest.approx([8] * 8, abs=0.2)


@pytest.mark.parametrize("name", [*SAES, "soft", "published-router", "routed-batchtopk-dataset"])
def test_an_sae_trained_on_rescaled_states_is_saved_as_the_same_function_of_raw_ones(
    tiny_cache: Cache, run: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("routesae.train.run.drop_checkpoints", lambda folder, but=None: None)
    (result,) = run([], tmp_path, runs=(RUNS[name].replace(normalize="dataset"),))
    recipe = read_recipe(result.folder)
    assert recipe.normalize == "none"
    trained = build(Recipe(**{**recipe.__dict__, "normalize": "dataset"})).eval()
    tensors = load_checkpoint(result.folder, STEPS)[0]
    trained.load_state_dict({key[4:]: tensor for key, tensor in tensors.items() if key.startswith("sae.")})
    scale = trained.scale = float(tensors["scale"])
    held_out = Selection(tiny_cache, tiny_cache.manifest.train_rows, tiny_cache.manifest.rows, recipe.layers)
    plans = epoch_plans(held_out, seed=0, epoch=0, batch_tokens=len(held_out))
    (h_LND,) = (batch.hidden_LND.float().clone() for batch in load(held_out, plans, len(held_out), CPU))
    assert h_LND.shape[1] == len(held_out)
    norm = (scale * h_LND).norm(dim=2).mean().item()
    assert norm == pytest.approx(32**0.5, rel=0.02)  # s was taken over the training rows
    assert scale != pytest.approx(1, rel=0.05)
    saved = load_sae(result.folder, CPU)
    with torch.no_grad():
        raw, rescaled = saved(Hidden(h_LND)), trained(Hidden(h_LND))
    torch.testing.assert_close(raw.reconstruction_ND * scale, rescaled.reconstruction_ND, rtol=1e-3, atol=1e-3)
    # NormMSE is the mean of each row's share; a crosscoder's layers count together.
    naive = []
    for x_D, y_D in zip(raw.x_ND.double(), raw.reconstruction_ND.double(), strict=True):
        naive.append(float(((x_D - y_D) ** 2).sum() / (x_D**2).sum()))
    assert result.held_out is not None
    assert result.held_out.norm_mse == pytest.approx(sum(naive) / len(naive), rel=1e-3)


def test_every_variant_learns_in_bfloat16_and_is_saved_in_float32(run: Pass, tmp_path: Path) -> None:
    results = run(list(RUNS), tmp_path, precision="bfloat16", batch_tokens=300, tokens=7200)
    for result in results:
        found = [line["norm_mse"] for line in lines(result.folder)]
        assert all(torch.isfinite(torch.tensor([line["loss"] for line in lines(result.folder)]))), result.folder
        assert found[-1] < found[0], (result.folder, found)
        for file in result.folder.glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_precision_is_what_the_products_are_computed_in(
    run: Pass, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    run(["vanilla"], tmp_path, precision="bfloat16")
    assert weights(tmp_path / "vanilla") != weights(alone("vanilla"))
