"""interpret from contexts to summaries: what is asked, kept, continued, paid and refused."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from routesae.analyze.interpret.run import interpret
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.analyze.interpret.summary import Summary, read_summary
from routesae.cli import main
from routesae.machine.files import signed
from routesae.reporting import WrongInput
from routesae.tests.analyze.interpret.chat_server import (
    KEY,
    Reply,
    Serve,
    arguments,
    asked,
    assert_no_key_below,
    completion,
    failing,
    good,
    invoke,
    lines,
    subject,
)
from routesae.tests.processes import Command


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
    command = arguments(folder, server, "--concurrency", 3, "--latents", "all")
    kept = b""
    for _ in range(kills):
        replied = server.replied.total()
        run = Command(*command, cwd=tmp_path)
        wait_until(lambda replied=replied: server.replied.total() > replied, run)
        time.sleep(moments.uniform(0, 0.4))
        run.kill()
        assert run.wait() == -signal.SIGKILL
        before, kept = kept, ledger.read_bytes()
        assert kept.startswith(before)  # answers are kept to the byte, and only added to
        kept = kept[: kept.rfind(b"\n") + 1]  # behind it is room for the answers under way
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
    run = Command(*arguments(folder, server, "--concurrency", 4), cwd=tmp_path)
    wait_until(lambda: server.replied.total() >= 4, run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "the same command continues" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(server.asked.elements()) == sorted(line["latent"] for line in lines(folder))
    assert json.loads((folder / "interpretations.json").read_text())["not_asked"] == 40 - len(lines(folder))


def wait_until(condition: Callable[[], bool], run: Command) -> None:
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
    answered = int(reply[0] != 403)  # a 403 in the middle of a run may be about one prompt
    server = serve(lambda latent, nth, body: good() if server.asked.total() <= answered else reply)
    folder = subject(tmp_path / "sae", 12)
    result = invoke(folder, server, "--concurrency", 1)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("routesae: ")
    assert expected in line
    assert KEY not in result.output
    assert server.asked.total() == answered + 1
    assert len(lines(folder)) == answered
    assert json.loads((folder / "interpretations.json").read_text())["explained"] == answered


@pytest.mark.parametrize(
    ("latents", "said", "asked_at_most"),
    [(40, "10 answers in a row were lost", 12), (3, "3 questions got no answer (the connection to", 3)],
)
def test_a_server_that_is_down_ends_the_run(
    latents: int, said: str, asked_at_most: int, tmp_path: Path, serve: Serve
) -> None:
    server = serve(lambda latent, nth, body: None)
    server.close()
    folder = subject(tmp_path / "sae", latents)
    result = invoke(folder, server, "--retries", 0, "--concurrency", 2)
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(lines(folder)) <= asked_at_most


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


def test_an_sae_without_contexts_is_named_with_what_makes_them(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    (tmp_path / "sae").mkdir()
    with pytest.raises(WrongInput, match=r"sae has no contexts; make them with routesae contexts --sae .*sae$"):
        interpret(asked(tmp_path / "sae", server))


def test_an_sae_of_the_hub_is_named_as_contexts_names_it(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routesae.analyze.inputs.saes.fetch_sae", lambda reference: tmp_path / "snapshot")
    subject(tmp_path / "saes" / "user--repo", 2)
    server = serve(lambda latent, nth, body: good())
    (summary,) = interpret(asked(Path("user/repo"), server, out=str(tmp_path / "saes")))
    assert summary["explained"] == len(lines(tmp_path / "saes" / "user--repo")) == 2


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
    for told in ("refuses response_format", "refuses temperature", "gets max_completion_tokens"):
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
    assert "--max-cost 0.32 would be exceeded" in result.stderr
    assert server.asked.total() == 5  # 5 x 0.05 + 0.1 is more; and the limit is used, though 8 may run at once
    again = invoke(folder, server, *paying, "--max-cost", 0.32)
    assert (again.exit_code, server.asked.total()) == (1, 5)
    result = invoke(folder, server, *paying, "--max-cost", 1)
    assert (result.exit_code, server.asked.total()) == (0, 12)
    assert set(server.asked.values()) == {1}


def test_a_full_disk_is_said_before_anything_is_paid_for(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way when the disk becomes full has its room already, and nothing more is asked."""
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 20)
    reserve, pwrite, full = os.posix_fallocate, os.pwrite, Path(folder / "full")

    def reserving(file: int, offset: int, size: int) -> None:
        if len(lines(folder)) >= 4:
            full.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, size)

    def writing(file: int, data: bytes, offset: int) -> int:
        assert offset + len(data) <= os.fstat(file).st_size or offset == 0  # into room that was reserved
        return pwrite(file, data, offset)

    def summing(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "posix_fallocate", reserving)
    monkeypatch.setattr(os, "pwrite", writing)
    monkeypatch.setattr("routesae.analyze.interpret.run.write_json", summing)
    result = invoke(folder, server, "--concurrency", 3)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert "interpretations.jsonl cannot be written: [Errno 28] No space left on device" in result.stderr
    assert full.exists()
    assert server.asked.total() == len(lines(folder)) < 20  # each that was paid for is there
    monkeypatch.undo()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert invoke(folder, server).exit_code == 0
    assert set(server.asked.values()) == {1}


def test_begun_anew_the_earlier_answers_are_set_aside(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 2, samples=8)
    interpret(asked(folder, server, scores=("fuzzing",)))
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".jsonl", ".json")}
    interpret(asked(folder, server, model="other/model", overwrite=True))
    for name, content in whole.items():
        kept = [file for file in folder.iterdir() if file.is_file() and file.read_bytes() == content]
        stem, _, suffix = name.rpartition(".")
        assert [re.fullmatch(rf"{stem}\.gpt-4o-\w+\.{suffix}", file.name) is not None for file in kept] == [True]


def test_a_summary_that_was_altered_is_one_line(tmp_path: Path, serve: Serve) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 2)
    interpret(asked(folder, server))
    path = folder / "interpretations.json"
    whole = json.loads(path.read_text())
    assert read_summary(folder) == Summary(score=4.0, unanswered=0, last_loss=None)
    odd: list[Any] = [{**whole, "score": 5.0}, *({**whole, "score": [1]}, {"score": None}, [1], "x")]
    for value in (*odd, signed({**whole, "score": "4"}), signed({**whole, "unanswered": -1}), signed({})):
        path.write_text(json.dumps(value))
        with pytest.raises(WrongInput, match=r"interpretations.json cannot be read \(.*\); the same") as refusal:
            read_summary(folder)
        assert "\n" not in str(refusal.value)
    interpret(asked(folder, server))
    assert json.loads(path.read_text()) == whole
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WrongInput, match="not a regular file"):
        read_summary(folder)


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
    flags = ["interpret", "--sae", str(folder), "--latents", "2", "--dry-run"]
    scored = CliRunner().invoke(main, [*flags, "--score", "fuzzing"]).stdout
    assert scored.splitlines()[-1].endswith("; not counting --score fuzzing, which asks later")
    elsewhere = CliRunner().invoke(main, [*flags, "--out", str(tmp_path / "results")])
    assert (elsewhere.exit_code, "is where SAEs are looked for" in elsewhere.stderr) == (2, True)
    result = CliRunner().invoke(main, flags)
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
    assert re.match("2 routesae: .*interpretations.jsonl is in use by process", refusals[0])
