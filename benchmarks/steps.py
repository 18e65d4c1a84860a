"""Seconds a training step: routesae beside its peers and the encoder matmul, interleaved in one process.

    benchmarks/environment.sh
    benchmarks/.venv/bin/python benchmarks/steps.py --cache CACHE --json benchmarks/results/steps.jsonl

For every case (variant, latents, k), each round runs two steps of every contender on the same batch, the second
timed, in an order that rotates from round to round; medians over the rounds after one of warm-up. What a contender
is: step_peers.py.
A vanilla, gated, jumprelu or crosscoder costs more the more latents are active, so these are timed twice: "start", at
their own initial weights, L0 of each in the table; and "sparse", with every contender's bias or threshold set so that
k latents are active.

The process is set up as `routesae train` sets up its own: huge pages, freed memory kept. Every contender has that;
THP_MEM_ALLOC_ENABLE=0 before the command turns the former off.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported, as the command line has it

import record
import torch
from step_peers import Contender, Rows, Task, contenders, ours, read_batches

from routesae.harvest.cache.reader import Cache
from routesae.machine.device import keep_freed_memory

WARM_UP_ROUNDS = 1
BATCHES = 2
STATES = ("sparse", "start")


@dataclass(frozen=True)
class Case:
    variant: str
    latents: int
    k: int
    state: str = "–"

    def __str__(self) -> str:
        state = "" if self.state == "–" else f", {self.state}"
        return f"{self.variant}, {self.latents} latents, k {self.k}{state}"


CASES = (
    *(Case("topk", latents, k) for latents in (9216, 4608) for k in (32, 64)),
    Case("routesae hard", 9216, 32),
    Case("routesae soft", 9216, 32),
    Case("batchtopk", 2304, 32),
    *(
        Case(variant, 2304, 32, state)
        for variant in ("jumprelu", "gated", "vanilla")
        for state in ("sparse", "start")
    ),
    # A crosscoder over 16 layers is 16 times the work of an SAE over one.
    *(Case("crosscoder", 576, 32, state) for state in STATES),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, help="of single-layer SAEs; default: the middle one")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=", ".join({case.variant for case in CASES}))
    parser.add_argument("--latents", type=int, help="only cases of this size")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these and routesae")
    parser.add_argument("--json", type=Path, help="append raw lines to this file")
    args = parser.parse_args()
    keep_freed_memory()
    cache = Cache(args.cache)
    layers = tuple(cache.manifest.layers)
    layer = args.layer if args.layer is not None else layers[len(layers) // 2]
    lines: list[dict[str, Any]] = []
    for case in CASES:
        if (args.only and case.variant not in args.only) or (args.latents and case.latents != args.latents):
            continue
        one_layer = case.variant.split()[0] not in ("routesae", "crosscoder")
        read = (layer,) if one_layer else layers
        batches = read_batches(cache, read, args.batch_tokens, BATCHES)
        width = cache.manifest.width
        task = Task(variant=case.variant, width=width, latents=case.latents, k=case.k, layers=read)
        here = record.where()
        rows = [
            {**case.__dict__, "layers": len(read), "batch_tokens": args.batch_tokens, **row, **here}
            for row in run(task, case.state, cache, batches, args)
        ]
        over = f"layer {layer}" if one_layer else f"{len(read)} layers"
        print(f"\n### {case}, {over}, {args.batch_tokens} tokens\n\n{table(rows)}", flush=True)
        if args.json:
            record.append(args.json, rows)
        lines += rows
    if not lines:
        parser.error("no case left; see --only and --latents")


def run(task: Task, state: str, cache: Cache, batches: list[Rows], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line a contender. Everything built for the case is freed on the way out."""
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        torch.manual_seed(0)
        field = [ours(task, cache, batches[0], stack, Path(out))]
        if task.variant == "gated":
            field.append(ours(task, cache, batches[0], stack, Path(out, "published"), recipe_of_published=True))
        if task.variant == "topk":  # what AuxK costs where a tenth is dead, and where four fifths are
            for dead in (task.latents // 10, task.latents * 4 // 5):
                field.append(ours(task, cache, batches[0], stack, Path(out, str(dead)), dead=dead))
        field += [one for one in contenders(task) if not args.contenders or one.name in args.contenders]
        for contender in field:
            if state == "sparse" and contender.gate is not None:
                contender.gate.close(batches[0], task.k)
        before = {one.name: one.gate.l0(batches[0]) for one in field if one.gate is not None}
        seconds = rounds(field, batches, args.rounds)
        after = {one.name: one.gate.l0(batches[0]) for one in field if one.gate is not None}
    gc.collect()
    return [
        {"contender": name, "seconds": times, "l0": before.get(name), "l0_after": after.get(name)}
        for name, times in seconds.items()
    ]


def rounds(field: list[Contender], batches: list[Rows], count: int) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round after the warm-up."""
    for batch in batches:
        _ = batch.flat, batch.by_token  # normalised once, outside what is timed
    seconds: dict[str, list[float]] = {one.name: [] for one in field}
    for at in range(WARM_UP_ROUNDS + count):
        turn = at % len(field)
        for contender in field[turn:] + field[:turn]:
            batch = batches[at % len(batches)]
            contender.step(batch)  # brings its own weights and moments back into the caches, as in a run of its own
            began = time.perf_counter()
            contender.step(batch)
            taken = time.perf_counter() - began
            if at >= WARM_UP_ROUNDS:
                seconds[contender.name].append(taken)
    return seconds


def table(rows: list[dict[str, Any]]) -> str:
    medians = {row["contender"]: statistics.median(row["seconds"]) for row in rows}
    text = ["| | s a step | tokens/s | × EMM | ÷ routesae | L0 |", "|---|---|---|---|---|---|"]
    for row in rows:
        median = medians[row["contender"]]
        emm = f"{median / medians['EMM']:.2f}" if "EMM" in medians else "–"
        l0 = f"{row['l0']:.0f}" if row["l0"] is not None else str(row["k"]) if "EMM" not in row["contender"] else "–"
        cells = (f"{median:.3f}", f"{row['batch_tokens'] / median:,.0f}", emm, f"{median / medians['routesae']:.2f}")
        text.append(f"| {row['contender']} | " + " | ".join((*cells, l0)) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
