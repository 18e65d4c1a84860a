"""What an int8 cache costs beside a float16 one of the same tokens: bytes, what the SAEs lose, what reading takes.

    python benchmarks/int8.py --folder DIR

Harvests the demo model in both dtypes, trains a topk of the middle layer on each with the same seed, and scores both
SAEs on both caches; Recovered on the float16 one. The loader's rate counts float16 bytes given to the trainer, of all
layers, from the page cache, in rounds that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import record
import torch

from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.inspect import describe
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.run import train
from routesae.train.settings import settings_of

CPU = torch.device("cpu")
DTYPES = ("float16", "int8")
NARROW = ("NormMSE", "FVU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the caches, which stay; a temporary one otherwise")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--layers", default="14-16")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--scored", type=int, default=2048, help="held-out tokens for Recovered")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append a raw line to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        caches = {dtype: harvested(args, dtype, folder) for dtype in DTYPES}
        saes = {dtype: trained(args, caches[dtype], folder) for dtype in DTYPES}
        found = {
            **record.where(),
            "setup": {name: value for name, value in vars(args).items() if name not in ("folder", "json")},
            "token_bytes": {dtype: cache.manifest.token_bytes for dtype, cache in caches.items()},
            "layers": describe(str(caches["int8"].path)).layers,
            "scores": {
                f"{sae} on {cache}": scores(args, caches[cache], saes[sae], recovered=cache == "float16")
                for cache in reversed(DTYPES)
                for sae in DTYPES
            },
            "loader_mb_per_second": loader_rates(caches, args.rounds),
        }
    if args.json:
        record.append(args.json, [found])
    print(table(found))


def harvested(args: argparse.Namespace, dtype: str, folder: Path) -> Cache:
    return harvest(
        HarvestSettings(
            model="demo",
            data="demo",
            tokens=args.tokens,
            layers=args.layers,
            context=256,
            shard_tokens=16_384,
            dtype=dtype,
            device="cpu",
            out=str(folder / dtype),
        )
    )


def trained(args: argparse.Namespace, cache: Cache, folder: Path) -> Path:
    out = tempfile.mkdtemp(prefix="saes-", dir=folder)
    flags: dict[str, Any] = {"cache": str(cache.path), "sae": "topk", "layer": args.layer, "out": out}
    flags |= {"latents": args.latents, "k": args.k, "epochs": args.epochs, "lr": 2e-3, "batch_tokens": 2048}
    (result,) = train(settings_of(flags | {"device": "cpu", "seed": 0}))
    return result.folder


def scores(args: argparse.Namespace, cache: Cache, sae: Path, *, recovered: bool) -> dict[str, Any]:
    """The row of `analyze`: on all held-out tokens, or on --scored of them where the LM has to run."""
    asked = AnalyzeSettings(cache=str(cache.path), saes=(str(sae),), metrics=NARROW, device="cpu")
    row = dict(analyze(asked)["saes"][0])
    if recovered:
        asked = AnalyzeSettings(
            cache=str(cache.path), saes=(str(sae),), metrics=("Recovered",), tokens=args.scored, device="cpu"
        )
        row["Recovered"] = analyze(asked)["saes"][0]["Recovered"]
    return {name: row[name] for name in (*NARROW, "Recovered") if name in row}


def loader_rates(caches: dict[str, Cache], rounds: int) -> dict[str, list[float]]:
    """MB of float16 a second, of all layers of a cache, a figure a round."""
    rates: dict[str, list[float]] = {dtype: [] for dtype in caches}
    for epoch in range(rounds + 1):
        for dtype, cache in caches.items():
            rates[dtype].append(one_epoch(cache, epoch))
    return {dtype: of[1:] for dtype, of in rates.items()}  # the first fills the page cache


def one_epoch(cache: Cache, epoch: int) -> float:
    selection = Selection(cache, 0, cache.manifest.rows, cache.manifest.layers)
    plans: Iterator[Any] = epoch_plans(selection, seed=0, epoch=epoch, batch_tokens=4096)
    began, done = time.perf_counter(), 0
    with closing(load(selection, plans, 4096, CPU)) as batches:
        for batch in batches:
            done += batch.hidden_LND.nbytes
    return done / (time.perf_counter() - began) / 1e6


def table(found: dict[str, Any]) -> str:
    text = [
        f"bytes a token: {found['token_bytes']}",
        "",
        "| layer | FVU of int8 | NormMSE of int8 |",
        "|---|---|---|",
    ]
    for layer in found["layers"]:
        text.append(f"| {layer['layer']} | {layer['int8 FVU']:.1e} | {layer['int8 NormMSE']:.1e} |")
    text += ["", "| SAE of, scored on | NormMSE | FVU | Recovered |", "|---|---|---|---|"]
    for name, row in found["scores"].items():
        cells = [f"{row[metric]:.5f}" if metric in row else "–" for metric in (*NARROW, "Recovered")]
        text.append(f"| {name} | {' | '.join(cells)} |")
    text.append("")
    for dtype, rates in found["loader_mb_per_second"].items():
        low, high = min(rates), max(rates)
        text.append(f"loader, {dtype}: {statistics.median(rates):,.0f} MB/s of float16 ({low:,.0f} to {high:,.0f})")
    return "\n".join(text)


if __name__ == "__main__":
    main()
