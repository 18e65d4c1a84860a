"""λ, the weight of a sparsity penalty: fixed by --sparsity and warmed up, or steered until k latents are active.

    log λ ← log λ + 1/20·clip(log(L0/k), −1, 1)   at every training batch

A λ that works on one LM, layer and width is of no use on the next, while "about k active latents" means the same
everywhere. So steering is the default of the variants whose papers sweep λ (vanilla, gated, crosscoder).

Steering starts at λ = 2σ/‖x‖², where σ = ‖x‖/√C is the size of a pre-activation at the start (W_enc's rows have unit
norm) and C is how many numbers an input has. An active latent f lowers NormMSE by up to f²/‖x‖², which is worth its
penalty from f = 2σ on. At three times as much latents die, at seven times most of them; at a fifth L0 first rises
severalfold, and the error ends larger (benchmarks/RESULTS.md). A crosscoder's latent, as long in each of its L
layers, costs √L times as much.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from routesae.train.ranks.distributed import batch_mean
from routesae.train.saes.sae import Recipe
from routesae.train.saes.single import SingleLayerSAE, least_active

RATE = 0.05
START = 2.0
_TINY = 1e-6  # keeps inputs that are all zero out of 1/0


class SteeredSAE(SingleLayerSAE):
    """A dictionary whose forward pass gives a penalty that this λ weighs. A steered one is checkpointed as a buffer.

    start_bias: the bias that is set so that k latents are active at the start, on a sample of the data.
    """

    penalised = True
    start_bias: ClassVar[str] = "b_enc_F"

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        columns = self.W_enc_FD.shape[1]
        self.cost = math.sqrt(columns // recipe.width)  # what f = 1 adds to the penalty: a crosscoder has L layers
        # For inputs of norm √C, until `start_penalty` sees some.
        self.register_buffer("steered", torch.tensor(START / (columns * self.cost)))
        self.steered: Tensor

    @torch.no_grad()
    def start_penalty(self, x_NC: Tensor) -> None:
        """Set λ for inputs like x_NC, a sample of the normalised ones."""
        size = torch.linalg.vector_norm(x_NC, dim=1).mean().clamp(min=_TINY)
        self.steered.copy_(START / (size * math.sqrt(x_NC.shape[1]) * self.cost))

    @torch.no_grad()
    def steer(self, l0: Tensor) -> None:
        """Move λ after a training batch with l0 active latents a token on average."""
        if self.recipe.sparsity is None:
            ratio = (batch_mean(l0) / self.k).clamp(min=1e-3)
            self.steered *= torch.exp(RATE * ratio.log().clamp(-1, 1))

    @torch.no_grad()
    def start_from(self, x_ND: Tensor) -> None:
        super().start_from(x_ND)
        self.start_penalty(x_ND)
        if not self.recipe.published:
            bias_F = getattr(self, self.start_bias)
            bias_F.copy_(-least_active(x_ND - self.b_dec_D, self.W_enc_FD, self.k))

    def penalty_weight(self, sparsity_factor: float) -> Tensor | float:
        return self.steered.clone() if self.recipe.sparsity is None else self.recipe.sparsity * sparsity_factor
