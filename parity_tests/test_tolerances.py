"""The table of tolerances: a check that fails when it should, no tolerance that nothing reads, a page that says the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from parity_tests.tolerances import TOLERANCES, Tolerance, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ONE_PERCENT = Tolerance(0.01, "a test", 0.0)


def test_a_difference_within_the_bound_passes_and_is_relative_to_the_largest_value():
    ONE_PERCENT.assert_close([100.9, 0.9], [100.0, 0.0], "numbers")
    ONE_PERCENT.assert_close([0.0], [0.0], "zeros")


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([1.02], [1.0], "relative difference 0.02"),
        ([1.0, 2.0], [1.0], "shapes"),
        ([np.nan], [1.0], "not all finite"),
        ([1.0], [np.inf], "the reference is not all finite"),
        ([0.5], [0.0], "relative difference 0.5"),
    ],
)
def test_anything_else_is_refused_with_what_it_was(actual, expected, message):
    with pytest.raises(AssertionError, match=f"logits: {message}"):
        ONE_PERCENT.assert_close(actual, expected, "logits")


@pytest.mark.parametrize("name", TOLERANCES)
def test_what_was_seen_lies_below_the_bound_and_a_test_or_the_audit_reads_it(name):
    tolerance = TOLERANCES[name]
    assert tolerance.seen <= tolerance.relative
    readers = [*ROOT.glob("parity_tests/*.py"), *ROOT.glob("medllm_parity/*.py")]
    assert any(name in path.read_text(encoding="utf-8") for path in readers if path.name != "tolerances.py")


def test_float64_is_held_to_1e_10_and_trajectories_to_1e_8():
    for name in TOLERANCES:
        if name.startswith("FLOAT64") and name != "FLOAT64_HANDED_OUT":
            assert TOLERANCES[name].relative <= (1e-8 if "TRAJECTORY" in name else 1e-10), name


def test_the_page_prints_the_table():
    assert table() in PAGE, "docs/parity.md: put in what python -m parity_tests.tolerances prints"


def test_the_page_names_every_file_of_the_suite_and_no_other():
    named = set(re.findall(r"`(test_\w+\.py)`", PAGE))
    assert named == {path.name for path in (ROOT / "parity_tests").glob("test_*.py")}
