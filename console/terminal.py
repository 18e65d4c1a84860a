"""What goes to a terminal. Every printed line passes `echo`, so that nothing in it acts on the terminal."""

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import click

from routesae.reporting import best_row, visible

NARROWEST = 20  # columns of a wrapped name
LIKE_NOTHING = 0.005  # nats; a smaller change of a text's log-probability is shown as 0.00


class Styled(str):
    """A line with colours; characters that act on a terminal were spelled out before these came in."""


def echo(*lines: str, err: bool = False) -> None:
    """Print lines. What is not seen or would act on the terminal is spelled out, line breaks in a line included."""
    for line in lines:
        click.echo(line if isinstance(line, Styled) else visible(line), err=err)


def styled(text: str, stream: TextIO | None = None, **style: Any) -> Styled:
    """The text in a colour or weight, where the stream (standard output) is a terminal and NO_COLOR is unset."""
    coloured = (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    return Styled(click.style(visible(text), **style) if coloured else visible(text))


def columns() -> int:
    """The width of the terminal: $COLUMNS, what it says itself, or 80."""
    return shutil.get_terminal_size().columns


def number(value: float, interval: Sequence[float] | None = None) -> str:
    """A number to the digits that half its interval's width justifies, or to four: "0.0883 ±0.0012", "64.0"."""
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    if half > 0 and math.isfinite(half) and (digits := 1 - math.floor(math.log10(half))) <= 6:
        digits = max(0, digits)
        return f"{value:,.{digits}f} ±{half:,.{digits}f}"
    if not math.isfinite(value) or value == round(value, 1):
        return f"{value:,.1f}"
    return f"{value:,.{min(6, max(1, 3 - math.floor(math.log10(abs(value)))))}f}"


def table(
    rows: Sequence[Mapping[str, Any]], better: Mapping[str, int] | None = None, units: Mapping[str, str] | None = None
) -> list[Styled]:
    """Rows of named values as the lines of a table, in parts where the terminal is too narrow for all its columns.

    Absent values are dashes. A row's "intervals" are shown beside its numbers, and its "folder" is not shown.
    better: 1 or -1 for columns whose largest or smallest value is marked. units: second lines of the heading.
    """
    from tabulate import tabulate

    known = dict.fromkeys(name for row in rows for name in row if row[name] is not None)
    names = [name for name in known if name not in ("folder", "intervals")]
    if not names:
        return []
    cells = {name: [_cell(row.get(name), row.get("intervals", {}).get(name)) for row in rows] for name in names}
    first, *others = names
    cells[first] = ["\n".join(textwrap.wrap(cell, max(NARROWEST, columns() // 3))) for cell in cells[first]]
    measured = {name for name in names if any(isinstance(row.get(name), float) for row in rows)}
    heads = {name: visible(name) for name in names}
    heads |= {name: f"{heads[name]}\n{unit}" for name, unit in (units or {}).items() if unit and name in measured}
    lines_of = {name: "\n".join((f"  {heads[name]}", *cells[name])).split("\n") for name in names}
    wide = {name: max(map(len, lines)) for name, lines in lines_of.items()}  # tabulate pads heads by two
    for name in others:
        if (best := best_row(rows, name, (better or {}).get(name, 0))) is not None:
            cells[name][best] = styled(cells[name][best], fg="green", bold=True)
    parts: list[list[str]] = [[]]
    for name in others:
        if parts[-1] and wide[first] + sum(2 + wide[one] for one in (*parts[-1], name)) > columns():
            parts.append([])
        parts[-1].append(name)
    lines: list[Styled] = []
    for part in parts:
        shown = [first, *part]
        body = list(zip(*(cells[name] for name in shown), strict=True))
        align = ("left", *("right" for _ in part))
        drawn = tabulate(body, headers=[heads[name] for name in shown], disable_numparse=True, colalign=align)
        text = drawn.split("\n")
        rule = next(i for i, line in enumerate(text) if line.startswith("--"))
        lines += [Styled("")] * bool(lines)
        lines += [styled(line, bold=True) for line in text[:rule]] + [Styled(line) for line in text[rule:]]
    return lines


def _cell(value: Any, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # shares of layers: the largest three
        top = sorted(value.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{visible(str(key))}: {share:.0%}" for key, share in top)
    return number(value, interval) if isinstance(value, float) else visible(str(value))


def side_by_side(text: Mapping[str, Any]) -> list[str]:
    """A prompt, its original and its clamped text in columns, and what became of the original's log-probability."""
    from tabulate import tabulate

    def lines(of: str) -> list[str]:
        return [visible(line) for line in of.split("\n")]

    shown = {name: "\n".join(lines(text[name].strip() or "(nothing)")) for name in ("original", "clamped")}
    width = max(NARROWEST, min(columns(), 160) // 2 - 1)
    drawn = tabulate([list(shown.values())], headers=list(shown), maxcolwidths=width, disable_numparse=True)
    if text["original"] == text["clamped"] and abs(text["delta_log_p"]) < LIKE_NOTHING:
        drawn += "\n\nThe changes alter nothing here: no token, and no probability. Their latents may not be active."
    p = f"log p of the original: {text['log_p']:.2f} nats, clamped {text['log_p_clamped']:.2f}: "
    p += f"{text['delta_log_p']:+.2f}, {text['delta_log_p_per_token']:+.3f} a token"
    said = text.get("messages") or ()  # of one message the role is plain
    turns = [f"{one['role']}: {one['content']}" for one in said] if len(said) > 1 else [text["prompt"]]
    return [*(f"> {line}" for turn in turns for line in lines(turn)), "", *drawn.split("\n"), "", p, ""]
