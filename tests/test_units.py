"""Sizes and durations as they are printed."""

from ptl.units import counted, duration, quantity, size


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


def test_one_thing_is_not_many():
    assert [counted(number, "item") for number in (0, 1, 1200)] == ["0 items", "1 item", "1,200 items"]


def test_quantities_of_kubernetes():
    cases = {"64Gi": 64 << 30, "9G": 9e9, "1.5Ki": 1536, "500m": 0.5, "8": 8}
    assert {text: quantity(text) for text in cases} == cases
