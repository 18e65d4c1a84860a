"""What `routesae clamp` was asked for."""

from dataclasses import replace

from routesae.machine.settings import MODEL, ONE_SAE, OUT, RUN, SEED, LMSettings, setting
from routesae.reporting import WrongInput

CHANGES, PROMPTS, GENERATION = "Changes to latents", "Prompts", "Generation"


class ClampSettings(LMSettings):
    """Settings of one clamping. Raises WrongInput where a value is impossible."""

    sae: str | None = ONE_SAE
    out: str = OUT
    add: tuple[str, ...] = setting((), CHANGES, "Add VALUE to the latent at every token.", metavar="LATENT=VALUE")
    multiply: tuple[str, ...] = setting(
        (), CHANGES, "Multiply the latent by VALUE where it is active.", metavar="LATENT=VALUE"
    )
    set: tuple[str, ...] = setting((), CHANGES, "Make the latent VALUE at every token.", metavar="LATENT=VALUE")
    ablate: tuple[str, ...] = setting((), CHANGES, "Make the latent 0.", metavar="LATENT")
    error_term: bool = setting(
        True,
        CHANGES,
        "Add back what the SAE fails to reconstruct, so that nothing else changes. The published code does not. It "
        "also replaces special tokens and a row's first position; of a routesae it clamps the prompt alone, takes "
        "the routes from all layers of the LM, and does not scale the SAE's input by the router.",
    )
    prompt: tuple[str, ...] = setting((), PROMPTS, "Text to go on from.")
    prompts: str | None = setting(
        None,
        PROMPTS,
        "A .txt with a prompt a line, or a .jsonl[.gz] of texts, messages or HH-RLHF pairs.",
        metavar="PATH",
    )
    text_field: str = setting("prompt", PROMPTS, "Field of the .jsonl that holds the text.", needs="prompts")
    hh: str = setting(
        "conversation",
        PROMPTS,
        "HH-RLHF pairs: a prompt a human turn, or both replies in one text.",
        choices=("conversation", "text"),
        needs="prompts",
    )
    max_prompts: int | None = setting(None, PROMPTS, "Use only the first N prompts.", ge=1, unset="all")
    chat: bool | None = setting(
        None, PROMPTS, "Fill in the tokenizer's chat template.", unset="where the tokenizer has one"
    )
    max_new_tokens: int = setting(64, GENERATION, "Longest text, in tokens.", ge=1)
    temperature: float | None = setting(
        None, GENERATION, "Temperature to draw tokens at.", gt=0, unset="the likeliest token each time"
    )
    seed: int = replace(SEED, needs="temperature")
    batch_sequences: int = setting(8, RUN, "Prompts in a forward pass of the LM.", ge=1)
    model: str | None = setting(None, MODEL, "Where the LM is now.", unset="where the SAE says")

    def check(self) -> None:
        if self.error_term and not (self.add or self.multiply or self.set or self.ablate):
            raise WrongInput("no latent to change; give --add, --multiply, --set or --ablate")
        if self.chat and self.hh == "text":
            raise WrongInput("--chat fills in messages, and --hh text makes one text of them; leave one of them out")
