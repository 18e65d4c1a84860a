"""What `routesae interpret` was asked for, and which chat model is asked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from routesae.reporting import WrongInput

MODES = ("detection", "fuzzing")
OPENAI = "https://api.openai.com/v1"
KEY, AZURE_KEY, AZURE_ENDPOINT = "OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT"


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Which model is asked, where, and how patiently. Raises WrongInput where a value is impossible."""

    model: str = "gpt-4o"
    """With Azure the name of the deployment."""
    base_url: str | None = None
    """None for OpenAI, or with Azure for $AZURE_OPENAI_ENDPOINT."""
    api_version: str | None = None
    """Azure's; None for every other server."""
    key_env: str | None = None
    """The environment variable that holds the key; None for the usual one."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout: float = 120.0
    """Seconds from a request's start to the end of its answer."""
    retries: int = 6
    """Tries after the first, where a server is busy, fails or stays silent."""
    temperature: float = 0.1
    max_output_tokens: int = 512

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("temperature", 0), ("max_output_tokens", 1)):
            if getattr(self, name) < least:
                raise WrongInput(f"--{name.replace('_', '-')} {getattr(self, name)} is below {least}")
        if not self.timeout > 0:
            raise WrongInput(f"--timeout {self.timeout} is not above 0 seconds")
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
        raise WrongInput(f"{name} is no address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise WrongInput(f"{name} may hold no user, password or ?query; a key goes into the environment, ${KEY}")


@dataclass(frozen=True, kw_only=True)
class InterpretSettings:
    """What `routesae interpret` was asked for. Raises WrongInput where a value is impossible."""

    chat: ChatSettings = field(default_factory=ChatSettings)
    saes: tuple[str, ...] = ()
    """SAE folders with contexts; none for every one under `out`."""
    out: str = "saes"
    latents: int | None = 100
    """How many, a seeded sample of those that contexts kept; None for all. A larger one later keeps the smaller."""
    examples: int = 64
    """Contexts shown of a latent, the strongest; 64 are all that the published rule keeps."""
    seed: int = 0
    prompt: str | None = None
    """A template file of the user's, with $examples in it."""
    scores: tuple[str, ...] = ()
    """Of MODES: how explanations are put to the test."""
    cache: str | None = None
    """Where the cache is now, for detection; None for where the contexts say it was."""
    device: str = "auto"
    max_cost: float | None = None
    """US dollars, over all SAEs and what was spent on them by earlier runs."""
    prices: str | None = None
    retry_unparsed: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("latents", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WrongInput(f"--{name} {value} is below 1")
        if unknown := [mode for mode in self.scores if mode not in MODES]:
            raise WrongInput(f"--score {unknown[0]!r} is none of {', '.join(MODES)}")
        if self.max_cost is not None and not (self.max_cost > 0 and math.isfinite(self.max_cost)):
            raise WrongInput(f"--max-cost {self.max_cost} is not above 0 US dollars")
