"""Quality at equal L0 of routesae's trainers, other libraries' and controls, on the same rows, batches and seeds.

    benchmarks/environment.sh
    P=benchmarks/.venv/bin/python
    $P benchmarks/quality.py --cache CACHE --layer 15 --tokens 8M --save SAVED --lm 20k    # runs, hours, resumable
    $P benchmarks/quality.py --cache CACHE --layer 15 --tokens 8M --only-table --plot curves.png

A trainer is `routesae` or one of peers.py, and may have settings behind a colon:

    routesae                          our defaults, at --lr
    routesae:lr=4e-3,clip=0           any setting of `routesae train`
    routesae:freeze=decoder           a control, as are `pca` and `mean` (of the variant `control`)
    sae_lens                          at our settings; sae_lens:lr=4e-3 at another rate
    sae_lens:own                      at its own; sparsify:own,optimizer=muon

Every run is one line of results/quality.jsonl: held-out NormMSE, FVU, L0 and dead share by the code of `routesae
analyze`, NormMSE every --curve-every steps, seconds of training without those, and with --lm KLDiv and Recovered.
Where latents pass a threshold, all of an SAE's are multiplied by the one factor that makes k active on CURVE_TOKENS
held-out tokens. A line that is there is not run again. --save keeps each SAE as a folder for `routesae analyze`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peers import PEERS, SINGLE, Task
from record import append, where

from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.settings import read_count
from routesae.train import run as training
from routesae.train.evaluate import score_on_cache
from routesae.train.folder.checkpoint import load_sae, read_config, save_sae
from routesae.train.loading.batches import Batch, Selection, cut_plans, load
from routesae.train.losses import squared_error_shares
from routesae.train.optimiser import peak_lr
from routesae.train.saes import SAE
from routesae.train.saes.normalise import Hidden, normalise
from routesae.train.settings import settings_of
from routesae.train.trainee import Trainee

CPU = torch.device("cpu")
VARIANTS = (*SINGLE, "control")
TRAINERS = ("routesae", "sae_lens", "sae_lens:own", "dictionary_learning", "dictionary_learning:own")
TRAINERS += ("sparsify", "sparsify:own", "pca", "mean", "routesae:freeze=decoder", "routesae:freeze=encoder")
CURVE_TOKENS = 16_384
COLUMNS = {"norm_mse": ".4f", "fvu": ".4f", "kl_div": ".3f", "recovered": ".3f", "l0": ".1f", "dead": ".3f"}
COLUMNS |= {"seconds": ".0f"}


class Watch:
    """Scores an SAE in training every so many steps, and keeps the time that this takes apart."""

    def __init__(self, held_out: Sequence[Hidden], every: int, k: int):
        self.held_out, self.every, self.k = held_out, every, k
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0

    def __call__(self, step: int, made: Callable[[], SAE]) -> None:
        if step % self.every == 0:
            began = time.perf_counter()
            self.curve.append((step, error(at_k(deepcopy(made()).eval(), self.held_out, self.k), self.held_out)))
            self.seconds += time.perf_counter() - began


@torch.no_grad()
def error(sae: SAE, held_out: Sequence[Hidden]) -> float:
    """NormMSE."""
    outs = [sae(hidden) for hidden in held_out]
    return float(torch.cat([squared_error_shares(out.x_ND, out.reconstruction_ND) for out in outs]).mean())


@torch.no_grad()
def at_k(sae: SAE, held_out: Sequence[Hidden], k: int) -> SAE:
    """The SAE, its thresholds times the one factor that makes k latents active a token; as it is without any."""
    dictionary = sae.dictionary
    name = next((name for name in ("threshold_F", "threshold") if hasattr(dictionary, name)), None)
    if name is None:
        return sae
    threshold = getattr(dictionary, name).clamp(min=1e-6)
    largest, rows = [], 0
    for hidden in held_out:
        x_RD = sae.read(sae.normalised(hidden), training=False).x_RC
        encoder = dictionary.encoder()
        ratios = (torch.addmm(encoder.bias(), x_RD, encoder.W_enc_FD.T) / threshold).flatten()
        largest.append(ratios.topk(min(2 * k * len(x_RD), len(ratios)), sorted=False).values)
        rows += len(x_RD)
    factor = -torch.kthvalue(-torch.cat(largest), k * rows + 1).values
    getattr(dictionary, name).copy_(threshold * factor)
    return sae


def hidden_of(cache: Cache, layers: Sequence[int], tokens: int) -> list[Hidden]:
    """The first held-out tokens, in stored order, which is shuffled."""
    selection = Selection(cache, cache.manifest.train_rows, cache.manifest.rows, layers)
    read: list[Hidden] = []
    with closing(load(selection, cut_plans(iter(selection.blocks()), 4096), 4096, CPU)) as batches:
        for batch in batches:
            read.append(Hidden(*Batch(*(part.clone() for part in batch)), layers=selection.layers))
            if 4096 * len(read) >= tokens:
                break
    return read


def ours(
    args: argparse.Namespace, variant: str, options: dict[str, str], seed: int, watch: Watch
) -> tuple[SAE, dict[str, Any]]:
    """The SAE, and the record of where it comes from."""

    class Watched(Trainee):
        def step(self, step: int, hidden: Hidden, tokens: int) -> None:
            super().step(step, hidden, tokens)
            watch(step, lambda: self.sae)

    with tempfile.TemporaryDirectory() as out, patch.object(training, "Trainee", Watched):
        flags = {"cache": args.cache, "sae": variant, "latents": args.latents, "k": args.k, "lr": args.lr, "out": out}
        flags |= {"batch_tokens": args.batch_tokens, "tokens": args.tokens, "seed": seed, **options}
        if variant in SINGLE:
            flags["layer"] = args.layer
        (result,) = training.train(settings_of(flags))
        sae = load_sae(result.folder, CPU)
        return sae, read_config(result.folder)["metadata"]["routesae"]["source"]


def theirs(
    args: argparse.Namespace,
    cache: Cache,
    variant: str,
    trainer: str,
    options: dict[str, str],
    seed: int,
    watch: Watch,
) -> tuple[SAE, dict[str, Any]]:
    selection = Selection(cache, 0, cache.manifest.train_rows, [args.layer])
    settings = settings_of({"batch_tokens": args.batch_tokens, "tokens": args.tokens, "seed": seed})

    def batches() -> Iterator[torch.Tensor]:
        _, plans = training.planned(selection, settings)
        with closing(load(selection, plans, args.batch_tokens, CPU)) as loaded:
            for batch in loaded:
                yield normalise(batch.hidden_LND[0])[0]

    own = "own" in options
    task = Task(
        variant=variant,
        layer=args.layer,
        width=cache.manifest.width,
        latents=args.latents,
        k=args.k,
        lr=float(options["lr"]) if "lr" in options else None if own else args.lr,
        steps=training.planned(selection, settings)[0],
        seed=seed,
        own=own,
        optimizer=options.get("optimizer", "signum" if own else "adam"),
        batches=batches,
        watch=watch,
    )
    manifest = cache.manifest
    origin = {**manifest.to_dict(), "lm_weights": manifest.weights_hash}
    source = {"model": manifest.model, "corpus": manifest.corpus, "context": manifest.context, "trainer": trainer}
    return PEERS[trainer][0](task), source | {"cache": manifest.to_dict(), "identity": {"cache": origin}}


def one_run(args: argparse.Namespace, cache: Cache, variant: str, trainer: str, seed: int) -> dict[str, Any]:
    """The results of one training."""
    name, _, listed = trainer.partition(":")
    options = {key: value for key, _, value in (part.partition("=") for part in listed.split(",") if part)}
    layers = [args.layer] if name in PEERS or variant in SINGLE else cache.manifest.layers
    watch = Watch(hidden_of(cache, layers, CURVE_TOKENS), args.curve_every, args.k)
    began = time.perf_counter()
    if name in PEERS:
        sae, source = theirs(args, cache, variant, name, options, seed, watch)
    else:
        sae, source = ours(args, variant, options, seed, watch)
    seconds = time.perf_counter() - began - watch.seconds
    sae = at_k(sae, watch.held_out, args.k)
    scores = score_on_cache(sae, cache, cache.manifest.train_rows, cache.manifest.rows)
    line = {"norm_mse": scores.norm_mse, "fvu": scores.fvu, "l0": scores.l0, "dead": scores.dead, "seconds": seconds}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(args.save or kept) / f"{variant}_{trainer}_seed{seed}".translate(str.maketrans(":=,", "---"))
        folder.mkdir(parents=True, exist_ok=True)
        save_sae(folder, sae, source)
        if args.lm:
            asked = AnalyzeSettings(
                metrics=("KLDiv", "Recovered"),
                saes=(str(folder),),
                cache=args.cache,
                tokens=args.lm,
                model=args.model,
            )
            (row,) = analyze(asked)["saes"]
            line |= {"kl_div": row["KLDiv"], "recovered": row["Recovered"]}
    return {**line, "curve": watch.curve, "where": where()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, help="default: that of `routesae train`")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--tokens", type=read_count, default=400_000, help="of training, such as 8M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--trainers", nargs="+", default=TRAINERS)
    parser.add_argument("--curve-every", type=int, default=100, help="steps between scores in training")
    parser.add_argument("--save", help="folder for the SAEs")
    parser.add_argument("--lm", type=read_count, help="held-out tokens for KLDiv and Recovered")
    parser.add_argument("--model", help="where the LM is now")
    parser.add_argument("--plot", type=Path, help="PNG of NormMSE over steps")
    parser.add_argument("--only-table", action="store_true", help="of the lines that are there")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality.jsonl")
    args = parser.parse_args()
    cache = Cache(args.cache)
    args.lr = args.lr or peak_lr(args.latents)
    setup = {name: getattr(args, name) for name in ("layer", "latents", "k", "lr", "batch_tokens", "tokens")}
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for seed in range(args.seeds) if not args.only_table else ():
        for variant in args.variants:
            for trainer in args.trainers:
                key = {"variant": variant, "trainer": trainer, "seed": seed, **setup}
                name = trainer.partition(":")[0]
                if variant not in (PEERS[name][1] if name in PEERS else {*args.variants} - {"control"}):
                    continue
                if any(key.items() <= line.items() for line in done):
                    continue
                line = {**key, **one_run(args, cache, variant, trainer, seed)}
                done.append(line)
                append(args.results, [line])
                print(
                    json.dumps({name: line[name] for name in ("variant", "trainer", "seed", "norm_mse")}), flush=True
                )
    lines = [line for line in done if setup.items() <= line.items()]
    print(table(lines))
    if args.plot is not None:
        plot(lines, args.plot)


def grouped(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The runs of each (variant, trainer), one a seed."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: [*VARIANTS, line["variant"]].index(line["variant"])):
        groups.setdefault((line["variant"], line["trainer"]), []).append(line)
    return groups


def table(lines: Sequence[dict[str, Any]]) -> str:
    """In Markdown: mean ± standard deviation over seeds."""
    text = ["| variant | trainer | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for (variant, trainer), runs in grouped(lines).items():
        cells = []
        for column, digits in COLUMNS.items():
            values = [run[column] for run in runs if run.get(column) is not None]
            spread = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{digits}}{spread}" if values else "–")
        text.append(f"| {variant} | {trainer} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out NormMSE over steps, a panel for each variant, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {key: [run["curve"] for run in runs if run.get("curve")] for key, runs in grouped(lines).items()}
    groups = {key: curves for key, curves in groups.items() if curves}
    variants = list(dict.fromkeys(variant for variant, _ in groups))
    across, down = min(3, len(variants)), -(-len(variants) // 3)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False, sharey=True)
    for variant, axis in zip(variants, axes.flat, strict=False):
        for (of, trainer), curves in groups.items():
            if of == variant:
                points = list(zip(*curves, strict=True))  # of every seed at a step
                errors = [statistics.mean(error for _, error in point) for point in points]
                axis.plot([point[0][0] for point in points], errors, label=trainer)
        axis.set(title=variant, xlabel="step", yscale="log")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(variants) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("held-out NormMSE")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
