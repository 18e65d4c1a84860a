"""Checkpoints: everything a stopped run needs to go on exactly as if it had not been stopped.

    saes/.NAME.partial/           an SAE in training; renamed to saes/NAME when it is finished
      metrics.jsonl
      step-00000400.safetensors   weights, Adam's moments, counters; in its metadata what must not change, a checksum

A checkpoint is written under a dot-name, fsynced and renamed. All SAEs of a pass are checkpointed at the same steps,
and the pass goes on from the newest step that all of them have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from routesae.harvest.cache.arrays import fsync
from routesae.machine.files import BadFile, parse_json
from routesae.reporting import FailedRun, WrongInput

FORMAT = "2"  # format 1 was a folder a step


def partial_folder(folder: Path) -> Path:
    """Where the SAE that becomes `folder` is while it is trained."""
    return folder.with_name(f".{folder.name}.partial")


def checkpoint_file(partial: Path, step: int) -> Path:
    return partial / f"step-{step:08d}.safetensors"


def save_checkpoint(partial: Path, step: int, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> None:
    """Write a checkpoint of one SAE. tensors: on the CPU, none sharing memory. identity: what must not change."""
    target = checkpoint_file(partial, step)
    writing = target.with_name(f".{target.name}")
    partial.mkdir(parents=True, exist_ok=True)
    text = json.dumps(identity)
    metadata = {"format": FORMAT, "step": str(step), "identity": text, "hash": _checksum(tensors, text)}
    save_file(dict(tensors), writing, metadata=metadata)
    fsync(writing)
    writing.rename(target)
    fsync(partial)


def load_checkpoint(partial: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the identity of a checkpoint. Raises FailedRun if it is damaged."""
    path, remedy = checkpoint_file(partial, step), f"delete {partial} and start again"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {"identity": "{}", **(file.metadata() or {})}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        identity = parse_json(metadata["identity"].encode())
    except (OSError, SafetensorError, BadFile) as error:
        raise FailedRun(f"{path} cannot be read ({error}); {remedy}") from error
    if (metadata.get("format"), metadata.get("step")) != (FORMAT, str(step)):
        raise FailedRun(f"{path} is not a checkpoint of step {step} in format {FORMAT}; {remedy}")
    if metadata.get("hash") != _checksum(tensors, metadata["identity"]):
        raise FailedRun(f"{path} was altered: its checksum differs; {remedy}")
    return tensors, identity


def newest_step(partials: Sequence[Path]) -> int:
    """The newest step that every folder has a checkpoint of, or 0. Raises WrongInput for an older format."""
    for old in (path for partial in partials for path in partial.glob("step-*") if path.is_dir()):
        raise WrongInput(f"{old} is a checkpoint of an older version; delete {old.parent} and start again")
    return max(set.intersection(*map(_steps, partials)), default=0)


def _steps(folder: Path) -> set[int]:
    names = (path.name[5:-12] for path in folder.glob("step-*.safetensors"))
    return {int(name) for name in names if name.isdigit()}


def drop_checkpoints(folder: Path, but: int | None = None) -> None:
    """Delete the checkpoints in `folder`, half-written ones too, except that of step `but`."""
    for path in [*folder.glob("step-*.safetensors"), *folder.glob(".step-*.safetensors")]:
        if but is None or path != checkpoint_file(folder, but):
            path.unlink()


def _checksum(tensors: Mapping[str, Tensor], identity: str) -> str:
    """xxh3-64 of everything a checkpoint holds."""
    hasher = xxhash.xxh3_64(identity.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().view(-1).view(uint8).numpy().data)
    return hasher.hexdigest()


def require_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises WrongInput naming the settings in which a run differs from the one it is to continue."""
    before, after = _flat(then), _flat(now)
    if differing := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        shown = ", ".join(f"{name} (was {before.get(name)}, now {after.get(name)})" for name in differing[:5])
        raise WrongInput(
            f"--resume: {folder.name} was begun with other settings: {shown}; give the same ones, or --overwrite"
        )


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {path: values}
    inner = [_flat(value, f"{path}.{name}" if path else name) for name, value in values.items()]
    return {name: value for flat in inner for name, value in flat.items()}
