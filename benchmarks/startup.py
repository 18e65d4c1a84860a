"""How long `train` takes to its first step on a cache of 100 GB in 3,001 shards, from the start of the process.

    python benchmarks/startup.py --folder DIR

The cache is a stand-in: every shard has folders and a record of its own, and its arrays are hard links to those of
one real shard, so that it has all the names, sizes, indexes and records of 100 GB and takes about 1.2 GB. The page
cache is warm with what was just written, as it is after a harvest; what a cold disk adds is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from routesae.harvest.cache.manifest import LayerStatistics, ShardRecord, shard_name, shard_order
from routesae.harvest.cache.writer import write_shard
from routesae.tests.shards import begin, change_attributes, float_shard

SHARDS, SHARD_ROWS, CONTEXT, WIDTH = 3001, 8, 129, 1024  # 1,024 kept tokens a shard, 2 MB a layer of it
LAYERS = tuple(range(4, 20))

# Runs `train` and ends with its first step; says when it had imported, opened the cache and come to the step.
CHILD = """
import json, os, sys, time
began = float(sys.argv[1])
marks = {}
from routesae.train import run
from routesae.train.settings import settings_of
from routesae.train.trainee import Trainee
marks["imported"] = time.time() - began
opened, step = run.Selection.__init__, Trainee.step
def open_and_mark(self, *args, **kwargs):
    opened(self, *args, **kwargs)
    marks.setdefault("opened", time.time() - began)
def step_and_end(self, *args, **kwargs):
    marks["first batch"] = time.time() - began
    step(self, *args, **kwargs)
    marks["first step"] = time.time() - began
    print(json.dumps(marks), flush=True)
    os._exit(0)
run.Selection.__init__, Trainee.step = open_and_mark, step_and_end
run.train(settings_of(json.loads(sys.argv[2])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="On the disk to write to; else the system's temporary one.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sae", default="topk")
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        began = time.perf_counter()
        cache = stand_in(Path(folder, "shards"))
        bytes_there = SHARDS * len(LAYERS) * SHARD_ROWS * (CONTEXT - 1) * WIDTH * 2
        print(f"{SHARDS:,} shards, {bytes_there / 1e9:.0f} GB, made in {time.perf_counter() - began:.0f} s")
        flags: dict[str, Any] = {
            "cache": str(cache),
            "sae": args.sae,
            "latents": args.latents,
            "batch_tokens": args.batch_tokens,
            "out": str(Path(folder, "saes")),
        }
        if args.sae not in ("routesae", "crosscoder", "mlsae", "random"):
            flags["layer"] = LAYERS[len(LAYERS) // 2]
        runs = [first_step({**flags, "seed": seed}) for seed in range(args.rounds + 1)][1:]
    for mark in runs[0]:
        seconds = [marks[mark] for marks in runs]
        print(f"{mark:12} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


def first_step(flags: dict[str, Any]) -> dict[str, float]:
    """Seconds since the start of a new process, by what had been reached."""
    command = [sys.executable, "-c", CHILD, repr(time.time()), json.dumps(flags)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    marks: dict[str, float] = json.loads(ended.stdout)
    return marks


def stand_in(path: Path) -> Path:
    """A cache of SHARDS shards that are all the first one."""
    rng = np.random.default_rng(0)
    rows = SHARDS * SHARD_ROWS
    token_ids_sT = rng.integers(100, 1000, (SHARD_ROWS, CONTEXT)).astype(np.int32)
    text = dict.fromkeys(("model", "config_hash", "tokenizer_hash", "corpus", "split"), "stand-in")
    counts = dict.fromkeys(("min_chars", "documents_short", "documents_malformed", "seed"), 0)
    manifest = begin(
        path,
        np.tile(token_ids_sT, (SHARDS, 1)),
        **text,
        **counts,
        revision=None,
        lm_dtype="float32",
        model_layers=2 * len(LAYERS),
        layers=LAYERS,
        width=WIDTH,
        context=CONTEXT,
        rows=rows,
        shard_rows=SHARD_ROWS,
        kept_tokens=rows * (CONTEXT - 1),
        dtype="float16",
        overflow="error",
        text_field="text",
        corpus_fingerprint="stand-in",
        tokens_asked=rows * CONTEXT,
        special_ids=(0,),
        keep_special=False,
        skip_positions=1,
        versions={},
    )
    order = shard_order(manifest.kept(token_ids_sT, np.zeros(token_ids_sT.shape, np.uint8)), manifest, 0)
    hidden = [(layer, rng.standard_normal((len(order), WIDTH), np.float32).astype("<f2")) for layer in LAYERS]

    def record(hashes: Any) -> ShardRecord:
        one = LayerStatistics(mean=0.1, mean_square=1.1, max_abs=5.1, clipped=0)
        layer_statistics = {str(layer): one for layer in LAYERS}
        return ShardRecord(
            index=0,
            rows=(0, SHARD_ROWS),
            kept=len(order),
            weights_hash="x",
            batch_sequences=8,
            statistics=layer_statistics,
            hashes=hashes,
        )

    write_shard(path, manifest, 0, float_shard(token_ids_sT, order, hidden), record)
    for index in range(1, SHARDS):
        link_shard(path / shard_name(0), path / shard_name(index), index)
    return path


def link_shard(first: Path, to: Path, index: int) -> None:
    for folder, _, names in os.walk(first):
        made = to / Path(folder).relative_to(first)
        made.mkdir()
        for name in names:
            if made != to:
                os.link(Path(folder, name), made / name)
    shutil.copyfile(first / "zarr.json", to / "zarr.json")
    change_attributes(to, index=index, rows=[index * SHARD_ROWS, (index + 1) * SHARD_ROWS])


if __name__ == "__main__":
    main()
