"""The metrics that need the LM: rows of tokens and SAEs in; KLDiv, DeltaCE and Recovered of each out.

    KLDiv      mean over all positions of KL(P_clean ‖ P_spliced), nats a token
    KLDiv_seq  its sum over a row, averaged over rows: what the published RouteSAE code calls KLDiv
    DeltaCE    CE_spliced − CE_clean, over the positions that have a next token in the row
    Recovered  1 − (CE_spliced − CE_clean) / (CE_zero − CE_clean), zero ablation at the same positions

Every SAE shares the clean pass and its logits. Sums are over tokens, in float64; no mean of batch means.

Dimension letters: B rows, T context, D width, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from routesae.analyze import replacement
from routesae.analyze.splice import clean_pass, logits, spliced_pass
from routesae.harvest.lm import LanguageModel
from routesae.harvest.tokens import Ids
from routesae.reporting import FailedRun, Progress, Report, silent
from routesae.train.saes import SAE, RouteSAE

CHUNK_POSITIONS = 256  # positions whose logits exist at a time: 50 MB each pass at SmolLM2's 49,152 tokens
NO_NEXT_TOKEN = -100  # the last position of a row, left out of the cross-entropy


@dataclass(frozen=True, kw_only=True)
class LMScores:
    """Of one SAE. tokens: positions of the rows scored. ce_*: mean cross-entropy in nats a token.

    ce_zero: None where zero ablation was not run.
    """

    tokens: int
    context: int
    kl_div: float
    ce_clean: float
    ce_spliced: float
    ce_zero: float | None

    @property
    def kl_div_seq(self) -> float:
        return self.kl_div * self.context

    @property
    def delta_ce(self) -> float:
        return self.ce_spliced - self.ce_clean

    @property
    def recovered(self) -> float:
        """Raises FailedRun where zero ablation was not run or changed nothing."""
        if self.ce_zero is None or self.ce_zero == self.ce_clean:
            raise FailedRun("zero ablation does not change the LM's loss, so Recovered is undefined")
        return 1 - self.delta_ce / (self.ce_zero - self.ce_clean)


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
) -> dict[str, LMScores]:
    """Scores of each SAE over rows of tokens; kept_ST marks the positions that may be replaced.

    zero_ablation: whether to run the passes that only Recovered needs.
    Raises WrongInput where an SAE cannot be spliced.
    """
    for sae in saes.values():
        replacement.require_spliceable(sae)
    kl: dict[Pass, float] = defaultdict(float)
    ce: dict[Pass, float] = defaultdict(float)
    rows, context = token_ids_ST.shape
    for start in range(0, rows, batch_sequences):
        batch = slice(start, min(start + batch_sequences, rows))
        token_ids_BT = torch.from_numpy(np.array(token_ids_ST[batch])).long().to(lm.device)
        kept_BT = torch.from_numpy(np.array(kept_ST[batch])).to(lm.device)
        finals = _final_states(lm, saes, token_ids_BT, kept_BT, zero_ablation)
        for sums, batch_sums in zip((kl, ce), _compare(lm, finals, token_ids_BT), strict=True):
            for key, value in batch_sums.items():
                sums[key] += value
        report(Progress("score with the LM", batch.stop * context, rows * context, "tokens", {}))
    predictions = rows * (context - 1)
    return {
        name: LMScores(
            tokens=rows * context,
            context=context,
            kl_div=kl[Pass("spliced", name)] / (rows * context),
            ce_clean=ce[CLEAN] / predictions,
            ce_spliced=ce[Pass("spliced", name)] / predictions,
            ce_zero=ce[Pass("zero", _site(name, sae))] / predictions if zero_ablation else None,
        )
        for name, sae in saes.items()
    }


def _site(name: str, sae: SAE) -> str:
    """Where an SAE is spliced: SAEs of the same layers share it, a router has its own."""
    if isinstance(sae, RouteSAE):
        return f"routes of {name}"
    return f"layers {replacement.spliced_layers(sae)}"


def _final_states(
    lm: LanguageModel, saes: Mapping[str, SAE], token_ids_BT: Tensor, kept_BT: Tensor, zero_ablation: bool
) -> dict[Pass, Tensor]:
    """final_BTD of every pass over one batch of rows."""
    layers = sorted({layer for sae in saes.values() for layer in sae.recipe.layers})
    clean = clean_pass(lm, token_ids_BT, layers)
    finals = {CLEAN: clean.final_BTD}
    for name, sae in saes.items():
        wanted = [Pass("spliced", name)] + [Pass("zero", _site(name, sae))] * zero_ablation
        for key in wanted:
            if key not in finals:
                edits = replacement.edits(sae, clean.hidden, kept_BT, zero=key.kind == "zero")
                finals[key] = spliced_pass(lm, token_ids_BT, clean, edits)
    return finals


@torch.inference_mode()
def _compare(
    lm: LanguageModel, finals: Mapping[Pass, Tensor], token_ids_BT: Tensor
) -> tuple[dict[Pass, float], dict[Pass, float]]:
    """Sums over the batch, for each pass: KL(clean ‖ pass) over all positions, and cross-entropy."""
    flat = {key: final_BTD.flatten(0, 1) for key, final_BTD in finals.items()}
    next_ids = torch.roll(token_ids_BT, -1, dims=1)
    next_ids[:, -1] = NO_NEXT_TOKEN
    next_ids_N = next_ids.flatten()
    kl: dict[Pass, float] = defaultdict(float)
    ce: dict[Pass, float] = defaultdict(float)
    for start in range(0, len(next_ids_N), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        clean_CV = torch.log_softmax(logits(lm, flat[CLEAN][chunk]), dim=1)
        for key, final_ND in flat.items():
            log_p_CV = clean_CV if key == CLEAN else torch.log_softmax(logits(lm, final_ND[chunk]), dim=1)
            nll_C = F.nll_loss(log_p_CV, next_ids_N[chunk], ignore_index=NO_NEXT_TOKEN, reduction="none")
            ce[key] += float(nll_C.double().sum())
            if key.kind == "spliced":
                kl_C = F.kl_div(log_p_CV, clean_CV, log_target=True, reduction="none").sum(1)
                kl[key] += float(kl_C.double().sum())
    return kl, ce
