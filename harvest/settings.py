"""What `routesae harvest` was asked for."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from routesae.machine.settings import KEPT, MODEL, RUN, SEED, LMSettings, setting
from routesae.reporting import WrongInput

PROVENANCE = ("data", "place")  # columns of documents.parquet that every cache has


class Share(NamedTuple):
    """Which of how many workers a process is."""

    worker: int = 0
    workers: int = 1

    def __str__(self) -> str:
        return f"{self.worker} of 0-{self.workers - 1}"

    def order(self, shards: Iterable[int]) -> list[int]:
        """Shards in the order this worker takes them: its own first, then those of the worker after it, and so on."""
        return sorted(shards, key=lambda index: ((index - self.worker) % self.workers, index))


class HarvestSettings(LMSettings):
    """Settings of one harvest. Raises WrongInput where a value is impossible."""

    model: str = setting("meta-llama/Llama-3.2-1B", MODEL, "Hub id, local folder, .gguf file, or demo.")
    data: tuple[str, ...] = setting(
        ("Skylion007/openwebtext",),
        MODEL,
        "A .txt, .parquet or .jsonl file (also .gz, .zst), a folder of them or of save_to_disk, a hub id, or demo.",
    )
    mix: tuple[float, ...] = setting(
        (), MODEL, "Share of the tokens from each --data.", metavar="X,X…", unset="all from one", gt=0
    )
    data_config: str | None = setting(
        None, MODEL, "Configuration of a hub dataset that has several.", metavar="NAME", unset="its default"
    )
    split: str = setting("train", MODEL, "Split of a hub dataset, or of a folder of save_to_disk.")
    text_field: str = setting(
        "text", MODEL, "Field of a text or messages; else messages, or chosen and rejected.", instead_of="token_field"
    )
    token_field: str | None = setting(
        None, MODEL, "Field of token ids, used as they are instead of a text.", metavar="TEXT", unset="texts are read"
    )
    min_chars: int = setting(100, MODEL, "Skip texts of fewer characters than this.", ge=0, instead_of="token_field")
    tokens: int = setting(10_000_000, MODEL, "Tokens of the corpus to run the LM on.", ge=1)
    context: int = setting(512, MODEL, "Tokens in a row, that is, a sequence of the LM.", ge=2)
    layers: str | None = setting(
        None, KEPT, 'Layers to keep, such as "4-12" or "4,8,12".', metavar="LIST", unset="n//4 to 3n//4"
    )
    held_out: float = setting(
        0.05, KEPT, "Share of the rows that train never reads; 1 for a cache to score on.", ge=0, le=1
    )
    keep_fields: tuple[str, ...] = setting(
        (), KEPT, "Fields of each document to keep beside where it came from.", commas=True, metavar="NAME,NAME…"
    )
    keep_roles: tuple[str, ...] = setting(
        (), KEPT, "Keep only tokens of messages of these roles.", commas=True, unset="all", metavar="NAME,NAME…"
    )
    dtype: str = setting(
        "float16",
        KEPT,
        "Numbers on disk; int8 halves float16's bytes, and cache info says what is lost.",
        choices=("float16", "float32", "int8"),
    )
    overflow: str = setting("error", KEPT, "What to do where dtype overflows.", choices=("error", "clip"))
    skip_positions: int = setting(
        1, KEPT, "Positions at the start of each row to leave out (the attention sink).", ge=0
    )
    keep_special: bool = setting(False, KEPT, "Keep the positions of special tokens too.")
    shard_tokens: int = setting(65_536, RUN, "Tokens in a shard; memory holds two shards.", ge=1)
    batch_sequences: int | None = setting(
        None, RUN, "Rows in a forward pass.", ge=1, unset="8 on a CPU, what fits on CUDA"
    )
    keep: int | None = setting(
        None,
        RUN,
        "Bytes of shards on the disk, such as 500G; those that train --follow has used go.",
        unset="all",
        ge=1,
    )
    seed: int = SEED
    worker: int | None = setting(
        None, RUN, "Number of this worker, from 0, of several that share the work.", unset="torchrun's RANK"
    )
    workers: int | None = setting(
        None, RUN, "How many workers share the work.", ge=1, unset="torchrun's WORLD_SIZE, else 1"
    )
    out: str = setting("shards", RUN, "Folder of the cache, or a URL: s3://bucket/shards.", metavar="PATH")

    @property
    def corpus(self) -> str:
        """What the manifest calls the corpus: the --data, of several with their shares."""
        mixed = [f"{share:g} {data}" for share, data in zip(self.mix, self.data, strict=False)]
        return " + ".join(mixed if len(self.data) > 1 else self.data)

    def check(self) -> None:
        vars(self)["data"] = tuple(dict.fromkeys(self.data))
        if len(self.data) != (len(self.mix) or 1):
            shares = f"{len(self.mix)} shares of --mix" if self.mix else "no --mix"
            several = f"{len(self.data)} different --data and {shares}"
            raise WrongInput(f"{several}; give a share for each, such as --mix 0.7,0.3")
        if taken := set(self.keep_fields) & set(PROVENANCE):
            raise WrongInput(f"--keep-fields {min(taken)} is the name of a column that every cache has; rename it")
        if self.keep is not None and "://" in self.out:
            raise WrongInput(f"--keep {self.keep} needs --out to be a folder on a disk; {self.out} keeps all shards")
        if self.skip_positions >= self.context:
            raise WrongInput(f"--skip-positions {self.skip_positions} leaves nothing of --context {self.context}")
        if (self.worker is None) != (self.workers is None):
            raise WrongInput("--worker and --workers go together, such as --worker 0 --workers 8")
        if self.worker is not None:
            share_of(self)
        if self.tokens < self.context:
            raise WrongInput(f"--tokens {self.tokens} is less than one row of --context {self.context}")


def parse_layers(layers: str | None, depth: int) -> tuple[int, ...]:
    """The list "4-12", "4,8,12" or "4-6,12" as ascending layers of a model of `depth` blocks; None: n//4 … 3n//4."""
    if layers is None:
        return tuple(range(max(1, depth // 4), max(1, 3 * depth // 4) + 1))
    chosen: set[int] = set()
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise WrongInput(f"--layers {layers!r} is not a list such as 4-12 or 4,8,12")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise WrongInput(f"--layers {layers!r}: {part.strip()} runs backwards")
        if low < 1 or high > depth:
            raise WrongInput(f"--layers {layers!r}: the model has layers 1 to {depth}")
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


def layer_list(layers: Sequence[int]) -> str:
    """Ascending layers as `parse_layers` reads them: "4-12", "4,8,12"."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda one: one[1] - one[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def share_of(settings: HarvestSettings) -> Share:
    """The share that --worker and --workers name, or torchrun's RANK and WORLD_SIZE, or else all of the work."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    share = Share(settings.worker or 0, settings.workers or 1)
    wrong = f"--worker {share.worker} is not one of 0 to {share.workers - 1} (--workers {share.workers})"
    if settings.worker is None and rank is not None and world is not None:
        share = Share(*(int(number) if number.isdecimal() else -1 for number in (rank, world)))
        wrong = f"RANK={rank} and WORLD_SIZE={world} name no worker; unset them, or give --worker and --workers"
    if not 0 <= share.worker < share.workers:
        raise WrongInput(wrong)
    return share
