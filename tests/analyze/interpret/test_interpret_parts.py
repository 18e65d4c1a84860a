"""What interpret is made of: strict answers, the ledger, prices, addresses and waiting times."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from routesae.analyze.contexts.file import Context, LatentContexts, LatentSummary
from routesae.analyze.interpret.answers import (
    Explanation,
    Predictions,
    Unparsed,
    parse,
)
from routesae.analyze.interpret.chat import read_answer, seconds_to_wait
from routesae.analyze.interpret.ledger import Ledger, open_ledger, read_ledger, set_aside
from routesae.analyze.interpret.prices import Budget, Price, Used, price_of
from routesae.analyze.interpret.scoring import held_out, place_of
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.reporting import FailedRun, WrongInput

SAID = '{"category": "High-Level", "score": 3, "explanation": " lists "}'


# ---------------------------------------------------------------------------------------------------- answers


PROSE = ("Here is my analysis: {a, b}.\n\n", "\n\nLet me know if you need more.")


@pytest.mark.parametrize(
    "text",
    [
        SAID,
        f"\n {SAID}\n",
        f"```json\n{SAID}\n```",
        f"```json {SAID}```",
        f"{PROSE[0]}```\n{SAID}\n```{PROSE[1]}",
        f"{PROSE[0]}{SAID}{PROSE[1]}",
        f'<think>\nThe tokens are {{"Olympic": 3}}. So sport.\n</think>\n\n{SAID}',
        f"<think>At first {SAID.replace('3', '5')}</think>{SAID}",
        f"The opening tag was in the prompt</think>{SAID}",
        f"<think>{SAID}</think>",
        f"{SAID} That is: {SAID}",
        f"[{SAID}]",
        f'{{"answer": {SAID}}}',
        SAID.replace("3", "3.0"),
        SAID.replace("3", '"3"'),
        SAID.replace("3", '"3.0"'),
        SAID.replace("High-Level", "high_level"),
        SAID.replace("}", ', "confidence": {"value": [0.9]}}'),
        SAID.replace("}", ",}"),
        SAID.replace('"', "'"),
        "{category: high-level, score: 3, explanation: lists}",
    ],
)
def test_one_explanation_is_read_wherever_it_stands(text: str) -> None:
    assert parse(Explanation, text) == Explanation(category="high-level", score=3, explanation="lists")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no JSON"),
        ("I think it is low-level, score 5", "no JSON"),
        (SAID[:-1], "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("{" * 100_000, "no JSON"),
        ('{"' * 50_000, "no JSON"),
        ('{"a":' * 100_000, "too deeply"),
        (f"{SAID} {SAID.replace('3', '4')}", "2 different answers"),
        ('{"category": "low-level", "score": 3}', "explanation: Field required"),
        (SAID.replace('"score": 3', '"score": 3, "score": 5'), "twice"),
        (SAID.replace("High-Level", "mid-level"), "category"),
        (SAID.replace('"High-Level"', "null"), "category"),
        *((SAID.replace("3", score), "score: Input should be 1, 2, 3, 4 or 5") for score in
          ("0", "6", "3.5", '"3/5"', "true", "NaN", "1e999", "null", "[3]")),
        (SAID.replace(" lists ", "  "), "empty"),
        (SAID.replace('" lists "', "[]"), "explanation: Input should be a valid string"),
    ],
)  # fmt: skip
def test_what_is_no_explanation_is_never_taken_for_one(text: str, complaint: str) -> None:
    with pytest.raises(Unparsed, match=complaint):
        parse(Explanation, text)


def test_quotes_within_quotes_and_halves_of_characters_are_mended() -> None:
    assert parse(Explanation, SAID.replace("lists", 'says "Olympic"')).explanation == 'says "Olympic"'
    for half in ("\\ud83d", "\ud83d"):
        assert parse(Explanation, SAID.replace("lists", f"a{half} b \\ud83d\\ude00")).explanation == "a? b 😀"


def test_a_schema_asks_for_what_strict_servers_can_grant() -> None:
    for form in (Explanation, Predictions):
        schema = form.model_json_schema()
        assert (set(schema["required"]), schema["additionalProperties"]) == (set(schema["properties"]), False)
    assert Explanation.model_json_schema()["properties"]["score"]["enum"] == [1, 2, 3, 4, 5]


def test_predictions_are_as_many_as_were_asked_for_and_true_or_false() -> None:
    for text in (
        '{"predictions": [true, false]}',
        '{"predictions": ["True", "false"]}',
        "{'predictions': [True, False]}",
    ):
        assert parse(Predictions, text, 2).predictions == [True, False]
    for text in ('{"predictions": [true]}', '{"predictions": [1, 0]}', '{"predictions": null}', "[true, false]"):
        with pytest.raises(Unparsed):
            parse(Predictions, text, 2)


def test_counts_that_are_no_counts_stand_for_the_most_they_can_be() -> None:
    usage = {"prompt_tokens": -5, "completion_tokens": True}
    body = {"choices": [{"message": {"content": "x"}}], "usage": usage}
    answer = read_answer(json.dumps(body), Used(70, 5))
    assert answer is not None
    assert (answer.text, answer.problem, answer.input_tokens, answer.output_tokens) == ("x", None, 70, 5)


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ("Provider returned error. Please retry shortly", 0),
        ("Please retry in 34.1s.", 34.1),
        ("Rate limit reached: Limit 30000, Used 29500. Please try again in 1m2.5s. Visit", 62.5),
        ("try again in 250ms", 0.25),
        ("wait 1 minute", 60),
        ('[{"error": {"details": [{"@type": "x.RetryInfo", "retryDelay": "41s"}]}}]', 41),
        ('{"retry_after": 12.5}', 12.5),
        ('{"retry_after_ms": 1500}', 1.5),
        ("1" * 100_000, 0),
    ],
)
def test_the_wait_that_a_body_asks_for(body: str, seconds: float) -> None:
    assert seconds_to_wait(body) == pytest.approx(seconds)


# ----------------------------------------------------------------------------------------------------- ledger


def answer(latent: int, **changes: object) -> dict[str, Any]:
    """A line about a latent that has not been answered."""
    counted = {"input_tokens": 9, "output_tokens": 1, "max_output_tokens": 512}
    return {"latent": latent, "outcome": "unanswered", "reason": "busy", **counted, **changes}


def explained(latent: int) -> dict[str, Any]:
    said = {"category": "low-level", "score": 4, "explanation": "says so"}
    return answer(latent, outcome="answered", reason=None, **said)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of one answer."""
    with open_ledger(tmp_path / "interpretations.jsonl", {"model": "a"}) as ledger:
        ledger.add(explained(1))
    return tmp_path / "interpretations.jsonl"


def test_a_torn_last_line_is_dropped_and_what_follows_stands_on_its_own(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    for torn in (b"{", b'{"latent": 2}', b'{"latent": 2, "hash": "0"}\0\0\0'):
        path.write_bytes(whole + torn)
        with open_ledger(path, {"model": "a"}) as ledger:
            assert ledger.lines == [explained(1)]
            ledger.add(answer(3))
        assert "was cut short and is dropped" in caplog.text
        assert read_ledger(path)[:2] == ({"model": "a"}, [explained(1), answer(3)])
    path.write_bytes(whole[:5])  # killed while the head was written
    with open_ledger(path, {"model": "b"}) as ledger:
        assert ledger.lines == []


def test_a_flipped_bit_of_a_ledger_is_named_and_nothing_is_lost(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_ledger(path, {"model": "a"}) as ledger:
        ledger.add(explained(2))
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if bit // 8 == len(whole) - 1:  # the last line has lost its end
            assert len(read_ledger(path)[1]) == 1
            assert "was cut short" in caplog.text
            continue
        with pytest.raises(WrongInput, match=r"line [123] of .*jsonl cannot be read"):
            open_ledger(path, {"model": "a"}).__enter__()
        assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "line",
    [
        {"latent": 1},
        {**explained(1), "latent": "1"},
        explained(-1),
        {**explained(1), "outcome": "fine"},
        {**explained(1), "score": 9},
        {**explained(1), "input_tokens": None},
        {**explained(1), "category": "none"},
        {name: value for name, value in explained(1).items() if name != "reason"},
    ],
)  # fmt: skip
def test_a_strangers_line_that_says_not_what_it_must_is_one_line(path: Path, line: dict[str, Any]) -> None:
    with open_ledger(path, {"model": "a"}) as ledger:
        ledger.add(line)
    with pytest.raises(
        WrongInput, match=r"line 3 of .*jsonl cannot be read \(.*\); delete it, or bring the file back"
    ) as refusal:
        read_ledger(path)
    assert "\n" not in str(refusal.value)


def test_a_scoring_line_needs_as_many_predictions_as_truths(tmp_path: Path) -> None:
    path = tmp_path / "fuzzing.jsonl"
    scored = answer(1, outcome="answered", digest="0", batch=0, batches=1, truth=[True, False])
    with open_ledger(path, {"model": "a"}) as ledger:
        ledger.add({**scored, "predictions": [True, True]})
        ledger.add({**scored, "predictions": [True]})
    with pytest.raises(WrongInput, match=r"line 3 of .*1 predictions for 2 texts"):
        read_ledger(path)


def test_each_answer_is_on_the_disk_before_add_returns(tmp_path: Path) -> None:
    path = tmp_path / "interpretations.jsonl"
    with open_ledger(path, {"model": "a"}) as ledger:
        ledger.reserve(10_000)
        for n in range(3):
            ledger.add(answer(n))
            assert read_ledger(path)[1][-1] == answer(n)  # killed now
        assert path.stat().st_size > 10_000 > 3 * 300
    assert path.read_bytes().endswith(b'"}\n')  # what was reserved is given back


def test_a_ledger_about_something_else_is_refused(path: Path) -> None:
    with pytest.raises(WrongInput, match=r"begun with model 'a', now it is 'b'.*--overwrite to set aside"):
        open_ledger(path, {"model": "b"}).__enter__()


def test_what_is_set_aside_says_whose_it_was_and_is_whole(path: Path) -> None:
    whole = path.read_bytes()
    for _ in range(2):
        set_aside(path.parent)
        assert not path.exists()
        with open_ledger(path, {"model": "org/b:c"}) as ledger:
            ledger.add(explained(7))
    kept = sorted(path.parent.glob("interpretations.*-*.jsonl"))
    assert [file.name.rpartition("-")[0] for file in kept] == ["interpretations.a", "interpretations.org-b-c"]
    assert kept[0].read_bytes() == whole


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, path: Path) -> None:
    elsewhere = path.rename(path.with_name("elsewhere"))
    {"fifo": os.mkfifo, "link": lambda at: at.symlink_to(elsewhere), "folder": Path.mkdir}[kind](path)
    with pytest.raises((WrongInput, OSError)) as refusal:
        open_ledger(path, {"model": "a"}).__enter__()
    assert str(path) in str(refusal.value)


def test_a_full_disk_is_said_before_anything_is_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with open_ledger(path, {"model": "a"}) as ledger, pytest.raises(FailedRun, match="No space left"):
        Ledger.reserve(ledger, 1)


# ------------------------------------------------------------------------------------------------------ prices


def test_a_users_price_goes_before_the_packaged_one_and_a_dated_model_costs_its_models(tmp_path: Path) -> None:
    own = tmp_path / "prices.toml"
    own.write_text('["gpt-4o"]\ninput = 1\noutput = 2\n["llama"]\ninput = 0\noutput = 0\n')
    assert price_of("gpt-4o-2024-08-06", None) == price_of("gpt-4o", None) == Price(input=2.5, output=10.0)
    assert price_of("gpt-4o-mini-2024-07-18", None) == Price(input=0.15, output=0.6)
    assert price_of("gpt-4o-2024-08-06", str(own)) == Price(input=1, output=2)
    assert price_of("gpt-4o-mini", str(own)) == Price(input=0.15, output=0.6)
    assert price_of("llama", str(own)) == Price(input=0, output=0)
    assert price_of("gpt-4o-realtime", None) is None


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("gpt-4o = ", "cannot be read .Invalid value"),
        ('["a"]\ninput = 1\n', "a.output: Field required"),
        ('["a"]\ninput = 1\noutput = 1\nmore = 1\n', "a.more: Extra inputs"),
        ("a = 1\n", "a model has input and output"),
        ('["a"]\ninput = -1\noutput = 1\n', "-1"),
        ('["a"]\ninput = nan\noutput = 1\n', "nan"),
        ('["a"]\ninput = "1"\noutput = 1\n', "'1'"),
    ],
)
def test_a_price_table_that_is_none_is_refused(tmp_path: Path, written: str, complaint: str) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(written)
    with pytest.raises(WrongInput, match=complaint):
        price_of("a", str(own))
    with pytest.raises(WrongInput, match=r"absent.toml does not exist; it is TOML"):
        price_of("a", str(tmp_path / "absent.toml"))


def test_a_budget_counts_requests_under_way_and_waits_for_them() -> None:
    async def run() -> None:
        budget = Budget(Price(input=0, output=500_000), 5.0)
        most = Used(0, 4)
        assert await budget.reserve(most)
        assert await budget.reserve(most)
        third = asyncio.create_task(budget.reserve(most))
        await asyncio.sleep(0.02)
        assert not third.done()
        budget.settle(most, Used(0, 1))
        assert await third  # 0.5 spent, 4 under way
        last = asyncio.create_task(budget.reserve(most))
        budget.settle(most, most)
        budget.settle(most, most)
        assert not await last
        assert (budget.spent, budget.exhausted) == (4.5, True)

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_url": "localhost:8000"}, "is not an address"),
        ({"base_url": "ftp://host/v1"}, "is not an address"),
        ({"base_url": "http://host:99999/v1"}, "is not an address"),
        ({"base_url": "https://me:secret@host/v1"}, "may hold no user"),
        ({"base_url": "https://host/v1?api-key=secret"}, "may hold no user"),
        ({"concurrency": 0}, "--concurrency 0 is below 1"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
        ({"retries": -1}, "--retries"),
        ({"max_output_tokens": 0}, "--max-output-tokens"),
        ({"model": " "}, "--model"),
    ],
)
def test_impossible_chat_settings_are_refused_without_showing_a_secret(changes: dict, complaint: str) -> None:
    with pytest.raises(WrongInput, match=complaint) as refusal:
        InterpretSettings(**changes)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"latents": 0}, "--latents 0"),
        ({"examples": 0}, "--examples 0"),
        ({"scores": ("simulation",)}, "--score 'simulation' is none of detection, fuzzing"),
        ({"max_cost": 0.0}, "--max-cost"),
        ({"max_cost": float("inf")}, "--max-cost"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(WrongInput, match=complaint):
        InterpretSettings(**changes)


def test_a_key_no_header_can_hold_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-se\ncret")
    with pytest.raises(WrongInput, match="OPENAI_API_KEY") as refusal:
        InterpretSettings().key()
    assert "cret" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------ held-out texts


def context(row: int, first: int, length: int = 4, kind: str = "weak") -> Context:
    """One whose window is [first, first + length) of the row."""
    named = {"kind": kind, "token_class": "x", "activation": 1.0, "layer": 3, "row": row, "document": 0}
    tokens = {"token_ids": (1,) * length, "tokens": ("x",) * length, "activations": (1.0,) * length}
    return Context(**named, position=first + 1, at=1, **tokens)


def test_held_out_texts_share_no_token_with_what_was_shown_or_with_one_another() -> None:
    counted: dict[str, Any] = {"latent": 0, "active": 9, "density": 0.1, "token_classes": 1, "kept": True}
    values: dict[str, Any] = {"max_activation": 1.0, "mean_activation": 1.0, "histogram_first": 0, "histogram": (9,)}
    summary = LatentSummary(**counted, **values)
    chosen = (context(0, 10, kind="chosen"), context(0, 30, kind="chosen"), context(5, 10, kind="chosen"))
    weak = [context(0, first) for first in (6, 7, 13, 14, 17, 31)] + [context(1, 10), context(5, 10)]
    samples = {"strong": (), "middle": (), "weak": tuple(weak)}
    latent = LatentContexts(summary=summary, chosen=chosen, top=(), samples=samples)
    found = [(row, first) for row, first, _ in map(place_of, held_out(latent, 2))]
    assert found == [(0, 6), (0, 14), (1, 10), (5, 10)]  # the third of those chosen was not shown
    assert [place_of(one)[:2] for one in held_out(latent, 3)] == found[:-1]
