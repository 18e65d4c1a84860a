"""Crosscoder: one set of latents read from all layers at once and written back to each (Lindsey et al. 2024).

    f = ReLU(Σ_ℓ W_e^ℓ x^ℓ + b_e)
    x̂^ℓ = (W_d^ℓ)ᵀ f + b_d^ℓ
    loss = Σ_ℓ ‖x^ℓ − x̂^ℓ‖² / Σ_ℓ ‖x^ℓ‖² + λ · mean over tokens of Σ_i f_i Σ_ℓ ‖d_i^ℓ‖

The layers lie side by side, so both are one product of width L·D. Decoder norms are free, the penalty weighs them.
With --recipe published: each layer's decoder rows at unit norm, no b_d, λ times the plain mean of f.

Dimension letters: L layers, N tokens, F latents; D is the width of all layers together, except in FLD, where it is
that of one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.train.ranks.distributed import local_rows
from routesae.train.saes.normalise import NormalisedLayers
from routesae.train.saes.sae import PUBLISHED_DECODER_STEPS, Reading, Recipe, to_unit_rows
from routesae.train.saes.single import checked, geometric_median, least_active
from routesae.train.saes.vanilla import Vanilla
from routesae.train.sparse.pairs import Latents
from routesae.train.sparse.search import Encoder

CROSSCODER = "crosscoder.safetensors"


class Crosscoder(Vanilla):
    """A vanilla over the layers side by side; on disk W_enc is [L, D, F] and W_dec [F, L, D]."""

    one_layer = False
    lens_opens = None
    architecture = "crosscoder"

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        self.b_dec_D.requires_grad_(not recipe.published)

    def first_weights(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """W_enc_FD, and its transpose as the decoder."""
        shape = (self.recipe.latents, len(self.recipe.layers), self.recipe.width)
        if self.recipe.published:  # a linear layer's initial weights for each layer, its decoder's rows at unit norm
            W_FLD = (torch.rand(shape, generator=generator) * 2 - 1) * self.recipe.width**-0.5
            return W_FLD.flatten(1), F.normalize(W_FLD, dim=2).flatten(1)
        # A unit row over all layers together, so that f starts at the scale of a single layer's SAE.
        W_FD = F.normalize(torch.randn(shape, generator=generator).flatten(1), dim=1)
        return W_FD, W_FD.clone()

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        return Reading(torch.cat(list(x), dim=1), x.frame(by_token=True))

    def encoder(self) -> Encoder:
        return Encoder(self.W_enc_FD, self.b_enc_F, None, self.arithmetic)

    def decode_rows(self, latents: Latents) -> Tensor:
        """x̂, [N, L, D]."""
        return self._by_layer(super().decode_rows(latents))

    def decoder_norms(self) -> Tensor:
        """Σ_ℓ ‖d_i^ℓ‖, [F]."""
        norms_FL: Tensor = torch.linalg.vector_norm(self._by_layer(self.W_dec_FD), dim=2)
        return norms_FL.sum(1)

    def _by_layer(self, W_FD: Tensor) -> Tensor:
        return W_FD.view(-1, len(self.recipe.layers), self.recipe.width)

    @torch.no_grad()
    def centre(self, x: NormalisedLayers) -> None:
        x_ND = torch.cat(list(x), dim=1)
        self.start_penalty(x_ND)
        if self.recipe.published:
            return
        median_D = torch.cat([geometric_median(x_nD) for x_nD in x])
        self.b_dec_D.copy_(median_D)
        # f starts from x − b_d, as the other variants read it, and with k latents active.
        self.b_enc_F.copy_(-(self.W_enc_FD @ median_D) - least_active(x_ND - median_D, self.W_enc_FD, self.k))

    def decoders(self) -> list[nn.Parameter]:
        return []

    @torch.no_grad()
    def normalise_decoder(self, step: int, *, last: bool = False) -> None:
        due = (step - 1) % PUBLISHED_DECODER_STEPS == 0 or last
        if self.recipe.published and self.W_dec_FD.requires_grad and due:
            to_unit_rows(self._by_layer(local_rows(self.W_dec_FD)))

    def files(self) -> dict[str, dict[str, Tensor]]:
        tensors = {
            "W_enc": self._by_layer(self.W_enc_FD).permute(1, 2, 0),
            "W_dec": self._by_layer(self.W_dec_FD),
            "b_enc": self.b_enc_F,
            "b_dec": self.b_dec_D.view(len(self.recipe.layers), -1),
        }
        return {CROSSCODER: {name: tensor.detach() for name, tensor in tensors.items()}}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        layers, d, f = len(self.recipe.layers), self.recipe.width, self.recipe.latents
        shapes = {"W_enc": (layers, d, f), "W_dec": (f, layers, d), "b_enc": (f,), "b_dec": (layers, d)}
        tensors = checked(files[CROSSCODER], shapes, CROSSCODER)
        self.W_enc_FD = nn.Parameter(tensors["W_enc"].permute(2, 0, 1).reshape(f, layers * d))
        self.W_dec_FD = nn.Parameter(tensors["W_dec"].reshape(f, layers * d))
        self.b_enc_F = nn.Parameter(tensors["b_enc"])
        self.b_dec_D = nn.Parameter(tensors["b_dec"].flatten())
