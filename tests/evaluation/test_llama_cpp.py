"""A GGUF file scored by the harness: the items, answers and likelihoods that transformers gives its checkpoint."""

import json
from dataclasses import replace
from types import SimpleNamespace

import gguf_files
import pytest
from checkout import DENSE, EXAMPLE
from gguf_files import VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import build, save

from ptl.config.chat import Chat
from ptl.config.run import Evaluate, Speed, Task
from ptl.errors import InputError
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.language_models import language_model
from ptl.evaluation.llama_cpp import gguf_language_model, gguf_speed
from ptl.export.gguf import write_gguf

pytestmark = [
    needs_llama_cpp,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("evaluate"),
]
LIMIT = 24


def settings(*, limit=LIMIT, max_new_tokens=None, **more):
    task = Task(
        name=str(EXAMPLE / "tiny_reasoner.yaml"), limit=limit, max_new_tokens=max_new_tokens
    )
    return Evaluate(tasks=[task], speed=Speed(repeats=0), **{"batch_size": 16, **more})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "reasoner.gguf"
    with gguf_files.converter_in_process():
        write_gguf(DENSE, file, "f32")
    return file


def request(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.mark.parametrize(
    "more",
    [{"batch_size": 16}, {"limit": 5, "max_new_tokens": 6, "max_length": 80, "batch_size": 4}],
)
def test_items_answers_and_notes_are_those_of_transformers(more, file):
    """Answers of different lengths, so that sequences change hands; and prompts and answers that are too long."""
    wanted = settings(**more)
    (expected,), its_items = score_tasks(language_model(DENSE, wanted), wanted, 0)
    (scored,), items = score_tasks(gguf_language_model(file, DENSE, wanted), wanted, 0)
    assert items == its_items and len(items) == more.get("limit", LIMIT)
    assert scored.seconds > 0 and replace(scored, seconds=0) == replace(expected, seconds=0)
    is_short = "max_length" in more
    assert scored.truncated == is_short and (scored.cut_prompts > 0) == is_short


def test_a_stop_text_ends_an_answer(file):
    lm = gguf_language_model(file, DENSE, settings())
    prompt = json.loads((EXAMPLE / "test.jsonl").read_text().splitlines()[0])["question"] + "\n"
    (whole,) = lm.generate_until([request(prompt, {"until": [], "max_gen_toks": 64})])
    (first_line,) = lm.generate_until([request(prompt, {"until": ["\n"], "max_gen_toks": 64})])
    assert first_line == whole.split("\n")[0] != whole
    assert lm.notes[prompt].tokens < len(lm.tok_encode(whole)) and not lm.notes[prompt].truncated


def test_likelihoods_are_those_of_transformers(file):
    theirs, ours = language_model(DENSE, settings()), gguf_language_model(file, DENSE, settings())
    theirs.start_notes()
    prompt = "Tom has 12 apples. He buys 30 more.\n"
    asked = [request(prompt, answer) for answer in ("12+30=42", "12-30=5", "1", "#### 42")]
    asked += [request("", "Tom has 12 apples.")]
    expected, likelihoods = theirs.loglikelihood(asked), ours.loglikelihood(asked)
    for (one, is_first), (other, is_expected) in zip(likelihoods, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=2e-2) and is_first == is_expected
    text = [request(prompt * 20)]  # longer than the context
    assert ours.loglikelihood_rolling(text)[0] == pytest.approx(
        theirs.loglikelihood_rolling(text)[0], rel=1e-2
    )


def test_what_llama_cpp_would_answer_otherwise_is_an_error_before_the_first_answer(
    file, tmp_path, monkeypatch
):
    monkeypatch.setattr("ptl.evaluation.llama_cpp.answer", lambda *_: pytest.fail("answered"))
    lm, options = gguf_language_model(file, DENSE, settings()), {"until": [], "max_gen_toks": 8}
    with pytest.raises(
        InputError,
        match=r"tokenizer give different tokens for 'Zoé has 3.\\n' after 'Zo': \[.*\] and \[2, ",
    ):
        lm.generate_until(
            [request("Tom has 3 apples.\n", options), request("Zoé has 3.\n", options)]
        )
    own = tmp_path / "sampled.yaml"
    own.write_text(
        f"include: {EXAMPLE / 'tiny_reasoner.yaml'}\ntask: own\ngeneration_kwargs: {{do_sample: true}}\n"
    )
    for task in (Task(name="gsm8k", samples=2), Task(name=str(own))):
        with pytest.raises(InputError, match=r"are sampled .* of a GGUF file they are greedy"):
            gguf_language_model(file, DENSE, settings().model_copy(update={"tasks": (task,)}))


def test_the_chat_template_must_be_the_file_s(tmp_path):
    folder, wanted, chat = tmp_path / "model", settings(), Chat(enabled=True)
    save(build("llama", vocab_size=VOCABULARY, pad_token_id=2), folder)  # for its template
    llama_tokenizer(folder)
    with gguf_files.converter_in_process():
        write_gguf(folder, tmp_path / "model.gguf")
    lm = gguf_language_model(tmp_path / "model.gguf", folder, wanted, chat)
    assert lm.apply_chat_template([{"role": "user", "content": "abc"}]) == "abc"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        InputError, match=r"chat\.enabled: .*model\.gguf does not have the chat template"
    ):
        gguf_language_model(tmp_path / "model.gguf", folder, wanted, chat)


def test_speed_has_the_rows_of_transformers_models(file, monkeypatch):
    monkeypatch.setattr(Speed, "prompt_tokens", 8)
    monkeypatch.setattr(Speed, "new_tokens", 4)
    rows = gguf_speed({"it": file}, Speed(batch_sizes=(1, 3), repeats=2))["it"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row[f"{phase}_tokens_per_s"] > 0 for row in rows for phase in ("prefill", "decode"))
