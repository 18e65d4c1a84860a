"""The same SAE whichever way its sums are done: over active pairs alone, or over all pairs.

    python benchmarks/paths.py --cache demo/shards --json paths.json      # a few minutes on two cores

Every variant is trained twice from the same seed, for 73 steps, with either way forced; the held-out NormMSE and L0
of both, and by how much they part. They are to part by less than 0.5 %, else the exit code is 1. On CUDA all pairs
are multiplied in bfloat16 and active ones proposed in it; on a CPU both are float32, and --precision bfloat16 rounds
as CUDA does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import record

from routesae.harvest.cache.reader import Cache
from routesae.train import run
from routesae.train.folder.checkpoint import read_config
from routesae.train.saes import SAES
from routesae.train.settings import settings_of
from routesae.train.sparse.policy import Arithmetic

WAYS = {"active": 1.1, "all": -1.0}  # sparse_below
WITHIN = 0.005
asked = run.chosen


def forced(way: str, **flags: Any) -> dict[str, Any]:
    """The held-out scores of an SAE trained that way."""

    def chosen(*args: Any, **kwargs: Any) -> Arithmetic:
        return asked(*args, **kwargs).replace(sparse_below=WAYS[way])

    run.chosen = chosen
    with tempfile.TemporaryDirectory() as out:
        (result,) = run.train(settings_of({**flags, "out": out}))
        source = read_config(result.folder)["metadata"]["routesae"]["source"]
    assert source["arithmetic"]["sparse_below"] == WAYS[way]
    scores: dict[str, Any] = source["held_out"]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--only", nargs="+", default=list(SAES), metavar="VARIANT", help=", ".join(SAES))
    parser.add_argument("--latents", type=int, default=1152)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=73)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    args = parser.parse_args()
    cache, rows = Cache(args.cache), []
    print(
        "| | NormMSE, active pairs | all pairs | parted by | L0, active | all |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in args.only:
        flags = {flag: getattr(args, flag) for flag in ("cache", "latents", "k", "batch_tokens", "lr", "precision")}
        flags |= {"sae": name, "device": args.device, "tokens": args.steps * args.batch_tokens, "seed": 0}
        active, every = (forced(way, **flags) for way in WAYS)
        parted = every["norm_mse"] / active["norm_mse"] - 1
        rows.append({"sae": name, "active": active, "all": every, "parted": parted})
        print(
            f"| {name} | {active['norm_mse']:.5f} | {every['norm_mse']:.5f} | {parted:+.3%} | {active['l0']:.2f} | "
            f"{every['l0']:.2f} |",
            flush=True,
        )
    if args.json:
        given = {name: value for name, value in vars(args).items() if name != "json"}
        facts = {**given, "layers": cache.manifest.layers, **record.where(), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    sys.exit(any(abs(row["parted"]) > WITHIN for row in rows))


if __name__ == "__main__":
    main()
