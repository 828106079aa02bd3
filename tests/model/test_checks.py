"""What a model cannot do is found from its files, by `ptl validate` and by the step, before anything is loaded."""

import json
import shutil

import pytest
from recovering import DATA, DENSE, ROOT, SOURCE, recover

from ptl.config.recover import Recovery
from ptl.config.run import Calibration, Evaluate, ModelSource, load_config
from ptl.config.schedule import Prune
from ptl.errors import InputError
from ptl.model.checkpoint import CHAT_TEMPLATES
from ptl.model.hub import import_checkpoint
from ptl.preflight.preflight import preflight
from ptl.pruning.prune import prune_checkpoint
from ptl.recovery import distillation, training

TINY = load_config(ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml")
CPT = {"method": "cpt", "max_length": 128}
SCORED = Calibration(data=DATA.sources[0], num_sequences=2, max_length=128)


def edited(folder, name, change):
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without_eos(folder):
    edited(folder, "tokenizer_config.json", lambda fields: {n: v for n, v in fields.items() if n != "eos_token"})


def swapped_tokens(folder):
    def swap(core):
        vocabulary = core["model"]["vocab"]
        one, other = list(vocabulary)[100:102]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        return core

    edited(folder, "tokenizer.json", swap)


UNREADABLE = {
    "half-a-file": lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:900]),
    "no-tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}'),
    "a-list": lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
    "no-text": lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff\xfe\x00"),
    "too-deep": lambda folder: (folder / "special_tokens_map.json").write_text("[" * 100_000),
}


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(DENSE, tmp_path / "model")


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights fails a test."""

    def loaded(*args):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(training, "load", loaded)
    monkeypatch.setattr(distillation, "load_teacher", loaded)


def validate(model, *stages, calibration=TINY.calibration, evaluate=TINY.evaluate, training=TINY.training):
    """What `ptl validate` does."""
    changed = {"model": ModelSource(path=str(model)), "calibration": calibration, "evaluate": evaluate}
    recovery = Recovery(stages=stages).stages if stages else TINY.recover
    preflight(TINY.model_copy(update={**changed, "training": training, "recover": recovery}))


def prune(model, tmp_path, calibration=SCORED):
    prune_checkpoint(model, tmp_path / "cut", Prune(), calibration, unit="neurons", goal=150_000, seed=0)


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_tokenizer_that_cannot_be_read(model, tmp_path, no_weights, case):
    UNREADABLE[case](model)
    for check in (lambda: validate(model), lambda: recover(model, tmp_path / "out", CPT)):
        with pytest.raises(InputError, match=r"model\.path: transformers cannot read the tokenizer of .*model"):
            check()


def test_a_tokenizer_that_only_pruning_reads(model, tmp_path):
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(InputError, match="cannot read"):
        prune(model, tmp_path)


def test_a_tokenizer_without_an_end_of_text(model, tmp_path, no_weights):
    without_eos(model)
    for check in (lambda: validate(model), lambda: recover(model, tmp_path / "out", CPT)):
        with pytest.raises(InputError, match="no EOS token, so no answer could end"):
            check()
    with pytest.raises(InputError, match="no EOS token"):
        prune(model, tmp_path)


@pytest.mark.slow
def test_lengths_above_the_context(model, tmp_path, no_weights):
    said = r"{}: {} is more than the model's 256 positions .*; lower it to 256"
    long = TINY.calibration.model_copy(update={"max_length": 300})
    with pytest.raises(InputError, match=said.format(r"calibration\.max_length", 300)):
        validate(model, calibration=long)
    with pytest.raises(InputError, match=said.format(r"calibration\.max_length", 300)):
        prune(model, tmp_path, SCORED.model_copy(update={"max_length": 300}))
    evaluate = Evaluate(**TINY.evaluate.model_dump() | {"max_length": 257})
    with pytest.raises(InputError, match=said.format(r"evaluate\.max_length", 257)):
        validate(model, evaluate=evaluate)
    grpo = {"method": "grpo", "max_completion_length": 512, "rewards": [{"name": "final_answer"}]}
    for stage, field in ((CPT | {"max_length": 512}, "max_length"), (grpo, "max_completion_length")):
        for check in (
            lambda s=stage: validate(model, CPT, s),
            lambda s=stage: recover(model, tmp_path / "out", CPT, s),
        ):
            with pytest.raises(InputError, match=said.format(rf"recover\.{field}", 512)):
                check()


def test_a_teacher_with_another_vocabulary_or_a_shorter_context(model, tmp_path, no_weights):
    stages = (CPT | {"share": 0.5}, {"method": "distil", "max_length": 128, "teacher": str(model)})
    validate(DENSE, *stages)
    swapped_tokens(model)
    for check in (lambda: validate(DENSE, *stages), lambda: recover(DENSE, tmp_path / "out", *stages)):
        with pytest.raises(InputError, match=r"recover\.teacher: .*model has another vocabulary .*4 entries differ"):
            check()
    shutil.copyfile(DENSE / "tokenizer.json", model / "tokenizer.json")
    edited(model, "config.json", lambda fields: fields | {"max_position_embeddings": 64})
    with pytest.raises(InputError, match=r"recover\.max_length \(for recover\.teacher\): 128 is more than"):
        validate(DENSE, *stages)
    with pytest.raises(InputError, match=r"recover\.teacher: no config\.json in .*nowhere"):
        validate(DENSE, stages[0], stages[1] | {"teacher": str(tmp_path / "nowhere")})


def test_chats_need_a_template(model, tmp_path):
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    source = {"source": str(tmp_path / "a.jsonl"), "format": "messages"}
    chats = type(TINY.training)(sources=[SOURCE, source])
    with pytest.raises(InputError, match=r"training\.sources\.1\.format: `messages` needs a chat template"):
        validate(model, training=chats)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    validate(model, training=chats)


def test_a_chat_that_only_reinforcement_learning_can_use(tmp_path, no_weights):
    chats = [[{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]] * 3
    chats.append([{"role": "user", "content": "1+1?"}])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat, "answer": "2"}) + "\n" for chat in chats))
    model = shutil.copytree(DENSE, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    data = type(TINY.training)(sources=[{"source": str(tmp_path / "a.jsonl"), "format": "messages"}])
    grpo = {"method": "grpo", "max_completion_length": 44, "rewards": [{"name": "math"}]}
    validate(model, grpo, training=data)
    for check in (
        lambda: validate(model, CPT, grpo, training=data),
        lambda: recover(model, tmp_path / "out", CPT, grpo, data=data),
    ):
        with pytest.raises(InputError, match=r"row 4 of .* ends with a turn of role 'user'"):
            check()


def test_a_later_stage_is_checked_before_the_first_one_trains(tmp_path, no_weights):
    rewards = [{"name": "math", "answer": "{solution}"}]
    with pytest.raises(InputError, match="lacks 'solution'"):
        recover(DENSE, tmp_path / "out", CPT, {"method": "grpo", "max_completion_length": 44, "rewards": rewards})


@pytest.mark.slow
def test_templates_beside_the_default_one_travel_with_the_model(model, tmp_path):
    from transformers import AutoTokenizer

    (model / CHAT_TEMPLATES).mkdir()
    (model / "chat_template.jinja").write_text("default")
    (model / CHAT_TEMPLATES / "tool_use.jinja").write_text("with tools")
    import_checkpoint(str(model), None, tmp_path / "imported")
    prune(tmp_path / "imported", tmp_path)
    recover(tmp_path / "cut", tmp_path / "out", CPT, tokens=100)
    for folder in (tmp_path / "cut", tmp_path / "out"):
        templates = AutoTokenizer.from_pretrained(folder).chat_template
        assert templates == {"default": "default", "tool_use": "with tools"}
