"""Turn conversations into token ids by the tokenizer's chat template, and say which message each token spells.

    messages = [{"role": "user", "content": "Hello"}, …]      → what the template makes of them → ids and roles

A token has the role of the message of whose content it spells a character; blanks in front of a word do not count.
What the template itself writes (headers, ends of turns, a system prompt of its own) has no role. Where each content
stands in the filled template is found by filling it once more, with marks around the contents: whatever the template
moves, strips or joins, the marks go with it. It is proved on every conversation: without the marks, the second text
must be the first. Otherwise the roles of that conversation are not known.

Dimension letters: T tokens.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from routesae.reporting import WrongInput

Message = Mapping[str, Any]
"""Its role and its content, both text, and whatever else the template reads."""

OPEN, NUMBERED, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"  # no characters (Unicode 23.7): they are in no text
MARK, NO_CHARACTER = re.compile(f"{OPEN}([0-9]+){NUMBERED}|{CLOSE}"), re.compile(f"[{OPEN}{NUMBERED}{CLOSE}]")
FORM = 'messages are not a list such as [{"role": "user", "content": "Hello"}]'
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # of HH-RLHF
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
LONGEST_ROLE = 100  # characters: the manifest names every role


class BadConversation(ValueError):
    """Says in one line why it cannot be used."""


def hh_messages(text: str) -> list[Message]:
    """The messages of a text of HH-RLHF; none if it does not begin with a turn.

    What one speaker says in several turns in a row is one message: many chat templates want speakers to alternate.
    """
    head, *turns = TURN.split(text.strip())
    spoken = groupby(zip(turns[::2], turns[1::2], strict=True), itemgetter(0)) if not head else ()
    return [{"role": SPEAKERS[name], "content": "\n\n".join(one.strip() for _, one in said)} for name, said in spoken]


def messages_of(value: Any) -> list[Message]:
    """A conversation as chat templates take it: from a list of messages, whose contents may be lists of text parts,
    or from a text of HH-RLHF, "\\n\\nHuman: …\\n\\nAssistant: …". Raises BadConversation for anything else."""
    if isinstance(value, str):
        value = hh_messages(value)
    if not isinstance(value, Sequence) or not value or not all(isinstance(message, Mapping) for message in value):
        raise BadConversation(f"{FORM} nor a text of HH-RLHF, which begins with \\n\\nHuman:")
    messages = list[Message]()
    for number, message in enumerate(value, 1):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
        if message.get("tool_calls") or message.get("function_call"):
            raise BadConversation(f"{FORM}: message {number} calls a tool; render such conversations as text")
        is_role = isinstance(role, str) and 0 < len(role) <= LONGEST_ROLE
        if not is_role or not isinstance(content, str) or NO_CHARACTER.search(content):
            raise BadConversation(f"{FORM}: message {number} has no role, or a content that is not text")
        given = {name: of for name, of in message.items() if of is not None}  # tables have nulls
        messages.append({**given, "content": content})
    return messages


def filled(tokenizer: Any, messages: Sequence[Message], *, reply: bool = False) -> str:
    """The chat template filled with a conversation; reply: with what it has in front of the assistant's next one.

    Raises WrongInput if there is no template, BadConversation if it refuses the conversation.
    """
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise WrongInput("this LM's tokenizer has no chat template for messages; give a text")
    try:
        text: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=reply, tokenize=False)
        text.encode()  # no tokenizer takes a lone surrogate
    except (TemplateError, TypeError, ValueError) as refusal:  # TypeError: it adds a text to what a message lacks
        raise BadConversation(f"the chat template refuses it ({refusal})") from None
    return text


def conversation_ids(
    tokenizer: Any, messages: Sequence[Message], *, reply: bool = False
) -> tuple[list[int], list[str | None] | None]:
    """Token ids of a conversation, [T], and the role of each; the roles are None where they are not known.

    Raises BadConversation as `filled`.
    """
    text = filled(tokenizer, messages, reply=reply)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids: list[int] = encoded["input_ids"]
    of_character = _messages_of_characters(tokenizer, messages, text, reply) if tokenizer.is_fast else None
    if of_character is None:
        return ids, None
    roles, done = list[str | None](), 0
    for first, after in encoded["offset_mapping"]:
        # Some tokenizers leave blanks in front of a word out of its token's span, others do not.
        first = next((at for at in range(first, after) if not text[at].isspace()), min(first, done))
        spelt = {of_character[at] for at in range(first, after)} - {None}
        if len(spelt) > 1:
            return ids, None
        roles.append(messages[number]["role"] if (number := next(iter(spelt), None)) is not None else None)
        done = max(done, after)
    return ids, roles


def _messages_of_characters(
    tokenizer: Any, messages: Sequence[Message], text: str, reply: bool
) -> list[int | None] | None:
    """For each character of the filled template the number of the message whose content it is of; None: unknown."""
    for blanks in ("", r"\s*"):  # of a template that strips contents, marks must stand inside the blanks
        inside = re.compile(f"({blanks})(.*?)({blanks})", re.DOTALL)
        marked = []
        for number, message in enumerate(messages):
            around = inside.fullmatch(message["content"])
            assert around is not None
            before, said, behind = around.groups()
            content = f"{before}{OPEN}{number}{NUMBERED}{said}{CLOSE}{behind}" if said else message["content"]
            marked.append({**message, "content": content})
        try:
            again = filled(tokenizer, marked, reply=reply)
        except BadConversation:
            continue
        if MARK.sub("", again) == text:
            break
    else:
        return None
    numbers, current, done = list[int | None](), None, 0
    for mark in MARK.finditer(again):
        numbers += [current] * (mark.start() - done)
        if (mark[1] is None) == (current is None):  # a content that was cut or put into another
            return None
        current, done = (None if mark[1] is None else int(mark[1])), mark.end()
    return None if current is not None else [*numbers, *[None] * (len(again) - done)]
