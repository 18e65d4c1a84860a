"""One process against two that divide each batch: how far their loss curves part, and tokens/s.

    python benchmarks/ddp.py --cache CACHE --layer 15

All train the same topk by the command line: one process with two threads, two processes with one thread each, and as
a control one process with one thread. The largest relative difference is over every step's loss; tokens/s is the
median over the steps, less the first tenth.
With --messages, what summing the gradients costs a step: whole matrices, against the rows and pairs they are made of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PARTED = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--messages", action="store_true")
    args = parser.parse_args()
    if args.messages:
        measure_messages(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            "1 process, 2 threads": trained(args, Path(folder, "one"), [], 2),
            "2 processes, 1 thread each": trained(args, Path(folder, "two"), TORCHRUN, 1),
            "1 process, 1 thread": trained(args, Path(folder, "control"), [], 1),
        }
    reference = next(iter(curves.values()))
    for name, lines in curves.items():
        rate = statistics.median(line["tokens_per_second"] for line in lines[len(lines) // 10 :])
        parts = [abs(one["loss"] - two["loss"]) / one["loss"] for one, two in zip(reference, lines, strict=True)]
        since = next((step for step, part in enumerate(parts, start=1) if part > PARTED), "none")
        print(f"{name}: {rate:,.0f} tokens/s; loss {lines[0]['loss']:.4f} to {lines[-1]['loss']:.6f}; to the first")
        print(f"  at most {max(parts):.1e} relative over {len(lines)} steps, first above {PARTED} at step {since}")


def trained(args: argparse.Namespace, out: Path, launcher: list[str], threads: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one a step."""
    flags = {"cache": args.cache, "sae": "topk", "layer": args.layer, "latents": args.latents, "k": args.k}
    flags |= {"batch-tokens": args.batch_tokens, "tokens": args.steps * args.batch_tokens, "log-every-steps": 1}
    flags |= {"dead-after-tokens": 16 * args.batch_tokens, "device": "cpu", "out": out, "name": "topk"}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, "-m", "routesae", "train", "--quiet", *given]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return [json.loads(line) for line in (out / "topk" / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ what is sent to sum gradients


def measure_messages(args: argparse.Namespace) -> None:
    """Starts itself twice; rank 0 prints."""
    if "RANK" not in os.environ:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *TORCHRUN, *sys.argv], check=True, env=environment)
        return
    import torch
    import torch.distributed as dist

    from routesae.train.sparse.pairs import Pairs

    dist.init_process_group("gloo")
    n, f, k, d = args.batch_tokens // 2, args.latents, args.k, 576
    latents_NK = torch.randint(f, (n, k))
    rows = [torch.randn(n, d), torch.randn(n, d)]  # x and the gradient of its reconstruction
    values = [torch.randn(n * k), torch.randn(n * k)]  # dz and f
    pairs = Pairs.of(latents_NK, f)
    grads = [pairs.rows_by_latent(value, row) for value, row in zip(values, rows, strict=True)]

    def whole() -> None:
        for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
            work.wait()

    def parts() -> None:
        gathered = []
        for part in (*rows, *values, latents_NK.to(torch.int32)):
            into = part.new_empty((2 * len(part), *part.shape[1:]))
            dist.all_gather_into_tensor(into, part)
            gathered.append(into)
        x_ND, g_ND, dz_M, f_M, all_NK = gathered
        of_all = Pairs.of(all_NK.long(), f)
        of_all.rows_by_latent(dz_M, x_ND)
        of_all.rows_by_latent(f_M, g_ND)

    def own() -> None:
        fresh = Pairs.of(latents_NK, f)
        for value, row in zip(values, rows, strict=True):
            fresh.rows_by_latent(value, row)

    whole_mb = sum(grad.nbytes for grad in grads) / 1e6
    parts_mb = (sum(part.nbytes for part in (*rows, *values)) + 4 * n * k) / 1e6
    seconds = {name: timed(run, dist) for name, run in (("whole", whole), ("parts", parts), ("own", own))}
    if dist.get_rank() == 0:
        both = seconds["own"] + seconds["whole"]
        print(f"F {f}, k {k}, N {2 * n}, width {d}, 2 processes:")
        print(f"  each its own pairs' gradients, then matrices of {whole_mb:.0f} MB summed: {both * 1e3:.0f} ms,")
        print(f"    of which the sum {seconds['whole'] * 1e3:.0f}")
        print(
            f"  rows and pairs of {parts_mb:.0f} MB from each, all gradients on each: {seconds['parts'] * 1e3:.0f} ms"
        )
    dist.destroy_process_group()


def timed(run: Any, dist: Any, rounds: int = 15) -> float:
    times = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
