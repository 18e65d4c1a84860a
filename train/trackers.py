"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

Each is an extra of its own, imported only when asked for. Offline modes are the trackers' own: WANDB_MODE=offline for
Weights & Biases; TensorBoard and Trackio write to this machine anyway.
"""

import contextlib
import contextvars
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from routesae.machine.files import read_bytes, reading, replacing
from routesae.reporting import WrongInput

PROJECT = "routesae"


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, nested ones by path: layer_shares/15."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value))
        elif name != "step":
            yield name, float(value)


class TensorBoard:
    """Writes event files in the SAE's own folder, under tensorboard/."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], project: str):
        self.folder, self.settings = folder / "tensorboard", settings
        self.writer: Any = None  # a SummaryWriter, once there is something to write

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A killed run may have written lines after its checkpoint; they come again and must not count twice.
            self.writer = SummaryWriter(str(self.folder), purge_step=step if "loss" in line else None)
            self.writer.add_text("settings", str(dict(self.settings)))
        for name, value in scalars(line):
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Hosted:
    """Weights & Biases, or Trackio, which has the same interface: one run an SAE, continued when the SAE is.

    The run's id is kept beside metrics.jsonl for that.
    """

    def __init__(self, module: str, name: str, folder: Path, settings: Mapping[str, Any], project: str):
        tracker, id_file = importlib.import_module(module), folder / f"{module}-run"
        options: dict[str, Any] = {"project": project, "name": name, "config": dict(settings)}
        options["resume"] = "allow" if id_file.exists() else "never"
        if module == "wandb":
            options |= {"dir": str(folder), "reinit": "create_new"}
            options |= {"id": _read_id(id_file)} if id_file.exists() else {}
        try:
            # Trackio's init ends the run that its context knows of, but the SAEs of a pass each have one.
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                self.run = contextvars.copy_context().run(partial(tracker.init, **options))
        except (OSError, RuntimeError, ValueError, getattr(tracker, "Error", ValueError)) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise WrongInput(f"--log {module} cannot begin a run: {reason}") from error
        with replacing(id_file) as file:
            file.write(f"{self.run.id}\n".encode())

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        self.run.log(dict(scalars(line)), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


def _read_id(file: Path) -> str:
    with reading(file, "delete it to begin another run"):
        if not re.fullmatch(r"[\w.-]{1,128}", run := read_bytes(file, 1024).decode("ascii").strip()):
            raise ValueError("it does not hold the id of a run")
        return run


Tracker = TensorBoard | Hosted  # takes the lines of one run
TRACKERS: dict[str, Callable[[str, Path, Mapping[str, Any], str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Hosted, "wandb"),
    "trackio": partial(Hosted, "trackio"),
}


def open_trackers(
    names: tuple[str, ...], run: str, folder: Path, settings: Mapping[str, Any], project: str | None
) -> list[Tracker]:
    """Open the trackers named, for one run; those that write files here write them under `folder`."""
    project = project or os.environ.get("WANDB_PROJECT") or PROJECT
    return [TRACKERS[name](run, folder, settings, project) for name in names]
