"""Sizes and durations as they are printed."""

from ptl import units

MEMORY = {"400KiB": "400.0 KiB", "0.4 MB": "0.41 MB", "400Ki": "400.0 KiB", "1GB": "409.6 kB"}


def test_a_number_is_shown_in_a_unit_that_fits():
    for show, cases in (
        (
            units.size,
            {
                0: "0 B",
                1000: "1.0 kB",
                12_345_678: "12.3 MB",
                999_960_000: "1.0 GB",
                16 * 10**9: "16.0 GB",
            },
        ),
        (
            units.billions,
            {999: "999", 213_120: "213k", 999_700: "1M", 1_000_000: "1M", 8_190_735_360: "8.19B"},
        ),
        (
            units.duration,
            {
                4.21: "4.2 s",
                59.97: "1 min",
                230.4: "3 min 50 s",
                3599.6: "1 h",
                26_000: "7 h 13 min",
            },
        ),
        (
            units.decimal_hours,
            {0: "0", 2.14e-5: "2.1e-05", 0.0042: "0.0042", 0.1: "0.10", 12.341: "12.34"},
        ),
        (units.quantity, {"64Gi": 64 << 30, "9G": 9e9, "1.5Ki": 1536, "500m": 0.5, "8": 8}),
        # 409.6 kB beside 400KiB looks like too much
        (lambda goal: units.memory_beside(409_600, goal), MEMORY),
    ):
        assert {number: show(number) for number in cases} == cases
