"""What is printed: characters that act on a terminal, digits, and tables at 80 columns."""

from __future__ import annotations

import ast
import re
import unicodedata
from pathlib import Path
from typing import Any

import click
import pytest

from routesae.console.terminal import echo, number, side_by_side, styled, table
from routesae.reporting import shortened, visible

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "a\x1b[2Jb",  # clears the screen
    "a\x1b]0;title\x07b",  # OSC
    "a\x9b31mb",  # the same as ESC [, as one C1 character
    "a\u202eb",  # right to left
    "a\u2066b",
    "a\u2028routesae: done\u2029b",
    "a\nroutesae: done\r\tb",
    "a\udc80b",  # of a file's name that is not UTF-8
    "a\u200bb\ufeff\U000e0041",
    "a" + "\u0301" * 100 + "b",
)


def acts(text: str) -> bool:
    """Whether a terminal would do anything but show this."""
    piled = re.search("[\u0300-\u036f]{5}", text)
    return bool(piled) or any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_would_act_on_a_terminal_is_spelled_out(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not acts(visible(text))
    echo(text)
    (line,) = capsys.readouterr().out[:-1].split("\n")
    assert not acts(line)
    assert (line[0], line[-1] in "b>") == ("a", True)
    echo(*table([{"sae": text, text: text, "Shares": {text: 0.5}}]))
    assert not any(acts(line) for line in capsys.readouterr().out.split("\n"))
    echo(*side_by_side(clamped(prompt=text, original=text, clamped=text)))
    assert not any(acts(line) for line in capsys.readouterr().out.split("\n"))


def test_letters_of_every_script_are_shown_as_they_are() -> None:
    for text in ("Việt Nam", "Vie\u0323\u0302t", "שָׁלוֹם", "हिन्दी", "日本語", "naïve ±0.5 ℓ"):
        assert visible(text) == text


def test_nothing_prints_but_echo() -> None:
    for file in (ROOT / "cli.py", *(ROOT / "console").glob("*.py")):
        calls = [
            ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        ]
        expected = 1 if file.name == "terminal.py" else 0
        assert sum(name in ("print", "click.echo", "click.secho") for name in calls) == expected, file


def clamped(**changes: Any) -> dict[str, Any]:
    numbers = {"log_p": -1.0, "log_p_clamped": -1.0, "delta_log_p": 0.0, "delta_log_p_per_token": 0.0}
    return {"prompt": "p", "original": "same", "clamped": "same", **numbers, **changes}


def test_a_change_that_changes_nothing_says_so() -> None:
    says = "The changes alter nothing here"
    assert any(line.startswith(says) for line in side_by_side(clamped()))
    for other in (clamped(clamped="another"), clamped(delta_log_p=-0.3)):
        assert not any(line.startswith(says) for line in side_by_side(other))


def test_lines_of_a_generated_text_stay_lines() -> None:
    assert [line.strip() for line in side_by_side(clamped(prompt="one\ntwo", original="x\ny"))][:2] == [
        "> one",
        "> two",
    ]


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (64.0, None, "64.0"),
        (64.0, (64.0, 64.0), "64.0"),
        (0.08834567, (0.0871, 0.0895), "0.0883 ±0.0012"),
        (12.3456, (11.0, 13.8), "12.3 ±1.4"),
        (1234.56, (1200.0, 1260.0), "1,235 ±30"),
        (0.123456, None, "0.1235"),
        (1234.567, None, "1,234.6"),
        (0.000012345, None, "0.000012"),
        (0.5, (0.5 - 1e-12, 0.5 + 1e-12), "0.5"),
        (float("nan"), (float("nan"), float("inf")), "nan"),
        (0.0, None, "0.0"),
    ],
)
def test_digits_are_those_that_the_interval_justifies(value: float, interval: Any, shown: str) -> None:
    assert number(value, interval) == shown


def test_a_wide_table_is_parts_of_80_columns_with_every_cell() -> None:
    names = [f"metric{i}" for i in range(12)]
    rows = [{"sae": f"routesae_hard_mean_4608_k64_{'x' * n}", **dict.fromkeys(names, 0.1234 + n)} for n in (1, 60)]
    for row in rows:
        row["intervals"] = {name: (row[name] - 0.001, row[name] + 0.001) for name in names}
    lines = table(rows)
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    assert all(name in text for name in names)
    assert text.count("±0.0010") == 24
    assert "".join(line.split(" ")[0] for line in lines).count("x" * 8) >= 7  # the name is whole, on several lines


def test_a_row_without_a_column_has_a_dash() -> None:
    lines = table([{"sae": "a", "L0": 1.0}, {"sae": "b", "Dead": 0.25}])
    assert lines[0].split() == ["sae", "L0", "Dead"]
    assert [line.split() for line in lines[2:]] == [["a", "1.0", "-"], ["b", "-", "0.2500"]]
    assert table([]) == []


def test_colours_are_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert styled("x", fg="red") == "x"
    on_terminal(monkeypatch)
    assert styled("x\x1b", fg="red") == click.style("x<U+001B>", fg="red")
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("x", fg="red") == "x"


def test_a_value_is_marked_as_best_only_where_the_intervals_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    one: dict[str, Any] = {"sae": "a", "KLDiv": 0.1, "intervals": {"KLDiv": (0.09, 0.11)}}
    other: dict[str, Any] = {"sae": "b", "KLDiv": 0.2, "intervals": {"KLDiv": (0.19, 0.21)}}
    close: dict[str, Any] = {"sae": "c", "KLDiv": 0.12, "intervals": {"KLDiv": (0.1, 0.14)}}

    def marked(rows: list[dict[str, Any]], sign: int) -> list[str]:
        return [line.split()[0] for line in table(rows, {"KLDiv": sign})[2:] if "\x1b[32m" in line]

    assert marked([one, other], -1) == ["a"]
    assert marked([one, other], 1) == ["b"]
    assert marked([one, other], 0) == []
    assert marked([one, other, close], -1) == []


def test_long_texts_keep_both_ends() -> None:
    assert shortened("x" * 200) == "x" * 200
    assert shortened("a" + "x" * 500 + "b", 21) == "a" + "x" * 9 + "…" + "x" * 9 + "b"
