"""BatchTopK: the k·N largest latents of a whole batch, so that a token may have more or fewer (2412.06410).

    z = W_enc (x − b_dec) + b_enc
    training: f = ReLU(z) where it is among the k·N largest of the batch's N·F     (eq. 3)
    in use:   f = z·1[z > θ],  θ the mean over batches of the least positive f     (eq. 4)
    loss = NormMSE(x, x̂) + 1/32 · AuxK over the dead latents

θ is a running mean, so that it follows the weights: a batch counts a tenth, and more at the start, where
there are few. (At 1/100 it lagged behind the falling activations of a run of 200 steps: L0 45 in use for 64 trained.)

Dimension letters: N tokens, D width, F latents, P pairs of a token and a latent: all, or those that are active.
"""

import torch
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.ranks.distributed import batch_least
from routesae.train.saes.sae import Forward, Recipe
from routesae.train.saes.single import WEIGHTS, SingleLayerSAE, checked
from routesae.train.sparse.kernels import encode_batchtopk, threshold_latents
from routesae.train.sparse.pairs import Latents

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
            latents = self.encode_rows(x_ND)
            return Forward(x_ND, self.decode_rows(latents), latents)
        pairs, z_P = encode_batchtopk(x_ND, self.encoder(), self.k)
        f_P = z_P.relu()
        self._learn_threshold(f_P)
        reconstruction_ND = pairs.decode(f_P, self.W_dec_FD, self.b_dec_D)
        return Forward(x_ND, reconstruction_ND, Latents(f_P, pairs), weights_N=weights_N)

    @torch.no_grad()
    def _learn_threshold(self, f_P: Tensor) -> None:
        self.batches += 1
        none = self.threshold.new_full((), torch.inf)
        least = batch_least(torch.where(f_P > 0, f_P, none).min() if f_P.numel() else none)
        rate = (1 / self.batches).clamp(min=THRESHOLD_RATE)
        self.threshold += torch.where(least < torch.inf, rate * (least - self.threshold), 0)

    def latents_of(self, x_ND: Tensor) -> Latents:
        return threshold_latents(x_ND, self.encoder(), self.threshold)

    def files(self) -> dict[str, dict[str, Tensor]]:
        files = super().files()
        files[WEIGHTS]["threshold"] = self.threshold.expand(self.recipe.latents)
        return files

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        super().load_files(files)
        threshold_F = checked(files[WEIGHTS], {"threshold": (self.recipe.latents,)}, WEIGHTS)["threshold"]
        if not bool((threshold_F == threshold_F[:1]).all()):
            raise WrongInput(f"{WEIGHTS} holds thresholds that differ, and a {self.recipe.sae} has one")
        self.threshold = threshold_F[0].clone()
