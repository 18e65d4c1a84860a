"""Adam (1412.6980) with a learning rate for each parameter, and what changes from step to step of a run.

    m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²,   θ ← θ − lr·m̂/(√v̂ + ε)     m̂, v̂: m, v over 1−βᵗ

Where --lr is auto it is c/√F for F latents, the rule of 2406.04093, with c = 0.192 measured here: within 1.1 % of the
best NormMSE of a sweep in six settings of F, k, layer, batch and steps, and 2.4 % in a seventh, of 400 steps
(benchmarks/RESULTS.md, by benchmarks/ladder.py).

PyTorch's fused kernel, called as a function: its optimiser class imports the compiler, which takes as long as all
the rest of PyTorch, before the first step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from routesae.train.ranks.distributed import local_rows

BETAS = (0.9, 0.999)
EPSILON = 6.25e-10  # 2406.04093, appendix A.2: rarely active latents have tiny gradients
PUBLISHED_EPSILON = 1e-8  # PyTorch's default, which the published RouteSAE code keeps
LR_TIMES_ROOT_LATENTS = 0.192
PUBLISHED_LR = 5e-4
WARMUP_SHARE = 0.05
DECAY_SHARE = 0.20


class Adam:
    """Moments and step counts of `parameters`. factors: each one's learning rate in units of the run's. epsilon: ε.

    Of parameters divided among ranks (routesae.train.ranks.distributed) each rank holds and steps its own rows.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], factors: Sequence[float], epsilon: float = EPSILON):
        self.parameters, self.factors, self.epsilon = list(parameters), list(factors), epsilon
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        self.means = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.squares = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor | None = None) -> None:
        """One step of every parameter that has a gradient, which is first divided by `divisor`, in the same pass."""
        for factor in sorted(set(self.factors)):
            at = [i for i, p in enumerate(self.parameters) if self.factors[i] == factor and p.grad is not None]
            adam(
                [local_rows(self.parameters[i]) for i in at],
                [local_rows(grad) for i in at if (grad := self.parameters[i].grad) is not None],
                [local_rows(self.means[i]) for i in at],
                [local_rows(self.squares[i]) for i in at],
                [],
                [self.steps[i] for i in at],
                fused=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=lr * factor,
                weight_decay=0.0,
                eps=self.epsilon,
                maximize=False,
                grad_scale=divisor,
            )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint."""
        named: dict[str, Tensor] = {}
        for at, (step, mean, square) in enumerate(zip(self.steps, self.means, self.squares, strict=True)):
            named |= {f"adam.{at}.step": step, f"adam.{at}.exp_avg": mean, f"adam.{at}.exp_avg_sq": square}
        return named


def peak_lr(latents: int, *, published: bool = False) -> float:
    """The learning rate that --lr auto comes to, to three digits."""
    return PUBLISHED_LR if published else float(f"{LR_TIMES_ROOT_LATENTS / latents**0.5:.3g}")


def lr_factor(step: int, total_steps: int, *, published: bool = False) -> float:
    """Linear warm-up over the first 5 % of steps, constant, linear decay to near zero over the last 20 %.

    The first step already moves and the last one still does; the first of the published code does not.
    """
    if published:
        warmup_steps, decay_steps = int(WARMUP_SHARE * total_steps), total_steps // 5
        if step < warmup_steps:
            return step / warmup_steps
        return min(1.0, (total_steps - step) / max(1, decay_steps))
    warmup_steps = max(1, round(WARMUP_SHARE * total_steps))
    decay_steps = max(1, round(DECAY_SHARE * total_steps))
    return min(1.0, (step + 1) / warmup_steps, (total_steps - step) / decay_steps)


def sparsity_factor(step: int, total_steps: int, warmup_share: float) -> float:
    """The factor on λ, which rises linearly over the first `warmup_share` of the steps and then is 1."""
    warmup_steps = round(warmup_share * total_steps)
    return min(1.0, (step + 1) / (warmup_steps + 1))


def annealed_k(step: int, total_steps: int, warmup_share: float, first: int | None, k: int) -> int:
    """k, falling linearly from `first` over the same steps, or always k if `first` is None."""
    if first is None:
        return k
    return round(first + (k - first) * sparsity_factor(step, total_steps, warmup_share))
