"""Change some latents of an SAE where it is spliced into the LM.

    f'_i = f_i + v (add),  v·f_i (multiply),  v (set),  0 (ablate);   f'_j = f_j for every other latent
    h'   = h + σ · (f' − f) W_dec / w        with the error term: only the changed latents' directions move
    h'   = σ · (f' W_dec + b_dec) / w + μ    without it (as published): what the SAE does not reconstruct is lost

f is in the units of the SAE's normalised input (h − μ) / σ, times w, by which a routesae's router scales it; both are
undone on the way out. Changes apply at every kept position, also where a latent is not active. A crosscoder reads h
at all layers of the clean pass, and h' replaces each layer's output.

Dimension letters: B rows, T tokens fed, L layers, m positions, D width, F latents, C changed latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from routesae.analyze.scores.replacement import Reconstruct, edits, require_spliceable, spliced_layers
from routesae.harvest.lm.passes import Edit
from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Crosscoder, RouteSAE, SingleLayerSAE
from routesae.train.saes.normalise import Hidden
from routesae.train.sparse.pairs import AllPairs, Latents

CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "add": lambda f_m, value: f_m + value,
    "multiply": lambda f_m, value: f_m * value,
    "set": lambda f_m, value: torch.full_like(f_m, value),
    "ablate": lambda f_m, value: torch.zeros_like(f_m),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change to one latent. how: one of CHANGES. value: unused by ablate."""

    latent: int
    how: str
    value: float = 0.0

    def __str__(self) -> str:
        return f"--{self.how} {self.latent}" + (f"={self.value:g}" if self.how != "ablate" else "")


def parse_change(how: str, text: str) -> Change:
    """Read "1234=20", or "1234" for ablate. Raises WrongInput for anything else."""
    latent, equals, number = text.partition("=")
    form = "LATENT such as 1234" if how == "ablate" else "LATENT=VALUE such as 1234=20"
    try:
        if bool(equals) == (how == "ablate"):
            raise ValueError
        change = Change(latent=int(latent), how=how, value=float(number) if equals else 0.0)
    except ValueError:
        raise WrongInput(f"--{how} {text!r} is not {form}") from None
    if not math.isfinite(change.value):
        raise WrongInput(f"--{how} {text!r}: {number} is not a finite number")
    return change


class Clamp:
    """An SAE spliced into the LM with some of its latents changed.

    error_term: add back what the SAE fails to reconstruct. Raises WrongInput for a latent that the SAE does not have,
    for two changes to one latent, and for an SAE that cannot be spliced.
    """

    def __init__(self, sae: SAE, changes: Sequence[Change], *, error_term: bool = True):
        require_spliceable(sae)
        by_latent: dict[int, Change] = {}
        for change in changes:
            if not 0 <= change.latent < sae.recipe.latents:
                raise WrongInput(
                    f"{change}: the SAE has {sae.recipe.latents} latents, 0 to {sae.recipe.latents - 1}, "
                    f"and no latent {change.latent}"
                )
            if (first := by_latent.setdefault(change.latent, change)) is not change:
                raise WrongInput(
                    f"latent {change.latent} is changed twice, by {first} and {change}; give it one change"
                )
        self.sae = sae
        self.changes = tuple(changes)
        self.error_term = error_term
        self.latents_C = torch.tensor([change.latent for change in changes], dtype=torch.int64, device=sae.device)

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Layers whose unmodified output `edits` needs: all that a router or a crosscoder reads, else none."""
        return self.sae.recipe.layers if isinstance(self.sae, RouteSAE | Crosscoder) else ()

    @torch.no_grad()
    def edits(self, hidden: Mapping[int, Tensor], kept_BT: Tensor, place_BT: Tensor | None = None) -> dict[int, Edit]:
        """{layer: edit} for one pass. hidden: {layer: hidden_BTD} of `layers_read`, from a pass without edits.

        kept_BT: bool, the positions to be replaced. place_BT: each token's id and position (normalise.places_of).
        """
        if not bool(kept_BT.any()):
            return {}
        if isinstance(self.sae, Crosscoder):
            clean_LmD = torch.stack([hidden[layer][kept_BT] for layer in self.layers_read])
            by_layer = self._by_crosscoder(self.sae, clean_LmD)
        else:
            by_layer = dict.fromkeys(spliced_layers(self.sae), self._by_dictionary)
        return edits(self.sae, hidden, kept_BT, place_BT, reconstruct=by_layer)

    def _by_dictionary(self, hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
        dictionary = self.sae.shared if isinstance(self.sae, RouteSAE) else self.sae
        assert isinstance(dictionary, SingleLayerSAE)
        latents = dictionary.encode_at(hidden_mD, scale_m1)
        return self._changed(hidden_mD, latents, dictionary.W_dec_FD, dictionary.decode_rows(latents))

    def _by_crosscoder(self, sae: Crosscoder, hidden_LmD: Tensor) -> dict[int, Reconstruct]:
        out = sae(Hidden(hidden_LmD))
        new_mLD = self._changed(hidden_LmD.transpose(0, 1), out.latents, sae.W_dec_FD, out.reconstruction_ND)
        return {layer: partial(_ready, new_mLD[:, at]) for at, layer in enumerate(self.layers_read)}

    def _changed(self, hidden: Tensor, latents: Latents, W_dec: Tensor, reconstruction: Tensor) -> Tensor:
        """What takes the place of hidden states [m, D], of a crosscoder [m, L, D].

        reconstruction: of them by the unchanged latents, on the scale of the normalised input.
        """
        assert latents.frame is not None
        f_mC = active(latents, self.latents_C)
        changed_mC = f_mC.clone()
        for at, change in enumerate(self.changes):
            changed_mC[:, at] = CHANGES[change.how](f_mC[:, at], change.value)
        moved = ((changed_mC - f_mC) @ W_dec[self.latents_C]).view(hidden.shape)
        if self.error_term:
            return hidden.float() + latents.frame.moved(moved)
        return latents.frame.undo(reconstruction.view(hidden.shape) + moved)


def _ready(new_mD: Tensor, hidden_mD: Tensor, scale_m1: Tensor) -> Tensor:
    """A Reconstruct for what is known before."""
    return new_mD


def active(latents: Latents, latents_C: Tensor) -> Tensor:
    """f_mC: the values of some latents, 0 where one is not active."""
    pairs = latents.pairs
    if isinstance(pairs, AllPairs):
        return latents.values_P[:, latents_C]
    f_mC = latents.values_P.new_zeros(pairs.tokens, len(latents_C))
    for at, latent in enumerate(latents_C):
        of_latent = torch.nonzero(pairs.latents_M == latent).squeeze(1)
        f_mC[pairs.tokens_M[of_latent], at] = latents.values_P[of_latent]
    return f_mC
