"""A few hundred cases of benchmarks/fuzz.py, which is run at length by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fuzz import plan_cases, run_cases


@pytest.mark.parametrize(("kind", "numbers"), plan_cases(300).items(), ids=str)
def test_no_input_ends_in_a_traceback_or_is_accepted_against_what_it_says(kind, numbers):
    assert list(run_cases(kind, numbers)) == []
