"""Exports in the report, from records that are a fixture."""

from run_records import DENSE, RUN, export, record_of

from ptl.report.build import build
from ptl.report.render import render, terminal_text
from ptl.report.words import checks

EXPORT = {"format": "gguf", "type": "q8_0"}
STEP = "export-gguf-q8-0"


def pages(records, settings, folder, **more):
    result = build(records, settings | {"export": [EXPORT]}, **RUN, **more)
    render(result, folder)
    return result, (folder / "report.html").read_text(), (folder / "report.md").read_text()


def table(markdown: str, *labels: str) -> list[list[str]]:
    """The cells of the rows with these labels, in the section of the export."""
    section = markdown[markdown.index("## Export: ") :]
    return [
        line[2:-2].split(" | ") for line in section.splitlines() if line.startswith(tuple(f"| {x}" for x in labels))
    ]


def test_an_export_is_shown_beside_the_models_and_their_own_exports(records, settings, no_pictures, tmp_path):
    records[STEP] = record_of(STEP, export(127_872, 140_000, 0.97))
    result, html, markdown = pages(records, settings, tmp_path)
    rows = table(markdown, "Dense", "Final")
    assert [row[0] for row in rows] == ["Dense", "Dense, q8\\_0", "Final", "Final, q8\\_0"]
    assert rows[0][1] == f"{DENSE * 4 / 1000:.1f} kB (1.00x)" and rows[3][1] == "140.0 kB (0.16x)"
    assert "| gguf-q8\\_0 | Weights | tiny\\_reasoner | tiny\\_retention | Items | Tokens/s |" in markdown
    assert rows[3][2:] == ["97.0 % (95.0 to 99.0)", "87.0 % (85.0 to 89.0)", "500, 300", "3,210"]
    assert "| tiny\\_reasoner | the dense model in the same format | -1.0 points" in markdown
    assert f"Get the files: ptl fetch {result.run_id}:{STEP} DIR" in html and result.run_id
    assert "a note on it" in html and "Export: gguf-q8_0" in html and "within the margin of 2 points" in html
    assert "scored on the first" not in html + markdown
    assert STEP in [step.step for step in result.steps]
    assert "gguf-q8_0" in terminal_text(result, "") and "3,210" in terminal_text(result, "")


def test_an_export_that_was_scored_on_fewer_items_says_how_many(records, settings, no_pictures, tmp_path):
    metadata = export(127_872, 140_000, 0.97, limit=200)
    for model in metadata["models"].values():
        model["tasks"] = [task | {"items": 200} for task in model["tasks"]]
    records[STEP] = record_of(STEP, metadata)
    render(build(records, settings | {"export": [EXPORT | {"limit": 200}]}), tmp_path)
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    items = [row[4] for row in table(markdown, "Dense", "Final")]
    assert items == ["500, 300", "200, 200", "500, 300", "200, 200"]
    assert all("scored on the first 200 items of each benchmark at most" in page for page in (html, markdown))


def test_an_export_that_was_not_made_is_named_with_the_reason(records, settings, no_pictures, tmp_path):
    result, html, markdown = pages(records, settings, tmp_path, exports_failed={STEP: "InputError: no quantizer"})
    assert all("Not made: InputError: no quantizer." in page for page in (html, markdown))
    assert dict(checks(result))["Export gguf-q8_0"] == "Not made: InputError: no quantizer."
    assert "no quantizer" in terminal_text(result, "")


def test_an_export_that_was_made_with_other_settings_is_not_shown_as_these(records, settings):
    records[STEP] = record_of(STEP, export(127_872, 140_000, 0.97, limit=10))
    (row,) = build(records, settings | {"export": [EXPORT | {"limit": 200}]}).exports
    assert "no record of it with these settings" in row.failed and not row.models


def test_without_benchmarks_of_right_and_wrong_items_nothing_is_compared(records, settings, no_pictures, tmp_path):
    metadata = export(127_872, 140_000, 0.97)
    for model in metadata["models"].values():
        model["tasks"] = [task | {"metric": "word_perplexity", "accuracy": 12.3, "low": None, "high": None}
                          for task in model["tasks"]]  # fmt: skip
    records[STEP] = record_of(STEP, metadata | {"pairs": {}})
    _, html, markdown = pages(records, settings, tmp_path)
    assert "Final, q8_0, against" not in html
    assert table(markdown, "Final")[1][1:] == ["140.0 kB (0.16x)", "12.3", "12.3", "500, 300", "3,210"]


def test_without_exports_there_is_no_section(records, settings, no_pictures, tmp_path):
    render(build(records, settings), tmp_path)
    assert "Export" not in (tmp_path / "report.md").read_text()
