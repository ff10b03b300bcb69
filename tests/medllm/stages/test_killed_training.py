"""SIGKILL and SIGTERM of a training; ``python -m tests.killed_training jax cpt 20`` kills more often."""

import pytest

from tests.killed_training import kill, stop


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path, engine):
    pytest.importorskip(engine)
    assert "apart by 0.0e+00" in kill(engine, "cpt", tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_training_that_is_asked_to_stop_saves_and_says_how_to_go_on(tmp_path, engine):
    pytest.importorskip(engine)
    assert "apart by 0.0e+00" in stop(engine, "cpt", tmp_path)
