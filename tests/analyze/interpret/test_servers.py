"""Whatever a chat server does, every latent ends explained or honestly marked; nothing is lost or paid for twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from routesae.analyze.interpret.summary import read_interpretations
from routesae.tests.analyze.interpret.chat_server import (
    GOOD,
    KEY,
    SOON,
    Reply,
    Serve,
    assert_no_key_below,
    completion,
    failing,
    good,
    invoke,
    lines,
    subject,
)

SAID = json.dumps(GOOD)
ESCAPED_KEY = "".join(f"\\u{ord(c):04x}" for c in KEY[:9]) + KEY[9:].replace("/", "\\/")
REASONING = 'The tokens are {"Olympic": 3}. So sport. ' * 5
Body = dict[str, Any]


def raw(body: bytes | str | list[Any] | Body, status: int = 200, **headers: str) -> Reply:
    shown = {name.replace("_", "-"): value for name, value in headers.items()} or SOON
    return status, shown, body if isinstance(body, bytes) else json.dumps(body).encode()


def once(first: Reply | None, then: Callable[[], Reply] = good) -> Callable[[int, Body], Reply | None]:
    return lambda nth, body: first if nth == 1 else then()


def always(reply: Reply | None) -> Callable[[int, Body], Reply | None]:
    return lambda nth, body: reply


def unless_without(parameter: str, refusal: Reply) -> Callable[[int, Body], Reply | None]:
    return lambda nth, body: refusal if parameter in body else good()


def unless_shorter(refusal: Reply) -> Callable[[int, Body], Reply | None]:
    return lambda nth, body: refusal if body["messages"][0]["content"].count("Context:") > 1 else good()


def slowly(body: bytes, seconds: float) -> Callable[[int, Body], Reply | None]:
    def act(nth: int, _: Body) -> Reply:
        time.sleep(seconds)
        return raw(body)

    return act


class Mode(NamedTuple):
    """act: the reply to a latent's nth request. outcome: of every latent. reason: words of its mark.

    requests: of each latent; None where they cannot be told. ends: words of the line that ends the run early.
    """

    act: Callable[[int, Body], Reply | None]
    outcome: str = "answered"
    requests: int | None = 1
    reason: str = ""
    ends: str = ""


def message(content: Any, finish: str = "stop", **more: Any) -> Reply:
    return 200, {}, completion(content, finish, **more)


TOO_LONG = (
    "'max_tokens' is too large: 512. This model's maximum context length is 4096 tokens and your request has 3900"
)
RATE = [
    {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota. Please retry in 0.02s.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [{"retryDelay": "0.02s"}],
        }
    }
]
UPSTREAM = {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "retry in 0.01 s"}}}
NO_CHOICE = {"choices": [], "usage": None}
CHOICE_FAILED = {"choices": [{"message": {"role": "assistant", "content": ""}, "finish_reason": "error"}]}
TIMEOUT = 0.4

MODES = {
    # one JSON object, wherever it stands
    "plain": Mode(always(good())),
    "think": Mode(always(message(f"<think>\n{REASONING}\n</think>\n\n{SAID}"))),
    "think, opened by the prompt": Mode(always(message(f"{REASONING}</think>{SAID}"))),
    "prose and a fence": Mode(always(message(f"Here it is:\n\n```json\n{SAID}\n```\n\nDo you need {{more}}?"))),
    "a fence on one line": Mode(always(message(f"```json {SAID} ```"))),
    "reasoning_content": Mode(always(message(None, reasoning_content=SAID))),
    "reasoning beside empty content": Mode(always(message("", reasoning=f"{REASONING} {SAID}"))),
    "content and reasoning": Mode(always(message(SAID, reasoning_content=REASONING))),
    "a list of parts": Mode(
        always(
            message([{"type": "thinking", "thinking": []}, {"type": "text", "text": SAID[:9]}, {"text": SAID[9:]}])
        )
    ),
    "numbers as strings": Mode(always(good(score="4"))),
    "numbers as floats": Mode(always(good(score=4.0))),
    "extra keys": Mode(always(good(note=["more"], confidence=0.5))),
    "nearly JSON": Mode(always(message(SAID.replace('"', "'").replace("}", ",}")))),
    "half a surrogate": Mode(always(good(explanation="half a pair \ud800 and \u202e more"))),
    "no usage": Mode(always(raw({"choices": [{"message": {"content": SAID}}]}))),
    "the key in the answer": Mode(always(good(explanation=f"the key is {KEY}"))),
    "the key in escapes": Mode(always(message(SAID.replace("says so", ESCAPED_KEY)))),
    # answers that cannot be used: paid for, marked, not asked again
    "only prose": Mode(always(message("Feature category: low-level")), "unparsed", 1, "no JSON"),
    "score out of range": Mode(always(good(score=9)), "unparsed", 1, "score: Input should be 1, 2, 3, 4 or 5, not 9"),
    "no such category": Mode(always(good(category="medium")), "unparsed", 1, "category: "),
    "two answers": Mode(always(message(SAID + SAID.replace("4", "5"))), "unparsed", 1, "2 different answers"),
    "refused by the model": Mode(always(message(None, refusal="I will not")), "unparsed", 1, "the model refused"),
    "cut by a filter": Mode(always(message("The", "content_filter")), "unparsed", 1, "content filter"),
    "cut short": Mode(always(message(SAID[:40], "length")), "unparsed", 1, "--max-output-tokens"),
    "all spent on reasoning": Mode(
        always(message("", "length", reasoning_content=REASONING)), "unparsed", 1, "--max-output-tokens"
    ),
    "empty, and charged": Mode(always(message("")), "unparsed", 1, "empty"),
    "moderated by OpenRouter": Mode(
        always(failing(403, None, "Input was flagged by moderation")), "unparsed", 1, "moderation refused the prompt"
    ),
    "moderated by Azure": Mode(
        always(failing(400, "content_filter", "triggering Azure OpenAI's content management policy")),
        "unparsed",
        1,
        "moderation refused the prompt",
    ),
    # tries that fail, and are made again
    "hangs up": Mode(once(None), requests=2),
    "rate limit, by the header": Mode(once(failing(429, "rate_limit_exceeded", Retry_After="0.02")), requests=2),
    "rate limit, by the body, in a list": Mode(once(raw(RATE, 429, X_Nothing="")), requests=2),
    "server errors": Mode(lambda nth, body: failing(502) if nth <= 2 else good(), requests=3),
    "request timeout": Mode(once(failing(408)), requests=2),
    "an error with status 200": Mode(once(raw(UPSTREAM)), requests=2),
    "no choice with status 200": Mode(once(raw(NO_CHOICE)), requests=2),
    "a failed choice": Mode(once(raw(CHOICE_FAILED)), requests=2),
    "a web page": Mode(once(raw(b"<html>gateway</html>", Content_Type="text/html")), requests=2),
    "bytes": Mode(once(raw(b"\xff\xfe[[[[" * 100)), requests=2),
    "a list": Mode(once(raw([1, 2])), requests=2),
    "deep nesting": Mode(once(raw(b'{"choices": ' + b"[" * 100_000)), requests=2),
    "nothing": Mode(once(raw(b"", 204)), requests=2),
    "bad compression": Mode(once(raw(b"no gzip", Content_Encoding="gzip")), requests=2),
    "an unknown charset": Mode(always(raw(completion(SAID), Content_Type="application/json; charset=base64"))),
    "a body that stalls": Mode(once((200, {"Content-Length": "5000"}, completion("{}")[:40])), requests=2),
    "silent once": Mode(
        lambda nth, body: slowly(completion(SAID), 2 * TIMEOUT if nth == 1 else 0)(nth, body), requests=2
    ),
    # what a server refuses of a request
    "no schema: 400": Mode(
        unless_without("response_format", failing(400, None, "failed to parse grammar")), requests=None
    ),
    "no schema: 422": Mode(
        unless_without("response_format", raw({"detail": [{"msg": "extra"}]}, 422)), requests=None
    ),
    "no schema: 500": Mode(unless_without("response_format", failing(500, None, "grammar")), requests=None),
    "no temperature": Mode(
        unless_without("temperature", failing(400, None, "'temperature' does not support 0.1")), requests=None
    ),
    "too long": Mode(unless_shorter(failing(400, None, TOO_LONG)), requests=3),
    "too large a request": Mode(
        unless_shorter(failing(429, None, "Request too large for m: Limit 1, Requested 2")), requests=3
    ),
    "too long, status 500": Mode(
        unless_shorter(failing(500, None, "exceeds the available context size")), requests=3
    ),
    # answers that are lost: asked again by the next run
    "errors for ever": Mode(always(failing(503)), "unanswered", 3, "answered 503: no"),
    "errors with status 200 for ever": Mode(always(raw(UPSTREAM)), "unanswered", 3, "Provider returned error"),
    "silent for ever": Mode(slowly(completion(SAID), 2 * TIMEOUT), "unanswered", 3, "--timeout 0.4"),
    "refused whatever is left out": Mode(always(failing(400, None, "sorry")), "unanswered", 2, "answered 400: sorry"),
    "always too long": Mode(
        always(failing(400, "context_length_exceeded")), "unanswered", 3, "too long for the model"
    ),
    # what ends the run at once
    "bad key": Mode(
        always(failing(401, "invalid_api_key", f"Incorrect: {KEY}")),
        "",
        1,
        ends="check the API key in $OPENAI_API_KEY",
    ),
    "forbidden": Mode(always(failing(403, None, "not yours")), "", 1, ends="check the API key in $OPENAI_API_KEY"),
    "no quota": Mode(always(failing(429, "insufficient_quota", Retry_After="1")), "", 1, ends="quota is used up"),
    "pay first": Mode(always(failing(402)), "", 1, ends="quota is used up"),
    "no such model": Mode(always(failing(404)), "", 1, ends="check --model"),
    "closed for hours": Mode(always(failing(429, None, Retry_After="7200")), "", 1, ends="asks to wait 7,200 s"),
    "closed for hours, in the body": Mode(
        always(raw({"retry_after": 7200}, 429, X="")), "", 1, ends="asks to wait 7,200 s"
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_latent_ends_explained_or_honestly_marked(name: str, tmp_path: Path, serve: Serve) -> None:
    mode, is_well, latents = MODES[name], threading.Event(), 2
    server = serve(lambda latent, nth, body: good() if is_well.is_set() else mode.act(nth, body))
    folder = subject(tmp_path / "sae", latents)
    quick = ("--concurrency", 1, "--retries", 2, "--timeout", TIMEOUT, "--latents", "all")
    result = invoke(folder, server, *quick)
    marks = read_interpretations(folder)
    is_lost = mode.outcome == "unanswered"
    assert result.exit_code == int(is_lost or bool(mode.ends)), result.output
    assert len(result.stderr.splitlines()) == result.exit_code, result.stderr
    assert mode.ends in result.stderr
    assert ("2 questions got no answer" in result.stderr) == is_lost
    assert {mark["outcome"] for mark in marks.values()} == ({mode.outcome} - {""})
    assert len(marks) == (0 if mode.ends else latents)
    for mark in marks.values():
        assert ("score" in mark) == (mark["outcome"] == "answered")
        assert mode.reason in (mark["reason"] or "")
        assert bool(mark["reason"]) == (mark["outcome"] != "answered")
    if mode.requests is not None:
        assert set(server.asked.values()) == {mode.requests}
    assert KEY not in result.output
    assert_no_key_below(tmp_path)
    # The next run asks again for what was lost, and for that only.
    before = server.asked.copy()
    is_well.set()
    again = invoke(folder, server, *quick)
    assert again.exit_code == 0, again.output
    assert set(server.asked - before) == (set(range(latents)) if is_lost or mode.ends else set())
    assert {line["outcome"] for line in read_interpretations(folder).values()} == (
        {mode.outcome} if marks and not is_lost else {"answered"}
    )


def test_one_moderated_prompt_is_skipped_and_the_run_goes_on(tmp_path: Path, serve: Serve) -> None:
    refusals = {1: failing(403, None, "Input was flagged by moderation"), 3: failing(403, None, "not this one")}
    server = serve(lambda latent, nth, body: refusals.get(latent) or good())
    folder = subject(tmp_path / "sae", 6)
    result = invoke(folder, server, "--concurrency", 1, "--latents", "all", "--seed", 1)
    outcomes = {line["latent"]: line["outcome"] for line in lines(folder)}
    assert outcomes == {latent: {1: "unparsed", 3: "unanswered"}.get(latent, "answered") for latent in range(6)}
    assert result.exit_code == 1
    assert "1 questions got no answer" in result.stderr


@pytest.mark.parametrize("reply", [failing(503), message("", "length"), raw(NO_CHOICE)])
def test_ten_lost_answers_in_a_row_end_the_run(reply: Reply, tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: reply)
    folder = subject(tmp_path / "sae", 40)
    result = invoke(folder, server, "--retries", 0, "--concurrency", 2)
    assert result.exit_code == 1
    assert "10 answers in a row were lost" in result.stderr
    assert 10 <= len(lines(folder)) <= 12


def test_an_answer_that_was_cut_short_is_asked_for_again_with_a_larger_limit(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good() if body["max_tokens"] > 512 else message("", "length"))
    folder = subject(tmp_path / "sae", 2)
    for more, requests, outcome in (
        ((), 2, "unparsed"),
        ((), 2, "unparsed"),
        (("--max-output-tokens", 900), 4, "answered"),
    ):
        assert invoke(folder, server, *more).exit_code == 0
        assert server.asked.total() == requests
        assert {line["outcome"] for line in read_interpretations(folder).values()} == {outcome}


def test_a_prompt_that_was_too_long_is_marked_as_shortened(tmp_path: Path, serve: Serve) -> None:
    act = unless_shorter(failing(400, None, TOO_LONG))
    server = serve(lambda latent, nth, body: act(nth, body))
    folder = subject(tmp_path / "sae", 1)
    assert invoke(folder, server).exit_code == 0
    (line,) = lines(folder)
    assert line["halved"] == 2
    assert [body["messages"][0]["content"].count("Context:") for body in server.bodies] == [5, 2, 1]


@pytest.mark.parametrize("key", ["x", "none", "EMPTY", "ollama", "sk-no-key"])
def test_a_key_that_is_a_word_is_not_cut_out_of_answers(
    key: str, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(lambda latent, nth, body: good(explanation=f"{key}: text about {key}"))
    folder = subject(tmp_path / "sae", 1)
    assert invoke(folder, server).exit_code == 0
    assert lines(folder)[0]["explanation"] == f"{key}: text about {key}"
    assert server.keys == {f"Bearer {key}"}


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("HTTPS_PROXY", "foo://user:hidden@bar", "HTTPS_PROXY"),
        ("HTTP_PROXY", "localhost:abc", "HTTPS_PROXY"),
        ("SSL_CERT_FILE", "/nonexistent.pem", "SSL_CERT_FILE"),
        ("HTTP_PROXY", "http://user:hidden@127.0.0.1:1", "through the proxy in the environment"),
    ],
)
def test_a_proxy_or_certificate_that_does_not_work_is_one_line(
    variable: str, value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(variable, value)
    monkeypatch.delenv("NO_PROXY", raising=False)
    folder = subject(tmp_path / "sae", 1)
    server = Address("http://server.invalid/v1")
    result = invoke(folder, server, "--retries", 0)  # type: ignore[arg-type]
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert says in line
    assert "hidden" not in line


class Address(NamedTuple):
    url: str
