"""What a tokenizer's chat template says of its model: which variables it has, and whether the model thinks."""

from __future__ import annotations

import re
from typing import Any

from ptl.config.chat import NO_CHAT, QUESTION, Chat
from ptl.data.sources import SourceRow, Turns, user_turn
from ptl.errors import InputError

TokenIds = list[int]

FIELD = "chat.template_kwargs"
ANSWER = "(answer)"  # as an assistant's turn, to find what a template writes after one
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
    """QUESTION as the template writes it, with what begins the answer."""
    return str(by_template(tokenizer, user_turn(QUESTION), None, chat, tokenize=False))


def end_of_turn(tokenizer: Any, chat: Chat) -> TokenIds:
    """What the chat template writes after an answer: tokens that end it, else EOS."""
    end = answered_question(tokenizer, chat).rpartition(ANSWER)[2].rstrip()
    ids: TokenIds = tokenizer(end, add_special_tokens=False)["input_ids"]
    return ids or [tokenizer.eos_token_id]


def answered_question(tokenizer: Any, chat: Chat) -> str:
    """QUESTION with the answer ANSWER, as the chat template writes it."""
    answered = [*user_turn(QUESTION), {"role": "assistant", "content": ANSWER}]
    return str(by_template(tokenizer, answered, None, chat, ended=True, tokenize=False))


def chat_ids(
    tokenizer: Any, chat_turns: Turns, row: SourceRow, chat: Chat = NO_CHAT, *, ended: bool = False
) -> TokenIds:
    """The tokens of a chat, as `by_template` writes it."""
    encoded = by_template(tokenizer, chat_turns, row, chat, ended=ended, return_dict=True)
    return list(encoded["input_ids"])


def by_template(
    tokenizer: Any,
    chat_turns: Turns,
    row: SourceRow | None,  # for errors; None: it is ours
    chat: Chat,
    *,
    ended: bool = False,
    **form: bool,  # of what is returned, as of apply_chat_template
) -> Any:
    """A chat by the tokenizer's template; unless it has ended, with the words that begin an answer."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            chat_turns, add_generation_prompt=not ended, **form, **chat.template_kwargs
        )
    except (TemplateError, TypeError, ValueError) as error:  # the last one without a template
        problem = f"the model's chat template does not take it ({error})"
        if row is None:
            raise InputError(f"a question: {problem}", field="model.path", remedy="correct the template") from error
        raise row.error(f": {problem}", "correct the row, or use another format") from error


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
