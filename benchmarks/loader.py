"""What the loader gives beside what the disk and the memory give.

    python benchmarks/loader.py --folder DIR

In DIR it makes two caches of 2.4 GB of width 2048 (one layer, nine layers), and deletes them. Per round, interleaved:

cold  the files are dropped from the page cache (mincore says whether they are); then bytes/s of the loader over its
      selection, and of reading the same files one after another, 8 MiB at a time, plainly and with O_DIRECT.
warm  the files are in the page cache; bytes/s of the loader, and of copies out of mappings that stay open: a memcpy
      of float16; a memcpy and then a cast to float32; and both in one pass. The loader's batches are cast for the
      latter two. Copies and casts use --threads of torch's; the loader has its two threads beside them.

Medians over rounds of bytes/s (of float16) and of the ratio within each round, with its range.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from synthetic import drop_from_page_cache, synthetic_cache

from routesae.harvest.cache.arrays import data_file
from routesae.harvest.cache.manifest import layer_name
from routesae.harvest.cache.reader import Cache
from routesae.train.loading.batches import Selection, epoch_plans, load

CPU = torch.device("cpu")
WIDTH = 2048
READ_BYTES = 8 << 20
WARM_EPOCHS = 3
Measure = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="On the disk to measure.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--gigabytes", type=float, default=2.4, help="Of a cache.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch's, in copies and casts.")
    parser.add_argument("--only", choices=("cold", "warm"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for layers in (1, 9):
        tokens = int(args.gigabytes * 1e9 / layers / WIDTH / 2)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder, "shards")
            cache = synthetic_cache(path, layers=layers, tokens=tokens, shard_tokens=16_384, width=WIDTH)
            subject = Subject(cache, args.batch_tokens)
            print(f"{layers} layer(s), {subject.bytes / 1e9:.2f} GB an epoch, batches of {args.batch_tokens} tokens")
            if args.only != "warm":
                seconds = measure(subject.cold(), args.rounds)
                show(seconds, subject.bytes, {"loader": ("read in order", "read with O_DIRECT")})
            if args.only != "cold":
                seconds = measure(subject.warm(), args.rounds)
                beside = {"loader, warm": ("memcpy",), "loader and cast": ("memcpy, then cast", "cast of mapped")}
                show(seconds, subject.bytes, beside)


class Subject:
    """All rows of all layers of a cache, and the ways to read them. Each measure gives seconds."""

    def __init__(self, cache: Cache, batch_tokens: int):
        self.batch_tokens = batch_tokens
        # Whole shards: of a cache this small the held-out boundary would cut a far larger share of them in two.
        self.selection = Selection(cache, 0, cache.manifest.rows, cache.manifest.layers)
        self.epoch = 0
        self.bytes = len(self.selection) * cache.manifest.token_bytes
        shards, layers = list(self.selection.shards.values()), self.selection.layers
        self.layer_files = [data_file(shard.path / layer_name(layer), 2) for layer in layers for shard in shards]
        names = ("token_mean", "token_std")
        self.files = self.layer_files + [data_file(shard.path / name, 2) for shard in shards for name in names]

    def cold(self) -> dict[str, Measure]:
        def dropped(measured: Measure) -> Measure:
            def run() -> float:
                drop_from_page_cache(self.files)
                return measured()

            return run

        return {
            "read in order": dropped(lambda: self.read_in_order(os.O_RDONLY)),
            "loader": dropped(lambda: self.load(cast=False)),
            "read with O_DIRECT": dropped(lambda: self.read_in_order(os.O_RDONLY | os.O_DIRECT)),
        }

    def warm(self) -> dict[str, Measure]:
        self.read_in_order(os.O_RDONLY)
        width = self.selection.cache.manifest.width
        maps = [np.memmap(file, "<f2", "c") for file in self.layer_files]  # "c": torch warns of read-only memory
        rows = [torch.from_numpy(of[: len(of) // width * width].reshape(-1, width)) for of in maps]
        staging_nD = torch.zeros(self.batch_tokens, width, dtype=torch.float16)
        out_nD = torch.zeros(self.batch_tokens, width)
        copies: dict[str, Callable[[torch.Tensor, int], object]] = {
            "memcpy": lambda piece_nD, n: staging_nD[:n].copy_(piece_nD),
            "memcpy, then cast": lambda piece_nD, n: out_nD[:n].copy_(staging_nD[:n].copy_(piece_nD)),
            "cast of mapped": lambda piece_nD, n: out_nD[:n].copy_(piece_nD),
        }
        measures: dict[str, Measure] = {
            "loader, warm": lambda: self.load(cast=False, epochs=WARM_EPOCHS),
            "loader and cast": lambda: self.load(cast=True, epochs=WARM_EPOCHS),
        }
        for name, copy in copies.items():
            measures[name] = lambda copy=copy: self.copy_mapped(rows, copy)  # type: ignore[misc]
        for measured in measures.values():  # pages are mapped, and staging touched, before the clock runs
            measured()
        return measures

    def load(self, *, cast: bool, epochs: int = 1) -> float:
        """Seconds an epoch, each in an order of its own; what the loader needs to begin is among them."""
        epochs_then, self.epoch = self.epoch, self.epoch + epochs
        order = (
            epoch_plans(self.selection, seed=0, epoch=epoch, batch_tokens=self.batch_tokens)
            for epoch in range(epochs_then, self.epoch)
        )
        layers, width = len(self.selection.layers), self.selection.cache.manifest.width
        out_LND = torch.zeros(layers, self.batch_tokens if cast else 0, width)
        began = time.perf_counter()
        with closing(load(self.selection, chain.from_iterable(order), self.batch_tokens, CPU)) as batches:
            for batch in batches:
                if cast:
                    out_LND[:, : batch.hidden_LND.shape[1]].copy_(batch.hidden_LND)
        return (time.perf_counter() - began) / epochs

    def read_in_order(self, flags: int) -> float:
        """Seconds for as many bytes as an epoch has."""
        buffer = mmap.mmap(-1, READ_BYTES)  # page-aligned, which O_DIRECT wants
        began, done = time.perf_counter(), 0
        for file in self.layer_files:
            descriptor = os.open(file, flags)
            if not flags & os.O_DIRECT:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while read := os.readv(descriptor, [buffer]):
                done += read
            os.close(descriptor)
        return (time.perf_counter() - began) * self.bytes / done

    def copy_mapped(self, rows: list[torch.Tensor], copy: Callable[[torch.Tensor, int], object]) -> float:
        began, done = time.perf_counter(), 0
        for mapped_nD in rows:
            for piece_nD in mapped_nD.split(self.batch_tokens):
                copy(piece_nD, len(piece_nD))
                done += piece_nD.nbytes
        return (time.perf_counter() - began) * self.bytes / done


def measure(measures: dict[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measured in measures.items():
            seconds[name].append(measured())
    return seconds


def show(seconds: dict[str, list[float]], epoch_bytes: int, beside: dict[str, tuple[str, ...]]) -> None:
    for name, of in seconds.items():
        print(f"  {name:20} {epoch_bytes / statistics.median(of) / 1e6:7,.0f} MB/s")
    for name, others in beside.items():
        for other in others:
            ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[other], strict=True)]
            middle = statistics.median(ratios)
            print(f"  {name} / {other}: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
