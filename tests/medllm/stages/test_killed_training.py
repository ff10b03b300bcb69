"""SIGKILL and SIGTERM of a training; ``python -m tests.killed_training jax cpt 20`` kills more often."""

import pytest

from tests.killed_training import kill, stop, whole


@pytest.fixture(scope="module", params=["jax", "torch"])
def inputs(request, tmp_path_factory):
    """An engine, and a folder in which a run of it was left alone."""
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    whole(request.param, "cpt", folder)
    return request.param, folder


@pytest.mark.slow
def test_a_killed_training_ends_as_if_it_had_not_been(inputs):
    engine, folder = inputs
    assert "apart by 0.0e+00" in kill(engine, "cpt", folder, 2)


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_saves_and_says_how_to_go_on(inputs):
    engine, folder = inputs
    assert "apart by 0.0e+00" in stop(engine, "cpt", folder)
