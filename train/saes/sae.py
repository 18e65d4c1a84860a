"""What every SAE variant has in common: the recipe it is built from, and what it takes and gives back.

Dimension letters: L layers, N tokens, D width, F latents, K active latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from routesae.machine.settings import DICTIONARY, OPTIMISER, VARIANT, Settings, setting
from routesae.reporting import WrongInput
from routesae.train.losses import Objective
from routesae.train.ranks.distributed import local_rows
from routesae.train.saes.normalise import NORMALIZATIONS, Hidden, NormalisedLayers, dataset_scale
from routesae.train.sparse.pairs import Frame, Latents
from routesae.train.sparse.policy import Arithmetic
from routesae.train.sparse.search import Encoder, row_products

ROUTERS = ("published", "top2", "frozen", "random")
CONTROLS = ("frozen", "random")  # routers that do not learn
PARTS = ("none", "encoder", "decoder")  # what --freeze leaves as it began
PUBLISHED_DECODER_STEPS = 10  # the published RouteSAE code's `steps`: how rarely it renormalises the decoder


class Recipe(Settings):
    """What an SAE is built from and its objective; with its weights, all that is needed to have it again.

    Raises WrongInput if the parts do not fit.
    """

    sae: str
    layers: tuple[int, ...] = setting(..., DICTIONARY, "Layers of the cache it reads.", ge=0)
    width: int = setting(..., DICTIONARY, "D, numbers a hidden state.", ge=1)
    latents: int = setting(..., DICTIONARY, "F, size of the dictionary.", ge=1)
    k: int = setting(
        ..., DICTIONARY, "Active latents a token: exactly (topk), on average (batchtopk), or aimed at (others).", ge=1
    )
    sparsity: float | None = setting(None, VARIANT, "λ; None to steer it until k latents are active.", ge=0)
    pre_act_loss: float = setting(0.0, VARIANT, "Weight of what pulls dead latents up to their thresholds.", ge=0)
    prefixes: tuple[int, ...] = setting((), VARIANT, "Sizes of the nested dictionaries, the last one F.", ge=1)
    normalize: str = setting("token", DICTIONARY, "Of the input.", choices=NORMALIZATIONS)
    routing: str = setting("hard", VARIANT, "One layer a token, or all weighted.", choices=("hard", "soft"))
    aggregate: str = setting("sum", VARIANT, "What of the layers the router sees.", choices=("sum", "mean"))
    routed: str = setting("topk", VARIANT, "The variant that a routesae's layers share.")
    router: str = setting("published", VARIANT, "How the router learns (saes/routesae.py).", choices=ROUTERS)
    balance: float = setting(0.0, VARIANT, "Weight of the load-balancing term.", ge=0)
    freeze: str = setting("none", OPTIMISER, "Weights that keep their first, random values.", choices=PARTS)
    published: bool = setting(False, OPTIMISER, "Train by the objective of the published RouteSAE code.")

    def check(self) -> None:
        if not self.layers:
            raise WrongInput("layers () are none; name one or more")
        if self.latents * self.width * len(self.layers) >= 2**60:  # of which torch itself cannot count more
            raise WrongInput(f"latents {self.latents} of width {self.width} are more than any memory holds")
        if self.k > self.latents:
            raise WrongInput(
                f"--k {self.k} is more than the SAE's {self.latents} latents; lower it or give more --latents"
            )
        if self.prefixes and (*sorted({*self.prefixes, self.latents}),) != self.prefixes:
            raise WrongInput(f"--prefixes {self.prefixes} must rise and end with the SAE's {self.latents} latents")


class Reading(NamedTuple):
    """What an SAE reads of N tokens: R rows x_RC of the normalised input.

    frame: how rows go back to the LM's units; None if they cannot. weights_R: the rows' weights in every mean of the
    objective, summing to 1; None if all count alike. routing_NL: the router's softmax over the layers, and auxiliary,
    the router's own term of the objective; None without a router.
    """

    x_RC: Tensor
    frame: Frame | None
    weights_R: Tensor | None = None
    routing_NL: Tensor | None = None
    auxiliary: Tensor | None = None


class Forward(NamedTuple):
    """One pass over N tokens, in the units of the objective: those of the SAE's own, normalised input.

    x_ND: that input, which is also the target; a routesae's is routed and scaled, a crosscoder's has the layers in a
    row [N, L·D], an mlsae's has every layer's rows [L·N, D]. reconstruction_ND: of x_ND; `sae.decode(latents)` gives
    the one in the LM's units. penalty: what λ weighs, or None. auxiliary: further terms of the objective, or None.
    weights_N and routing_NL: as in Reading.
    """

    x_ND: Tensor
    reconstruction_ND: Tensor
    latents: Latents
    penalty: Tensor | None = None
    auxiliary: Tensor | None = None
    weights_N: Tensor | None = None
    routing_NL: Tensor | None = None


class SAE(nn.Module, ABC):
    """A sparse autoencoder over the hidden states of `recipe.layers`.

    It takes hidden states in the LM's units, of any float dtype, and normalises them itself:

        latents = sae.encode(hidden)       hidden [..., D]; of an SAE over several layers [..., L, D]
        latents.top(10)                    latents.indices, .values, .dense(): see Latents
        hidden = sae.decode(latents)       the reconstruction in the LM's units: of the same shape, of a routesae
                                           [..., D], each token's at its own layer
        out = sae(hidden)                  what training and scores need, see Forward

    `Hidden` is taken too: [L, N, D] with what is known of it. A new variant is a file with a subclass and a line in
    routesae.train.saes.SAES. Its class says what it is:

    one_layer: whether it reads one layer, chosen with --layer, or all that were harvested.
    penalised: whether a penalty makes it sparse, weighted by --sparsity.
    each_layer: whether it has latents of each of its layers, and not of all or one of them.
    other_sparsity: whether --infer-k and --theta can replace its activation (`at_sparsity`).
    lens_opens: what of it SAELens opens, as the subject of a sentence; None for nothing.
    """

    one_layer: ClassVar[bool] = False
    penalised: ClassVar[bool] = False
    each_layer: ClassVar[bool] = False
    other_sparsity: bool = True
    lens_opens: ClassVar[str | None] = None
    arithmetic: Arithmetic | None = None  # how its sums are done; None for what is fastest (sparse/policy.py)
    chosen: Callable[[Tensor, Encoder], Latents] | None = None  # replaces the activation, see `at_sparsity`
    folder: Path | None = None  # that it was loaded from
    hashes: Mapping[str, str] = {}  # xxh3-128 of each file of weights that it was read from or written to

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.k = recipe.k  # the trainer lowers it to recipe.k step by step if k is annealed
        self.turns, self.turn = 1, 0  # optimiser steps a batch, and which of them comes now
        self.scale = 1.0  # s of "dataset" normalisation, set by `initialise`

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it reads, in the order of L; layer ℓ is the output of the ℓ-th decoder block, from 1."""
        return self.recipe.layers

    @property
    def latents(self) -> int:
        """F, the size of its dictionary."""
        return self.recipe.latents

    @property
    def dictionary(self) -> Any:
        """The SingleLayerSAE that encodes and decodes rows: itself, or the one that a RouteSAE's layers share."""
        return self

    def forward(self, hidden: Hidden | Tensor) -> Forward:
        """Reconstruct, with gradients if they are enabled. What a variant learns from a batch other than by gradients
        (a threshold, λ) it learns here, in training mode only."""
        reading, inner = self.read(self.normalised(hidden), training=self.training), self.dictionary
        inner.k, inner.arithmetic = self.k, self.arithmetic
        if inner.chosen is None:
            out: Forward = inner.autoencode(reading.x_RC, reading.weights_R)
        else:
            latents = inner.encode_rows(reading.x_RC)
            out = Forward(reading.x_RC, inner.decode_rows(latents).flatten(1), latents)
        out.latents.frame = reading.frame
        if isinstance(hidden, Tensor) and not self.training:
            self._in_place(out.latents, hidden)
        terms = [term for term in (out.auxiliary, reading.auxiliary) if term is not None]
        return out._replace(routing_NL=reading.routing_NL, auxiliary=sum(terms[1:], terms[0]) if terms else None)

    def loss(self, out: Forward, dead_d: Tensor, sparsity_factor: float = 1.0) -> Objective:
        """The training objective of a pass.

        dead_d: the latents, by number, that were not active for `dead_after_tokens`; as a number a latent, so that
        how many they are is known here without waiting for the device. sparsity_factor, 0 to 1, warms λ up.
        """
        objective: Objective = self.dictionary.objective(out, dead_d, sparsity_factor)
        return objective

    def encode(self, hidden: Hidden | Tensor) -> Latents:
        """Return the latents of hidden states, as used after training, in the order of the tokens.

        With gradients where hidden states or weights require them: those of the active latents' values. A threshold,
        a gate's bias and the choice of a layer have none, as they decide and do not add.
        """
        reading = self.read(self.normalised(hidden), training=False)
        latents: Latents = self.dictionary.encode_rows(reading.x_RC)
        if torch.is_grad_enabled() and (reading.x_RC.requires_grad or self.dictionary.W_enc_FD.requires_grad):
            latents = self.dictionary.traced(reading.x_RC, latents)
        latents.frame = reading.frame
        return self._in_place(latents, hidden)

    def _in_place(self, latents: Latents, hidden: Hidden | Tensor) -> Latents:
        """The same latents, which know the shape of the hidden states that they are of."""
        leading = -1 if self.one_layer else -2
        latents.lead = (hidden.tokens,) if isinstance(hidden, Hidden) else tuple(hidden.shape[:leading])
        latents.layers = len(self.layers) if self.each_layer else None
        return latents

    def decode(self, latents: Latents) -> Tensor:
        """Return the reconstruction, in the LM's units, of the hidden states that these latents were encoded from.

        Raises WrongInput for soft routing.
        """
        if not isinstance(latents, Latents):
            given = type(latents).__name__
            raise WrongInput(f"decode takes the Latents of encode, not a {given}; to change latents there is steer")
        if latents.frame is None:
            raise WrongInput("soft routing mixes all layers, which cannot be undone; train with --routing hard")
        return latents.shaped(latents.frame.undo(self.dictionary.decode_rows(latents)))

    def normalised(self, hidden: Hidden | Tensor) -> NormalisedLayers:
        """Raises WrongInput if the hidden states have another shape."""
        recipe = self.recipe
        if not isinstance(hidden, Hidden | Tensor):
            raise WrongInput(f"hidden states are a {type(hidden).__name__}; give a torch.Tensor: torch.as_tensor(…)")
        if isinstance(hidden, Tensor):
            ending = (recipe.width,) if self.one_layer else (len(recipe.layers), recipe.width)
            if hidden.shape[-len(ending) :] != ending:
                shape = f"[..., {', '.join(map(str, ending))}]"
                raise WrongInput(f"hidden states are {list(hidden.shape)}, but this {recipe.sae} reads {shape}")
            hidden = Hidden(hidden.reshape(-1, len(recipe.layers), recipe.width).transpose(0, 1))
        return hidden.normalised(recipe.normalize, self.scale, recipe.layers)

    def initialise(self, hidden: Hidden) -> None:
        """Set what starts from the data, given a sample of it."""
        if self.recipe.normalize == "dataset":
            self.scale = dataset_scale(hidden.normalised("none", 1.0, self.recipe.layers))
        self.centre(self.normalised(hidden))

    def fold(self) -> None:
        """Put the scale of "dataset" normalisation into the weights: the same SAE, which reads h as it is."""
        if self.recipe.normalize == "dataset":
            self.fold_scale(self.scale)
            self.scale, self.recipe = 1.0, self.recipe.replace(normalize="none")

    def at_sparsity(self, chosen: Callable[[Tensor, Encoder], Latents]) -> SAE:
        """A view for use, not for training, that shares the weights and whose latents are chosen(x_RC, encoder)."""
        assert self.other_sparsity
        view = copy(self)
        view._modules = {name: copy(module) for name, module in self._modules.items()}
        view.dictionary.chosen = chosen
        return view.eval()

    @abstractmethod
    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        """The rows that it reads of normalised layers."""

    @abstractmethod
    def centre(self, x: NormalisedLayers) -> None:
        """Set what starts from the data, given a normalised sample of it."""

    @abstractmethod
    def fold_scale(self, scale: float) -> None:
        """Make an SAE of x = scale·h one of h: same latents, reconstructions divided by `scale`."""

    @abstractmethod
    def files(self) -> dict[str, dict[str, Tensor]]:
        """What to store: {file name: {tensor name: tensor}}, the names and shapes those of DESIGN §5."""

    @abstractmethod
    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `files`. Raises WrongInput naming a tensor that is missing or of another shape."""

    @torch.no_grad()
    def project_gradient(self) -> None:
        """After backward: take out of the decoder's gradient what would only change its rows' norms."""
        if self.recipe.published:
            return
        for decoder in self.dictionary.decoders():
            assert decoder.grad is not None
            W_dec_FD, grad_FD = local_rows(decoder), local_rows(decoder.grad)
            row_F = torch.arange(len(grad_FD), device=grad_FD.device)
            along_F = row_products(row_F, row_F, W_dec_FD, grad_FD)  # no third [F, D] is made
            grad_FD.addcmul_(W_dec_FD, along_F[:, None], value=-1)

    @torch.no_grad()
    def normalise_decoder(self, step: int, *, last: bool = False) -> None:
        """After optimiser step `step`, counted from 1: the decoder's rows back to unit norm.

        The published code does so at every tenth step of an epoch only, and after the last.
        """
        if self.recipe.published and (step - 1) % PUBLISHED_DECODER_STEPS and not last:
            return
        for W_dec_FD in map(local_rows, self.dictionary.decoders()):
            to_unit_rows(W_dec_FD)

    def __call__(self, hidden: Hidden | Tensor) -> Forward:
        out: Forward = super().__call__(hidden)
        return out

    def extra_repr(self) -> str:
        return f"layers {', '.join(map(str, self.layers))}, {self.latents:,} latents, k {self.recipe.k}"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def to_unit_rows(W_dec: Tensor) -> None:
    """Divide the last dimension's rows by their norms, in place; a row of zeros stays one."""
    norms = torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True)
    W_dec.div_(norms.masked_fill_(norms == 0, 1))
