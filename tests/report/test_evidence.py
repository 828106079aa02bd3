"""What the report answers, what it rests on and what it does not show; the records are those of test_render."""

import pytest
from run_records import items, limits, reject, scores

from ptl.report import tables
from ptl.report.build import build
from ptl.report.render import render
from ptl.report.words import checks, overall

SMALL = 127_872  # parameters of the final model


def many_items(task: str, count: int, wrong: range) -> list[dict]:
    return [
        {"task": task, "id": str(i), "prompt_digest": f"{i}", "prompt": f"{i} + 4 =", "target": str(i + 4),
         "correct": int(i not in wrong),
         "answer": str(i + 4 + (i in wrong)), "truncated": False}
        for i in range(count)
    ]  # fmt: skip


def scored(records: dict, step: str, *benchmarks: list[dict]) -> None:
    """The step's evaluation has the items of these benchmarks."""
    records[step].metadata["items"] = [item for benchmark in benchmarks for item in benchmark]


def lines(result, title: str) -> list[list[tables.Cell]]:
    return next(table.rows for table in tables.evidence(result) if table.columns[0] == title)


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        (0, "good", "Not worse than the dense model within the margin of 2 points"),
        (17, "unclear", "The score fell, and whether by more than the margin of 2 points cannot be said"),
        (25, "bad", "Worse than the dense model"),
    ],
)
def test_the_answer_is_the_paired_verdict(records, settings, wrong, kind, said):
    scored(records, "evaluate-0", many_items("tiny_reasoner", 1000, range(0)))
    scored(records, "evaluate-4", many_items("tiny_reasoner", 1000, range(wrong)))
    result = build(records, settings)
    assert f"{said} on 1,000 items of tiny_reasoner".lower() in overall(result).text.lower()
    # The second benchmark has no items: all of the run is never better than what was tested.
    assert "not tested on tiny_retention" in overall(result).text.lower()
    assert overall(result).kind == (kind if kind == "bad" else "unclear")
    assert [line[-1].kind for line in lines(result, "Score")] == [kind, "unclear"]
    assert lines(result, "Score")[1][-1].text == "Not tested"


def test_a_dense_model_that_solves_nothing_gives_no_overall(records, settings):
    for step in ("evaluate-0", "evaluate-4"):
        scored(records, step, many_items("tiny_reasoner", 1000, range(1000)))
    result = build(records, settings)
    assert overall(result).text.startswith("Cannot be said whether the score fell by more than the margin of 2 points")
    assert overall(result).kind == lines(result, "Score")[0][-1].kind == "unclear"
    said = "1,000 items of tiny_reasoner are too few to show any drop, or the dense model solves too few of them."
    assert said in limits(result)


def test_each_benchmark_has_its_own_verdict(records, settings, tmp_path, no_pictures):
    scored(
        records, "evaluate-0", many_items("tiny_reasoner", 1000, range(0)), many_items("tiny_retention", 300, range(0))
    )
    scored(
        records, "evaluate-4", many_items("tiny_reasoner", 1000, range(2)), many_items("tiny_retention", 300, range(9))
    )
    result = build(records, settings)
    first, second = lines(result, "Score")
    assert (first[-1].text, second[-1].text) == (
        "Not worse than the dense model within the margin of 2 points",
        "Worse than the dense model",
    )
    changed = ("9 regressions and 0 improvements", "300 items, p 0.0039")
    assert second[3].details == ("-5.0 to -1.0 at 95 %", *changed)
    # The first is tested as the gate does, the second as `ptl compare` does.
    assert [result.pair("dense", task).alpha for task in ("tiny_reasoner", "tiny_retention")] == [0.05, 0.025]
    assert overall(result).text == (
        "Worse than the dense model on 300 items of tiny_retention; not worse than the dense model within the margin "
        "of 2 points on 1,000 items of tiny_reasoner"
    )
    render(result, tmp_path)
    assert "the others share the significance level (2.5 % each)" in (tmp_path / "report.md").read_text()


def test_answers_to_other_questions_are_not_paired(records, settings, capsys):
    """The same items by their ids, as of a benchmark whose file was replaced."""
    retention = [dict(item, task="tiny_retention") for item in items({5})]
    other = [dict(item, prompt_digest="other") for item in items(set(range(9)))]
    scored(records, "evaluate-0", items(set()), retention)
    scored(records, "evaluate-4", other, retention)
    result = build(records, settings)
    assert result.pair("dense") is None
    assert result.pair("dense", "tiny_retention").items == result.examples.compared == 20
    assert result.examples.num_regressions == 0
    assert "tiny_reasoner is not compared: the prompts of tiny_reasoner item 0 differ" in capsys.readouterr().out


def test_size_speed_and_control_are_evidence(records, settings):
    scored(records, "control-evaluate", items(set()))
    result = build(records, settings)
    params, weights, kv_cache, _ = lines(result, "Size and memory")
    assert [cell.text for cell in params[1:]] == ["213,120", "127,872", "-40.0 %"]
    assert (weights[2].text, kv_cache[3].text) == ("511.5 kB", "the same")
    times = [line[3].text.partition(" ")[0] for line in lines(result, "Speed")]
    assert times == ["1.00", "1.00", "1.25", "1.25", "0.98"]
    score, _ = lines(result, "Loop against one-shot pruning")
    assert (score[-1].text, score[3].text) == ("No difference shown", "-10.0 points")


def test_too_few_items_are_said_with_what_they_could_show(records, settings):
    sentences = limits(build(records, settings))
    # 7 regressions beside the 1 improvement are the fewest with p below 0.05, by hand: (1 + 8) / 256.
    assert sentences[1] == "With 20 items of tiny_reasoner, a drop below 30.0 points is not called worse."
    assert "The change on tiny_retention was not tested: it was not compared item by item." in sentences


def test_what_a_run_leaves_out_is_said(records, settings):
    few = {step: record for step, record in records.items() if "control" not in step}
    few["evaluate-4"].metadata["speed"] = {}
    few["evaluate-4"].metadata["scores"]["tasks"][0] |= {"truncated": 0.12, "cut_prompts": 0.5, "code_timeouts": 3}
    settings["schedule"]["target"] = 0.5
    sentences = limits(build(few, settings))
    for sentence in (
        "The target was not reached: 40.0 % of the parameters were removed, not 50.0 %.",
        "Only 2 benchmarks were scored: nothing is known of any other task.",
        "On tiny_reasoner, 12.0 % of the final model's answers hit the token limit (dense: 0.0 %).",
        "On tiny_reasoner, 50.0 % of the final model's prompts did not fit into the context (dense: 0.0 %).",
        "On tiny_reasoner, 3 of the final model's answers are wrong because their code ran out of time (dense: 0).",
        "There was no control: the loop was not compared with one-shot pruning.",
        "Speed was not measured.",
        "Only the first items were scored of tiny_reasoner (limit in evaluate.tasks).",
    ):
        assert sentence in sentences, sentence
    settings["schedule"]["target"] = SMALL
    assert not [sentence for sentence in limits(build(few, settings)) if "target" in sentence]


def test_sequences_that_were_cut_are_said(records, settings):
    assert not [sentence for sentence in limits(build(records, settings)) if "were cut" in sentence]
    for step, cut in (("recover-1", 0), ("recover-2", 12), ("control-recover", 500)):
        records[step].metadata.update({"sequences": 1000, "cut_sequences": cut, "passes": 0.5})
    (said,) = [sentence for sentence in limits(build(records, settings)) if "were cut" in sentence]
    assert said.startswith("12 of 2,000 training sequences were cut at recover.max_length")


def test_tokens_for_what_was_removed_and_passes_are_said(records, settings):
    for step, passes in (("recover-1", 0.5), ("recover-2", 4.6), ("control-recover", 40)):
        records[step].metadata.update({"sequences": 1000, "cut_sequences": 0, "passes": passes})
    result = build(records, settings)
    removed = result.original_params - result.final.params
    said = dict(checks(result))["Recovery"]
    assert (
        said
        == f"3,000,000 recovery tokens: {3_000_000 / removed:.2g} per removed parameter, about 4.6 passes over the rows"
    )
    (warning,) = [sentence for sentence in limits(result) if "passes help little" in sentence]
    assert warning.startswith(said)


def test_a_run_that_ends_with_the_dense_model(records, settings):
    for i in (1, 2, 3, 4):
        reject(records, i)
    result = build(records, settings)
    assert overall(result).text == "Nothing to ship: the final checkpoint is the dense model"
    assert [table.columns[0] for table in tables.evidence(result)] == [
        "Score",
        "Speed",
        "Loop against one-shot pruning",
    ]
    assert lines(result, "Score")[0][-1].text == "The same model"
    assert dict(checks(result))["Gate"].startswith("0 iterations accepted, 4 iterations rejected (margin 2 points).")
    assert "The target was not reached: 0.0 % of the parameters were removed, not 40.0 %." in limits(result)


def test_a_run_whose_final_checkpoint_was_not_scored(records, settings):
    final = records["evaluate-4"].metadata
    final["accepted"] = final["accepted"] | {"digest": "sha256:" + "b" * 64}
    result = build(records, settings)
    assert overall(result).text == "Cannot be said: the final checkpoint was not scored"
    assert lines(result, "Score")[0][-1].text == "Final not scored"


def test_a_rehearsal_says_nothing_about_the_model(records, settings):
    settings |= {"name": "tiny-rehearsal", "storage": {"experiment": "ptl"}}
    assert "rehearsal" not in overall(build(records, settings)).text  # a name that a user may choose
    settings["storage"] = {"experiment": "ptl-rehearsal"}
    shown = overall(build(records, settings))
    assert (shown.kind, shown.text[:39]) == ("unclear", "Cannot be said: this was a rehearsal, w")


def test_a_run_of_one_iteration_without_a_second_benchmark(records, settings, tmp_path, no_pictures):
    kept = ("import-model", "evaluate-0", "prune-1", "recover-1", "evaluate-1")
    few = {step: records[step] for step in kept}
    for step, accuracy in (("evaluate-0", 1.0), ("evaluate-1", 0.99)):
        few[step].metadata["scores"] = scores(SMALL, accuracy, 122)
        del few[step].metadata["scores"]["tasks"][1]
    scored(few, "evaluate-0", many_items("tiny_reasoner", 500, range(0)))
    scored(few, "evaluate-1", many_items("tiny_reasoner", 500, range(5)))
    settings["schedule"]["iterations"] = 1
    settings["evaluate"]["tasks"] = settings["evaluate"]["tasks"][:1]
    result = build(few, settings)
    render(result, tmp_path)
    assert overall(result).kind == "good"
    card = (tmp_path / "README.md").read_text()
    assert "**Not worse than the dense model within the margin of 2 points on 500 items of tiny\\_reasoner.**" in card
    assert "- Only one benchmark was scored, tiny\\_reasoner: nothing is known of any other task." in card


def test_markdown_tables_have_no_blank_lines(records, settings, tmp_path, no_pictures):
    """A blank line ends a table: below its heading a rule of dashes must follow at once, and then its rows."""
    render(build(records, settings), tmp_path)
    for name in ("report.md", "README.md"):
        text = (tmp_path / name).read_text().split("\n")
        for before, rule, after in zip(text, text[1:], text[2:], strict=False):
            if rule.startswith("|---"):
                assert before.startswith("|") and after.startswith("|"), (name, before)
                assert before.count("|") == rule.count("|") == after.count("|"), (name, before)
            # Every row is below a heading.
            elif rule.startswith("|") and not before.startswith("|"):
                assert after.startswith("|---"), (name, rule)
