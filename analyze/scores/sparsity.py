"""An SAE at another sparsity than it was trained for: an SAE in; a view of it out, with the same weights in memory.

    --infer-k k    f = ReLU(TopK(z, k))
    --theta θ      f = z·1[z > θ],  and never below 0

z = W_enc (x − b_dec) + b_enc is the pre-activation, on the SAE's normalised (and routed, scaled) input; either takes
the place of whatever the variant does with z, as in the published RouteSAE code. A gated SAE decides by one number
and measures by another, so it has no such z.

Dimension letters: N tokens, D width, C all layers' widths side by side, F latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.saes import SAE, Crosscoder, RouteSAE, SingleLayerSAE
from routesae.train.saes.gated import Gated
from routesae.train.saes.normalise import NormalisedLayers
from routesae.train.saes.sae import Forward
from routesae.train.sparse.kernels import AnyLatents, decode, threshold_latents, topk_latents
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

    def latents(self, x_ND: Tensor, encoder: Encoder) -> AnyLatents:
        """f of normalised inputs."""
        if self.k is not None:
            return topk_latents(x_ND, encoder, self.k)
        return threshold_latents(x_ND, encoder, torch.tensor(self.theta, device=x_ND.device))


def has_other_sparsities(sae: SAE) -> bool:
    """Whether `at_sparsity` can make a view of it: all but gated ones."""
    return not isinstance(sae.shared if isinstance(sae, RouteSAE) else sae, Gated)


def at_sparsity(sae: SAE, sparsity: Sparsity) -> SAE:
    """A view of `sae` for use, not for training. Raises WrongInput where it has none."""
    if not has_other_sparsities(sae):
        raise WrongInput(f"{sparsity.flag} is not for a gated SAE, whose gate and magnitude are two numbers")
    if sparsity.k is not None and sparsity.k > sae.recipe.latents:
        raise WrongInput(f"--infer-k {sparsity.k} is more than the SAE's {sae.recipe.latents} latents; lower it")
    if isinstance(sae, Crosscoder):
        return CrosscoderView(sae, sparsity).eval()
    if isinstance(sae, RouteSAE):
        view = RouteSAE(sae.recipe, SingleLayerView(sae.shared, sparsity), torch.Generator())
        view.router_LD = sae.router_LD
        return view.eval()
    assert isinstance(sae, SingleLayerSAE)
    return SingleLayerView(sae, sparsity).eval()


class SingleLayerView(SingleLayerSAE):
    """The dictionary of an SAE over one layer, of mlsae and of random."""

    def __init__(self, sae: SingleLayerSAE, sparsity: Sparsity):
        SAE.__init__(self, sae.recipe)  # and not SingleLayerSAE's, which draws weights
        self.W_enc_FD, self.W_dec_FD = sae.W_enc_FD, sae.W_dec_FD
        self.b_enc_F, self.b_dec_D = sae.b_enc_F, sae.b_dec_D
        self.chunk_rows, self.sparsity = sae.chunk_rows, sparsity

    def forward(self, x: NormalisedLayers) -> Forward:
        return self.autoencode(torch.cat(list(x)))  # of several layers, each one's rows are samples

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        latents = self.encode(x_ND)
        return Forward(x_ND, self.decode(latents), latents, weights_N=weights_N)

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> AnyLatents:
        return self.sparsity.latents(x_ND, self.encoder())


class CrosscoderView(Crosscoder):
    def __init__(self, sae: Crosscoder, sparsity: Sparsity):
        SAE.__init__(self, sae.recipe)
        self.W_enc_FC, self.W_dec_FC = sae.W_enc_FC, sae.W_dec_FC
        self.b_enc_F, self.b_dec_C = sae.b_enc_F, sae.b_dec_C
        self.chunk_rows, self.sparsity = sae.chunk_rows, sparsity

    @torch.no_grad()
    def forward(self, x: NormalisedLayers) -> Forward:
        x_NC = torch.cat(list(x), dim=1)
        encoder = Encoder(self.W_enc_FC, self.b_enc_F, chunk_rows=self.chunk_rows)
        latents = self.sparsity.latents(x_NC, encoder)
        return Forward(x_NC, decode(latents, self.W_dec_FC, self.b_dec_C), latents)
