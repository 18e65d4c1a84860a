"""What `routesae report` was asked for."""

from routesae.machine.settings import MODEL, OUT, RUN, SAES, LMSettings, require_writable, setting
from routesae.reporting import WrongInput

PAGE = "The page"


class ReportSettings(LMSettings):
    """Settings of one page. Raises WrongInput where a value is impossible."""

    saes: tuple[str, ...] = SAES
    out: str = OUT
    html: str = setting("report.html", RUN, "File to write.", metavar="PATH")
    scores: str | None = setting(
        None, PAGE, "File of analyze --json, for the metrics that need the LM.", metavar="PATH"
    )
    cache: str | None = setting(
        None, MODEL, "Shows contexts of this corpus.", metavar="PATH", unset="the only ones there are"
    )
    model: str | None = setting(
        None,
        MODEL,
        "Hub id, folder, .gguf or demo: shows what latents do to the logits.",
        unset="the SAEs' own, where that needs no download",
    )
    logits: bool = setting(True, PAGE, "Show what latents do to the logits; loads the LM.")
    contexts: int = setting(
        12, PAGE, "Strongest contexts shown of a latent; of each third of its sample a quarter.", ge=1
    )
    serve: bool = setting(False, RUN, "Then serve the page on this machine, with a box for one's own text.")
    port: int = setting(8760, RUN, "Port of --serve; 0 is any that is free.", ge=0, lt=2**16, needs="serve")

    def check(self) -> None:
        require_writable("--html", self.html)
        if self.model is not None and not (self.logits or self.serve):
            raise WrongInput(f"--model {self.model} is for what --no-logits leaves out; leave one of them out")
