"""The text a model wrote in; an explanation or predictions out, or why it is neither. Nothing is guessed.

Each kind of answer has the JSON schema that a server is asked to keep to, and a parser that does not trust it to.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

CATEGORIES = ("low-level", "high-level", "undiscernible")
SCORES = (1, 2, 3, 4, 5)
FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)

EXPLANATION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "category": {"type": "string", "enum": list(CATEGORIES)},
        "score": {"type": "integer", "enum": list(SCORES)},
        "explanation": {"type": "string"},
    },
    "required": ["category", "score", "explanation"],
    "additionalProperties": False,
}
PREDICTIONS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"predictions": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["predictions"],
    "additionalProperties": False,
}


class Unparsed(ValueError):
    """The text is not the answer that was asked for; says in what."""


class Explanation(NamedTuple):
    """What the model makes of a latent. category: one of CATEGORIES. score: of SCORES, 5 for a clear pattern."""

    category: str
    score: int
    explanation: str


def parse_explanation(text: str) -> Explanation:
    """Raises Unparsed unless `text` is exactly what EXPLANATION_SCHEMA asks for."""
    answer = _object_of(text, EXPLANATION_SCHEMA)
    category, score, explanation = (answer[name] for name in Explanation._fields)
    if not isinstance(category, str) or category.lower() not in CATEGORIES:
        raise Unparsed(f"category {_shown(category)} is none of {', '.join(CATEGORIES)}")
    if type(score) is not int or score not in SCORES:
        raise Unparsed(f"score {_shown(score)} is not a whole number from 1 to 5")
    if not isinstance(explanation, str) or not explanation.strip():
        raise Unparsed("the explanation is empty")
    return Explanation(category.lower(), score, explanation.strip())


def parse_predictions(text: str, count: int) -> tuple[bool, ...]:
    """Raises Unparsed unless `text` is what PREDICTIONS_SCHEMA asks for, with `count` predictions."""
    predictions = _object_of(text, PREDICTIONS_SCHEMA)["predictions"]
    if not isinstance(predictions, list) or any(type(one) is not bool for one in predictions):
        raise Unparsed("predictions are not a list of true and false")
    if len(predictions) != count:
        raise Unparsed(f"{len(predictions)} predictions for {count} examples")
    return tuple(predictions)


def _object_of(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object in `text`, with just the keys of `schema`. A code fence around all of it is taken off."""
    fenced = FENCED.fullmatch(text.strip())
    try:
        answer = json.loads(fenced[1] if fenced else text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise Unparsed("no JSON: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Unparsed(f"no JSON: {error}") from None
    if not isinstance(answer, dict):
        raise Unparsed("no JSON object")
    if answer.keys() != schema["properties"].keys():
        raise Unparsed(f"its keys are {_shown(sorted(answer))}, not {', '.join(schema['properties'])}")
    return answer


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Unparsed("a key stands in it twice")
    return dict(pairs)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
