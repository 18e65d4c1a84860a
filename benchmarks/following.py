"""Harvest and training at once (`run --follow`) beside one after the other (`run`), on the demo model and corpus.

    benchmarks/.venv/bin/python benchmarks/following.py --json benchmarks/results/following.jsonl

Both are whole processes that take turns; the ratio of their medians is what to report. They share the cores, so on a
CPU they can gain no more at once than what either leaves idle. 40k tokens take minutes a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import record
from processes import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--keep", default="150M", help="bytes of the ring, of --follow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append raw lines to this file")
    args = parser.parse_args()
    lines, seconds = [], dict[str, list[float]](plain=[], follow=[])
    for at in range(args.rounds):
        for how in list(seconds)[:: -1 if at % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder, "run.toml")
                config.write_text(settings(folder, args.tokens, args.keep if how == "follow" else None))
                run = [
                    sys.executable,
                    "-m",
                    "routesae",
                    "run",
                    f"--config={config}",
                    *["--follow"] * (how == "follow"),
                ]
                measured = measure(run)
            seconds[how].append(measured.seconds)
            lines.append({"how": how, "tokens": args.tokens, "seconds": measured.seconds, **record.where()})
            print(
                f"{how}: {measured.seconds:.1f} s, {args.tokens / measured.seconds:.0f} tokens a second", flush=True
            )
    plain, follow = (statistics.median(seconds[how]) for how in ("plain", "follow"))
    print(f"| harvest, then train | at once | ratio |\n| {plain:.1f} s | {follow:.1f} s | {plain / follow:.2f} |")
    if args.json:
        record.append(args.json, lines)


def settings(folder: str, tokens: int, keep: str | None) -> str:
    """A [harvest] of 5 layers and a [train] of two SAEs over it."""
    ring = f'keep = "{keep}"' if keep else ""
    return f"""
out = "{folder}"
[harvest]
model = "demo"
data = "demo"
tokens = {tokens}
context = 256
shard-tokens = 4096
layers = "13-17"
{ring}
[train]
window = 4
latents = 4608
k = 32
[[train.run]]
sae = "topk"
layer = 15
[[train.run]]
sae = "routesae"
"""


if __name__ == "__main__":
    main()
