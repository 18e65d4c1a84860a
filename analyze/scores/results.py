"""Scores as they are kept: read again from a file that analyze wrote, with what later stages know of the latents."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from routesae.analyze.contexts.file import read_facts
from routesae.analyze.interpret.summary import read_summary
from routesae.machine.files import read_signed, reading

DESCRIPTIONS = ("Features", "Score")  # columns that contexts and interpret add
LARGEST_BYTES = 1 << 26


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | str | None] = Field(init=False)
    sae: str
    folder: str
    variant: str
    Shares: dict[str, float] | None = None
    intervals: dict[str, list[float]] = {}


class _Results(BaseModel):
    saes: list[_Row]


def read_results(path: Path) -> dict[str, Any]:
    """What `analyze` returned, from the JSON file it was written to. Raises WrongInput if it is not that any more."""
    with reading(path, f"write it with routesae analyze --json {path}"):
        results = read_signed(path, LARGEST_BYTES)
        _Results.model_validate(results)
        return results


def described(folder: Path, tokens_hash: str | None = None) -> dict[str, Any]:
    """What is known of the latents of the SAE in `folder`: Features, how many the published rule keeps, if contexts
    of the corpus were collected (see `read_facts`); Score, the explainer's mean, if they were explained."""
    facts, summary = read_facts(folder, tokens_hash), read_summary(folder)
    columns = {} if facts is None else {"Features": facts["features"]}
    return columns if summary is None else {**columns, "Score": summary.score}
