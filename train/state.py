"""Checkpoints of a pass: its trainees in; folders from which exactly the same run goes on, out.

    saes/.NAME.partial/               an SAE in training; renamed to saes/NAME when it is done
      metrics.jsonl
      step-00000400/                  written under a dot-name, fsynced, renamed
        state.safetensors             weights, Adam's moments, dead-latent counters, log sums
        state.json                    step, what must not change, where metrics.jsonl stood; checksums of both files

Every SAE of a pass is checkpointed at the same steps, and a pass goes on from the newest step that all of them have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from routesae.harvest.cache.arrays import fsync, fsync_tree
from routesae.machine.files import BadFile, read_json
from routesae.reporting import FailedRun, WrongInput
from routesae.train.ranks.distributed import whole
from routesae.train.trainee import Trainee

STATE, FACTS = "state.safetensors", "state.json"
COUNTS = ("step", "metrics_bytes", "tokens_done", "log_steps", "log_tokens")
FACT_NAMES = {*COUNTS, "identity", "scale", "tensors_hash", "facts_hash"}


def partial_folder(folder: Path) -> Path:
    """Where the SAE that will be `folder` is while it is trained."""
    return folder.with_name(f".{folder.name}.partial")


def save_checkpoint(trainees: Sequence[Trainee], step: int, identities: Sequence[Mapping[str, Any]]) -> None:
    """Write step `step` of all trainees, then delete older ones. identities: what must be the same to go on."""
    for trainee, identity in zip(trainees, identities, strict=True):
        # Gathered on every rank where each holds a part. Cloned: safetensors refuses names that share memory.
        tensors = {name: whole(tensor).detach().cpu().clone() for name, tensor in trainee.tensors().items()}
        if not trainee.ranks.first:
            continue
        target = trainee.folder / f"step-{step:08d}"
        writing = trainee.folder / f".{target.name}"
        shutil.rmtree(writing, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        writing.mkdir()
        save_file(tensors, writing / STATE)
        facts = {"step": step, "identity": identity, **trainee.facts(), "tensors_hash": _file_hash(writing / STATE)}
        (writing / FACTS).write_text(json.dumps({**facts, "facts_hash": hash_of_facts(facts)}, indent=1) + "\n")
        fsync_tree(writing)
        writing.rename(target)
        fsync(trainee.folder)
    for trainee in trainees if trainees[0].ranks.first else []:
        for old in _steps(trainee.folder):
            if old != step:
                shutil.rmtree(trainee.folder / f"step-{old:08d}")


def _steps(folder: Path) -> set[int]:
    return {int(path.name[5:]) for path in folder.glob("step-[0-9]*") if path.is_dir() and path.name[5:].isdigit()}


def newest_step(folders: Sequence[Path]) -> int:
    """The newest step that every folder has a checkpoint of; 0 where there is none."""
    return max(set.intersection(*(_steps(folder) for folder in folders)), default=0)


def read_facts(folder: Path, step: int) -> dict[str, Any]:
    """state.json. Raises FailedRun where it cannot be read or is not as it was written."""
    path = folder / f"step-{step:08d}" / FACTS
    try:
        facts: dict[str, Any] = read_json(path)
    except (OSError, BadFile) as error:
        raise FailedRun(f"{path} cannot be read ({error}); {_remedy(folder)}") from error
    counts = [facts.get(name) for name in COUNTS] if isinstance(facts, dict) else [None]
    if (
        not all(type(count) is int and count >= 0 for count in counts)
        or not set(facts) >= FACT_NAMES
        or type(facts["scale"]) not in (float, int)
        or not isinstance(facts["identity"], dict)
        or facts["step"] != step
    ):
        raise FailedRun(f"{path} is not the state of a run at step {step}; {_remedy(folder)}")
    if facts.pop("facts_hash") != hash_of_facts(facts):
        raise FailedRun(f"{path} was altered: its checksum differs; {_remedy(folder)}")
    return facts


def load_checkpoint(trainee: Trainee, step: int, facts: Mapping[str, Any]) -> None:
    """Make the trainee what it was after `step`. Raises FailedRun where its checkpoint is damaged."""
    path = trainee.folder / f"step-{step:08d}" / STATE
    try:
        if _file_hash(path) != facts["tensors_hash"]:
            raise FailedRun(f"{path} was altered: its checksum differs; {_remedy(trainee.folder)}")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FailedRun(f"{path} cannot be read ({error}); {_remedy(trainee.folder)}") from error
    trainee.load_tensors(tensors)
    trainee.log.load_facts(dict(facts))
    trainee.scale = facts["scale"]


def _remedy(folder: Path) -> str:
    return f"delete {folder} and start again"


def _file_hash(path: Path) -> str:
    """xxh3-64 of a file's bytes."""
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            hasher.update(piece)
    return hasher.hexdigest()


def hash_of_facts(facts: Mapping[str, Any]) -> str:
    """xxh3-64 of what state.json says, however it is spaced."""
    plain = json.loads(json.dumps(facts))  # as it will be read back: tuples as lists, all keys text
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def require_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises WrongInput naming every setting in which a run differs from its checkpoint."""
    before, after = _flat(then), _flat(json.loads(json.dumps(now)))
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


def drop_checkpoints(folder: Path) -> None:
    """What a finished SAE no longer needs."""
    for step in _steps(folder):
        shutil.rmtree(folder / f"step-{step:08d}")
    for half in folder.glob(".step-*"):  # of a run killed while it wrote one
        shutil.rmtree(half)
