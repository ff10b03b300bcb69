"""A run that stops and goes on ends where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.batches import CptData, plan_steps
from jax_medllm.train.checkpoint import Checkpoints
from jax_medllm.train.loop import cpt_loss_fn, train
from medllm.config import LoraConfig, OptimizerConfig, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.errors import UserError
from medllm.run import Run
from tests.small_model import small_config

SMALL = small_config()


def session(run, settings=None, **changes):
    """One call of ``train`` on six rows; answers with the adapter's arrays."""
    tokens = np.random.default_rng(0).integers(1, 53, (6, 16)).astype(np.int32)
    rows = PackedRows(tokens, np.ones_like(tokens), np.tile(np.arange(16, dtype=np.int32), (6, 1)))
    config = TrainingConfig(**{"epochs": 2, "batch_size": 1, "accumulation": 2} | changes)
    data = CptData(rows, plan_steps(6, config))
    model = DenseDecoder(SMALL, lora=LoraConfig(rank=4, alpha=8), rngs=nnx.Rngs(0))
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.1)
    train(model, cpt_loss_fn, data, optimizer, config, run, settings=settings or {}, resume=True)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, LoraParam))]


def logged(run):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in run.metrics()]


def test_three_steps_and_three_resumed_are_six_steps(tmp_path):
    straight, halves = Run(tmp_path / "straight", TrainingConfig()), Run(tmp_path / "halves", TrainingConfig())
    expected = session(straight)
    session(halves, max_steps=3)
    got = session(halves)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in logged(halves)] == [1, 2, 3, 4, 5, 6]
    assert logged(halves) == logged(straight)


def test_lines_logged_after_the_last_checkpoint_are_replaced_on_resuming(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    session(run, max_steps=3)
    run.log(4, loss=99.0)
    session(run, max_steps=5)
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5]
    assert max(line["loss"] for line in logged(run)) < 10


def test_a_run_that_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    run.log(1, loss=99.0)
    session(run)
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6]
    assert max(line["loss"] for line in logged(run)) < 10


def test_resuming_a_complete_run_changes_nothing(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    first, before = session(run), logged(run)
    for a, b in zip(first, session(run), strict=True):
        np.testing.assert_array_equal(a, b)
    assert logged(run) == before


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    run = Run(tmp_path / "run", TrainingConfig())
    session(run, settings={"rows": 6}, max_steps=1)
    with pytest.raises(UserError, match="rows = 6, this run has 7"):
        session(run, settings={"rows": 7})


def test_only_the_last_checkpoint_is_kept_unless_more_are_asked_for(tmp_path):
    def kept(run):
        return sorted(int(folder.name) for folder in (run.path / "checkpoints").iterdir() if folder.name.isdigit())

    last, several = Run(tmp_path / "last", TrainingConfig()), Run(tmp_path / "several", TrainingConfig())
    session(last)
    session(several, checkpoint_every=2)
    assert kept(last) == [6]
    assert kept(several) == [4, 6]


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    state = {"a": jnp.arange(3.0)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    checkpoints.save(state, 1)
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        Checkpoints(tmp_path / "checkpoints", {}).restore(state)
