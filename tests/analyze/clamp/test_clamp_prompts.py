"""What becomes a prompt: texts, lines of files, conversations and HH-RLHF pairs."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from routesae.analyze.clamp.prompts import Message, Prompt, hh_turns, read_prompts
from routesae.analyze.clamp.run import _asked
from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.inputs.lm import LM, load_lm
from routesae.reporting import FailedRun, WrongInput

CHOSEN = (
    "\n\nHuman: What is a row?\n\nAssistant: Tokens.\nMany of them.\n\nHuman: Is 'Human: x' one?\n\nAssistant: No."
)
REJECTED = (
    "\n\nHuman: What is a row?\n\nAssistant: Tokens.\nMany of them.\n\nHuman: Is 'Human: x' one?\n\nAssistant: Yes."
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def read(file: Path | None = None, *texts: str, **changes: Any) -> list[Prompt]:
    prompts = None if file is None else str(file)
    return read_prompts(ClampSettings(prompt=texts, prompts=prompts, ablate=("0",), **changes))


def jsonl(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_texts_of_the_command_line_come_before_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("third one\n\n  \nfourth: naïve\r\n")
    prompts = read(tmp_path / "more.txt", "first", "second")
    assert [prompt.text for prompt in prompts] == ["first", "second", "third one", "fourth: naïve"]
    assert [prompt.origin for prompt in prompts[1:3]] == ["--prompt 2", f"{tmp_path / 'more.txt'}:1"]
    assert prompts[0].messages == (message("user", "first"),)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_limit_counts_prompts_of_both(tmp_path: Path, limit: int) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "b"}, {"chosen": CHOSEN, "rejected": REJECTED}, "never looked at")
    with pytest.raises(WrongInput, match=r"p\.jsonl:3: a JSON str, not an object"):
        read(file, "a")
    assert [prompt.origin for prompt in read(file, "a", max_prompts=limit)] == [
        "--prompt 1",
        f"{file}:1",
        f"{file}:2, turn 1",
    ][:limit]
    assert [prompt.text for prompt in read(None, "a", "b", "c", "d", max_prompts=limit)] == ["a", "b", "c"][:limit]


def test_a_field_of_another_name_is_read(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"text": "one", "prompt": "not this"}, {"text": "two"})
    assert [prompt.text for prompt in read(file, text_field="text")] == ["one", "two"]


def test_gzipped_jsonl_is_read_as_hh_rlhf_is_shipped(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps({"chosen": CHOSEN, "rejected": REJECTED}).encode()))
    assert len(read(file)) == 2
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FailedRun, match="cannot be read to its end"):
        read(file)


def test_speakers_are_told_at_the_start_of_a_paragraph_only() -> None:
    assert hh_turns(CHOSEN) == [("What is a row?", "Tokens.\nMany of them."), ("Is 'Human: x' one?", "No.")]
    assert hh_turns("\n\nHuman: left alone") == []
    assert hh_turns("Human: a\n\nAssistant: b\n\nAssistant: c") == [("a", "b\n\nc")]
    assert hh_turns("Human: a\n\nHuman: b\n\nAssistant: c") == [("a\n\nb", "c")]
    assert hh_turns("Assistant: a\n\nHuman: b\n\nAssistant: c") == [("b", "c")]
    assert hh_turns("") == []


def test_a_pair_as_a_conversation_is_a_prompt_for_each_human_turn(tmp_path: Path) -> None:
    first, second = read(jsonl(tmp_path / "hh.jsonl", {"chosen": CHOSEN, "rejected": REJECTED}))
    assert first.text == "Human: What is a row?\n\nAssistant:"
    assert second.text == (
        "Human: What is a row?\n\nAssistant: Tokens.\nMany of them.\n\nHuman: Is 'Human: x' one?\n\nAssistant:"
    )
    assert second.messages == (
        message("user", "What is a row?"),
        message("assistant", "Tokens.\nMany of them."),
        message("user", "Is 'Human: x' one?"),
    )
    assert first.replies == {"chosen": "Tokens.\nMany of them.", "rejected": "Tokens.\nMany of them."}
    assert second.replies == {"chosen": "No.", "rejected": "Yes."}


def test_a_conversation_goes_on_from_the_chosen_reply(tmp_path: Path) -> None:
    pair = {name: f"\n\nHuman: a\n\nAssistant: {name}\n\nHuman: b\n\nAssistant: c" for name in ("chosen", "rejected")}
    _, second = read(jsonl(tmp_path / "hh.jsonl", pair))
    assert second.messages == (message("user", "a"), message("assistant", "chosen"), message("user", "b"))


def test_a_pair_as_text_holds_the_rejected_reply_only_where_it_is_another(tmp_path: Path) -> None:
    (prompt,) = read(jsonl(tmp_path / "hh.jsonl", {"chosen": CHOSEN, "rejected": REJECTED}), hh="text")
    assert prompt.text == (
        "Human: What is a row?\nAssistant: Tokens.\nMany of them.\n"
        "Human: Is 'Human: x' one?\nAssistant: No.\nAssistant: Yes."
    )
    assert prompt.messages == ()  # a text, which no chat template may take for somebody's words


def test_a_pair_without_a_common_turn_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = ({"chosen": CHOSEN, "rejected": ""}, {"chosen": CHOSEN, "rejected": "\n\nHuman: a\n\nAssistant: b"})
    with caplog.at_level(logging.WARNING):
        (prompt,) = read(jsonl(tmp_path / "hh.jsonl", *pairs))
    assert prompt.origin.endswith("hh.jsonl:2, turn 1")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'hh.jsonl'}:1: no turn stands in both chosen and rejected; left out"
    ]


def test_messages_are_a_conversation(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (prompt,) = read(jsonl(tmp_path / "chat.jsonl", {"messages": messages}))
    assert prompt.messages == (message("system", "Be brief."), message("user", "Hi"))
    assert prompt.text == "Be brief.\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"body": "x", "id": 1}, r"no text in field 'prompt'.*its fields are body, id.*--text-field"),
        ({}, "its fields are none"),
        ({"prompt": 3}, "no text in field"),
        ({"chosen": "x", "rejected": 3}, "no text in field"),
        ({"prompt": "  "}, "is empty"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"chosen": "a\ud800", "rejected": ""}, "lone surrogate"),
        ({"messages": []}, "messages are not a list such as"),
        ({"messages": [{"role": "user"}]}, "messages are not a list such as"),
        ({"messages": "Hi"}, "messages are not a list such as"),
    ],
)
def test_a_line_that_holds_no_prompt_is_refused_naming_it(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=rf"p.jsonl:2.*{message}"):
        read(jsonl(tmp_path / "p.jsonl", {"prompt": "fine"}, entry))


@pytest.mark.parametrize(("line", "message"), [(b"{", "not JSON"), (b'{"prompt": "\xff"}', "not UTF-8 at byte 12")])
def test_a_line_that_is_not_json_is_refused_naming_it(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "fine"}\n' + line)
    with pytest.raises(WrongInput, match=f"p.jsonl:2: {message}"):
        read(tmp_path / "p.jsonl")


def test_a_line_of_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"fine\nno\xff")
    with pytest.raises(WrongInput, match=r"p\.txt:2: not UTF-8 at byte 2"):
        read(tmp_path / "p.txt")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("pipe.jsonl", "pipe.jsonl.gz", "pipe.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(WrongInput, match=rf"{name} is not a regular file; give a .txt"):
            read(tmp_path / name)


def test_a_line_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routesae.harvest.corpus.texts.LARGEST_BYTES", 1000)
    file = tmp_path / "bomb.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "fine"}\n{"prompt": "' + b"a" * 2000 + b'"}\n'))
    with pytest.raises(WrongInput, match=r"bomb.jsonl.gz:2: a line of .* bytes or more"):
        read(file)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(WrongInput, match=r"empty.txt holds no prompt"):
        read(tmp_path / "empty.txt")
    with pytest.raises(WrongInput, match=r"missing.txt does not exist"):
        read(tmp_path / "missing.txt")
    with pytest.raises(WrongInput, match=r"p.csv is not a file of prompts.*\.txt, \.jsonl or \.jsonl\.gz"):
        read(tmp_path / "p.csv")
    with pytest.raises(WrongInput, match=r"no prompt; give --prompt TEXT or --prompts FILE"):
        read()
    with pytest.raises(WrongInput, match=r"--prompt 2 is empty"):
        read(None, "a", " ")


@pytest.fixture
def lm(tiny_model: Path) -> LM:
    """It begins a document with token 7."""
    loaded = load_lm(str(tiny_model), device="cpu", lm_dtype="float32")
    vars(loaded)["framing"] = loaded.framing._replace(before=(7,))
    return loaded


def ids_of(lm: LM, prompt: Prompt, *, chat: bool) -> list[int]:
    ids: list[int] = _asked(ClampSettings(ablate=("0",), max_new_tokens=1), lm, prompt, chat)["input_ids"]
    return ids


def test_a_plain_prompt_begins_as_harvest_begins_a_document(lm: LM) -> None:
    (prompt,) = read(None, "the router")
    bare = lm.tokenizer("the router", add_special_tokens=False)["input_ids"]
    assert ids_of(lm, prompt, chat=False) == [7, *bare]


def test_a_chat_template_is_filled_and_adds_nothing_of_the_tokenizers(lm: LM, tmp_path: Path) -> None:
    lm.tokenizer.chat_template = TEMPLATE
    (prompt,) = read(None, "the router")
    filled = lm.tokenizer("<s>user: the router<s>", add_special_tokens=False)["input_ids"]
    assert filled[0] == filled[-1] == 0
    assert ids_of(lm, prompt, chat=True) == filled
    pair = dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b")
    (text,) = read(jsonl(tmp_path / "hh.jsonl", pair), hh="text")
    assert ids_of(lm, text, chat=True) == ids_of(lm, text, chat=False)


def test_what_a_chat_template_refuses_is_refused_naming_the_prompt(lm: LM) -> None:
    lm.tokenizer.chat_template = "{{ raise_exception('only robots may speak') }}"
    with pytest.raises(WrongInput, match=r"--prompt 1: .*only robots may speak.*--no-chat"):
        ids_of(lm, read(None, "x")[0], chat=True)
