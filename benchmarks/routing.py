"""What routing buys: published and other routers, their controls, and fixed layers, on one cache.

    python benchmarks/routing.py --cache CACHE

Every SAE of a seed trains in one pass over the cache. An mlsae takes an optimiser step for each layer of a batch: to
compare it at equal steps, run it alone (--only mlsae) on --tokens divided by the number of layers. One line of
results/routing.jsonl an SAE, so that a stopped benchmark goes on; then the table, as in RESULTS.md: mean and standard
deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.harvest.lm.model import load_tokenizer
from routesae.train.evaluate import read_in_order
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.settings import RunSettings, TrainSettings

CPU = torch.device("cpu")
ROUTED: dict[str, dict[str, Any]] = {
    "published router": {"router": "published", "balance": 0.0},
    "published router, balance 0.01": {"router": "published"},
    "top2": {},
    "top2, balance 0.01": {"balance": 0.01},
    "control: untrained router": {"router": "frozen"},
    "control: random layer a token": {"router": "random"},
    "mlsae": {"sae": "mlsae"},
}
# The published code's rule for a feature worth interpreting (its `get_context`).
KL_TOKENS = 5120
ROWS_READ = 256  # from the front: 65,536 tokens of a context of 256
# Its threshold of 10 is for 64 of 16,384 latents on Llama-3.2-1B; 4 is for what a small run here has to tell apart.
THRESHOLDS = (10.0, 4.0)
PER_TOKEN, MIN_CONTEXTS, MAX_TOKENS = 2, 4, 32


@torch.no_grad()
def features_kept(folder: Path, cache: Cache, classes: np.ndarray, threshold: float) -> int:
    """Latents with more than 4 contexts above it, two a token class at most, of no more than 32 token classes.

    classes: for each token id, the number of its class: what it spells, without case and blanks.
    """
    sae = load_sae(folder, CPU)
    class_of = classes[cache.tokens().reshape(-1)]
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for hidden, position_N in read_in_order(cache, slice(0, min(ROWS_READ, cache.manifest.rows)), [sae]):
        class_N = class_of[position_N.numpy()].tolist()
        found = zip(*(part_M.tolist() for part_M in sae(hidden).latents.active()), strict=True)
        for n, latent, value in found:
            if value > threshold:
                counts[latent][class_N[n % len(class_N)]] += 1  # an mlsae's readings go layer by layer
    contexts = [sum(min(PER_TOKEN, n) for n in of.values()) for of in counts.values() if len(of) <= MAX_TOKENS]
    return sum(n > MIN_CONTEXTS for n in contexts)


def token_classes(model: str) -> np.ndarray:
    tokenizer = load_tokenizer(model, None)
    spelled = [tokenizer.decode([token]).strip().lower() for token in range(len(tokenizer))]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(spelled))}
    return np.array([numbers[text] for text in spelled])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--save", help="folder that keeps the SAEs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="rows of the table; default: all")
    parser.add_argument("--layers", type=int, nargs="*", help="fixed layers; default: all of the cache")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "routing.jsonl")
    args = parser.parse_args()
    cache = Cache(args.cache)
    common = {"latents": args.latents, "k": args.k, "lr": args.lr}
    wanted = {name: RunSettings(**{"sae": "routesae", **common, **own}) for name, own in ROUTED.items()}
    layers = args.layers if args.layers is not None else cache.manifest.layers
    wanted |= {f"fixed layer {n}": RunSettings(sae="topk", layer=n, **common) for n in layers}
    setup = {**common, "tokens": args.tokens, "batch_tokens": args.batch_tokens}
    args.results.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    classes = token_classes(cache.manifest.model)
    wanted = {name: run for name, run in wanted.items() if args.only is None or name in args.only}
    for seed in range(args.seeds):
        have = {line["what"] for line in done if {**setup, "seed": seed}.items() <= line.items()}
        if missing := {name: run for name, run in wanted.items() if name not in have}:
            lines = one_pass(args, cache, missing, {**setup, "seed": seed}, classes)
            done += lines
            with args.results.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    print(table([line for line in done if setup.items() <= line.items()]))


def one_pass(
    args: argparse.Namespace, cache: Cache, runs: dict[str, RunSettings], setup: dict[str, Any], classes: np.ndarray
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as kept:
        out = kept if args.save is None else f"{args.save}/seed{setup['seed']}"
        named = tuple(
            RunSettings(**{**run.__dict__, "name": f"run{number}"}) for number, run in enumerate(runs.values())
        )
        settings = TrainSettings(
            cache=args.cache,
            runs=named,
            out=out,
            tokens=args.tokens,
            batch_tokens=args.batch_tokens,
            seed=setup["seed"],
            resume=args.save is not None,
        )
        train(settings)
        folders = [Path(out) / str(run.name) for run in named]
        saes = tuple(map(str, folders))
        on_cache = ("NormMSE", "Dead", "Routing")
        rows = analyze(AnalyzeSettings(cache=args.cache, saes=saes, metrics=on_cache))["saes"]
        spliced = AnalyzeSettings(cache=args.cache, saes=saes, metrics=("KLDiv",), tokens=KL_TOKENS)
        rows = [{**row, **more} for row, more in zip(rows, analyze(spliced)["saes"], strict=True)]
        return [
            {
                "what": what,
                **setup,
                **{name: row[name] for name in ("NormMSE", "Dead", "KLDiv", "Entropy", "Shares")},
                **{
                    f"kept{threshold:g}": features_kept(folder, cache, classes, threshold) for threshold in THRESHOLDS
                },
            }
            for what, folder, row in zip(runs, folders, rows, strict=True)
        ]


def table(lines: list[dict[str, Any]]) -> str:
    def cell(runs: list[dict[str, Any]], name: str, digits: int) -> str:
        values = [run[name] for run in runs if run[name] is not None]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    text = ["| | NormMSE | KLDiv | entropy | largest share | kept, θ 10 | θ 4 |", "|---|---|---|---|---|---|---|"]
    for what in dict.fromkeys(line["what"] for line in lines):
        runs = [
            {**line, "top": max(line["Shares"].values(), default=None) if line["Shares"] else None} for line in lines
        ]
        runs = [run for run in runs if run["what"] == what]
        cells = [
            cell(runs, *column)
            for column in (("NormMSE", 4), ("KLDiv", 3), ("Entropy", 2), ("top", 2), ("kept10", 0), ("kept4", 0))
        ]
        text.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
