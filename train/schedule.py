"""What changes over a run: a step in; the learning rate's factor, the penalty's factor and k out.

Steps count from 0. The first step already moves and the last one still does.
"""

from __future__ import annotations

WARMUP_SHARE = 0.05
DECAY_SHARE = 0.20


def lr_factor(step: int, total_steps: int) -> float:
    """Linear warm-up over the first 5 % of steps, constant, linear decay to near zero over the last 20 %."""
    warmup_steps = max(1, round(WARMUP_SHARE * total_steps))
    decay_steps = max(1, round(DECAY_SHARE * total_steps))
    return min(1.0, (step + 1) / warmup_steps, (total_steps - step) / decay_steps)


def sparsity_factor(step: int, total_steps: int, warmup_share: float) -> float:
    """What λ is multiplied by: rises linearly over the first `warmup_share` of the steps, then 1."""
    warmup_steps = round(warmup_share * total_steps)
    return min(1.0, (step + 1) / (warmup_steps + 1))


def annealed_k(step: int, total_steps: int, warmup_share: float, first: int | None, k: int) -> int:
    """Falls linearly from `first` to k over the same steps; k all along where `first` is None."""
    if first is None:
        return k
    return round(first + (k - first) * sparsity_factor(step, total_steps, warmup_share))
