"""Matryoshka: a BatchTopK whose first latents must do without the later ones (2503.17547).

    f as in BatchTopK, over all F latents
    x̂_m = W_decᵀ[:m] f[:m] + b_dec   for the nested sizes m_1 < … < F
    loss = Σ_m NormMSE(x, x̂_m) + 1/32 · AuxK over the dead latents of the whole

The sizes default to F/16, F/8, F/4, F/2, F.

Dimension letters: N tokens, D width, F latents.
"""

from torch import Tensor

from routesae.train.losses import norm_mse
from routesae.train.saes.batchtopk import BatchTopK
from routesae.train.saes.sae import Forward

DEFAULT_FRACTIONS = (16, 8, 4, 2, 1)


def default_prefixes(latents: int) -> tuple[int, ...]:
    """F/16, F/8, F/4, F/2, F; fewer where F is small."""
    return tuple(sorted({max(1, latents // part) for part in DEFAULT_FRACTIONS}))


class Matryoshka(BatchTopK):
    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        out = super().autoencode(x_ND, weights_N)
        if not self.training:
            return out
        inner = x_ND.new_zeros(())
        reconstruction_ND: Tensor = self.b_dec_D
        # x̂_m of every size but F: the last one and the latents that it has more.
        for part_ND in out.latents.pairs.decode_parts(out.latents.values_P, self.W_dec_FD, self.recipe.prefixes[:-1]):
            reconstruction_ND = part_ND + reconstruction_ND
            inner = inner + norm_mse(x_ND, reconstruction_ND, weights_N)
        return out._replace(auxiliary=inner)
