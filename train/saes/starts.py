"""What an SAE starts from, given a sample of normalised inputs: its decoder's bias, and how many latents are active.

Random rows leave half of the latents active on a token. An SAE that starts with k of them active, as it is to end, is
sparse and fast from its first step, and errs less at its end (benchmarks/RESULTS.md).

Dimension letters: N tokens, D width, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE_TOKENS = 256  # that say how large pre-activations are; of F each, which take memory
MEDIAN_STEPS = 20  # Weiszfeld's iteration is well settled by then on normalised hidden states
MEDIAN_STILL = 1e-5  # a last move so much shorter than the distance to the rows
_TINY = 1e-6  # keeps a row that is the median itself out of 1/0


def least_active(x_ND: Tensor, W_enc_FD: Tensor, k: int) -> Tensor:
    """The number that k of a token's F pre-activations W_enc x are above, on average over the sample."""
    z_NF = x_ND[:SAMPLE_TOKENS] @ W_enc_FD.T
    active = min(k * len(z_NF), z_NF.numel() - 1)
    return torch.kthvalue(-z_NF.flatten(), active + 1).values.neg()


def geometric_median(x_ND: Tensor) -> Tensor:
    """The point of least summed distance to the N rows, by Weiszfeld's iteration from the mean."""
    median_D = x_ND.mean(0)
    for _ in range(MEDIAN_STEPS):
        before_D = median_D
        weights_N = 1 / torch.linalg.vector_norm(x_ND - before_D, dim=1).clamp(min=_TINY)
        median_D = weights_N @ x_ND / weights_N.sum()
        distance = len(x_ND) / weights_N.sum()  # to the rows, their harmonic mean
        if torch.linalg.vector_norm(median_D - before_D) <= MEDIAN_STILL * distance:
            break
    return median_D
