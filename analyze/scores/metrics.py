"""The metrics that need the LM: rows of tokens and SAEs in; KLDiv, DeltaCE and Recovered of each out.

    KLDiv      mean over all positions of KL(P_clean ‖ P_spliced), nats a token
    KLDiv_seq  its sum over a row, averaged over rows: what the published RouteSAE code calls KLDiv
    DeltaCE    CE_spliced − CE_clean, over the positions that have a next token in the row
    Recovered  1 − (CE_spliced − CE_clean) / (CE_zero − CE_clean), zero ablation at the same positions

Every SAE shares the clean pass and its logits, and with SAEs spliced at the same site zero ablation. Sums are over
tokens, in float64, and kept by row of tokens, for intervals; no mean of batch means.

With z the logits and Z = log Σ exp z, a position costs one exponential of the vocabulary a pass:

    KL(p ‖ q) = Σ p (z_p − z_q) − Z_p + Z_q;   −log q(next) = Z_q − z_q[next]

Dimension letters: S rows of tokens in all, B of a batch, T context, D width, N positions of a batch, C of a chunk,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routesae.analyze.scores import replacement
from routesae.harvest.corpus.tokens import Ids
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.splice import CleanPass, clean_pass, logits, spliced_pass
from routesae.reporting import FailedRun, Progress, Report, silent
from routesae.train.saes import SAE, RouteSAE
from routesae.train.saes.routers import places_of

CHUNK_POSITIONS = 256  # positions whose logits exist at a time: 50 MB each pass at SmolLM2's 49,152 tokens
PASSES_HELD = (
    8  # spliced passes whose final states, [B, T, D] each, are held at a time; the clean logits serve them all
)

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LMScores:
    """Of one SAE. kl_S, ce_*_S: sums over the positions of each row of tokens, in nats.

    ce_zero_S: None where zero ablation was not run.
    """

    context: int
    kl_S: Rows
    ce_clean_S: Rows
    ce_spliced_S: Rows
    ce_zero_S: Rows | None

    @property
    def tokens(self) -> int:
        """Positions scored."""
        return len(self.kl_S) * self.context

    @property
    def kl_div(self) -> float:
        return float(self.kl_S.sum()) / self.tokens

    @property
    def kl_div_seq(self) -> float:
        return self.kl_div * self.context

    @property
    def ce_clean(self) -> float:
        """Mean cross-entropy in nats a token, as the other two."""
        return self._mean(self.ce_clean_S)

    @property
    def ce_spliced(self) -> float:
        return self._mean(self.ce_spliced_S)

    @property
    def ce_zero(self) -> float | None:
        return None if self.ce_zero_S is None else self._mean(self.ce_zero_S)

    @property
    def delta_ce(self) -> float:
        return self.ce_spliced - self.ce_clean

    @property
    def recovered(self) -> float:
        """Raises FailedRun where zero ablation was not run or changed nothing."""
        if self.ce_zero is None or self.ce_zero == self.ce_clean:
            raise FailedRun("zero ablation does not change the LM's loss, so Recovered is undefined")
        return 1 - self.delta_ce / (self.ce_zero - self.ce_clean)

    def _mean(self, ce_S: Rows) -> float:
        return float(ce_S.sum()) / (len(ce_S) * (self.context - 1))


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
    rows, context = token_ids_ST.shape
    kl: dict[Pass, Rows] = {}
    ce: dict[Pass, Rows] = {}
    for start in range(0, rows, batch_sequences):
        batch = slice(start, min(start + batch_sequences, rows))
        token_ids_BT = torch.from_numpy(np.array(token_ids_ST[batch])).long().to(lm.device)
        kept_BT = torch.from_numpy(np.array(kept_ST[batch])).to(lm.device)
        for key, kl_B, ce_B in _score_batch(lm, saes, token_ids_BT, kept_BT, zero_ablation):
            kl.setdefault(key, np.zeros(rows))[batch] = kl_B
            ce.setdefault(key, np.zeros(rows))[batch] = ce_B
        report(Progress("score with the LM", batch.stop * context, rows * context, "tokens", {}))
    return {
        name: LMScores(
            context=context,
            kl_S=kl[Pass("spliced", name)],
            ce_clean_S=ce[CLEAN],
            ce_spliced_S=ce[Pass("spliced", name)],
            ce_zero_S=ce[Pass("zero", _site(sae))] if zero_ablation else None,
        )
        for name, sae in saes.items()
    }


def _site(sae: SAE) -> str:
    """Where an SAE is spliced: those of the same layers share it, and so do views of one SAE, whose router is one."""
    if isinstance(sae, RouteSAE):
        return f"routes of router {id(sae.router_LD)}"
    return f"layers {replacement.spliced_layers(sae)}"


def _score_batch(
    lm: LanguageModel, saes: Mapping[str, SAE], token_ids_BT: Tensor, kept_BT: Tensor, zero_ablation: bool
) -> Iterator[tuple[Pass, Rows, Rows]]:
    """Of every pass over a batch of rows: KL from the clean one and cross-entropy, summed over each row."""
    wanted: dict[Pass, SAE] = {}
    for name, sae in saes.items():
        wanted[Pass("spliced", name)] = sae
        if zero_ablation:
            wanted.setdefault(Pass("zero", _site(sae)), sae)
    layers = sorted({layer for sae in saes.values() for layer in sae.recipe.layers})
    clean = clean_pass(lm, token_ids_BT, layers)
    left = list(wanted.items())
    while left:
        finals = {key: _final_states(lm, key, sae, clean, token_ids_BT, kept_BT) for key, sae in left[:PASSES_HELD]}
        left = left[PASSES_HELD:]
        yield from _compare(lm, {CLEAN: clean.final_BTD, **finals}, token_ids_BT)


def _final_states(
    lm: LanguageModel, key: Pass, sae: SAE, clean: CleanPass, token_ids_BT: Tensor, kept_BT: Tensor
) -> Tensor:
    """final_BTD of one pass."""
    place_BT = places_of(token_ids_BT, torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device))
    edits = replacement.edits(sae, clean.hidden, kept_BT, place_BT, zero=key.kind == "zero")
    return spliced_pass(lm, token_ids_BT, clean, edits)


@torch.inference_mode()
def _compare(
    lm: LanguageModel, finals: Mapping[Pass, Tensor], token_ids_BT: Tensor
) -> Iterator[tuple[Pass, Rows, Rows]]:
    """For each pass, clean among them: KL(clean ‖ pass) and cross-entropy, summed over the positions of each row."""
    flat = {key: final_BTD.flatten(0, 1) for key, final_BTD in finals.items()}
    next_N = torch.roll(token_ids_BT, -1, dims=1).flatten()
    zeros_N = torch.zeros(len(next_N), dtype=torch.float64, device=next_N.device)
    kl = {key: zeros_N.clone() for key in flat}
    ce = {key: zeros_N.clone() for key in flat}
    for start in range(0, len(next_N), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
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
