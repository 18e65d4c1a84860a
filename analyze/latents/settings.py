"""What `routesae latents` and `routesae compare` were asked for."""

from routesae.machine.settings import CACHE, DEVICE, MODEL, ONE_SAE, OUT, LMSettings, Settings, setting
from routesae.reporting import WrongInput

TEXT, MATCHING = "The text", "Which latents match"


class LatentsSettings(LMSettings):
    """Settings of one look at a text. Raises WrongInput where a value is impossible."""

    sae: str | None = ONE_SAE
    out: str = OUT
    text: str | None = setting(None, TEXT, "The text itself.")
    file: str | None = setting(None, TEXT, "A file of text.", metavar="PATH")
    messages: str | None = setting(
        None, TEXT, 'A conversation, for the chat template: [{"role": "user", "content": "Hello"}].', metavar="JSON"
    )
    top: int = setting(5, TEXT, "Strongest latents of a token to list.", ge=1)
    model: str | None = setting(None, MODEL, "Where the LM is now.", unset="where the SAE says")

    def check(self) -> None:
        if sum(one is not None for one in (self.text, self.file, self.messages)) != 1:
            raise WrongInput("give the text by one of --text, --file and --messages")


class CompareSettings(Settings):
    """Settings of one comparison of two SAEs. Raises WrongInput where a value is impossible."""

    a: str = setting(..., MODEL, "SAE folder, or user/repo[/folder][@revision] on the hub.", positional=True)
    b: str = setting(..., MODEL, "The other one.", positional=True)
    cache: str = CACHE
    tokens: int = setting(20_000, MATCHING, "Tokens to correlate activations over, in whole rows.", ge=1)
    threshold: float = setting(
        0.7, MATCHING, "Cosine of decoder rows, or correlation, of latents that count as shared.", gt=0, le=1
    )
    device: str = DEVICE
