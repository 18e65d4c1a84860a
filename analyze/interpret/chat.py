"""Ask a chat model: OpenAI, Azure OpenAI, or any server that speaks their protocol (vLLM, Ollama, llama.cpp).

The `openai` client carries the requests, waits and tries again. It decides by status and headers, but servers also
say in the body that a try failed or how long to wait. So what a body says is put where the client looks.

A key comes from the environment, goes into the request, and nowhere else: what a server says is searched for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import getproxies

from pydantic import AliasPath, BaseModel, Field

from routesae.analyze.interpret.prices import Budget, Used
from routesae.analyze.interpret.settings import AZURE_KEY, KEY, OPENAI, InterpretSettings
from routesae.reporting import FailedRun, WrongInput

if TYPE_CHECKING:
    from openai import APIConnectionError, APIStatusError, AsyncOpenAI

log = logging.getLogger(__name__)

OVERHEAD_TOKENS = 64  # what a chat template adds around one message, at most
MAX_COMPLAINT = 300  # characters of a server's error that are shown
MAX_WAIT_SECONDS = 120  # that the client waits; a server that asks for more has closed for the day
REQUEST_REFUSED = (400, 413, 422, 500)  # a server may fail at a schema, or at a long prompt, with 500
CUT_SHORT = "all of --max-output-tokens was used before the answer ended; raise it"
QUOTA = re.compile("insufficient_quota|billing_hard_limit_reached")
REQUEST_TOO_LARGE = re.compile("request too large", re.IGNORECASE)
TOO_LONG = re.compile(
    r"context.?(length|size|window)|too many tokens|request too large"
    r"|(prompt|input|message|token)\w*\b[^.]*\b(too (long|large)|exceeds?|(longer|greater) than|must be <=)",
    re.IGNORECASE,
)
MODERATED = re.compile(
    r"moderat|flagged|content.?(policy|filter|management|exists risk)|inappropriate|prohibited|safety", re.IGNORECASE
)
WAIT = re.compile(r"(?:retry|try again|wait)\D{0,40}?((?:\d+(?:\.\d+)?\s*[a-z]*\s*)+)", re.IGNORECASE)
WAIT_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|milli|m|h)?", re.IGNORECASE)
SECONDS = {"ms": 1e-3, "milli": 1e-3, "": 1.0, "m": 60.0, "h": 3600.0}


class Answer(NamedTuple):
    """What one question got, in the end.

    text: what the model, or a server that moderates, wrote; None if no answer came. problem: why the text cannot be
    used, or why there is none. input_tokens, output_tokens: as the server counted them, or the most they can be if it
    did not. structured: whether JSON of a schema was asked for. halved: how often the examples in the prompt were
    halved until the server took it.
    """

    text: str | None
    problem: str | None
    input_tokens: int = 0
    output_tokens: int = 0
    model: str | None = None
    structured: bool = True
    halved: int = 0


class Stopping(Exception):
    """The run is about to stop, so nothing more is asked."""


class Chat:
    """Asks one model.

    under_way: tasks that must not be cancelled, since their request may be paid for. A task is in it from its request
    on; it leaves when the server has said no, or when the task has put the answer away and takes itself out.
    """

    def __init__(self, settings: InterpretSettings, key: str | None, budget: Budget):
        self.settings, self.budget = settings, budget
        self.client: AsyncOpenAI
        self.stopping = self.has_answered = False
        self.under_way: set[asyncio.Task[Any] | None] = set()
        self.left_out: frozenset[str] = frozenset()  # parameters that the server refuses
        # Ollama and older servers know only max_tokens, OpenAI's reasoning models only the other.
        self.limits = ("max_tokens", "max_completion_tokens")
        if settings.endpoint() == OPENAI:
            self.limits = ("max_completion_tokens", "max_tokens")
        self.key = _pattern_of(key or "")

    async def ask(self, prompts: Iterator[str], form: Mapping[str, Any]) -> Answer | None:
        """The answer to the first of `prompts` that is not too long for the server, without what it refuses.

        form: JSON schema of the answer, with a title. Returns None if the run stops before there is an answer. Raises
        FailedRun if no further request makes sense: a bad key, no quota, no such model.
        """
        import openai

        prompt, halved, left_out = next(prompts), 0, self.left_out
        schema = {"name": form["title"].lower(), "strict": True, "schema": form}
        while True:
            written = len(prompt.encode()) + len(json.dumps(form))  # no tokenizer makes more tokens than bytes
            most, used = Used(written + OVERHEAD_TOKENS, self.settings.max_output_tokens), Used()
            if self.stopping or not await self.budget.reserve(most):
                return None
            body: dict[str, Any] = {
                "model": self.settings.model,
                "messages": [{"role": "user", "content": prompt}],
                self.limits[self.limits[0] in left_out]: self.settings.max_output_tokens,
                "temperature": self.settings.temperature,
                "response_format": {"type": "json_schema", "json_schema": schema},
            }
            body = {name: value for name, value in body.items() if name not in left_out}
            try:
                raw = await self.client.chat.completions.with_raw_response.create(**body)
                answer = read_answer(raw.text, most)
                assert answer is not None  # after_response has seen to it
                used = Used(answer.input_tokens, answer.output_tokens)
                break
            except Stopping:
                return None
            except openai.APIStatusError as error:
                said, is_refused = error.response.text, error.status_code in REQUEST_REFUSED
                # What the server may take the request without: the parameter it names, or else the schema.
                named = [name for name in ("temperature", self.limits[0]) if name in said] + ["response_format"]
                left = [name for name in named if name not in left_out]
                if is_refused and TOO_LONG.search(said) and (shorter := next(prompts, "")):
                    prompt, halved = shorter, halved + 1
                elif is_refused and left and not TOO_LONG.search(said) and not MODERATED.search(said):
                    left_out |= {left[0]}
                else:
                    return None if self.stopping else self._refused(error)
            except openai.APIConnectionError as error:
                if not re.search("Connect|Proxy|SSL", type(error.__cause__).__name__):
                    used = most  # a request that got no answer may be charged
                return None if self.stopping else self._unconnected(error)
            finally:
                self.budget.settle(most, used)
        for name in left_out - self.left_out:
            instead = f"gets {self.limits[1]}" if name == self.limits[0] else "goes without it"
            log.warning("%s refuses %s and %s from here on", self.settings.endpoint(), name, instead)
        self.left_out |= left_out
        self.has_answered = True
        return answer._replace(structured="response_format" not in left_out, halved=halved)

    async def before_request(self, request: Any) -> None:
        """Hook of the HTTP client before each try."""
        if self.stopping:
            raise Stopping
        self.under_way.add(asyncio.current_task())

    async def after_response(self, response: Any) -> None:
        """Hook of the HTTP client: read the body, and put what it says of the try where the client looks."""
        import openai

        try:
            async with asyncio.timeout(2 * self.settings.timeout):  # the client's own starts anew with every byte
                await response.aread()
        except TimeoutError:
            raise openai.APITimeoutError(response.request) from None
        response.encoding = "utf-8"  # whatever its headers say
        body = response.text
        too_long = {429: REQUEST_TOO_LARGE, 500: TOO_LONG}.get(response.status_code)
        if response.is_success and read_answer(body, Used()) is None:
            response.status_code = 503  # ask again
        elif too_long is not None and too_long.search(body):
            response.status_code = 413  # no wait helps
        if response.is_success:
            return
        self.under_way.discard(asyncio.current_task())
        if self.stopping or QUOTA.search(body):
            response.headers["x-should-retry"] = "false"
        elif not {"retry-after", "retry-after-ms"} & set(response.headers) and (wait := seconds_to_wait(body)):
            response.headers["retry-after"] = str(wait)

    def _refused(self, error: APIStatusError) -> Answer:
        """What the last refusal means for this question. Raises FailedRun if it is about the whole run."""
        status, body = error.status_code, error.response.text
        said = f"{self.settings.endpoint()} answered {status}: {self.clean(complaint_of(body))[:MAX_COMPLAINT]}"
        if status in (*REQUEST_REFUSED, 403) and MODERATED.search(body):
            return Answer(body, f"the server's moderation refused the prompt: {said}")
        if status == 401 or (status == 403 and not self.has_answered):
            name = self.settings.key_env or (KEY if self.settings.api_version is None else AZURE_KEY)
            raise FailedRun(f"{said}; check the API key in ${name}; what was answered is kept")
        if status == 402 or QUOTA.search(body):
            raise FailedRun(f"{said}; the quota is used up; the same command continues when there is more")
        if status == 404:
            raise FailedRun(f"{said}; check --model {self.settings.model} and --base-url")
        seconds = error.response.headers.get("retry-after", "").partition(".")[0]
        if seconds.isdecimal() and int(seconds) > MAX_WAIT_SECONDS:
            raise FailedRun(f"{said}; it asks to wait {int(seconds):,} s; the same command continues then")
        if status in REQUEST_REFUSED and TOO_LONG.search(body):
            return Answer(None, f"{said}; the prompt is too long for the model even with few examples")
        return Answer(None, said)

    def _unconnected(self, error: APIConnectionError) -> Answer:
        """Why there was no response. Raises FailedRun if that will not change: a certificate, a proxy's refusal."""
        import openai

        cause: BaseException = error.__cause__ or error
        if isinstance(error, openai.APITimeoutError) and "Connect" not in type(cause).__name__:
            return Answer(None, f"no answer within --timeout {self.settings.timeout:g} s")
        proxy = " through the proxy in the environment" if getproxies() else ""
        reason = self.clean(str(cause)) or type(cause).__name__
        said = f"the connection to {self.settings.endpoint()}{proxy} failed ({reason})"
        if "CERTIFICATE_VERIFY_FAILED" in said or "Proxy" in type(cause).__name__:
            raise FailedRun(f"{said}; check $SSL_CERT_FILE, $HTTPS_PROXY, $HTTP_PROXY and $NO_PROXY")
        return Answer(None, said)

    def clean(self, text: str) -> str:
        """The text without the key in any escaping, and without halves of surrogate pairs, which UTF-8 lacks."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.key.sub("[the API key]", whole) if self.key else whole


def _pattern_of(key: str) -> re.Pattern[str] | None:
    r"""What matches the key in any escaping: each character as it is, or as \u0073, \x73, %73 or &#115;.

    None for what local servers take as a key: a word such as "none" or "EMPTY", which answers may contain.
    """
    is_mixed = any(map(str.isdigit, key)) and any(map(str.isalpha, key))
    if len(key) < 8 or (len(key) < 16 and not is_mixed):
        return None
    codes = [(re.escape(character), ord(character)) for character in key]
    return re.compile("".join(rf"\\*(?:{c}|(?i:(?:u00|x|%){n:02x}|&#(?:{n}|x{n:02x});))" for c, n in codes))


@asynccontextmanager
async def open_chat(settings: InterpretSettings, budget: Budget) -> AsyncIterator[Chat]:
    """A Chat with its connections. Raises WrongInput if key, address, proxy or certificate cannot be used."""
    import openai

    key, endpoint = settings.key(), settings.endpoint()
    chat = Chat(settings, key, budget)
    try:
        hooks: dict[str, list[Any]] = {"request": [chat.before_request], "response": [chat.after_response]}
        common: dict[str, Any] = {
            "api_key": key or "none",  # the client does not start without one
            "max_retries": settings.retries,
            "timeout": settings.timeout,
            "http_client": openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        }
        if settings.api_version is None:
            chat.client = openai.AsyncOpenAI(base_url=endpoint, **common)
        else:
            chat.client = openai.AsyncAzureOpenAI(azure_endpoint=endpoint, api_version=settings.api_version, **common)
    except Exception as error:  # what the environment can do wrong has no common class
        raise WrongInput(
            f"no connection can be set up: {chat.clean(str(error))}; check HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
        ) from error
    async with chat.client:
        yield chat


# ------------------------------------------------------------------------------------ what a server sends


class _Completion(BaseModel):
    message: dict[str, Any] = Field(validation_alias=AliasPath("choices", 0, "message"))
    finish: Any = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))
    input_tokens: Any = Field(None, validation_alias=AliasPath("usage", "prompt_tokens"))
    output_tokens: Any = Field(None, validation_alias=AliasPath("usage", "completion_tokens"))
    model: Any = None


def read_answer(body: str, most: Used) -> Answer | None:
    """The answer in a response's body, or None if its first choice holds nothing and cost nothing.

    most: what was used at most, if the server does not count.
    """
    try:
        completion = _Completion.model_validate(json.loads(body))
    except (ValueError, RecursionError):
        return None
    message = completion.message
    content, refusal = _text_of(message.get("content")), _text_of(message.get("refusal"))
    reasoning = _text_of(message.get("reasoning_content")) or _text_of(message.get("reasoning"))
    text = refusal or (content if "{" in content else reasoning or content)
    counts = [n if type(n) is int and n >= 0 else None for n in (completion.input_tokens, completion.output_tokens)]
    problems = {"content_filter": "a content filter cut it", "length": CUT_SHORT}
    problem = "the model refused" if refusal else problems.get(str(completion.finish))
    if completion.finish == "error" or not (text.strip() or problem or counts[1]):
        return None
    used = [most[i] if count is None else count for i, count in enumerate(counts)]
    problem = problem or (None if text.strip() else "the answer is empty")
    return Answer(text, problem, used[0], used[1], completion.model if isinstance(completion.model, str) else None)


def _text_of(content: Any) -> str:
    """A message's content is a string, or a list of parts of which some hold text."""
    if isinstance(content, list):
        return "".join(map(_text_of, content))
    text = content.get("text") if isinstance(content, dict) else content
    return text if isinstance(text, str) else ""


def complaint_of(body: str) -> str:
    """What a server says went wrong, on one line: the message of its error, or the body if that has none."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = body
    said = said[0] if isinstance(said, list) and said else said
    error = said.get("error", said) if isinstance(said, dict) else said
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join((message if isinstance(message, str) else body).split())


def seconds_to_wait(body: str) -> float:
    """The time that an error's text or details ask to wait, as in "try again in 1m2.5s"; 0 if they ask for none."""
    if (wait := WAIT.search(body)) is None:
        return 0.0
    unit = 1e-3 if re.search(r"retry.?after.?ms", wait[0], re.IGNORECASE) else 1.0
    return unit * sum(float(number) * SECONDS[part.lower()] for number, part in WAIT_PART.findall(wait[1]))
