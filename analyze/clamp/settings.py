"""What `routesae clamp` was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from routesae.reporting import WrongInput

CONVERSIONS = ("conversation", "text")


@dataclass(frozen=True, kw_only=True)
class ClampSettings:
    """What `routesae clamp` was asked for. Raises WrongInput where a value is impossible."""

    sae: str | None = None
    """SAE folder or hub reference; None for the only one under `out`."""
    out: str = "saes"
    add: tuple[str, ...] = ()
    """LATENT=VALUE, as are multiply and set; VALUE in the SAE's own activation units."""
    multiply: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    ablate: tuple[str, ...] = ()
    """LATENT."""
    error_term: bool = True
    """Add back what the SAE fails to reconstruct."""
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    """A .txt, .jsonl or .jsonl.gz with more of them."""
    text_field: str = "prompt"
    hh: str = "conversation"
    max_prompts: int | None = None
    chat: bool | None = None
    """Fill in the tokenizer's chat template; None for where it has one."""
    max_new_tokens: int = 64
    temperature: float | None = None
    """None for the likeliest token each time."""
    seed: int = 0
    batch_sequences: int = 8
    model: str | None = None
    """Where the LM is now; None for where the SAE's cfg.json says it was."""
    device: str = "auto"
    lm_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_sequences", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WrongInput(f"--{name.replace('_', '-')} {value} is below 1")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise WrongInput(f"--temperature {self.temperature} is not above 0; leave it out for the likeliest token")
        if self.seed < 0:
            raise WrongInput(f"--seed {self.seed} is below 0")
        if self.hh not in CONVERSIONS:
            raise WrongInput(f"--hh {self.hh!r} is none of {', '.join(CONVERSIONS)}")
        if self.error_term and not (self.add or self.multiply or self.set or self.ablate):
            raise WrongInput("no latent to change; give --add, --multiply, --set or --ablate")
