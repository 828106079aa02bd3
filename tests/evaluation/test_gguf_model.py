"""A GGUF file scored by the harness: the items, answers and likelihoods that transformers gives its checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace

import gguf_files
import pytest
from gguf_files import VOCABULARY, llama_tokenizer, needs_llama_cpp
from tiny_models import build, save

from ptl.config.run import Evaluate, Speed, Task
from ptl.errors import InputError
from ptl.evaluation.evaluate import score_tasks
from ptl.evaluation.gguf import gguf_language_model, gguf_speed
from ptl.evaluation.language_models import language_model
from ptl.export.gguf import write_gguf
from ptl.model.llama_runtime import LlamaContext

pytestmark = [needs_llama_cpp, pytest.mark.usefixtures("one_thread")]
EXAMPLE = Path(__file__).parents[2] / "examples/tiny_reasoner"
REASONER = EXAMPLE / "checkpoint"
LIMIT = 40


def settings(*, limit=LIMIT, max_new_tokens=None, **more):
    task = Task(name=str(EXAMPLE / "tiny_reasoner.yaml"), limit=limit, max_new_tokens=max_new_tokens)
    return Evaluate(tasks=[task], speed=Speed(repeats=0), **{"batch_size": 16, **more})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "reasoner.gguf"
    with gguf_files.converter_in_process():
        write_gguf(REASONER, file, "f32")
    return file


def score(lm, wanted):
    (scored,), items = score_tasks(lm, wanted, 0)
    return scored, items


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_items_answers_and_notes_are_those_of_transformers(file):
    wanted = settings()
    expected, its_items = score(language_model(REASONER, wanted), wanted)
    scored, items = score(gguf_language_model(file, REASONER, wanted), wanted)
    assert items == its_items and len(items) == LIMIT
    assert scored.seconds > 0
    for name in ("accuracy", "low", "high", "items", "truncated", "answer_tokens", "cut_prompts", "version"):
        assert getattr(scored, name) == getattr(expected, name)


def test_answers_do_not_depend_on_how_many_are_generated_at_once(file):
    _, one = score(gguf_language_model(file, REASONER, settings(limit=9)), settings(limit=9, batch_size=1))
    _, four = score(gguf_language_model(file, REASONER, settings(limit=9, batch_size=4)), settings(limit=9))
    assert one == four and len({item["tokens"] for item in one}) > 1  # of different lengths: sequences change hands


def test_answers_that_hit_the_token_limit_are_noted(file):
    wanted = settings(limit=5, max_new_tokens=6)
    scored, items = score(gguf_language_model(file, REASONER, wanted), wanted)
    assert scored.truncated == 1.0 and {item["tokens"] for item in items} == {6}


def test_prompts_that_do_not_fit_are_counted(file):
    wanted = settings(limit=5, max_length=90)
    scored, _ = score(gguf_language_model(file, REASONER, wanted), wanted)
    assert scored.cut_prompts > 0


def test_a_stop_text_ends_an_answer(file):
    lm = gguf_language_model(file, REASONER, settings())
    prompt = json.loads((EXAMPLE / "test.jsonl").read_text().splitlines()[0])["question"] + "\n"
    (whole,) = lm.generate_until([request(prompt, {"until": [], "max_gen_toks": 64})])
    (first_line,) = lm.generate_until([request(prompt, {"until": ["\n"], "max_gen_toks": 64})])
    assert first_line == whole.split("\n")[0] != whole
    assert lm.notes[prompt].tokens < len(lm.tok_encode(whole)) and not lm.notes[prompt].truncated


def test_likelihoods_are_those_of_transformers(file):
    theirs, ours = language_model(REASONER, settings()), gguf_language_model(file, REASONER, settings())
    for lm in (theirs, ours):
        lm.start_notes()
    asked = [
        request("Tom has 12 apples. He buys 30 more.\n", answer) for answer in ("12+30=42", "12-30=5", "1", "#### 42")
    ] + [request("", "Tom has 12 apples.")]
    expected, likelihoods = theirs.loglikelihood(asked), ours.loglikelihood(asked)
    for (one, is_first), (other, is_expected) in zip(likelihoods, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=2e-2) and is_first == is_expected
    text = [request("Tom has 12 apples. He buys 30 more. " * 20)]  # longer than the context
    (one,), (other,) = ours.loglikelihood_rolling(text), theirs.loglikelihood_rolling(text)
    assert one == pytest.approx(other, rel=1e-2)


def test_different_tokens_are_an_error_before_the_first_answer(file, monkeypatch):
    monkeypatch.setattr("ptl.evaluation.gguf.answer", lambda *_: pytest.fail("answered"))
    lm = gguf_language_model(file, REASONER, settings())
    options = {"until": [], "max_gen_toks": 8}
    asked = [request("Tom has 3 apples.\n", options), request("Zoé has 3.\n", options)]
    with pytest.raises(
        InputError, match=r"tokenizer give different tokens for 'Zoé has 3.\\n' after 'Zo': \[.*\] and \[2, "
    ):
        lm.generate_until(asked)


def test_sampled_answers_are_refused(file):
    lm = gguf_language_model(file, REASONER, settings())
    with pytest.raises(InputError, match="answers sampled"):
        lm.generate_until([request("1\n", {"until": [], "max_gen_toks": 8, "do_sample": True})])


def test_the_chat_template_must_be_the_file_s(tmp_path):
    folder = tmp_path / "model"
    save(build("llama", vocab_size=VOCABULARY, pad_token_id=2), folder)  # for its template
    llama_tokenizer(folder)
    template = (folder / "chat_template.jinja").read_text()
    with gguf_files.converter_in_process():
        write_gguf(folder, tmp_path / "with.gguf")
        (folder / "chat_template.jinja").unlink()
        write_gguf(folder, tmp_path / "without.gguf")
    (folder / "chat_template.jinja").write_text(template)
    wanted = settings(chat_template=True)
    lm = gguf_language_model(tmp_path / "with.gguf", folder, wanted)
    assert lm.apply_chat_template([{"role": "user", "content": "abc"}]) == "abc"
    with pytest.raises(InputError, match=r"evaluate\.chat_template: .*without\.gguf does not have the chat template"):
        gguf_language_model(tmp_path / "without.gguf", folder, wanted)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A Phi-3 with other rotary embeddings beyond 256 tokens: its GGUF file and its checkpoint."""
    from conversion.phi import Phi3MiniModel

    folder = tmp_path_factory.mktemp("longrope") / "model"
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "head_dim": 16, "pad_token_id": 2, "sliding_window": None}
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    lengths = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    save(build("phi3", **sizes, **lengths, rope_scaling=factors), folder, tokenizer=False)
    llama_tokenizer(folder)
    with gguf_files.converter_in_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Phi3MiniModel, "set_vocab", Phi3MiniModel._set_vocab_llama_hf)
        write_gguf(folder, folder.with_name("model.gguf"), "f32")
    return folder.with_name("model.gguf"), folder


@pytest.mark.parametrize(("max_length", "short"), [(None, True), (256, True), (1024, False)])
def test_longrope_is_scored_in_the_context_that_is_served(max_length, short, longrope, monkeypatch):
    """A short text: llama.cpp has the factors of transformers in a context of no more than 256 tokens only."""
    lengths = []

    def context(model, sequences, length):
        lengths.append(length)
        return LlamaContext(model, sequences, length)

    monkeypatch.setattr("ptl.evaluation.gguf.LlamaContext", context)
    lm = gguf_language_model(*longrope, settings(max_length=max_length))
    assert lm.max_length == (max_length or 256)
    theirs = language_model(longrope[1], settings())
    theirs.start_notes()
    asked = [request("tom has twelve apples and buys thirty more of them", " so he has many")]
    ((ours, _),), ((expected, _),) = lm.loglikelihood(asked), theirs.loglikelihood(asked)
    assert (ours == pytest.approx(expected, abs=2e-2)) == short
    lm.generate_until([request("tom", {"until": [], "max_gen_toks": 2})])
    assert [length <= 256 for length in lengths] == [short, short]


def test_speed_has_the_rows_of_transformers_models(file):
    wanted = Speed(batch_sizes=(1, 3), repeats=2)
    rows = gguf_speed({"it": file}, wanted)["it"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
    assert gguf_speed({"it": file}, Speed(repeats=0)) == {"it": []}
