"""What `routesae analyze` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from routesae.analyze.scores.metrics import CACHE_METRICS, METRICS
from routesae.reporting import WrongInput

if TYPE_CHECKING:
    from routesae.analyze.scores.sparsity import Sparsity


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings:
    """What `routesae analyze` was asked for. Raises WrongInput where a value is impossible."""

    cache: str = "shards"
    saes: tuple[str, ...] = ()
    """SAE folders or hub references; none for every SAE under `out`."""
    out: str = "saes"
    metrics: tuple[str, ...] = CACHE_METRICS
    tokens: int | None = None
    """Held-out tokens to score on, in whole rows; None for all."""
    batch_sequences: int = 8
    infer_k: tuple[int, ...] = ()
    """Score with so many active latents a token, a row for each; none for what each SAE does by itself."""
    theta: tuple[float, ...] = ()
    """Score with the latents above so much active, a row for each."""
    seed: int = 0
    """Of the draws that confidence intervals are made of."""
    model: str | None = None
    """Where the LM is now; None for where the manifest says it was."""
    device: str = "auto"
    lm_dtype: str = "auto"

    def __post_init__(self) -> None:
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise WrongInput(f"--metric {unknown[0]!r} is none of {', '.join(METRICS)}")
        if self.tokens is not None and self.tokens < 1:
            raise WrongInput(f"--tokens {self.tokens} is below 1")
        if self.batch_sequences < 1:
            raise WrongInput(f"--batch-sequences {self.batch_sequences} is below 1")
        if self.seed < 0:
            raise WrongInput(f"--seed {self.seed} is below 0")
        self.sparsities()

    def sparsities(self) -> list[Sparsity | None]:
        """One an SAE's row; None for what the SAE does by itself. Raises WrongInput where one is impossible."""
        from routesae.analyze.scores.sparsity import Sparsity

        by_k = [Sparsity(k=k) for k in dict.fromkeys(self.infer_k)]
        return [*by_k, *(Sparsity(theta=theta) for theta in dict.fromkeys(self.theta))] or [None]
