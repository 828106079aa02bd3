"""How much a recovery trains: too few tokens and too many passes are warned of before they are paid for."""

from checkout import TINY
from rows import rows_file

from ptl.config.run import load_config
from ptl.data.amount import Amount
from ptl.preflight.amount import planned_amount


def test_too_few_tokens_for_what_is_removed_and_too_many_passes_are_warned_of():
    # An 8B model and 3,000 chats; the paper's run; the demo's.
    (few,) = Amount(1_700_000, 2_400_000_000, 4.2).warnings()
    (many,) = Amount(5_000_000_000, 2_400_000_000, 10_000).warnings()
    assert (
        "1,700,000 recovery tokens: 0.00071 per removed parameter" in few
        and "10,000 passes" in many
    )
    assert Amount(160_000_000, 1_570_000_000, None).warnings() == []
    assert Amount(0, 100, 9).sentence == Amount(100, 0, 9).sentence == ""
    # Both are estimates: what is rounded to the limit is within it.
    for tokens, passes, warnings in ((951, 4.5, 0), (949, 4.5, 1), (951, 4.51, 1), (949, 5, 2)):
        assert len(Amount(tokens, 100_000, passes).warnings()) == warnings
    assert len(Amount(949, 100_000, None).warnings(least=0.009)) == 0
    assert planned_amount(load_config(TINY), 86_016).warnings() == []  # the shipped demo
    its_own = load_config(TINY, {"training.answers": "self", "schedule.recovery_tokens": 8000})
    assert planned_amount(its_own, 1_000_000).warnings()  # of answers that nobody has counted yet


def test_passes_are_over_the_source_that_is_read_most_often_of_files_alone(tmp_path):
    def passes(sources, **changes):
        config = load_config(
            TINY, {"training": sources, "schedule.recovery_tokens": 8000} | changes
        )
        return planned_amount(config, 1).passes

    def file(name, *lengths):
        return {
            "source": rows_file(tmp_path / name, [{"text": length * "x"} for length in lengths]),
            "format": "text",
        }

    text, other = file("rows.jsonl", *[400] * 10), file("other.jsonl", *[800] * 10)
    hub = {"source": "meta-math/NOPE", "weight": 3}
    assert passes([text]) == 8  # of 100 tokens each
    assert passes([other, text]) == 4 and passes([text | {"weight": 3}, other]) == 6
    assert passes([text, hub]) == 2 and passes([hub]) is None
    assert passes([text], recover=[{"max_length": 50}]) == 16  # rows are cut
    assert passes([text], recover=[{"method": "grpo"}]) is None
    # 200 rows are measured, and all counted.
    assert passes([file("rows.jsonl", *[400] * 250, 0)]) == 8000 / 25_100
