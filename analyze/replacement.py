"""How an SAE takes the place of hidden states: which layers, at which positions, with what.

    topk       block ℓ's output at every kept position becomes its reconstruction
    routesae   each kept token's output at its own routed layer does; routes are fixed by the clean pass

Only positions that training used are replaced. Soft routing mixes all layers into one, which has no inverse.

Dimension letters: B rows, T context, L layers, N = B·T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from routesae.analyze.splice import Edit
from routesae.reporting import WrongInput
from routesae.train.saes import SAE, RouteSAE, TopK
from routesae.train.saes.normalise import normalise

Reconstruct = Callable[[Tensor, Tensor], Tensor]
"""(hidden_mD, scale_m1) → what takes their place, in the LM's own scale."""


def require_spliceable(sae: SAE) -> None:
    """Raises WrongInput where no reconstruction can go back into the LM."""
    if sae.recipe.routing == "soft" and isinstance(sae, RouteSAE):
        raise WrongInput(
            "a routesae with soft routing cannot be spliced: its input mixes all layers, which has no inverse; "
            "leave out KLDiv, DeltaCE and Recovered, or train with --routing hard"
        )


def edits(sae: SAE, hidden: Mapping[int, Tensor], kept_BT: Tensor, reconstruct: Reconstruct) -> dict[int, Edit]:
    """The splice of `sae` into one batch of rows: {layer: edit}.

    hidden: the clean pass's {layer: hidden_BTD} of the SAE's layers, which fix the routes.
    kept_BT: bool, the positions that training used.
    """
    layers = sae.recipe.layers
    if not isinstance(sae, RouteSAE):
        ones_BT = torch.ones(kept_BT.shape, device=kept_BT.device)
        return {layers[0]: _replacing(kept_BT, ones_BT, reconstruct)}
    with torch.no_grad():
        routes = sae.routes(sae.routing(torch.stack([hidden[layer].flatten(0, 1) for layer in layers])))
    at_BT, scale_BT = routes.at_N.view(kept_BT.shape), routes.scale_N.view(kept_BT.shape)
    here = [kept_BT & (at_BT == at) for at in range(len(layers))]
    return {
        layer: _replacing(positions_BT, scale_BT, reconstruct)
        for layer, positions_BT in zip(layers, here, strict=True)
        if bool(positions_BT.any())
    }


def _replacing(positions_BT: Tensor, scale_BT: Tensor, reconstruct: Reconstruct) -> Edit:
    def edit(hidden_BTD: Tensor) -> Tensor:
        edited_BTD = hidden_BTD.clone()
        new_mD = reconstruct(hidden_BTD[positions_BT], scale_BT[positions_BT][:, None])
        edited_BTD[positions_BT] = new_mD.to(hidden_BTD.dtype)
        return edited_BTD

    return edit


def by_sae(sae: SAE) -> Reconstruct:
    """What the SAE makes of hidden states: normalise, scale as its input was, reconstruct, undo both."""
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(dictionary, TopK)

    def reconstruct(hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
        x = normalise(hidden_mD)
        latents = dictionary.encode(x.x_ND * scale_m1)
        return x.undo(dictionary.decode(latents) / scale_m1)

    return reconstruct


def by_zero(hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
    """Zero ablation: what Recovered measures against."""
    return torch.zeros_like(hidden_mD)
