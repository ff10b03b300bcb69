"""SIGKILL and SIGTERM of a training; ``python -m tests.killed_training jax cpt 20`` kills more often."""

import pytest

from tests.killed_training import Trial


@pytest.fixture(scope="module", params=["jax", "torch"])
def trial(request, tmp_path_factory):
    """A training on an engine, with a run that was left alone."""
    pytest.importorskip(request.param)
    trial = Trial(request.param, "cpt", tmp_path_factory.mktemp(request.param))
    trial.whole()
    return trial


@pytest.mark.slow
def test_a_killed_training_ends_as_if_it_had_not_been(trial):
    assert "apart by 0.0e+00" in trial.kill(2)


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_saves_and_says_how_to_go_on(trial):
    assert "apart by 0.0e+00" in trial.stop()
