"""Make a view of an SAE at another sparsity than it was trained for, with the same weights in memory.

    --infer-k k    f = ReLU(TopK(z, k))
    --theta θ      f = z·1[z > θ],  and never below 0

z = W_enc (x − b_dec) + b_enc is the pre-activation, on the SAE's normalised (and routed, scaled) input. Either takes
the place of whatever the variant does with z, as in the published RouteSAE code. A gated SAE decides by one number
and measures by another, so it has no such z.
"""

from __future__ import annotations

import torch

from routesae.reporting import WrongInput
from routesae.train.saes import SAE
from routesae.train.sparse.kernels import threshold_latents, topk_latents


def at_sparsity(sae: SAE, *, infer_k: int | None = None, theta: float | None = None) -> SAE:
    """A view of `sae` for use, not for training; one of the two is given. Raises WrongInput if it has none."""
    if not sae.other_sparsity:
        inner = sae.recipe.routed if sae.recipe.sae == "routesae" else sae.recipe.sae
        flag = "--theta" if infer_k is None else "--infer-k"
        raise WrongInput(f"{flag} is not for a {inner} SAE, whose latents are not a function of one number")
    if infer_k is None:
        floor = torch.tensor(theta, device=sae.device)
        return sae.at_sparsity(lambda x_ND, encoder: threshold_latents(x_ND, encoder, floor))
    if infer_k > sae.recipe.latents:
        raise WrongInput(f"--infer-k {infer_k} is more than the SAE's {sae.recipe.latents} latents; lower it")
    return sae.at_sparsity(lambda x_ND, encoder: topk_latents(x_ND, encoder, infer_k))
