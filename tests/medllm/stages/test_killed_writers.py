"""SIGKILL of a command that writes a model; ``python -m tests.killed_writers 20`` kills more often."""

import pytest

from tests.killed_writers import kill, trained


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_and_ends_when_it_is_given_again(tmp_path):
    pytest.importorskip("jax")
    trained(tmp_path)
    assert "nothing left beside them" in kill("convert", tmp_path, 2)
