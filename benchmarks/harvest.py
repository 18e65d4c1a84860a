"""What harvest costs beside the LM it runs, and what its writer costs beside plain file writes.

    python benchmarks/harvest.py --rounds 7

The LM: tokens/s of `harvest_shards` (hidden states taken, checked, shuffled, hashed and written) over tokens/s of
the bare forward pass, cut after the same layer, over the same rows in the same batches. The writer: bytes/s of
`write_shard` over bytes/s of open, write and fsync of files as many and as long, on the same disk. Both interleaved
in one process; medians over rounds and of the ratios of each round, with their range. The process is set up as
`routesae harvest` sets up its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported, as the command line has it

import numpy as np
import torch

from routesae.harvest.cache.arrays import Array
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import Manifest, ShardRecord, shard_name, shard_order
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.harvest.filling.begin import open_or_begin
from routesae.harvest.filling.output import Output
from routesae.harvest.filling.shards import harvest_shards
from routesae.harvest.lm import model as lm
from routesae.harvest.lm.passes import run_until
from routesae.harvest.settings import HarvestSettings
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.reporting import silent
from routesae.tests.shards import NO_STATISTICS, float_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=4, help="Of a round of the LM.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--shard-tokens", type=int, default=4096, help="Of the LM's rounds.")
    parser.add_argument("--writer-tokens", type=int, default=32_768, help="Of the shard that the writer writes.")
    parser.add_argument("--layers", help="Such as 15 or 7-22; the middle half if absent.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lm-dtype", default="auto")
    parser.add_argument(
        "--folder", default=None, help="On the disk to write to; the system's temporary one if absent."
    )
    parser.add_argument("--only", choices=("lm", "writer"))
    args = parser.parse_args()
    settings = HarvestSettings(
        model=args.model,
        data=args.data,
        context=args.context,
        tokens=args.shard_tokens * args.shards,
        shard_tokens=args.shard_tokens,
        layers=args.layers,
        device=args.device,
        lm_dtype=args.lm_dtype,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        settings = HarvestSettings(**{**vars(settings), "out": str(Path(folder, "shards"))})
        device = pick_device(settings.device)
        lm_dtype = pick_lm_dtype(settings.lm_dtype, device)
        with Claims(Path(settings.out)) as claims:
            config = lm.load_config(settings.model)
            cache = open_or_begin(Output(settings.out), settings, config, lm_dtype, claims, silent, prove)
        print(f"{device}, {lm_dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        if args.only != "writer":
            beside_the_lm(cache, settings, device, args.rounds)
        if args.only != "lm":
            beside_plain_writes(Path(folder), cache.manifest, args.writer_tokens, args.rounds)


def prove(*_: object) -> dict[str, Any]:
    return {"hidden_states_offset": 0, "weights_hash": "x", "exact_weights_hash": "x"}


def beside_the_lm(cache: Cache, settings: HarvestSettings, device: torch.device, rounds: int) -> None:
    manifest = cache.manifest
    model = lm.load_lm(settings.model, device=device, lm_dtype=manifest.lm_dtype)
    model = lm.cut_after(model, manifest.layers[-1])
    shards = list(range(manifest.shard_count))

    def harvested() -> None:
        with Claims(cache.path) as claims:
            harvest_shards(Output(settings.out), cache, model, claims, settings, silent)

    def clear() -> None:
        for index in shards:
            shutil.rmtree(cache.path / shard_name(index), ignore_errors=True)

    batch = settings.batch_sequences or 8
    rows_ST = torch.from_numpy(np.array(cache.tokens())).long().to(device)

    def bare() -> None:
        for index in shards:
            first, after = manifest.shard_range(index)
            for start in range(first, after, batch):
                run_until(model, rows_ST[start : min(after, start + batch)], manifest.layers[-1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    compare("harvest", harvested, "bare forward", bare, rows_ST.numel(), "tokens", rounds, clear)


def beside_plain_writes(folder: Path, manifest: Manifest, tokens: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    rows = tokens // manifest.context
    manifest = Manifest(**{**manifest.to_dict(), "shard_rows": rows, "rows": rows})
    token_ids_sT = rng.integers(100, 1000, (rows, manifest.context)).astype(np.int32)
    order = shard_order(manifest.kept(token_ids_sT, np.zeros(token_ids_sT.shape, np.uint8)), manifest, 0)
    hidden_nD = rng.standard_normal((len(order), manifest.width), np.float32).astype(manifest.dtype)
    hidden = [(layer, hidden_nD + hidden_nD.dtype.type(layer)) for layer in manifest.layers]
    arrays = list(float_shard(token_ids_sT, order, hidden))
    everything = [array for _, array in arrays]

    def record(hashes: dict[str, str]) -> ShardRecord:
        return ShardRecord(
            index=0,
            rows=(0, rows),
            kept=len(order),
            weights_hash=manifest.exact_weights_hash,
            batch_sequences=8,
            statistics={str(layer): NO_STATISTICS for layer in manifest.layers},
            hashes=hashes,
        )

    def written() -> None:
        write_shard(folder, manifest, 0, arrays, record)

    def plain() -> None:
        (folder / "plain").mkdir()
        for at, array in enumerate(everything):
            plain_write(folder / "plain" / str(at), array)

    def clear() -> None:
        shutil.rmtree(folder / shard_name(0), ignore_errors=True)
        shutil.rmtree(folder / "plain", ignore_errors=True)

    nbytes = sum(array.nbytes for array in everything)
    compare("write_shard", written, "plain writes", plain, nbytes, "bytes", rounds, clear)


def plain_write(path: Path, array: Array) -> None:
    with path.open("wb", buffering=0) as file:
        view = array.reshape(-1).view(np.uint8).data
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def compare(
    name: str,
    ours: Callable[[], None],
    bare_name: str,
    bare: Callable[[], None],
    amount: int,
    unit: str,
    rounds: int,
    clear: Callable[[], None] = lambda: None,
) -> None:
    """Time both once a round, first one first and then the other, after a round that does not count."""
    ours_seconds, bare_seconds = list[float](), list[float]()
    system: dict[str, list[float]] = {name: [], bare_name: []}
    for round_ in range(rounds + 1):
        pairs = [(name, ours, ours_seconds), (bare_name, bare, bare_seconds)]
        for which, run, seconds in pairs if round_ % 2 else reversed(pairs):
            clear()
            before = resource.getrusage(resource.RUSAGE_SELF)
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_SELF)
            used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            system[which].append((after.ru_stime - before.ru_stime) / max(used, 1e-9))
    clear()
    for which, seconds in ((name, ours_seconds), (bare_name, bare_seconds)):
        rate, kernel = amount / statistics.median(seconds[1:]), statistics.median(system[which][1:])
        print(f"{which:14} {rate:14,.0f} {unit}/s, {kernel:.0%} of its CPU time in the kernel")
    ratios = sorted(theirs / own for own, theirs in zip(ours_seconds[1:], bare_seconds[1:], strict=True))
    print(f"{name} / {bare_name}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
