"""Find each latent's nearest latents, and the tokens that it makes likelier and less likely.

The logit effect of a latent is the logit lens of its decoder row d, scaled to a root mean square of 1:

    e_V = (head(norm(d)) − head(norm(−d))) / 2

with the LM's own final norm and head. The half-difference leaves out the biases of a LayerNorm and of the head. With
an RMSNorm it is W_U (γ ⊙ d) exactly. The effect of the blocks in between is left out. For a crosscoder d is the row
of the last layer it writes to.

Dimension letters: F latents, D width, C numbers of a decoder row (D, or L·D of a crosscoder), n latents at a time, V
vocabulary, K neighbours or tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import clean_pass, logits, spliced_pass

NEAREST, TOKENS = 5, 10


def nearest(unit_nC: Tensor, unit_FC: Tensor, count: int, *, itself: int | None = None) -> tuple[Tensor, Tensor]:
    """cosine_nK and latent_nK of the `count` latents nearest to each of n, the nearest first.

    unit_nC, unit_FC: decoder rows of norm 1. itself: the number of the first of the n among the F, if they are of the
    same SAE: none is its own neighbour. Memory: n·F numbers.
    """
    cosine_nF = unit_nC @ unit_FC.T
    others = len(unit_FC)
    if itself is not None:
        rows_n = torch.arange(len(unit_nC), device=unit_FC.device)
        cosine_nF[rows_n, rows_n + itself] = -2
        others -= 1
    cosine_nK, latent_nK = cosine_nF.topk(min(count, others), dim=1)
    return cosine_nK, latent_nK


class LogitLens:
    """The end of an LM, from its last block's output to the logits. texts: each token's text, by id."""

    def __init__(self, lm: LanguageModel, texts: Sequence[str]):
        self.lm, self.texts = lm, texts
        self.last = len(lm.blocks)
        some_token_11 = torch.zeros(1, 1, dtype=torch.int64, device=lm.device)
        self._shape = clean_pass(lm, some_token_11, [self.last])  # only for what the LM's blocks return
        some_1D = torch.linspace(-1, 2, lm.width, device=lm.device)[None]
        self._odd = torch.equal(self._ended(-some_1D), -self._ended(some_1D))  # no bias in norm and head

    def effects(self, W_nC: Tensor) -> dict[str, list[list[tuple[str, float]]]]:
        """Texts and logits of the tokens that each latent promotes and suppresses most, the strongest first.

        W_nC: decoder rows; a crosscoder's last layer stands at their end.
        """
        effect_nV = self.logits(W_nC[:, -self.lm.width :])[:, : len(self.texts)]
        return {"promoted": self._strongest(effect_nV), "suppressed": self._strongest(effect_nV, sign=-1)}

    def logits(self, d_nD: Tensor) -> Tensor:
        """e_nV, float32."""
        rms_n1 = d_nD.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        d_nD = (d_nD / rms_n1).to(self.lm.device)
        return self._ended(d_nD) if self._odd else (self._ended(d_nD) - self._ended(-d_nD)) / 2

    def _ended(self, d_nD: Tensor) -> Tensor:
        like_BTD = self._shape.hidden[self.last]
        start_n1D = d_nD[:, None].to(like_BTD.dtype)
        clean = self._shape._replace(hidden={self.last: start_n1D})
        some_tokens_n1 = torch.zeros(len(d_nD), 1, dtype=torch.int64, device=self.lm.device)
        final_n1D = spliced_pass(self.lm, some_tokens_n1, clean, {self.last: lambda hidden_BTD: hidden_BTD})
        return logits(self.lm, final_n1D[:, 0])

    def _strongest(self, effect_nV: Tensor, sign: int = 1) -> list[list[tuple[str, float]]]:
        value_nK, token_nK = (sign * effect_nV).topk(min(TOKENS, effect_nV.shape[1]), dim=1)
        return [
            [(self.texts[token], sign * value) for token, value in zip(tokens, values, strict=True)]
            for tokens, values in zip(token_nK.tolist(), value_nK.tolist(), strict=True)
        ]
