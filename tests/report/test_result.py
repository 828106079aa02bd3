"""The result of a run, and what of its pages is no words: pictures, links, markup, data for the hub."""

import copy
import dataclasses
import html
import re

import pytest
import run_records
import yaml
from run_records import RUN, items, reject, scores

from ptl.report import build as building
from ptl.report.build import build
from ptl.report.render import _accuracy_plot, render
from ptl.report.result import Result
from ptl.report.words import checks, headline

NASTY = '<script>alert(1)</script> & "$x_1$" | `it`'


@pytest.fixture
def settings() -> dict:
    return run_records.settings()


@pytest.fixture
def records() -> dict:
    return run_records.records()


@pytest.fixture
def no_pictures(monkeypatch):
    """A mock in place of the plots, for tests that look at the words only: drawing takes most of the time."""
    monkeypatch.setattr("ptl.report.render._accuracy_plot", lambda result: "<svg></svg>")


def written(records, settings, folder, **more) -> Result:
    """The result, with its pages in the folder."""
    result = build(records, settings, **{**RUN, **more})
    render(result, folder)
    return result


def links(page):
    """What a browser would load, or could be led to."""
    return re.findall(r"""\b(?:src|href|data)=["']?([^#"'][^"']*)""", page)


def test_the_page_loads_nothing_and_the_same_records_give_the_same_bytes(
    records, settings, tmp_path
):
    """With the picture; it needs the result alone."""
    written(records, settings, tmp_path / "a")
    written(copy.deepcopy(records), copy.deepcopy(settings), tmp_path / "b")
    render(Result.model_validate_json((tmp_path / "a/result.json").read_text()), tmp_path / "c")
    for name in ("report.html", "report.md", "README.md", "result.json"):
        first = (tmp_path / "a" / name).read_bytes()
        assert (
            first == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
        ), name
    page = (tmp_path / "a/report.html").read_text()
    assert (
        links(page) == []
        and "http" not in page.replace("http-equiv=", "")
        and "@import" not in page
    )
    assert "<figure>" in page and "<script" not in page


def test_the_picture_has_a_mark_for_each_kind_whether_or_not_rows_have_intervals(records, settings):
    reject(records, 3)
    for name, record in records.items():
        if record.metadata["stage"] == "evaluate" and name != "evaluate-4":
            record.metadata["scores"]["tasks"][0] |= {"low": None, "high": None}
        record.metadata.pop("items", None)
    drawn = _accuracy_plot(build(records, settings))
    assert drawn.startswith("<svg viewBox=") and drawn.endswith("</svg>")
    assert all(f"var(--{name})" in drawn for name in ("loop", "control", "bad"))


def test_names_with_markup_are_escaped_everywhere_and_links_only_http(
    records, settings, no_pictures, tmp_path
):
    records["import-model"].metadata["model"] = NASTY
    settings["name"] = NASTY
    for record in records.values():
        for task in record.metadata.get("scores", {}).get("tasks", [])[:1]:
            task["task"] = NASTY
        for item in record.metadata.get("items", []):
            item["prompt"] = item["task"] = NASTY
    records["evaluate-1"].metadata["verdict"]["reason"] = NASTY
    written(records, settings, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert links(page) == [] and NASTY in html.unescape(page)
    for name in ("report.html", "report.md", "README.md"):
        assert "<script" not in (tmp_path / name).read_text().split("---\n")[-1], name
    # Links over http are in tests/golden/report.html.
    written(records, settings, tmp_path, mlflow_url="javascript:alert(1)//")
    assert "javascript" not in (tmp_path / "report.html").read_text()


def test_a_rejected_row_has_what_was_scored_and_the_final_one_what_was_accepted(records, settings):
    reject(records, 3)
    reject(records, 4)
    result = build(records, settings)
    verdicts = [row.verdict for row in result.rows]
    assert verdicts == ["baseline", "accepted", "accepted", "rejected", "rejected", "control"]
    assert result.rows[3].digest == records["recover-3"].pointer.digest
    assert (
        result.final.digest == records["recover-2"].pointer.digest
        and result.final_row.iteration == 2
    )
    assert (result.final.share_removed, result.not_needed) == (round(1 - 141_100 / 213_120, 6), [])
    # Layers of a rejected iteration are there again; numbers are the dense model's.
    for step in ("prune-2", "prune-3", "prune-4"):
        records[step].metadata["removed_layers"] = [1]
    assert [row.removed_layers for row in build(records, settings).rows] == [
        [],
        [],
        [1],
        [2],
        [2],
        [],
    ]
    # Of a checkpoint that was scored twice the last time counts.
    records["evaluate-4"].metadata["checkpoint"] = records["evaluate-2"].metadata["checkpoint"]
    result = build(records, settings)
    assert result.final_row.iteration == 4
    assert [step.step for step in result.not_needed] == []


def test_paired_comparisons_are_those_of_the_gate_and_of_compare(records, settings):
    records["control-evaluate"].metadata["items"] = items({0, 1, 4, 5, 6, 7})
    result = build(records, settings)
    dense, control = result.pair("dense"), result.pair("control")
    assert (dense.regressions, dense.improvements, dense.difference) == (2, 1, pytest.approx(-0.05))
    assert (control.regressions, control.improvements, control.difference) == (
        2,
        6,
        pytest.approx(0.2),
    )
    for step in ("evaluate-0", "evaluate-4"):
        more = [dict(item, task="tiny_retention") for item in items(set())]
        records[step].metadata["items"] = [*more, *records[step].metadata["items"]]
    result = build(records, settings)
    assert [result.pair("dense", task).alpha for task in ("tiny_reasoner", "tiny_retention")] == [
        0.05,
        0.025,
    ]
    assert {pair.margin for pair in result.paired["tiny_reasoner"].values()} == {0.02}


def test_a_controls_difference_counts_from_the_confidence_level_on(records, settings):
    records["control-evaluate"].metadata["scores"] = scores(127_872, 0.99, 122)
    result = build(records, settings, **RUN)
    for p, difference, said in (
        (0.0501, -0.1, "the difference is not significant (p 0.05)"),
        (0.05, -0.1, "better than the loop (p 0.05)"),
        (0.04, 0.1, "worse than the loop (p 0.04)"),
    ):
        tested = dataclasses.replace(result.pair("dense"), p_different=p, difference=difference)
        other = result.model_copy(update={"paired": {"tiny_reasoner": {"control": tested}}})
        assert headline(other).endswith(f"one-shot pruning reached 99.0 %: {said}.")
        is_better = said.startswith("better")
        assert is_better == ("ptl fetch run-1 DIR --arm control" in dict(checks(other))["Control"])


def test_order_is_that_of_the_steps_whenever_they_ran_and_wall_clock_from_first_start_to_last_end(
    records, settings
):
    """Both arms run at once: steps overlap, and versions are numbered as they happen to be registered."""
    for iteration, version in ((1, "7"), (2, "3"), (3, "10"), (4, "2")):
        record = records[f"evaluate-{iteration}"]
        pointer = dataclasses.replace(record.pointer, model_version=version)
        records[record.step] = dataclasses.replace(record, pointer=pointer)
        record.metadata["accepted"]["model_version"] = version
    # Each of 17 steps takes 600 s, 100 of them no work; one starts every 300 s.
    for i, record in enumerate(records.values()):
        started = 1.76e9 + 300 * (7 * i % 17)
        record.metadata.update({"started": started, "seconds": 500.0, "whole_seconds": 600.0})
    result = build(records, settings)
    assert [step.step for step in result.steps] == list(records)
    assert [row.step for row in result.rows] == [step for step in records if "evaluate" in step]
    assert result.final.model_version == "2" and result.final_row.iteration == 4
    assert (result.wall_seconds, result.work_seconds) == (16 * 300 + 600, 17 * 500)
    assert (
        dict(checks(result))["Wall clock"]
        == "1 h 30 min; the work of all steps adds up to 2 h 21 min."
    )


def test_changed_answers_are_side_by_side(records, settings, monkeypatch, tmp_path, no_pictures):
    before, after = items({0, 1, 2}), items(set(range(3, 20)))
    before[11].update(answer="1+1=2\n2+2=4\n#### 4")
    after[11].update(answer="1+1=2\n2+2=5\n5 is <b>five</b>", truncated=True)
    after[12].update(answer="x" * 601)
    records["evaluate-0"].metadata["items"], records["evaluate-4"].metadata["items"] = before, after
    written(records, settings, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Dense: right</p>\n<pre>1+1=2\n2+2=4\n#### 4</pre>" in page
    assert (
        "Final: wrong, hit the token limit</p>\n<pre>1+1=2\n2+2=5\n5 is &lt;b&gt;five&lt;/b&gt;</pre>"
        in page
    )
    assert f"<pre>{'x' * 600} […]</pre>" in page
    assert "Regressions: 17<" in page and "Improvements: 3<" in page
    assert [page.count(f"tiny_reasoner, item {i}<") for i in range(20)] == [1] * 20
    monkeypatch.setattr(building, "MAX_CHANGED", 1)
    written(records, settings, tmp_path)
    assert "Regressions: 17, the first 1<" in (tmp_path / "report.html").read_text()
    # What a model thought is folded.
    assert "Thought" not in page
    after[11]["thought"], after[12]["thought"] = "<think>2+2=5", f"{'a' * 600}{'b' * 9}{'c' * 600}"
    monkeypatch.setattr(building, "MAX_CHANGED", 250)
    written(records, settings, tmp_path)
    page = (tmp_path / "report.html").read_text()
    folded = '<details class="thought"><summary>Thought</summary><pre>{}</pre></details>'
    assert folded.format("&lt;think&gt;2+2=5") in page
    assert folded.format(f"{'a' * 600} […] {'c' * 600}") in page and page.count("Thought<") == 2
    # Of several samples a right one is beside a wrong one.
    records["evaluate-0"].metadata["items"] = [*items({2}), *items(set())]
    records["evaluate-4"].metadata["items"] = [*items({2}), *items({2})]
    (change,) = build(records, settings).examples.regressions
    assert (change.id, change.before, change.after) == ("2", "6", "7")


def test_the_model_card_is_what_the_hub_reads(records, settings, tmp_path, no_pictures):
    from huggingface_hub import ModelCard

    written(records, settings, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert not {"base_model", "datasets"} & yaml.safe_load(card.split("---\n")[1]).keys()
    rated = ModelCard(card).data.eval_results
    assert [(r.dataset_name, r.metric_value) for r in rated] == [
        ("tiny_reasoner", 0.98),
        ("tiny_retention", 0.88),
    ]
    assert {(r.metric_type, r.metric_name) for r in rated} == {
        ("exact_match", "exact_match,final-number")
    }
    assert "This is a local checkpoint, made smaller" in card and "No license is named here" in card
    assert "examples/" not in card and "train.jsonl" in card
    known = {"model": "org/model-1", "base_model": "org/model-1", "license": "apache-2.0"}
    records["import-model"].metadata.update(known)
    names = ("org/rows", "s3://bucket/rows.jsonl", "own.jsonl")
    settings["training"]["sources"] = [{"source": name} for name in names]
    written(records, settings, tmp_path)
    data = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert (data["base_model"], data["datasets"]) == ("org/model-1", ["org/rows"])
    assert data["license"] == "apache-2.0" and "license_name" not in data
    card = (tmp_path / "README.md").read_text()
    assert "This is org/model-1, made smaller" in card and "No license" not in card
