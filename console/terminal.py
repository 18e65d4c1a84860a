"""The terminal: what was typed, made into values; how tables and failures look.

What is not a result goes to standard error.
"""

from __future__ import annotations

import shutil
import sys
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

import click

from routesae.console.watch import Terminated, Watch, message_of
from routesae.reporting import FailedRun, Stopped, WrongInput


class Count(click.ParamType[int]):
    """A number of things: 200000, 200k, 10M, 1.5B."""

    name = "count"
    suffixes: ClassVar = {"k": 10**3, "m": 10**6, "b": 10**9}
    limit = 10**15

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, factor = value.strip().lower(), 1
        if number and number[-1] in self.suffixes:
            number, factor = number[:-1], self.suffixes[number[-1]]
        try:
            count = Decimal(number) * factor  # exact: as a float 16.1k is no whole number
            if count == int(count) and abs(count) <= self.limit:
                return int(count)
        except (InvalidOperation, OverflowError, ValueError):
            pass
        return self.fail(f"{value!r} is not a whole number such as 200000, 200k or 10M", param, ctx)


COUNT = Count()


class Numbers(click.ParamType[tuple[Any, ...]]):
    """Numbers with commas between them: 16,32,64."""

    name = "list"

    def __init__(self, one: click.ParamType[Any]):
        self.one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.one.convert(part.strip(), param, ctx) for part in value.split(","))


class Commands(click.Group):
    """Turns what the rooms raise into one line and an exit code: 2 wrong input, 1 failed run, 130 Ctrl-C, 143 killed.

    The context's obj is the Watch that the options came to.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WrongInput as error:
            self._end(ctx, error, 2)
        except Stopped as error:
            self._end(ctx, error, error.code)
        except (FailedRun, OSError) as error:
            self._end(ctx, error, 1)
        except Terminated as error:
            self._end(ctx, f"{error}; the same command begins again, harvest and train where they stood", 143)
        except KeyboardInterrupt:
            self._end(
                ctx,
                "stopped; the same command goes on where harvest stood, train with --resume",
                130,
            )

    def _end(self, ctx: click.Context, message: object, code: int) -> None:
        if str(message):  # nothing: another process of the run says it
            click.echo(message_of(ctx.obj or Watch(), message, code), err=True)
        sys.exit(code)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of named values for a person; numbers to four digits, absent ones as a dash."""
    from tabulate import tabulate

    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return tabulate(cells, headers=names, disable_numparse=True, stralign="right")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # shares of layers: the largest three
        top = sorted(value.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{key}: {share:.0%}" for key, share in top)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of analyze's results as a person wants it: each number with half of its interval's width."""
    found = {name: value for name, value in row.items() if name not in ("folder", "intervals")}
    for name, (low, high) in row.get("intervals", {}).items():
        cell = _cell(row[name])
        found[name] = f"{cell}±{(high - low) / 2:,.{len(cell.partition('.')[2])}f}"
    return found


def side_by_side(text: dict[str, Any]) -> str:
    """A prompt, its original and its clamped text in columns, and what became of the original's log-probability."""
    from tabulate import tabulate

    columns = {name: text[name].strip() or "(nothing)" for name in ("original", "clamped")}
    width = max(20, min(shutil.get_terminal_size().columns, 160) // 2 - 2)
    shown = tabulate([list(columns.values())], headers=list(columns), maxcolwidths=width, disable_numparse=True)
    return (
        f"> {text['prompt']}\n\n{shown}\n\nlog p of the original: {text['log_p']:.2f} nats, clamped "
        f"{text['log_p_clamped']:.2f}: {text['delta_log_p']:+.2f}, {text['delta_log_p_per_token']:+.3f} a token\n"
    )
