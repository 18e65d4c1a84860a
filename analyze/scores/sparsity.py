"""An SAE at another sparsity than it was trained for: an SAE in; a view of it out, with the same weights in memory.

    --infer-k k    f = ReLU(TopK(z, k))
    --theta θ      f = z·1[z > θ],  and never below 0

z = W_enc (x − b_dec) + b_enc is the pre-activation, on the SAE's normalised (and routed, scaled) input; either takes
the place of whatever the variant does with z, as in the published RouteSAE code. A gated SAE decides by one number
and measures by another, so it has no such z.

Dimension letters: N tokens, D width, F latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.saes import SAE
from routesae.train.sparse.kernels import threshold_latents, topk_latents
from routesae.train.sparse.pairs import Latents
from routesae.train.sparse.search import Encoder


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What makes latents active in use: the k largest, or those above theta. One of them is given."""

    k: int | None = None
    theta: float | None = None

    def __post_init__(self) -> None:
        assert (self.k is None) != (self.theta is None)
        if self.k is not None and self.k < 1:
            raise WrongInput(f"--infer-k {self.k} is below 1")
        if self.theta is not None and not (math.isfinite(self.theta) and self.theta >= 0):
            raise WrongInput(f"--theta {self.theta} is not a number of 0 or more")

    def __str__(self) -> str:
        return f"k {self.k}" if self.k is not None else f"theta {self.theta:g}"

    @property
    def flag(self) -> str:
        return "--infer-k" if self.k is not None else "--theta"

    def latents(self, x_ND: Tensor, encoder: Encoder) -> Latents:
        """f of normalised inputs."""
        if self.k is not None:
            return topk_latents(x_ND, encoder, self.k)
        return threshold_latents(x_ND, encoder, torch.tensor(self.theta, device=x_ND.device))


def at_sparsity(sae: SAE, sparsity: Sparsity) -> SAE:
    """A view of `sae` for use, not for training. Raises WrongInput where it has none."""
    if not sae.other_sparsity:
        inner = sae.recipe.routed if sae.recipe.sae == "routesae" else sae.recipe.sae
        raise WrongInput(f"{sparsity.flag} is not for a {inner} SAE, whose latents are not a function of one number")
    if sparsity.k is not None and sparsity.k > sae.recipe.latents:
        raise WrongInput(f"--infer-k {sparsity.k} is more than the SAE's {sae.recipe.latents} latents; lower it")
    return sae.at_sparsity(sparsity.latents)
