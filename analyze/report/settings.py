"""What `routesae report` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from routesae.reporting import WrongInput


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What `routesae report` was asked for. Raises WrongInput where a value is impossible."""

    saes: tuple[str, ...] = ()
    """SAE folders or hub references; none for every SAE under `out`."""
    out: str = "saes"
    html: str = "report.html"
    """The file to write."""
    scores: str | None = None
    """A file of analyze --json, for the metrics that need the LM."""
    cache: str | None = None
    """For routing by token class and to check the LM; None for where contexts found it, if it is still there."""
    model: str | None = None
    """The LM, for what latents do to the logits; None: not shown."""
    contexts: int = 8
    """Of a latent, the strongest; of each third of its sample a quarter as many."""
    device: str = "auto"
    lm_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.contexts < 1:
            raise WrongInput(f"--contexts {self.contexts} is below 1")
        if not Path(self.html).absolute().parent.is_dir():
            raise WrongInput(f"--html {self.html}: there is no folder {Path(self.html).parent} to write it to")
        if Path(self.html).is_dir():
            raise WrongInput(f"--html {self.html} is a folder; name a file in it")
