"""How an SAE takes the place of hidden states: which layers, at which positions, with what.

    over one layer    block ℓ's output at every kept position becomes its reconstruction
    routesae          each kept token's output at its own routed layer does; routes are fixed by the clean pass
    crosscoder        every layer's output does, read from the clean pass, since it reads all layers at once
    mlsae, random     the middle one of their layers, as one of one layer

Only positions that training used are replaced. Soft routing mixes all layers into one, which has no inverse.

Dimension letters: B rows, T context, L layers, m positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from routesae.harvest.lm.passes import Edit
from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Crosscoder, RouteSAE, SingleLayerSAE
from routesae.train.saes.normalise import Hidden

Reconstruct = Callable[[Tensor, Tensor], Tensor]
"""(hidden_mD, scale_m1) → what takes their place, in the LM's own scale."""


class Site(NamedTuple):
    """Where one layer is replaced: positions_BT, bool, and scale_BT, what the SAE's input there is multiplied by."""

    positions_BT: Tensor
    scale_BT: Tensor


def require_spliceable(sae: SAE) -> None:
    """Raises WrongInput where no reconstruction can go back into the LM."""
    if sae.recipe.routing == "soft" and isinstance(sae, RouteSAE):
        raise WrongInput(
            "a routesae with soft routing cannot be spliced: its input mixes all layers, which has no inverse; "
            "leave out KLDiv, DeltaCE, Recovered and clamp, or train with --routing hard"
        )
    if 0 in spliced_layers(sae):
        raise WrongInput(
            "the SAE reads layer 0, the embedding, and only the output of a decoder block can be replaced"
        )


def spliced_layers(sae: SAE) -> tuple[int, ...]:
    """Layers that may be replaced."""
    layers = sae.recipe.layers
    return layers if isinstance(sae, RouteSAE | Crosscoder) else (layers[len(layers) // 2],)


def edits(
    sae: SAE, hidden: Mapping[int, Tensor], kept_BT: Tensor, place_BT: Tensor | None = None, *, zero: bool = False
) -> dict[int, Edit]:
    """The splice of `sae` into one batch of rows: {layer: edit}.

    hidden: the clean pass's {layer: hidden_BTD} of the SAE's layers. kept_BT: bool, the positions that training
    used. place_BT: each token's id and position (routers.places_of), for a random router. zero: put zeros
    where the reconstructions would be, which is what Recovered measures against.
    """
    if zero:
        reconstruct: Mapping[int, Reconstruct] = dict.fromkeys(spliced_layers(sae), _zeros)
    elif isinstance(sae, Crosscoder):
        reconstruct = _by_crosscoder(sae, {layer: hidden[layer][kept_BT] for layer in sae.recipe.layers})
    else:
        reconstruct = dict.fromkeys(spliced_layers(sae), _by_dictionary(sae))
    return edits_by(sae, hidden, kept_BT, reconstruct, place_BT)


def edits_by(
    sae: SAE,
    hidden: Mapping[int, Tensor],
    kept_BT: Tensor,
    reconstruct: Mapping[int, Reconstruct],
    place_BT: Tensor | None = None,
) -> dict[int, Edit]:
    """The same splice with something else in the place of the reconstructions: {layer: what gives it}.

    A layer at which no position is replaced has no edit. hidden is looked at where `sae` has a router, to route.
    """
    sites = _sites(sae, hidden, kept_BT, place_BT)
    return {
        layer: _replacing(site, reconstruct[layer]) for layer, site in sites.items() if bool(site.positions_BT.any())
    }


def _sites(sae: SAE, hidden: Mapping[int, Tensor], kept_BT: Tensor, place_BT: Tensor | None) -> dict[int, Site]:
    if not isinstance(sae, RouteSAE):
        ones_BT = torch.ones(kept_BT.shape, device=kept_BT.device)
        return dict.fromkeys(spliced_layers(sae), Site(kept_BT, ones_BT))
    layers = sae.recipe.layers
    hidden_LND = torch.stack([hidden[layer].flatten(0, 1) for layer in layers])
    routes = sae.routes(Hidden(hidden_LND, place_N=None if place_BT is None else place_BT.flatten()))
    at_BT, scale_BT = routes.at_N.view(kept_BT.shape), routes.scale_N.view(kept_BT.shape)
    return {layer: Site(kept_BT & (at_BT == at), scale_BT) for at, layer in enumerate(layers)}


def _replacing(site: Site, reconstruct: Reconstruct) -> Edit:
    def edit(hidden_BTD: Tensor) -> Tensor:
        edited_BTD = hidden_BTD.clone()
        new_mD = reconstruct(hidden_BTD[site.positions_BT], site.scale_BT[site.positions_BT][:, None])
        edited_BTD[site.positions_BT] = new_mD.to(hidden_BTD.dtype)
        return edited_BTD

    return edit


def _by_dictionary(sae: SAE) -> Reconstruct:
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(dictionary, SingleLayerSAE)
    return lambda hidden_mD, scale_m1: dictionary.decode(dictionary.encode_at(hidden_mD, scale_m1))


def _by_crosscoder(sae: Crosscoder, clean: Mapping[int, Tensor]) -> dict[int, Reconstruct]:
    """clean: {layer: hidden_mD} at the positions to be replaced, which is all that a crosscoder looks at."""
    with torch.no_grad():
        out = sae(Hidden(torch.stack(list(clean.values()))))
    assert out.latents.frame is not None
    new_mLD = out.latents.frame.undo(out.reconstruction_ND.view(-1, len(clean), sae.recipe.width))

    def given(new_mD: Tensor) -> Reconstruct:
        return lambda hidden_mD, scale_m1: new_mD

    return {layer: given(new_mLD[:, at]) for at, layer in enumerate(clean)}


def _zeros(hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
    return torch.zeros_like(hidden_mD)
