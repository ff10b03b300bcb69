"""Damaged files of every format: each is read, or refused in a line."""

import pytest

from tests.fuzz.formats import FORMATS
from tests.fuzz.trial import outcome

INPUTS = 200


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_a_line(name):
    found = outcome(name, range(INPUTS))
    assert not found.uncaught, found.kinds
    assert found.refused > INPUTS / 3  # the damage reaches what is checked
