"""Tokens for each removed parameter, and passes over the rows: counted, and warned of beyond what results support."""

from pathlib import Path

from ptl.config.run import load_config
from ptl.data.checks import Amount, planned_amount

TINY = Path(__file__).parents[2] / "pipelines/prune_tune_loop/configs/tiny.yaml"


def test_too_few_tokens_for_what_is_removed_and_too_many_passes_are_warned_of():
    # An 8B model and 3,000 chats; the paper's run; the demo's.
    few, many = (
        Amount(1_700_000, 2_400_000_000, 4.2).warnings(),
        Amount(5_000_000_000, 2_400_000_000, 10_000).warnings(),
    )
    assert len(few) == len(many) == 1
    assert few[0].startswith("1,700,000 recovery tokens: 0.00071 per removed parameter") and "lower schedule" in few[0]
    assert "10,000 passes" in many[0] and "give more rows" in many[0]
    assert Amount(160_000_000, 1_570_000_000, None).warnings() == []
    assert Amount(12_000, 100, 0.5).warnings() == [] and Amount(0, 100, None).sentence == ""


def test_passes_are_over_the_source_that_is_read_most_often_of_files_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text(10 * f'{{"text": "{400 * "x"}"}}\n')
    text = {"source": str(tmp_path / "rows.jsonl"), "format": "text"}
    hub = {"source": "meta-math/NOPE", "weight": 3}

    def passes(sources, **changes):
        return planned_amount(
            load_config(TINY, {"training": sources, "schedule.recovery_tokens": 8000} | changes), 1
        ).passes

    assert passes([text]) == 8  # of 100 tokens each
    assert passes([text, hub]) == 2 and passes([hub]) is None
    assert passes([text], recover=[{"max_length": 50}]) == 16  # rows are cut


def test_the_shipped_demo_is_as_full_of_tokens_as_it_says():
    assert planned_amount(load_config(TINY), 86_016).warnings() == []
