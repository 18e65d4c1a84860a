"""Experiment trackers beside metrics.jsonl: the lines of a run in; TensorBoard, Weights & Biases or Trackio out.

Each is an extra of its own and imported only when asked for. Offline modes are the trackers' own: WANDB_MODE=offline
for Weights & Biases; TensorBoard and Trackio write to this machine anyway.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from routesae.reporting import WrongInput

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
        self.folder, self.settings = folder / "tensorboard", settings
        self.writer: SummaryWriter | None = None

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A killed run may have written lines after its checkpoint; they come again and must not count twice.
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            self.writer.add_text("settings", str(dict(self.settings)))
        for name, value in scalars(line):
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Hosted:
    """Weights & Biases, or Trackio, which has the same interface: one run an SAE, gone on with where the SAE is.

    The run's id is kept beside metrics.jsonl for that.
    """

    def __init__(self, module: str, name: str, folder: Path, settings: Mapping[str, Any]):
        tracker, begun = importlib.import_module(module), folder / f"{module}-run"
        options: dict[str, Any] = {"project": PROJECT, "name": name, "config": dict(settings)}
        options |= {"resume": "allow" if begun.exists() else "never"}
        if module == "wandb":
            options |= {"dir": str(folder), "reinit": "create_new"}
            options |= {"id": begun.read_text().strip()} if begun.exists() else {}
        try:
            # Trackio's init ends the run that its context knows of, and the SAEs of a pass each have one.
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                self.run = contextvars.copy_context().run(partial(tracker.init, **options))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise WrongInput(f"--log {module} cannot begin a run: {reason}") from error
        begun.write_text(f"{self.run.id}\n")

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        self.run.log(dict(scalars(line)), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
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
