"""The answers a chat model is asked for, as pydantic models, and how they are found in the text it wrote.

A model may think aloud, wrap its JSON in prose or fences, quote numbers or break the syntax a little. All of that is
read. What an answer means is never guessed: a missing or impossible value, or two different answers, raise Unparsed.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar, get_args

import json_repair
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError

from routesae.machine.files import problem_of

Category = Literal["low-level", "high-level", "undiscernible"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
MAX_OBJECTS = 200  # places where reading is tried; each takes a pass over the text
MAX_REPAIRED_BRACKETS = 16  # json_repair takes minutes for deep nesting, and no answer nests
OBJECT_START = re.compile(r'\{\s*"')
END_OF_REASONING = re.compile(r"</[\w:-]*(?:think|thought|reason)\w*>|\[/THINK\]|◁/think▷", re.IGNORECASE)


class Unparsed(ValueError):
    """The text is not the answer that was asked for; the message says why."""


def _hyphenated(value: Any) -> Any:
    return re.sub(r"[\s_]+", "-", value.strip().lower()) if isinstance(value, str) else value


def _whole_number(value: Any) -> Any:
    """4 for 4.0, "4" and "4.0"; anything else as it is, for pydantic to refuse."""
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        return value
    return int(number) if number.is_integer() else str(value)


def _truth(value: Any) -> Any:
    """True for "true"; numbers stay as they are and are refused, since they may be indices of the active texts."""
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text.strip()


class _Answer(BaseModel):
    # The schema forbids other keys than these; an answer that has some is taken all the same.
    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})


class Explanation(_Answer):
    """What a model makes of a latent. score: 5 for a clear pattern, 1 for none."""

    category: Annotated[Category, BeforeValidator(_hyphenated)]
    score: Annotated[Literal[1, 2, 3, 4, 5], BeforeValidator(_whole_number)]
    explanation: Annotated[str, AfterValidator(_not_empty)]


class Predictions(_Answer):
    """For each numbered text, whether the latent is active in it."""

    predictions: list[Annotated[StrictBool, BeforeValidator(_truth)]]


Form = TypeVar("Form", bound=_Answer)


def parse(form: type[Form], text: str, count: int | None = None) -> Form:
    """The only answer of this form in `text`: behind the reasoning if there is one, else anywhere.

    count: how many predictions there must be. Raises Unparsed if there is no such answer, or more than one.
    """
    problem = "there is no JSON object"
    tail = END_OF_REASONING.split(text)[-1]
    for values in (_objects(tail), _repaired(tail), _objects(text)):
        answers: list[Form] = []
        for value in values:
            try:  # half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark
                answer = form.model_validate_json(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
            except ValidationError as error:
                problem = problem_of(error)
            else:
                answers += [answer] if answer not in answers else []
        if len(answers) > 1:
            raise Unparsed(f"there are {len(answers)} different answers")
        if answers and isinstance(answers[0], Predictions) and len(answers[0].predictions) != count:
            raise Unparsed(f"{len(answers[0].predictions)} predictions for {count} examples")
        if answers:
            return answers[0]
    raise Unparsed(problem)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every whole JSON object in `text`, and those inside lists and objects."""
    decoder, end = json.JSONDecoder(object_pairs_hook=_without_repeats), 0
    for start in islice(OBJECT_START.finditer(text), MAX_OBJECTS):
        if start.start() >= end:
            try:
                value, end = decoder.raw_decode(text, start.start())
            except json.JSONDecodeError:
                continue
            except RecursionError:
                raise Unparsed("the JSON is nested too deeply") from None
            yield from _within(value)


def _repaired(text: str) -> Iterator[dict[str, Any]]:
    """Objects in the braces of `text`, mended: single quotes, bare words, commas too many, quotes within quotes."""
    braced = text[text.find("{") : text.rfind("}") + 1]
    if 0 < braced.count("{") + braced.count("[") <= MAX_REPAIRED_BRACKETS:
        yield from _within(json_repair.loads(braced))


def _within(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _within(inner)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Unparsed("a key stands in the JSON twice")
    return dict(pairs)
