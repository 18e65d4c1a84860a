"""TopK: the k largest latents of one layer's hidden state, and nothing else (2406.04093).

    z = W_enc (x − b_dec) + b_enc
    f = ReLU(TopK(z, k))
    x̂ = W_decᵀ f + b_dec,   rows of W_dec of unit norm
    loss = NormMSE(x, x̂) + 1/32 · AuxK over the dead latents

The published RouteSAE code has no AuxK, and keeps negative values where fewer than k are above zero; with
--recipe published the first is reproduced, the second not (no case of it was seen).

Dimension letters: N tokens, D width.
"""

from typing import Any

from torch import Tensor

from routesae.train.saes.sae import Forward
from routesae.train.saes.single import SingleLayerSAE
from routesae.train.sparse.kernels import encode_topk, topk_latents
from routesae.train.sparse.pairs import Latents


class TopK(SingleLayerSAE):
    architecture = "topk"
    has_auxk = True

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        pairs, z_M = encode_topk(x_ND, self.encoder(), self.k)
        f_M = z_M.relu()
        reconstruction_ND = pairs.decode(f_M, self.W_dec_FD, self.b_dec_D)
        return Forward(x_ND, reconstruction_ND, Latents(f_M, pairs), weights_N=weights_N)

    def latents_of(self, x_ND: Tensor) -> Latents:
        return topk_latents(x_ND, self.encoder(), self.k)

    def lens_config(self) -> dict[str, Any]:
        return {"k": self.recipe.k, "rescale_acts_by_decoder_norm": False}
