"""Vanilla: a ReLU and an L1 penalty (Bricken et al. 2023), decoder norms in the penalty (Anthropic, April 2024).

    f = ReLU(W_enc (x − b_dec) + b_enc)
    x̂ = W_decᵀ f + b_dec
    loss = NormMSE(x, x̂) + λ · mean over tokens of Σ_i f_i‖d_i‖

The decoder's rows are free: the penalty weighs them, so that shrinking f and growing d gains nothing. b_enc starts
where k latents are active on a sample of the data; the papers start at zero, with half of them active.
With --recipe published: unit rows, and λ times the plain mean of f over tokens and latents.

Dimension letters: N tokens, D width, F latents, P pairs of a token and a latent: all, or those that can be active.
"""

import torch
from torch import Tensor, nn

from routesae.train.losses import mean_over_rows
from routesae.train.saes.penalty import SteeredSAE
from routesae.train.saes.sae import Forward
from routesae.train.sparse.kernels import encode_above, threshold_latents
from routesae.train.sparse.pairs import Latents


class Vanilla(SteeredSAE):
    architecture = "standard"

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        pairs, z_P = encode_above(x_ND, self.encoder(), torch.zeros_like(self.b_enc_F), self.k)
        f_P = z_P.relu()
        latents = Latents(f_P, pairs)
        if self.training:
            self.steer(latents.active_counts.sum() / len(x_ND))
        if self.recipe.published:
            penalty_N = pairs.by_token(f_P) / self.recipe.latents
        else:
            penalty_N = pairs.by_token(f_P, self.decoder_norms())
        reconstruction_ND = pairs.decode(f_P, self.W_dec_FD, self.b_dec_D)
        penalty = mean_over_rows(penalty_N, weights_N)
        return Forward(x_ND, reconstruction_ND, latents, penalty, weights_N=weights_N)

    def latents_of(self, x_ND: Tensor) -> Latents:
        return threshold_latents(x_ND, self.encoder(), torch.zeros_like(self.b_enc_F))

    def decoder_norms(self) -> Tensor:
        """‖d_i‖, [F]."""
        norms_F: Tensor = self.W_dec_FD.norm(dim=1)
        return norms_F

    def decoders(self) -> list[nn.Parameter]:
        return super().decoders() if self.recipe.published else []
