"""How much faster six SAEs are scored together than one by one with plain forward passes.

    python benchmarks/metrics.py --cache CACHE --layer 15                     # trains six SAEs for a moment
    python benchmarks/metrics.py --cache CACHE --sae saes/a --sae saes/b …    # or takes these

KLDiv, DeltaCE and Recovered of each, over the first held-out rows. One by one means what a researcher writes first:
per SAE a clean, a spliced and a zeroed forward pass of the whole LM with hooks on its blocks, and log-probabilities
[B, T, vocabulary] of each, whole. Both get the same LM and SAEs, already loaded, and take turns; medians over the
rounds. The numbers must agree to 1e-4. A line goes to --results.

Dimension letters: B rows, T context, L layers, m positions, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import Tensor

from routesae.analyze.inputs.lm import lm_of_cache, load_lm_of
from routesae.analyze.scores.intervals import draws, measure
from routesae.analyze.scores.lm_scores import score_with_lm
from routesae.analyze.scores.metrics import METRICS
from routesae.harvest.cache.reader import Cache
from routesae.harvest.lm.model import LanguageModel
from routesae.machine.device import pick_device
from routesae.machine.settings import LMSettings
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.saes import SAE, Crosscoder, RouteSAE
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import settings_of

VARIANTS = ("vanilla", "gated", "topk", "jumprelu", "routesae", "crosscoder")
TOLERANCE = 1e-4
NAMES = ("KLDiv", "DeltaCE", "Recovered")
Scores = dict[str, tuple[float, ...]]  # KLDiv, DeltaCE and Recovered of each SAE
Replace = Callable[[int, Tensor], Tensor]  # layer, hidden_BTD → what stands in its place


def log_probabilities(lm: LanguageModel, ids_BT: Tensor, replace: Replace) -> Tensor:
    """[B, T, V], with every block's output put through `replace`."""

    def hook(layer: int) -> Callable[..., Any]:
        def run(module: Any, inputs: Any, output: Any) -> Any:
            in_tuple = isinstance(output, tuple)
            hidden_BTD = replace(layer, output[0] if in_tuple else output)
            return (hidden_BTD, *output[1:]) if in_tuple else hidden_BTD

        return run

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(lm.blocks, 1)]
    try:
        return torch.log_softmax(lm.model(input_ids=ids_BT, use_cache=False).logits.float(), dim=2)
    finally:
        for handle in handles:
            handle.remove()


def places(sae: SAE, hidden: Mapping[int, Tensor], kept_BT: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (mask_BT of what is replaced there, scale_BT of the SAE's input)}."""
    layers, one_BT = sae.recipe.layers, torch.ones_like(kept_BT, dtype=torch.float32)
    if isinstance(sae, RouteSAE):
        _, at_N, scale_N, _ = sae.routes(Hidden(torch.stack([hidden[layer].flatten(0, 1) for layer in layers])))
        at_BT = at_N.view(kept_BT.shape)
        scale_BT = one_BT if scale_N is None else scale_N.view(kept_BT.shape)
        return {layer: (kept_BT & (at_BT == at), scale_BT) for at, layer in enumerate(layers)}
    if isinstance(sae, Crosscoder):
        return dict.fromkeys(layers, (kept_BT, one_BT))
    return {layers[len(layers) // 2]: (kept_BT, one_BT)}


def reconstructed(
    sae: SAE, hidden: Mapping[int, Tensor], layer: int, now_mD: Tensor, mask_BT: Tensor, scale_m1: Tensor
) -> Any:
    """What stands in the place of a layer's hidden states now_mD; a crosscoder reads the clean pass's instead."""
    if isinstance(sae, Crosscoder):
        clean_mLD = torch.stack([hidden[read][mask_BT] for read in sae.recipe.layers], dim=1)
        return sae.decode(sae.encode(clean_mLD))[:, sae.recipe.layers.index(layer)]
    dictionary: Any = sae.shared if isinstance(sae, RouteSAE) else sae
    return dictionary.decode(dictionary.encode_at(now_mD, scale_m1))


def splicing(sae: SAE, hidden: Mapping[int, Tensor], kept_BT: Tensor, *, zero: bool) -> Replace:
    """What the hooks of a spliced pass, or a zeroed one, do. hidden: of the clean pass."""
    where = places(sae, hidden, kept_BT)

    def splice(layer: int, now_BTD: Tensor) -> Tensor:
        if layer not in where or not bool(where[layer][0].any()):
            return now_BTD
        mask_BT, scale_BT = where[layer]
        new_BTD = now_BTD.clone()
        scale_m1 = scale_BT[mask_BT][:, None]
        new_BTD[mask_BT] = 0 if zero else reconstructed(sae, hidden, layer, now_BTD[mask_BT], mask_BT, scale_m1)
        return new_BTD

    return splice


@torch.inference_mode()
def score_plainly(lm: LanguageModel, sae: SAE, ids_ST: Any, kept_ST: Any, batch_sequences: int) -> tuple[float, ...]:
    """KLDiv, DeltaCE and Recovered of one SAE."""
    kl = ce_clean = ce_spliced = ce_zero = 0.0
    for ids, kept in zip(ids_ST.split(batch_sequences), kept_ST.split(batch_sequences), strict=True):
        hidden: dict[int, Tensor] = {}
        clean_BTV = log_probabilities(lm, ids, hidden.setdefault)
        spliced_BTV = log_probabilities(lm, ids, splicing(sae, hidden, kept, zero=False))
        kl += float(F.kl_div(spliced_BTV, clean_BTV, log_target=True, reduction="sum"))
        ce_clean += next_token_loss(clean_BTV, ids)
        ce_spliced += next_token_loss(spliced_BTV, ids)
        del clean_BTV, spliced_BTV
        zeroed_BTV = log_probabilities(lm, ids, splicing(sae, hidden, kept, zero=True))
        ce_zero += next_token_loss(zeroed_BTV, ids)
    rows, context = ids_ST.shape
    delta = ce_spliced - ce_clean
    return kl / (rows * context), delta / (rows * (context - 1)), 1 - delta / (ce_zero - ce_clean)


def next_token_loss(log_p_BTV: Tensor, ids_BT: Tensor) -> float:
    return float(F.nll_loss(log_p_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))


def score_together(lm: LanguageModel, saes: Mapping[str, SAE], ids: Any, kept: Any, batch_sequences: int) -> Scores:
    scores = score_with_lm(lm, saes, ids, kept, batch_sequences=batch_sequences)
    metrics, drawn_RS = [METRICS[name] for name in NAMES], draws(len(ids), seed=0)
    measured = {name: measure(metrics, row_sums, drawn_RS)[0] for name, row_sums in scores.items()}
    return {name: tuple(numbers[metric] for metric in NAMES) for name, numbers in measured.items()}


def six_saes(cache: Cache, layer: int, latents: int, out: str) -> list[Path]:
    """One of each variant, trained for a moment: what they cost to score does not depend on how good they are."""
    flags = {"sae": VARIANTS, "layer": layer, "latents": latents, "k": 32, "tokens": 20_000, "batch_tokens": 1024}
    results = train(settings_of({**flags, "lr": 2e-3, "cache": str(cache.path), "out": out}))
    return [result.folder for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--sae", action="append", default=[], type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=record.RESULTS / "metrics.jsonl")
    args = parser.parse_args()
    cache, device = Cache(args.cache), pick_device(args.device)
    with tempfile.TemporaryDirectory() as out:
        folders = args.sae or six_saes(cache, args.layer, args.latents, out)
        saes = {folder.name: load_sae(folder, device) for folder in folders}
    lm = load_lm_of([lm_of_cache(cache)], None, LMSettings(device=args.device, lm_dtype="float32")).lm
    first = cache.manifest.train_rows
    ids_ST = cache.tokens()[first : first + args.rows]
    kept_ST = cache.kept(first, first + args.rows)
    ids, kept = torch.tensor(ids_ST, dtype=torch.int64).to(device), torch.from_numpy(kept_ST).to(device)
    seconds: dict[str, list[float]] = {"together": [], "one by one": []}
    worst = 0.0
    for _ in range(args.rounds):
        began = time.perf_counter()
        ours = score_together(lm, saes, ids_ST, kept_ST, args.batch_sequences)
        seconds["together"].append(time.perf_counter() - began)
        began = time.perf_counter()
        plain = {name: score_plainly(lm, sae, ids, kept, args.batch_sequences) for name, sae in saes.items()}
        seconds["one by one"].append(time.perf_counter() - began)
        worst = max(abs(a - b) for name in saes for a, b in zip(ours[name], plain[name], strict=True))
        assert worst < TOLERANCE, (ours, plain)
    for name in saes:
        print(f"{name:36}", *(f"{metric} {value:.5f}" for metric, value in zip(NAMES, ours[name], strict=True)))
    medians = {how: statistics.median(times) for how, times in seconds.items()}
    factor = medians["one by one"] / medians["together"]
    print(f"{ids_ST.size:,} tokens, {len(saes)} SAEs; largest difference of a number: {worst:.1e}")
    print(*(f"{how}: {median:.2f} s" for how, median in medians.items()), f"{factor:.2f} times", sep=", ")
    line = {"saes": list(saes), "tokens": ids_ST.size, "seconds": seconds, "factor": factor, "difference": worst}
    record.append(args.results, [{**record.where(), **line, "batch": args.batch_sequences}])


if __name__ == "__main__":
    main()
