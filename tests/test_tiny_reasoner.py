"""The tiny reasoner: generator, shipped data, tokenizer, task and the shipped checkpoint."""

import gzip
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ptl.model.dimensions import model_dimensions
from ptl.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "tiny_reasoner"
CHECKPOINT = FOLDER / "checkpoint"
NUM_HELD_OUT = 500


def load_problems() -> ModuleType:
    """The generator as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location("tiny_reasoner_problems", FOLDER / "problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


problems = load_problems()


@pytest.mark.slow
def test_the_training_script_makes_a_mixture_of_experts_that_can_be_pruned(tmp_path):
    """Two steps of it: what it learns in 3,500 is in the README."""
    command = [sys.executable, FOLDER / "train.py", "--experts", "4", "--steps", "2", "--items", "2", "-o", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    dimensions = model_dimensions(tmp_path, FAMILIES["qwen3_moe"])
    assert (dimensions.experts, dimensions.experts_per_token, dimensions.width) == (4, 2, 96)
    assert dimensions.active_params < dimensions.params


@pytest.fixture(scope="module")
def train_problems() -> list[dict[str, str]]:
    return list(problems.generate("train", 3000, seed=1))


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "test.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


def arithmetic(answer: str) -> str:
    """`74-34=40, 40-30=10` -> `74-34-30`, read from the answer's text and not by the generator's own code."""
    steps = re.findall(r"^(\d+)([-+*/]\d+)=", answer, flags=re.MULTILINE)
    return steps[0][0] + "".join(operation for _, operation in steps)


def test_no_tested_arithmetic_was_trained_on(train_problems, held_out):
    trained = {arithmetic(problem["answer"]) for problem in train_problems}
    tested = {arithmetic(problem["answer"]) for problem in held_out}
    assert len(trained) == 3000 and len(tested) == 1000  # no arithmetic twice within a split either
    assert not trained & tested


def test_shipped_splits_are_disjoint(held_out):
    with gzip.open(FOLDER / "train.jsonl.gz", "rt") as lines:
        trained = {arithmetic(json.loads(line)["answer"]) for line in lines}
    assert len(trained) == 10_000
    assert not trained & {arithmetic(problem["answer"]) for problem in held_out}


def test_generator_is_deterministic(train_problems):
    assert list(problems.generate("train", 200, seed=1)) == train_problems[:200]
    assert list(problems.generate("train", 200, seed=2)) != train_problems[:200]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'valid'.*train, test"):
        next(problems.generate("valid", 1, seed=0))


def test_every_step_is_right_and_leads_to_the_next(train_problems, held_out):
    for problem in train_problems + held_out:
        *steps, final = problem["answer"].split("\n")
        value = re.match(r"\d+", steps[0])[0]
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            a, b = int(left), int(right)
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert left == value and exact == int(result), problem
            assert all(1 <= number <= 99 for number in (a, b, exact)), problem
            value = result
        assert final == f"#### {value}" and 2 <= len(steps) <= 4, problem


def test_question_has_the_numbers_of_its_answer_and_at_most_one_more(train_problems):
    num_distracted = 0
    for problem in train_problems:
        asked = re.findall(r"\d+", problem["question"])
        needed = re.findall(r"\d+", arithmetic(problem["answer"]))
        assert len(asked) - len(needed) in (0, 1), problem
        num_distracted += len(asked) > len(needed)
        remaining = iter(asked)
        assert all(number in remaining for number in needed), problem  # in the order of the story
    assert 0.25 < num_distracted / len(train_problems) < 0.35


def test_no_answer_is_common(train_problems):
    finals = [problem["answer"].split("#### ")[1] for problem in train_problems]
    assert max(finals.count(final) for final in set(finals)) / len(finals) < 0.08


@pytest.mark.parametrize(("name", "count"), [("train.jsonl.gz", 10_000), ("test.jsonl", 1000)])
def test_shipped_data_is_what_the_command_writes(tmp_path, name, count):
    split = name.split(".")[0]
    command = [sys.executable, str(FOLDER / "problems.py"), "--split", split, "--count", str(count), "--seed", "0"]
    subprocess.run([*command, "-o", str(tmp_path / name)], check=True)
    written, shipped = (tmp_path / name).read_bytes(), (FOLDER / name).read_bytes()
    if name.endswith(".gz"):
        assert written[4:8] == shipped[4:8] == bytes(4)  # no time in the header
        # Compressed bytes may differ between zlib builds, the text may not.
        written, shipped = gzip.decompress(written), gzip.decompress(shipped)
    assert written == shipped


def test_tokenizer_round_trips_and_splits_digits(tokenizer, train_problems):
    printable = "".join(map(chr, range(32, 127))) + "\n\n  two  spaces 12345 "
    texts = [f"{problem['question']}\n{problem['answer']}" for problem in train_problems[:500]]
    for text in [printable, *texts]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("74-34=40")] == list("74-34=40")
    assert not any(re.search(r"\d.|.\d", tokenizer.decode([token])) for token in range(len(tokenizer)))


def test_prompt_and_answer_tokenize_the_same_together_and_apart(tokenizer, train_problems):
    for problem in train_problems[:500]:
        prompt, answer = problem["question"] + "\n", problem["answer"] + tokenizer.eos_token
        together = tokenizer.encode(prompt + answer)
        assert together == tokenizer.encode(prompt) + tokenizer.encode(answer)
        assert together[-1] == tokenizer.eos_token_id
        assert len(together) <= 160


@pytest.fixture(scope="module")
def task():
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((FOLDER / "tiny_reasoner.yaml").read_text())
    config["dataset_kwargs"] = {"data_files": {"test": str(FOLDER / "test.jsonl")}}
    return ConfigurableTask(config=config)


def grade(task, outputs: list[str]) -> list[float]:
    """The scores that the task's own filter and metric give to these outputs, for its first problems."""
    task.build_all_requests(limit=len(outputs), rank=0, world_size=1)
    for instance, output in zip(task.instances, outputs, strict=True):
        instance.resps = [output]
    task.apply_filters()
    docs = list(task.test_docs())
    return [
        float(task.process_results(docs[i.doc_id], [i.filtered_resps["final-number"]])["exact_match"])
        for i in sorted(task.instances, key=lambda i: i.doc_id)
    ]


def test_task_prompts_exactly_as_trained(task, held_out):
    task.build_all_requests(limit=3, rank=0, world_size=1)
    assert [instance.args[0] for instance in task.instances] == [p["question"] + "\n" for p in held_out[:3]]
    assert task.instances[0].args[1]["do_sample"] is False
    assert task.VERSION == 1.0


def test_right_answers_are_graded_right(task, held_out):
    answers = [problem["answer"] for problem in held_out[:50]]
    assert grade(task, answers) == [1.0] * 50
    assert grade(task, [answer + "\n#### 1000" for answer in answers]) == [1.0] * 50  # the first one counts


def test_wrong_answers_are_graded_wrong(task, held_out):
    finals = [int(problem["answer"].split("#### ")[1]) for problem in held_out[:50]]
    assert grade(task, [f"#### {final + 1}" for final in finals]) == [0.0] * 50
    assert grade(task, [f"#### -{final}" for final in finals]) == [0.0] * 50


@pytest.mark.parametrize(
    "malformed",
    ["", "{n}", "####{n}", "### {n}", "#### {n}.5", "#### {n} or 1000", "#### about {n}", "so #### {n}", "#### 0{n}"],
)
def test_malformed_answers_are_graded_wrong(task, held_out, malformed):
    final = held_out[0]["answer"].split("#### ")[1]
    assert grade(task, [malformed.format(n=final)]) == [0.0]


def test_shipped_checkpoint_is_small_and_is_a_checkpoint(tokenizer):
    from transformers import AutoConfig, GenerationConfig

    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 1_000_000
    config, generation = AutoConfig.from_pretrained(CHECKPOINT), GenerationConfig.from_pretrained(CHECKPOINT)
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert generation.do_sample is False
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.slow
def test_shipped_checkpoint_solves_held_out_problems(tokenizer, held_out):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    chosen = held_out[:NUM_HELD_OUT]
    prompts = [problem["question"] + "\n" for problem in chosen]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        outputs = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    num_right = sum(
        re.findall(r"^#### (-?\d+)$", text, flags=re.MULTILINE)[:1] == [problem["answer"].split("#### ")[1]]
        for text, problem in zip(texts, chosen, strict=True)
    )
    assert num_right / NUM_HELD_OUT >= 0.99
