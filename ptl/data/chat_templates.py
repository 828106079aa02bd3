"""What a tokenizer's chat template says of its model: which variables it has, and whether the model thinks."""

from __future__ import annotations

import re
from typing import Any

from ptl.config.chat import NO_CHAT, Chat
from ptl.data.sequences import ANSWER, answered_question, by_template
from ptl.data.sources import user_turn
from ptl.errors import InputError

FIELD = "chat.template_kwargs"
SWITCH = "enable_thinking"  # the variable of most templates that turns thoughts on and off


def check(tokenizer: Any, chat: Chat) -> None:
    """Raise InputError where chats are asked for and there is no template, or a variable that it does not have.

    And where more than a thought stands between a prompt and its answer.
    """
    if not chat.enabled:
        return
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            field="chat.enabled",
            remedy="set it to false, or give a model with a template",
        )
    asked, answered = opening(tokenizer, chat), answered_question(tokenizer, chat).partition(ANSWER)[0]
    between = answered.removeprefix(asked)
    for mark in chat.thought:
        between = between.replace(mark, "")
    if answered.startswith(asked) and between.strip():
        raise InputError(
            f"the model's chat template writes {between!r} between the end of a prompt and an answer, which neither "
            "training nor grading knows",
            field="chat.enabled",
            remedy="set it to false",
        )
    template = tokenizer.get_chat_template()
    for name in chat.template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise InputError(
                f"{name} is no variable of the model's chat template",
                field=FIELD,
                remedy=f"correct it; this template has {SWITCH}" if SWITCH in template else "remove it",
            )


def check_thoughts(tokenizer: Any, chat: Chat) -> None:
    """Raise InputError where reinforcement learning cannot tell a thought from an answer."""
    tokens = tokenizer.added_tokens_decoder.values()
    if chat.enabled and any(token.special and chat.delimits(str(token)) for token in tokens):
        raise InputError(
            f"{' and '.join(chat.thought)} are special tokens, which trl leaves out of what its rewards read",
            field="chat.thought",
            remedy="recover by distil or cpt, or without thoughts (chat.template_kwargs)",
        )


def opening(tokenizer: Any, chat: Chat) -> str:
    """A question as the template writes it, with what begins the answer."""
    return str(by_template(tokenizer, user_turn("?"), None, chat, tokenize=False))


def _template(tokenizer: Any) -> str:
    """The template that is used where none is named; of several there may be no such."""
    template = tokenizer.chat_template
    return (template.get("default") if isinstance(template, dict) else template) or ""


def thinks(tokenizer: Any, chat: Chat = NO_CHAT) -> bool:
    """Whether the model thinks before it answers: its template knows thoughts, and does not end them in the prompt."""
    end = chat.thought[1]
    if end not in _template(tokenizer):
        return False
    return not opening(tokenizer, chat).rstrip().endswith(end)


def has_switch(tokenizer: Any) -> bool:
    """Whether the template has the variable `enable_thinking`."""
    return SWITCH in _template(tokenizer)


def has_date(tokenizer: Any, chat: Chat) -> bool:
    """Whether the template writes today's date into each prompt."""
    return "strftime_now" in _template(tokenizer) and "date_string" not in chat.template_kwargs
