"""One SAE in training: its step of the optimiser, and the state that a checkpoint must hold.

Dimension letters: L layers, N tokens a batch, D width, F latents.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from routesae.reporting import FailedRun
from routesae.train.jobs import Job
from routesae.train.log import StepLog
from routesae.train.losses import Objective
from routesae.train.optimiser import EPSILON, PUBLISHED_EPSILON, Adam, annealed_k, lr_factor, sparsity_factor
from routesae.train.ranks.distributed import ALONE, Ranks, batch_sum, copy_whole, is_divided, local_rows, shard, whole
from routesae.train.saes import SAE, build
from routesae.train.saes.normalise import Hidden
from routesae.train.sparse.policy import Arithmetic
from routesae.train.state import load_checkpoint, save_checkpoint

# SAELens and dictionary_learning clip the gradient of ‖x − x̂‖², D times NormMSE's, at 1. That clips every step, so
# the first, large gradients do not weigh on Adam's second moments for the rest of a run: the held-out NormMSE of a
# topk after 100 steps is 0.1057 with it and 0.1148 without (benchmarks/RESULTS.md).
DEFAULT_CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What all SAEs of a pass share. arithmetic: how sums are done on the device that the pass began on."""

    total_steps: int
    epoch_steps: int
    dead_after_tokens: int
    sparsity_warmup: float
    arithmetic: Arithmetic
    seed: int


class Trainee:
    """An SAE with its optimiser, its dead-latent counters and its log.

    In a run of several processes each has one; all hold the same weights, or each its rows of them.
    """

    def __init__(self, sae: SAE, job: Job, pace: Pace, log: StepLog, ranks: Ranks = ALONE):
        self.sae, self.job, self.pace, self.log = sae, job, pace, log
        self.ranks, self.device, self.divided = ranks, sae.device, False
        default_clip = 0.0 if sae.recipe.published else DEFAULT_CLIP
        self.clip = default_clip if job.settings.clip is None else job.settings.clip
        self.arithmetic = sae.arithmetic = pace.arithmetic
        self.idle_tokens_F = torch.zeros(sae.recipe.latents, dtype=torch.int64, device=sae.device)
        self.dead_d = self.idle_tokens_F[:0]  # the latents that are dead, by number

    def divide(self, *, offload: bool) -> None:
        """Leave this rank its rows of the weights and of Adam's moments. Before the first step only."""
        assert "adam" not in self.__dict__
        shard(self.sae, self.device, offload=offload)
        self.divided = True
        assert all(map(is_divided, self.adam.parameters))  # made now: a forward pass swaps in whole parameters

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.sae.parameters() if parameter.requires_grad]

    @cached_property
    def adam(self) -> Adam:
        """Made when first needed, since dividing the parameters replaces them."""
        factors = self.sae.dictionary.rate_factors()
        epsilon = PUBLISHED_EPSILON if self.sae.recipe.published else EPSILON
        return Adam(self.trained, [factors.get(parameter, 1.0) for parameter in self.trained], epsilon)

    def step(self, step: int, hidden: Hidden, tokens: int) -> None:
        """Take step `step`, counted from 1, on this rank's rows of a batch of `tokens`."""
        copies = self.ranks.world if tokens < self.ranks.world else 1  # see batches.share_of
        with self.ranks.one_batch(hidden.tokens, tokens * copies):
            self._step(step, hidden, tokens)

    def _step(self, step: int, hidden: Hidden, tokens: int) -> None:
        sae, settings, pace, done = self.sae, self.job.settings, self.pace, step - 1
        torch.manual_seed((pace.seed << 32) + step)  # what training draws is then the same after a resume
        sae.k = annealed_k(done, pace.total_steps, pace.sparsity_warmup, settings.anneal_k_from, sae.recipe.k)
        published = sae.recipe.published
        lr = self.job.lr * lr_factor(done, pace.total_steps, published=published)
        warmth = 1.0 if published else sparsity_factor(done, pace.total_steps, pace.sparsity_warmup)
        counts_F = torch.zeros_like(self.idle_tokens_F)
        objectives = []
        for turn in range(sae.turns):
            sae.turn = turn
            with torch.autocast(self.device.type, torch.bfloat16, self.arithmetic.precision == "bfloat16"):
                out = sae(hidden)
                objective = sae.loss(out, self.dead_d, warmth)
            self.adam.zero_grad()  # the divided parameters, which a forward pass hides from the SAE
            objective.total.backward()  # type: ignore[no-untyped-call]
            if not self.divided:  # else the backward pass has summed them
                self.ranks.sum_gradients(self.trained)
            sae.project_gradient()
            self.adam.step(lr, self._gradient_over_clip() if self.clip else None)
            torch.clear_autocast_cache()  # of the weights as they were; a caller's own autocast would keep it
            counts_F += out.latents.active_counts
            objectives.append(objective)
        sae.normalise_decoder(done % pace.epoch_steps + 1, last=step == pace.total_steps)
        counts_F = batch_sum(counts_F)
        self.idle_tokens_F = torch.where(counts_F > 0, 0, self.idle_tokens_F + tokens)
        mean = Objective(*(torch.stack(parts).detach().mean() for parts in zip(*objectives, strict=True)))
        self.log.add(out, mean, counts_F if sae.turns == 1 else counts_F / sae.turns, tokens, lr, step)
        self._find_dead()

    def _gradient_over_clip(self) -> Tensor:
        """What to divide the gradient by: how many times the clip its norm is, or 1."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        return (whole(norm) * (self.sae.recipe.width / self.clip)).clamp(min=1.0)

    def _find_dead(self) -> None:
        """What a step ends with: alone of all in a step over all pairs it waits for the device."""
        if self.log.tokens_done + self.log.tokens >= self.pace.dead_after_tokens:  # else none can be
            self.dead_d = torch.nonzero(self.idle_tokens_F >= self.pace.dead_after_tokens).squeeze(1)

    @torch.no_grad()
    def whole_sae(self) -> SAE:
        """Return the undivided SAE on every rank; every rank must call it."""
        if not self.divided:
            return self.sae
        state = {name: whole(tensor).cpu() for name, tensor in self.sae.state_dict().items()}
        sae = build(self.sae.recipe)
        sae.load_state_dict(state)
        sae.arithmetic, sae.scale = self.sae.arithmetic, self.sae.scale
        return sae.to(self.device)

    def save(self, step: int) -> None:
        """Write a checkpoint after step `step`; every rank must call it.

        Raises FailedRun if the loss, a weight or a moment is NaN or infinite, so a good checkpoint is never replaced.
        """
        self.log.require_finite()
        tensors = self._tensors()
        finite = all(bool(local_rows(tensor).isfinite().all()) for tensor in tensors.values())
        if self.ranks.largest(not finite):
            raise FailedRun(f"the weights are NaN or infinite at step {step}; lower --lr {self.job.lr}")
        gathered = {name: whole(tensor) for name, tensor in tensors.items()}
        if self.ranks.first:
            save_checkpoint(self.job.partial, step, gathered, self.job.identity, self.arithmetic)

    @torch.no_grad()
    def load(self, step: int) -> None:
        """Become what it was after step `step`, and do sums as it did: any device can, if not equally fast.

        Raises FailedRun if the checkpoint is damaged or does not fit.
        """
        tensors, _, begun = load_checkpoint(self.job.partial, step)
        self.arithmetic = self.sae.arithmetic = begun.replace(max_memory=self.pace.arithmetic.max_memory)
        into = self._tensors()
        kinds = [{name: (t.shape, t.dtype) for name, t in state.items()} for state in (into, tensors)]
        if differing := sorted({name for name, _ in kinds[0].items() ^ kinds[1].items()}):
            shown = ", ".join(differing[:3])
            raise FailedRun(f"the checkpoint in {self.job.partial} does not fit this SAE ({shown}); start again")
        for name, tensor in tensors.items():
            copy_whole(into[name], tensor)
        self.log.restore(*into["log.counts"].tolist())
        self.sae.scale = float(tensors["scale"])
        self._find_dead()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds: weights, buffers, moments, counters and the log's sums."""
        weights = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        rest = {"idle_tokens": self.idle_tokens_F, "scale": torch.tensor(self.sae.scale, dtype=torch.float64)}
        return {**weights, **self.adam.tensors(), **rest, **self.log.tensors()}
