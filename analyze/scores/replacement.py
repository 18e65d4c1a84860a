"""How an SAE takes the place of hidden states: which layers, at which positions, with what.

    over one layer    block ℓ's output at every kept position becomes its reconstruction
    routesae          each kept token's output at its own routed layer does; routes are fixed by the clean pass
    crosscoder        every layer's output does, read from the clean pass, since it reads all layers at once
    mlsae, random     the middle one of their layers, as one of one layer

Only positions that training used are replaced. Soft routing mixes all layers into one, which has no inverse.

Dimension letters: B rows, T context, L layers, m positions, D width.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from routesae.harvest.lm.passes import Edit
from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Crosscoder, RouteSAE
from routesae.train.saes.normalise import Hidden
from routesae.train.sparse.pairs import Latents

Change = Callable[[Tensor, Latents, Tensor], Tensor]
"""(hidden, their latents, their reconstruction on the scale of the normalised input) → what takes their place.

Each is [m, D], for a crosscoder [m, L, D].
"""


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


def undone(hidden: Tensor, latents: Latents, reconstruction: Tensor) -> Tensor:
    """The Change that puts the reconstruction in the hidden states' place."""
    assert latents.frame is not None
    return latents.frame.undo(reconstruction)


@torch.no_grad()
def edits(
    sae: SAE,
    hidden: Mapping[int, Tensor],
    kept_BT: Tensor,
    place_BT: Tensor | None = None,
    *,
    change: Change = undone,
    zero: bool = False,
) -> dict[int, Edit]:
    """The splice of `sae` into one batch of rows: {layer: edit}, without layers at which no position is replaced.

    hidden: the clean pass's {layer: hidden_BTD} of the SAE's layers; without a router or crosscoder it is not read.
    kept_BT: bool, positions that may be replaced. place_BT: each token's id and position (`places_of`), for a random
    router. zero: put zeros in their place, which is what Recovered measures against.
    """
    layers, dictionary = spliced_layers(sae), sae.dictionary
    if not bool(kept_BT.any()):
        return {}
    # Of each layer the positions replaced, and what the SAE's input there is multiplied by.
    ones_BT = torch.ones(kept_BT.shape, device=kept_BT.device)
    sites = dict.fromkeys(layers, (kept_BT, ones_BT))
    if isinstance(sae, RouteSAE):
        hidden_LND = torch.stack([hidden[layer].flatten(0, 1) for layer in layers])
        routes = sae.routes(Hidden(hidden_LND, place_N=None if place_BT is None else place_BT.flatten()))
        at_BT = routes.at_R.view(kept_BT.shape)
        scale_BT = ones_BT if routes.scale_R is None else routes.scale_R.view(kept_BT.shape)
        sites = {layer: (kept_BT & (at_BT == at), scale_BT) for at, layer in enumerate(layers)}
    elif isinstance(sae, Crosscoder) and not zero:
        clean_LmD = torch.stack([hidden[layer][kept_BT] for layer in layers])
        out, clean_mLD = sae(Hidden(clean_LmD)), clean_LmD.transpose(0, 1)
        new_LmD = change(clean_mLD, out.latents, out.reconstruction_ND.view(clean_mLD.shape)).transpose(0, 1)

    def edit(hidden_BTD: Tensor, layer: int) -> Tensor:
        edited_BTD, (positions_BT, scale_BT) = hidden_BTD.clone(), sites[layer]
        if zero:
            edited_BTD[positions_BT] = 0
        elif isinstance(sae, Crosscoder):
            edited_BTD[positions_BT] = new_LmD[layers.index(layer)].to(hidden_BTD.dtype)
        else:
            hidden_mD = hidden_BTD[positions_BT]
            latents = dictionary.encode_at(hidden_mD, scale_BT[positions_BT][:, None])
            new_mD = change(hidden_mD, latents, dictionary.decode_rows(latents))
            edited_BTD[positions_BT] = new_mD.to(hidden_BTD.dtype)
        return edited_BTD

    return {layer: partial(edit, layer=layer) for layer, site in sites.items() if bool(site[0].any())}
