"""What a model cannot do is found from its files, by `ptl validate` and by the step, before anything is loaded."""

import json
import shutil

import checkout
import pytest
from checkout import DENSE
from recovering import DATA, SOURCE, prune_to, recover
from transformers import AutoTokenizer

from ptl.config.chat import Chat
from ptl.config.recover import Recovery
from ptl.config.run import Calibration, ModelSource, load_config
from ptl.errors import InputError
from ptl.model import checkpoint
from ptl.model.hub import import_checkpoint
from ptl.preflight.preflight import preflight
from ptl.recovery import distillation, training

TINY = load_config(checkout.TINY)
CPT = {"method": "cpt", "max_length": 128}
GRPO = {"method": "grpo", "max_completion_length": 44}
SCORED = Calibration(data=DATA.sources[0], num_sequences=2, max_length=128)
UNREADABLE = r"model\.path: transformers cannot read the tokenizer of .*model"
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def edited(folder, name, change):
    checkpoint.write_json(folder / name, change(json.loads((folder / name).read_text())))


def swapped(core):
    """A tokenizer with two tokens in each other's place."""
    vocabulary = core["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return core


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(DENSE, tmp_path / "model")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Reading weights to train fails a test."""
    for module, name in ((training, "load"), (distillation, "load_teacher")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the weights were loaded"))


def validate(model, *stages, calibration=TINY.calibration, training=TINY.training, chat=None):
    """What `ptl validate` does."""
    changed = {
        "model": ModelSource(path=str(model)),
        "calibration": calibration,
        "chat": chat or TINY.chat,
    }
    recovery = Recovery(stages=stages).stages if stages else TINY.recover
    preflight(TINY.model_copy(update={**changed, "training": training, "recover": recovery}))


def prune(model, tmp_path, calibration=SCORED):
    prune_to(150_000, model, tmp_path / "cut", calibration)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", '{"version": "1.0", "trunc', UNREADABLE),
        ("tokenizer_config.json", "[1]", UNREADABLE),
        ("tokenizer_config.json", "{}", "no EOS token, so no answer could end"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_or_has_no_end_of_text(
    model, tmp_path, file, content, problem
):
    (model / file).write_text(content)
    steps = (lambda: recover(model, tmp_path / "out", CPT), lambda: prune(model, tmp_path))
    for check in (lambda: validate(model), *steps):
        with pytest.raises(InputError, match=problem):
            check()


def test_lengths_above_the_context(model, tmp_path):
    """In the steps; what `ptl validate` says of each is in golden/commands.txt."""
    scored, sft = SCORED.model_copy(update={"max_length": 257}), CPT | {"max_length": 257}
    for field, check in [
        ("calibration.max_length", lambda: prune(model, tmp_path, scored)),
        ("recover.max_length", lambda: recover(model, tmp_path / "out", sft)),
    ]:
        with pytest.raises(
            InputError, match=rf"^{field}: 257 is more than the model's 256 positions"
        ):
            check()
    validate(model, calibration=SCORED.model_copy(update={"max_length": 256}))


def test_a_teacher_with_another_vocabulary_or_a_shorter_context(model, tmp_path):
    stages = (CPT | {"share": 0.5}, {"method": "distil", "max_length": 128, "teacher": str(model)})
    validate(DENSE, *stages)
    edited(model, "tokenizer.json", swapped)
    for check in (
        lambda: validate(DENSE, *stages),
        lambda: recover(DENSE, tmp_path / "out", *stages),
    ):
        with pytest.raises(
            InputError, match=r"recover\.teacher: .*model has another vocabulary .*4 entries differ"
        ):
            check()
    shutil.copyfile(DENSE / "tokenizer.json", model / "tokenizer.json")
    edited(model, "config.json", lambda fields: fields | {"max_position_embeddings": 64})
    with pytest.raises(
        InputError, match=r"recover\.max_length \(for recover\.teacher\): 128 is more than"
    ):
        validate(DENSE, *stages)
    with pytest.raises(InputError, match=r"recover\.teacher: no config\.json in .*nowhere"):
        validate(DENSE, stages[0], stages[1] | {"teacher": str(tmp_path / "nowhere")})


def test_chats_need_a_template_and_an_answer(model, tmp_path):
    """But for reinforcement learning, which has its own answers."""
    path, source = tmp_path / "a.jsonl", {"source": str(tmp_path / "a.jsonl"), "format": "messages"}
    answered, unanswered = (
        json.dumps({"messages": row, "answer": "2"}) + "\n" for row in (CHAT, CHAT[:1])
    )
    path.write_text(3 * answered)
    chats = type(TINY.training)(sources=[SOURCE, source])
    with pytest.raises(
        InputError, match=r"training\.sources\.1\.format: `messages` needs a chat template"
    ):
        validate(model, training=chats)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    validate(model, training=chats)

    # What the template says of each row: a role that it refuses, a prompt that it writes otherwise with its answer.
    system = json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}) + "\n"
    path.write_text(3 * answered + system)
    for template, problem in (
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No.') }}{% endif %}{% endfor %}",
            "No.",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ messages | length }}{% endif %}",
            "writes the prompt otherwise",
        ),
    ):
        (model / "chat_template.jinja").write_text(template)
        with pytest.raises(
            InputError, match=rf"^training\.sources\.1\.messages: row 4 of .*a\.jsonl: .*{problem}"
        ):
            validate(model, training=chats)

    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    path.write_text(3 * answered + unanswered)
    chats, grpo = type(TINY.training)(sources=[source]), GRPO | {"rewards": [{"name": "math"}]}
    validate(model, grpo, training=chats)
    eos = AutoTokenizer.from_pretrained(model).eos_token
    with pytest.raises(
        InputError, match=r"^chat\.thought: .* special tokens, which trl leaves out"
    ):
        validate(model, grpo, training=chats, chat=Chat(enabled=True, thought=(eos, "x")))
    for check in (
        lambda: validate(model, CPT, grpo, training=chats),
        lambda: recover(model, tmp_path / "out", CPT, grpo, data=chats),
    ):
        with pytest.raises(InputError, match=r"row 4 of .* ends with a turn of role 'user'"):
            check()


def test_prompts_that_leave_no_room_for_an_answer(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(2 * (json.dumps({"text": "word " * 50, "answer": "2"}) + "\n"))
    long = {"source": str(path), "prompt": "{text}", "completion": "{answer}"}
    training = type(TINY.training)(sources=[SOURCE, long])
    with pytest.raises(
        InputError,
        match=rf"^training: no row of {path} is left: .* its prompt fills .*max_length=128",
    ):
        validate(DENSE, CPT, training=training)
    validate(DENSE, CPT | {"max_length": 256}, training=training)
    own = training.model_copy(update={"answers": "self", "max_new_tokens": 64})
    validate(DENSE, CPT, training=own)


def test_templates_beside_the_default_one_travel_with_the_model(model, tmp_path):
    (model / checkpoint.CHAT_TEMPLATES).mkdir()
    (model / "chat_template.jinja").write_text("default")
    (model / checkpoint.CHAT_TEMPLATES / "tool_use.jinja").write_text("with tools")
    import_checkpoint(str(model), None, tmp_path / "imported")
    prune(tmp_path / "imported", tmp_path)
    templates = AutoTokenizer.from_pretrained(tmp_path / "cut").chat_template
    assert templates == {"default": "default", "tool_use": "with tools"}
