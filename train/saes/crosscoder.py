"""Crosscoder: one set of latents read from all layers at once and written back to each (Lindsey et al. 2024).

    f = ReLU(Σ_ℓ W_e^ℓ x^ℓ + b_e)
    x̂^ℓ = (W_d^ℓ)ᵀ f + b_d^ℓ
    loss = Σ_ℓ ‖x^ℓ − x̂^ℓ‖² / Σ_ℓ ‖x^ℓ‖² + λ · mean over tokens of Σ_i f_i Σ_ℓ ‖d_i^ℓ‖

The layers lie side by side, so both are one product of width L·D. Decoder norms are free, the penalty weighs them.
With --recipe published: each layer's decoder rows at unit norm, no b_d, λ times the plain mean of f.

Dimension letters: L layers, N tokens, D width, F latents, C = L·D, P pairs of a token and a latent: all, or those
that can be active.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.train.losses import Objective, norm_mse
from routesae.train.ranks.distributed import batch_mean, local_rows
from routesae.train.saes.normalise import NormalisedLayers
from routesae.train.saes.penalty import PenaltyWeight
from routesae.train.saes.sae import PUBLISHED_DECODER_STEPS, SAE, Forward, Reading, Recipe
from routesae.train.saes.single import checked
from routesae.train.saes.starts import geometric_median, least_active
from routesae.train.sparse.kernels import encode_above, threshold_latents
from routesae.train.sparse.pairs import Latents
from routesae.train.sparse.search import Encoder

CROSSCODER = "crosscoder.safetensors"


class Crosscoder(SAE):
    """W_enc_FC and W_dec_FC hold one latent a row, its layers side by side; on disk [L, D, F] and [F, L, D]."""

    penalised = True

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe)
        layers, f = len(recipe.layers), recipe.latents
        if recipe.published:  # a linear layer's initial weights for each layer, its decoder's rows at unit norm
            W_FLD = (torch.rand(f, layers, recipe.width, generator=generator) * 2 - 1) * recipe.width**-0.5
            W_dec_FLD = F.normalize(W_FLD, dim=2)
        else:  # a unit row over all layers together, so that f starts at the scale of a single layer's SAE
            W_FLD = torch.randn(f, layers, recipe.width, generator=generator)
            W_FLD = F.normalize(W_FLD.flatten(1), dim=1).view_as(W_FLD)
            W_dec_FLD = W_FLD.clone()
        self.W_enc_FC = nn.Parameter(W_FLD.flatten(1))  # the decoder is its transpose at the start
        self.W_dec_FC = nn.Parameter(W_dec_FLD.flatten(1))
        self.b_enc_F = nn.Parameter(torch.zeros(f))
        self.b_dec_C = nn.Parameter(torch.zeros(layers * recipe.width), requires_grad=not recipe.published)
        self.penalty = PenaltyWeight(recipe)

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        return Reading(torch.cat(list(x), dim=1), x.frame(by_token=True))

    def autoencode(self, x_RC: Tensor, weights_R: Tensor | None = None) -> Forward:
        pairs, z_P = encode_above(x_RC, self.encoder(), torch.zeros_like(self.b_enc_F))
        f_P = z_P.relu()
        latents = Latents(f_P, pairs)
        if self.training:
            self.penalty.steer(latents.active_counts.sum() / len(x_RC), self.k)
        if self.recipe.published:
            penalty = batch_mean(f_P.sum() / (len(x_RC) * self.recipe.latents))
        else:
            penalty = batch_mean(pairs.by_token(f_P, self._decoder_norms()).mean())
        return Forward(x_RC, pairs.decode(f_P, self.W_dec_FC, self.b_dec_C), latents, penalty)

    def encode_rows(self, x_RC: Tensor) -> Latents:
        return threshold_latents(x_RC, self.encoder(), torch.zeros_like(self.b_enc_F))

    def encoder(self) -> Encoder:
        return Encoder(self.W_enc_FC, self.b_enc_F, None, self.chunk_rows, self.proposal)

    @torch.no_grad()
    def decode_rows(self, latents: Latents) -> Tensor:
        """x̂_RLD."""
        return self._by_layer(latents.pairs.decode(latents.values_P, self.W_dec_FC, self.b_dec_C))

    def _shaped(self, hidden: Tensor, lead: tuple[int, ...]) -> Tensor:
        return hidden.view(*lead, len(self.recipe.layers), self.recipe.width)

    def _decoder_norms(self) -> Tensor:
        """[F]: Σ_ℓ ‖d_i^ℓ‖."""
        norms_FL: Tensor = torch.linalg.vector_norm(self._by_layer(self.W_dec_FC), dim=2)
        return norms_FL.sum(1)

    def _by_layer(self, W_FC: Tensor) -> Tensor:
        return W_FC.view(-1, len(self.recipe.layers), self.recipe.width)

    def loss(self, out: Forward, dead_F: Tensor, sparsity_factor: float = 1.0) -> Objective:
        weight: Tensor | float = self.penalty(sparsity_factor)
        assert out.penalty is not None
        error = norm_mse(out.x_ND, out.reconstruction_ND)
        return Objective(error + weight * out.penalty, error)

    @torch.no_grad()
    def centre(self, x: NormalisedLayers) -> None:
        x_NC = torch.cat(list(x), dim=1)
        self.penalty.start(x_NC)
        if self.recipe.published:
            return
        median_C = torch.cat([geometric_median(x_ND) for x_ND in x])
        self.b_dec_C.copy_(median_C)
        # f starts from x − b_d, as the other variants read it, and with k latents active.
        self.b_enc_F.copy_(-(self.W_enc_FC @ median_C) - least_active(x_NC - median_C, self.W_enc_FC, self.k))

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """As for an SAE over one layer."""
        return {} if self.recipe.published else {self.b_enc_F: math.sqrt(self.recipe.width)}

    def decoders(self) -> list[nn.Parameter]:
        return []

    @torch.no_grad()
    def normalise_decoder(self, step: int, *, last: bool = False) -> None:
        if self.recipe.published and ((step - 1) % PUBLISHED_DECODER_STEPS == 0 or last):
            rows_FLD = self._by_layer(local_rows(self.W_dec_FC))
            rows_FLD.div_(rows_FLD.norm(dim=2, keepdim=True))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        self.W_enc_FC.mul_(scale)
        self.W_dec_FC.div_(scale)
        self.b_dec_C.div_(scale)

    def files(self) -> dict[str, dict[str, Tensor]]:
        tensors = {
            "W_enc": self._by_layer(self.W_enc_FC).permute(1, 2, 0),
            "W_dec": self._by_layer(self.W_dec_FC),
            "b_enc": self.b_enc_F,
            "b_dec": self.b_dec_C.view(len(self.recipe.layers), -1),
        }
        return {CROSSCODER: {name: tensor.detach() for name, tensor in tensors.items()}}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        layers, d, f = len(self.recipe.layers), self.recipe.width, self.recipe.latents
        shapes = {"W_enc": (layers, d, f), "W_dec": (f, layers, d), "b_enc": (f,), "b_dec": (layers, d)}
        tensors = checked(files[CROSSCODER], shapes, CROSSCODER)
        self.W_enc_FC = nn.Parameter(tensors["W_enc"].permute(2, 0, 1).reshape(f, layers * d))
        self.W_dec_FC = nn.Parameter(tensors["W_dec"].reshape(f, layers * d))
        self.b_enc_F = nn.Parameter(tensors["b_enc"])
        self.b_dec_C = nn.Parameter(tensors["b_dec"].flatten())
