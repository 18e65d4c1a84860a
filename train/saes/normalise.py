"""Input normalisation and the starting point of b_dec.

    x̃ = (x − mean(x)) / (std(x) + 1e-6) over the width, per token and layer, unbiased std; undone on the way out

Dimension letters: N tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6
MEDIAN_STEPS = 20  # Weiszfeld's iteration is well settled by then on normalised hidden states


class Normalised(NamedTuple):
    """x_ND float32 of zero mean and unit std a token, with what takes it back: mean_N1, std_N1 (epsilon in)."""

    x_ND: Tensor
    mean_N1: Tensor
    std_N1: Tensor

    def undo(self, x_ND: Tensor) -> Tensor:
        """x_ND, or a reconstruction of it, in the LM's own scale."""
        return x_ND * self.std_N1 + self.mean_N1


def normalise(hidden_ND: Tensor) -> Normalised:
    """Hidden states of any float dtype, normalised per token in float32."""
    x_ND = hidden_ND.float()
    mean_N1 = x_ND.mean(dim=1, keepdim=True)
    centred_ND = x_ND - mean_N1
    # Through the norm of what is centred already: torch.var_mean is several times slower on a CPU.
    std_N1 = torch.linalg.vector_norm(centred_ND, dim=1, keepdim=True) / (x_ND.shape[1] - 1) ** 0.5 + EPSILON
    return Normalised(centred_ND.div_(std_N1), mean_N1, std_N1)


def geometric_median(x_ND: Tensor) -> Tensor:
    """The point of least summed distance to the N rows, by Weiszfeld's iteration from the mean."""
    median_D = x_ND.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights_N = 1 / torch.linalg.vector_norm(x_ND - median_D, dim=1).clamp(min=EPSILON)
        median_D = weights_N @ x_ND / weights_N.sum()
    return median_D
