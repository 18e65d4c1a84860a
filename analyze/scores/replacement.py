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
from routesae.train.saes.normalise import Normalised, NormalisedLayers, normalise

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
    x = [normalised(sae, hidden[layer].flatten(0, 1)).x_ND for layer in layers]
    place_N = None if place_BT is None else place_BT.flatten()
    routes = sae.routes(NormalisedLayers(torch.stack(x), place_N=place_N))
    at_BT, scale_BT = routes.at_N.view(kept_BT.shape), routes.scale_N.view(kept_BT.shape)
    return {layer: Site(kept_BT & (at_BT == at), scale_BT) for at, layer in enumerate(layers)}


def normalised(sae: SAE, hidden_mD: Tensor) -> Normalised:
    """Hidden states as `sae` reads them; a dataset's scale is in a finished SAE's weights."""
    if sae.recipe.normalize == "token":
        return normalise(hidden_mD)
    x_mD = hidden_mD.float()
    return Normalised(x_mD, torch.zeros_like(x_mD[:, :1]), torch.ones_like(x_mD[:, :1]))


def _replacing(site: Site, reconstruct: Reconstruct) -> Edit:
    def edit(hidden_BTD: Tensor) -> Tensor:
        edited_BTD = hidden_BTD.clone()
        new_mD = reconstruct(hidden_BTD[site.positions_BT], site.scale_BT[site.positions_BT][:, None])
        edited_BTD[site.positions_BT] = new_mD.to(hidden_BTD.dtype)
        return edited_BTD

    return edit


def _by_dictionary(sae: SAE) -> Reconstruct:
    """Normalise, scale as the SAE's input was, reconstruct, undo both."""
    dictionary = sae.shared if isinstance(sae, RouteSAE) else sae
    assert isinstance(dictionary, SingleLayerSAE)

    def reconstruct(hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
        x = normalised(sae, hidden_mD)
        latents = dictionary.encode(x.x_ND * scale_m1)
        return x.undo(dictionary.decode(latents) / scale_m1)

    return reconstruct


def _by_crosscoder(sae: Crosscoder, clean: Mapping[int, Tensor]) -> dict[int, Reconstruct]:
    """clean: {layer: hidden_mD} at the positions to be replaced, which is all that a crosscoder looks at."""
    x = {layer: normalised(sae, hidden_mD) for layer, hidden_mD in clean.items()}
    with torch.no_grad():
        out = sae(torch.stack([x[layer].x_ND for layer in clean]))
    by_layer = out.reconstruction_ND.chunk(len(clean), dim=1)

    def given(new_mD: Tensor) -> Reconstruct:
        return lambda hidden_mD, scale_m1: new_mD

    return {layer: given(x[layer].undo(new_mD)) for layer, new_mD in zip(clean, by_layer, strict=True)}


def _zeros(hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
    return torch.zeros_like(hidden_mD)
