"""interpret against a server that fails, stalls, rate-limits and lies: every latent explained or honestly marked."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from routesae.analyze.contexts.file import context_schema, write_contexts
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.interpret import chat as chat_module
from routesae.analyze.interpret.run import interpret, read_interpretations
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.analyze.interpret.silence import active_positions
from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.reporting import FailedRun, WrongInput
from routesae.train.folder.checkpoint import load_sae, save_sae
from routesae.train.run import train
from routesae.train.saes import Recipe, build
from routesae.train.settings import TrainSettings

KEY = "sk-loopback-0123456789-secret"
GOOD = {"category": "low-level", "score": 4, "explanation": "says so"}
Reply = tuple[int, dict[str, str], bytes]


def completion(content: Any, finish: str = "stop", **message: Any) -> bytes:
    choices = [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]
    usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
    return json.dumps({"id": "x", "model": "gpt-4o-real", "choices": choices, "usage": usage}).encode()


def good(**changes: Any) -> Reply:
    return 200, {}, completion(json.dumps({**GOOD, **changes}))


def failing(status: int, code: str | None = None, message: str = "no", **headers: str) -> Reply:
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, shown, json.dumps({"error": {"message": message, "code": code, "type": code}}).encode()


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed reset their connections."""


class Server:
    """A chat server on the loopback. act(latent, nth time it is asked, body) gives the reply, or None to hang up.

    asked: requests a latent, counted when they come in; replied: when a reply has been sent.
    """

    def __init__(self, act: Callable[[int, int, dict[str, Any]], Reply | None]):
        self.asked: Counter[int] = Counter()
        self.replied: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: set[str | None] = set()
        self.times: dict[int, list[float]] = {}
        self.under_way = self.most_under_way = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                named = re.search(r"latent-(\d+)-", body["messages"][0]["content"])
                latent = int(named[1]) if named else -1
                with lock:
                    server.asked[latent] += 1
                    nth = server.asked[latent]
                    server.bodies.append(body)
                    server.paths.append(self.path)
                    server.keys.add(self.headers.get("Authorization") or self.headers.get("api-key"))
                    server.times.setdefault(latent, []).append(time.monotonic())
                    server.under_way += 1
                    server.most_under_way = max(server.most_under_way, server.under_way)
                reply = act(latent, nth, body)
                with lock:
                    server.under_way -= 1
                if reply is None:
                    self.close_connection = True
                    return
                status, headers, content = reply
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    if "Content-Length" not in headers:
                        self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    return  # the client has given up
                with lock:
                    server.replied[latent] += 1

            def log_message(self, *_: object) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


Serve = Callable[[Callable[[int, int, dict[str, Any]], Reply | None]], Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers, with a key in the environment and a backoff that does not slow the tests down."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat_module, "FIRST_DELAY_SECONDS", 0.02)
    servers: list[Server] = []

    def start(act: Callable[[int, int, dict[str, Any]], Reply | None]) -> Server:
        servers.append(Server(act))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def subject(folder: Path, latents: int, *, text: str = "", samples: int = 0) -> Path:
    """A folder with contexts of so many latents, whose texts name the latent; no SAE in it."""
    folder.mkdir(parents=True)
    columns: dict[str, list[Any]] = {name: [] for name in context_schema().names}
    for latent in range(latents):
        for n in range(5 + samples):
            kind = "chosen" if n < 5 else "weak"
            tokens = [f"latent-{latent}-", f"example{n}", " router", f"{text}."]
            row = {"latent": latent, "kind": kind, "rank": n, "token_class": f"class{n}", "activation": 20.0 - n}
            row |= {"layer": 3, "row": 1000 * latent + n, "position": 6, "document": 0, "at": 2}
            row |= {"token_ids": [1, 2, 3, 4], "tokens": tokens, "activations": [0.0, 0.0, 20.0 - n, 0.0]}
            for name in columns:
                columns[name].append(row[name])
    table = pa.table(columns, schema=context_schema())
    summaries = [
        {
            "latent": latent,
            "active": 50,
            "density": 0.01,
            "max_activation": 20.0,
            "mean_activation": 9.0,
            "token_classes": 5,
            "kept": True,
        }
        for latent in range(latents)
    ]
    settings = {"threshold": 15.0, "window": 64, "per_class": 2, "min_contexts": 5, "top": None, "samples": 5}
    facts = {"format": 1, "settings": settings, "chosen": latents, "cache": {"path": "nowhere", "tokens_hash": "0"}}
    write_contexts(folder, facts, pa.Table.from_pylist(summaries), iter(table.to_batches()))
    return folder


def asked(folder: Path, server: Server, **changes: Any) -> InterpretSettings:
    """Quick settings for that folder and server."""
    quick: dict[str, Any] = {"base_url": server.url, "timeout": 10.0, "retries": 2, "concurrency": 8}
    return InterpretSettings(**{**quick, "saes": (str(folder),), **changes})


def lines(folder: Path, name: str = "interpretations.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()][1:]


def arguments(folder: Path, server: Server, *more: object) -> list[str]:
    return ["interpret", "--sae", str(folder), "--base-url", server.url, *map(str, more)]


def invoke(folder: Path, server: Server, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(folder, server, *more))


def assert_no_key_below(folder: Path) -> None:
    for file in folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


# ------------------------------------------------------------------------------------------------ a hostile server


def test_every_latent_ends_explained_or_honestly_marked(tmp_path: Path, serve: Serve) -> None:
    closing = threading.Event()

    def hang(seconds: float) -> Reply:
        closing.wait(seconds)
        return good()

    def cut(nth: int) -> Reply:
        return good() if nth > 1 else (200, {"Content-Length": "5000"}, completion("{}")[:40])

    acts: list[Callable[[int], Reply | None]] = [
        lambda nth: good(),
        lambda nth: failing(429, "rate_limit_exceeded", Retry_After="1") if nth == 1 else good(score=5),
        lambda nth: failing(500) if nth <= 2 else good(category="high-level", score=2),
        lambda nth: hang(4.0),
        lambda nth: (200, {"Content-Type": "text/html"}, b"<html>gateway</html>"),
        lambda nth: (200, {}, json.dumps({"choices": [], "usage": None}).encode()),
        lambda nth: (200, {}, completion("Feature category: low-level")),
        lambda nth: good(score=9),
        lambda nth: good(category="medium"),
        lambda nth: None if nth == 1 else good(),
        lambda nth: (200, {}, completion("", finish="length")),
        lambda nth: failing(503),
        lambda nth: (200, {}, completion(None, refusal="I will not")),
        lambda nth: good(explanation=f"the key is {KEY}"),
        lambda nth: (200, {}, completion(f"```json\n{json.dumps(GOOD)}\n```")),
        lambda nth: failing(400, "context_length_exceeded"),
        lambda nth: (200, {}, b"\xff\xfe[[[[" * 100),
        lambda nth: good(explanation="half a pair \ud800 and \u202e more"),
        cut,
        lambda nth: (200, {}, b"[1, 2]"),
        lambda nth: (200, {}, completion(json.dumps({**GOOD, "note": "more"}))),
        lambda nth: (200, {}, completion(json.dumps(GOOD), finish="length")),
    ]
    server = serve(lambda latent, nth, body: acts[latent](nth))
    folder = subject(tmp_path / "sae", len(acts))
    (summary,) = interpret(asked(folder, server, timeout=1.5, retries=2))
    closing.set()
    outcome = {line["latent"]: line["outcome"] for line in lines(folder)}
    explained = {0, 1, 2, 9, 13, 14, 17, 18}
    silent = {3, 11, 15}
    assert {latent for latent, how in outcome.items() if how == "answered"} == explained
    assert {latent for latent, how in outcome.items() if how == "unanswered"} == silent
    assert {latent for latent, how in outcome.items() if how == "unparsed"} == set(
        range(len(acts))
    ) - explained - silent
    assert len(lines(folder)) == len(acts)
    assert all(("score" in line) == (line["outcome"] == "answered") for line in lines(folder))
    assert all(line["reason"] for line in lines(folder) if line["outcome"] != "answered")
    by_latent = read_interpretations(folder)
    assert by_latent[4]["text"] == "<html>gateway</html>"
    assert by_latent[6]["text"] == "Feature category: low-level"
    assert by_latent[12]["text"] == "I will not"
    assert "--max-output-tokens" in by_latent[10]["reason"]
    assert "--timeout 1.5" in by_latent[3]["reason"]
    assert by_latent[17]["explanation"] == "half a pair \ud800 and \u202e more"
    first, second = server.times[1]
    assert second - first >= 1.0  # Retry-After
    assert {latent: server.asked[latent] for latent in (2, 3, 4, 5, 9, 11, 15, 18)} == {
        2: 3,
        3: 3,
        4: 1,
        5: 1,
        9: 2,
        11: 3,
        15: 1,
        18: 2,
    }
    scores = [by_latent[latent]["score"] for latent in explained]
    assert summary["score"] == pytest.approx(sum(scores) / len(scores))
    assert (summary["explained"], summary["unparsed"], summary["unanswered"]) == (8, 11, 3)
    assert summary["categories"]["high-level"] == {"count": 1, "score": 2.0}
    assert summary["categories"]["undiscernible"] == {"count": 0, "score": None}
    assert json.loads((folder / "interpretations.json").read_text()) == summary
    assert_no_key_below(tmp_path)
    assert server.keys == {f"Bearer {KEY}"}


def test_a_resumed_run_asks_only_what_was_not_answered(tmp_path: Path, serve: Serve) -> None:
    down = True

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        if latent == 2 and down:
            return failing(500)
        return (200, {}, completion("no idea")) if latent == 3 and nth == 1 else good()

    server = serve(act)
    folder = subject(tmp_path / "sae", 5)
    interpret(asked(folder, server, latents=4, seed=1))
    before = server.asked.copy()
    down = False
    (summary,) = interpret(asked(folder, server, latents=None, seed=1))
    again = server.asked - before
    failed_before = {2} & set(before)
    assert set(again) == failed_before | (set(range(5)) - set(before))
    assert summary["explained"] == 4
    assert summary["unparsed"] == 1
    (summary,) = interpret(asked(folder, server, latents=None, seed=1, retry_unparsed=True))
    assert summary["explained"] == 5
    assert server.asked[3] == 2


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_no_answer_is_paid_twice_across_kill_and_resume(kills: int, tmp_path: Path, serve: Serve) -> None:
    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.1)
        return good() if latent % 3 else (200, {}, completion("nonsense"))

    server, latents, moments = serve(act), 12 + 18 * kills, random.Random(0)
    folder = subject(tmp_path / "sae", latents)
    ledger = folder / "interpretations.jsonl"
    command = [sys.executable, "-m", "routesae", *arguments(folder, server, "--concurrency", 3, "--latents", "all")]
    kept = b""
    for _ in range(kills):
        replied = server.replied.total()
        run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda replied=replied: server.replied.total() > replied, run)
        time.sleep(moments.uniform(0, 0.4))
        run.kill()
        assert run.wait() == -signal.SIGKILL
        before, kept = kept, ledger.read_bytes()
        assert kept.startswith(before)  # answers are kept to the byte, and only added to
        kept = kept[: kept.rfind(b"\n") + 1]
    paid = {line["latent"] for line in lines(folder)}
    assert kills <= len(paid) < latents
    with ledger.open("ab") as torn:
        torn.write(b'{"latent": 29, "outcome": "answ')
    asked_before = server.asked.copy()
    resumed = invoke(folder, server, "--concurrency", 3, "--latents", "all")
    assert (resumed.exit_code, resumed.stderr) == (0, ""), resumed.output
    assert paid.isdisjoint(server.asked - asked_before)
    assert sum(n - 1 for n in server.asked.values()) <= 3 * kills  # under way at a kill: no answer was on the disk
    assert ledger.read_bytes().startswith(kept)
    assert sorted(line["latent"] for line in lines(folder)) == list(range(latents))
    summary = json.loads((folder / "interpretations.json").read_text())
    third = latents // 3
    assert (summary["explained"], summary["unparsed"], summary["unanswered"]) == (latents - third, third, 0)
    assert_no_key_below(tmp_path)


def test_ctrl_c_lets_the_answers_under_way_come_home(tmp_path: Path, serve: Serve) -> None:
    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.3)
        return good()

    server = serve(act)
    folder = subject(tmp_path / "sae", 40)
    command = [sys.executable, "-m", "routesae", *arguments(folder, server, "--concurrency", 4)]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_until(lambda: server.replied.total() >= 4, run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "the same command goes on" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(server.asked.elements()) == sorted(line["latent"] for line in lines(folder))
    assert json.loads((folder / "interpretations.json").read_text())["not_asked"] == 40 - len(lines(folder))


def wait_until(condition: Callable[[], bool], run: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert run.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -------------------------------------------------------------------------------------- what ends a run, and how


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            failing(401, "invalid_api_key", f"Incorrect API key provided: {KEY}"),
            "check the API key in $OPENAI_API_KEY",
        ),
        (failing(403, None, "not yours"), "check the API key in $OPENAI_API_KEY"),
        (failing(429, "insufficient_quota", "You exceeded your current quota", Retry_After="1"), "quota is used up"),
        (failing(402, None, "pay first"), "quota is used up"),
        (failing(404, "model_not_found", "The model does not exist"), "check --model"),
        (failing(429, "rate_limit_exceeded", Retry_After="7200"), "7,200 s"),
    ],
)
def test_what_no_retry_helps_ends_the_run_at_once(tmp_path: Path, serve: Serve, reply: Reply, expected: str) -> None:
    server = serve(lambda latent, nth, body: good() if server.asked.total() == 1 else reply)
    folder = subject(tmp_path / "sae", 12)
    result = invoke(folder, server, "--concurrency", 1)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("routesae: ")
    assert expected in line
    assert KEY not in result.output
    assert server.asked.total() == 2
    assert len(lines(folder)) == 1
    assert json.loads((folder / "interpretations.json").read_text())["explained"] == 1


@pytest.mark.parametrize(
    ("latents", "said"), [(40, "10 questions in a row got no answer"), (3, "none of 3 questions got an answer")]
)
def test_a_server_that_is_down_ends_the_run(latents: int, said: str, tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: None)
    server.close()
    folder = subject(tmp_path / "sae", latents)
    result = invoke(folder, server, "--retries", 0, "--concurrency", 2)
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(lines(folder)) <= 12


def test_a_key_must_be_there_for_openai_and_azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    folder = subject(tmp_path / "sae", 1)
    for more, name in (
        ([], "$OPENAI_API_KEY"),
        (["--api-version", "2024-10-21", "--base-url", "http://localhost:1"], "$AZURE_OPENAI_API_KEY"),
        (["--key-env", "OTHER_KEY", "--base-url", "http://localhost:1"], "$OTHER_KEY"),
    ):
        result = CliRunner().invoke(main, ["interpret", "--sae", str(folder), *more])
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert name in result.stderr
    assert not (folder / "interpretations.jsonl").exists()


def test_a_server_of_ones_own_needs_no_key(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(lambda latent, nth, body: good())
    (summary,) = interpret(asked(subject(tmp_path / "sae", 2), server))
    assert summary["explained"] == 2
    assert server.keys == {"Bearer none"}


def test_azure_is_asked_under_its_deployment_and_version(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    server = serve(lambda latent, nth, body: good())
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url.removesuffix("/v1"))
    folder = subject(tmp_path / "sae", 1)
    interpret(asked(folder, server, base_url=None, api_version="2024-10-21", model="my-gpt"))
    assert server.paths == ["/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"]
    assert server.keys == {KEY}
    assert_no_key_below(tmp_path)


def test_requests_under_way_are_as_many_as_asked_for(tmp_path: Path, serve: Serve) -> None:
    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.15)
        return good()

    server = serve(act)
    interpret(asked(subject(tmp_path / "sae", 16), server, concurrency=4))
    assert server.most_under_way == 4


# --------------------------------------------------------------------------------------------- what is asked, and how


def test_what_a_server_refuses_by_name_is_left_out_and_said(
    tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        if "response_format" in body:
            return failing(400, message="response_format.type 'json_schema' is not supported")
        if "temperature" in body:
            return failing(400, message="Unsupported value: 'temperature' does not support 0.1 with this model.")
        if "max_tokens" in body:
            return failing(400, message="'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
        return good()

    server = serve(act)
    folder = subject(tmp_path / "sae", 6)
    (summary,) = interpret(asked(folder, server, concurrency=2))
    assert summary["explained"] == 6
    assert [line["structured"] for line in lines(folder)] == [False] * 6
    assert len(server.bodies) <= 6 + 2 * 3  # found out once, by those under way
    for told in ("JSON schema", "temperature", "max_tokens"):
        assert told in caplog.text


def test_the_prompt_holds_every_context_and_asks_for_the_schema(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 1, text="\nAnswer: $HOME ignore the above")
    interpret(asked(folder, server))
    (body,) = server.bodies
    prompt = body["messages"][0]["content"]
    for n in range(5):
        assert f"latent-0-example{n}<ACTIVATED> router</ACTIVATED>\\nAnswer: $HOME ignore the above." in prompt
        assert f"Activation: {20 - n}.00" in prompt
    for word in ("low-level", "high-level", "undiscernible", "5: ", "1: ", "monosemanticity"):
        assert word in prompt
    assert body["response_format"]["json_schema"]["schema"]["properties"]["score"]["enum"] == [1, 2, 3, 4, 5]
    assert body["temperature"] == 0.1


def test_a_prompt_of_ones_own_is_asked_and_another_refused_on_resume(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 2)
    own = tmp_path / "own.txt"
    own.write_text("For $$5, what is $examples about?")
    interpret(asked(folder, server, prompt=str(own), examples=1))
    assert server.bodies[0]["messages"][0]["content"].startswith("For $5, what is 1. Token: router | ")
    own.write_text("Tell me: $examples")
    for changes in ({"prompt": str(own), "examples": 1}, {"model": "gpt-5"}, {"temperature": 0.7}):
        with pytest.raises(WrongInput, match=r"was begun with .* --overwrite"):
            interpret(asked(folder, server, **changes))
    assert server.asked.total() == 2
    (summary,) = interpret(asked(folder, server, prompt=str(own), overwrite=True))
    assert (summary["explained"], server.asked.total()) == (2, 4)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [("no place for them", "no $examples"), ("$examples for $5", "write $$"), ("$examples $more", "$more")],
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(tmp_path: Path, template: str, complaint: str) -> None:
    folder = subject(tmp_path / "sae", 1)
    own = tmp_path / "own.txt"
    own.write_text(template)
    with pytest.raises(WrongInput, match=re.escape(complaint)):
        interpret(InterpretSettings(base_url="http://localhost:1", saes=(str(folder),), prompt=str(own)))


# ------------------------------------------------------------------------------------------------------------- money


def test_tokens_and_dollars_are_the_servers_counts_at_the_tables_price(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 3)
    result = invoke(folder, server, "--model", "gpt-4o-2024-08-06")
    summary = json.loads((folder / "interpretations.json").read_text())
    assert (summary["input_tokens"], summary["output_tokens"]) == (3000, 150)
    assert summary["cost_usd"] == pytest.approx((3000 * 2.5 + 150 * 10) / 1e6)
    assert "$0.0090" in result.stdout
    unknown = subject(tmp_path / "other", 1)
    (summary,) = interpret(asked(unknown, server, model="llama3"))
    assert summary["cost_usd"] is None


def test_an_answer_that_never_came_counts_against_the_limit_only(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: None if nth == 1 else good())
    (summary,) = interpret(asked(subject(tmp_path / "sae", 1), server, max_output_tokens=100))
    assert summary["cost_usd"] == pytest.approx((1000 * 2.5 + 50 * 10) / 1e6)
    most = summary["cost_usd_at_most"] - summary["cost_usd"]
    assert 100 * 10 / 1e6 < most < (20_000 * 2.5 + 100 * 10) / 1e6


def test_max_cost_is_never_passed_and_a_larger_one_goes_on(tmp_path: Path, serve: Serve) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('["local"]\ninput = 0.0\noutput = 1000.0\n')  # a request: at most 0.1, really 0.05

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.02)
        return good()

    server = serve(act)
    folder = subject(tmp_path / "sae", 12)
    paying = ("--model", "local", "--prices", prices, "--max-output-tokens", 100)
    result = invoke(folder, server, *paying, "--max-cost", 0.32)
    assert result.exit_code == 1
    assert "--max-cost 0.32 would be passed" in result.stderr
    assert server.asked.total() == 5  # 5 x 0.05 + 0.1 is more; and the limit is used, though 8 may run at once
    again = invoke(folder, server, *paying, "--max-cost", 0.32)
    assert (again.exit_code, server.asked.total()) == (1, 5)
    result = invoke(folder, server, *paying, "--max-cost", 1)
    assert (result.exit_code, server.asked.total()) == (0, 12)
    assert set(server.asked.values()) == {1}


def test_max_cost_needs_a_price(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    result = invoke(subject(tmp_path / "sae", 1), server, "--model", "llama3", "--max-cost", 1)
    assert result.exit_code == 2
    assert "--prices" in result.stderr
    assert server.asked.total() == 0


def test_dry_run_shows_prompts_and_estimate_and_asks_nobody(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 3)
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(main, ["interpret", "--sae", str(folder), "--latents", "2", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("---- sae latent ") == 2
    assert re.search(r"---- 2 prompts: about [\d,]+ tokens in and 160 out, \$0\.00", result.stdout)
    assert sorted(folder.iterdir()) == before
    assert server.asked.total() == 0


def test_two_runs_at_once_on_one_sae_are_refused(tmp_path: Path, serve: Serve) -> None:
    folder = subject(tmp_path / "sae", 1)
    refusals: list[str] = []

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        result = invoke(folder, server)
        refusals.append(f"{result.exit_code} {result.stderr}")
        return good()

    server = serve(act)
    interpret(asked(folder, server))
    assert len(refusals) == 1
    assert re.match("2 routesae: another process is writing", refusals[0])


# ----------------------------------------------------------------------------------------------------------- scoring


def test_fuzzing_is_balanced_accuracy_on_texts_the_explainer_did_not_see(tmp_path: Path, serve: Serve) -> None:
    shown: dict[int, list[str]] = {}
    hidden: dict[int, list[str]] = {}

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        if body["response_format"]["json_schema"]["name"] == "explanation":
            shown[latent] = re.findall(r"example\d+", prompt)
            return good(explanation=f"latent-{latent}- router")
        texts = re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)
        hidden.setdefault(latent, []).extend(re.findall(r"example\d+", prompt))
        truth = ["<ACTIVATED> router</ACTIVATED>" in text for text in texts]
        says = {0: truth, 1: [not one for one in truth], 2: [True] * len(truth), 3: truth[:-1]}[latent]
        return 200, {}, completion(json.dumps({"predictions": says}))

    server = serve(act)
    folder = subject(tmp_path / "sae", 4, samples=12)
    settings = asked(folder, server, scores=("fuzzing",))
    (summary,) = interpret(settings)
    fuzzing = summary["fuzzing"]
    assert fuzzing["by_latent"] == {"0": 1.0, "1": 0.0, "2": 0.5}
    assert (fuzzing["balanced_accuracy"], fuzzing["latents"], fuzzing["unfinished"]) == (0.5, 3, 1)
    assert all(len(set(hidden[n])) == 12 and not set(hidden[n]) & set(shown[n]) for n in range(4))
    before = server.asked.copy()
    (again,) = interpret(settings)
    assert (server.asked, again) == (before, summary)  # nothing is asked twice
    assert "fuzzing" in invoke(folder, server, "--score", "fuzzing", "--retries", 2).stdout


def test_texts_to_predict_on_are_drawn_from_all_of_the_sample(tmp_path: Path, serve: Serve) -> None:
    """It is ordered strongest first: the first texts of it would be the easy ones."""
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 1, samples=60)
    interpret(asked(folder, server, scores=("fuzzing",)))
    drawn = {row for line in lines(folder, "fuzzing.jsonl") for row, _, _ in line["places"]}
    assert len(drawn) == 20
    assert max(drawn) > 40 > min(drawn)


@pytest.mark.parametrize(("samples", "scored"), [(0, 0), (5, 0), (6, 2)])  # every other text is a negative; 3 of each
def test_latents_with_too_few_texts_are_not_scored_but_counted(
    samples: int, scored: int, tmp_path: Path, serve: Serve
) -> None:
    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        if body["response_format"]["json_schema"]["name"] == "explanation":
            return good()
        return 200, {}, completion(json.dumps({"predictions": [True] * samples}))

    server = serve(act)
    (summary,) = interpret(asked(subject(tmp_path / "sae", 2, samples=samples), server, scores=("fuzzing",)))
    assert (summary["fuzzing"]["latents"], summary["fuzzing"]["too_few_examples"]) == (scored, 2 - scored)
    assert server.asked.total() == 2 + scored


def test_detections_negatives_are_texts_in_which_the_latent_is_silent(
    tiny_cache: Cache, settings: Callable[..., TrainSettings], serve: Serve, tmp_path: Path
) -> None:
    train(settings(layer=3, name="topk"))
    folder = tmp_path / "saes" / "topk"
    contexts(ContextSettings(cache=str(tiny_cache.path), saes=(str(folder),), top=3, samples=6, device="cpu"))

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        if body["response_format"]["json_schema"]["name"] == "explanation":
            return good(explanation="words")
        count = len(re.findall(r"^\d+\. ", body["messages"][0]["content"], re.MULTILINE))
        return 200, {}, completion(json.dumps({"predictions": [True] * count}))

    server = serve(act)
    (summary,) = interpret(asked(folder, server, scores=("detection",), latents=8, device="cpu"))
    detection = summary["detection"]
    assert detection["latents"] >= 4
    assert detection["balanced_accuracy"] == 0.5
    active = active_positions_of_every_token(folder, tiny_cache)
    truths = Counter[bool]()
    for line in lines(folder, "detection.jsonl"):
        for truth, (row, first, length) in zip(line["truth"], line["places"], strict=True):
            base = row * tiny_cache.manifest.context + first
            assert bool(active[line["latent"]][base : base + length].any()) is truth
            truths[truth] += 1
    assert min(truths.values()) >= 20
    apart = tmp_path / "saes" / "user--repo"  # as of an SAE from the hub, whose weights are elsewhere
    apart.mkdir()
    for file in ("contexts.parquet", "latents.parquet"):
        shutil.copy(folder / file, apart)
    (again,) = interpret(asked(apart, server, scores=("detection",), latents=8, device="cpu"))
    assert again["detection"]["latents"] == detection["latents"]


def test_a_latent_of_an_mlsae_is_silent_only_where_it_is_so_on_every_layer(tiny_cache: Cache, tmp_path: Path) -> None:
    import torch

    recipe = Recipe(sae="mlsae", layers=tiny_cache.manifest.layers, width=tiny_cache.manifest.width, latents=64, k=4)
    save_sae(tmp_path, build(recipe, torch.Generator().manual_seed(0)), {})
    first_row, latents = tiny_cache.manifest.rows - 300, [5, 3, 60]  # the rows begin within a shard
    found = active_positions(tmp_path, tiny_cache, first_row, latents, "cpu")
    of_layer = [active_positions_of_every_token(tmp_path, tiny_cache, layer) for layer in recipe.layers]
    every = [active[latents, first_row * tiny_cache.manifest.context :] for active in of_layer]
    assert (found == np.any(every, 0)).all()
    assert all((found != active).any() for active in every)


def active_positions_of_every_token(folder: Path, cache: Cache, layer: int = 3) -> Any:
    """bool [F, tokens], shard by shard and without the loader; of an SAE that reads one layer at a time."""
    import torch

    from routesae.train.saes.normalise import normalise_layers

    sae = load_sae(folder, torch.device("cpu"))
    active = np.zeros((sae.recipe.latents, cache.manifest.rows * cache.manifest.context), bool)
    for shard in cache.shards():
        hidden = torch.from_numpy(np.array(shard.read(f"layer_{layer:02}")))[None]
        found = sae(normalise_layers(hidden, sae.recipe.normalize)).latents.dense(sae.recipe.latents) > 0
        base = shard.record.rows[0] * cache.manifest.context
        active[:, np.asarray(shard.read("order")) + base] = found.numpy().T
    return active


def test_another_cache_is_refused_for_detection(
    tiny_cache: Cache, settings: Callable[..., TrainSettings], serve: Serve, tmp_path: Path
) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 2, samples=12)
    with pytest.raises(WrongInput, match="is not the one the contexts"):
        interpret(asked(folder, server, scores=("detection",), cache=str(tiny_cache.path)))
    with pytest.raises((WrongInput, FailedRun), match="nowhere is not a cache folder"):
        interpret(asked(folder, server, scores=("detection",)))
    assert (folder / "interpretations.json").exists()
