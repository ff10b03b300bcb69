"""Damaged files of every format: each is read, or refused in a line."""

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.formats import FORMATS
from tests.fuzz.trial import outcome

INPUTS = 100
MOSTLY_NOT_ASKED_FOR = ("run, config.yaml", "run, config.yaml of an exam", "run, environment.json")
"""Files of a run that a report keeps, but of which it looks at little."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_a_line(name):
    found = outcome(name, range(INPUTS))
    assert not found.uncaught, found.kinds
    assert found.refused > INPUTS / (5 if name in MOSTLY_NOT_ASKED_FOR else 3)  # the damage reaches what is checked


def test_the_same_is_a_command_for_as_many_inputs_as_wanted(capsys):
    assert main(["--inputs", "20", "--only", "preferences", "metadata"]) == 0
    (_, _, *rows) = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["preferences", "metadata"]
    assert all(int(inputs) == 20 == int(refused) + int(read) for _, inputs, refused, read, *_ in cells)
