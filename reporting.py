"""What the rooms tell the command line: what went wrong, and how far a long run has come."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class WrongInput(ValueError):
    """What the user gave cannot be used: one line with the value, the limit and the remedy. Exit code 2."""


class FailedRun(RuntimeError):
    """A run that began correctly could not finish: one line with the cause and the remedy. Exit code 1."""


class Stopped(RuntimeError):
    """A run was asked to stop and has kept what it did. Its exit code: 130 after Ctrl-C, 0 after SIGTERM."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. CUDA's libraries and torch's CPU allocator say so in a RuntimeError's text alone."""
    said = r"out of memory|can't allocate memory|_ALLOC_FAILED"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(said, str(error))))


class Progress(NamedTuple):
    """How far a stage has come.

    stage: what is being done, for a person ("harvest", "train topk").
    done, total: counted in `unit`.
    facts: further numbers worth showing beside the bar, already formatted.
    """

    stage: str
    done: int
    total: int
    unit: str
    facts: Mapping[str, str]


Report = Callable[[Progress], None]


class Table(list[dict[str, Any]]):
    """Rows of named values: a list of dicts, which prints as a table and is shown as one in a notebook."""

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame; pandas must be installed."""
        from pandas import DataFrame

        return DataFrame(list(self))

    def _drawn(self, how: str) -> str:
        from tabulate import tabulate

        names = dict.fromkeys(name for row in self for name, value in row.items() if not isinstance(value, dict))
        cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in map(row.get, names)] for row in self]
        shown = [["-" if v is None else shortened(visible(str(v).strip() or str(v))) for v in row] for row in cells]
        drawn: str = tabulate(shown, headers=list(names), tablefmt=how, disable_numparse=True)
        return drawn

    def __str__(self) -> str:
        return self._drawn("simple")

    def _repr_html_(self) -> str:
        return self._drawn("html")  # which escapes what is in the cells


def best_row(rows: Sequence[Mapping[str, Any]], name: str, sign: int) -> int | None:
    """The row whose value of a column is better than every other one, by more than their intervals overlap.

    sign: 1 or -1 where a larger or a smaller value is better, 0 where none is. A row has its "intervals" by column.
    """

    def ends(row: Mapping[str, Any]) -> tuple[float, float]:
        low, high = row.get("intervals", {}).get(name) or (row[name], row[name])
        return (low, high) if sign > 0 else (-high, -low)

    known = [i for i, row in enumerate(rows) if isinstance(row.get(name), float)]
    if sign == 0 or len(known) < 2:
        return None
    best = max(known, key=lambda i: sign * rows[i][name])
    return best if all(ends(rows[best])[0] > ends(rows[i])[1] for i in known if i != best) else None


def silent(progress: Progress) -> None:
    """A Report that shows nothing."""


def amount(number: int, noun: str) -> str:
    """1 shard, 1,650 shards."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def human_bytes(n: float) -> str:
    """1.2 GB and the like, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def visible(text: str) -> str:
    """The text with characters that are not seen, or that act where it is shown, as their codes: <U+202E>.

    Of accents that pile up on one letter, those after the fourth too: a hundred cover the lines around them.
    """
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, half a surrogate pair, line and paragraph separator
    shown, accents = [], 0
    for c in text:
        category = unicodedata.category(c)
        accents = accents + 1 if category in ("Mn", "Me") else 0
        shown.append(f"<U+{ord(c):04X}>" if category in hidden or accents > 4 else c)
    return "".join(shown)


def shortened(text: str, longest: int = 200) -> str:
    """The text, or its two ends where it is longer than `longest` characters."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - 1 - half]}…{text[len(text) - half :]}"
