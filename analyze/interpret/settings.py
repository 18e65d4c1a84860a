"""What `routesae interpret` was asked for, and which chat model is asked."""

import os
from urllib.parse import urlsplit

from routesae.machine.settings import DEVICE, MODEL, OUT, RUN, SEED, Settings, setting
from routesae.reporting import WrongInput

MODES = ("detection", "fuzzing")
OPENAI = "https://api.openai.com/v1"
KEY, AZURE_KEY, AZURE_ENDPOINT = "OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT"
CHAT, QUESTIONS, COST = "The chat model", "The questions", "The cost"


class InterpretSettings(Settings):
    """Settings of one interpretation: which model is asked, where, how patiently, and about what.

    Raises WrongInput where a value is impossible.
    """

    model: str = setting("gpt-4o", CHAT, "Chat model; with Azure, the deployment.")
    base_url: str | None = setting(
        None,
        CHAT,
        "Address of a compatible server (vLLM, Ollama, llama.cpp), or Azure's endpoint.",
        metavar="URL",
        unset="OpenAI",
    )
    api_version: str | None = setting(None, CHAT, "Azure's API version; makes it Azure.", metavar="DATE")
    key_env: str | None = setting(
        None, CHAT, "Environment variable that holds the key.", metavar="NAME", unset=f"{KEY}, with Azure {AZURE_KEY}"
    )
    concurrency: int = setting(8, CHAT, "Requests under way at once.", ge=1)
    timeout: float = setting(120.0, CHAT, "Seconds for a request, answer included.", gt=0)
    retries: int = setting(6, CHAT, "Tries after the first, where a server is busy, fails or stays silent.", ge=0)
    temperature: float = setting(0.1, CHAT, "Temperature of the chat model.", ge=0)
    max_output_tokens: int = setting(
        512, CHAT, "Tokens in an answer, at most; reasoning models need thousands.", ge=1
    )
    saes: tuple[str, ...] = setting(
        (),
        MODEL,
        "SAE folder that contexts wrote into.",
        unset="all under --out with contexts",
        flag="sae",
        metavar="PATH",
    )
    out: str = OUT
    latents: int | None = setting(
        100,
        QUESTIONS,
        "Latents to ask about, a random sample of those that contexts kept; a larger one later keeps the smaller.",
        ge=1,
        metavar="N|all",
        none="all",
    )
    examples: int = setting(64, QUESTIONS, "Contexts shown of a latent, the strongest.", ge=1)
    seed: int = SEED
    prompt: str | None = setting(
        None, QUESTIONS, "Template of the question, with $examples in it.", metavar="PATH", unset="the paper's"
    )
    scores: tuple[str, ...] = setting(
        (),
        QUESTIONS,
        "Test explanations on texts held out from them: balanced accuracy.",
        choices=("detection", "fuzzing"),
        flag="score",
    )
    cache: str | None = setting(
        None, MODEL, "For detection: where the cache is now.", metavar="PATH", unset="where contexts found it"
    )
    device: str = DEVICE
    max_cost: float | None = setting(
        None, COST, "US dollars, with what earlier runs spent on these SAEs.", gt=0, unset="no limit"
    )
    prices: str | None = setting(None, COST, "TOML file of US dollars a million tokens, by model.", metavar="PATH")
    retry_unparsed: bool = setting(False, RUN, "Ask again where an answer was no answer to the question.")
    overwrite: bool = setting(False, RUN, "Begin anew; earlier answers are set aside under another name.")

    def check(self) -> None:
        if not self.model.strip():
            raise WrongInput("--model is empty; give the chat model's name")
        if self.base_url is not None:
            _require_address(self.base_url, "--base-url")

    def endpoint(self) -> str:
        """The address requests go to. Raises WrongInput where Azure's is not known."""
        if self.api_version is None:
            return (self.base_url or OPENAI).rstrip("/")
        address = self.base_url or os.environ.get(AZURE_ENDPOINT)
        if not address:
            raise WrongInput(f"--api-version means Azure: give its endpoint with --base-url or ${AZURE_ENDPOINT}")
        _require_address(address, AZURE_ENDPOINT)
        return address.rstrip("/")

    def key(self) -> str | None:
        """From the environment. None where a server of one's own may well want none."""
        name = self.key_env or (KEY if self.api_version is None else AZURE_KEY)
        key = os.environ.get(name, "").strip()
        if not key and (self.key_env or self.api_version or self.base_url is None):
            raise WrongInput(f"there is no API key in ${name}; set it, or give a server of your own with --base-url")
        if not key.isascii() or not key.isprintable():
            raise WrongInput(f"the API key in ${name} holds characters that no key has; set it again")
        return key or None


def _require_address(address: str, name: str) -> None:
    """An http address with nothing secret in it: it is written beside the answers."""
    try:
        parts = urlsplit(address)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_fine = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise WrongInput(f"{name} is not an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise WrongInput(f"{name} may hold no user, password or ?query; a key goes into the environment, ${KEY}")
