"""What `routesae contexts` was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from routesae.reporting import WrongInput


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """What `routesae contexts` was asked for. Raises WrongInput where a value is impossible."""

    cache: str = "shards"
    saes: tuple[str, ...] = ()
    """SAE folders or hub references; none for every SAE under `out`."""
    out: str = "saes"
    threshold: float = 15.0
    """Activations above it count for the rule; on the SAE's normalised input."""
    window: int = 64
    """Tokens of a context, at most."""
    top: int | None = None
    """Choose the N strongest activations of every latent instead of what the rule keeps."""
    per_class: int = 2
    """The rule: contexts a token class, at most."""
    max_classes: int = 32
    """The rule: latents of more token classes are left out."""
    min_contexts: int = 5
    """The rule: latents of fewer contexts are left out."""
    samples: int = 5
    """Contexts of each third, strong, middle and weak, of a uniform sample of a latent's activations."""
    seed: int = 0
    """Of that sample."""
    batch_tokens: int = 4096
    model: str | None = None
    """Where the tokenizer is now; None for where the manifest says the LM was."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise WrongInput(f"--threshold {self.threshold} is not a number of 0 or more")
        for name in ("window", "top", "per_class", "max_classes", "min_contexts", "samples", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WrongInput(f"--{name.replace('_', '-')} {value} is below 1")
        if self.seed < 0:
            raise WrongInput(f"--seed {self.seed} is below 0")
