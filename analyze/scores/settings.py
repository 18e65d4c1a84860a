"""What `routesae analyze` was asked for."""

from routesae.analyze.scores.metrics import CACHE_METRICS, LM_METRICS, METRICS
from routesae.machine.settings import CACHE, MODEL, OUT, ROWS, RUN, SAES, SEED, LMSettings, setting
from routesae.reporting import WrongInput

SCORING = "What is scored"


class AnalyzeSettings(LMSettings):
    """Settings of one scoring. Raises WrongInput where a value is impossible."""

    metrics: tuple[str, ...] = setting(
        CACHE_METRICS,
        SCORING,
        f"Metric, of which {', '.join(LM_METRICS)} need the LM.",
        choices=METRICS,
        flag="metric",
        metavar="NAME",
    )
    saes: tuple[str, ...] = SAES
    out: str = OUT
    cache: str = CACHE
    rows: str | None = setting(
        None,
        SCORING,
        "Rows of the cache to score on.",
        choices=ROWS,
        unset="all, if every SAE was trained on another corpus; else held-out",
    )
    tokens: int | None = setting(None, SCORING, "Tokens to score on, the first of those rows.", ge=1, unset="all")
    label: str | None = setting(
        None,
        SCORING,
        "Field of the documents that Probe tells. Probe and Absorption read all rows unless --rows is given.",
        metavar="FIELD",
        unset="the only one that harvest kept",
    )
    all_positions: bool = setting(
        False, SCORING, "Splice at every position, as the published code does, not just at those training used."
    )
    batch_sequences: int = setting(8, RUN, "Rows in a forward pass of the LM.", ge=1)
    infer_k: tuple[int, ...] = setting(
        (),
        SCORING,
        "Score with this many active latents a token, a row of the table for each.",
        unset="as trained",
        metavar="N,N…",
        ge=1,
    )
    theta: tuple[float, ...] = setting(
        (),
        SCORING,
        "Score with the latents active above this, on the SAE's normalised input.",
        unset="as trained",
        metavar="X,X…",
        ge=0,
    )
    seed: int = SEED
    model: str | None = setting(None, MODEL, "Where the LM is now.", unset="where the cache says")

    def check(self) -> None:
        if self.label is not None and "Probe" not in self.metrics:
            raise WrongInput(f"--label {self.label} is for Probe; add --metric Probe or leave it out")
        if self.all_positions and not set(LM_METRICS) & set(self.metrics):
            which = ", ".join(LM_METRICS)
            raise WrongInput(f"--all-positions is for {which}; add one of them as --metric or leave it out")
