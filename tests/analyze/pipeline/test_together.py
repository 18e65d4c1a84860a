"""`routesae run --follow`: harvest and training at once, as if one came after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from routesae.analyze.contexts.file import read_facts
from routesae.analyze.pipeline import together
from routesae.analyze.pipeline.run import PipelineResult, run_pipeline
from routesae.analyze.pipeline.settings import read_pipeline
from routesae.harvest.cache.reader import Cache
from routesae.harvest.settings import HarvestSettings
from routesae.machine.settings import by_field
from routesae.machine.stop import Terminated
from routesae.reporting import FailedRun, Stopped, WrongInput
from routesae.tests.processes import Command

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


class Forked(Command):
    """What subprocess.Popen would start, from a process that has imported all of it."""

    started: ClassVar[list[Forked]] = []

    def __init__(self, command: list[str], *, env: dict[str, str], start_new_session: bool):
        assert command[1:3] == ["-c", together.CHILD]
        super().__init__(*command[3:], cwd=Path.cwd(), environment=env)
        self.started.append(self)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


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
    return {file.parent.name: file.read_bytes() for file in config.with_suffix("").glob("saes/*/*.safetensors")}


@pytest.fixture(scope="module")
def expected(config: Callable[..., Path]) -> dict[str, bytes]:
    """The weights where training comes after the harvest."""
    plain = config("plain")
    run(plain, follow=False)
    assert len(weights(plain)) == 2
    return weights(plain)


def test_together_makes_what_one_after_the_other_makes_and_then_nothing(
    config: Callable[..., Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Forked)
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
    config: Callable[..., Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Forked)
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
    assert Forked.started[-1].returncode == 0
    assert weights(file) == {}
    assert run(file).stages["train"]
    assert weights(file) == expected


def test_a_harvest_that_fails_ends_the_training_too(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config("failing")
    monkeypatch.setattr(together, "CHILD", "import time; time.sleep(0.2); raise SystemExit(1)")
    with pytest.raises(FailedRun, match="the harvest beside this ended with exit code 1"):
        run(file)
    assert weights(file) == {}


def test_what_cannot_run_together_is_refused(config: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"\[harvest\]: keep waits for the SAEs that are trained meanwhile"):
        read_pipeline(str(config("a", 'keep = "500G"')))
    (tmp_path / "b.toml").write_text("[train]\nlatents = 64\n")
    with pytest.raises(WrongInput, match=r"--follow trains while the harvest runs; give the file tables \[harvest\]"):
        read_pipeline(str(tmp_path / "b.toml"), True)


def test_flags_say_what_settings_are(tiny_settings: Callable[..., HarvestSettings]) -> None:
    made = tiny_settings(keep="500G", keep_special=True, data=("a", "b"), mix="0.7,0.3", out="x y")
    pairs = [flag[2:].partition("=") for flag in made.to_flags()]
    given: dict[str, object] = {}
    for name, has_value, value in pairs:
        given[name] = [*given.get(name, []), value] if name == "data" else value if has_value else True  # type: ignore[misc]
    assert HarvestSettings(**by_field(given, "flags", HarvestSettings)) == made


def test_of_several_gpus_the_harvest_gets_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert together._environment(HarvestSettings())["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert together._environment(HarvestSettings())["CUDA_VISIBLE_DEVICES"] == "7"
    assert together._environment(HarvestSettings(device="cuda:0")) == dict(os.environ)
