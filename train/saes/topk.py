"""TopK: the k largest latents of one layer's hidden state, and nothing else (2406.04093).

    z = W_enc (x − b_dec) + b_enc
    f = ReLU(TopK(z, k))
    x̂ = W_decᵀ f + b_dec,   rows of W_dec of unit norm
    loss = NormMSE(x, x̂) + 1/32 · AuxK over the dead latents

x is the normalised hidden state (routesae.train.saes.normalise).

Dimension letters: L layers (here 1), N tokens, D width, F latents, K active latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routesae.train.kernels import Latents, decode, sparse_autoencode, topk_latents
from routesae.train.losses import AUXK_WEIGHT, auxk, norm_mse
from routesae.train.saes.normalise import geometric_median, normalise
from routesae.train.saes.sae import SAE, Forward, Recipe


class TopK(SAE):
    """W_enc_FD and W_dec_FD hold one latent a row; on disk W_enc is [D, F] (routesae.train.checkpoint)."""

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe)
        W_dec_FD = torch.randn(recipe.latents, recipe.width, generator=generator)
        W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
        self.W_dec_FD = nn.Parameter(W_dec_FD)
        self.W_enc_FD = nn.Parameter(W_dec_FD.clone())  # decoder = encoderᵀ at the start
        self.b_enc_F = nn.Parameter(torch.zeros(recipe.latents))
        self.b_dec_D = nn.Parameter(torch.zeros(recipe.width))

    def forward(self, hidden_LND: Tensor) -> Forward:
        return self.autoencode(normalise(hidden_LND[0]).x_ND)

    def loss(self, out: Forward, dead_F: Tensor) -> Tensor:
        """NormMSE + 1/32 · AuxK."""
        error = norm_mse(out.x_ND, out.reconstruction_ND)
        weights = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D)
        return error + AUXK_WEIGHT * auxk(out.x_ND, out.reconstruction_ND, *weights, dead_F)

    def initialise(self, hidden_LND: Tensor) -> None:
        self.centre(normalise(hidden_LND[0]).x_ND)

    # What a routed SAE shares: the same dictionary over inputs that were normalised elsewhere.

    def autoencode(self, x_ND: Tensor) -> Forward:
        """Reconstruct inputs that are normalised already."""
        weights = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D)
        return Forward(x_ND, *sparse_autoencode(x_ND, *weights, self.recipe.k))

    @torch.no_grad()
    def centre(self, x_ND: Tensor) -> None:
        """b_dec to the geometric median of a sample of normalised inputs."""
        self.b_dec_D.copy_(geometric_median(x_ND))

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Latents:
        return topk_latents(x_ND, self.W_enc_FD, self.b_enc_F, self.b_dec_D, self.recipe.k)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Tensor:
        return decode(latents, self.W_dec_FD, self.b_dec_D)

    @torch.no_grad()
    def project_gradient(self) -> None:
        grad_FD = self.W_dec_FD.grad
        assert grad_FD is not None
        grad_FD.sub_((grad_FD * self.W_dec_FD).sum(1, keepdim=True) * self.W_dec_FD)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        self.W_dec_FD.div_(torch.linalg.vector_norm(self.W_dec_FD, dim=1, keepdim=True))
