"""What `routesae train` was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from routesae.reporting import WrongInput
from routesae.train.saes import SAES, SINGLE_LAYER


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `routesae train` was asked for. Raises WrongInput where a value is impossible."""

    cache: str = "shards"
    sae: str = "routesae"
    layer: int | None = None
    """The one layer a single-layer SAE reads; None for the middle one of the cache."""
    latents: int | None = None
    """Size of the dictionary; None for expansion times the width."""
    expansion: int | None = None
    """Size of the dictionary in widths, instead of latents; None for 8."""
    k: int = 64
    routing: str | None = None
    """routesae only: "hard" (None) or "soft"."""
    aggregate: str | None = None
    """routesae only, what of the layers the router sees: their "sum" (None) or "mean"."""
    lr: float = 5e-4
    """Adam's peak learning rate."""
    batch_tokens: int = 4096
    epochs: int | None = None
    """Passes over the training tokens; None for one, or for what `tokens` asks."""
    tokens: int | None = None
    """Training tokens in all, over as many passes as that takes; instead of epochs."""
    dead_after_tokens: int | None = None
    """A latent not active for this many tokens is dead; None for 10 M, or a quarter of a shorter run."""
    log_every_steps: int = 10
    seed: int = 0
    name: str | None = None
    """Folder under `out`; None for one made of the SAE's name, layer, latents and k."""
    out: str = "saes"
    overwrite: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sae not in SAES:
            raise WrongInput(f"--sae {self.sae!r} is none of {', '.join(SAES)}")
        if self.layer is not None and self.sae not in SINGLE_LAYER:
            raise WrongInput(f"--layer {self.layer} is for {', '.join(SINGLE_LAYER)}; {self.sae} reads every layer")
        for name in ("routing", "aggregate"):
            if getattr(self, name) is not None and self.sae != "routesae":
                raise WrongInput(f"--{name} {getattr(self, name)} is for routesae; {self.sae} has no router")
        if self.latents is not None and self.expansion is not None:
            raise WrongInput(
                f"--latents {self.latents} and --expansion {self.expansion} both say how large the SAE is; give one"
            )
        for name in (
            "latents",
            "expansion",
            "k",
            "batch_tokens",
            "epochs",
            "tokens",
            "dead_after_tokens",
            "log_every_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WrongInput(f"--{name.replace('_', '-')} {value} is below 1")
        if self.epochs is not None and self.tokens is not None:
            raise WrongInput(
                f"--epochs {self.epochs} and --tokens {self.tokens} both say how long to train; give one"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise WrongInput(f"--lr {self.lr} is not above 0")
        if self.seed < 0:
            raise WrongInput(f"--seed {self.seed} is below 0")
        if self.name is not None and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise WrongInput(f"--name {self.name!r} must be a plain folder name, not a path and not hidden")
