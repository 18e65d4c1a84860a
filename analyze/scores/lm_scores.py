"""Run the LM clean, with each SAE spliced in and with zeros in its place, and sum what the metrics need by row.

Every SAE shares the clean pass and its logits, and SAEs that are spliced at the same site share zero ablation. Sums
are in float64. With z the logits and Z = log Σ exp z, a position costs one exponential of the vocabulary a pass:

    KL(p ‖ q) = Σ p (z_p − z_q) − Z_p + Z_q;   −log q(next) = Z_q − z_q[next]

Dimension letters: S rows of tokens in all, B of a batch, T context, D width, N positions of a batch, C of a chunk,
V vocabulary.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routesae.analyze.scores import replacement
from routesae.harvest.cache.manifest import Ids
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import clean_pass, logits, spliced_pass
from routesae.machine.device import free_memory
from routesae.reporting import Progress, Report, silent
from routesae.train.saes import SAE, RouteSAE
from routesae.train.saes.normalise import places_of

CHUNK_POSITIONS = 256  # positions whose logits exist at a time on a CPU: 50 MB each pass at SmolLM2's 49,152 tokens
PASSES_HELD = 8  # passes whose final states, [B, T, D] each, are held at a time and compared with the same logits

Rows = npt.NDArray[np.float64]


class Pass(NamedTuple):
    """One way the LM ran over the rows: clean, spliced with an SAE, or with zeros at a site (`of`)."""

    kind: str
    of: str


CLEAN = Pass("clean", "")


def score_with_lm(
    lm: LanguageModel,
    saes: Mapping[str, SAE],
    token_ids_ST: Ids,
    kept_ST: npt.NDArray[np.bool_],
    *,
    batch_sequences: int,
    zero_ablation: bool = True,
    report: Report = silent,
) -> dict[str, dict[str, Rows]]:
    """For each SAE what the LM's metrics are functions of (routesae.analyze.scores.metrics), each [S].

    kept_ST marks the positions that may be replaced. zero_ablation: whether to run the passes that ce_zero needs.
    Raises WrongInput if an SAE cannot be spliced.
    """
    for sae in saes.values():
        replacement.require_spliceable(sae)
    rows, context = token_ids_ST.shape
    passes = {Pass("spliced", name): sae for name, sae in saes.items()}
    if zero_ablation:
        passes |= {Pass("zero", _site(sae)): sae for sae in saes.values()}
    layers = sorted({layer for sae in saes.values() for layer in sae.recipe.layers})
    kl, ce = ({key: np.zeros(rows) for key in (CLEAN, *passes)} for _ in range(2))
    for start in range(0, rows, batch_sequences):
        batch = slice(start, min(start + batch_sequences, rows))
        token_ids_BT = torch.from_numpy(np.array(token_ids_ST[batch])).long().to(lm.device)
        kept_BT = torch.from_numpy(np.array(kept_ST[batch])).to(lm.device)
        place_BT = places_of(token_ids_BT, torch.arange(context, device=lm.device))
        clean = clean_pass(lm, token_ids_BT, layers)
        for first in range(0, len(passes), PASSES_HELD):
            finals = {CLEAN: clean.final_BTD}
            for key, sae in islice(passes.items(), first, first + PASSES_HELD):
                edits = replacement.edits(sae, clean.hidden, kept_BT, place_BT, zero=key.kind == "zero")
                finals[key] = spliced_pass(lm, token_ids_BT, clean, edits)
            for key, kl_B, ce_B in _compare(lm, finals, token_ids_BT):
                kl[key][batch], ce[key][batch] = kl_B, ce_B
        report(Progress("score with the LM", batch.stop * context, rows * context, "tokens", {}))
    ones_S = np.ones(rows)
    counts = {"rows": ones_S, "positions": context * ones_S, "predictions": (context - 1) * ones_S}
    results = {}
    for name, sae in saes.items():
        spliced = Pass("spliced", name)
        results[name] = {**counts, "kl": kl[spliced], "ce_clean": ce[CLEAN], "ce_spliced": ce[spliced]}
        if zero_ablation:
            results[name]["ce_zero"] = ce[Pass("zero", _site(sae))]
    return results


def chunk_positions(vocabulary: int, free_bytes: int | None) -> int:
    """Positions whose logits exist at a time: what half of a GPU's free memory holds; free_bytes is None on a CPU.

    A position takes 32 bytes a token of the vocabulary: four float32 arrays at a time, and as much to make them.
    """
    return CHUNK_POSITIONS if free_bytes is None else max(1, free_bytes // 2 // (32 * vocabulary))


def _site(sae: SAE) -> str:
    """Where an SAE is spliced: SAEs of the same layers share it, as do views of one SAE, which share its router."""
    if isinstance(sae, RouteSAE):
        return f"routes of router {id(sae.router_LD)}"
    return f"layers {replacement.spliced_layers(sae)}"


@torch.inference_mode()
def _compare(
    lm: LanguageModel, finals: Mapping[Pass, Tensor], token_ids_BT: Tensor
) -> Iterator[tuple[Pass, Rows, Rows]]:
    """For each pass, clean among them: KL(clean ‖ pass) and cross-entropy, summed over the positions of each row."""
    flat = {key: final_BTD.flatten(0, 1) for key, final_BTD in finals.items()}
    next_N = torch.roll(token_ids_BT, -1, dims=1).flatten()
    zeros_N = torch.zeros(len(next_N), dtype=torch.float64, device=next_N.device)
    kl, ce = ({key: zeros_N.clone() for key in flat} for _ in range(2))
    size = chunk_positions(lm.model.config.get_text_config().vocab_size, free_memory(lm.device))
    for start in range(0, len(next_N), size):
        chunk = slice(start, start + size)
        clean_CV = logits(lm, flat[CLEAN][chunk])
        p_CV = torch.softmax(clean_CV, dim=1)
        log_total_C = torch.logsumexp(clean_CV, dim=1)
        for key, final_ND in flat.items():
            z_CV = clean_CV if key == CLEAN else logits(lm, final_ND[chunk])
            log_total_q_C = log_total_C if key == CLEAN else torch.logsumexp(z_CV, dim=1)
            ce[key][chunk] = log_total_q_C - z_CV.gather(1, next_N[chunk, None]).squeeze(1)
            if key.kind == "spliced":
                kl[key][chunk] = torch.linalg.vecdot(p_CV, clean_CV - z_CV) - log_total_C + log_total_q_C
    rows, context = token_ids_BT.shape
    for key in flat:
        ce_BT = ce[key].view(rows, context)[:, :-1]  # the last position of a row has no next token
        yield key, kl[key].view(rows, context).sum(1).cpu().numpy(), ce_BT.sum(1).cpu().numpy()
