"""Whether the memory of `routesae train` grows with the cache.

    python benchmarks/memory.py --folder DIR

In DIR it makes a cache of 1 GB and one of 10 GB, one after the other (one layer, width 2048), runs `routesae train`
for an epoch of each in a process of its own, and deletes them. Resident memory is read from /proc/PID/smaps_rollup
five times a second; steady is the median over the second half of the run, peak the kernel's own VmHWM. Exit code 1
where the larger cache takes more than 5 % more, or less, of either.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from synthetic import synthetic_cache

WIDTH = 2048
SAMPLE_SECONDS = 0.2
TOLERANCE = 0.05
SAE = (
    "--sae",
    "topk",
    "--layer",
    "1",
    "--latents",
    "64",
    "--k",
    "8",
    "--device",
    "cpu",
)  # small: batches are the point


class Memory(NamedTuple):
    """Bytes resident, and the seconds the run took."""

    steady: float
    peak: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="On a disk with room for the larger cache.")
    parser.add_argument("--gigabytes", type=float, nargs=2, default=(1.0, 10.0))
    parser.add_argument("--batch-tokens", type=int, default=4096)
    args = parser.parse_args()
    found = []
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            tokens = int(gigabytes * 1e9 / WIDTH / 2)
            synthetic_cache(Path(folder, "shards"), layers=1, tokens=tokens, shard_tokens=65_536, width=WIDTH)
            memory = of_a_run(Path(folder), args.batch_tokens)
        found.append(memory)
        shown = f"steady {memory.steady / 1e6:,.0f} MB, peak {memory.peak / 1e6:,.0f} MB, {memory.seconds:.0f} s"
        print(f"{gigabytes:g} GB: {shown}")
    small, large = found
    ratios = {"steady": large.steady / small.steady, "peak": large.peak / small.peak}
    for name, ratio in ratios.items():
        print(f"{name}, larger cache / smaller: {ratio:.3f}")
    if any(abs(ratio - 1) > TOLERANCE for ratio in ratios.values()):
        sys.exit(1)


def of_a_run(folder: Path, batch_tokens: int) -> Memory:
    """Raises RuntimeError with what it printed where the run fails."""
    cache, out, printed = folder / "shards", folder / "saes", folder / "printed"
    command = [sys.executable, "-m", "routesae", "train", "--cache", str(cache), "--out", str(out), *SAE]
    command += ["--batch-tokens", str(batch_tokens)]
    began, samples, peak = time.perf_counter(), [], 0
    with printed.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as run:
        while run.poll() is None:
            try:
                samples.append(_kilobytes(run.pid, "smaps_rollup", "Rss"))
                peak = _kilobytes(run.pid, "status", "VmHWM")
            except (OSError, ValueError):  # it has just ended
                break
            time.sleep(SAMPLE_SECONDS)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}: {printed.read_text()[-2000:]}")
    steady = statistics.median(samples[len(samples) // 2 :])
    return Memory(1024 * steady, 1024 * peak, time.perf_counter() - began)


def _kilobytes(pid: int, file: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"no {field} in /proc/{pid}/{file}")
    return int(found[1])


if __name__ == "__main__":
    main()
