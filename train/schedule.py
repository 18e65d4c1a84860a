"""What changes from step to step of a run: the learning rate, the penalty's weight and k. Steps count from 0."""

from __future__ import annotations

WARMUP_SHARE = 0.05
DECAY_SHARE = 0.20


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
    """k, falling linearly from `first` over the same steps; `first` None: k all along."""
    if first is None:
        return k
    return round(first + (k - first) * sparsity_factor(step, total_steps, warmup_share))
