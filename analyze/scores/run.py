"""Run `routesae analyze`: score SAEs on rows of a cache, one row of numbers for each SAE and sparsity.

The LM is loaded only if a metric needs it.
"""

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch

from routesae import __version__
from routesae.analyze.contexts.file import read_facts
from routesae.analyze.inputs.lm import lm_of_cache, load_lm_of, load_tokenizer_of
from routesae.analyze.inputs.saes import OpenSAE, cache_identity, open_saes, rows_to_read, sae_identity
from routesae.analyze.scores.absorption import absorption
from routesae.analyze.scores.intervals import draws, measure
from routesae.analyze.scores.metrics import METRICS
from routesae.analyze.scores.probe import probe
from routesae.analyze.scores.results import described
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.harvest.settings import layer_list
from routesae.machine.device import pick_device
from routesae.machine.files import signed
from routesae.reporting import FailedRun, Report, WrongInput, silent
from routesae.train.evaluate import score_all_on_cache
from routesae.train.saes import SAE
from routesae.train.sparse.kernels import threshold_latents, topk_latents

log = logging.getLogger(__name__)
DECISIVE = ("torch", "transformers", "numpy")  # packages that decide a number


def analyze(settings: AnalyzeSettings, report: Report = silent) -> dict[str, Any]:
    """Returns the rows of the table under "saes", and beside them what they were computed from; signed.

    Raises WrongInput if cache, SAEs, metrics and LM do not fit together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    identity = cache_identity(cache)
    device = pick_device(settings.device)
    opened = open_saes(settings.saes, Path(settings.out), cache, device)
    metrics = [METRICS[name] for name in settings.metrics]
    probing = [metric for metric in metrics if metric.drawn != "rows"]
    # A corpus has few documents and words, and an SAE reads no label, so those that it was trained on serve too.
    rows_probed = "all" if settings.rows is None and not cache.ring() else settings.rows
    rows_wanted = rows_probed if probing == metrics else settings.rows
    which, first, after = rows_to_read(rows_wanted, cache, opened, settings.tokens)
    probed = slice(*rows_to_read(rows_probed or which, cache, opened, settings.tokens)[1:])
    saes, rows = _views(opened, settings, cache.manifest.tokens_hash)
    descriptions = {name: described(one.beside, cache.manifest.tokens_hash) for name, one in opened.items()}
    of_cache = [metric for metric in metrics if metric.drawn == "rows" and not metric.needs_lm]
    of_documents = [metric for metric in probing if metric.drawn == "documents"]
    of_words = [metric for metric in probing if metric.drawn == "words"]
    of_lm = [metric for metric in metrics if metric.needs_lm]
    drawn_RS = draws(after - first, settings.seed)
    if of_cache:
        for key, scores in score_all_on_cache(saes, cache, first, after, report).items():
            layers = saes[key].recipe.layers
            _add(rows[key], *measure(of_cache, scores.by_row, drawn_RS, layers=layers, dead=scores.dead))
    if of_documents:
        for key, sums in probe(saes, cache, probed, settings.label, settings.seed, report).items():
            _add(rows[key], *measure(of_documents, sums, draws(len(sums["documents"]), settings.seed)))
    if of_words:
        tokenizer = load_tokenizer_of([lm_of_cache(cache)], settings.model)
        for key, sums in absorption(saes, cache, probed, tokenizer, settings.seed, report).items():
            _add(rows[key], *measure(of_words, sums, draws(len(sums["recognised"]), settings.seed)))
    if of_lm:
        for key, row_sums in _row_sums_of_lm(settings, cache, saes, slice(first, after), report).items():
            _add(rows[key], *measure(of_lm, row_sums, drawn_RS))
    if cache_identity(Cache(settings.cache)) != identity:
        raise FailedRun(f"{cache.path} was replaced while it was scored; run the same command again")
    versions = {"python": python_version(), "routesae": __version__, **{name: version(name) for name in DECISIVE}}
    results = {
        "routesae": __version__,
        "versions": versions,
        "settings": settings.to_dict(),
        "device": str(device),
        "cache": identity,
        "rows": which,
        "rows_scored": [first, after],
        "tokens_scored": (after - first) * cache.manifest.context,
        "rows_probed": [probed.start, probed.stop] if probing else None,
        "identities": {name: sae_identity(sae.sae) for name, sae in opened.items()},
        "saes": [row | descriptions[row["sae"]] for row in rows.values()],
    }
    return signed(results)


def _views(
    opened: Mapping[str, OpenSAE], settings: AnalyzeSettings, tokens_hash: str
) -> tuple[dict[str, SAE], dict[str, dict[str, Any]]]:
    """Every SAE at every sparsity, and the columns of its row that are known before it is scored.

    Sparsities that an SAE cannot have are left out with a warning. Raises WrongInput if nothing is left.
    """
    sparsities: list[dict[str, Any]] = [{"infer_k": k} for k in dict.fromkeys(settings.infer_k)]
    sparsities += [{"theta": theta} for theta in dict.fromkeys(settings.theta)]
    saes, rows, refusals, thresholds = {}, {}, [], {}
    for name, one in opened.items():
        if (facts := read_facts(one.beside, tokens_hash)) is not None:
            thresholds[name] = facts["settings"]["threshold"]
        for sparsity in sparsities or [{}]:
            key = ", ".join([name, *(f"{what} {value:g}" for what, value in sparsity.items())])
            try:
                saes[key] = at_sparsity(one.sae, **sparsity) if sparsity else one.sae
            except WrongInput as refusal:
                refusals.append(f"{name}: {refusal}")
                continue
            rows[key] = {
                "sae": name,
                "folder": str(one.folder),
                "variant": one.sae.recipe.sae,
                "layers": layer_list(one.sae.layers),
                "latents": one.sae.recipe.latents,
                **sparsity,
            }
    if not saes:
        raise WrongInput(refusals[0])
    for reason in dict.fromkeys(refusals):
        log.warning("left out: %s", reason)
    if len(set(thresholds.values())) > 1:
        counted = ", ".join(f"{name} above {threshold:g}" for name, threshold in thresholds.items())
        log.warning("Features are not counted alike: %s; run routesae contexts with one --threshold", counted)
    return saes, rows


def at_sparsity(sae: SAE, *, infer_k: int | None = None, theta: float | None = None) -> SAE:
    """A view of `sae` at another sparsity than it was trained for, with the same weights in memory, not for training.

    infer_k: f = ReLU(TopK(z, k)). theta: f = z·1[z > θ], and never below 0. One of the two is given.

    z = W_enc (x − b_dec) + b_enc is the pre-activation, on the SAE's normalised (and routed, scaled) input. Either
    takes the place of whatever the variant does with z, as in the published RouteSAE code. Raises WrongInput for a
    gated SAE, which decides by one number and measures by another, and so has no such z.
    """
    if not sae.other_sparsity:
        inner = sae.recipe.routed if sae.recipe.sae == "routesae" else sae.recipe.sae
        flag = "--theta" if infer_k is None else "--infer-k"
        raise WrongInput(f"{flag} is not for a {inner} SAE, whose latents are not a function of one number")
    if infer_k is None:
        floor = torch.tensor(theta, device=sae.device)
        return sae.at_sparsity(lambda x_ND, encoder: threshold_latents(x_ND, encoder, floor))
    if infer_k > sae.recipe.latents:
        raise WrongInput(f"--infer-k {infer_k} is more than the SAE's {sae.recipe.latents} latents; lower it")
    return sae.at_sparsity(lambda x_ND, encoder: topk_latents(x_ND, encoder, infer_k))


def _add(row: dict[str, Any], numbers: Mapping[str, Any], intervals: Mapping[str, list[float]]) -> None:
    row |= numbers
    row.setdefault("intervals", {}).update(intervals)


def _row_sums_of_lm(
    settings: AnalyzeSettings, cache: Cache, saes: Mapping[str, SAE], rows: slice, report: Report
) -> dict[str, dict[str, Any]]:
    """What the LM's metrics are computed from. SAEs that cannot be spliced are left out with a warning."""
    from routesae.analyze.scores.lm_scores import score_with_lm
    from routesae.analyze.scores.replacement import require_spliceable

    spliceable = {}
    for name, sae in saes.items():
        try:
            require_spliceable(sae)
            spliceable[name] = sae
        except WrongInput as refusal:
            if len(saes) == 1:
                raise
            log.warning("%s: left out of the LM's metrics: %s", name, refusal)
    if not spliceable:
        raise WrongInput(f"none of {', '.join(saes)} can be spliced into the LM; train one with --routing hard")
    loaded = load_lm_of([lm_of_cache(cache)], settings.model, settings)
    token_ids_ST, kept_ST = cache.tokens()[rows], cache.kept(rows.start, rows.stop)
    if settings.all_positions:
        kept_ST = np.ones_like(kept_ST)
    return score_with_lm(
        loaded.lm,
        spliceable,
        token_ids_ST,
        kept_ST,
        batch_sequences=settings.batch_sequences,
        zero_ablation=any(METRICS[name].zero_ablation for name in settings.metrics),
        report=report,
    )
