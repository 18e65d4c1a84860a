"""What is measured of hidden states: each row's mean and standard deviation, and a layer's extremes over many rows.

    mean = Σ_d h_d / D        std = √(Σ_d (h_d − mean)² / (D − 1))        in float32, of the values as stored

What a trainer needs to normalise a row without reading it first (routesae.train.saes.normalise adds its epsilon).

Dimension letters: m rows of a batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE_ROWS = 1024  # to measure at a time: fewer cost more calls, more leave the cores' caches


def row_statistics(hidden_mD: Tensor) -> tuple[Tensor, Tensor]:
    """mean_m and std_m, float32, of rows of any float dtype; std unbiased and without an epsilon."""
    x_mD = hidden_mD.float()
    mean_m = x_mD.mean(dim=1)
    # Through the norm of what is centred already: torch.var_mean is several times slower on a CPU.
    centred_mD = x_mD.sub_(mean_m[:, None]) if x_mD is not hidden_mD else x_mD - mean_m[:, None]
    norm_m = torch.linalg.vector_norm(centred_mD, dim=1)
    return mean_m, norm_m / max(1, x_mD.shape[1] - 1) ** 0.5


class Extremes:
    """The largest magnitude of a layer, and how many values exceed a limit, before any cast.

    Both stay on the device, so that no batch waits for them.
    """

    def __init__(self, device: torch.device):
        self._extremes = torch.zeros(2, device=device)
        self._over = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, x_mD: Tensor, limit: float | None) -> None:
        """limit: count the values beyond it, which takes one more pass; None: do not count."""
        if x_mD.numel() == 0:
            return
        if limit is not None:
            self._over += (x_mD.abs() > limit).sum()
        low, high = torch.aminmax(x_mD)  # NaN comes through
        self._extremes = torch.maximum(self._extremes, torch.stack([-low, high]).float())

    def finish(self) -> tuple[float, int]:
        """Returns max_abs, which is NaN or infinite where a value was, and the number of values beyond the limit."""
        return float(self._extremes.max()), int(self._over)
