"""Six variants in one pass against the sum of their pure step times, interleaved in the same process.

    python benchmarks/one_pass.py --cache CACHE --layer 15

A pass reads, normalises and logs; a pure step is one SAE's forward, backward and Adam on a batch that is normalised
already. Medians over rounds; each round times every SAE's pure step and one step of the pass.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack, closing

import torch

from routesae.harvest.cache.reader import Cache
from routesae.train.jobs import jobs_of
from routesae.train.loading.batches import Selection, load
from routesae.train.run import pace_of, planned, trainee_of
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import settings_of

CPU = torch.device("cpu")
VARIANTS = ("vanilla", "gated", "topk", "jumprelu", "routesae", "crosscoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    cache = Cache(args.cache)
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        flags = {"sae": VARIANTS, "layer": args.layer, "latents": args.latents, "out": out, "cache": args.cache}
        settings = settings_of(flags | {"batch_tokens": args.batch_tokens, "epochs": 100})
        jobs = jobs_of(settings, cache)
        selection = Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers)
        for job in jobs:
            job.partial.mkdir(parents=True)
        pace = pace_of(selection, settings, CPU)
        trainees = [trainee_of(job, settings, pace, CPU, stack) for job in jobs]
        _, plans = planned(selection, settings)
        batches = stack.enter_context(closing(load(selection, plans, args.batch_tokens, CPU)))
        times: dict[str, list[float]] = {name: [] for name in (*VARIANTS, "pass")}
        for step in range(1, args.rounds + 3):
            began = time.perf_counter()
            hidden = Hidden(*next(batches), layers=selection.layers)
            for trainee in trainees:
                trainee.step(2 * step - 1, hidden, hidden.tokens)
            times["pass"].append(time.perf_counter() - began)
            for name, trainee in zip(VARIANTS, trainees, strict=True):
                began = time.perf_counter()
                trainee.step(2 * step, hidden, hidden.tokens)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(of[2:]) for name, of in times.items()}
    pure = sum(medians[name] for name in VARIANTS)
    for name, seconds in medians.items():
        print(f"{name:12} {seconds:.3f} s")
    print(f"one pass of six / sum of pure steps: {medians['pass'] / pure:.3f}")


if __name__ == "__main__":
    main()
