"""Input normalisation and the starting point of b_dec.

    token     x = (h − mean(h)) / (std(h) + 1e-6) over the width, per token and layer, unbiased std
    dataset   x = s·h, one scalar s for all the SAE's layers so that E‖x‖ = √D
    none      x = h

All undone on the way out. A trainer normalises a batch once for all SAEs that want it the same way.

Dimension letters: L layers, N tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZATIONS = ("token", "dataset", "none")
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


def normalise_layers(hidden_LND: Tensor, how: str, scale: float = 1.0) -> Tensor:
    """x_LND float32: what SAEs read. how: one of NORMALIZATIONS; scale: s, used by "dataset" alone."""
    if how != "token":
        return hidden_LND.float() * scale if how == "dataset" else hidden_LND.float()
    if len(hidden_LND) == 1:
        return normalise(hidden_LND[0]).x_ND[None]
    x_LND = torch.empty(hidden_LND.shape, device=hidden_LND.device)
    for x_ND, hidden_ND in zip(x_LND, hidden_LND, strict=True):  # a layer at a time: temporaries stay small
        x_ND.copy_(normalise(hidden_ND).x_ND)
    return x_LND


def dataset_scale(hidden_LND: Tensor) -> float:
    """s of "dataset", from a sample: √D over the mean norm of its hidden states."""
    norms_LN = torch.linalg.vector_norm(hidden_LND.float(), dim=2)
    return float(hidden_LND.shape[2] ** 0.5 / norms_LN.double().mean().clamp(min=EPSILON))


def geometric_median(x_ND: Tensor) -> Tensor:
    """The point of least summed distance to the N rows, by Weiszfeld's iteration from the mean."""
    median_D = x_ND.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights_N = 1 / torch.linalg.vector_norm(x_ND - median_D, dim=1).clamp(min=EPSILON)
        median_D = weights_N @ x_ND / weights_N.sum()
    return median_D
