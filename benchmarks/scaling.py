"""How cost grows: tokens/s and peak memory of training against F, k, L, the batch and the cache, one at a time.

    benchmarks/environment.sh
    benchmarks/.venv/bin/python benchmarks/scaling.py --cache CACHE --out benchmarks/results

Writes scaling.csv, one line a point, and scaling.png, the same as plots with the limit drawn in: the tokens/s of the
encoder matmul alone (EMM: a batch × D × F), timed in turn with the steps. Around the middle point (F 8192, k 32, one
layer, 4,096 tokens a batch) each plot moves one thing:

    F        a topk of 2,048 to 65,536 latents
    k        8 to 256
    L        a routesae over 1 to all of the cache's layers; one layer is a topk
    batch    512 to 16,384 tokens
    cache    the first 1 to all of the shards: tokens in them a second of `routesae train`, its start and its end too

Every point is a process of its own, so that its peak memory is its own: resident set, pages of the mapped cache among
them. Seconds are medians over --rounds steps after two of warm-up; of the cache's, one run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import record
from processes import measure

from routesae.tests.shards import change_attributes

AXES = {"F": "latents", "k": "k", "L": "layers", "batch": "batch_tokens", "cache": "shards"}
LABELS = {"F": "latents F", "k": "k", "L": "layers L", "batch": "tokens a batch", "cache": "tokens in the cache"}


@dataclass(frozen=True)
class Point:
    axis: str = ""
    latents: int = 8192
    k: int = 32
    layers: int = 1
    batch_tokens: int = 4096
    shards: int = 0
    """Of the cache; 0 for all."""


def points(layers: int, shards: int) -> list[Point]:
    def doubling(first: int, last: int) -> list[int]:
        """first, 2·first … and last."""
        return [first << at for at in range((last // first).bit_length()) if first << at < last] + [last]

    sweeps = {
        "F": doubling(2048, 65536),
        "k": doubling(8, 256),
        "L": doubling(1, layers),
        "batch": doubling(512, 16384),
        "cache": doubling(1, shards),
    }
    return [replace(Point(axis), **{AXES[axis]: value}) for axis, values in sweeps.items() for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--largest", type=int, default=65536, help="leave out points of more latents")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # be one point's process
    args = parser.parse_args()
    if args.point:
        print(json.dumps(time_steps(args.cache, Point(**args.point), args.rounds)))
        return
    manifest = json.loads(Path(args.cache, "zarr.json").read_text())["attributes"]
    shards = len(list(Path(args.cache).glob("shard-*")))
    here, lines = record.where(), []
    for point in points(len(manifest["layers"]), shards):
        if point.axis not in args.axes or point.latents > args.largest:
            continue
        lines.append({**asdict(point), **measured(args, point)})
        print(" ".join(f"{name} {_short(value)}" for name, value in lines[-1].items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "scaling.csv").open("w", newline="") as file:
        file.write(f"# {json.dumps(here)}\n")
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    plot(lines, args.out / "scaling.png")
    print(table(lines))


def measured(args: argparse.Namespace, point: Point) -> dict[str, float]:
    """One point: x, tokens_per_s, limit_per_s and peak_mb."""
    if point.axis == "cache":
        return whole_run(args.cache, point)
    this = [sys.executable, __file__, f"--cache={args.cache}", f"--rounds={args.rounds}"]
    ran = measure([*this, f"--point={json.dumps(asdict(point))}"])
    timed = json.loads(ran.output.splitlines()[-1])
    return {"x": getattr(point, AXES[point.axis]), **timed, "peak_mb": ran.peak_mb, "anonymous_mb": ran.anonymous_mb}


def whole_run(cache: str, point: Point) -> dict[str, float]:
    """`routesae train` over a cache's first shards."""
    with tempfile.TemporaryDirectory(dir=Path(cache).resolve().parent) as folder:  # hard links stay on a disk
        part, out = Path(folder, "shards"), Path(folder, "saes")
        tokens = first_shards(Path(cache), point.shards, part)
        command = [sys.executable, "-m", "routesae", "train", "--sae=topk", f"--cache={part}", f"--out={out}"]
        ran = measure(
            [*command, f"--latents={point.latents}", f"--k={point.k}", f"--batch-tokens={point.batch_tokens}"]
        )
    speed = {"tokens_per_s": tokens / ran.seconds, "limit_per_s": float("nan")}
    return {"x": tokens, **speed, "peak_mb": ran.peak_mb, "anonymous_mb": ran.anonymous_mb}


def first_shards(cache: Path, count: int, out: Path) -> int:
    """A cache of the first shards, its files hard links to the whole one's; how many tokens that is."""
    out.mkdir()
    names = sorted(path.name for path in cache.glob("shard-*"))[:count]
    for name in names:
        shutil.copytree(cache / name, out / name, copy_function=os.link)
    shards = [json.loads((out / name / "zarr.json").read_text())["attributes"] for name in names]
    shutil.copyfile(cache / "zarr.json", out / "zarr.json")
    kept = sum(shard["kept"] for shard in shards)
    change_attributes(out, rows=shards[-1]["rows"][1], kept_tokens=kept)
    return kept


def time_steps(cache_path: str, point: Point, rounds: int) -> dict[str, float]:
    from contextlib import ExitStack

    import steps
    from step_peers import Task, encoder_matmul, ours, read_batches

    from routesae.harvest.cache.reader import Cache

    cache = Cache(cache_path)
    every = tuple(cache.manifest.layers)
    layers = (every[len(every) // 2],) if point.layers == 1 else every[: point.layers]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        (batch,) = read_batches(cache, layers, point.batch_tokens, 1)
        variant = "topk" if point.layers == 1 else "routesae hard"
        task = Task(variant=variant, width=cache.manifest.width, latents=point.latents, k=point.k, layers=layers)
        trained = ours(task, cache, batch, stack, Path(folder, "saes"))
        first = batch.first_layer()
        matmul = encoder_matmul(replace(task, layers=layers[:1]))
        floor = replace(matmul, step=lambda _: matmul.step(first))
        seconds = steps.rounds([trained, floor], [batch], rounds)
    step, limit = (statistics.median(seconds[name]) for name in ("routesae", "EMM"))
    return {"tokens_per_s": point.batch_tokens / step, "limit_per_s": point.batch_tokens / limit}


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in AXES if any(line["axis"] == axis for line in lines)]
    figure, grid = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 6), squeeze=False, layout="constrained")
    for column, axis in enumerate(axes):
        own = [line for line in lines if line["axis"] == axis]
        x = [line["x"] for line in own]
        speed, memory = grid[0][column], grid[1][column]
        speed.plot(x, [line["tokens_per_s"] for line in own], "o-", label="training")
        if axis != "cache":
            speed.plot(x, [line["limit_per_s"] for line in own], "--", color="grey", label="limit: encoder matmul")
        if axis == "cache":
            speed.set_ylim(bottom=0)
        else:
            speed.set_yscale("log")
        memory.plot(x, [line["peak_mb"] / 1000 for line in own], "o-", label="resident")
        memory.plot(x, [line["anonymous_mb"] / 1000 for line in own], ".:", label="of it allocated")
        memory.set_ylim(0, 1.1 * max(line["peak_mb"] for line in own) / 1000)
        for part in (speed, memory):
            part.set_xscale("log", base=2)
            part.set_xlabel(LABELS[axis])
            part.grid(alpha=0.3)
    for row, label in enumerate(("tokens/s", "peak memory, GB")):
        grid[row][0].set_ylabel(label)
        grid[row][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(lines: list[dict[str, Any]]) -> str:
    text = ["| | | tokens/s | limit | share of it | peak MB |", "|---|---|---|---|---|---|"]
    for line in lines:
        limited = line["limit_per_s"] == line["limit_per_s"]  # not NaN
        limit = (
            f"{line['limit_per_s']:,.0f} | {line['tokens_per_s'] / line['limit_per_s']:.2f}" if limited else "– | –"
        )
        cells = f"{line['tokens_per_s']:,.0f} | {limit} | {line['peak_mb']:,.0f}"
        text.append(f"| {line['axis']} | {line['x']:,} | {cells} |")
    return "\n".join(text)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
