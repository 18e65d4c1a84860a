"""Input normalisation.

    token     x = (h − mean(h)) / (std(h) + 1e-6) over the width, per token and layer, unbiased std
    dataset   x = s·h, one scalar s for all the SAE's layers so that E‖x‖ = √D
    none      x = h

All undone on the way out. A trainer normalises a batch once for all SAEs that want it the same way.

Dimension letters: L layers, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

NORMALIZATIONS = ("token", "dataset", "none")
EPSILON = 1e-6
WEIGHTED_CHUNK_ROWS = 256


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
    return torch.stack([normalise(hidden_ND).x_ND for hidden_ND in hidden_LND])


class NormalisedLayers:
    """x_LND, what an SAE over several layers reads: normalised where and when it is read, float32.

    hidden_LND: of any float dtype. mean_LN1, std_LN1: what x = (hidden − mean) / std takes; None: hidden_LND is x_LND
    already. Hard routing reads one row of L, so [L, N, D] is never made for it. What several SAEs read is made once.
    place_N: each token's id and position (routers.places_of), which a random router looks at in use.
    """

    def __init__(
        self,
        hidden_LND: Tensor,
        mean_LN1: Tensor | None = None,
        std_LN1: Tensor | None = None,
        place_N: Tensor | None = None,
    ):
        self.hidden_LND, self.mean_LN1, self.std_LN1, self.place_N = hidden_LND, mean_LN1, std_LN1, place_N
        self.at = tuple(range(len(hidden_LND)))
        self._layers: dict[int, Tensor] = {}
        self._totals: dict[tuple[int, ...], Tensor] = {}

    def of(self, at: Sequence[int]) -> NormalisedLayers:
        """Some of the layers, in that order; what is made for either is made for both."""
        view = copy(self)
        view.at = tuple(self.at[i] for i in at)
        return view

    def __len__(self) -> int:
        return len(self.at)

    @property
    def tokens(self) -> int:
        """N."""
        return self.hidden_LND.shape[1]

    @property
    def device(self) -> torch.device:
        return self.hidden_LND.device

    def __getitem__(self, i: int) -> Tensor:
        """x_ND of the i-th layer."""
        at = self.at[i]
        if at not in self._layers:
            x_ND = self.hidden_LND[at].float()
            if self.mean_LN1 is not None and self.std_LN1 is not None:
                x_ND = (x_ND - self.mean_LN1[at]).div_(self.std_LN1[at])
            self._layers[at] = x_ND
        return self._layers[at]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def rows(self, at_R: Tensor, token_R: Tensor) -> Tensor:
        """x_RD: of each row's token at its layer, at_R counted as in `of`."""
        at_R = torch.tensor(self.at, device=at_R.device)[at_R]
        x_RD = self.hidden_LND[at_R, token_R].float()
        if self.mean_LN1 is None or self.std_LN1 is None:
            return x_RD
        return x_RD.sub_(self.mean_LN1[at_R, token_R]).div_(self.std_LN1[at_R, token_R])

    def total(self) -> Tensor:
        """Σ_ℓ x^ℓ, [N, D]."""
        if self.at not in self._totals:
            self._totals[self.at] = self.weighted(torch.ones(self.tokens, len(self), device=self.device))
        return self._totals[self.at]

    def weighted(self, w_NL: Tensor) -> Tensor:
        """Σ_ℓ w_ℓ x^ℓ, [N, D], differentiable in w; float32 also where autocast is on."""
        return _Weighted.apply(w_NL, self)  # type: ignore[no-any-return, no-untyped-call]

    def layer_parts(self, i: int) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
        """(rows, hidden_nD float32, mean_n1, std_n1) of the i-th layer; a few rows at a time on a CPU, in one buffer
        that stays near its cores. mean_n1 None: hidden_nD is x_nD."""
        chunk = WEIGHTED_CHUNK_ROWS if self.device.type == "cpu" else self.tokens
        buffer_nD = torch.empty(min(chunk, self.tokens), self.hidden_LND.shape[2], device=self.device)
        at = self.at[i]
        for start in range(0, self.tokens, max(1, chunk)):
            rows = slice(start, min(start + chunk, self.tokens))
            hidden_nD = buffer_nD[: rows.stop - start].copy_(self.hidden_LND[at, rows])
            if self.mean_LN1 is None or self.std_LN1 is None:
                yield rows, hidden_nD, None, torch.ones_like(hidden_nD[:, :1])
            else:
                yield rows, hidden_nD, self.mean_LN1[at, rows], self.std_LN1[at, rows]


class _Weighted(torch.autograd.Function):
    """Σ_ℓ w_ℓ (h^ℓ − m^ℓ)/s^ℓ = Σ_ℓ (w_ℓ/s^ℓ) h^ℓ − Σ_ℓ (w_ℓ/s^ℓ) m^ℓ: one multiplication and addition a number."""

    @staticmethod
    def forward(ctx: Any, w_NL: Tensor, x: NormalisedLayers) -> Tensor:
        ctx.x = x
        total_ND = torch.zeros(x.tokens, x.hidden_LND.shape[2], device=x.device)
        shift_N1 = torch.zeros(x.tokens, 1, device=x.device)
        for i in range(len(x)):
            for rows, hidden_nD, mean_n1, std_n1 in x.layer_parts(i):
                share_n1 = w_NL[rows, i : i + 1] / std_n1
                total_ND[rows].addcmul_(hidden_nD, share_n1)
                if mean_n1 is not None:
                    shift_N1[rows].addcmul_(mean_n1, share_n1)
        return total_ND.sub_(shift_N1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g_ND,), x = grads, ctx.x
        dw_NL = g_ND.new_empty(x.tokens, len(x))
        sum_N1 = g_ND.sum(1, keepdim=True)
        for i in range(len(x)):
            for rows, hidden_nD, mean_n1, std_n1 in x.layer_parts(i):
                product_n1 = hidden_nD.mul_(g_ND[rows]).sum(1, keepdim=True)
                if mean_n1 is not None:
                    product_n1 = product_n1 - mean_n1 * sum_N1[rows]
                dw_NL[rows, i : i + 1] = product_n1 / std_n1
        return dw_NL, None


def as_layers(x: NormalisedLayers | Tensor) -> NormalisedLayers:
    """x, or the layers of a plain x_LND."""
    return NormalisedLayers(x) if isinstance(x, Tensor) else x


def with_statistics(
    how: str, scale: float, hidden_LND: Tensor, mean_LN1: Tensor, std_LN1: Tensor, place_N: Tensor | None = None
) -> NormalisedLayers:
    """How `how`, one of NORMALIZATIONS, reads hidden states whose token means and unbiased stds are known."""
    if how == "token":
        return NormalisedLayers(hidden_LND, mean_LN1, std_LN1 + EPSILON, place_N)
    if how == "none":
        return NormalisedLayers(hidden_LND, place_N=place_N)
    return NormalisedLayers(hidden_LND, torch.zeros_like(mean_LN1), torch.full_like(std_LN1, 1 / scale), place_N)


def dataset_scale(hidden_LND: Tensor) -> float:
    """s of "dataset", from a sample: √D over the mean norm of its hidden states."""
    norms_LN = torch.linalg.vector_norm(hidden_LND.float(), dim=2)
    return float(hidden_LND.shape[2] ** 0.5 / norms_LN.double().mean().clamp(min=EPSILON))
