"""BatchTopK: the k·N largest latents of a whole batch, so that a token may have more or fewer (2412.06410).

    z = W_enc (x − b_dec) + b_enc
    training: f = ReLU(z) where it is among the k·N largest of the batch's N·F     (eq. 3)
    in use:   f = z·1[z > θ],  θ the mean over batches of the least positive f     (eq. 4)
    loss = NormMSE(x, x̂) + 1/32 · AuxK over the dead latents

θ is a running mean, so that it follows the weights: a batch counts a tenth, and more at the start, where
there are few. (At 1/100 it lagged behind the falling activations of a run of 200 steps: L0 45 in use for 64 trained.)

Dimension letters: N tokens, D width, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routesae.train.kernels import (
    AnyLatents,
    Latents,
    batchtopk_latents,
    decode,
    sparse_autoencode,
    threshold_latents,
)
from routesae.train.saes.sae import Forward, Recipe
from routesae.train.saes.single import WEIGHTS, SingleLayerSAE, checked

THRESHOLD_RATE = 0.1


class BatchTopK(SingleLayerSAE):
    """On disk a jumprelu whose latents share one threshold, as SAELens writes it."""

    architecture = "jumprelu"
    has_auxk = True

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.threshold: Tensor
        self.batches: Tensor

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        if not self.training:
            latents = self.encode(x_ND)
            return Forward(x_ND, decode(latents, self.W_dec_FD, self.b_dec_D), latents)
        selected = batchtopk_latents(x_ND, self.W_enc_FD, self.b_enc_F, self.b_dec_D, self.k)
        self._learn_threshold(selected)
        weights = (self.W_enc_FD, self.b_enc_F, self.W_dec_FD, self.b_dec_D)
        return Forward(x_ND, *sparse_autoencode(x_ND, *weights, selected, ragged=True), weights_N=weights_N)

    @torch.no_grad()
    def _learn_threshold(self, selected: Latents) -> None:
        values_NK = selected.values_NK
        least = torch.where(values_NK > 0, values_NK, torch.inf).min()
        self.batches += 1
        rate = (1 / self.batches).clamp(min=THRESHOLD_RATE)
        self.threshold += torch.where(least.isfinite(), rate * (least - self.threshold), 0)

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> AnyLatents:
        return threshold_latents(x_ND, self.W_enc_FD, self.b_enc_F, self.b_dec_D, self.threshold)

    def files(self) -> dict[str, dict[str, Tensor]]:
        files = super().files()
        files[WEIGHTS]["threshold"] = self.threshold.expand(self.recipe.latents)
        return files

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        super().load_files(files)
        threshold_F = checked(files[WEIGHTS], {"threshold": (self.recipe.latents,)}, WEIGHTS)["threshold"]
        self.threshold = threshold_F[0].clone()
