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
    asked, answered = (
        opening(tokenizer, chat),
        answered_question(tokenizer, chat).partition(ANSWER)[0],
    )
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
                remedy=f"correct it; this template has {SWITCH}"
                if SWITCH in template
                else "remove it",
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
    """What a model writes after its answer: as the chat template does, up to the end of the turn; else EOS."""
    end = answered_question(tokenizer, chat).rpartition(ANSWER)[2].rstrip()
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    return up_to_end(ids, tokenizer, chat) or [tokenizer.eos_token_id]


def up_to_end(ids: TokenIds, tokenizer: Any, chat: Chat) -> TokenIds:
    """Tokens up to the first that ends a turn, and with it; all where none does.

    Serving ends an answer there, so a model never writes what some templates have behind it, such as a second EOS.
    """
    ends = {tokenizer.eos_token_id, *_end_of_question(tokenizer, chat)}
    first = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]


def _end_of_question(tokenizer: Any, chat: Chat) -> TokenIds:
    """The first token of its own kind that the template writes after a user's words: most end each turn with it."""
    asked = str(by_template(tokenizer, user_turn(QUESTION), None, chat, ended=True, tokenize=False))
    ids = tokenizer(asked.rpartition(QUESTION)[2], add_special_tokens=False)["input_ids"]
    return [token for token in ids if token in tokenizer.added_tokens_decoder][:1]


def space_before_answer(tokenizer: Any, chat: Chat) -> str:
    """The white space that the template writes between a prompt and its answer; empty where a thought stands there."""
    begin = opening(tokenizer, chat)
    answered = answered_question(tokenizer, chat).partition(ANSWER)[0]
    between = answered.removeprefix(begin)
    return between if answered.startswith(begin) and not between.strip() else ""


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
            raise InputError(
                f"a question: {problem}", field="model.path", remedy="correct the template"
            ) from error
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
