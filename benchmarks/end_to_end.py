"""`routesae train` beside SAELens' cached training: from the start of the process to the saved SAE, on the same rows.

    benchmarks/environment.sh
    benchmarks/.venv/bin/python benchmarks/end_to_end.py --cache CACHE --json benchmarks/results/end_to_end.jsonl

SAELens reads activations from a dataset of its own format, so the rows of one layer are written as one first, float32
as its CacheActivationsRunner writes them by default; that is not timed. It then trains with its real runner
(LanguageModelSAETrainingRunner, use_cached_activations) on its defaults, rows normalised per token as ours are (its
layer_norm). It would load the LM too, to no use; it is spared that. Ours also scores the SAE on held-out rows.
Both are processes of their own and take turns; medians over the rounds. Seven rounds take 40 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
from processes import measure

TRAINERS = ("routesae", "sae_lens")
CONTEXT = 256
HOOK = "blocks.0.hook_resid_post"  # the name of the column; no LM is asked for it
SHARD_CONTEXTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--latents", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append raw lines to this file")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)  # be the peer's process, on these rows
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)  # write the peer's rows
    args = parser.parse_args()
    if args.prepare:
        prepare(args)
    elif args.peer:
        train_with_sae_lens(args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    here = record.where()
    setup = {name: getattr(args, name) for name in ("layer", "latents", "k", "tokens", "batch_tokens")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in setup.items()]
    this = [sys.executable, __file__, f"--cache={args.cache}", *flags]
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder, "rows"), Path(folder, "out")
        measure([*this, f"--prepare={rows}"])
        ours = [sys.executable, "-m", "routesae", "train", "--sae=topk", f"--cache={args.cache}"]
        commands = {
            "routesae": [*ours, *flags, f"--out={out}"],
            "sae_lens": [*this, f"--peer={rows}"],
        }
        for at in range(args.rounds):
            for trainer in TRAINERS if at % 2 else TRAINERS[::-1]:
                ran = measure(commands[trainer])
                shutil.rmtree(out, ignore_errors=True)
                line = {"trainer": trainer, "round": at, **setup, "seconds": ran.seconds, "peak_mb": ran.peak_mb}
                line |= {"anonymous_mb": ran.anonymous_mb}
                if trainer == "sae_lens":
                    line |= json.loads(ran.output.splitlines()[-1])
                lines.append({**line, **here})
                print(f"round {at} {trainer:10} {ran.seconds:7.1f} s {ran.peak_mb:7.0f} MB", flush=True)
                if args.json:
                    record.append(args.json, lines[-1:])
    print(table(lines))


def table(lines: list[dict[str, Any]]) -> str:
    def median(trainer: str, name: str) -> float:
        return statistics.median(line[name] for line in lines if line["trainer"] == trainer)

    text = ["| | seconds | peak MB | of them allocated |", "|---|---|---|---|"]
    for trainer in TRAINERS:
        names = ("seconds", "peak_mb", "anonymous_mb")
        text.append(f"| {trainer} | " + " | ".join(f"{median(trainer, name):.1f}" for name in names) + " |")
    faster = median("sae_lens", "seconds") / median("routesae", "seconds")
    memory = median("routesae", "peak_mb") / median("sae_lens", "peak_mb")
    before = median("sae_lens", "seconds_before_training")
    text.append(f"\nsae_lens ÷ routesae, seconds: {faster:.2f} ({before:.1f} s of sae_lens' are before training)")
    text.append(f"routesae ÷ sae_lens, peak memory: {memory:.2f}")
    return "\n".join(text)


def prepare(args: argparse.Namespace) -> None:
    """The layer's rows, as SAELens caches them: contexts of CONTEXT rows in an arrow file."""
    import numpy as np
    import zarr
    from datasets import Array2D, Dataset, Features
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    group = zarr.open_group(args.cache, mode="r")
    shards = sorted(name for name in group.group_keys() if name.startswith("shard-"))
    rows_ND = np.concatenate([group[name][f"layer_{args.layer:02d}"][:] for name in shards])[: args.tokens]
    if len(rows_ND) < args.tokens:
        raise SystemExit(f"{args.cache} holds {len(rows_ND)} tokens; lower --tokens {args.tokens}")
    contexts = rows_ND[: len(rows_ND) // CONTEXT * CONTEXT].reshape(-1, CONTEXT, rows_ND.shape[1])
    features = Features({HOOK: Array2D(shape=contexts.shape[1:], dtype="float32")})
    parts = args.prepare / ".tmp_shards"
    for at, first in enumerate(range(0, len(contexts), SHARD_CONTEXTS)):
        piece = contexts[first : first + SHARD_CONTEXTS].astype(np.float32)
        Dataset.from_dict({HOOK: piece}, features=features).save_to_disk(parts / f"shard_{at:05d}", num_shards=1)
    CacheActivationsRunner._consolidate_shards(parts, args.prepare, copy_files=False)


def train_with_sae_lens(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    import sae_lens
    from datasets import Dataset, load_from_disk
    from transformer_lens.hook_points import HookedRootModule

    width = load_from_disk(str(args.peer)).features[HOOK].shape[1]
    with tempfile.TemporaryDirectory() as out:
        config = sae_lens.LanguageModelSAERunnerConfig(
            sae=sae_lens.TopKTrainingSAEConfig(
                k=args.k, d_in=width, d_sae=args.latents, normalize_activations="layer_norm"
            ),
            hook_name=HOOK,
            dataset_path="none",
            context_size=CONTEXT,
            use_cached_activations=True,
            cached_activations_path=str(args.peer),
            training_tokens=args.tokens,
            train_batch_size_tokens=args.batch_tokens,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=out,
            device="cpu",
        )
        unread = Dataset.from_dict({"tokens": [[0] * CONTEXT]})  # a runner wants a text, cached or not
        runner = sae_lens.LanguageModelSAETrainingRunner(config, unread, override_model=HookedRootModule())
        before = time.perf_counter() - began
        runner.run()
        if not list(Path(out).glob("*.safetensors")):
            raise SystemExit("sae_lens saved no SAE")
    print(json.dumps({"seconds_before_training": before}))


if __name__ == "__main__":
    main()
