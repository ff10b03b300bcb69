"""The device never waits for the host: batches ahead of time, metrics a step late, memory given back."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm import train as loop
from jax_medllm.batches import CptBatch, cpt_step, plan_steps
from jax_medllm.model import LoraParam, Qwen2
from jax_medllm.optimizer import learning_rate, make_optimizer
from jax_medllm.train import Task, cpt_loss_fn, make_step, train
from medllm.config import LoraConfig, OptimizerConfig, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.run import Run
from tests.small_model import small_config

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def small_model():
    return Qwen2(small_config(), lora=LoraConfig(rank=4), rngs=nnx.Rngs(0))


def rows(count=6, length=16):
    tokens = np.random.default_rng(0).integers(1, 53, (count, length)).astype(np.int32)
    return PackedRows(tokens, np.ones_like(tokens), np.tile(np.arange(length, dtype=np.int32), (count, 1)))


def task_of(config, batches=None):
    return Task(
        cpt_loss_fn, plan_steps(6, config), batches or (lambda step: cpt_step(rows(), step)), lambda step: 1, "tokens", {}
    )


@pytest.mark.parametrize(("log_every", "expected"), [(1, "ssfsfsfsfsff"), (2, "sssffssffsff"), (9, "ssssssffffff")])
def test_metrics_are_fetched_when_they_are_logged_and_the_next_step_is_under_way(tmp_path, monkeypatch, log_every, expected):
    """Six steps (s), each with its metrics to fetch (f)."""
    events = []

    class Watched(loop.TrainingStep):
        def __call__(self, *arguments):
            events.append("s")
            return super().__call__(*arguments)

    fetch = jax.device_get

    def watched(tree):
        events.append("f")
        return fetch(tree)

    monkeypatch.setattr(loop, "TrainingStep", Watched)
    monkeypatch.setattr(jax, "device_get", watched)
    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1, log_every=log_every)
    run = Run(tmp_path / "run", config)
    train(small_model(), task_of(config), OPTIMIZER, config, run)
    assert "".join(events) == expected
    assert [line["step"] for line in run.metrics()] == {1: [1, 2, 3, 4, 5, 6], 2: [2, 4, 6], 9: [6]}[log_every]


@pytest.mark.parametrize("log_every", [1, 4, 9])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_rate_counts_the_steps_after_the_first_or_the_only_one(tmp_path, log_every, steps):
    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1, log_every=log_every, max_steps=steps)
    plan = plan_steps(6, config)
    heavy = Task(
        cpt_loss_fn, plan, lambda step: cpt_step(rows(), step), lambda step: 10**12 if step == plan[0] else 1, "tokens", {}
    )
    trained = train(small_model(), heavy, OPTIMIZER, config, Run(tmp_path / "run", config))
    assert (trained.rate > 10**9) == (steps == 1)
    assert trained.rate > 0


def test_the_rate_leaves_out_the_time_of_the_first_step_and_all_compilation(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    metrics = loop.StepMetrics(loop.CptMetrics(1.0), 1.0, 1.0)
    log = loop._Log(Run(tmp_path / "run", TrainingConfig()), "tokens")
    log.start()
    compiled = 0.0
    for step, (seconds, compiling) in enumerate([(50.0, 20.0), (2.0, 0.0), (9.0, 7.0)], 1):
        now[0] += seconds
        compiled += compiling
        log.add(step, metrics, 10)
        if step == 1:
            log.first_is_done(compiled)
        log.close()
        log.write(compiled)
    assert log.rate == pytest.approx(20 / 4)


def test_steps_are_laid_out_in_other_threads_before_they_are_needed(tmp_path):
    laid_out, threads = [], set()
    enough = threading.Event()

    def batches(step):
        threads.add(threading.current_thread())
        laid_out.append(step)
        if len(laid_out) == 4:
            enough.set()
        return cpt_step(rows(), step)

    def loss(model, batch):
        # Traced when the first step is compiled, before any step is done.
        assert enough.wait(20)
        return cpt_loss_fn(model, batch)

    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    task = Task(loss, plan_steps(6, config), batches, lambda step: 1, "tokens", {})
    train(small_model(), task, OPTIMIZER, config, Run(tmp_path / "run", config))
    assert threading.main_thread() not in threads
    assert sorted(laid_out) == sorted(task.steps)


def test_an_error_in_the_data_reaches_the_user(tmp_path):
    def batches(step):
        raise ValueError("a row that cannot be laid out")

    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    with pytest.raises(ValueError, match="cannot be laid out"):
        train(small_model(), task_of(config, batches), OPTIMIZER, config, Run(tmp_path / "run", config))


def test_gradient_sums_and_the_optimizers_state_are_updated_in_place():
    graph, trainable, rest = nnx.split(small_model(), LoraParam, ...)
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_step(graph, cpt_loss_fn, optimizer, lambda index: learning_rate(OPTIMIZER, 10, index))
    state = optimizer.init(trainable)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    batch = CptBatch(tokens, tokens, tokens, jax.ShapeDtypeStruct((), jnp.float32))
    total = jax.eval_shape(step.gradients, trainable, rest, batch)

    def held(*trees):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))

    added = step.add.lower(total, total).compile().memory_analysis()
    updated = step.update.lower(trainable, state, jnp.int32(0), total).compile().memory_analysis()
    assert added.alias_size_in_bytes == held(total)
    assert updated.alias_size_in_bytes == held(trainable, state)
