"""Held-out NormMSE at equal L0: routesae's trainers beside SAELens', dictionary_learning's and the published recipe.

    benchmarks/environment.sh && benchmarks/.venv/bin/python benchmarks/quality.py --cache CACHE --layer 15

Same cached rows, batches, width, k, learning-rate schedule and seeds for all. One line of results/quality.jsonl a
run, so that a stopped benchmark goes on; then the table, as in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from peers import PEERS, Peer, Task
from torch import Tensor

from routesae.harvest.cache.reader import Cache
from routesae.train.folder.checkpoint import load_sae
from routesae.train.loading.batches import Selection, cut_plans, load
from routesae.train.losses import squared_error_shares
from routesae.train.run import planned, train
from routesae.train.saes.normalise import normalise
from routesae.train.settings import settings_of
from routesae.train.sparse.search import pre_activations

CPU = torch.device("cpu")
VARIANTS = ("topk", "batchtopk", "jumprelu", "gated", "vanilla", "routesae")
TRAINERS_OF = {"topk": ("routesae", *PEERS, "published"), "routesae": ("routesae", "published")}


def rows(cache: Cache, first: int, after: int, layer: int) -> Iterator[Tensor]:
    selection = Selection(cache, first, after, [layer])
    with closing(load(selection, cut_plans(iter(selection.blocks()), 4096), 4096, CPU)) as batches:
        for batch in batches:
            yield normalise(batch.hidden_LND[0])[0]


@torch.no_grad()
def score(peer: Peer, held_out: list[Tensor], k: int) -> tuple[float, float]:
    """NormMSE and L0. Thresholds are multiplied by the one factor that makes k latents active on these rows."""
    codes = [peer.encode(x_ND) for x_ND in held_out]
    if peer.thresholds_F is not None:
        ratios = torch.cat([(z_NF.relu() / peer.thresholds_F.clamp(min=1e-6)).flatten() for z_NF in codes])
        factor = -torch.kthvalue(-ratios, k * sum(map(len, held_out)) + 1).values
        codes = [torch.where(z_NF > factor * peer.thresholds_F, z_NF, 0).relu() for z_NF in codes]
    shares = sum(
        float(squared_error_shares(x_ND, peer.decode(f_NF)).double().sum())
        for x_ND, f_NF in zip(held_out, codes, strict=True)
    )
    active = sum(int((f_NF > 0).sum()) for f_NF in codes)
    return shares / sum(map(len, held_out)), active / sum(map(len, held_out))


def ours(
    args: argparse.Namespace, variant: str, seed: int, held_out: list[Tensor], recipe: str
) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as out:
        flags = {"cache": args.cache, "sae": variant, "layer": args.layer, "latents": args.latents, "k": args.k}
        flags |= {"lr": args.lr, "batch_tokens": args.batch_tokens, "tokens": args.tokens, "seed": seed, "out": out}
        if variant == "routesae":
            del flags["layer"]
        (result,) = train(settings_of(flags | {"recipe": recipe}))
        sae = load_sae(result.folder, CPU)
    if variant not in ("batchtopk", "jumprelu"):
        assert result.held_out is not None
        return result.held_out.norm_mse, result.held_out.l0

    def pre(x_ND: Tensor) -> Tensor:
        parts = pre_activations(x_ND, sae.encoder(), x_ND.dtype)
        return torch.cat([z_nF.clone() for _, z_nF in parts])

    thresholds_F = sae.threshold_F if variant == "jumprelu" else torch.ones(args.latents)
    return score(Peer(pre, lambda f_NF: f_NF @ sae.W_dec_FD + sae.b_dec_D, thresholds_F), held_out, args.k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--trainers", nargs="+", default=["routesae", *PEERS, "published"])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality.jsonl")
    args = parser.parse_args()
    cache = Cache(args.cache)
    held_out = list(rows(cache, cache.manifest.train_rows, cache.manifest.rows, args.layer))
    setup = {name: getattr(args, name) for name in ("layer", "latents", "k", "lr", "batch_tokens", "tokens")}
    args.results.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for seed in range(args.seeds):
        for variant in args.variants:
            for trainer in args.trainers:
                key = {"variant": variant, "trainer": trainer, "seed": seed, **setup}
                if trainer not in TRAINERS_OF.get(variant, ("routesae", *PEERS)):
                    continue
                if any(key.items() <= line.items() for line in done):
                    continue
                began = time.perf_counter()
                if trainer in PEERS:
                    norm_mse, l0 = score(peer(cache, args, variant, trainer, seed), held_out, args.k)
                else:
                    recipe = "published" if trainer == "published" else "routesae"
                    norm_mse, l0 = ours(args, variant, seed, held_out, recipe)
                line = {**key, "norm_mse": norm_mse, "l0": l0, "seconds": time.perf_counter() - began}
                done.append(line)
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{variant:10} {trainer:20} seed {seed}  NormMSE {norm_mse:.4f}  L0 {l0:6.1f}", flush=True)
    print(table([line for line in done if setup.items() <= line.items()]))


def peer(cache: Cache, args: argparse.Namespace, variant: str, trainer: str, seed: int) -> Peer:
    selection = Selection(cache, 0, cache.manifest.train_rows, [args.layer])
    settings = settings_of({"batch_tokens": args.batch_tokens, "tokens": args.tokens, "seed": seed})

    def batches() -> Iterator[Tensor]:
        _, plans = planned(selection, settings)
        with closing(load(selection, plans, args.batch_tokens, CPU)) as loaded:
            for batch in loaded:
                yield normalise(batch.hidden_LND[0])[0]

    steps, _ = planned(selection, settings)
    task = Task(
        variant=variant,
        width=cache.manifest.width,
        latents=args.latents,
        k=args.k,
        lr=args.lr,
        steps=steps,
        seed=seed,
        batches=batches,
    )
    return PEERS[trainer](task)


def table(lines: list[dict]) -> str:
    trainers = list(dict.fromkeys(line["trainer"] for line in lines))
    text = ["| variant | " + " | ".join(trainers) + " |", "|---" * (len(trainers) + 1) + "|"]
    for variant in dict.fromkeys(line["variant"] for line in lines):
        cells = []
        for trainer in trainers:
            runs = [line for line in lines if line["variant"] == variant and line["trainer"] == trainer]
            errors = [run["norm_mse"] for run in runs]
            spread = f" ± {statistics.stdev(errors):.4f}" if len(errors) > 1 else ""
            l0 = statistics.mean(run["l0"] for run in runs) if runs else 0
            cells.append(f"{statistics.mean(errors):.4f}{spread} (L0 {l0:.1f})" if runs else "–")
        text.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
