"""Read the prompts of `routesae clamp` from the command line, from text files and from HH-RLHF pairs.

    --prompt TEXT            one prompt
    FILE.txt                 one prompt a line
    FILE.jsonl, .jsonl.gz    one object a line:
        {"prompt": TEXT}                  one prompt; --text-field names another field
        {"messages": [{role, content}]}   one prompt: a conversation that the assistant continues
        {"chosen": …, "rejected": …}      a pair of HH-RLHF, converted as in the published RouteSAE code:
            conversation   one prompt for each human turn. Earlier turns come with their chosen replies, where that
                           code uses the LM's own replies and so makes each prompt depend on the one before
            text           one prompt: both conversations as one text, each turn's question and chosen reply,
                           followed by its rejected reply where that differs

A turn begins with HH-RLHF's mark at the start of a paragraph; the published code splits at every "Human:".
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.inputs.lm import require_unicode
from routesae.harvest.corpus.chat import BadConversation, Message, hh_messages, messages_of
from routesae.harvest.corpus.texts import LARGEST_BYTES, Malformed, json_lines, read_to_its_end
from routesae.machine.files import read_bytes, reading
from routesae.reporting import WrongInput

log = logging.getLogger(__name__)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}


class Prompt(NamedTuple):
    """A text for the LM to continue.

    origin: where it came from, such as "hh.jsonl:3, turn 2", for messages. text: the prompt without a chat template.
    messages: what a chat template is filled with; empty where none must be used. replies: the continuations in the
    data, by name ("chosen", "rejected").
    """

    origin: str
    text: str
    messages: tuple[Message, ...] = ()
    replies: Mapping[str, str] = {}


def read_prompts(settings: ClampSettings) -> list[Prompt]:
    """The prompts of the command line, then those of the file; at most `max_prompts` in all.

    Raises WrongInput where there is none, or naming the line that has no usable prompt.
    """
    file, limit = settings.prompts, settings.max_prompts
    prompts = [_plain(text, f"--prompt {number}") for number, text in enumerate(settings.prompt, start=1)]
    if file is not None:
        room = None if limit is None else max(0, limit - len(prompts))
        prompts += islice(_file_prompts(Path(file).expanduser(), settings.text_field, settings.hh), room)
    if not prompts:
        raise WrongInput(f"{file} holds no prompt" if file else "no prompt; give --prompt TEXT or --prompts FILE")
    return prompts[:limit]


def _file_prompts(path: Path, text_field: str, hh: str) -> Iterator[Prompt]:
    name, give = path.name.lower(), "give a .txt, .jsonl or .jsonl.gz"
    if not name.endswith((".txt", ".jsonl", ".jsonl.gz")):
        raise WrongInput(f"{path} is not a file of prompts: its name must end in .txt, .jsonl or .jsonl.gz")
    if not path.is_file():
        raise WrongInput(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}; {give}")
    if name.endswith(".txt"):
        with reading(path, give):
            lines = read_bytes(path, LARGEST_BYTES).split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode().rstrip("\r")
            except UnicodeDecodeError as error:
                raise WrongInput(f"{path}:{number}: not UTF-8 at byte {error.start}; save as UTF-8") from None
            if text.strip():
                yield _plain(text, f"{path}:{number}")
        return
    with read_to_its_end(path):
        for origin, entry in json_lines(path):
            yield from _entry_prompts(entry, origin, text_field, hh)


def _entry_prompts(entry: Mapping[str, Any] | Malformed, origin: str, text_field: str, hh: str) -> list[Prompt]:
    if isinstance(entry, Malformed):
        raise WrongInput(f"{origin}: {entry}")
    require_unicode(json.dumps(entry, ensure_ascii=False), origin)
    chosen, rejected, text = entry.get("chosen"), entry.get("rejected"), entry.get(text_field)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _hh_prompts(chosen, rejected, origin, hh)
    if "messages" in entry:
        try:
            return [_conversation(messages_of(entry["messages"]), origin)]
        except BadConversation as bad:
            raise WrongInput(f"{origin}: {bad}") from None
    if isinstance(text, str):
        return [_plain(text, origin)]
    raise WrongInput(
        f"{origin}: no text in field {text_field!r}, no messages, no chosen and rejected; its fields are "
        f"{', '.join(list(entry)[:8]) or 'none'}; name one with --text-field"
    )


def _plain(text: str, origin: str) -> Prompt:
    if not text.strip():
        raise WrongInput(f"{origin} is empty; give some text to continue")
    require_unicode(text, origin)
    return Prompt(origin, text, ({"role": "user", "content": text},))


def _conversation(messages: Sequence[Message], origin: str, replies: Mapping[str, str] | None = None) -> Prompt:
    """Its text, for use without a chat template, is written as HH-RLHF writes conversations."""
    text = "".join(SPEAKERS.get(message["role"], "") + message["content"] for message in messages) + ASSISTANT
    return Prompt(origin, text.lstrip(), tuple(messages), replies or {})


def hh_turns(conversation: str) -> list[tuple[str, str]]:
    """Each human message with the assistant's reply; one without a reply is left out."""
    pairs = pairwise(hh_messages(conversation))
    return [(one["content"], reply["content"]) for one, reply in pairs if one["role"] == "user"]


def _hh_prompts(chosen: str, rejected: str, origin: str, hh: str) -> list[Prompt]:
    both = zip(hh_turns(chosen), hh_turns(rejected), strict=False)
    turns = [(human, reply, other) for (human, reply), (_, other) in both]
    if not turns:
        log.warning("%s: no turn stands in both chosen and rejected; left out", origin)
        return []
    if hh == "text":
        lines = []
        for human, reply, other in turns:
            lines += [f"Human: {human}", *(f"Assistant: {text}" for text in dict.fromkeys((reply, other)))]
        return [Prompt(origin, "\n".join(lines))]
    prompts, messages = [], list[Message]()
    for number, (human, reply, other) in enumerate(turns, start=1):
        messages = [*messages, {"role": "user", "content": human}]
        prompts.append(_conversation(messages, f"{origin}, turn {number}", {"chosen": reply, "rejected": other}))
        messages = [*messages, {"role": "assistant", "content": reply}]
    return prompts
