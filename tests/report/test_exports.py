"""Forms for other runtimes in the report, from records that are a fixture."""

from run_records import DENSE, export, record_of

from ptl.report.render import write_report
from ptl.report.wording import notes

FORM = {"format": "gguf", "type": "q8_0"}
STEP = "export-gguf-q8-0"


def pages(records, settings, folder, **more):
    result = write_report(records, settings | {"export": [FORM], **more}, folder)
    return result, (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_a_form_is_shown_beside_the_models_and_their_own_forms(records, settings, no_pictures, tmp_path):
    records[STEP] = record_of(STEP, export(127_872, 140_000, 0.97))
    result, html, markdown = pages(records, settings, tmp_path)
    rows = [line for line in markdown.splitlines() if line.startswith(("| Dense", "| Final"))]
    assert [row.split(" | ")[0] for row in rows] == ["| Dense", "| Dense, q8_0", "| Final", "| Final, q8_0"]
    assert rows[0].split(" | ")[1] == f"{DENSE * 4 / 1000:.1f} kB (1.00x)" and "140.0 kB (0.16x)" in rows[3]
    assert "| | Weights | tiny\\_reasoner | tiny\\_retention | Items | Tokens/s |" in markdown
    assert rows[3].endswith("| 97.0 % (95.0 to 99.0) | 87.0 % (85.0 to 89.0) | 500, 300 | 3,210 |")
    assert "| tiny\\_reasoner | the dense model in the same form | -1.0 points" in markdown
    assert f"Get the files: ptl fetch {result['run_id']}:{STEP} DIR" in html and result["run_id"]
    assert "a note on it" in html and "Export: gguf-q8_0" in html and "Not worse within the margin of 2 points" in html
    verdict = "against the final model: not worse within the margin of 2 points"
    first = f"tiny_reasoner: 97.0 % (95.0 to 99.0) on 500 items, {verdict}."
    assert f"Export gguf-q8_0: 140.0 kB (0.16x). {first} tiny_retention: 87.0 % (85.0 to 89.0) on 300 items." in notes(
        result
    )
    assert "scored on the first" not in html + markdown
    assert STEP in [step["step"] for step in result["steps"]]


def test_a_verdict_names_the_model_that_solves_nothing(records, settings, no_pictures, tmp_path):
    form = export(127_872, 140_000, 0.97)
    pairs = form["pairs"]["tiny_reasoner"]
    for name in pairs:
        pairs[name] = pairs[name] | {"reference": 0.0, "low": 0.0}
    records[STEP] = record_of(STEP, form)
    result, _, markdown = pages(records, settings, tmp_path)
    for reference in ("the final model", "the dense model in the same form", "the dense model"):
        assert f"Cannot be said: {reference} solves none of 500 items |" in markdown
    said = "against the final model: cannot be said: the final model solves none of 500 items."
    assert any(said in note for note in notes(result))


def test_a_form_that_was_scored_on_fewer_items_says_how_many(records, settings, no_pictures, tmp_path):
    form = export(127_872, 140_000, 0.97, limit=200)
    for model in form["models"].values():
        model["tasks"] = [task | {"items": 200} for task in model["tasks"]]
    records[STEP] = record_of(STEP, form)
    limited = settings | {"export": [FORM | {"limit": 200}]}
    result = write_report(records, limited, tmp_path)
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith(("| Dense", "| Final"))]
    assert [row.split(" | ")[4] for row in rows] == ["500, 300", "200, 200", "500, 300", "200, 200"]
    assert all("scored on the first 200 items of each benchmark at most" in page for page in (html, markdown))
    assert "97.0 % (95.0 to 99.0) on 200 items, " in " ".join(notes(result))


def test_a_form_that_was_not_made_is_named_with_the_reason(records, settings, no_pictures, tmp_path):
    result, html, markdown = pages(records, settings, tmp_path, exports_failed={STEP: "InputError: no quantizer"})
    assert "Not made: InputError: no quantizer." in markdown and "Not made: InputError: no quantizer." in html
    assert "Export gguf-q8_0 was not made: InputError: no quantizer." in notes(result)
    assert "exports_failed" not in result["settings"]


def test_a_form_that_was_made_with_other_settings_is_not_shown_as_these(records, settings, no_pictures, tmp_path):
    records[STEP] = record_of(STEP, export(127_872, 140_000, 0.97, limit=10))
    result = write_report(records, settings | {"export": [FORM | {"limit": 200}]}, tmp_path)
    (form,) = result["exports"]
    assert "made it with other settings before" in form["failed"] and "models" not in form
    assert "Not made: the run has made it with other settings" in (tmp_path / "report.md").read_text()


def test_without_benchmarks_of_right_and_wrong_items_nothing_is_compared(records, settings, no_pictures, tmp_path):
    form = export(127_872, 140_000, 0.97)
    for model in form["models"].values():
        model["tasks"] = [task | {"metric": "word_perplexity", "accuracy": 12.3, "low": None, "high": None}
                          for task in model["tasks"]]  # fmt: skip
    records[STEP] = record_of(STEP, form | {"pairs": {}})
    result, html, markdown = pages(records, settings, tmp_path)
    assert "Final, in this form, against" not in html + markdown
    assert "| Final, q8_0 | 140.0 kB (0.16x) | 12.3 | 12.3 | 500, 300 | 3,210 |\n\n- a note on it\n" in markdown
    assert (
        "Export gguf-q8_0: 140.0 kB (0.16x). tiny_reasoner: 12.3 on 500 items. tiny_retention: 12.3 on 300 items."
        in notes(result)
    )


def test_without_forms_there_is_no_section(records, settings, no_pictures, tmp_path):
    result = write_report(records, settings, tmp_path)
    assert result["exports"] == [] and "Export" not in (tmp_path / "report.md").read_text()
