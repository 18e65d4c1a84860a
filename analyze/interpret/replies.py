"""Read what a chat server sends: a chat completion, or an error in one of the many shapes that servers give it."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from pydantic import AliasPath, BaseModel, Field

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
