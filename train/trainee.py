"""One SAE in training: a batch in; a step of the optimiser, and everything that a checkpoint must hold, out.

Dimension letters: L layers, N tokens a batch, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from routesae.reporting import FailedRun
from routesae.train.adam import Adam
from routesae.train.loading.batches import Batch
from routesae.train.log import StepLog
from routesae.train.ranks.distributed import ALONE, Ranks, batch_sum, is_divided, own_rows, whole
from routesae.train.ranks.sharding import copy_whole, shard
from routesae.train.recipes import default_name
from routesae.train.saes import SAE, build
from routesae.train.saes.normalise import NormalisedLayers, with_statistics
from routesae.train.saes.sae import Recipe
from routesae.train.schedule import annealed_k, lr_factor, sparsity_factor
from routesae.train.settings import RunSettings

# SAELens and dictionary_learning clip at 1 the gradient of ‖x − x̂‖², which is D times NormMSE's. It then clips every
# step, so that the first, large gradients do not weigh on Adam's second moments for the rest of a run; held-out
# NormMSE of a topk after 100 steps: 0.1148 without, 0.1057 with (benchmarks/RESULTS.md).
DEFAULT_CLIP = 1.0


class Inputs:
    """A batch of hidden states of `layers`, normalised once for all SAEs that want it the same way.

    tokens: of the whole batch, where this is one rank's part of it.
    """

    def __init__(self, batch: Batch, layers: Sequence[int], tokens: int | None = None):
        self.batch, self.layers = batch, list(layers)
        self.own_tokens = batch.hidden_LND.shape[1]
        self.tokens = self.own_tokens if tokens is None else tokens
        self._normalised: dict[tuple[str, float], NormalisedLayers] = {}

    def __call__(self, recipe: Recipe, scale: float = 1.0) -> NormalisedLayers:
        """x of the recipe's layers. scale: s of "dataset"."""
        key = (recipe.normalize, scale)
        if key not in self._normalised:
            self._normalised[key] = with_statistics(*key, *self.batch)
        return self._normalised[key].of([self.layers.index(layer) for layer in recipe.layers])


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What all SAEs of a pass share. precision: of autocast; float32 turns it off."""

    total_steps: int
    dead_after_tokens: int
    sparsity_warmup: float
    precision: torch.dtype
    seed: int


class Trainee:
    """An SAE with its optimiser, its dead-latent counters and its log. scale: s of "dataset" normalisation.

    Of a run of several processes each has one, and all have the same weights, or each its rows of them.
    """

    def __init__(self, sae: SAE, settings: RunSettings, pace: Pace, folder: Path, log: StepLog, ranks: Ranks = ALONE):
        self.sae, self.settings, self.pace, self.folder, self.log = sae, settings, pace, folder, log
        self.ranks, self.device, self.divided = ranks, sae.device, False
        self.scale = 1.0
        published = sae.recipe.published
        self.clip = settings.clip if settings.clip is not None else 0.0 if published else DEFAULT_CLIP
        self.idle_tokens_F = torch.zeros(sae.recipe.latents, dtype=torch.int64, device=sae.device)

    def divide(self, *, offload: bool) -> None:
        """Leave this rank its rows of the weights and of what Adam will hold. Before the first step only."""
        assert "adam" not in self.__dict__
        shard(self.sae, self.device, offload=offload)
        self.divided = True
        assert all(map(is_divided, self.adam.parameters))  # made now: a forward pass puts whole ones in their place

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.sae.parameters() if parameter.requires_grad]

    @cached_property
    def adam(self) -> Adam:
        """Made when it is first needed: dividing the parameters replaces them by others."""
        factors = self.sae.rate_factors()
        return Adam(self.trained, [factors.get(parameter, 1.0) for parameter in self.trained])

    def step(self, step: int, inputs: Inputs) -> None:
        """One step, counted from 1; of its rows of the batch where there are several ranks."""
        copies = self.ranks.world if inputs.tokens < self.ranks.world else 1  # see batches.share_of
        with self.ranks.one_batch(inputs.own_tokens, inputs.tokens * copies):
            self._step(step, inputs)

    def _step(self, step: int, inputs: Inputs) -> None:
        sae, pace, done = self.sae, self.pace, step - 1
        torch.manual_seed((pace.seed << 32) + step)  # for what is drawn in training: the same after a resume
        sae.k = annealed_k(done, pace.total_steps, pace.sparsity_warmup, self.settings.anneal_k_from, sae.recipe.k)
        lr = self.settings.lr * lr_factor(done, pace.total_steps)
        dead_F = self.idle_tokens_F >= pace.dead_after_tokens
        with torch.autocast(self.device.type, pace.precision, enabled=pace.precision != torch.float32):
            out = sae(inputs(sae.recipe, self.scale))
            objective = sae.loss(out, dead_F, sparsity_factor(done, pace.total_steps, pace.sparsity_warmup))
        self.adam.zero_grad()
        objective.total.backward()  # type: ignore[no-untyped-call]
        if not self.divided:  # else the backward pass has summed them
            self.ranks.sum_gradients(self.trained)
        sae.project_gradient()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip / sae.recipe.width)
        self.adam.step(lr)
        sae.normalise_decoder(step, last=step == pace.total_steps)
        counts_F = batch_sum(out.latents.active_counts(sae.recipe.latents))
        self.idle_tokens_F = torch.where(counts_F > 0, 0, self.idle_tokens_F + inputs.tokens)
        self.log.add(out, objective, counts_F, inputs.tokens, lr, step)

    def require_finite(self, step: int) -> None:
        """Raises FailedRun where the loss, a weight or a moment is no number after `step`. Waits for the device."""
        self.log.require_finite()
        finite = all(bool(own_rows(tensor).isfinite().all()) for tensor in self.tensors().values())
        if self.ranks.largest(not finite):
            raise FailedRun(f"the weights became no numbers by step {step}; lower --lr {self.settings.lr}")

    @torch.no_grad()
    def whole_sae(self) -> SAE:
        """The SAE in one piece, on every rank, each of which must ask."""
        if not self.divided:
            return self.sae
        state = {name: whole(tensor).cpu() for name, tensor in self.sae.state_dict().items()}
        sae = build(self.sae.recipe)
        sae.load_state_dict(state)
        sae.chunk_rows = self.sae.chunk_rows
        return sae.to(self.device)

    @property
    def name(self) -> str:
        return self.settings.name or default_name(self.sae.recipe)

    @property
    def dead_share(self) -> Tensor:
        return (self.idle_tokens_F >= self.pace.dead_after_tokens).double().mean()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers, moments and counters by name, for a checkpoint."""
        named = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        return {**named, **self.adam.tensors(), "idle_tokens": self.idle_tokens_F, **self.log.tensors()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse. Raises FailedRun where a tensor is missing, too many or of another shape."""
        tensors = dict(tensors)
        try:
            for name, own in self.sae.state_dict().items():
                copy_whole(own, _same_shape(tensors.pop(f"sae.{name}"), own))
            self.idle_tokens_F.copy_(_same_shape(tensors.pop("idle_tokens"), self.idle_tokens_F))
            self.log.load_tensors({name: tensors.pop(name) for name in self.log.tensors()})
            for name, own in self.adam.tensors().items():
                copy_whole(own, _same_shape(tensors.pop(name), own))
        except KeyError as missing:
            raise FailedRun(f"a checkpoint of {self.folder.name} holds no {missing}; start again") from None
        if tensors:
            raise FailedRun(f"a checkpoint of {self.folder.name} holds {sorted(tensors)[0]} too; start again")

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"scale": self.scale, **self.log.facts()}


def _same_shape(tensor: Tensor, own: Tensor) -> Tensor:
    if tensor.shape != own.shape or tensor.dtype != own.dtype:
        raise FailedRun(f"a checkpoint's tensor is {list(tensor.shape)} where {list(own.shape)} belongs; start again")
    return tensor
