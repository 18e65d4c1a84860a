"""Long runs, watched: bars, log lines, JSON lines and the status file, from the Report up to whole processes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
import warnings
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zarr
from click.testing import CliRunner

from routesae.cli import main
from routesae.console.options import Watch
from routesae.console.watch import Bars, Pacer, TextLines, fitted, status_path, watched
from routesae.harvest.cache.reader import Cache
from routesae.machine.stop import Terminated
from routesae.reporting import FailedRun, Progress, Stopped, WrongInput
from routesae.tests.processes import run_command

SMALL = ("--latents", "64", "--k", "8", "--batch-tokens", "1024", "--device", "cpu")


def step(done: int, total: int = 100, stage: str = "train topk") -> Progress:
    return Progress(stage, done, total, "steps", {"NormMSE": "0.1"})


def status(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def clocked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still at the last number of the list given back."""
    clock = [1000.0]
    monkeypatch.setattr("routesae.console.watch.time.monotonic", lambda: clock[-1])
    return clock


def on_terminal(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: yes, raising=False)


# ------------------------------------------------------------------------------------------------------- pace


def test_pace_is_of_the_stage_alone_and_begins_anew_on_the_next_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pacer = clocked(monkeypatch), Pacer()

    def pace(now: Progress) -> tuple[float | None, float | None]:
        paced = pacer(now)
        return paced["rate"], paced["seconds_left"]

    assert pace(step(40)) == (None, None)  # a resumed run: the first 40 were not done now
    clock.append(1010.0)
    assert pace(step(60)) == (2.0, 20.0)
    clock.append(1015.0)
    assert pace(step(10)) == (None, None)
    clock.append(1016.0)
    assert pace(step(20)) == (10.0, 8.0)
    assert pace(step(21, stage="score")) == (None, None)
    assert pace(step(100, stage="score")) == (None, 0.0)  # in no time


# ------------------------------------------------------------------------------------------------ standard error


def test_without_a_terminal_progress_is_log_lines_ten_seconds_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = clocked(monkeypatch)
    on_terminal(monkeypatch, False)
    with caplog.at_level("INFO", logger="routesae"), watched(Watch(), "train") as report:
        for done in range(0, 100, 4):
            report(step(done))
            clock.append(clock[-1] + 4)
        report(step(100))
    assert [record.getMessage() for record in caplog.records] == [
        f"train topk: {done} of 100 steps, NormMSE 0.1, steps/s 1.00, left {100 - done} s"
        for done in (12, 24, 36, 48, 60, 72, 84, 96, 100)
    ]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar_and_neither_with_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch, True)
    with caplog.at_level("INFO", logger="routesae"), watched(Watch(), "train") as report:
        report(step(50))
        report(step(100))
    assert "train topk 100%" in (shown := capsys.readouterr().err)
    assert "NormMSE=0.1" in shown
    for terminal in (True, False):
        on_terminal(monkeypatch, terminal)
        with caplog.at_level("INFO", logger="routesae"), watched(Watch(quiet=True), "train") as report:
            report(step(100))
    assert capsys.readouterr().err == ""
    assert caplog.records == []


def test_a_bar_names_its_sae_and_keeps_its_figures_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"NormMSE": "0.1234", "L0": "64.0", "dead": "12.5%", "layer 15": "13%", "tokens/s": "12,345"}
    for columns in (80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        bars = Bars()
        bars.show(Progress("train routesae_hard_mean_16384_k64", 100, 100, "steps", facts), {"seconds_left": 0.0})
        bars.close()
        line = capsys.readouterr().err.split("\r")[-1].rstrip("\n")
        assert len(line) <= columns
        assert all(
            fact in line
            for fact in ("train ", "_k64", "NormMSE=0.1234", "L0=64.0", "dead=12.5%", "layer 15=13%", "00:00 left")
        )
    several = {f"{name}_layer15_4608_k64": "0.1234" for name in ("topk", "batchtopk", "jumprelu")}
    stage, shown = fitted("train 3 SAEs", several, 60)
    assert len(stage) + len(shown) <= 60
    assert shown.count("0.1234") == 3


def test_bars_and_log_lines_spell_out_what_acts_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.show(Progress("report a\x1b[2J\n", 1, 1, "latents", {"x\x9b": "\u202e"}), {"seconds_left": None})
    bars.close()
    shown = capsys.readouterr().err
    assert not set(shown) & set("\x1b\x9b\u202e")
    assert "<U+001B>[2J<U+000A>" in shown
    for name, lines in (("routesae.train.run", 1), ("transformers", 2)):
        record = logging.LogRecord(name, logging.WARNING, "f", 1, "%s\n%s", ("a\x1b", "b\u2028c"), None)
        text = TextLines().format(record)
        assert text.replace("<U+000A>", "\n") == "a<U+001B>\nb<U+2028>c"
        assert len(text.split("\n")) == lines


def test_with_log_json_every_line_of_a_run_is_an_object(tiny_cache: Cache, tmp_path: Path) -> None:
    train = ("train", "--cache", tiny_cache.path, *SMALL, "--log-every-steps", "2")
    run = run_command(*train, "--log-json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"saes/routesae_hard_64_k8: held-out NormMSE .*\n", run.stdout)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert all(
        datetime.fromisoformat(line["time"]).tzinfo and line["level"] == "info" and line["pid"] for line in lines
    )
    assert any(line["message"].startswith("training on cpu") for line in lines)
    (last,) = (
        line for line in lines if line.get("stage") == "train routesae_hard_64_k8" and line["done"] == line["total"]
    )
    assert last["unit"] == "steps"
    assert last["rate"] > 0
    assert last["seconds_left"] == 0
    assert set(last["facts"]) >= {"NormMSE", "L0"}
    again = run_command("--log-json", *train, cwd=tmp_path)
    assert again.returncode == 2
    (refusal,) = (json.loads(line) for line in again.stderr.splitlines())
    assert (refusal["level"], refusal["exit_code"]) == ("error", 2)
    assert "--overwrite" in refusal["message"]
    quiet = run_command(*train, "--overwrite", "--quiet", cwd=tmp_path)
    assert (quiet.returncode, quiet.stderr) == (0, "")


# --------------------------------------------------------------------------------------------------- status file


def test_the_status_file_says_what_a_dashboard_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, file = clocked(monkeypatch), tmp_path / "status.json"
    with watched(Watch(quiet=True), "train", file) as report:
        assert not file.exists()
        report(step(0))
        clock.append(1005.0)
        report(step(20))
        found = status(file)
        assert {
            name: found[name] for name in ("stage", "done", "total", "unit", "rate", "seconds_left", "facts")
        } == {
            "stage": "train topk",
            "done": 20,
            "total": 100,
            "unit": "steps",
            "rate": 4.0,
            "seconds_left": 20.0,
            "facts": {"NormMSE": "0.1"},
        }
        assert (found["state"], found["message"], found["command"]) == ("running", None, "train")
        assert found["pid"] == os.getpid()
        assert found["host"]
        assert datetime.fromisoformat(found["started"]) <= datetime.fromisoformat(found["updated"])
    assert status(file)["state"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_status_file_is_written_every_two_seconds_at_most_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, file = clocked(monkeypatch), tmp_path / "status.json"
    seen = []
    with watched(Watch(quiet=True), "train", file) as report:
        for done in range(1, 50):
            report(step(done))
            seen.append(status(file)["done"])
            clock.append(clock[-1] + 0.25)
    assert seen == [1 + 8 * (n // 8) for n in range(49)]
    assert status(file)["done"] == 49


def test_a_reader_never_sees_half_a_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("routesae.console.watch.STATUS_SECONDS", 0.0)
    file, stop, seen = tmp_path / "status.json", threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if file.exists():
                seen.append(file.read_bytes())

    reader = threading.Thread(target=read)
    with watched(Watch(quiet=True), "train", file) as report:
        reader.start()
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            report(Progress("train", 1, 2, "steps", {"note": "x" * 100_000}))
        stop.set()
        reader.join()
    assert len(seen) > 20
    assert all(len(json.loads(text)["facts"]["note"]) == 100_000 for text in seen)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (FailedRun("the disk is full"), "failed", "the disk is full"),
        (OSError(28, "No space left on device"), "failed", "[Errno 28] No space left on device"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (Stopped("stopped after step 3", 0), "stopped", "stopped after step 3"),
        (KeyboardInterrupt(), "stopped", None),
        (WrongInput("--k 0"), None, None),
    ],
)
def test_the_last_status_is_how_the_run_ended(
    error: BaseException, state: str | None, message: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"

    def run() -> None:
        with watched(Watch(quiet=True), "train", file) as report:
            report(step(3))
            raise error

    with pytest.raises(type(error)):
        run()
    if state is None:
        assert list(tmp_path.iterdir()) == []
    else:
        found = status(file)
        assert (found["state"], found["message"], found["done"]) == (state, message, 3)


def test_a_run_with_nothing_to_do_corrects_an_older_status_and_makes_none(tmp_path: Path) -> None:
    with watched(Watch(quiet=True), "train", tmp_path / "status.json"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "status.json").write_text('{"state": "running"}')  # of a run that kill -9 ended
    with watched(Watch(quiet=True), "train", tmp_path / "status.json"):
        pass
    found = status(tmp_path / "status.json")
    assert found["state"] == "finished"
    with watched(Watch(quiet=True), "train", tmp_path / "status.json"):
        pass
    assert status(tmp_path / "status.json") == found  # to the millisecond


@pytest.mark.parametrize("fault", ["unlink", "is_dir", "write", "fifo", "surrogate"])
@pytest.mark.parametrize("error", [WrongInput("--k 0"), FailedRun("mine"), None])
def test_a_fault_of_the_status_file_never_hides_what_ended_the_run(
    error: Exception | None, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / ("s\udc80.json" if fault == "surrogate" else "s.json")

    def broken(*arguments: object, **more: object) -> bool:
        raise PermissionError(13, "Permission denied")

    if fault == "fifo":
        os.mkfifo(file)
    where = {"unlink": "pathlib.Path.unlink", "is_dir": "pathlib.Path.is_dir"}
    where |= {"write": "routesae.console.watch.write_json"}
    ended: BaseException | None = None
    with monkeypatch.context() as patched:
        try:
            with watched(Watch(quiet=True), "train", file) as report:
                report(step(1))
                if fault in where:
                    patched.setattr(where[fault], broken)
                if error is not None:
                    raise error
        except BaseException as raised:
            ended = raised
    assert ended is error


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_terminal(monkeypatch, True)

    def gone(*arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sys.stderr.write", gone, raising=False)
    with watched(Watch(), "train", tmp_path / "status.json") as report:
        report(step(1))
        report(step(100))
    assert status(tmp_path / "status.json")["done"] == 100


def test_a_status_that_cannot_be_written_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("routesae.console.watch.STATUS_SECONDS", 0.0)
    file = tmp_path / "status.json"
    file.mkdir()
    with caplog.at_level("WARNING", logger="routesae"), watched(Watch(quiet=True), "train", file) as report:
        report(step(1))
        report(step(2))
    (record,) = caplog.records  # once
    assert f"{file} is no longer written" in record.getMessage()
    with watched(Watch(quiet=True), "train", tmp_path / "not yet" / "status.json") as report:
        report(step(1))


def test_where_the_status_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(command: str, out: object, **more: Any) -> Path | None:
        return status_path(command, SimpleNamespace(out=out, **{"worker": None, "saes": (), **more}))

    assert of("train", "saes/") == Path("saes/status.json")
    assert of("analyze", "saes/") is None
    assert of("run", Path("demo")) == Path("demo/status.json")
    assert of("contexts", "saes", saes=(str(tmp_path),)) == tmp_path / "status.json"
    assert of("contexts", "saes", saes=("user/repo",)) == Path("saes/status.json")
    assert of("train", "s3://bucket/saes") is None
    assert of("harvest", "s3://bucket/shards") is None
    assert of("harvest", f"{tmp_path}/shards/") == tmp_path / "shards.status.json"
    assert of("harvest", tmp_path / "shards", worker=3) == tmp_path / "shards.status-3.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert of("harvest", "shards") == Path("shards.status-1.json").absolute()
    assert of("harvest", "shards", worker=0) == Path("shards.status-0.json").absolute()
    assert of("train", "saes") is None  # the first of torchrun's processes reports for all
    assert watched_file(Watch(quiet=True, status=tmp_path / "mine.json"), tmp_path) == {"mine.json"}


def watched_file(watch: Watch, folder: Path) -> set[str]:
    with watched(watch, "train", folder / "status.json") as report:
        report(step(1))
    return {path.name for path in folder.iterdir()}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_harvest_and_train_keep_a_status_and_the_cache_stays_a_zarr_group(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    shards, saes = tmp_path / "shards", tmp_path / "saes"
    harvest = ("harvest", "--model", tiny_model, "--data", tiny_corpus, "--tokens", "2k", "--context", "16")
    result = invoke(*harvest, "--shard-tokens", "512", "--device", "cpu", "--out", shards)
    assert result.exit_code == 0, result.output
    found = status(tmp_path / "shards.status.json")
    assert (found["state"], found["stage"], found["command"]) == ("finished", "harvest", "harvest")
    assert found["done"] == found["total"] > 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "shard-00000" in list(zarr.open_group(shards, mode="r").keys())
    mine = tmp_path / "mine.json"
    train = ("train", "--cache", shards, *SMALL, "--out", saes)
    assert invoke(*train, "--name", "a").exit_code == 0
    assert status(saes / "status.json")["state"] == "finished"
    assert invoke(*train, "--name", "b", "--status", mine).exit_code == 0
    assert (status(mine)["command"], status(mine)["done"]) == ("train", status(mine)["total"])
    nowhere = invoke(*train, "--name", "c", "--status", tmp_path / "none" / "s.json")
    assert (nowhere.exit_code, "there is no folder" in nowhere.stderr) == (2, True)


# ------------------------------------------------------------------------------------------------------ SIGTERM


def test_sigterm_ends_a_command_that_keeps_nothing_with_143_and_a_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def terminated(settings: object, report: Any) -> None:
        report(step(1))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr("routesae.analyze.scores.run.analyze", terminated)
    before = signal.getsignal(signal.SIGTERM)
    result = invoke("analyze", "--status", tmp_path / "status.json")
    assert result.exit_code == 143
    assert result.stderr.startswith("routesae: stopped by SIGTERM")
    assert status(tmp_path / "status.json")["state"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_library_swallows_terminated() -> None:
    assert not issubclass(Terminated, Exception)
