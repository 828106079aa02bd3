"""The report, from records that are a fixture: their numbers are made up for the tests and measured nowhere."""

import copy
import dataclasses
import json
import random
import re
from html.parser import HTMLParser

import pytest
import yaml
from run_records import DENSE, RUN, arm_records, items, limits, record_of, reject, scores

from ptl.report import build as building
from ptl.report import tables
from ptl.report.build import build
from ptl.report.render import render, terminal_text
from ptl.report.result import Result
from ptl.report.words import checks, headline, overall


def written(records, settings, folder, **more) -> Result:
    """The result, with its pages in the folder."""
    result = build(records, settings, **{**RUN, **more})
    render(result, folder)
    return result


def words(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


NASTY = '<script>alert(1)</script> & "$x_1$" | `it`'
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would load or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "iframe", "link", "object", "embed", "img"), tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def test_the_page_shows_the_run_and_loads_nothing(records, settings, tmp_path):
    written(records, settings, tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    text = words(html)
    assert page.open == [] and page.loads == []
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", html) and "@import" not in html and "url(http" not in html
    assert len(page.ids) == len(set(page.ids))
    assert len(html.encode()) < 300_000
    assert "Removing 40.0 % of the parameters took accuracy from 99.6 % to 98.0 %" in text
    assert "one-shot pruning reached 90.0 %." in text
    for part in ("127,872", "96.0 to 100.0", "1,600,000", "tiny_retention",
                 "control-recover", "0.0003", "2.13.0", "Seed",
                 "Prefill, batch 1", "1.00 times as fast", "divided by the 64 (dense) and 50 (final)",
                 "Decode, batch 32 (tokens/s) 28,800 36,000 1.25 times as fast Solved problem (ms)"):  # fmt: skip
        assert part in text, part
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_names_with_markup_are_escaped_everywhere(records, settings, tmp_path):
    records["import-model"].metadata["model"] = NASTY
    settings["name"] = NASTY
    for record in records.values():
        for task in record.metadata.get("scores", {}).get("tasks", [])[:1]:
            task["task"] = NASTY
        for item in record.metadata.get("items", []):
            item["prompt"] = item["task"] = NASTY
    records["evaluate-1"].metadata["verdict"]["reason"] = NASTY
    written(records, settings, tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert "<script" not in html and page.loads == []
    assert NASTY in "".join(page.text)
    for name in ("report.md", "README.md"):
        assert "<script" not in (tmp_path / name).read_text().split("---\n")[-1], name
    assert len({line.count("|") for line in (tmp_path / "report.md").read_text().splitlines() if "script" in line}) <= 6


@pytest.mark.slow
def test_same_records_same_bytes_and_render_needs_only_the_result(records, settings, tmp_path):
    written(records, settings, tmp_path / "a")
    written(copy.deepcopy(records), copy.deepcopy(settings), tmp_path / "b")
    render(Result.model_validate_json((tmp_path / "a/result.json").read_text()), tmp_path / "c")
    for name in ("report.html", "report.md", "README.md", "result.json"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_result_has_the_agreed_fields(records, settings, tmp_path, no_pictures):
    typed = written(records, settings, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert Result.model_validate(result) == typed
    assert {"run_id", "mlflow_run_id", "seed", "versions", "rows", "final"} <= result.keys()
    fields = {"arm", "iteration", "params", "accuracy", "low", "high", "items", "task", "recovery_tokens", "verdict",
              "uri", "digest"}  # fmt: skip
    assert all(fields <= row.keys() for row in result["rows"])
    arms = [(row["arm"], row["iteration"]) for row in result["rows"]]
    assert arms == [("loop", i) for i in range(5)] + [("control", 1)]
    assert result["final"]["params"] == 127_872 and result["final"]["share_removed"] == pytest.approx(0.4, abs=1e-4)
    assert result["final"]["digest"] == records["recover-4"].pointer.digest
    assert (result["run_id"], result["mlflow_run_id"], result["seed"]) == ("run-1", "f" * 32, 7)
    changed = typed.examples
    assert (changed.compared, changed.num_regressions, changed.num_improvements) == (20, 2, 1)
    assert [(item.id, item.after) for item in changed.regressions] == [("2", "7"), ("11", "16")]
    assert [(item.id, item.before, item.after) for item in changed.improvements] == [("3", "8", "7")]


def test_rejected_and_skipped_iterations(records, settings, tmp_path):
    reject(records, 3)
    accepted = dataclasses.asdict(records["evaluate-2"].pointer)
    gate = {"cap": 1, "rejections": 1, "stopped": True, "reason": "the loop ended in iteration 3: no smaller step left"}
    records["evaluate-3"].metadata["accepted"] = accepted | {"gate": gate}
    for step in ("prune-4", "recover-4", "evaluate-4"):  # the loop had stopped: they leave no record
        del records[step]
    result = written(records, settings, tmp_path)
    assert [row.verdict for row in result.rows] == ["baseline", "accepted", "accepted", "rejected", "control"]
    # What was scored, not what the loop continues with.
    assert result.rows[3].digest == records["recover-3"].pointer.digest
    assert result.final.digest == accepted["digest"] and result.final_row.iteration == 2
    assert [step.step for step in result.not_needed] == ["prune-4", "recover-4", "evaluate-4"]
    reason = "the loop ended in iteration 3: no smaller step left"
    assert {step.reason for step in result.not_needed} == {reason}
    text = words((tmp_path / "report.html").read_text())
    assert f"1 iteration rejected (margin 2 points); not needed: iteration 4 ({reason})." in text
    assert f"recover-4 \u2013 \u2013 not needed: {reason}" in text
    markdown = (tmp_path / "report.md").read_text()
    assert f"| evaluate-4 | \u2013 | \u2013 | not needed: {reason} | \u2013 | \u2013 |" in markdown
    assert "with 40.0 % removed" in headline(result)  # the control is smaller than where the loop stopped


def test_nothing_accepted_is_said_plainly(records, settings, tmp_path, no_pictures):
    for i in (1, 2, 3, 4):
        reject(records, i)
    result = written(records, settings, tmp_path)
    assert headline(result) == "No iteration passed: the final checkpoint is the dense model, at 99.6 % accuracy."
    assert result.final.share_removed == 0.0
    card = (tmp_path / "README.md").read_text()
    assert "unchanged: no iteration of the Prune-Tune Loop was accepted." in card and "made smaller" not in card


def test_a_better_control_is_not_hidden(records, settings):
    records["control-evaluate"].metadata["scores"] = scores(127_872, 0.99, 122)
    result = build(records, settings, **RUN)
    assert headline(result).endswith("; one-shot pruning reached 99.0 %.")  # without items nothing is tested
    pair = result.pair("dense")
    for p, difference, said in (
        (0.06, -0.1, "the difference is not significant (p 0.06)"),
        (0.04, -0.1, "better than the loop (p 0.04)"),
        (0.04, 0.1, "worse than the loop (p 0.04)"),
    ):
        tested = dataclasses.replace(pair, p_different=p, difference=difference)
        other = result.model_copy(update={"paired": {"tiny_reasoner": {"control": tested}}})
        assert headline(other).endswith(f"one-shot pruning reached 99.0 %: {said}.")
        is_better = said.startswith("better")
        assert is_better == ("ptl fetch run-1 DIR --arm control" in dict(checks(other))["Control"])


def test_a_run_without_control_items_and_speed(records, settings, tmp_path):
    few = {step: record for step, record in records.items() if "control" not in step}
    for record in few.values():
        record.metadata.pop("items", None)
        record.metadata["speed"] = {}
        if "scores" in record.metadata:
            record.metadata["scores"] |= {"speed": [], "tasks": record.metadata["scores"]["tasks"][:1]}
    settings["evaluate"]["tasks"] = settings["evaluate"]["tasks"][:1]
    result = written(few, settings, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert result.examples is None and "Answers that changed" not in text
    assert headline(result) == "Removing 40.0 % of the parameters took accuracy from 99.6 % to 98.0 %."


def test_every_regression_and_improvement_is_on_the_page(records, settings, tmp_path, no_pictures):
    records["evaluate-0"].metadata["items"] = items({0, 1, 2})
    records["evaluate-4"].metadata["items"] = items(set(range(3, 20)))
    written(records, settings, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "Regressions: 17<" in html and "Improvements: 3<" in html
    assert [html.count(f"tiny_reasoner, item {i}<") for i in range(20)] == [1] * 20
    # Three of each are open, the other regressions are folded.
    assert html.count('<div class="example">') == 6 and "<summary>14 more<" in html


def test_changed_answers_are_side_by_side(records, settings, tmp_path, no_pictures):
    before = records["evaluate-0"].metadata["items"][11]
    after = records["evaluate-4"].metadata["items"][11]
    before.update(answer="1+1=2\n2+2=4\n#### 4", target="4")
    after.update(answer="1+1=2\n2+2=5\n5 is <b>five</b>", truncated=True)
    written(records, settings, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "Dense: right</p><pre>1+1=2\n2+2=4\n#### 4</pre>" in html
    assert "Final: wrong, hit the token limit</p><pre>1+1=2\n2+2=5\n5 is &lt;b&gt;five&lt;/b&gt;</pre>" in html
    assert "Dense: wrong 8 Final: right 7" in words(html)


def test_more_changes_than_a_page_holds_are_counted(records, settings, monkeypatch, tmp_path, no_pictures):
    monkeypatch.setattr(building, "MAX_CHANGED", 1)
    written(records, settings, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "Regressions: 2, the first 1<" in html and "items.jsonl of evaluate-0 and of evaluate-4" in html


def test_removed_layers_are_shown_in_the_dense_models_numbers(records, settings, tmp_path, no_pictures):
    records["prune-1"].metadata["removed_layers"] = [1]
    records["prune-2"].metadata["removed_layers"] = [1]  # of the three that were left: 0, 2, 3
    result = written(records, settings, tmp_path)
    assert [row.removed_layers for row in result.rows] == [[], [1], [2], [], [], []]
    assert "| 2 | 4 layers (FFN width 170; removed layers 2) | 98.6 %" in (tmp_path / "report.md").read_text()


def test_a_mixture_of_experts_is_shown_with_its_active_parameters(records, settings, tmp_path, no_pictures):
    for record in records.values():
        if "scores" in record.metadata:
            params = record.metadata["scores"]["params"]
            record.metadata["scores"] |= {"experts": params // 10_000, "active_params": params - 100_000}
    render(build(records, settings), tmp_path)
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert "4 4 layers FFN width 122 12 experts 27,872 active" in words(page)
    assert "| Active parameters | 113,120 | 27,872 | -75.4 % |" in text
    assert "| dense | 4 layers (FFN width 256; 21 experts; 113,120 active) |" in text


def test_rows_that_were_left_out_are_said(records, settings):
    assert "Decontamination" not in dict(checks(build(records, settings)))
    for name, rows, dropped in (("recover-1", 1_000, 5), ("recover-2", 2_000, 12), ("control-recover", 9_000, 100)):
        counts = {"rows_compared": rows, "rows_dropped": dropped, "not_compared": [],
                  "benchmark_items": 500, "benchmark_items_short": 7}  # fmt: skip
        records[name].metadata.update(counts)
    sentence = "12 of 2,000 training rows were left out: they share text with a benchmark. "
    sentence += "7 of 500 benchmark items have too few words of their own to be found inside a row."
    assert dict(checks(build(records, settings)))["Decontamination"] == sentence
    records["recover-2"].metadata["not_compared"] = ["wikitext"]
    sentence += " Training rows were not compared with wikitext, whose items are not known."
    assert dict(checks(build(records, settings)))["Decontamination"] == sentence


def test_speed_that_could_not_be_measured_says_why(records, settings, tmp_path, no_pictures):
    records["evaluate-4"].metadata["speed"] = {"reason": "the GPU does not hold both"}
    result = written(records, settings, tmp_path)
    assert "Speed was not measured: the GPU does not hold both." in limits(result)
    assert "per solved problem" not in (tmp_path / "report.html").read_text()


def test_the_speed_is_in_all_three_pages(records, settings, tmp_path, no_pictures):
    written(records, settings, tmp_path)
    for name in ("report.md", "README.md"):
        text = (tmp_path / name).read_text()
        assert "| Decode, batch 1 (tokens/s) | 900 | 1,125 | 1.25 times as fast |" in text, name
        assert "Both models in one process on CPU, 1 thread, taking turns, median of 3" in text, name


def test_paired_comparisons_from_the_items(records, settings):
    records["control-evaluate"].metadata["items"] = items({0, 1, 4, 5, 6, 7})
    result = build(records, settings)
    dense, control = result.pair("dense"), result.pair("control")
    assert (dense.regressions, dense.improvements, dense.difference) == (2, 1, pytest.approx(-0.05))
    assert (control.regressions, control.improvements) == (2, 6)
    assert "--arm control" not in dict(checks(result))["Control"]
    changed = ["2 regressions and 1 improvement", "2 regressions and 6 improvements"]
    shown = [tables.evidence(result)[position].rows[0][3] for position in (0, -1)]
    assert shown[0].text == "-5.0 points" and [cell.details[1] for cell in shown] == changed
    assert shown[1].details[2] == "20 items, p 0.29"


def test_a_gate_that_was_off_is_said(records, settings):
    settings["gate"]["enabled"] = False
    assert dict(checks(build(records, settings)))["Gate"] == "Off: no iteration was tested before the next began."


def test_the_pages_say_worse_when_the_final_model_is(records, settings, tmp_path, no_pictures):
    settings["gate"]["enabled"] = False
    for step, wrong in (("evaluate-0", {3}), ("evaluate-4", set(range(18)))):
        records[step].metadata["items"] = items(wrong)
        records[step].metadata["scores"] = scores(DENSE if step == "evaluate-0" else 127_872, 1 - len(wrong) / 20, 122)
    written(records, settings, tmp_path)
    sentence = "Worse than the dense model on 20 items of tiny_reasoner; not tested on tiny_retention."
    for name in ("report.html", "report.md", "README.md"):
        assert sentence in (tmp_path / name).read_text().replace("\\_", "_"), name
    records["evaluate-4"].metadata["items"] = items({2, 11})  # 19 and 18 of 20: unclear
    assert overall(build(records, settings)).text.startswith("Cannot be said whether the score fell")


def test_a_run_judged_by_perplexity(records, settings, tmp_path):
    """A run may be judged by a metric without intervals, where less is better."""
    for record in records.values():
        for task in record.metadata.get("scores", {}).get("tasks", [])[:1]:
            worse = 25.0 if record.metadata["arm"] == "control" else 20.0 + record.metadata["iteration"] / 2
            task.update(metric="word_perplexity,none", accuracy=worse, low=None, high=None, higher_is_better=False)
    result = written(records, settings, tmp_path)
    assert headline(result).endswith("took word_perplexity from 20 to 22; one-shot pruning reached 25.")


def test_a_score_that_is_not_a_share_is_not_shown_in_percent(records, settings, tmp_path, no_pictures):
    for record in records.values():
        for task in record.metadata.get("scores", {}).get("tasks", [])[1:]:
            task.update(task="wikitext", metric="word_perplexity", accuracy=21.53, low=None, high=None)
    written(records, settings, tmp_path)
    assert "4 4 layers FFN width 122 98.0 % (96.0 to 100.0) 21.53" in words((tmp_path / "report.html").read_text())


def test_links_to_mlflow_only_over_http(records, settings, tmp_path, no_pictures):
    written(records, settings, tmp_path, mlflow_url="http://127.0.0.1:5000/")
    run = records["prune-1"].pointer.run_id
    links = Page((tmp_path / "report.html").read_text()).loads
    assert f"http://127.0.0.1:5000/#/experiments/1/runs/{run}?workflowType=machine_learning" in links and len(
        links
    ) == len(records)
    written(records, settings, tmp_path, mlflow_url="javascript:alert(1)//")
    assert "javascript" not in (tmp_path / "report.html").read_text()


def test_the_model_card_is_what_the_hub_reads(records, settings, tmp_path, no_pictures):
    written(records, settings, tmp_path)
    card = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["library_name"] == "transformers" and data["metrics"] == ["exact_match"]
    assert not {"license", "base_model", "datasets"} & data.keys() and "pruning" in data["tags"]
    assert (
        "from_pretrained" in card
        and "(exact\\_match, 500 items, 0-shot) | 99.6 % (97.6 to 100.0) | 98.0 % (96.0 to 100.0)" in card
    )
    assert "- Training data: examples/tiny\\_reasoner/train.jsonl\n" in card
    from huggingface_hub import ModelCard

    rated = ModelCard(card).data.eval_results
    assert [(r.dataset_name, r.metric_value) for r in rated] == [("tiny_reasoner", 0.98), ("tiny_retention", 0.88)]
    assert {(r.metric_type, r.metric_name) for r in rated} == {("exact_match", "exact_match,final-number")}
    records["import-model"].metadata.update({"model": "org/model-1", "license": "apache-2.0"})
    written(records, settings, tmp_path)
    data = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert (data["base_model"], data["license"]) == ("org/model-1", "apache-2.0")


@pytest.mark.slow
def test_a_long_run_stays_below_one_megabyte(records, settings, tmp_path):
    long = {"import-model": records["import-model"], "evaluate-0": records["evaluate-0"]}
    for i in range(1, 65):
        made = arm_records(f"-{i}", "loop", i, 213_000 - 1_000 * i, 0.98, 100_000, 250 - i)
        made[f"evaluate-{i}"]["scores"]["widths"] = [250 - i] * 64
        long |= {step: record_of(step, f) for step, f in made.items()}
    written(long, settings, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_the_terminal_table(records, settings, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    settings["name"] = "tiny[/]"
    printed = terminal_text(build(records, settings), "/tmp/report.html")
    assert all(part in printed for part in ("tiny[/]", "127,872", "98.0 %", "4 (final)", "1,600,000"))
    assert "…" not in printed  # 80 columns are enough
    assert "Report: /tmp/report.html\n" in printed and "ptl up --ui" in printed
    assert "one-shot pruning reached 90.0 %." in " ".join(printed.split())


def schedule_of(records: dict, starts: dict[str, float], seconds: float) -> dict:
    """Every step takes `seconds`; it starts at `starts[step]`, counted from the run's first."""
    for step, record in records.items():
        record.metadata.update({"started": 1.76e9 + starts[step], "seconds": seconds, "whole_seconds": seconds})
    return records


def test_wall_clock_is_from_the_first_start_to_the_last_end(records, settings):
    loop = [step for step in records if not step.startswith("control")]
    starts = {step: i * 600.0 for i, step in enumerate(loop)}
    starts |= {"control-prune": 900.0, "control-recover": 1500.0, "control-evaluate": 2100.0}
    result = build(schedule_of(records, starts, 600.0), settings)
    assert (result.wall_seconds, result.work_seconds) == (14 * 600, 17 * 600)
    assert dict(checks(result))["Wall clock"] == "2 h 20 min; the work of all steps adds up to 2 h 50 min."


@pytest.mark.parametrize("completed", [0, 1, 2])
def test_a_control_that_did_not_finish(records, settings, tmp_path, completed):
    steps = ["control-prune", "control-recover", "control-evaluate"]
    for step in steps[completed:]:
        del records[step]
    reason = "control-recover was killed after 3 attempts: out of memory;\n raise resources.memory <b>"
    said = "control-recover was killed after 3 attempts: out of memory; raise resources.memory <b>"
    result = written(records, settings, tmp_path, control_failed=reason + ".")
    assert result.control_failed == said
    assert {row.arm for row in result.rows} == {"loop"} and result.pair("control") is None
    assert [step.step for step in result.steps if step.arm == "control"] == steps[:completed]
    assert [step.step for step in result.not_finished] == steps[completed:]
    assert result.not_needed == []
    line = "Removing 40.0 % of the parameters took accuracy from 99.6 % to 98.0 %; the control arm did not finish."
    sentence = f"The control arm did not finish: {said}."
    assert headline(result) == line and dict(checks(result))["Control"] == sentence
    page = Page((tmp_path / "report.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert page.open == [] and line in text and sentence in text
    assert "Loop against one-shot" not in text
    assert f"control-evaluate \u2013 \u2013 not finished: {said}" in text
    markdown = (tmp_path / "report.md").read_text()
    cell = said.replace("<", "&lt;")
    assert f"- The control arm did not finish: {cell}." in markdown
    assert "The control arm did not finish" in terminal_text(result, "report.html")


def test_a_control_that_was_evaluated_did_finish(records, settings):
    """Its committed record holds its score, whatever failed after the commit."""
    result = build(records, settings, control_failed="control-evaluate: MLflow cannot be reached")
    assert result.control_failed == "" and result.not_finished == []
    assert "one-shot pruning reached 90.0 %" in headline(result)


def test_speed_measured_beside_other_work_is_marked(records, settings, tmp_path, no_pictures):
    result = written(records, settings, tmp_path)
    assert "read the ratio" not in (tmp_path / "report.html").read_text()
    records["evaluate-4"].metadata["speed"]["beside"] = ["control-recover", "evaluate-3"]
    result = written(records, settings, tmp_path)
    assert result.speed["beside"] == ["control-recover", "evaluate-3"]
    warning = (
        "While speed was measured, control-recover and evaluate-3 were computing on the same node: read the ratio with "
        "care."
    )
    assert f'<p class="warning">{warning}</p>' in (tmp_path / "report.html").read_text()
    for name in ("report.md", "README.md"):
        assert warning in (tmp_path / name).read_text(), name


def test_order_is_that_of_the_steps_whenever_they_ran(records, settings):
    """Both arms run at once: steps overlap, and versions are numbered as they happen to be registered."""
    for iteration, version in ((1, "7"), (2, "3"), (3, "10"), (4, "2")):
        record = records[f"evaluate-{iteration}"]
        records[record.step] = dataclasses.replace(
            record, pointer=dataclasses.replace(record.pointer, model_version=version)
        )
        record.metadata["accepted"]["model_version"] = version
    draw = random.Random(5)
    result = build(schedule_of(records, {step: draw.uniform(0, 900) for step in records}, 300.0), settings)
    assert [step.step for step in result.steps] == list(records)
    assert [row.step for row in result.rows] == [step for step in records if "evaluate" in step]
    assert result.final.model_version == "2" and result.final_row.iteration == 4


def test_a_report_where_only_some_rows_have_an_interval(records, settings, tmp_path):
    """Of a metric that is no accuracy only a row whose items all score 0 or 1 has one."""
    for name, record in records.items():
        if record.metadata["stage"] == "evaluate" and name != "evaluate-4":
            record.metadata["scores"]["tasks"][0] |= {"low": None, "high": None}
        record.metadata.pop("items", None)
    result = written(records, settings, tmp_path)
    assert [row.low is None for row in result.rows].count(False) == 1
    assert "<figure>" in (tmp_path / "report.html").read_text()


def test_a_rows_tokens_are_not_taken_for_the_loops(records, settings):
    assert dict(checks(build(records, settings)))["Control"] == "Recovery tokens: loop 3,000,000, control 3,000,000."
    records["control-recover"].metadata["tokens"] = 2
    sentence = "Recovery tokens: loop 3,000,000, control 2."
    assert dict(checks(build(records, settings)))["Control"].startswith(sentence)
