"""`routesae run --follow`: harvest and training at once, as if one came after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from routesae.analyze.contexts.file import read_facts
from routesae.analyze.pipeline import together
from routesae.analyze.pipeline.run import PipelineResult, run_pipeline
from routesae.analyze.pipeline.settings import read_pipeline
from routesae.harvest.cache.reader import Cache
from routesae.harvest.settings import HarvestSettings
from routesae.machine.stop import Terminated
from routesae.reporting import FailedRun, Stopped, WrongInput
from routesae.tests.processes import server

STAGES = """
[train]
latents = 64
k = 8
batch-tokens = 400
window = 2
device = "cpu"
[[train.run]]
sae = "topk"
[[train.run]]
sae = "routesae"
[analyze]
metric = ["NormMSE"]
device = "cpu"
[contexts]
threshold = 0.5
device = "cpu"
"""


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process starts from one that has imported all of it."""
    context = server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda how: context)


@pytest.fixture(scope="module")
def config(
    tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A TOML file of all stages, with out beside it; more: lines of its [harvest]."""
    made, folder = tiny_settings(), tmp_path_factory.mktemp("together")

    def write(name: str, *more: str) -> Path:
        harvest = [f'model = "{made.model}"', f'data = "{made.data[0]}"', 'layers = "2-5"', 'lm-dtype = "float32"']
        harvest += ["tokens = 9000", "context = 16", "shard-tokens = 1024", 'device = "cpu"', *more]
        file = folder / f"{name}.toml"
        file.write_text("\n".join([f'out = "{folder / name}"', "[harvest]", *harvest, STAGES]))
        return file

    return write


def run(config: Path, *, follow: bool = True) -> PipelineResult:
    return run_pipeline(read_pipeline(str(config), follow))


def weights(config: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in config.with_suffix("").glob("saes/[!.]*/*.safetensors")}


@pytest.fixture(scope="module")
def expected(config: Callable[..., Path]) -> dict[str, bytes]:
    """The weights where training comes after the harvest."""
    plain = config("plain")
    run(plain, follow=False)
    assert len(weights(plain)) == 2
    return weights(plain)


def test_together_makes_what_one_after_the_other_makes_and_then_nothing(
    config: Callable[..., Path], expected: dict[str, bytes]
) -> None:
    ring = config("ring", "keep = 1_400_000")
    first = run(ring)
    assert all(first.stages.values())
    cache = Cache(ring.with_suffix("") / "shards")
    assert cache.ring() is not None
    assert sum(path.name.startswith("shard-") for path in Path(cache.path).iterdir()) == 1
    assert weights(ring) == expected
    again = run(ring)
    assert not any(again.stages.values())
    assert again.scores == first.scores
    facts = read_facts(first.saes[0], cache.manifest.tokens_hash)
    assert facts is not None
    assert facts["tokens"] == cache.kept(cache.manifest.train_rows, cache.manifest.rows).sum()


def test_sigterm_stops_both_and_the_same_command_goes_on(
    config: Callable[..., Path], expected: dict[str, bytes]
) -> None:
    file = config("stopped", "keep = 1_400_000")

    def stop() -> None:
        while not list(file.with_suffix("").glob("shards/shard-00002")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises((Stopped, Terminated)):
        run(file)
    stopper.join()
    assert multiprocessing.active_children() == []
    assert weights(file) == {}
    assert run(file).stages["train"]
    assert weights(file) == expected


def test_a_harvest_that_fails_ends_the_training_too(config: Callable[..., Path]) -> None:
    file = config("failing", "min-chars = 100_000")
    with pytest.raises(FailedRun, match="the harvest ended with exit code 1; begin both again"):
        run(file)
    assert weights(file) == {}


def test_what_cannot_run_together_is_refused(config: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"\[harvest\]: keep waits for the SAEs that are trained meanwhile"):
        read_pipeline(str(config("a", 'keep = "500G"')))
    for name in ("harvest_analyze", "harvest_contexts"):  # with or without --follow nobody would train on it
        (tmp_path / "a.toml").write_text(f'[harvest]\n[train]\n[{name}]\nkeep = "500G"\n')
        with pytest.raises(WrongInput, match=rf"\[{name}\]: keep waits .*; leave keep out"):
            read_pipeline(str(tmp_path / "a.toml"), True)
    (tmp_path / "b.toml").write_text("[train]\nlatents = 64\n")
    with pytest.raises(WrongInput, match=r"--follow trains while the harvest runs; give the file tables \[harvest\]"):
        read_pipeline(str(tmp_path / "b.toml"), True)


def test_of_several_gpus_the_harvest_gets_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []
    monkeypatch.setattr(together, "harvest", lambda _: found.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    for of, name in ((os, "setsid"), (together.ctypes, "CDLL")):
        monkeypatch.setattr(of, name, MagicMock())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for visible, device in ((None, "auto"), ("4,6,7", "auto"), ("4,6,7", "cuda:0")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        together._harvest(HarvestSettings(device=device))
    assert found == ["2", "7", "4,6,7"]
