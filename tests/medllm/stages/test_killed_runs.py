"""SIGKILL of the one who asks and of the one who answers; ``python -m tests.killed_runs 10`` kills more often."""

import importlib.util

import pytest

from tests.journal_load import measured
from tests.killed_runs import kill_the_client, kill_the_server

NEEDS_OPENAI = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="pip install 'medllm[eval]'")
NEEDS_JAX = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="pip install 'medllm[jax]'")


@NEEDS_OPENAI
@pytest.mark.parametrize("stage", ["curate", "evaluate"])
def test_a_killed_run_asks_a_server_for_nothing_twice_and_ends_as_if_it_had_not_been(tmp_path, stage):
    assert "outputs equal" in kill_the_client(stage, "openai", tmp_path, 2, count=12)


@NEEDS_OPENAI
def test_a_run_whose_server_is_killed_says_what_is_kept_and_goes_on(tmp_path):
    assert "outputs equal" in kill_the_server("curate", tmp_path, 2, count=12)


@NEEDS_JAX
@pytest.mark.parametrize(("stage", "count"), [("curate", 6), ("evaluate", 17)])
def test_a_killed_run_of_an_engine_here_ends_as_if_it_had_not_been(tmp_path, stage, count):
    assert "outputs equal" in kill_the_client(stage, "jax", tmp_path, 1, count=count)


def test_a_load_of_answers_is_kept(tmp_path):
    """The run whose figures docs/benchmarks.md has, with fewer problems."""
    found = measured(40, 3, str(tmp_path / "run"))
    assert found["samples_per_second"] > 0
    assert (tmp_path / "run" / "answers.journal").read_text(encoding="utf-8").count("\n") == 120
