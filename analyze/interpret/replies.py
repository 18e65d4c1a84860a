"""Read what a chat server sends: a chat completion, or an error in one of the many shapes that servers give it."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from routesae.analyze.interpret.prices import Used

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
    used, or why there is none; None if the model ended in order. input_tokens, output_tokens: as the server counted
    them, or the most they can be if it did not. structured: whether JSON of a schema was asked for. halved: how often
    the examples in the prompt were halved until the server took it.
    """

    text: str | None
    problem: str | None
    input_tokens: int = 0
    output_tokens: int = 0
    model: str | None = None
    structured: bool = True
    halved: int = 0


class _Message(BaseModel):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: Any = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    model: Any = None
    usage: Any = None

    @property
    def text(self) -> str:
        """What the model wrote: its content, or its reasoning if only that may hold the answer."""
        message = self.choices[0].message
        content = _text_of(message.content)
        return content if "{" in content else _text_of(message.reasoning_content or message.reasoning) or content

    def tokens(self, name: str, otherwise: int) -> int:
        count = self.usage.get(name) if isinstance(self.usage, dict) else None
        return count if type(count) is int and count >= 0 else otherwise


def completion_of(body: str) -> _Completion | None:
    """The chat completion in a response's body. None if its first choice holds nothing and cost nothing."""
    try:
        completion = _Completion.model_validate(json.loads(body))
    except (ValueError, RecursionError):
        return None
    first = completion.choices[0]
    if first.finish_reason == "error":
        return None
    ended = first.finish_reason in ("length", "content_filter") or completion.tokens("completion_tokens", 0) > 0
    return completion if ended or completion.text.strip() or first.message.refusal else None


def status_to_act_on(status: int, body: str) -> int:
    """The status by which the client decides as the body says: 503 to ask again, 413 where no wait helps."""
    if 200 <= status < 300:
        return status if completion_of(body) is not None else 503
    too_long = {429: REQUEST_TOO_LARGE, 500: TOO_LONG}.get(status)
    return 413 if too_long is not None and too_long.search(body) else status


def read_answer(body: str, most: Used) -> Answer:
    """The answer in a body that `completion_of` takes. most: tokens at most, where the server does not count."""
    completion = completion_of(body)
    assert completion is not None
    first, text, problem = completion.choices[0], completion.text, None
    if isinstance(first.message.refusal, str) and first.message.refusal:
        text, problem = first.message.refusal, "the model refused"
    elif first.finish_reason == "content_filter":
        problem = "a content filter cut it"
    elif first.finish_reason == "length":
        problem = CUT_SHORT
    elif not text.strip():
        problem = "the answer is empty"
    return Answer(
        text,
        problem,
        completion.tokens("prompt_tokens", most.input),
        completion.tokens("completion_tokens", most.output),
        completion.model if isinstance(completion.model, str) else None,
    )


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
        said = None
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
