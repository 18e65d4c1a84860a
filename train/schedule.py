"""The learning rate over a run: a step in; the factor on the peak rate out."""

from __future__ import annotations

WARMUP_SHARE = 0.05
DECAY_SHARE = 0.20


def lr_factor(step: int, total_steps: int) -> float:
    """Linear warm-up over the first 5 % of steps, constant, linear decay to near zero over the last 20 %.

    step counts from 0. The first step already moves and the last one still does.
    """
    warmup_steps = max(1, round(WARMUP_SHARE * total_steps))
    decay_steps = max(1, round(DECAY_SHARE * total_steps))
    return min(1.0, (step + 1) / warmup_steps, (total_steps - step) / decay_steps)
