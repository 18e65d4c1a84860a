"""A prompt and a JSON schema in; what a chat model answered, and what that used, out.

OpenAI, Azure OpenAI, and any server that speaks their protocol (vLLM, Ollama, llama.cpp). The `openai` package
carries the requests. It is told not to retry: it would ask again where a quota is used up, gives up where Retry-After
is over two minutes, and cannot tell what each try may cost. The body of an answer is read here, since the package
checks nothing of it.

A key comes from the environment, goes into the request, and nowhere else: what a server says is searched for it.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from routesae.analyze.interpret.prices import NOTHING, Budget, Used
from routesae.analyze.interpret.settings import AZURE_KEY, KEY, OPENAI, ChatSettings
from routesae.reporting import FailedRun

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

log = logging.getLogger(__name__)

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 60.0  # of the backoff, where the server names no time
MAX_RETRY_AFTER_SECONDS = 600.0  # a server that asks for more has closed for the day: stop, go on later
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached")
RETRIED = (408, 409, 425, 429)  # and all from 500 on
OVERHEAD_TOKENS = 64  # what a chat template adds around one message, at most
MAX_COMPLAINT = 300  # characters of a server's error that are shown

Limit = Literal["max_completion_tokens", "max_tokens"]


class Answer(NamedTuple):
    """What one prompt got, in the end.

    text: what the model wrote, or the body of an answer that is none; None where no answer came.
    problem: why the text cannot be used, or why there is none; None where the model ended in order.
    input_tokens, output_tokens: as the server counted them; 0 where it did not.
    lost_input_tokens, lost_output_tokens: at most so many more may be charged: for tries that ended in silence and
        for answers that came without a count.
    """

    text: str | None
    problem: str | None
    input_tokens: int = 0
    output_tokens: int = 0
    lost_input_tokens: int = 0
    lost_output_tokens: int = 0
    tries: int = 1
    model: str | None = None
    structured: bool = True


class Dialect(NamedTuple):
    """What of the protocol the server takes; begins with all of it."""

    limit: Limit
    structured: bool = True
    temperature: bool = True

    def request(self, settings: ChatSettings, prompt: str, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request."""
        body: dict[str, Any] = {"model": settings.model, "messages": [{"role": "user", "content": prompt}]}
        body[self.limit] = settings.max_output_tokens
        if self.temperature:
            body["temperature"] = settings.temperature
        if self.structured:
            form = {"name": name, "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def without(self, param: str | None, complaint: str) -> Dialect | None:
        """The dialect that leaves out what a server refused by name; None where it named nothing of this one."""
        named = f"{param} {complaint}".lower()
        if self.structured and any(word in named for word in ("response_format", "json_schema", "structured output")):
            return self._replace(structured=False)
        if self.temperature and "temperature" in named:
            return self._replace(temperature=False)
        if self.limit in named:
            other: Limit = "max_tokens" if self.limit == "max_completion_tokens" else "max_completion_tokens"
            return self._replace(limit=other)
        return None


class Refused(Exception):
    """The server will not answer this one prompt, and would not the next time."""


class Busy(Exception):
    """This try got no answer; another may. after: seconds the server asked to wait. silent: it may be charged."""

    def __init__(self, reason: str, *, after: float | None = None, silent: bool = False):
        super().__init__(reason)
        self.after, self.silent = after, silent


class Chat:
    """Asks one model. Not more at once than the callers are; all of them wait where the server says so."""

    def __init__(self, settings: ChatSettings, client: AsyncOpenAI, key: str | None, budget: Budget):
        self.settings, self.client, self.key, self.budget = settings, client, key, budget
        self.stopping = asyncio.Event()
        self.not_before = 0.0  # time.monotonic() before which the server wants no request
        is_openai = settings.endpoint() == OPENAI
        # Ollama and older servers know only max_tokens, OpenAI's reasoning models only the other.
        self.dialect = Dialect(limit="max_completion_tokens" if is_openai else "max_tokens")
        self.refused: set[Dialect] = set()

    async def ask(self, prompt: str, name: str, schema: Mapping[str, Any]) -> Answer | None:
        """The answer to `prompt`, asked for in JSON of `schema`, called `name`; None where the run stops before it.

        Raises FailedRun where no further request makes sense: a bad key, no quota, no such model.
        """
        most = self.most_tokens(prompt, schema)
        lost = tries = 0
        problem, wait_until = "", 0.0
        while tries <= self.settings.retries:
            if await self._stopped_before(wait_until) or not await self.budget.reserve(most):
                return None
            tries += 1
            used = most  # unless it is known to be less: a request cut off may be charged
            try:
                answer = await self._try(prompt, name, schema)
                if answer.input_tokens or answer.output_tokens:
                    used = Used(answer.input_tokens, answer.output_tokens)
                else:
                    lost += 1  # it was answered, so it is charged, but nobody says for how much
                return _with_losses(answer, most, lost, tries)
            except Refused as refusal:
                used = NOTHING
                return _with_losses(Answer(None, str(refusal)), most, lost, tries)
            except FailedRun:
                used = NOTHING
                raise
            except Busy as busy:
                if not busy.silent:
                    used = NOTHING
                lost += busy.silent
                problem, wait_until = str(busy), self._wait_until(busy, tries)
            finally:
                await self.budget.settle(most, used)
            if self.stopping.is_set():
                return None
        return _with_losses(Answer(None, f"{problem}, at the last of {tries} tries"), most, lost, tries)

    def most_tokens(self, prompt: str, schema: Mapping[str, Any]) -> Used:
        """Tokens in and out that one request cannot exceed: no tokenizer makes more tokens than there are bytes."""
        written = len(prompt.encode()) + len(json.dumps(schema))
        return Used(written + OVERHEAD_TOKENS, self.settings.max_output_tokens)

    def _wait_until(self, busy: Busy, tries: int) -> float:
        """time.monotonic() of this prompt's next try; what the server asks for holds for every prompt."""
        if busy.after is None:
            delay = min(FIRST_DELAY_SECONDS * 2.0 ** (tries - 1), MAX_DELAY_SECONDS) * random.uniform(0.75, 1.0)
            return time.monotonic() + delay
        if busy.after > MAX_RETRY_AFTER_SECONDS:
            raise FailedRun(f"{busy}; it asks to wait {busy.after:,.0f} s: the same command goes on then")
        self.not_before = max(self.not_before, time.monotonic() + busy.after)
        return self.not_before

    async def _stopped_before(self, wait_until: float) -> bool:
        while (seconds := max(wait_until, self.not_before) - time.monotonic()) > 0 and not self.stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        return self.stopping.is_set()

    async def _try(self, prompt: str, name: str, schema: Mapping[str, Any]) -> Answer:
        """One answer, in the dialect that the server takes."""
        import openai

        while True:
            spoken = self.dialect
            body = spoken.request(self.settings, prompt, name, schema)
            try:
                async with asyncio.timeout(self.settings.timeout):  # the package's own starts anew with every byte
                    raw = await self.client.chat.completions.with_raw_response.create(**body)
            except TimeoutError:
                raise Busy(f"no answer within --timeout {self.settings.timeout:g} s", silent=True) from None
            except openai.APIStatusError as error:
                if error.status_code not in (400, 422) or not self._another_dialect(spoken, error):
                    raise self._failure(error) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                reason = f"the connection to {self.settings.endpoint()} failed ({self._clean(str(cause))})"
                connected = "Connect" not in type(cause).__name__
                raise Busy(reason, silent=connected) from None
            else:
                return read_answer(self._clean(raw.text), structured=spoken.structured)

    def _another_dialect(self, spoken: Dialect, error: APIStatusError) -> bool:
        """Whether there is another way to say it; then that is the one for everybody from here on."""
        if self.dialect != spoken:
            return True  # another request found out meanwhile
        other = spoken.without(error.param, error.message)
        if other is None or other in self.refused:
            return False
        self.refused.add(spoken)
        self.dialect = other
        for field, before, now in zip(Dialect._fields, spoken, other, strict=True):
            if before != now:
                told = "is asked for in the prompt alone" if field == "structured" else "is left out or renamed"
                what = {"structured": "the JSON schema of the answer", "limit": spoken.limit}.get(field, field)
                log.warning("%s refuses %s, which %s from here on", self.settings.endpoint(), what, told)
        return True

    def _failure(self, error: APIStatusError) -> Exception:
        """What a refusal by the server means for this try, this prompt or the whole run."""
        status, where = error.status_code, self.settings.endpoint()
        complaint = self._clean(" ".join(error.message.split()))[:MAX_COMPLAINT]
        said = f"{where} answered {status}: {complaint}"
        if status in (401, 403):
            name = self.settings.key_env or (KEY if self.settings.api_version is None else AZURE_KEY)
            return FailedRun(f"{said}; check the API key in ${name}. What was answered is kept")
        if status == 402 or error.code in QUOTA_CODES or error.type in QUOTA_CODES:
            return FailedRun(f"{said}; the quota is used up. The same command goes on when there is more")
        if status == 404:
            return FailedRun(f"{said}; check --model {self.settings.model} and --base-url")
        if status in RETRIED or status >= 500:
            return Busy(said, after=retry_after(error.response.headers))
        return Refused(said)

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "[the API key]") if self.key else text


def _with_losses(answer: Answer, most: Used, lost: int, tries: int) -> Answer:
    return answer._replace(lost_input_tokens=lost * most.input, lost_output_tokens=lost * most.output, tries=tries)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait, by Retry-After (seconds or a date) or retry-after-ms; None where by neither."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        if (value := headers.get(name)) is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if seconds == seconds:  # not a number says nothing
            return max(0.0, seconds)
    return None


def read_answer(body: str, *, structured: bool) -> Answer:
    """The answer in the body of a response with status 200, which may be anything at all."""
    try:
        completion = json.loads(body)
        choices = completion["choices"]
        usage = completion.get("usage")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Answer(body, "the body is no chat completion", structured=structured)
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (n if type(n) is int and n >= 0 else 0 for n in counts)
    model = completion.get("model")
    answer = Answer(
        body,
        None,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        model=model if isinstance(model, str) else None,
        structured=structured,
    )
    try:
        message, finish = choices[0]["message"], choices[0].get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        return answer._replace(problem="the answer holds no choice")
    if isinstance(refusal, str) and refusal:
        return answer._replace(text=refusal, problem="the model refused")
    if finish == "content_filter":
        return answer._replace(text=content if isinstance(content, str) else body, problem="a content filter cut it")
    if not isinstance(content, str) or not content.strip():
        spent = "; all of --max-output-tokens was spent" if finish == "length" else ""
        return answer._replace(problem=f"the answer is empty{spent}")
    if finish == "length":
        return answer._replace(text=content, problem="it was cut short; raise --max-output-tokens")
    return answer._replace(text=content)


@asynccontextmanager
async def open_chat(settings: ChatSettings, budget: Budget) -> AsyncIterator[Chat]:
    """A Chat with its connections. Raises WrongInput where key or address are missing."""
    import openai

    key, endpoint = settings.key(), settings.endpoint()
    # A server of one's own gets a key all the same: the package sends none without one, and refuses to start.
    common: dict[str, Any] = {"api_key": key or "none", "max_retries": 0, "timeout": settings.timeout}
    if settings.api_version is None:
        client = openai.AsyncOpenAI(base_url=endpoint, **common)
    else:
        client = openai.AsyncAzureOpenAI(azure_endpoint=endpoint, api_version=settings.api_version, **common)
    async with client:
        yield Chat(settings, client, key, budget)
