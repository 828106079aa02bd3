"""What templates say of their models; that of a model which thinks decides how it is calibrated, trained and scored."""

import pytest
from chats import tokenizer_with

from ptl.config.chat import Chat
from ptl.data import chat_templates
from ptl.errors import InputError


def test_whether_a_model_thinks_follows_from_its_template():
    for template, variables, thinks, has_switch in (
        ("qwen3", {}, True, True),
        ("qwen3", {"enable_thinking": True}, True, True),
        ("qwen3", {"enable_thinking": False}, False, True),
        ("qwen3_instruct_2507", {}, False, False),
        ("deepseek_r1_distill", {}, True, False),
        ("nemotron_3_nano", {"enable_thinking": False}, False, True),
        ("qwen2_5", {}, False, False),
        (None, {}, False, False),
    ):
        tokenizer = tokenizer_with(template)
        assert (
            chat_templates.thinks(tokenizer, Chat(enabled=True, template_kwargs=variables))
            is thinks
        ), template
        assert chat_templates.has_switch(tokenizer) is has_switch, template
    tokenizer.chat_template = {"enable_thinking": "{{ messages }}"}  # for one use alone
    assert not chat_templates.has_switch(tokenizer) and not chat_templates.thinks(tokenizer)


def test_what_the_template_does_not_have_is_refused():
    misspelt = {"template_kwargs": {"enable_thinkng": False}}
    for template, chat, message in (
        (None, {}, r"^chat\.enabled: the tokenizer has no chat template; set it to false"),
        ("qwen3", misspelt, "enable_thinkng is no variable.*; .* enable_thinking$"),
        (
            "qwen2_5",
            {"template_kwargs": {"thinking": True}},
            r"^chat\.template_kwargs: thinking is no .*; remove it$",
        ),
        ("gptoss", {}, r"^chat\.enabled: .* writes '<\|channel\|>final<\|message\|>' between"),
    ):
        chat_templates.check(tokenizer_with(template), Chat(**chat))  # it is not used
        with pytest.raises(InputError, match=message):
            chat_templates.check(tokenizer_with(template), Chat(enabled=True, **chat))
    # Thoughts between a prompt and an answer are no reason.
    for template in (
        "qwen3",
        "qwen3_instruct_2507",
        "deepseek_r1_distill",
        "qwen2_5",
        "llama3",
        "gemma3",
        "glm4moe",
    ):
        tokenizer = tokenizer_with(template)
        tokenizer.bos_token = tokenizer.eos_token
        chat_templates.check(tokenizer, Chat(enabled=True))


def test_an_answer_continues_its_prompt_and_follows_a_thought_that_has_an_end():
    chat, thought = Chat(), "<think>\n1+1\n</think>\n\n2"
    assert chat.with_thought("1+1", "2") == thought and chat.with_thought("", "2") == "2"
    assert chat.continued("<think>\n", thought) == "1+1\n</think>\n\n2"
    assert chat.continued("<think>\n", "2") == "\n</think>\n\n2"
    assert chat.continued("<think>\n", "<think>\n\n1+1") == "\n1+1"  # as it was truncated
    assert chat.continued("", thought) == thought
    assert (
        chat.continued("<think></think>", thought) == chat.continued("<think></think>", "2") == "2"
    )
    for text, answer in (
        ("<think>2</think>\n\n3", "3"),
        ("2</think>3", "3"),
        ("3", "3"),
        ("<think>#### 3", ""),
    ):
        assert chat.answer(text) == answer
        assert chat.is_thinking(text) is (answer == "")
    assert Chat(thought=["[THINK]", "[/THINK]"]).answer("[THINK]2[/THINK]3") == "3"


def test_marks_of_a_thought_that_an_answer_mentions_begin_and_end_none():
    chat = Chat()
    mention = "Write <think> first, </think> last: <think>."
    for text in (
        mention,
        f"\n\n{mention}",
        f"<think>1+1\n</think>\n\n{mention}",
        f"\n<think></think>{mention}",
    ):
        assert chat.answer(text) == mention and not chat.is_thinking(text)
    # In a mode without thoughts a thought alone is left out.
    assert chat.continued("<think></think>", mention) == mention
    assert chat.continued("<think></think>", f"<think>1+1</think>\n\n{mention}") == mention


@pytest.mark.parametrize(
    ("template", "variables", "begun"),
    [
        ("qwen3", {}, ""),
        ("qwen3", {"enable_thinking": False}, "<think></think>"),
        ("deepseek_r1_distill", {}, "<think>\n"),
        ("qwen3_5_think", {}, "<think>\n"),
        ("nemotron_3_nano", {"enable_thinking": False}, "<think></think>"),
        ("qwen2_5", {}, ""),
    ],
)
def test_whether_a_prompt_begins_a_thought_is_said_by_the_template_and_not_by_the_user(
    template, variables, begun
):
    tokenizer, chat = tokenizer_with(template), Chat(enabled=True, template_kwargs=variables)
    opening = chat_templates.opening(tokenizer, chat)
    for question in ("1+1?", "What is <think>", "What is </think>", "<think>1+1</think>"):
        turn = {"role": "user", "content": question}
        prompt = tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True, **variables
        )
        assert chat.begun_thought(prompt, opening) == begun, question
    # After the first words of an answer, and after a tool's result, templates begin no thought.
    assert chat.begun_thought("1+1?<a>The answer is", opening) == ""
    # A template that writes nothing after a question; one that is switched by the words of a chat.
    assert chat.begun_thought("What is <think>", "(question)") == ""
    assert (
        chat.begun_thought("/no_think 1+1?<a><think>\n\n</think>\n", "(question)<a>")
        == "<think></think>"
    )
