"""What `routesae contexts` was asked for."""

from routesae.machine.settings import CACHE, DEVICE, MODEL, OUT, ROWS, RUN, SAES, SEED, Settings, setting

RULE, SHOWN = "Which latents are kept", "What is shown of a latent"
CHOICES = ("rule", "top")


class ContextSettings(Settings):
    """Settings of one collection of contexts. Raises WrongInput where a value is impossible."""

    cache: str = CACHE
    saes: tuple[str, ...] = SAES
    out: str = OUT
    rows: str = setting("all", MODEL, "Rows to read: all, those trained on too, or what analyze reads.", choices=ROWS)
    threshold: float = setting(15.0, RULE, "Count activations above this, on the SAE's normalised input.", ge=0)
    per_class: int = setting(2, RULE, "Contexts, at most, of tokens alike but for case and blanks.", ge=1)
    max_classes: int = setting(32, RULE, "Leave out latents of more token classes than this.", ge=1)
    min_contexts: int = setting(5, RULE, "Leave out latents of fewer contexts than this.", ge=1)
    choose: str = setting(
        "rule", RULE, "What contexts.json and interpret get: the rule's choice, or all of --top.", choices=CHOICES
    )
    window: int = setting(64, SHOWN, "Tokens in a context, at most; it ends where its sentence does.", ge=1)
    top: int = setting(12, SHOWN, "Strongest contexts of every latent.", ge=1)
    samples: int = setting(
        5, SHOWN, "Further contexts of each third (strong, middle, weak) of a random sample.", ge=1
    )
    group_by: str | None = setting(
        None,
        SHOWN,
        "Field of the documents: list the latents on in those of one value and not in others.",
        metavar="FIELD",
        unset="no groups",
    )
    seed: int = SEED
    overwrite: bool = setting(False, RUN, "Replace contexts of another rule or another SAE.")
    batch_tokens: int = setting(4096, RUN, "Tokens the SAE reads at a time.", ge=1)
    model: str | None = setting(None, MODEL, "Where the tokenizer is now.", unset="where the cache says")
    device: str = DEVICE
