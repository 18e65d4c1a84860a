"""From a text to five trained SAEs: one harvest and one pass, beside five runs with the LM in the loop.

    benchmarks/environment.sh
    benchmarks/.venv/bin/python benchmarks/from_text.py --json benchmarks/results/from_text.jsonl

Ours is two processes, `routesae harvest` and `routesae train` with five --sae, timed whole, tokenising the text and
the scoring of every SAE among it. The peer is SAELens' own runner with the LM in its loop, once a
variant, each a process of its own. Of each of those only --subset tokens are run, and the time is scaled:

    seconds before training + tokens × (LM's seconds a token + all other seconds of training a token)

which leaves out nothing that grows and counts as much of a run's start as there is. Kind to the peer: it gets tokens
that are made already, and an LM cut after the layer and without its head, as ours is (on a model of transformers its
own loading would run all of it).
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

VARIANTS = ("vanilla", "gated", "topk", "jumprelu", "batchtopk")
CONTEXT = 256
LM_SEQUENCES = 8  # a forward pass, for both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=60_000, help="of the corpus, and trained on")
    parser.add_argument("--subset", type=int, default=8192, help="tokens of which the peer's runs are timed")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument(
        "--peer-lm-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of SAELens' LM; ours picks its own",
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append raw lines to this file")
    parser.add_argument("--peer", choices=VARIANTS, help=argparse.SUPPRESS)  # be the peer's process
    parser.add_argument("--cache", help=argparse.SUPPRESS)  # whose tokens the peer runs
    args = parser.parse_args()
    if args.peer:
        train_with_lm_in_the_loop(args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    here = record.where()
    routesae = [sys.executable, "-m", "routesae"]
    text = [f"--model={args.model}", f"--data={args.data}", f"--context={CONTEXT}", f"--layers={args.layer}"]
    text += [f"--batch-sequences={LM_SEQUENCES}", "--shard-tokens=16k"]
    sae = [
        f"--layer={args.layer}",
        f"--latents={args.latents}",
        f"--k={args.k}",
        f"--batch-tokens={args.batch_tokens}",
    ]
    given = ("layer", "latents", "k", "tokens", "batch_tokens", "subset", "peer_lm_dtype")
    setup = {name: getattr(args, name) for name in given}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache, out = Path(folder, "shards"), Path(folder, "saes")
        measure([*routesae, "harvest", *text, "--tokens=2k", f"--out={cache}"])  # a .gguf is converted once
        for at in range(args.rounds):
            shutil.rmtree(cache)
            harvest = measure([*routesae, "harvest", *text, f"--tokens={args.tokens}", f"--out={cache}"])
            asked = [*(f"--sae={variant}" for variant in VARIANTS), f"--tokens={args.tokens}", *sae]
            train = measure([*routesae, "train", f"--cache={cache}", f"--out={out}", *asked])
            shutil.rmtree(out)
            ours = {"trainer": "routesae", "harvest_seconds": harvest.seconds, "train_seconds": train.seconds}
            took = [{**ours, "seconds": harvest.seconds + train.seconds}]
            for variant in VARIANTS:
                own = [f"--peer={variant}", f"--cache={cache}", f"--subset={args.subset}", *sae]
                own.append(f"--peer-lm-dtype={args.peer_lm_dtype}")
                run = json.loads(measure([sys.executable, __file__, *own]).output.splitlines()[-1])
                took.append({"trainer": "sae_lens", "variant": variant, **run, "seconds": scaled(run, args.tokens)})
            fresh = [{**line, "round": at, **setup, **here} for line in took]
            if args.json:
                record.append(args.json, fresh)
            lines += fresh
    print(table(lines, args.rounds))


def scaled(run: dict[str, float], tokens: int) -> float:
    return run["before_seconds"] + tokens * (run["lm_seconds_a_token"] + run["other_seconds_a_token"])


def table(lines: list[dict[str, Any]], rounds: int) -> str:
    ours = [line for line in lines if line["trainer"] == "routesae"]
    text = ["| | seconds |", "|---|---|"]
    for name in ("harvest_seconds", "train_seconds", "seconds"):
        what = {"seconds": "routesae, both"}.get(name, f"routesae {name.split('_')[0]}")
        text.append(f"| {what} | {statistics.median(line[name] for line in ours):.1f} |")
    for variant in VARIANTS:
        own = [line for line in lines if line.get("variant") == variant]
        text.append(f"| sae_lens, {variant}, scaled | {statistics.median(line['seconds'] for line in own):.1f} |")
    ratios = []
    for at in range(rounds):
        peer = sum(line["seconds"] for line in lines if line["round"] == at and line["trainer"] == "sae_lens")
        ratios.append(peer / next(line["seconds"] for line in ours if line["round"] == at))
    text.append(f"\nfive runs of sae_lens ÷ routesae: {statistics.median(ratios):.2f} (median of {rounds} rounds)")
    return "\n".join(text)


def train_with_lm_in_the_loop(args: argparse.Namespace) -> None:
    """Prints its seconds as JSON, in its last line."""
    began = time.perf_counter()
    import sae_lens
    import torch
    import zarr
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from torch import Tensor, nn

    from routesae.harvest.lm.model import cut_after, load_lm, load_tokenizer

    lm = cut_after(load_lm(args.model, device=torch.device("cpu"), lm_dtype=args.peer_lm_dtype), args.layer)

    class Body(nn.Module):
        """Hands on a tensor: SAELens looks for logits in anything else."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.body = lm.blocks, lm.model

        def forward(self, token_ids_BT: Tensor) -> Tensor:
            return self.body(input_ids=token_ids_BT, use_cache=False).last_hidden_state

    # The last block's name in what SAELens sees: the blocks are reached by the first name they have.
    body = Body()
    hook = next(name for name, module in body.named_modules() if module is lm.blocks[-1])
    tokens_ST = zarr.open_group(args.cache, mode="r")["tokens"][:]
    with tempfile.TemporaryDirectory() as out:
        config = sae_lens.LanguageModelSAERunnerConfig(
            sae=_sae_config(args, lm.width),
            hook_name=hook,
            dataset_path="none",
            context_size=CONTEXT,
            store_batch_size_prompts=LM_SEQUENCES,
            training_tokens=args.subset,
            train_batch_size_tokens=args.batch_tokens,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=out,
            device="cpu",
        )
        model = HookedProxyLM(body, load_tokenizer(args.model), hook_names=[hook])
        data = Dataset.from_dict({"tokens": tokens_ST})
        runner = sae_lens.LanguageModelSAETrainingRunner(config, data, override_model=model)
        in_lm = _timed_lm(runner.activations_store)
        ready = time.perf_counter()
        runner.run()
    trained = -(-args.subset // args.batch_tokens) * args.batch_tokens
    other = time.perf_counter() - ready - in_lm["seconds"]
    seconds = {"before_seconds": ready - began, "lm_seconds_a_token": in_lm["seconds"] / in_lm["tokens"]}
    print(json.dumps({**seconds, "lm_tokens": in_lm["tokens"], "other_seconds_a_token": other / trained}))


def _sae_config(args: argparse.Namespace, width: int) -> Any:
    import sae_lens

    common = {"d_in": width, "d_sae": args.latents, "normalize_activations": "layer_norm"}
    return {
        "vanilla": lambda: sae_lens.StandardTrainingSAEConfig(**common),
        "gated": lambda: sae_lens.GatedTrainingSAEConfig(**common),
        "topk": lambda: sae_lens.TopKTrainingSAEConfig(k=args.k, **common),
        "jumprelu": lambda: sae_lens.JumpReLUTrainingSAEConfig(**common),
        "batchtopk": lambda: sae_lens.BatchTopKTrainingSAEConfig(k=args.k, **common),
    }[args.peer]()


def _timed_lm(store: Any) -> dict[str, float]:
    """What the store's passes through the LM come to, from here on."""
    spent = {"seconds": 0.0, "tokens": 0}
    run = store.get_raw_llm_batch

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        batch = run(*arguments, **named)
        spent["seconds"] += time.perf_counter() - began
        spent["tokens"] += len(batch[0])
        return batch

    store.get_raw_llm_batch = timed
    return spent


if __name__ == "__main__":
    main()
