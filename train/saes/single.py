"""A dictionary: what the variants over one layer have in common, and a crosscoder too.

    x̂ = W_decᵀ f + b_dec;   loss = NormMSE(x, x̂) + λ·penalty + auxiliary terms + 1/32 · AuxK if the variant has it

A subclass says how x becomes f and what is penalised. A RouteSAE, mlsae and random use the same classes over rows
taken from several layers.

Random rows leave half of the latents active on a token. An SAE that starts with k of them active, as it is to end, is
sparse and fast from its first step, and errs less at its end (benchmarks/RESULTS.md).

Dimension letters: N tokens, D width (a crosscoder's is that of all its layers), F latents, R rows.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from routesae.reporting import WrongInput
from routesae.train.losses import AUXK_WEIGHT, Objective, auxk, norm_mse
from routesae.train.saes.normalise import Hidden, NormalisedLayers
from routesae.train.saes.sae import SAE, Forward, Reading, Recipe
from routesae.train.sparse.kernels import encode_pairs
from routesae.train.sparse.pairs import Latents, Pairs
from routesae.train.sparse.search import Encoder

WEIGHTS = "sae_weights.safetensors"
SAMPLE_TOKENS = 256  # that say how large pre-activations are; of F each, which take memory
MEDIAN_STEPS = 20  # Weiszfeld's iteration is well settled by then on normalised hidden states
MEDIAN_STILL = 1e-5  # a last move so much shorter than the distance to the rows
_TINY = 1e-6  # keeps a row that is the median itself out of 1/0


class SingleLayerSAE(SAE):
    """W_enc_FD and W_dec_FD hold one latent a row; on disk W_enc is [D, F], as in SAELens.

    architecture: SAELens' name for what is on disk. tensors: SAELens' name of each further parameter of shape [F].
    has_auxk: whether AuxK revives its dead latents.
    """

    one_layer = True
    lens_opens: ClassVar[str | None] = "It"
    architecture: ClassVar[str]
    tensors: ClassVar[dict[str, str]] = {"b_enc": "b_enc_F"}
    has_auxk: ClassVar[bool] = False
    b_enc_F: nn.Parameter

    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe)
        self.W_enc_FD, self.W_dec_FD = map(nn.Parameter, self.first_weights(generator))
        self.W_enc_FD.requires_grad_(recipe.freeze != "encoder")
        self.W_dec_FD.requires_grad_(recipe.freeze != "decoder")
        self.b_dec_D = nn.Parameter(torch.zeros(self.W_dec_FD.shape[1]))
        for attribute in self.tensors.values():
            self.register_parameter(attribute, nn.Parameter(torch.zeros(recipe.latents)))

    def first_weights(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """W_enc_FD, and W_dec_FD: encoderᵀ with unit rows."""
        latents, width = self.recipe.latents, self.recipe.width
        if self.recipe.published:  # a linear layer's initial weights
            W_enc_FD = (torch.rand(latents, width, generator=generator) * 2 - 1) * width**-0.5
        else:
            W_enc_FD = torch.randn(latents, width, generator=generator)
            W_enc_FD /= W_enc_FD.norm(dim=1, keepdim=True)
        return W_enc_FD, W_enc_FD / W_enc_FD.norm(dim=1, keepdim=True)

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        return Reading(x[0], x.frame())

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        """Reconstruct normalised rows. weights_N: as in Reading."""
        raise NotImplementedError

    def latents_of(self, x_ND: Tensor) -> Latents:
        """The latents in use of normalised rows, by the variant's own activation; called without gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_rows(self, x_ND: Tensor) -> Latents:
        """The latents in use of normalised rows."""
        return self.latents_of(x_ND) if self.chosen is None else self.chosen(x_ND, self.encoder())

    def traced(self, x_ND: Tensor, latents: Latents) -> Latents:
        """The latents of these rows with gradients, which only active ones have: f = z there."""
        *pair, values_M = latents.active()
        pairs = Pairs(len(x_ND), self.recipe.latents, *pair)
        return Latents(encode_pairs(x_ND, self.encoder(), pairs, values_M), pairs)

    @torch.no_grad()
    def encode_at(self, hidden_RD: Tensor, scale_R1: Tensor | None = None) -> Latents:
        """The latents of hidden states of any one layer, in the LM's units, for splicing; `decode` takes them back.

        scale_R1: what a router multiplies the normalised input by.
        """
        x = Hidden(hidden_RD[None]).normalised(self.recipe.normalize, self.scale, self.recipe.layers)
        latents = self.encode_rows(x[0] if scale_R1 is None else x[0] * scale_R1)
        latents.frame = x.frame()._replace(scale=scale_R1)
        return latents

    def decode_rows(self, latents: Latents) -> Tensor:
        """x̂, normalised."""
        return latents.pairs.decode(latents.values_P, self.W_dec_FD, self.b_dec_D)

    def encoder(self) -> Encoder:
        return Encoder(self.W_enc_FD, self.b_enc_F, self.b_dec_D, self.arithmetic)

    def penalty_weight(self, sparsity_factor: float) -> Tensor | float:
        """λ now; sparsity_factor, 0 to 1, warms it up."""
        raise AssertionError(f"{self.recipe.sae} has no penalty")

    def objective(self, out: Forward, dead_d: Tensor, sparsity_factor: float) -> Objective:
        """As `SAE.loss`."""
        error = loss = norm_mse(out.x_ND, out.reconstruction_ND, out.weights_N)
        if out.penalty is not None:
            loss = loss + self.penalty_weight(sparsity_factor) * out.penalty
        if out.auxiliary is not None:
            loss = loss + out.auxiliary
        if self.has_auxk and not self.recipe.published:
            revival = auxk(out.x_ND, out.reconstruction_ND, self.encoder(), self.W_dec_FD, dead_d, out.weights_N)
            loss = loss + AUXK_WEIGHT * revival
        return Objective(loss, error)

    def centre(self, x: NormalisedLayers) -> None:
        self.start_from(self.read(x, training=False).x_RC)

    @torch.no_grad()
    def start_from(self, x_ND: Tensor) -> None:
        """Set b_dec to the geometric median of a normalised sample; the published code leaves it at zero."""
        if not self.recipe.published:
            self.b_dec_D.copy_(geometric_median(x_ND))

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """Factors on the run's learning rate: √D for biases and thresholds. Adam moves every number by about the
        learning rate, and these, in units of the pre-activations, are √D times the size of a unit row's weights."""
        if self.recipe.published:
            return {}
        factor = math.sqrt(self.recipe.width)
        return {getattr(self, attribute): factor for name, attribute in self.tensors.items() if name != "r_mag"}

    def decoders(self) -> list[nn.Parameter]:
        """Decoder weights that are trained with rows of unit norm."""
        return [self.W_dec_FD] if self.W_dec_FD.requires_grad else []

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        self.W_enc_FD.mul_(scale)
        self.W_dec_FD.div_(scale)
        self.b_dec_D.div_(scale)

    def lens_config(self) -> dict[str, Any]:
        """The fields that SAELens' configuration has for this architecture alone."""
        return {}

    def files(self) -> dict[str, dict[str, Tensor]]:
        further = {name: getattr(self, attribute) for name, attribute in self.tensors.items()}
        tensors = {"W_enc": self.W_enc_FD.T, "W_dec": self.W_dec_FD, "b_dec": self.b_dec_D, **further}
        return {WEIGHTS: {name: tensor.detach() for name, tensor in tensors.items()}}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        f, d = self.recipe.latents, self.recipe.width
        shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,)} | dict.fromkeys(self.tensors, (f,))
        tensors = checked(files[WEIGHTS], shapes, WEIGHTS)
        self.W_enc_FD = nn.Parameter(tensors["W_enc"].T.contiguous())
        self.W_dec_FD = nn.Parameter(tensors["W_dec"])
        self.b_dec_D = nn.Parameter(tensors["b_dec"])
        for name, attribute in self.tensors.items():
            setattr(self, attribute, nn.Parameter(tensors[name]))


def checked(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], file: str) -> dict[str, Tensor]:
    """The tensors named in `shapes`, float32. Raises WrongInput if one is missing or has another shape."""
    if missing := sorted(set(shapes) - set(tensors)):
        raise WrongInput(f"{file} holds no {', '.join(missing)}; train the SAE again or copy it whole")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise WrongInput(
                f"{file}: {name} is {list(tensors[name].shape)} where cfg.json says {list(shape)}; "
                "the folder mixes two SAEs"
            )
    return {name: tensors[name].float() for name in shapes}


def least_active(x_ND: Tensor, W_enc_FD: Tensor, k: int) -> Tensor:
    """The number that k of a token's F pre-activations W_enc x are above, on average over the sample."""
    z_NF = x_ND[:SAMPLE_TOKENS] @ W_enc_FD.T
    active = min(k * len(z_NF), z_NF.numel() - 1)
    return torch.kthvalue(-z_NF.flatten(), active + 1).values.neg()


def geometric_median(x_ND: Tensor) -> Tensor:
    """The point of least summed distance to the N rows, by Weiszfeld's iteration from the mean."""
    median_D = x_ND.mean(0)
    for _ in range(MEDIAN_STEPS):
        before_D = median_D
        weights_N = 1 / torch.linalg.vector_norm(x_ND - before_D, dim=1).clamp(min=_TINY)
        median_D = weights_N @ x_ND / weights_N.sum()
        distance = len(x_ND) / weights_N.sum()  # to the rows, their harmonic mean
        if torch.linalg.vector_norm(median_D - before_D) <= MEDIAN_STILL * distance:
            break
    return median_D
