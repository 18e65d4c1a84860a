"""Change some latents of an SAE where it is spliced into the LM.

    f'_i = f_i + v (add),  v·f_i (multiply),  v (set),  0 (ablate);   f'_j = f_j for every other latent
    h'   = h + σ · (f' − f) W_dec / w        with the error term: only the changed latents' directions move
    h'   = σ · (f' W_dec + b_dec) / w + μ    without it (as published): what the SAE does not reconstruct is lost

f is in the units of the SAE's normalised input (h − μ) / σ, times w, by which a routesae's router scales it; both are
undone on the way out. Changes apply at every kept position, also where a latent is not active. A crosscoder reads h
at all layers of the clean pass, and h' replaces each layer's output.

Dimension letters: B rows, T tokens fed, L layers, m positions, D width, F latents, C changed latents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routesae.analyze.scores.replacement import edits, require_spliceable
from routesae.harvest.lm.passes import Edit
from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Crosscoder, RouteSAE
from routesae.train.sparse.pairs import AllPairs, Latents

CHANGES: dict[str, Callable[[float], tuple[float, float]]] = {  # factor and term: f' = factor · f + term
    "add": lambda value: (1.0, value),
    "multiply": lambda value: (value, 0.0),
    "set": lambda value: (0.0, value),
    "ablate": lambda value: (0.0, 0.0),
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
        return Change(latent=int(latent), how=how, value=float(number) if equals else 0.0)
    except ValueError:
        raise WrongInput(f"--{how} {text!r} is not {form}") from None


class Clamp:
    """An SAE spliced into the LM with some of its latents changed.

    error_term: add back what the SAE fails to reconstruct. Raises WrongInput for a latent that the SAE does not have,
    for two changes to one latent, and for an SAE that cannot be spliced.
    """

    def __init__(self, sae: SAE, changes: Sequence[Change], *, error_term: bool = True):
        require_spliceable(sae)
        by_latent: dict[int, Change] = {}
        for change in changes:
            if not math.isfinite(change.value):
                raise WrongInput(f"{change}: {change.value} is not a finite number")
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
        self.error_term = error_term
        self.latents_C = torch.tensor([change.latent for change in changes], dtype=torch.int64, device=sae.device)
        factors_and_terms = [CHANGES[change.how](change.value) for change in changes]
        self.factors_C, self.terms_C = torch.tensor(factors_and_terms, device=sae.device).view(-1, 2).T

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Layers whose unmodified output `edits` needs: all that a router or a crosscoder reads, else none."""
        return self.sae.recipe.layers if isinstance(self.sae, RouteSAE | Crosscoder) else ()

    def edits(self, hidden: Mapping[int, Tensor], kept_BT: Tensor, place_BT: Tensor | None = None) -> dict[int, Edit]:
        """{layer: edit} for one pass; hidden: of `layers_read`, from a pass without edits. See replacement.edits."""
        return edits(self.sae, hidden, kept_BT, place_BT, change=self.changed)

    def changed(self, hidden: Tensor, latents: Latents, reconstruction: Tensor) -> Tensor:
        """What takes the place of hidden states: a replacement.Change."""
        assert latents.frame is not None
        f_mC = active(latents, self.latents_C)
        changed_mC = f_mC * self.factors_C + self.terms_C
        moved = ((changed_mC - f_mC) @ self.sae.dictionary.W_dec_FD[self.latents_C]).view(hidden.shape)
        if self.error_term:
            return hidden.float() + latents.frame.moved(moved)
        return latents.frame.undo(reconstruction + moved)


def active(latents: Latents, latents_C: Tensor) -> Tensor:
    """f_mC: the values of some latents, 0 where one is not active."""
    pairs = latents.pairs
    if isinstance(pairs, AllPairs):
        return latents.values_P[:, latents_C]
    values_MC = latents.values_P[:, None] * (pairs.latents_M[:, None] == latents_C)
    return values_MC.new_zeros(pairs.tokens, len(latents_C)).index_add(0, pairs.tokens_M, values_MC)
