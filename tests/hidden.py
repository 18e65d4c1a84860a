"""Hidden states for tests of SAEs' equations: normalised already, so that an SAE reads them as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from routesae.train.saes.normalise import Hidden, NormalisedLayers


class Normalised(Hidden):
    """x_LND, whatever the SAE's recipe says of normalisation."""

    def normalised(self, how: str, scale: float, layers: Sequence[int]) -> NormalisedLayers:
        return NormalisedLayers(self.hidden_LND, place_N=self.place_N)


def normalise_layers(hidden_LND: Tensor, how: str, scale: float = 1.0) -> Tensor:
    """x_LND float32 of hidden states in the LM's units."""
    return torch.stack(list(Hidden(hidden_LND).normalised(how, scale, range(len(hidden_LND)))))
