"""Checkpoints: everything a stopped run needs to go on exactly as if it had not been stopped.

    saes/.NAME.partial/           an SAE in training; renamed to saes/NAME when it is finished
      metrics.jsonl
      step-00000400.safetensors   weights, Adam's moments, counters; in its metadata what must not change, how
                                sums are done (sparse/policy.py), and a hash

All SAEs of a pass are checkpointed at the same steps,
and the pass goes on from the newest step that all of them have.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from routesae.harvest.cache.arrays import fsync
from routesae.machine.files import BadFile, parse_json
from routesae.reporting import FailedRun, WrongInput
from routesae.train.folder.tensors import read_tensors, write_tensors
from routesae.train.sparse.policy import Arithmetic

FORMAT = "4"  # format 3 did not hold how sums are done


def checkpoint_file(partial: Path, step: int) -> Path:
    return partial / f"step-{step:08d}.safetensors"


def save_checkpoint(
    partial: Path, step: int, tensors: Mapping[str, Tensor], identity: Mapping[str, Any], arithmetic: Arithmetic
) -> None:
    """Write a checkpoint of one SAE. tensors: on any device. identity: what must not change. Raises OSError."""
    partial.mkdir(parents=True, exist_ok=True)
    facts = {"identity": identity, "arithmetic": arithmetic.to_dict()}
    metadata = {"format": FORMAT, "step": str(step), **{name: json.dumps(value) for name, value in facts.items()}}
    write_tensors(checkpoint_file(partial, step), tensors, metadata)
    fsync(partial)


def load_checkpoint(partial: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any], Arithmetic]:
    """Return the tensors, the identity and the arithmetic of a checkpoint. Raises FailedRun if it is damaged."""
    path, remedy = checkpoint_file(partial, step), f"delete {partial} and start again"
    try:
        tensors, metadata, _ = read_tensors(path)
        if (metadata.get("format"), metadata.get("step")) != (FORMAT, str(step)):
            raise FailedRun(f"{path} is not a checkpoint of step {step} in format {FORMAT}; {remedy}")
        facts = {name: parse_json(metadata.get(name, "{}").encode()) for name in ("identity", "arithmetic")}
        return tensors, facts["identity"], Arithmetic(**facts["arithmetic"])
    except (OSError, BadFile, TypeError, WrongInput) as error:
        raise FailedRun(f"{path} cannot be read ({error}); {remedy}") from error


def newest_step(partials: Sequence[Path]) -> int:
    """The newest step that every folder has a checkpoint of, or 0."""
    names = ([path.name[5:-12] for path in partial.glob("step-*.safetensors")] for partial in partials)
    return max(set.intersection(*({int(name) for name in of if name.isdigit()} for of in names)), default=0)


def drop_checkpoints(folder: Path, but: int | None = None) -> None:
    """Delete the checkpoints in `folder`, half-written ones too, except that of step `but`."""
    for path in [*folder.glob("step-*.safetensors"), *folder.glob(".step-*.safetensors")]:
        if but is None or path != checkpoint_file(folder, but):
            path.unlink()


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
