"""`ptl init`: what it writes can be validated and planned, and fits on the GPUs; its errors: golden/commands.txt."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
import whole_run
from bodies import PUBLISHED, body
from chats import tokenizer_with
from checkout import DENSE, EXAMPLE, TINY
from tiny_models import with_reasoners_tokenizer

from ptl.config.chat import Chat
from ptl.config.run import load_config
from ptl.data.sources import GENERAL, SourceRow, texts
from ptl.errors import InputError
from ptl.evaluation import language_models
from ptl.evaluation.tasks import check_tasks
from ptl.model.hub import SMALL_FILES
from ptl.preflight import preflight, starter, starter_rows
from ptl.preflight.forecast import forecast
from ptl.preflight.forecast_model import shape_of

ROWS = ["--data", EXAMPLE / "train.jsonl.gz", "--task", EXAMPLE / "tiny_reasoner.yaml"]


def folder_of(config, name):
    """A folder with a model's config.json, and no weights."""
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(config))
    return Path(name).absolute()


@pytest.fixture
def init(ptl):
    """Run `ptl init`; its config and what it printed."""

    def run(*arguments):
        code, said = ptl("init", *arguments)
        assert code == 0, said
        return load_config(re.search("^wrote (.*)$", said, re.M)[1]), said

    return run


@pytest.fixture
def qwen3_8b(ptl):
    return folder_of(PUBLISHED["qwen3_8b"], "qwen3-8b")


@pytest.fixture
def chat_model(qwen3_8b):
    """Qwen3-8B's config with its own chat template, or another; the token of EOS ends its answers, as in the hub's."""

    def with_template(name="qwen3", *, post_trained=True):
        tokenizer = tokenizer_with(name)
        tokenizer.save_pretrained(qwen3_8b)
        ends = {"eos_token_id": [tokenizer.eos_token_id, 7] if post_trained else 7}
        (qwen3_8b / "generation_config.json").write_text(json.dumps(ends))
        return qwen3_8b

    return with_template


def test_qwen3_8b_on_eight_gpus_and_on_one(ptl, init, qwen3_8b):
    config, said = init(qwen3_8b, *ROWS, "--gpus", 8, "--target", 0.3)
    assert (config.name, config.resources.accelerators, config.schedule.target) == (
        "qwen3-8b",
        8,
        0.3,
    )
    assert config.prune.repair == 1300
    (stage,) = config.recover
    assert (stage.sharding, stage.lora, stage.dtype, stage.learning_rate) == (
        "fsdp",
        None,
        "bfloat16",
        8.2e-6,
    )
    assert (
        config.training.sources[0].source
        == config.calibration.data[0].source
        == str(EXAMPLE / "train.jsonl.gz")
    )
    assert all(step.fits for step in forecast(config).steps)
    # GiB of the host: 8 for each process and one more, and 30.5 for each copy of the weights.
    assert (config.resources.memory, config.resources.of_step("recover").memory) == (
        "103Gi",
        "347Gi",
    )
    assert (
        "from 8.19B to 5.7B" in said
        and "per removed parameter" in said
        and "ptl validate qwen3-8b.yaml" in said
    )
    assert ptl("init", qwen3_8b)[0] == 2  # a file is overwritten only when asked
    config, _ = init(qwen3_8b, "--force", "--gpu", "h100")
    (stage,) = config.recover  # an adapter, which learns ten times as fast
    assert (stage.lora.rank, stage.learning_rate, config.resources.accelerators) == (64, 8.2e-5, 1)
    assert config.schedule.recovery_tokens == 250_000_000


def test_a_machine_without_a_gpu_gets_a_config_that_it_can_run(ptl, init, chat_model, monkeypatch):
    for here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        config, said = init(chat_model(), *ROWS, "--force")
        asked = (config.resources.accelerator, config.evaluate.backend)
        if here:
            assert (
                asked == ("nvidia.com/gpu", "vllm") and "The GPU here is counted as h200." in said
            )
        else:
            assert asked == (None, "hf") and "No GPU here: the config asks for none" in said
            language_models.check_backend(config.evaluate)
    # What the user says decides, and is not commented on.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in (("--gpu", "h200", "--gpus", 2), ("--gpus", 8)):
        config, said = init(chat_model(), *ROWS, "--force", *options)
        assert config.resources.accelerators == options[-1] and "GPU here" not in said


def test_each_kind_of_gpu_gets_what_fits_or_a_remedy_that_works(ptl, qwen3_8b):
    for gpu in ("t4", "a100-40", "h200"):
        code, said = ptl("init", qwen3_8b, "--gpu", gpu, "--gpus", 2, "--force")
        if code:
            gpu = re.match(r"error: --gpu: .*name a larger GPU \(([\w-]+)", said)[1]
            code, said = ptl("init", qwen3_8b, "--gpu", gpu, "--gpus", 2, "--force")
        config = load_config("qwen3-8b.yaml")
        assert code == 0 and all(step.fits for step in forecast(config, gpu).steps), said
        # A batch is divided evenly, which the training checks hours later.
        (stage,) = config.recover
        assert stage.batch_size % (stage.accumulation * config.resources.accelerators) == 0, gpu


def test_a_users_own_model_rows_and_task_validate(ptl, init):
    # Paths are from the working directory, and in the config from its own folder.
    shutil.copytree(EXAMPLE, "examples/tiny_reasoner")
    Path("configs").mkdir()
    config, _ = init(
        *("examples/tiny_reasoner/checkpoint", "-o", "configs/mine.yaml", "--gpu", "none"),
        *(
            "--data",
            "examples/tiny_reasoner/train.jsonl.gz",
            "--task",
            "examples/tiny_reasoner/tiny_reasoner.yaml",
        ),
    )
    assert ptl("validate", "configs/mine.yaml")[0] == 0
    assert config.model.path == str(Path("examples/tiny_reasoner/checkpoint").absolute())
    assert config.training.sources[0].source == str(
        Path("examples/tiny_reasoner/train.jsonl.gz").absolute()
    )
    assert config.recover[0].max_length <= 256  # this model's positions
    assert config.resources.accelerators == 0
    # A target in memory becomes a number of parameters.
    config, said = init(DENSE, "--target", "300KiB", "--gpu", "none", "-o", "small.yaml")
    assert config.schedule.target == 88_064 and "without 59 %" in said


def test_of_a_mixture_experts_are_removed_and_all_of_its_parameters_need_memory(init):
    config, said = init(folder_of(PUBLISHED["qwen3_30b_a3b"], "qwen3-30b"), "--gpus", 8)
    assert "from 30.5B to 21.2B" in said
    assert (config.prune.target, config.prune.criterion, config.prune.repair) == (
        "experts",
        "reap",
        0,
    )
    assert (config.resources.accelerators, config.recover[0].sharding, config.recover[0].lora) == (
        8,
        "fsdp",
        None,
    )
    assert all(step.fits for step in forecast(config).steps)


BODY = {
    "params": 1_000_000,
    "layers": 1,
    "width": 100,
    "params_per_neuron": 9_000,
    "params_per_layer": 1,
}
MIXTURE = BODY | {"experts": 10, "fewest_experts": 4, "params_per_expert": 51_000}


def test_target_tokens_and_learning_rate_follow_the_model_and_the_rows():
    for sizes, changes, tokens, share in (
        (BODY, {}, None, 0.3),
        (BODY, {"params_per_neuron": 6_000}, None, 0.3),
        (BODY, {"params_per_neuron": 5_999}, None, 0.25),  # half of what can go, in steps of 0.05
        (BODY, {"params_per_neuron": 3_000}, None, 0.15),
        (BODY, {"params_per_neuron": 100}, None, 0.05),
        (BODY, {}, 7_500, 0.3),  # four passes are 0.1 tokens for each of 300,000 parameters
        (BODY, {}, 7_499, 0.25),
        (BODY, {}, 10, 0.05),
        (MIXTURE, {}, None, 0.15),
    ):
        assert starter.default_target(body(**sizes | changes), tokens) == share, (changes, tokens)
    amounts = [
        (12_345_678, None),
        (1_000_000, None),
        (10_000_000, 30_000),
        (10_000_000, 1000),
        (10_000_000, 10**9),
    ]
    assert [starter._tokens(*amount) for amount in amounts] == [
        1_200_000,
        500_000,
        120_000,
        10_000,
        1_000_000,
    ]
    # The largest batch with which there are 200 steps, of rows of 128 tokens, as this model reads 256.
    shape = shape_of(str(DENSE))
    for batch_size in (64, 32, 16):
        least = 200 * batch_size * 128
        sizes = [
            starter._training_values(None, shape, tokens, 1)["batch_size"]
            for tokens in (least, least - 1)
        ]
        assert sizes == [batch_size, batch_size // 2]
    # It doubles with each tenth of the parameters; nothing was measured outside of these shares.
    rates = {0.1: 8e-6, 0.3: 8e-6, 0.4: 16e-6, 0.5: 32e-6, 0.66: 8e-6 * 2**3.6, 0.9: 8e-6 * 2**3.6}
    assert {share: starter.default_rate(8e9, share) for share in rates} == pytest.approx(rates)
    assert [starter.default_rate(params, 0.3) for params in (10**7, 10**7 + 1, 10**11)] == [
        1.2e-4,
        2e-4,
        4e-6,
    ]


@pytest.fixture(params=["qwen3_moe", "glm4_moe"])  # glm4_moe: a shared expert and dense layers
def of_a_mixture(request, init):
    """A config for a small one with the tiny reasoner's tokenizer."""
    with_reasoners_tokenizer(request.param, Path("mixture"))
    init("mixture", "-o", "mine.yaml", "--gpu", "none", "--target", 0.2, *ROWS)
    return request.param


def test_no_iteration_has_nothing_to_remove(of_a_mixture, ptl):
    assert load_config("mine.yaml").schedule.iterations < 4
    assert "nothing is left to remove" not in ptl("validate", "mine.yaml")[1]


def test_the_config_of_a_mixture_is_validated_and_planned(of_a_mixture, ptl):
    for name in ("validate", "plan"):
        code, said = ptl(name, "mine.yaml")
        assert code == 0, said


@pytest.mark.nightly
def test_the_config_of_a_mixture_is_rehearsed(of_a_mixture):
    config, home = Path("mine.yaml").absolute(), Path("runs").absolute()
    whole_run.finish(whole_run.start(config, home, "--rehearse", "--set", "schedule.iterations=1"))
    rows = json.loads((home / "latest/result.json").read_text())["rows"]
    experts = {"qwen3_moe": 4, "glm4_moe": 3}[of_a_mixture]
    assert [row["scores"]["experts"] for row in rows if row["arm"] == "loop"] == [6, experts]


def test_what_is_left_to_fill_in_is_refused_until_it_is(ptl):
    code, said = ptl("init", DENSE, "-o", "mine.yaml", "--gpu", "none")
    assert code == 0 and "Fill in first" in said
    file = Path("mine.yaml")
    for fields, placeholder, value in (
        (
            "calibration.data.0.source, training.sources.0.source and evaluate.tasks.0.name",
            "FILL-IN.jsonl",
            ROWS[1],
        ),
        ("evaluate.tasks.0.name", '"FILL-IN"', f'"{ROWS[3]}"'),
    ):
        code, printed = ptl("validate", file)
        assert code == 2 and printed.startswith(
            f"error: {fields}: FILL-IN is still to be filled in; "
        ), printed
        file.write_text(file.read_text().replace(placeholder, str(value)))
    code, printed = ptl("validate", file)
    assert code == 0, printed


def test_names_of_folders_and_files(init, qwen3_8b):
    assert (
        starter._as_seen_from(Path("there"), "s3://bucket/rows.jsonl") == "s3://bucket/rows.jsonl"
    )
    qwen3_8b = qwen3_8b.rename("1e5")  # which is no text in YAML
    assert init("1e5", "-o", "x.yaml", "--force")[0].name == "1e5"
    # A folder of snapshots is not the hub's.
    Path("snapshots").mkdir()
    qwen3_8b.rename("snapshots/step-1000")
    config, _ = init("snapshots/step-1000")
    assert (config.model.path, config.model.revision) == (
        str(Path("snapshots/step-1000").absolute()),
        None,
    )
    names = {"Qwen/Qwen2.5-7B": "qwen2-5-7b", "a/__": "model", "x" * 70: "x" * 60}
    assert {name: starter.run_name(name) for name in names} == names


def test_what_is_on_the_hub_is_pinned_to_its_commit_and_asked_for_once(
    init, qwen3_8b, monkeypatch, tmp_path
):
    snapshot = tmp_path / "hub/models--Qwen--Qwen3-8B/snapshots/0123abc"
    shutil.copytree(qwen3_8b, snapshot)
    asked = []

    def give(path, **options):
        asked.append((path, options["allow_patterns"]))
        return str(snapshot)

    def stream(name, subset, **options):
        asked.append((name, subset, options))
        return iter([{"question": "1+1?" * 400, "answer": "#### 2"}] * 10_000)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_: SimpleNamespace(sha="4567def"))
    monkeypatch.setattr(datasets, "load_dataset", stream)
    config, _ = init("Qwen/Qwen3-8B", "--data", "openai/gsm8k:main", "--task", "mbpp")
    options = {"split": "train", "revision": "4567def", "streaming": True}
    assert asked == [("openai/gsm8k", "main", options), ("Qwen/Qwen3-8B", [*SMALL_FILES])]
    assert (config.model.path, config.model.revision) == ("Qwen/Qwen3-8B", "0123abc")
    source, guard = config.calibration.data
    assert guard.source == GENERAL
    assert (source.source, source.subset, source.revision) == ("openai/gsm8k", "main", "4567def")
    assert config.evaluate.allow_code


def test_a_model_that_thinks_is_calibrated_trained_and_scored_as_it_is_served(
    ptl, init, chat_model
):
    on_gpu = [*ROWS, "--gpu", "h100"]
    config, _ = init(chat_model(), *on_gpu)
    assert (config.chat.enabled, config.chat.template_kwargs) == (True, {"enable_thinking": True})
    source = config.training.sources[0]
    assert (source.prompt, source.completion, config.recover[0].method) == (
        "{question}",
        "{answer}",
        "distil",
    )
    evaluate = config.evaluate
    assert (evaluate.backend, evaluate.tasks[0].max_new_tokens, evaluate.speed.repeats) == (
        "vllm",
        8192,
        0,
    )
    assert all(step.fits for step in forecast(config).steps)
    # In the other mode, and of a model that does not think, answers are as short as the tasks say.
    config, _ = init(chat_model("qwen3_instruct_2507"), *on_gpu, "--force")
    assert (
        config.chat.enabled
        and not config.chat.template_kwargs
        and config.recover[0].method == "distil"
    )
    assert (config.evaluate.backend, config.evaluate.tasks[0].max_new_tokens) == ("hf", None)
    # A base model may have a template, too.
    config, _ = init(chat_model(post_trained=False), *on_gpu, "--force")
    assert not config.chat.enabled and config.recover[0].method == "cpt"
    assert config.training.sources[0].prompt == "Question: {question}\nAnswer:"


def test_a_mode_in_which_nobody_serves_the_model_is_warned_of(chat_model):
    raw = {"target": 0.3, "recovery_tokens": 10**6}
    config = load_config(TINY, {f"schedule.{k}": v for k, v in raw.items()})
    (warning,) = preflight.chat_warnings(config, chat_model())
    assert warning.startswith("chat.enabled=false, and the model thinks") and warning.endswith(
        "set chat.enabled=true"
    )
    thinking = config.model_copy(update={"chat": Chat(enabled=True)})
    (warning,) = preflight.chat_warnings(thinking, chat_model())
    assert (
        "tiny_reasoner.yaml: the model thinks" in warning
        and "max_new_tokens of the task to 8192" in warning
    )
    at_once = config.model_copy(
        update={"chat": Chat(enabled=True, template_kwargs={"enable_thinking": False})}
    )
    assert list(preflight.chat_warnings(at_once, chat_model())) == []
    # A template that says the day hides nothing.
    template = chat_model() / "chat_template.jinja"
    template.write_text('{{ strftime_now("%d") }}' + template.read_text())
    dated, short = preflight.chat_warnings(thinking, template.parent)
    assert "writes today's date" in dated and "max_new_tokens of the task to 8192" in short


def test_chats_are_scored_as_chats_and_few_rows_lower_the_target_or_are_warned_of(init, chat_model):
    qwen3_8b = chat_model("qwen2_5", post_trained=False)

    def chats(number, length, *options):
        turns = [
            {"role": "user", "content": length * "a"},
            {"role": "assistant", "content": length * "b"},
        ]
        Path("chats.jsonl").write_text(number * (json.dumps({"messages": turns}) + "\n"))
        options = ["--data", "chats.jsonl", "--task", "gsm8k", "--gpu", "none", "--force", *options]
        config, said = init(qwen3_8b, *options)
        assert config.training.sources[0].format == "messages" and config.chat.enabled
        return config.schedule, said

    assert chats(1, 1)[0].recovery_tokens == 10_000  # one short row
    # 30M tokens, of which four passes are enough for 1.2B parameters
    schedule, said = chats(75_000, 800)
    assert (schedule.target, schedule.recovery_tokens, "warning" in said) == (
        0.1,
        85_000_000,
        False,
    )
    assert "Less than the usual 30 %: " in said
    schedule, said = chats(75_000, 800, "--target", 0.3)
    assert (
        schedule.target == 0.3 and "warning: 120,000,000 recovery tokens: 0.048 per removed" in said
    )


def test_each_task_has_a_metric_that_it_reports(init, qwen3_8b):
    names = ["gsm8k", "arc_easy", "agieval", "minerva_math500", "mbpp", "humaneval"]
    config, _ = init(qwen3_8b, *(option for name in names for option in ("--task", name)))
    # Of a group the metric that all of its members have.
    metrics = ["exact_match", "acc", "acc", "exact_match", "pass_at_1", "pass@1"]
    assert [(task.name, task.metric) for task in config.evaluate.tasks] == list(
        zip(names, metrics, strict=True)
    )
    check_tasks(config.evaluate)


CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def read(folder, *rows, columns=None):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return starter_rows.read(str(folder / "rows.jsonl"), columns)


def test_rows_are_read_by_their_columns(tmp_path):
    for row, columns, prompt, completion in (
        ({"question": "1+1?", "answer": "#### 2"}, None, "Question: 1+1?\nAnswer:", " #### 2"),
        ({"prompt": "1+1=", "completion": " 2", "text": "x"}, None, "1+1=", " 2"),
        ({"text": "1+1=2", "url": "x"}, None, "", "1+1=2"),
        ({"messages": CHAT, "prompt": "1+1?"}, None, "1+1?", "2"),
        (
            {"instruction": "Add 1 and 1", "output": "2"},
            "instruction, output",
            "Add 1 and 1\n",
            "2",
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": "2", "text": "x"},
            None,
            "Add\n1 1\n",
            "2",
        ),
        ({"instruction": "Add 1 and 1", "output": "2"}, None, "Add 1 and 1\n", "2"),
        ({"conversations": CHAT}, "conversations", "1+1?", "2"),
        ({"body": "1+1=2"}, "body", "", "1+1=2"),
    ):
        rows = read(tmp_path, row, columns=columns)
        assert texts(SourceRow(row, rows.source, 1)) == (prompt, completion)
        assert rows.tokens == len(prompt + completion) / 4 and rows.max_length == 256, row
    for characters, length in ((1024, 256), (1025, 512), (100_000, 4096)):
        assert read(tmp_path, {"text": "x"}, {"text": "x" * characters}).max_length == length, (
            characters
        )


def test_rows_that_cannot_be_read_are_refused(tmp_path):
    for row, columns, said in (
        ({"title": "x", "body": "y"}, None, "--columns: missing; the rows have body, title"),
        (
            {"title": "x", "body": "y"},
            "title,text",
            "--columns: title,text; the rows have body, title",
        ),
        (
            {"my.question": "x", "a": "y"},
            "my.question,a",
            "--columns: my.question,a: no template .*; rename it",
        ),
        ({"messages": CHAT[:1]}, None, "--data.*: row 1 .* no answer"),
        (
            {"conversations": [{"from": "human", "value": "1+1?"}]},
            "conversations",
            "--data.* role: user",
        ),
    ):
        with pytest.raises(InputError, match=f"(?s)^{said}"):
            read(tmp_path, row, columns=columns)


def test_columns_that_no_template_reads_are_named(ptl, init, tmp_path):
    row = {"instruction": "Add", "input": "1 and 1", "output": "2", "note": ""}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    options = [
        "--gpu",
        "none",
        "--data",
        "rows.jsonl",
        "--task",
        EXAMPLE / "tiny_reasoner.yaml",
        "-o",
        "mine.yaml",
    ]
    _, said = init(DENSE, *options)
    assert "no template reads" not in said  # an empty column is not missed
    _, said = init(DENSE, *options, "--columns", "instruction,output", "--force")
    assert (
        "warning: --data: no template reads input of rows.jsonl: name what the model needs" in said
    )
    code, said = ptl("validate", "mine.yaml")
    assert (
        code == 0 and said.count("calibration.data.0: no template reads input of rows.jsonl") == 1
    ), said


def test_the_line_that_is_said_for_a_csv_file_converts_it(ptl):
    Path("my rows.csv").write_text('\ufeffquestion,answer\n"1+1,\nor 2?",2\n', encoding="utf-8")
    code, said = ptl("init", DENSE, "--data", "my rows.csv", "--gpu", "none")
    assert code == 2 and said.startswith("error: --data: my rows.csv is no .jsonl"), said
    subprocess.run(["bash", "-c", said.strip().partition("convert it: ")[2]], check=True)
    assert json.loads(Path("my rows.jsonl").read_text()) == {
        "question": "1+1,\nor 2?",
        "answer": "2",
    }
