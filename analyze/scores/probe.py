"""Tell documents' labels from a few latents: k-sparse probing (2305.01610, 2503.09532), beside a probe of the input.

    a document  the mean over its kept tokens of each latent's activation, and of what the SAE reads, x
    chosen      for each label, the k latents whose mean differs most between its documents and all others
    told        the label whose logistic regression on its k latents gives the largest logit; of the input, on all D

Latents and regressions are fitted on four fifths of the documents and asked about the last fifth, five times over, so
that every document is told once. An SAE reads no label, so documents that it was trained on are no worse than others.

Dimension letters: m documents, N tokens, D width of what the SAE reads, F latents, R rows: an SAE's readings.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from routesae.harvest.cache.reader import Cache
from routesae.machine.device import require_packages
from routesae.reporting import Progress, Report, WrongInput
from routesae.train.evaluate import read_in_order
from routesae.train.saes import SAE

log = logging.getLogger(__name__)
KS = (1, 5, 20)
FOLDS = 5
LEAST_DOCUMENTS = 2 * FOLDS  # of a label
MOST_DOCUMENTS = 2000  # that have a label, at even distances; of each there are D + F numbers in memory

Labels = npt.NDArray[np.str_]


@torch.no_grad()
def probe(
    saes: Mapping[str, SAE], cache: Cache, rows: slice, field: str | None, seed: int, report: Report
) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """For each SAE what the metric Probe is a function of, each [m]: 1 for a document whose label was told.

    Of the documents that begin in these rows of tokens. Raises WrongInput if they have no such labels or scikit-learn
    is not installed.
    """
    require_packages("Probe", "probe", "sklearn")
    starts, context = cache.document_starts(), cache.manifest.context
    first, after = np.searchsorted(starts, [rows.start * context, rows.stop * context]).tolist()
    number_m, label_m = labelled(cache, field, first, after)
    # Of each document its place among the m; all others share the one after them.
    place = np.full(len(starts) + 1, len(number_m))
    place[number_m] = np.arange(len(number_m))
    sums: dict[str, list[torch.Tensor]] = {}
    for hidden, position_N in read_in_order(cache, rows, list(saes.values()), report, "read documents"):
        device = position_N.device
        of_N = place[np.searchsorted(starts, position_N.cpu().numpy(), side="right") - 1]
        for name, sae in saes.items():
            out, f = sae.eval()(hidden), sae.latents
            of_R = torch.from_numpy(of_N).to(device).repeat(len(out.x_ND) // len(of_N))
            token_M, latent_M, value_M = out.latents.active()
            if name not in sums:
                sizes = (f, out.x_ND.shape[1], 1)
                sums[name] = [torch.zeros(len(number_m) + 1, size, device=device) for size in sizes]
            latents_mF, input_mD, readings_m1 = sums[name]
            latents_mF.view(-1).index_add_(0, of_R[token_M] * f + latent_M, value_M)
            input_mD.index_add_(0, of_R, out.x_ND)
            readings_m1.index_add_(0, of_R, torch.ones(len(of_R), 1, device=device))
    results = {}
    for at, (name, (latents_mF, input_mD, readings_m1)) in enumerate(sums.items()):
        report(Progress("probe", at, len(sums), "SAEs", {}))
        means = [(part / readings_m1.clamp(min=1)).cpu().numpy()[:-1] for part in (latents_mF, input_mD)]
        told = {f"probe_{k}": _told(means[0], label_m, k, seed) for k in KS}
        results[name] = {
            "documents": np.ones(len(label_m)),
            **told,
            "probe_input": _told(means[1], label_m, None, seed),
        }
    return results


def labelled(cache: Cache, field: str | None, first: int, after: int) -> tuple[npt.NDArray[np.int64], Labels]:
    """Numbers of documents first … after-1 that have a label, and those. Raises WrongInput if they are too few."""
    fields = cache.manifest.keep_fields
    if not fields:
        raise WrongInput(f"Probe needs labels, and {cache.path} keeps no field of documents; harvest --keep-fields")
    if field is None and len(fields) != 1:
        raise WrongInput(f"Probe needs one field of the documents; give --label, of {', '.join(fields)}")
    field = fields[0] if field is None else field
    if field not in fields:
        kept = ", ".join(fields)
        raise WrongInput(f"--label {field} was not kept of {cache.path}'s documents ({kept}); harvest --keep-fields")
    found: npt.NDArray[Any] = np.array(cache.documents()[field].to_pylist()[first:after], dtype=object)
    number_m = np.flatnonzero([name is not None for name in found])
    number_m = number_m[np.linspace(0, len(number_m) - 1, min(len(number_m), MOST_DOCUMENTS)).round().astype(int)]
    names, counts = np.unique(found[number_m].astype(str), return_counts=True)
    usable = names[counts >= LEAST_DOCUMENTS]
    if len(usable) < 2:
        raise WrongInput(
            f"--label {field} has {len(names):,} values on {len(number_m):,} documents, of which {len(usable)} are "
            f"on {LEAST_DOCUMENTS} or more; Probe needs two such, so take another field or more text"
        )
    if len(usable) < len(names):
        log.warning(
            "Probe leaves out %d labels on fewer than %d documents", len(names) - len(usable), LEAST_DOCUMENTS
        )
    number_m = number_m[np.isin(found[number_m], usable)]
    log.info("Probe tells %s of %d documents: %s", field, len(number_m), ", ".join(usable))
    return first + number_m, found[number_m].astype(str)


def _told(mean_mC: npt.NDArray[np.float32], label_m: Labels, k: int | None, seed: int) -> npt.NDArray[np.float64]:
    """[m]: 1 where the label is told from the k columns chosen for each label, or from all."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, told_m = np.unique(label_m), np.zeros(len(label_m))
    for fitted, asked in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(mean_mC, label_m):
        logits: list[Any] = []
        for name in names:
            is_it = label_m[fitted] == name
            differs_C = np.abs(mean_mC[fitted[is_it]].mean(0) - mean_mC[fitted[~is_it]].mean(0))
            columns = np.argsort(-differs_C, kind="stable")[:k]
            model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
            model.fit(mean_mC[fitted][:, columns], is_it)
            logits.append(model.decision_function(mean_mC[asked][:, columns]))
        told_m[asked] = names[np.argmax(logits, axis=0)] == label_m[asked]
    return told_m
