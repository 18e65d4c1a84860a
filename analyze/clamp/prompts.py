"""Texts, files of them and HH-RLHF pairs in; prompts out.

    --prompt TEXT            one prompt
    FILE.txt                 one prompt a line
    FILE.jsonl, .jsonl.gz    one object a line:
        {"prompt": TEXT}                  one prompt; the field's name is --text-field
        {"messages": [{role, content}]}   one prompt, a conversation that the assistant is to go on with
        {"chosen": …, "rejected": …}      a pair of HH-RLHF, converted as the published RouteSAE code does it:
            conversation   a prompt for every human turn, after the turns before it with their chosen replies; that
                           code puts the LM's own replies there, so that one prompt hangs on what the last one gave
            text           one prompt, both conversations as one text: each turn's question and chosen reply, and its
                           rejected reply where it is another

Speakers are told by HH-RLHF's own marks at the start of a paragraph; the published code takes every "Human:" in a
text for one.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from routesae.harvest.corpus.tokens import Framing
from routesae.reporting import FailedRun, WrongInput

log = logging.getLogger(__name__)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {"user": HUMAN, "assistant": ASSISTANT}


class Message(NamedTuple):
    role: str
    content: str


class Prompt(NamedTuple):
    """What to go on from, and where it came from ("hh.jsonl:3, turn 2"), for messages.

    text: without a chat template. messages: what a chat template is filled with; none where it must not be.
    replies: what the data says followed, by name ("chosen", "rejected").
    """

    origin: str
    text: str
    messages: tuple[Message, ...] = ()
    replies: Mapping[str, str] = {}


class Turn(NamedTuple):
    """One exchange of a conversation."""

    human: str
    assistant: str


def read_prompts(
    texts: tuple[str, ...], file: str | None, *, text_field: str, hh: str, limit: int | None
) -> list[Prompt]:
    """Those of the command line, then those of the file, the first `limit` of all.

    Raises WrongInput where there is none, or naming the line that holds none.
    """
    prompts = [_plain(text, f"--prompt {number}") for number, text in enumerate(texts, start=1)]
    if file is not None:
        wanted = None if limit is None else max(0, limit - len(prompts))
        prompts += islice(_file_prompts(Path(file).expanduser(), text_field, hh), wanted)
    if not prompts:
        raise WrongInput(f"{file} holds no prompt" if file else "no prompt; give --prompt TEXT or --prompts FILE")
    return prompts[:limit]


def prompt_ids(prompt: Prompt, tokenizer: Any, framing: Framing, *, chat: bool) -> list[int]:
    """Token ids: by the chat template where there are messages and `chat`, else as harvest begins a document."""
    if not (chat and prompt.messages):
        return [*framing.before, *tokenizer(prompt.text, add_special_tokens=False)["input_ids"]]
    from jinja2 import TemplateError

    messages = [message._asdict() for message in prompt.messages]
    try:
        filled = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as refusal:
        raise WrongInput(
            f"{prompt.origin}: the tokenizer's chat template does not take it ({refusal}); give --no-chat"
        ) from refusal
    return list(tokenizer(filled, add_special_tokens=False)["input_ids"])


def _file_prompts(path: Path, text_field: str, hh: str) -> Iterator[Prompt]:
    name = path.name.lower()
    if not name.endswith((".txt", ".jsonl", ".jsonl.gz")):
        raise WrongInput(f"{path} is no file of prompts: its name must end in .txt, .jsonl or .jsonl.gz")
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                origin = f"{path}:{number}"
                try:
                    text = line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise WrongInput(f"{origin}: not UTF-8 at byte {error.start}") from None
                if text.strip() and name.endswith(".txt"):
                    yield _plain(text, origin)
                elif text.strip():
                    yield from _entry(text, origin, text_field, hh)
    except FileNotFoundError:
        raise WrongInput(f"{path} does not exist; give a .txt, .jsonl or .jsonl.gz") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as broken:
        raise FailedRun(f"{path} cannot be read to its end: {broken}; fetch or write it again") from broken


def _entry(line: str, origin: str, text_field: str, hh: str) -> list[Prompt]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongInput(f"{origin}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise WrongInput(f"{origin}: a JSON {type(entry).__name__}, not an object")
    if isinstance(entry.get("chosen"), str) and isinstance(entry.get("rejected"), str):
        return _hh_prompts(_sound(entry["chosen"], origin), _sound(entry["rejected"], origin), origin, hh)
    if "messages" in entry:
        return [_conversation(_messages(entry["messages"], origin), origin)]
    if isinstance(entry.get(text_field), str):
        return [_plain(entry[text_field], origin)]
    raise WrongInput(
        f"{origin}: no text in field {text_field!r}, no messages, no chosen and rejected; its fields are "
        f"{', '.join(list(entry)[:8]) or 'none'}; name one with --text-field"
    )


def _plain(text: str, origin: str) -> Prompt:
    if not text.strip():
        raise WrongInput(f"{origin} is empty; give some text to go on from")
    return Prompt(origin, _sound(text, origin), (Message("user", text),))


def _sound(text: str, origin: str) -> str:
    """Refuse what JSON's \\ud800, or a shell's stray byte, can smuggle in and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WrongInput(f"{origin}: holds a lone surrogate, which is no character") from None
    return text


def _messages(given: object, origin: str) -> tuple[Message, ...]:
    if isinstance(given, list) and given and all(isinstance(message, dict) for message in given):
        pairs = [(message.get("role"), message.get("content")) for message in given]
        if all(isinstance(role, str) and isinstance(content, str) for role, content in pairs):
            return tuple(Message(role, _sound(content, origin)) for role, content in pairs)
    raise WrongInput(f'{origin}: messages is no list such as [{{"role": "user", "content": "Hello"}}]')


def _conversation(messages: tuple[Message, ...], origin: str, replies: Mapping[str, str] | None = None) -> Prompt:
    """Without a chat template it is written as HH-RLHF writes conversations."""
    said = [f"{SPEAKERS.get(role, '')} {content}" if role in SPEAKERS else content for role, content in messages]
    return Prompt(origin, ("".join(said) + ASSISTANT).lstrip(), messages, replies or {})


def hh_turns(conversation: str) -> list[Turn]:
    """Each human turn with the reply to it; a turn without one is left out."""
    turns = []
    for part in f"\n\n{conversation.strip()}".split(HUMAN)[1:]:
        human, replied, assistant = part.partition(ASSISTANT)
        if replied:
            turns.append(Turn(human.strip(), assistant.strip()))
    return turns


def _hh_prompts(chosen: str, rejected: str, origin: str, hh: str) -> list[Prompt]:
    pairs = list(zip(hh_turns(chosen), hh_turns(rejected), strict=False))
    if not pairs:
        log.warning("%s: no turn of both chosen and rejected; left out", origin)
        return []
    if hh == "text":
        return [Prompt(origin, _hh_text(pairs))]
    prompts, before = [], list[Message]()
    for number, (good, bad) in enumerate(pairs, start=1):
        messages = (*before, Message("user", good.human))
        replies = {"chosen": good.assistant, "rejected": bad.assistant}
        prompts.append(_conversation(messages, f"{origin}, turn {number}", replies))
        before = [*messages, Message("assistant", good.assistant)]
    return prompts


def _hh_text(pairs: list[tuple[Turn, Turn]]) -> str:
    lines = []
    for good, bad in pairs:
        lines += [f"Human: {good.human}", f"Assistant: {good.assistant}"]
        if bad.assistant != good.assistant:
            lines.append(f"Assistant: {bad.assistant}")
    return "\n".join(lines)
