"""Trackers hold the lines of metrics.jsonl: TensorBoard, Weights & Biases offline and Trackio, each read back."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from routesae.harvest.cache.reader import Cache
from routesae.reporting import Progress, WrongInput
from routesae.tests.processes import run_command
from routesae.train.log import read_metrics
from routesae.train.run import train
from routesae.train.settings import TrainSettings
from routesae.train.trackers import TRACKERS, Hosted, scalars

Settings = Callable[..., TrainSettings]
Lines = dict[int, dict[str, float]]
ROUTED = ("layer_shares/2", "layer_shares/3", "layer_shares/4", "layer_shares/5", "routing_entropy")


def logged(folder: Path) -> Lines:
    """The numbers of metrics.jsonl and the held-out scores by step."""
    found = [dict(line) for line in read_metrics(folder)]
    assert len(found) > 1
    source = json.loads((folder / "cfg.json").read_text())["metadata"]["routesae"]["source"]
    held_out = {name: value for name, value in source["held_out"].items() if value is not None}
    lines = {line["step"]: dict(scalars(line)) for line in found}
    lines[found[-1]["step"]] |= dict(scalars({"held_out": held_out}))  # the last ones have the scores too
    return lines


def of_tensorboard(folder: Path) -> Lines:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found: Lines = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {}), (name, event.step)
            found[event.step][name] = event.value
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Those of a .wandb file, a LevelDB log: blocks of 32 KiB; a record is crc, length, kind (1 whole, 4 its end)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if left < 7 or kind == 0:
            at += left
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def of_wandb(file: Path) -> Lines:
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if items:
            found[items["_step"]] = {name: value for name, value in items.items() if name[0] != "_"}
    return found


def of_trackio(database: Path, run: str) -> Lines:
    connection = sqlite3.connect(database)
    rows = connection.execute("select step, metrics from metrics where run_name = ?", (run,)).fetchall()
    connection.close()
    found: Lines = {}
    for step, metrics in rows:  # of the last step two: the line, and the held-out scores
        line = json.loads(metrics)
        assert not line.keys() & found.setdefault(step, {}).keys()
        found[step] |= line
    return found


def approximately(lines: Lines) -> Any:
    return {step: pytest.approx(line, rel=1e-6) for step, line in lines.items()}


def test_scalars_are_the_numbers_of_a_line_nested_ones_by_path_without_the_step() -> None:
    line = {"step": 3, "tokens": 5, "loss": 0.5, "layer_shares": {"2": 0.25, "3": 0.75}}
    assert dict(scalars(line)) == {"tokens": 5.0, "loss": 0.5, "layer_shares/2": 0.25, "layer_shares/3": 0.75}


def test_tensorboard_holds_the_lines_of_metrics_jsonl(settings: Settings) -> None:
    (result,) = train(settings(sae="routesae", log=("tensorboard",)))
    lines = logged(result.folder)
    assert set(lines[3]) > set(ROUTED)
    assert of_tensorboard(result.folder) == approximately(lines)


def test_tensorboard_holds_each_line_once_after_a_kill_and_a_resume(settings: Settings, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    chosen: dict[str, Any] = {"name": "mine", "log": ("tensorboard",), "log_every_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(settings(**chosen, checkpoint_every_steps=3), interrupt)
    assert set(of_tensorboard(tmp_path / "saes" / ".mine.partial")) == {1, 2, 3, 4, 5}  # two after the checkpoint
    (result,) = train(settings(**chosen, resume=True))
    assert set(logged(result.folder)) == set(range(1, 9))
    assert of_tensorboard(result.folder) == approximately(logged(result.folder))


def test_wandb_offline_and_trackio_hold_the_lines_of_every_sae_of_a_pass(tiny_cache: Cache, tmp_path: Path) -> None:
    """In a process of its own: both leave threads behind."""
    command = ["train", "--cache", str(tiny_cache.path), "--sae", "topk", "--sae", "routesae", "--latents", "64"]
    command += ["--k", "8", "--batch-tokens", "1000", "--log-every-steps", "3", "--log", "wandb", "--log", "trackio"]
    places = {name: str(tmp_path / name) for name in ("HOME", "TRACKIO_DIR", "HF_HOME", "WANDB_DIR")}
    modes = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}
    for place in places.values():
        Path(place).mkdir()
    run = run_command(*command, cwd=tmp_path, environment={**modes, **places})
    assert run.returncode == 0, run.stderr
    assert [line.partition(":")[0] for line in run.stdout.splitlines()] == [
        "saes/topk_layer4_64_k8",
        "saes/routesae_hard_64_k8",
    ]  # what the trackers say goes elsewhere
    for name in ("topk_layer4_64_k8", "routesae_hard_64_k8"):
        lines = logged(tmp_path / "saes" / name)
        (file,) = (tmp_path / "saes" / name).glob("wandb/offline-run-*/run-*.wandb")
        assert of_wandb(file) == approximately(lines)
        assert file.stem == "run-" + (tmp_path / "saes" / name / "wandb-run").read_text().strip()
        assert of_trackio(tmp_path / "TRACKIO_DIR" / "routesae.db", name) == approximately(lines)


class Fake:
    """Stands for a hosted tracker's module: keeps what init was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.id = "abc123"

    def init(self, **options: Any) -> Fake:
        self.asked.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_a_resumed_sae_goes_on_in_its_run_and_a_new_one_begins_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 6:
            raise KeyboardInterrupt

    fake = Fake()
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(KeyboardInterrupt):
        train(settings(name="mine", log=(module,), checkpoint_every_steps=3), interrupt)
    train(settings(name="mine", log=(module,), resume=True))
    train(settings(name="mine", log=(module,), overwrite=True))
    assert [options["resume"] for options in fake.asked] == ["never", "allow", "never"]
    assert {options["name"] for options in fake.asked} == {"mine"}
    assert fake.asked[0]["config"]["k"] == 8
    if module == "wandb":
        assert [options.get("id") for options in fake.asked] == [None, "abc123", None]


@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_a_run_goes_to_the_project_of_the_flag_or_of_the_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    train(settings(log=(module,), name="a"))
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    train(settings(log=(module,), name="b"))
    train(settings(log=(module,), name="c", log_project="of-the-flag"))
    assert [options["project"] for options in fake.asked] == ["routesae", "of-the-environment", "of-the-flag"]


def test_a_tracker_that_cannot_begin_is_wrong_input_naming_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Failing(Fake):
        def init(self, **options: Any) -> Fake:
            raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", Failing())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(WrongInput, match=r"--log wandb cannot begin a run: No API key configured\.$"):
        train(settings(log=("wandb",)))
    assert [path for path in (tmp_path / "saes").iterdir() if path.name[0] != "."] == []


def test_an_unknown_tracker_is_refused_with_those_there_are(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="--log 'mlflow' is none of tensorboard, wandb, trackio"):
        train(settings(log=("mlflow",)))
    assert not (tmp_path / "saes").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_with_how_to_install_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(WrongInput, match=rf"--log {name} needs {name}: pip install 'routesae\[{name}\]'"):
        train(settings(log=(name,)))
    assert not (tmp_path / "saes").exists()


class Failing:
    """A tracker whose server went away."""

    def __init__(self, at: str):
        self.at = at

    def log(self, step: int, line: Any) -> None:
        if self.at == "log":
            raise ConnectionError("gone")

    def close(self) -> None:
        if self.at == "close":
            raise ConnectionError("gone")


@pytest.mark.parametrize("at", ["log", "close"])
def test_a_tracker_that_fails_ends_no_run_and_hides_no_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    monkeypatch.setattr("routesae.train.run.open_trackers", lambda *_: [Failing(at)])
    (result,) = train(settings(name="mine"))
    assert "Failing takes no more lines (ConnectionError: gone)" in caplog.text
    assert read_metrics(result.folder)

    def stop(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(name="other"), stop)


@pytest.mark.parametrize("content", [b"", b"../x", b"a" * 2000, b"\xff", None])
def test_an_id_of_a_run_that_is_none_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    if content is None:
        os.mkfifo(tmp_path / "wandb-run")
    else:
        (tmp_path / "wandb-run").write_bytes(content)
    with pytest.raises(WrongInput, match=r"wandb-run cannot be read \(.*\); delete it to begin another run"):
        Hosted("wandb", "mine", tmp_path, {}, "project")
