"""The table of class-incremental runs: intervals of 95 %, and differences that are paired by seed."""

import pytest

from benchmarks.class_incremental import interval, table


def runs(last: list[float]) -> list[dict]:
    return [{"figures": {"last accuracy": value}, "trainable": 10, "minutes": 1.0} for value in last]


def test_the_interval_is_that_of_a_t_test():
    stats = pytest.importorskip("scipy.stats")
    values = [3.0, 5.0, 4.0, 8.0]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(values) == f"{(low + high) / 2:.1f} ± {(high - low) / 2:.1f}"
    assert interval([4.0]) == "4.0"


def test_the_lead_is_paired_over_the_seeds_that_both_have():
    pytest.importorskip("scipy.stats")
    text = table("digits_sdlora", {"sd_lora": runs([0.3, 0.5, 0.9]), "sequential": runs([0.2, 0.4])})
    ours, other = (line.split("|") for line in text.splitlines()[2:])
    assert other[5].strip() == "10.0 ± 0.0"  # the seeds differ by 20, the two rows always by 10
    assert ours[5].strip() == ""
