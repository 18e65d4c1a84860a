"""What the answers about an SAE come to: read them, count them, sum them up in interpretations.json."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from routesae.analyze.interpret.answers import CATEGORIES
from routesae.analyze.interpret.ledger import ANSWERED, LINES, SUMMARY, UNANSWERED, UNPARSED, Line, read_ledger
from routesae.analyze.interpret.prices import Price, Used
from routesae.analyze.interpret.settings import MODES
from routesae.machine.files import read_signed, reading
from routesae.reporting import FailedRun


class Score(BaseModel):
    """What interpretations.json says of one mode of scoring. balanced_accuracy: None if no latent was scored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    balanced_accuracy: float | None
    unanswered: NonNegativeInt


class Summary(BaseModel):
    """What others read of interpretations.json. score: the explainer's mean; None if nothing was explained."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    score: float | None
    unanswered: NonNegativeInt
    last_loss: str | None
    detection: Score | None = None
    fuzzing: Score | None = None

    @property
    def lost(self) -> int:
        """How many questions got no answer, those of scores included."""
        return sum(part.unanswered for part in (self, self.detection, self.fuzzing) if part is not None)


def read_summary(folder: Path) -> Summary | None:
    """What interpret last wrote into `folder`; None if it has not run. Raises WrongInput if the file is damaged."""
    path = folder / SUMMARY
    if not os.path.lexists(path):
        return None
    with reading(path, "the same routesae interpret writes it again"):
        return Summary.model_validate(read_signed(path))


def read_interpretations(folder: Path) -> dict[int, Line]:
    """The last line about each latent in an SAE's folder; empty if interpret has not run.

    Raises WrongInput if the file is damaged.
    """
    path = folder / LINES
    return {line["latent"]: line for line in read_ledger(path)[1]} if os.path.lexists(path) else {}


def require_answers(summaries: Sequence[Mapping[str, Any] | Summary]) -> None:
    """Raises FailedRun if a question got no answer, although the run came to its end."""
    parts = [summary for summary in map(Summary.model_validate, summaries) if summary.lost]
    if count := sum(summary.lost for summary in parts):
        raise FailedRun(f"{count} questions got no answer ({parts[0].last_loss}); the same command asks them again")


def used(lines: Sequence[Line]) -> Used:
    """Tokens of the answers of these lines."""
    return Used(sum(line["input_tokens"] for line in lines), sum(line["output_tokens"] for line in lines))


def bill(lines: Sequence[Line], price: Price | None) -> dict[str, Any]:
    """Tokens and dollars of a ledger; the dollars are None if no price is known."""
    tokens = used(lines)
    cost = None if price is None else price.dollars(tokens)
    return {"input_tokens": tokens.input, "output_tokens": tokens.output, "cost_usd": cost}


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """Counts and mean scores of the last lines of some latents, as the paper reports them.

    Scores are means over the latents that were explained.
    """
    explained = [line for line in lines if line["outcome"] == ANSWERED]
    scores = {name: [line["score"] for line in explained if line["category"] == name] for name in CATEGORIES}
    return {
        "latents_asked": len(lines),
        "explained": len(explained),
        "unparsed": sum(line["outcome"] == UNPARSED for line in lines),
        "unanswered": sum(line["outcome"] == UNANSWERED for line in lines),
        "score": _mean([line["score"] for line in explained]),
        "categories": {name: {"count": len(values), "score": _mean(values)} for name, values in scores.items()},
    }


def score_summary(lines: Sequence[Line], digests: Mapping[int, str]) -> dict[str, Any]:
    """What a scoring ledger says of explanations. digests: of each explanation, by latent.

    balanced_accuracy: mean over the latents of which every request was answered. latents: how many those are.
    unfinished: latents with a request that was not. unanswered: requests without an answer. too_few_examples: latents
    about which nothing was asked.
    """
    batches: dict[tuple[int, str], dict[int, Line]] = {}
    for line in lines:
        batches.setdefault((line["latent"], line["digest"]), {})[line["batch"]] = line
    asked = [(latent, list(batches.get((latent, digest), {}).values())) for latent, digest in digests.items()]
    scores: dict[str, float] = {}
    for latent, answers in asked:
        if answers and len(answers) == answers[0]["batches"] and all(a["outcome"] == ANSWERED for a in answers):
            pairs = [pair for a in answers for pair in zip(a["truth"], a["predictions"], strict=True)]
            right = [[said is truth for active, said in pairs if active is truth] for truth in (True, False)]
            scores[str(latent)] = sum(sum(predicted) / len(predicted) for predicted in right) / 2
    unfinished = [answers for latent, answers in asked if answers and str(latent) not in scores]
    return {
        "balanced_accuracy": _mean(list(scores.values())),
        "latents": len(scores),
        "unfinished": len(unfinished),
        "unanswered": sum(line["outcome"] == UNANSWERED for answers in unfinished for line in answers),
        "too_few_examples": len(digests) - len(scores) - len(unfinished),
        "by_latent": scores,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def row_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a row of a table."""
    modes = [mode for mode in MODES if mode in summary]
    row = {"sae": summary["sae"], "kept": summary["latents_kept"]}
    row |= {name: summary[name] for name in ("explained", "unparsed", "unanswered", "score")}
    for name, of in summary["categories"].items():
        row[name] = str(of["count"]) if of["score"] is None else f"{of['count']} ({of['score']:.2f})"
    row |= {mode: summary[mode]["balanced_accuracy"] for mode in modes}
    bills = [summary, *(summary[mode] for mode in modes)]
    row["tokens"] = f"{sum(one['input_tokens'] + one['output_tokens'] for one in bills):,}"
    costs = [one["cost_usd"] for one in bills]
    return {**row, "cost": None if None in costs else f"${sum(costs):.4f}"}
