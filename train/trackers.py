"""Experiment trackers beside metrics.jsonl: the lines of a run in; TensorBoard, Weights & Biases or Trackio out.

Each is an extra of its own and imported only when asked for. Offline modes are the trackers' own: WANDB_MODE=offline
for Weights & Biases; TensorBoard and Trackio write to this machine anyway.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from routesae.reporting import WrongInput

PROJECT = "routesae"


class Tracker(Protocol):
    """Takes the lines of one run."""

    def log(self, step: int, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, nested ones by path: layer_shares/15."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value))
        elif name != "step":
            yield name, float(value)


class TensorBoard:
    """Event files in the SAE's own folder, under tensorboard/."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("settings", str(dict(settings)))

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line):
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """Weights & Biases, or Trackio, which has the same interface: one run an SAE, resumed under the same id."""

    def __init__(self, module: str, name: str, folder: Path, settings: Mapping[str, Any]):
        tracker = importlib.import_module(module)
        extra = {"dir": str(folder), "reinit": "create_new"} if module == "wandb" else {}
        self.run = tracker.init(project=PROJECT, name=name, config=dict(settings), **extra)

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        self.run.log(dict(scalars(line)), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, tuple[str, Callable[[str, Path, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", lambda *arguments: Hosted("wandb", *arguments)),
    "trackio": ("trackio", lambda *arguments: Hosted("trackio", *arguments)),
}


def require_trackers(names: tuple[str, ...]) -> None:
    """Raises WrongInput for a tracker that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise WrongInput(f"--log {name!r} is none of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise WrongInput(f"--log {name} needs the package {TRACKERS[name][0]}: pip install 'routesae[{name}]'")


def open_trackers(names: tuple[str, ...], run: str, folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """A tracker of each name for one run, whose files go under `folder` where it writes any there."""
    return [TRACKERS[name][1](run, folder, settings) for name in names]
