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

import torch
from torch import Tensor

from routesae.harvest.lm.passes import Edit
from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Crosscoder, RouteSAE, SingleLayerSAE
from routesae.train.saes.normalise import Hidden

Reconstruct = Callable[[Tensor, Tensor], Tensor]
"""(hidden_mD, scale_m1) → what takes their place, in the LM's own scale."""


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
    sae: SAE,
    hidden: Mapping[int, Tensor],
    kept_BT: Tensor,
    place_BT: Tensor | None = None,
    *,
    reconstruct: Mapping[int, Reconstruct] | None = None,
    zero: bool = False,
) -> dict[int, Edit]:
    """The splice of `sae` into one batch of rows: {layer: edit}, without layers at which no position is replaced.

    hidden: the clean pass's {layer: hidden_BTD} of the SAE's layers. kept_BT: bool, positions that may be replaced.
    place_BT: each token's id and position (`places_of`), for a random router. reconstruct: by layer, what gives the
    replacements if not the SAE; hidden is then only read to route. zero: put zeros in their place, which is what
    Recovered measures against.
    """
    layers = spliced_layers(sae)
    if zero:
        reconstruct = dict.fromkeys(layers, lambda hidden_mD, scale_m1: torch.zeros_like(hidden_mD))
    elif reconstruct is None and isinstance(sae, Crosscoder):
        reconstruct = _by_crosscoder(sae, {layer: hidden[layer][kept_BT] for layer in layers})
    elif reconstruct is None:
        reconstruct = dict.fromkeys(layers, _by_dictionary(sae))
    # Of each layer the positions replaced, and what the SAE's input there is multiplied by.
    ones_BT = torch.ones(kept_BT.shape, device=kept_BT.device)
    sites = dict.fromkeys(layers, (kept_BT, ones_BT))
    if isinstance(sae, RouteSAE):
        hidden_LND = torch.stack([hidden[layer].flatten(0, 1) for layer in layers])
        routes = sae.routes(Hidden(hidden_LND, place_N=None if place_BT is None else place_BT.flatten()))
        at_BT = routes.at_R.view(kept_BT.shape)
        scale_BT = ones_BT if routes.scale_R is None else routes.scale_R.view(kept_BT.shape)
        sites = {layer: (kept_BT & (at_BT == at), scale_BT) for at, layer in enumerate(layers)}
    return {layer: _replacing(*site, reconstruct[layer]) for layer, site in sites.items() if bool(site[0].any())}


def _replacing(positions_BT: Tensor, scale_BT: Tensor, reconstruct: Reconstruct) -> Edit:
    def edit(hidden_BTD: Tensor) -> Tensor:
        edited_BTD = hidden_BTD.clone()
        new_mD = reconstruct(hidden_BTD[positions_BT], scale_BT[positions_BT][:, None])
        edited_BTD[positions_BT] = new_mD.to(hidden_BTD.dtype)
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
