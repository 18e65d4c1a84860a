"""Input normalisation: hidden states as an SAE reads them, and what takes them back.

    token     x = (h − mean(h)) / (std(h) + 1e-6) over the width, per token and layer, unbiased std
    dataset   x = s·h, one scalar s for all the SAE's layers so that E‖x‖ = √D
    none      x = h

SAEs take and give back hidden states in the LM's own units and do this inside. A trainer normalises a batch once for
all SAEs that want it the same way.

Dimension letters: L layers, N tokens, D width, R rows: a token's reading of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from routesae.harvest.cache.quantise import row_statistics
from routesae.train.sparse.pairs import Frame
from routesae.train.sparse.policy import WEIGHTED_CHUNK_ROWS

NORMALIZATIONS = ("token", "dataset", "none")
EPSILON = 1e-6


def normalise(hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_ND, mean_N1, std_N1) of hidden states of any float dtype: float32, of zero mean and unit std a token, and
    what takes it back (epsilon in)."""
    mean_N1, std_N1 = (of_N[:, None] for of_N in row_statistics(hidden_ND))
    std_N1 = std_N1 + EPSILON
    return (hidden_ND.float() - mean_N1) / std_N1, mean_N1, std_N1


def places_of(token_ids: Tensor, positions: Tensor) -> Tensor:
    """int64, of their shape: one number for each token's id and its position in its row."""
    return positions.long() * 2**32 + token_ids


class Hidden:
    """Hidden states of a batch, in the LM's units, for any number of SAEs to read.

    hidden_LND: of any float dtype. mean_LN1, std_LN1: each token's mean and unbiased std over D, if known, as a cache
    has them. place_N: each token's id and position (`places_of`), which a random router goes by. layers: the numbers
    of the L layers; None if they are those of the SAE.
    """

    def __init__(
        self,
        hidden_LND: Tensor,
        mean_LN1: Tensor | None = None,
        std_LN1: Tensor | None = None,
        place_N: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
    ):
        self.hidden_LND, self.mean_LN1, self.std_LN1, self.place_N = hidden_LND, mean_LN1, std_LN1, place_N
        self.tokens, self.layers = hidden_LND.shape[1], layers
        self._normalised: dict[tuple[str, float], NormalisedLayers] = {}

    def at(self, token_n: Tensor) -> Hidden:
        """Those of some of the tokens, by their places in the batch."""
        mean_Ln1 = None if self.mean_LN1 is None else self.mean_LN1[:, token_n]
        std_Ln1 = None if self.std_LN1 is None else self.std_LN1[:, token_n]
        place_n = None if self.place_N is None else self.place_N[token_n]
        return Hidden(self.hidden_LND[:, token_n], mean_Ln1, std_Ln1, place_n, layers=self.layers)

    def normalised(self, how: str, scale: float, layers: Sequence[int]) -> NormalisedLayers:
        """x of some of the layers, in that order. how: one of NORMALIZATIONS; scale: s of "dataset"."""
        if (how, scale) not in self._normalised:
            self._normalised[how, scale] = self._normalise(how, scale)
        x = self._normalised[how, scale]
        return x if self.layers is None else x.of([self.layers.index(layer) for layer in layers])

    def _normalise(self, how: str, scale: float) -> NormalisedLayers:
        h_LND, zero_LN1 = self.hidden_LND, torch.zeros_like(self.hidden_LND[:, :, :1], dtype=torch.float32)
        if how == "none":
            return NormalisedLayers(h_LND, place_N=self.place_N)
        if how == "dataset":
            return NormalisedLayers(h_LND, zero_LN1, torch.full_like(zero_LN1, 1 / scale), self.place_N)
        if self.std_LN1 is not None:
            return NormalisedLayers(h_LND, self.mean_LN1, self.std_LN1 + EPSILON, self.place_N)
        layers = [normalise(hidden_ND) for hidden_ND in h_LND]
        x_LND, mean_LN1, std_LN1 = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return NormalisedLayers(x_LND, mean_LN1, std_LN1, self.place_N, applied=True)


class NormalisedLayers:
    """x_LND, what an SAE reads: normalised where and when it is read, float32.

    hidden_LND: of any float dtype. mean_LN1, std_LN1: of x = (hidden − mean) / std; None if x is hidden. applied:
    hidden_LND is x_LND already, and they only take it back. Hard routing reads one row of L, so [L, N, D] is never
    made for it. What several SAEs read is made once.
    """

    def __init__(
        self,
        hidden_LND: Tensor,
        mean_LN1: Tensor | None = None,
        std_LN1: Tensor | None = None,
        place_N: Tensor | None = None,
        *,
        applied: bool = False,
    ):
        self.hidden_LND, self.place_N = hidden_LND, place_N
        self.tokens, self.device = hidden_LND.shape[1], hidden_LND.device
        self.undo = None if mean_LN1 is None or std_LN1 is None else (mean_LN1, std_LN1)
        self.apply = None if applied else self.undo
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

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Tensor:
        """x_ND of the i-th layer."""
        at = self.at[i]
        if at not in self._layers:
            x_ND = self.hidden_LND[at].float()
            if self.apply is not None:
                x_ND = (x_ND - self.apply[0][at]).div_(self.apply[1][at])
            self._layers[at] = x_ND
        return self._layers[at]

    def frame(self, *, by_token: bool = False) -> Frame:
        """What takes all layers' rows back, layer after layer; by_token: of each token all its layers, [N, L, 1]."""
        if self.undo is None:
            return Frame()
        mean_LN1, std_LN1 = (torch.stack([part_LN1[i] for i in self.at]) for part_LN1 in self.undo)
        if by_token:
            return Frame(mean_LN1.transpose(0, 1), std_LN1.transpose(0, 1))
        return Frame(mean_LN1.flatten(0, 1), std_LN1.flatten(0, 1))

    def rows(self, at_R: Tensor, token_R: Tensor) -> tuple[Tensor, Frame]:
        """x_RD of each row's token at its layer, at_R counted as in `of`; and what takes it back."""
        at_R = _on_device(self.at, at_R.device)[at_R]
        x_RD = self.hidden_LND[at_R, token_R].float()
        if self.undo is None:
            return x_RD, Frame()
        mean_R1, std_R1 = (part_LN1[at_R, token_R] for part_LN1 in self.undo)
        return x_RD if self.apply is None else x_RD.sub_(mean_R1).div_(std_R1), Frame(mean_R1, std_R1)

    def total(self) -> Tensor:
        """Σ_ℓ x^ℓ, [N, D]."""
        if self.at not in self._totals:
            self._totals[self.at] = self.weighted(torch.ones(self.tokens, len(self), device=self.device))
        return self._totals[self.at]

    def weighted(self, w_NL: Tensor) -> Tensor:
        """Σ_ℓ w_ℓ x^ℓ, [N, D], differentiable in w, and in x where hidden states require gradients.

        It is float32 also where autocast is on.
        """
        if self.hidden_LND.requires_grad:
            return torch.stack([x_ND * w_NL[:, i, None] for i, x_ND in enumerate(self)]).sum(0)
        return _Weighted.apply(w_NL, self)  # type: ignore[no-any-return, no-untyped-call]

    def layer_parts(self, i: int) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
        """Yield (rows, hidden_nD float32, mean_n1, std_n1) of the i-th layer, on a CPU a few rows at a time in one
        buffer that stays in its caches. mean_n1 is None if hidden_nD is x_nD."""
        chunk = WEIGHTED_CHUNK_ROWS if self.device.type == "cpu" else self.tokens
        buffer_nD = torch.empty(min(chunk, self.tokens), self.hidden_LND.shape[2], device=self.device)
        at = self.at[i]
        for start in range(0, self.tokens, max(1, chunk)):
            rows = slice(start, min(start + chunk, self.tokens))
            hidden_nD = buffer_nD[: rows.stop - start].copy_(self.hidden_LND[at, rows])
            if self.apply is None:
                yield rows, hidden_nD, None, torch.ones_like(hidden_nD[:, :1])
            else:
                yield rows, hidden_nD, self.apply[0][at, rows], self.apply[1][at, rows]


@cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers, moved once: every move waits for the device."""
    return torch.tensor(numbers, device=device)


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


def dataset_scale(layers: Iterable[Tensor]) -> float:
    """s of "dataset", from a sample of each layer: √D over the mean norm of the hidden states."""
    norms_LN = torch.stack([torch.linalg.vector_norm(hidden_ND.float(), dim=1) for hidden_ND in layers])
    width = next(iter(layers)).shape[1]
    return float(width**0.5 / norms_LN.double().mean().clamp(min=EPSILON))
