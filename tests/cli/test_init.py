"""`ptl init`: what it writes can be read, validated and planned, fits on the GPUs, or is refused by its options."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors
from tiny_models import build
from transformers import AutoTokenizer

from ptl.cli import app
from ptl.config.run import load_config
from ptl.data.sources import SourceRow, texts
from ptl.errors import InputError
from ptl.evaluation.tasks import check_tasks
from ptl.preflight import starter, starter_rows
from ptl.preflight.forecast import forecast
from ptl.preflight.forecast_model import GPUS

ROOT = Path(__file__).parents[2]
REASONER = ROOT / "examples/tiny_reasoner"
ROWS = ["--data", REASONER / "train.jsonl.gz", "--task", REASONER / "tiny_reasoner.yaml"]
# Qwen3-8B, as its config.json says it.
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# Qwen3-30B-A3B
QWEN3_30B = QWEN3_8B | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def offline(*_, **__):
    raise errors.LocalEntryNotFoundError("no connection")


@pytest.fixture
def ptl(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptl", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            app.main()
        printed = capsys.readouterr()
        return done.value.code or 0, printed.out + printed.err

    return run


@pytest.fixture
def qwen3_8b(tmp_path):
    """A folder with the config.json of Qwen3-8B, and no weights."""
    folder = tmp_path / "qwen3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def test_qwen3_8b_on_eight_gpus(ptl, qwen3_8b):
    code, said = ptl("init", qwen3_8b, *ROWS, "--gpus", 8, "--target", 0.3)
    assert code == 0, said
    config = load_config("qwen3-8b.yaml")
    assert config.name == "qwen3-8b"
    assert config.resources.accelerators == 8
    (stage,) = config.recover
    assert (stage.sharding, stage.lora, stage.dtype) == ("fsdp", None, "bfloat16")
    assert config.training.sources[0].source == config.calibration.data.source == str(REASONER / "train.jsonl.gz")
    assert all(step.fits for step in forecast(config).steps)
    assert "from 8.19B to 5.7B" in said and "per removed parameter" in said
    assert "ptl validate qwen3-8b.yaml" in said


def test_on_one_gpu_an_adapter(ptl, qwen3_8b):
    ptl("init", qwen3_8b)
    config = load_config("qwen3-8b.yaml")
    assert config.recover[0].lora is not None and config.resources.accelerators == 1
    assert config.schedule.recovery_tokens == 250_000_000


@pytest.mark.parametrize("gpu", GPUS)
def test_each_kind_of_gpu_gets_what_fits_or_a_remedy_that_works(gpu, ptl, qwen3_8b):
    code, said = ptl("init", qwen3_8b, "--gpu", gpu, "--gpus", 2)
    if code:
        gpu = re.match(r"error: --gpu: .*name a larger GPU \(([\w-]+)", said)[1]
        code, said = ptl("init", qwen3_8b, "--gpu", gpu, "--gpus", 2)
    config = load_config("qwen3-8b.yaml")
    assert all(step.fits for step in forecast(config, gpu).steps), said
    # A batch is divided evenly, which the training checks hours later.
    (stage,) = config.recover
    assert stage.batch_size % (stage.accumulation * config.resources.accelerators) == 0


@pytest.mark.slow
def test_a_users_own_model_rows_and_task_validate(ptl):
    # Paths are from the working directory, and in the config from its own folder.
    shutil.copytree(REASONER, "examples/tiny_reasoner")
    Path("configs").mkdir()
    code, said = ptl(
        *("init", "examples/tiny_reasoner/checkpoint", "-o", "configs/mine.yaml", "--gpu", "none"),
        *("--data", "examples/tiny_reasoner/train.jsonl.gz", "--task", "examples/tiny_reasoner/tiny_reasoner.yaml"),
    )
    assert code == 0, said
    code, said = ptl("validate", "configs/mine.yaml")
    assert code == 0, said
    config = load_config("configs/mine.yaml")
    assert config.model.path == str(Path("examples/tiny_reasoner/checkpoint").absolute())
    assert config.training.sources[0].source == str(Path("examples/tiny_reasoner/train.jsonl.gz").absolute())
    assert config.recover[0].max_length <= 256  # this model's positions
    assert config.resources.accelerators == 0


@pytest.fixture
def qwen3_30b(qwen3_8b):
    """The same folder with the config.json of a mixture of experts."""
    (qwen3_8b / "config.json").write_text(json.dumps(QWEN3_30B))
    return qwen3_8b.rename(qwen3_8b.with_name("qwen3-30b"))


def test_of_a_mixture_experts_are_removed_and_all_of_its_parameters_need_memory(ptl, qwen3_30b):
    code, said = ptl("init", qwen3_30b, "--gpus", 8)
    assert code == 0, said
    assert "from 30.5B to 21.2B" in said
    config = load_config("qwen3-30b.yaml")
    assert (config.prune.target, config.prune.criterion) == ("experts", "reap")
    assert (config.resources.accelerators, config.recover[0].sharding, config.recover[0].lora) == (8, "fsdp", None)
    assert all(step.fits for step in forecast(config).steps)
    text = Path("qwen3-30b.yaml").read_text()
    assert "on which experts are scored" in text


@pytest.mark.parametrize(
    ("changes", "target"),
    [({"num_experts": 9}, 0.05), ({"num_experts": 12}, 0.1), ({"vocab_size": 7_000_000}, 0.2)],
    ids=["nine", "twelve", "embeddings"],
)
def test_of_a_mixture_no_more_goes_than_half_of_its_experts_and_those_that_a_token_needs(
    ptl, qwen3_30b, changes, target
):
    (qwen3_30b / "config.json").write_text(json.dumps(QWEN3_30B | changes))
    code, said = ptl("init", qwen3_30b, "--gpu", "none")
    assert code == 0, said
    assert load_config("qwen3-30b.yaml").schedule.target == target
    assert "Less than the usual 30 %: at most half of what can go" in said


@pytest.mark.parametrize(
    ("changes", "options"),
    [({}, ["--target", 0.95]), ({"num_experts": 8}, [])],
    ids=["target", "all-in-use"],
)
def test_what_experts_cannot_reach_is_refused(ptl, qwen3_30b, changes, options):
    (qwen3_30b / "config.json").write_text(json.dumps(QWEN3_30B | changes))
    code, printed = ptl("init", qwen3_30b, *options)
    assert code == 2 and re.search("^error: --target: .* cannot be reached by experts", printed), printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "experts"), [("qwen3_moe", 4), ("glm4_moe", 3)], ids=["experts", "shared-expert-and-dense-layers"]
)
def test_the_config_of_a_mixture_is_validated_planned_and_rehearsed(variant, experts, ptl):
    tokenizer = AutoTokenizer.from_pretrained(REASONER / "checkpoint")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    build(variant, vocab_size=len(tokenizer), max_position_embeddings=256, **ids).save_pretrained("mixture")
    tokenizer.save_pretrained("mixture")
    code, said = ptl(
        *("init", "mixture", "-o", "mine.yaml", "--gpu", "none", "--target", 0.2),
        *ROWS,
    )
    assert code == 0, said
    for command in ("validate", "plan"):
        code, said = ptl(command, "mine.yaml")
        assert code == 0, said
    # A process of its own: a run sets variables of the environment, which steps of other tests would follow.
    command = ["run", "mine.yaml", "--rehearse", "--home", "runs", "--set", "schedule.iterations=1"]
    run = subprocess.run([sys.executable, "-m", "ptl", *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(Path("runs/latest/result.json").read_text())["rows"]
    assert [row["scores"]["experts"] for row in rows if row["arm"] == "loop"] == [6, experts]


def test_a_target_in_memory_becomes_a_goal(ptl):
    code, printed = ptl("init", REASONER / "checkpoint", "--target", "300KiB", "--gpu", "none", "-o", "small.yaml")
    assert code == 0 and "without 59 %" in printed
    assert load_config("small.yaml").schedule.target.memory == "300KiB"


def test_the_learning_rate_follows_the_removed_share():
    """Of the grid's rates the nearest one is at most 1.5 points behind the best, in every cell of the loop of eight."""
    choices = {}
    for line in (ROOT / "benchmarks" / "results" / "depth.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (row["arm"], row["phase"]) == ("loop of 8, taylor", "choice"):
            rates = choices.setdefault((row["share"], row["tokens"]), {})
            rates.setdefault(row["learning_rate"], []).append(row["accuracy"])
    assert len(choices) == 9
    for (share, _), rates in choices.items():
        rate = starter.default_rate(213_568, share)
        accuracies = {each: sum(values) / len(values) for each, values in rates.items()}
        nearest = min(accuracies, key=lambda each: abs(math.log(each / rate)))
        assert max(accuracies.values()) - accuracies[nearest] <= 0.015, share
    # Nothing was measured outside of these shares.
    assert starter.default_rate(8e9, 0.1) == starter.default_rate(8e9, 0.3) == pytest.approx(8e-6)
    assert starter.default_rate(8e9, 0.9) == starter.default_rate(8e9, 0.66)


@pytest.mark.slow
def test_what_is_left_to_fill_in_is_refused_until_it_is(ptl):
    code, said = ptl("init", REASONER / "checkpoint", "-o", "mine.yaml", "--gpu", "none")
    assert code == 0 and "Fill in first" in said
    code, said = ptl("validate", "mine.yaml")
    assert (code, "calibration.data.source: FILL-IN.jsonl is still to be filled in" in said) == (2, True)
    text = Path("mine.yaml").read_text().replace("FILL-IN.jsonl", str(REASONER / "train.jsonl.gz"))
    Path("mine.yaml").write_text(text)
    code, said = ptl("validate", "mine.yaml")
    assert (code, "FILL-IN is still to be filled in" in said) == (2, True)
    Path("mine.yaml").write_text(text.replace('"FILL-IN"', f'"{REASONER / "tiny_reasoner.yaml"}"'))
    code, said = ptl("validate", "mine.yaml")
    assert code == 0, said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "MODEL: 'nowhere' is no local folder"),
        ([ROOT / "docs"], "MODEL: .* has no config.json"),
        ([REASONER / "checkpoint", "--gpu", "h10"], "--gpu: 'h10' must be one of t4, "),
        ([REASONER / "checkpoint", "--target", "0.95"], "--target: .* cannot be reached by neurons"),
        ([REASONER / "checkpoint", "--target", 300_000], "--target: 300000 is no size below the model"),
        ([REASONER / "checkpoint", "--target", "30XB"], "--target: wrong values .*'30XB': must be a number"),
        ([REASONER / "checkpoint", "--data", "none.jsonl"], "--data: no file none.jsonl"),
        ([REASONER / "checkpoint", "--task", "gsm9k"], "--task: 'gsm9k' is no task .*gsm8k"),
        ([REASONER / "checkpoint", "-o", "none/x.yaml"], "--output: none/x.yaml must be a file in a folder"),
    ],
    ids=["nowhere", "no-config", "gpu", "unreachable", "target", "unit", "data", "task", "output"],
)
def test_errors_name_the_option(arguments, said, ptl, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, printed = ptl("init", *arguments)
    assert code == 2
    assert re.search(f"^error: {said}", printed.replace("\n", " ")), printed
    assert not list(Path().glob("*.yaml"))


def test_a_file_is_overwritten_only_when_asked(ptl, qwen3_8b):
    Path("qwen3-8b.yaml").write_text("mine")
    code, said = ptl("init", qwen3_8b)
    assert (code, "--output: qwen3-8b.yaml exists" in said, "--force" in said) == (2, True, True)
    assert Path("qwen3-8b.yaml").read_text() == "mine"
    assert ptl("init", qwen3_8b, "--force")[0] == 0
    assert load_config("qwen3-8b.yaml").model.path == str(qwen3_8b)


@pytest.mark.parametrize("name", ["2024", "no", "1e5", "null"])
def test_a_folder_whose_name_is_no_text_in_yaml(name, ptl, qwen3_8b):
    qwen3_8b.rename(name)
    code, said = ptl("init", name, "-o", "x.yaml")
    assert code == 0, said
    assert load_config("x.yaml").name == name


def test_a_folder_of_snapshots_is_not_the_hubs(ptl, qwen3_8b):
    Path("snapshots").mkdir()
    qwen3_8b.rename("snapshots/step-1000")
    ptl("init", "snapshots/step-1000")
    config = load_config("step-1000.yaml")
    assert (config.model.path, config.model.revision) == (str(Path("snapshots/step-1000").absolute()), None)


def test_a_config_inside_the_checkpoint_s_folder_names_the_folder(ptl, qwen3_8b):
    # A folder with the name of a task is none.
    Path("gsm8k").mkdir()
    code, said = ptl("init", "qwen3-8b", "-o", "qwen3-8b/my config.yaml", "--task", "gsm8k")
    assert code == 0, said
    assert "ptl run 'qwen3-8b/my config.yaml' --rehearse " in said
    config = load_config("qwen3-8b/my config.yaml")
    assert Path(config.model.path).samefile("qwen3-8b") and config.evaluate.tasks[0].name == "gsm8k"


def hub_error(kind):
    """An error of the hub, without the response that it came with."""
    return kind.__new__(kind, "no")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "accept its licence .* HF_TOKEN"),
        (errors.RepositoryNotFoundError, "check the id"),
        (errors.LocalEntryNotFoundError, "cannot be reached from here.*give the folder of a checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_the_hub_does_not_give(kind, said, ptl, monkeypatch):
    def refuse(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    code, printed = ptl("init", "qwen3-8B")
    assert code == 2
    assert re.search(said, printed), printed


@pytest.fixture
def asked(qwen3_8b, monkeypatch, tmp_path):
    """What the hub, which has Qwen3-8B and GSM8K, was asked for."""
    snapshot = tmp_path / "hub/models--Qwen--Qwen3-8B/snapshots/0123abc"
    shutil.copytree(qwen3_8b, snapshot)
    questions = []

    def give(path, **options):
        questions.append((path, options["allow_patterns"]))
        return str(snapshot)

    def stream(name, subset, **options):
        questions.append((name, subset, options))
        return iter([{"question": "1+1?" * 400, "answer": "#### 2"}] * 10_000)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_: SimpleNamespace(sha="4567def"))
    monkeypatch.setattr(datasets, "load_dataset", stream)
    return questions


def test_what_is_on_the_hub_is_pinned_to_its_commit_and_asked_for_once(ptl, asked):
    code, said = ptl("init", "Qwen/Qwen3-8B", "--data", "openai/gsm8k:main", "--task", "mbpp")
    assert code == 0, said
    options = {"split": "train", "revision": "4567def", "streaming": True}
    assert asked == [("openai/gsm8k", "main", options), ("Qwen/Qwen3-8B", ["config.json"])]
    config = load_config("qwen3-8b.yaml")
    assert (config.model.path, config.model.revision) == ("Qwen/Qwen3-8B", "0123abc")
    source = config.calibration.data
    assert (source.source, source.subset, source.revision) == ("openai/gsm8k", "main", "4567def")
    assert config.evaluate.allow_code


def test_the_page_shows_what_it_writes(ptl, asked):
    page = (ROOT / "docs/own-model.md").read_text()
    (command,) = re.findall(r"^ptl (init .*)$", page, re.M)
    ptl(*command.split())
    header = Path("qwen3-8b.yaml").read_text().partition("# Check it")[0]
    assert header in page


def test_of_a_model_with_small_ffns_less_is_removed_unless_asked(ptl, qwen3_8b):
    # Qwen3-0.6B: 44 % of the parameters are in the FFNs.
    small = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    (qwen3_8b / "config.json").write_text(json.dumps({**QWEN3_8B, **small, "tie_word_embeddings": True}))
    ptl("init", qwen3_8b)
    assert load_config("qwen3-8b.yaml").schedule.target == 0.2
    ptl("init", qwen3_8b, "--target", 0.3, "--force")
    assert load_config("qwen3-8b.yaml").schedule.target == 0.3


def test_chats_are_scored_as_chats(ptl, qwen3_8b):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    code, said = ptl("init", qwen3_8b, "--data", "chats.jsonl", "--task", "gsm8k")
    assert code == 0, said
    config = load_config("qwen3-8b.yaml")
    assert config.training.sources[0].format == "messages"
    assert config.evaluate.chat_template
    assert config.schedule.recovery_tokens == 10_000  # one short row


def test_a_target_that_the_rows_cannot_recover_is_lowered_or_warned_of(ptl, qwen3_8b):
    turns = [{"role": "user", "content": 800 * "a"}, {"role": "assistant", "content": 800 * "b"}]
    row = json.dumps({"messages": turns}) + "\n"  # 400 tokens

    def init(rows, *options):
        Path("chats.jsonl").write_text(rows * row)
        code, said = ptl("init", qwen3_8b, "--data", "chats.jsonl", "--gpu", "none", "--force", *options)
        assert code == 0, said
        return load_config("qwen3-8b.yaml").schedule, said

    schedule, said = init(75_000)  # 30M tokens, of which four passes are enough for 1.2B parameters
    assert (schedule.target, schedule.recovery_tokens, "warning" in said) == (0.1, 85_000_000, False)
    assert "Less than the usual 30 %: " in said
    assert "per removed parameter, about 2.8 passes" in said
    schedule, said = init(1000)
    assert (schedule.target, schedule.recovery_tokens) == (0.05, 1_600_000)
    assert "warning: 1,600,000 recovery tokens: 0.0035 per removed parameter" in said
    schedule, said = init(75_000, "--target", 0.3)
    assert schedule.target == 0.3 and "warning: 120,000,000 recovery tokens: 0.048 per removed" in said


def test_each_task_has_a_metric_that_it_reports(ptl, qwen3_8b):
    names = ["gsm8k", "arc_easy", "agieval", "minerva_math500", "mbpp", "humaneval"]
    code, said = ptl("init", qwen3_8b, *(option for name in names for option in ("--task", name)))
    assert code == 0, said
    config = load_config("qwen3-8b.yaml")
    # Of a group the metric that all of its members have.
    metrics = ["exact_match", "acc", "acc", "exact_match", "pass_at_1", "pass@1"]
    assert [(task.name, task.metric) for task in config.evaluate.tasks] == list(zip(names, metrics, strict=True))
    check_tasks(config.evaluate)


CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "completion"),
    [
        ({"question": "1+1?", "answer": "#### 2"}, None, "Question: 1+1?\nAnswer:", " #### 2"),
        ({"prompt": "1+1=", "completion": " 2", "text": "x"}, None, "1+1=", " 2"),
        ({"text": "1+1=2", "url": "x"}, None, "", "1+1=2"),
        ({"messages": CHAT, "prompt": "1+1?"}, None, "1+1?", "2"),
        ({"instruction": "Add 1 and 1", "output": "2"}, "instruction,output", "Add 1 and 1\n", "2"),
        ({"conversations": CHAT}, "conversations", "1+1?", "2"),
        ({"body": "1+1=2"}, "body", "", "1+1=2"),
    ],
)
def test_rows_are_read_by_their_columns(row, columns, prompt, completion, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = starter_rows.read(str(tmp_path / "rows.jsonl"), columns)
    assert texts(SourceRow(row, rows.source, 1)) == (prompt, completion)
    assert rows.tokens == len(prompt + completion) / 4 and rows.max_length == 256


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        (
            {"title": "x", "body": "y"},
            None,
            "--columns: missing; the rows have body, title; give --columns PROMPT,COMP",
        ),
        ({"title": "x", "body": "y"}, "title,text", "--columns: title,text; the rows have body, title; give"),
        ({"messages": CHAT[:1]}, None, "--data.*: row 1 .* no answer"),
        ({"conversations": [{"from": "human", "value": "1+1?"}]}, "conversations", "--data.* role: user"),
    ],
    ids=["unknown", "missing", "no-answer", "sharegpt"],
)
def test_rows_that_cannot_be_read_are_refused(row, columns, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"(?s)^{said}"):
        starter_rows.read(str(tmp_path / "rows.jsonl"), columns)


def test_an_unknown_data_set_names_the_option(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    with pytest.raises(InputError, match=r"^--data: 'a/b' is no file here.*no route"):
        starter_rows.read("a/b", None)
