"""The tiny reasoner: shipped problems and their task; tests/pipelines/test_loop.py has what the checkpoint solves."""

import gzip
import json
import re
import subprocess
import sys

import pytest
import yaml
from checkout import EXAMPLE


@pytest.mark.nightly
def test_the_training_script_makes_a_mixture_of_experts_that_can_be_pruned(tmp_path):
    """Two steps of it: what it learns in 3,500 is in the README."""
    from ptl.model.dimensions import model_dimensions
    from ptl.model.families import FAMILIES

    command = [
        sys.executable,
        EXAMPLE / "train.py",
        "--experts",
        "4",
        "--steps",
        "2",
        "--items",
        "2",
        "-o",
        tmp_path,
    ]
    subprocess.run(command, check=True, capture_output=True)
    dimensions = model_dimensions(tmp_path, FAMILIES["qwen3_moe"])
    assert (dimensions.experts, dimensions.experts_per_token, dimensions.width) == (4, 2, 96)


@pytest.fixture(scope="module")
def texts():
    """Lines of the shipped problems."""
    with gzip.open(EXAMPLE / "train.jsonl.gz", "rt") as trained:
        return {"train": trained.read(), "test": (EXAMPLE / "test.jsonl").read_text()}


@pytest.fixture(scope="module")
def problems(texts):
    return {
        split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()
    }


def test_no_tested_arithmetic_was_trained_on(problems):
    def arithmetic(problem):
        """`74-34=40, 40-30=10` -> `74-34-30`."""
        steps = re.findall(r"^(\d+)([-+*/]\d+)=", problem["answer"], flags=re.MULTILINE)
        return steps[0][0] + "".join(operation for _, operation in steps)

    trained, tested = (
        {arithmetic(problem) for problem in problems[split]} for split in ("train", "test")
    )
    # No arithmetic twice within a split either.
    assert (len(trained), len(tested)) == (10_000, 1000) and not trained & tested


def test_every_step_is_right_and_leads_to_the_next(problems):
    for problem in problems["train"][:3000] + problems["test"]:
        *steps, final = problem["answer"].split("\n")
        value = re.match(r"\d+", steps[0])[0]
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            a, b = int(left), int(right)
            assert left == value and {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(
                result
            ), problem
            value = result
        assert final == f"#### {value}" and 2 <= len(steps) <= 4, problem


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 1000)])
def test_shipped_data_is_what_the_command_writes(texts, tmp_path, split, count):
    command = [
        sys.executable,
        EXAMPLE / "problems.py",
        "--split",
        split,
        "--count",
        str(count),
        "--seed",
        "0",
    ]
    subprocess.run([*command, "-o", tmp_path / "written"], check=True)
    assert (tmp_path / "written").read_text() == texts[split]


def test_answers_are_graded_by_the_first_final_number(problems):
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((EXAMPLE / "tiny_reasoner.yaml").read_text())
    config["dataset_kwargs"] = {"data_files": {"test": str(EXAMPLE / "test.jsonl")}}
    task = ConfigurableTask(config=config)
    right = ["{answer}", "{answer}\n#### 1000"]
    wrong = [
        "",
        "{n}",
        "####{n}",
        "### {n}",
        "#### {n}.5",
        "#### {n} or 1000",
        "#### about {n}",
        "so #### {n}",
    ]
    wrong += ["#### 0{n}", "#### -{n}", "#### 1000\n#### {n}"]
    task.build_all_requests(limit=len(right + wrong), rank=0, world_size=1)
    for instance, text in zip(task.instances, right + wrong, strict=True):
        problem = problems["test"][instance.doc_id]
        prompt, options = instance.args
        assert prompt == problem["question"] + "\n" and options["do_sample"] is False
        instance.resps = [text.format(n=problem["answer"].split("#### ")[1], **problem)]
    task.apply_filters()
    documents = list(task.test_docs())
    for instance, text in zip(task.instances, right + wrong, strict=True):
        scores = task.process_results(
            documents[instance.doc_id], [instance.filtered_resps["final-number"]]
        )
        assert scores["exact_match"] == (text in right), text
