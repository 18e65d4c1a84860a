"""The terminal: what was typed, made into values; how progress, tables and failures look.

What is not a result goes to standard error.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, ClassVar

import click

from routesae.reporting import FailedRun, Progress, Stopped, WrongInput

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("routesae")
LOG_LINE_SECONDS = 10.0  # between progress lines where there is no terminal


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
    """Turns what the rooms raise into one line and an exit code: 2 wrong input, 1 failed run, 130 Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WrongInput as error:
            self._end(error, 2)
        except Stopped as error:
            self._end(error, error.code)
        except (FailedRun, OSError) as error:
            self._end(error, 1)
        except KeyboardInterrupt:
            self._end(
                "stopped; the same command goes on where harvest stood, train with --resume",
                130,
            )

    def _end(self, message: object, code: int) -> None:
        click.echo(f"routesae: {message}", err=True)
        sys.exit(code)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with rate and time left on a terminal; a log line every ten seconds elsewhere."""
    bars: dict[str, tqdm[Any]] = {}
    starts: dict[str, tuple[float, int, int]] = {}  # when a stage began, where it stood then, and where it stands
    last_line = time.monotonic()

    def bar(now: Progress) -> None:
        from tqdm import tqdm

        if now.stage in bars and now.done < bars[now.stage].n:  # the same work on the next SAE
            bars.pop(now.stage).close()
        if now.stage not in bars:
            for other in bars.values():
                other.close()
            scale = now.unit == "tokens"
            bars[now.stage] = tqdm(total=now.total, unit=f" {now.unit}", unit_scale=scale, desc=now.stage)
        bars[now.stage].set_postfix(now.facts, refresh=False)
        bars[now.stage].update(now.done - bars[now.stage].n)

    def line(now: Progress) -> None:
        nonlocal last_line
        if now.stage in starts and now.done < starts[now.stage][2]:  # the same work on the next SAE
            del starts[now.stage]
        began, done, _ = starts.get(now.stage, (time.monotonic(), now.done, 0))
        starts[now.stage] = (began, done, now.done)
        if time.monotonic() - last_line < LOG_LINE_SECONDS and now.done != now.total:
            return
        last_line = time.monotonic()
        rate = (now.done - done) / max(last_line - began, 1e-9)
        facts = dict(now.facts)
        if rate:
            facts |= {f"{now.unit}/s": f"{rate:,.0f}" if rate > 10 else f"{rate:.2f}"}
            facts |= {"left": f"{(now.total - now.done) / rate:,.0f} s"}
        shown = "".join(f", {name} {value}" for name, value in facts.items())
        log.info("%s: %s of %s %s%s", now.stage, f"{now.done:,}", f"{now.total:,}", now.unit, shown)

    if not sys.stderr.isatty():
        yield line
        return
    from tqdm.contrib.logging import logging_redirect_tqdm

    try:
        with logging_redirect_tqdm():
            yield bar
    finally:
        for open_bar in bars.values():
            open_bar.close()


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
        f"> {text['given']}\n\n{shown}\n\nlog p of the original: {text['log_p']:.2f} nats, clamped "
        f"{text['log_p_clamped']:.2f}: {text['delta_log_p']:+.2f}, {text['delta_log_p_per_token']:+.3f} a token\n"
    )
