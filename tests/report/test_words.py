"""What the pages say, compared with tests/golden: those of a whole run, and how they change where a run differs.

PTL_UPDATE_GOLDEN=1 writes the files again; read the difference before committing it.
"""

import dataclasses
import difflib
import re

import run_records
from golden_messages import expect
from run_records import RUN, export, items, record_of, reject, scores

from ptl.report import tables
from ptl.report.build import build
from ptl.report.render import page, render, terminal_text
from ptl.report.words import overall

SMALL = 127_872  # parameters of the final model
EXPORT = {"format": "gguf", "type": "q8_0"}
STEP = "export-gguf-q8-0"
CONTROL = ("control-prune", "control-recover", "control-evaluate")


def test_the_pages_of_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # test_result.py has some
    monkeypatch.setattr("ptl.report.render._accuracy_plot", lambda result: "<svg></svg>")
    records, settings = run_records.records(), run_records.settings()
    records[STEP] = record_of(STEP, export(SMALL, 140_000, 0.97))
    trained_on(records, passes=0.5)
    decontaminated(records)
    result = build(
        records, settings | {"export": [EXPORT]}, **RUN, mlflow_url="http://127.0.0.1:5000/"
    )
    render(result, tmp_path)
    expect(
        "report.html",
        re.sub("(?s)<style>.*</style>", "<style></style>", (tmp_path / "report.html").read_text()),
    )
    expect("report.md", (tmp_path / "report.md").read_text())
    expect("model-card.md", (tmp_path / "README.md").read_text())
    printed = terminal_text(result, "/tmp/report.html")
    expect("report.txt", printed + "\n")
    assert "…" not in printed  # 80 columns are enough


# Each changes the records or the settings of a run, and may return more arguments of `build`.


def score_items(records, *wrong, step="evaluate-4", count=1000):
    """Outcomes of as many items of each benchmark: all right before, and as many wrong after."""
    for name, numbers in (("evaluate-0", [0] * len(wrong)), (step, wrong)):
        records[name].metadata["items"] = [
            item | {"task": task}
            for task, number in zip(("tiny_reasoner", "tiny_retention"), numbers, strict=False)
            for item in items(set(range(number)), count)
        ]


def dense_solves_nothing(records, settings):
    for step in ("evaluate-0", "evaluate-4"):
        records[step].metadata["items"] = items(set(range(1000)), 1000)


def asked_otherwise(records, settings):
    """The same items by their ids, as of a benchmark whose file was replaced."""
    retention = [dict(item, task="tiny_retention") for item in items({5})]
    records["evaluate-0"].metadata["items"] += retention
    other = [dict(item, prompt_digest="other") for item in items(set(range(9)))]
    records["evaluate-4"].metadata["items"] = [*other, *retention]


def worse_without_a_gate(records, settings):
    settings["gate"]["enabled"] = False
    score_items(records, 18, count=20)
    records["evaluate-4"].metadata["scores"] = scores(SMALL, 0.1, 122)


def nothing_accepted(records, settings):
    for i in (1, 2, 3, 4):
        reject(records, i)


def rejected_and_ended(records, settings):
    reject(records, 3)
    gate = {
        "cap": 1,
        "rejections": 1,
        "stopped": True,
        "reason": "the loop ended in iteration 3: no smaller step left",
    }
    before = records["evaluate-2"].pointer
    records["evaluate-3"].metadata["accepted"] = dataclasses.asdict(before) | {"gate": gate}
    remove(records, "prune-4", "recover-4", "evaluate-4")  # they leave no record


def remove(records, *steps):
    for step in steps:
        del records[step]


def final_not_scored(records, settings):
    final = records["evaluate-4"].metadata
    final["accepted"] = final["accepted"] | {"digest": "sha256:" + "b" * 64}


def one_iteration_of_one_benchmark(records, settings):
    remove(
        records,
        *set(records) - {"import-model", "evaluate-0", "prune-1", "recover-1", "evaluate-1"},
    )
    for step, accuracy in (("evaluate-0", 1.0), ("evaluate-1", 0.99)):
        records[step].metadata["scores"] = scores(SMALL, accuracy, 122)
        del records[step].metadata["scores"]["tasks"][1]
    score_items(records, 5, step="evaluate-1", count=500)
    settings["schedule"]["iterations"] = 1
    settings["evaluate"]["tasks"] = settings["evaluate"]["tasks"][:1]


def leaves_much_out(records, settings):
    """No control and no speed; and the final model's answers are truncated."""
    remove(records, *CONTROL)
    records["evaluate-4"].metadata["speed"] = {}
    task = records["evaluate-4"].metadata["scores"]["tasks"][0]
    task |= {"truncated": 0.12, "cut_prompts": 0.5, "code_timeouts": 3, "answer_tokens": 45.0}
    for answer in records["evaluate-4"].metadata["items"]:
        answer["tokens"] *= 2
    settings["schedule"]["target"] = 0.5


def trained_on(records, *, cut=0, passes):
    for step, few in (("recover-1", 0), ("recover-2", cut), ("control-recover", 500)):
        records[step].metadata.update(
            {"sequences": 1000, "cut_sequences": few, "passes": 0.4 if few == 0 else passes}
        )


def decontaminated(records, *not_compared):
    for name, rows, dropped in (
        ("recover-1", 1_000, 5),
        ("recover-2", 2_000, 12),
        ("control-recover", 9_000, 100),
    ):
        counts = {
            "rows_compared": rows,
            "rows_dropped": dropped,
            "not_compared": list(not_compared),
        }
        records[name].metadata.update(counts | {"benchmark_items": 500, "benchmark_items_short": 7})


def better_control(records, settings):
    records["control-evaluate"].metadata["items"] = items(set())
    score_items(records, 9, count=20)


def control_did_not_begin(records, settings):
    remove(records, *CONTROL)
    return {
        "control_failed": "control-prune was killed after 3 attempts: out of memory;\n raise resources.memory <b>."
    }


def judged_by_perplexity(records, settings):
    """A metric without intervals, where less is better."""
    for record in records.values():
        for task in record.metadata.get("scores", {}).get("tasks", [])[:1]:
            worse = (
                25.0
                if record.metadata["arm"] == "control"
                else 20.0 + record.metadata["iteration"] / 2
            )
            task.update(
                metric="word_perplexity,none",
                accuracy=worse,
                low=None,
                high=None,
                higher_is_better=False,
            )
        record.metadata.pop("items", None)


def several_samples(records, settings):
    """Two answers to each item of the first benchmark: a few that were both right are right once now, or never."""
    for step, wrong in (("evaluate-0", ({3}, {3})), ("evaluate-4", ({2, 11}, {2, 5}))):
        metadata = records[step].metadata
        metadata["scores"]["tasks"][0] |= {"samples": 2, "pass_at_n": 0.95}
        metadata["items"] = [item for numbers in wrong for item in items(numbers)]
    records["evaluate-4"].metadata["speed"] |= {"items": 32, "samples": 2}


def mixture_with_removed_layers(records, settings):
    records["prune-1"].metadata["removed_layers"] = [1]
    records["prune-2"].metadata["removed_layers"] = [1]  # of the three that were left: 0, 2, 3
    for record in records.values():
        if "scores" in record.metadata:
            params = record.metadata["scores"]["params"]
            record.metadata["scores"] |= {
                "experts": params // 10_000,
                "active_params": params - 100_000,
            }
    records["evaluate-2"].metadata["scores"]["widths"] = [170, 160, 170]


def width_pruned(records, settings):
    """Hidden size in each iteration, KV heads from the second on; the third and the fourth had no choice.

    The control took what had not the least loss, as where all are above that of guessing.
    """
    ends = [(56, 57, 1, 2.5626), (64, 43, 1, 2.84), (48, 43, 2, 4.28)]
    candidates = [
        dict(zip(("hidden", "width", "kv_heads", "loss"), end, strict=True), experts=None)
        for end in ends
    ]
    for step, among, taken in (("prune-1", candidates[::-1], 2), ("prune-2", candidates[:2], 0)):
        records[step].metadata["candidates"] = [
            each | {"taken": i == taken} for i, each in enumerate(among)
        ]
    of_control = [each | {"experts": 4, "taken": i == 1} for i, each in enumerate(candidates)]
    records["control-prune"].metadata["candidates"] = of_control
    for step, hidden, heads in (
        ("1", 62, 2),
        ("2", 60, 1),
        ("3", 58, 1),
        ("4", 56, 1),
        ("control", 56, 1),
    ):
        name = "control-evaluate" if step == "control" else f"evaluate-{step}"
        shape = {"hidden_size": hidden, "kv_heads": heads, "kv_bytes_per_token": 1024 * heads}
        records[name].metadata["scores"] |= shape


def exported(records, settings, limit):
    settings["export"] = [EXPORT | {"limit": limit}]
    records[STEP] = record_of(STEP, export(SMALL, 140_000, 0.97, limit=limit))


def export_on_fewer_items(records, settings):
    exported(records, settings, 200)
    for model in records[STEP].metadata["models"].values():
        model["tasks"] = [task | {"items": 200} for task in model["tasks"]]


def export_not_made(records, settings):
    settings["export"] = [EXPORT]
    return {"exports_failed": {STEP: "InputError: no quantizer"}}


def export_of_other_settings(records, settings):
    exported(records, settings, 10)
    settings["export"] = [EXPORT]


CHANGES = {
    "no worse": lambda records, _: score_items(records, 0),
    "fell by less than can be said": lambda records, _: score_items(records, 17),
    "worse": lambda records, _: score_items(records, 25),
    "one benchmark worse": lambda records, _: score_items(records, 2, 28),
    "gate is strict": lambda _, settings: settings["gate"].update(strict=True),
    "rehearsal": lambda _, settings: settings.update(
        name="tiny-rehearsal", storage={"experiment": "ptl-rehearsal"}
    ),
    "target in parameters": lambda _, settings: settings["schedule"].update(target=SMALL),
    "target just missed": lambda _, settings: settings["schedule"].update(target=0.4052),
    "cut sequences and many passes": lambda records, _: trained_on(records, cut=12, passes=4.6),
    "not compared with all": lambda records, _: decontaminated(records, "wikitext"),
    "speed with a reason": lambda records, _: records["evaluate-4"].metadata.update(
        speed={"reason": "no memory"}
    ),
    "control failed after its evaluation": lambda *_: {
        "control_failed": "control-evaluate: MLflow cannot be reached"
    },
} | {
    change.__name__.replace("_", " "): change
    for change in (
        *(
            dense_solves_nothing,
            asked_otherwise,
            worse_without_a_gate,
            nothing_accepted,
            rejected_and_ended,
        ),
        *(final_not_scored, one_iteration_of_one_benchmark, leaves_much_out),
        *(better_control, control_did_not_begin),
        *(
            judged_by_perplexity,
            several_samples,
            mixture_with_removed_layers,
            width_pruned,
        ),
        *(export_on_fewer_items, export_not_made, export_of_other_settings),
    )
}


def pages(change):
    """The report of a changed run, with the verdicts' colours, and its model card."""
    records, settings = run_records.records(), run_records.settings()
    more = change(records, settings) or {}
    result = build(records, settings, **RUN, **more)
    colours = [
        [cell.kind for row in table.rows for cell in row if cell.kind]
        for table in tables.evidence(result)
    ]
    texts = [page(name, result, html=False) for name in ("report.j2", "card.j2")]
    assert_tables(texts)
    own = texts[1].splitlines()
    of_card = [line for line in own if line not in texts[0].splitlines()]  # the evidence is in both
    return [f"colours: {overall(result).kind}, of {colours}", *texts[0].splitlines(), *of_card]


def assert_tables(texts):
    """A blank line ends a table: below its heading a rule of dashes must follow at once, and then its rows."""
    for lines in (text.split("\n") for text in texts):
        for before, rule, after in zip(lines, lines[1:], lines[2:], strict=False):
            if rule.startswith("|---"):
                assert before.count("|") == rule.count("|") == after.count("|") > 0, before
            elif rule.startswith("|") and not before.startswith("|"):
                assert after.startswith("|---"), rule


def test_what_differs_in_a_run_differs_in_its_pages(capsys):
    """In tests/golden/report-changes.diff, of each change above: how lines begin that are gone, and lines that came."""
    usual = pages(lambda records, settings: None)
    text = ""
    for name, change in CHANGES.items():
        difference = difflib.unified_diff(usual, pages(change), lineterm="", n=0)
        lines = [line for line in difference if not line.startswith(("--- ", "+++ ", "@@"))]
        lines = [line if line.startswith("+") else line[:60] for line in lines]
        text += "\n".join([f"# {name}", *lines, "", ""])
    expect("report-changes.diff", text)
    assert (
        "tiny_reasoner is not compared: the prompts of tiny_reasoner item 0 differ"
        in capsys.readouterr().out
    )
