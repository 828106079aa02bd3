"""Sizes and durations as they are printed."""

from ptl.units import counted, decimal_hours, duration, listed, memory_beside, quantity, size


def test_sizes_have_one_to_three_digits_before_the_point():
    cases = {
        0: "0 B",
        999: "999 B",
        1000: "1.0 kB",
        12_345_678: "12.3 MB",
        999_960_000: "1.0 GB",
        16_000_000_000: "16.0 GB",
    }
    assert {count: size(count) for count in cases} == cases


def test_durations():
    cases = {4.21: "4.2 s", 59.97: "1 min", 230.4: "3 min 50 s", 3599.6: "1 h", 26_000: "7 h 13 min"}
    assert {seconds: duration(seconds) for seconds in cases} == cases


def test_hours_have_two_digits_that_count():
    cases = {0: "0", 2.14e-5: "2.1e-05", 0.0042: "0.0042", 0.1: "0.10", 12.341: "12.34"}
    assert {hours: decimal_hours(hours) for hours in cases} == cases


def test_names_are_listed_as_in_a_sentence():
    assert [listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_one_thing_is_not_many():
    assert [counted(number, "item") for number in (0, 1, 1200)] == ["0 items", "1 item", "1,200 items"]


def test_memory_is_in_the_unit_of_the_goal():
    """409.2 kB beside a goal of 400KiB looks like too much."""
    cases = {"400KiB": "400.0 KiB", "0.4 MB": "0.41 MB", "400Ki": "400.0 KiB", "1GB": "409.6 kB"}
    assert {goal: memory_beside(409_600, goal) for goal in cases} == cases
    assert memory_beside(16 << 30, "16GiB") == "16.0 GiB"


def test_quantities_of_kubernetes():
    cases = {"64Gi": 64 << 30, "9G": 9e9, "1.5Ki": 1536, "500m": 0.5, "8": 8}
    assert {text: quantity(text) for text in cases} == cases
