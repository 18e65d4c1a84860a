"""Conversations into tokens, each with the role of the message that it spells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from routesae.harvest.corpus.chat import BadConversation, conversation_ids, filled, hh_messages, messages_of
from routesae.reporting import WrongInput

CHATML = """{% for m in messages %}<s>{{ m['role'] + '\n' + m['content'] }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
TEMPLATES = {
    "verbatim": CHATML,
    "strips": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}",
    "a system prompt of its own": "<s>system\nthe layer</s>" + CHATML,
    "generation": """{% for m in messages %}{% if m['role'] == 'assistant' %}<s>assistant
{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}<s>{{ m['role'] + ': ' + m['content'] }}</s>
{%- endif %}
{% endfor %}""",
    "moves the system prompt": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set system = '<<' + messages[0]['content'] + '>>\n' %}{% else %}{% set rest = messages %}{% set system = '' %}
{%- endif %}{% for m in rest %}{% if loop.index0 == 0 %}{% set said = system + m['content'] %}{% else %}
{%- set said = m['content'] %}{% endif %}{{ '[' + m['role'] + '] ' + said.strip() + '</s>' }}{% endfor %}""",
}
TALK = [
    {"role": "system", "content": "Be a  router."},
    {"role": "user", "content": " what reads\nthe shard? naïve 東京 🙂 "},
    {"role": "assistant", "content": "The dictionary, the layer; user: nobody."},
    {"role": "user", "content": "the the"},
    {"role": "assistant", "content": "a row\n"},
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_model))


def said_by(tokenizer: Any, messages: Any, role: str | None) -> str:
    ids, roles = conversation_ids(tokenizer, messages)
    assert roles is not None
    return str(tokenizer.decode([i for i, one in zip(ids, roles, strict=True) if one == role]))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_tokens_of_a_role_spell_what_its_messages_say_and_nothing_else(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    for role in ("system", "user", "assistant"):
        expected = "".join(message["content"] for message in TALK if message["role"] == role)
        assert "".join(said_by(tokenizer, TALK, role).split()) == "".join(expected.split())
    ids, _ = conversation_ids(tokenizer, TALK)
    assert ids == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    rest = said_by(tokenizer, TALK, None)
    assert not {"router.", "shard?", "nobody."} & set(rest.split())


def test_roles_agree_with_the_template_that_marks_what_is_generated(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["generation"]
    marked = tokenizer.apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    ids, roles = conversation_ids(tokenizer, TALK)
    assert roles is not None
    theirs = [i for i, generated in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if generated]
    ours = [i for i, role in zip(ids, roles, strict=True) if role == "assistant"]
    assert ours == [i for i in theirs if i != tokenizer.eos_token_id]


def test_where_the_template_changes_what_is_said_no_role_is_claimed(tokenizer: Any) -> None:
    for template in (
        "{% for m in messages %}{{ m['content'].split(' ')[-1] }}\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] | length }} {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",  # a token of the end of one and of the next
    ):
        tokenizer.chat_template = template
        talk = [{"role": "user", "content": "the la"}, {"role": "assistant", "content": "yer"}]
        assert conversation_ids(tokenizer, talk)[1] is None


def test_contents_may_be_parts_and_hh_rlhf_is_a_conversation() -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "name": None}
    ]
    assert messages_of(parts) == [{"role": "user", "content": "a b"}]
    assert messages_of("\n\nHuman: Is 'Human: x' one?\n\nAssistant: No.\nNo.\n\nHuman: c\n\nAssistant: d") == [
        {"role": "user", "content": "Is 'Human: x' one?"},
        {"role": "assistant", "content": "No.\nNo."},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_a_speaker_who_goes_on_in_another_turn_says_one_message() -> None:
    """Templates such as Gemma's refuse two messages of a speaker in a row, and a mark is no part of what is said."""
    said = "Human: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e"
    assert messages_of(said) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c\n\nd"},
        {"role": "user", "content": "e"},
    ]
    assert hh_messages("\n" + said) == messages_of(said)
    assert hh_messages("An essay.\n\nHuman: a") == hh_messages("") == []


BAD = {
    "text": ("hello", "nor a text of HH-RLHF"),
    "nothing": ([], "messages are not a list"),
    "words": (["hello"], "messages are not a list"),
    "no content": ([{"role": "user"}], "message 1 has no role, or a content that is not text"),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        "message 1 has no role, or a content",
    ),
    "a tool": ([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "message 1 calls a tool"),
    "no role": ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 has no role"),
    "a role that fills the manifest": ([{"role": "u" * 1000, "content": "a"}], "message 1 has no role"),
    "a mark": ([{"role": "user", "content": "a\ufdd2"}], "message 1 has no role, or a content that is not text"),
}


@pytest.mark.parametrize(("value", "reason"), BAD.values(), ids=BAD)
def test_what_is_no_conversation_is_said_in_one_line(value: Any, reason: str) -> None:
    with pytest.raises(BadConversation, match=reason) as error:
        messages_of(value)
    assert "\n" not in str(error.value)


def test_a_template_may_refuse_and_a_tokenizer_may_have_none(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only user may speak') }}"
    with pytest.raises(BadConversation, match="only user may speak"):
        filled(tokenizer, TALK)
    tokenizer.chat_template = CHATML
    with pytest.raises(BadConversation, match="surrogates not allowed"):
        filled(tokenizer, [{"role": "us\ud800er", "content": "a"}])
    tokenizer.chat_template = "{{ messages[0]['content'].index('x') }}"
    with pytest.raises(BadConversation, match="substring not found"):
        filled(tokenizer, [{"role": "user", "content": "a"}])
    tokenizer.chat_template = None
    with pytest.raises(WrongInput, match="no chat template"):
        conversation_ids(tokenizer, TALK)
