"""How results look on a terminal: tables, and texts side by side."""

from __future__ import annotations

import shutil
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of named values as a table: numbers to four digits, absent ones as a dash."""
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
    """A row of analyze's results for a table: each number with half of its interval's width."""
    cells = {name: value for name, value in row.items() if name not in ("folder", "intervals")}
    for name, (low, high) in row.get("intervals", {}).items():
        cell = _cell(row[name])
        cells[name] = f"{cell}±{(high - low) / 2:,.{len(cell.partition('.')[2])}f}"
    return cells


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
