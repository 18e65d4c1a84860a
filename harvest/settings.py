"""What `routesae harvest` was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from routesae.harvest.cache.manifest import DTYPES, OVERFLOWS
from routesae.reporting import WrongInput


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of how many workers one is. Raises WrongInput where there is no such worker."""

    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise WrongInput(f"--workers {self.workers} is below 1")
        if not 0 <= self.worker < self.workers:
            raise WrongInput(
                f"--worker {self.worker} is not one of 0 to {self.workers - 1} (--workers {self.workers})"
            )

    def __str__(self) -> str:
        return f"{self.worker} of 0-{self.workers - 1}"

    def order(self, shards: Iterable[int]) -> list[int]:
        """Its own shards first, those of the worker after it next, and so on."""
        return sorted(shards, key=lambda index: ((index - self.worker) % self.workers, index))


@dataclass(frozen=True, kw_only=True)
class HarvestSettings:
    """What `routesae harvest` was asked for. Raises WrongInput where a value is impossible."""

    model: str = "meta-llama/Llama-3.2-1B"
    data: str = "Skylion007/openwebtext"
    split: str = "train"
    text_field: str = "text"
    min_chars: int = 100
    layers: str | None = None
    """"4-12" or "4,8,12"; None for n//4 … 3n//4."""
    tokens: int = 10_000_000
    context: int = 512
    shard_tokens: int = 65_536
    batch_sequences: int | None = None
    """Rows a forward pass; None for 8 on a CPU and what fits, from 64 down, on CUDA."""
    dtype: str = "float16"
    overflow: str = "error"
    skip_positions: int = 1
    keep_special: bool = False
    seed: int = 0
    device: str = "auto"
    lm_dtype: str = "auto"
    worker: int | None = None
    """Which of `workers` this is, from 0: it takes shards worker, worker + workers, … first, then what is left."""
    workers: int | None = None
    out: str = "shards"

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 1),
            ("context", 2),
            ("shard_tokens", 1),
            ("min_chars", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise WrongInput(f"--{name.replace('_', '-')} {getattr(self, name)} is below {least}")
        if self.batch_sequences is not None and self.batch_sequences < 1:
            raise WrongInput(f"--batch-sequences {self.batch_sequences} is below 1")
        if not 0 <= self.skip_positions < self.context:
            raise WrongInput(f"--skip-positions {self.skip_positions} leaves nothing of --context {self.context}")
        if (self.worker is None) != (self.workers is None):
            raise WrongInput("--worker and --workers go together, such as --worker 0 --workers 8")
        if self.worker is not None and self.workers is not None:
            Share(worker=self.worker, workers=self.workers)
        for name, known in (
            ("dtype", DTYPES),
            ("overflow", OVERFLOWS),
        ):
            if getattr(self, name) not in known:
                raise WrongInput(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.tokens < self.context:
            raise WrongInput(f"--tokens {self.tokens} is less than one row of --context {self.context}")


def parse_layers(layers: str | None, depth: int) -> tuple[int, ...]:
    """The list "4-12", "4,8,12" or "4-6,12" as ascending layers of a model of `depth` blocks; None: n//4 … 3n//4."""
    if layers is None:
        return tuple(range(max(1, depth // 4), max(1, 3 * depth // 4) + 1))
    wanted: set[int] = set()
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise WrongInput(f"--layers {layers!r} is not a list such as 4-12 or 4,8,12")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise WrongInput(f"--layers {layers!r}: {part.strip()} runs backwards")
        if low < 1 or high > depth:
            raise WrongInput(f"--layers {layers!r}: the model has layers 1 to {depth}")
        wanted.update(range(low, high + 1))
    return tuple(sorted(wanted))


def share_of(settings: HarvestSettings) -> Share:
    """What --worker and --workers say; without them, what torchrun's RANK and WORLD_SIZE do; else one alone."""
    if settings.worker is not None and settings.workers is not None:
        return Share(worker=settings.worker, workers=settings.workers)
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world is None:
        return Share()
    try:
        return Share(worker=int(rank), workers=int(world))
    except ValueError as error:
        raise WrongInput(
            f"RANK={rank} and WORLD_SIZE={world} of the environment name no worker ({error}); "
            "unset them, or give --worker and --workers"
        ) from None
