"""The device never waits for the host: batches ahead of time, metrics a step late, memory given back."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train import log as log_module
from jax_medllm.train.batches import CptBatch, CptData, cpt_step, plan_steps
from jax_medllm.train.log import StepMetrics, TrainingLog
from jax_medllm.train.loop import CptMetrics, cpt_loss_fn, make_step, train
from medllm.config import LoraConfig, OptimizerConfig, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.run import Run
from tests.small_model import small_config

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def small_model():
    return DenseDecoder(small_config(), lora=LoraConfig(rank=4), rngs=nnx.Rngs(0))


def rows(count=6, length=16):
    tokens = np.random.default_rng(0).integers(1, 53, (count, length)).astype(np.int32)
    return PackedRows(tokens, np.ones_like(tokens), np.tile(np.arange(length, dtype=np.int32), (count, 1)))


class Data(CptData):
    """Six rows; ``weigh`` says how many units a step has, ``lay_out`` is told before its arrays are made."""

    def __init__(self, config, weigh=lambda step: 1, lay_out=lambda step: None):
        super().__init__(rows(), plan_steps(6, config))
        self.__dict__.update(weigh=weigh, lay_out=lay_out)

    def units(self, step):
        return self.weigh(step)

    def batches(self, step):
        self.lay_out(step)
        return cpt_step(self.rows, step)


def trained(folder, config, data=None, loss_fn=cpt_loss_fn):
    run = folder if isinstance(folder, Run) else Run(folder / "run", config)
    return train(small_model(), loss_fn, data or Data(config), OPTIMIZER, config, run, settings={})


@pytest.mark.parametrize(("log_every", "lines"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (9, [6])])
def test_a_line_is_written_when_the_step_after_it_is_under_way(tmp_path, log_every, lines):
    begun = [threading.Event() for _ in range(6)]
    steps = iter(begun)

    def loss(model, batch):
        jax.debug.callback(lambda: next(steps).set())
        return cpt_loss_fn(model, batch)

    class Watched(Run):
        def log(self, step, **metrics):
            assert all(event.wait(20) for event in begun[: step + 1]), f"step {step + 1} waits for the line of step {step}"
            super().log(step, **metrics)

    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1, log_every=log_every)
    run = Watched(tmp_path / "run", config)
    trained(run, config, loss_fn=loss)
    assert [line["step"] for line in run.metrics()] == lines


@pytest.mark.parametrize("log_every", [1, 4, 9])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_rate_counts_the_steps_after_the_first_or_the_only_one(tmp_path, log_every, steps):
    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1, log_every=log_every, max_steps=steps)
    first = plan_steps(6, config)[0]
    found = trained(tmp_path, config, Data(config, weigh=lambda step: 10**12 if step == first else 1))
    assert (found.rate > 10**9) == (steps == 1)
    assert found.rate > 0


def test_the_rate_leaves_out_the_time_of_the_first_step_and_all_compilation(tmp_path, monkeypatch):
    now, compiled = [100.0], [0.0]
    monkeypatch.setattr(log_module, "working_seconds", lambda: now[0] - compiled[0])
    data = Data(TrainingConfig(epochs=1, batch_size=1, accumulation=1), weigh=lambda step: 10)
    log = TrainingLog(Run(tmp_path / "run", TrainingConfig()), data, SimpleNamespace(taken=lambda: None))
    for step, (seconds, compiling) in enumerate([(50.0, 20.0), (2.0, 0.0), (9.0, 7.0)], 1):
        now[0] += seconds
        compiled[0] += compiling
        log.add(step, StepMetrics(CptMetrics(1.0), 1.0, 1.0), data.steps[step - 1])
        log.end_line()
        log.write()
    assert log.rate == pytest.approx(20 / 4)


def test_compilation_is_in_the_seconds_of_a_run_and_not_in_its_rate(tmp_path):
    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    compiling = 3.0

    def loss(model, batch):
        time.sleep(compiling)  # while the step is traced
        return cpt_loss_fn(model, batch)

    found = trained(tmp_path, config, Data(config, weigh=lambda step: 1), loss)
    assert compiling < found.compile_seconds < found.seconds
    assert found.rate > 5 / (found.seconds - compiling)


def test_steps_are_laid_out_in_other_threads_before_they_are_needed(tmp_path):
    laid_out, threads = [], set()
    enough = threading.Event()

    def lay_out(step):
        threads.add(threading.current_thread())
        laid_out.append(step)
        if len(laid_out) >= 4:
            enough.set()

    def loss(model, batch):
        # Traced when the first step is compiled, before any step is done.
        assert enough.wait(20)
        return cpt_loss_fn(model, batch)

    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    data = Data(config, lay_out=lay_out)
    trained(tmp_path, config, data, loss)
    assert threading.main_thread() not in threads
    assert sorted(laid_out) == sorted(data.steps)


def test_an_error_in_the_data_reaches_the_user(tmp_path):
    def lay_out(step):
        raise ValueError("a row that cannot be laid out")

    config = TrainingConfig(epochs=1, batch_size=1, accumulation=1)
    with pytest.raises(ValueError, match="cannot be laid out"):
        trained(tmp_path, config, Data(config, lay_out=lay_out))


def test_gradient_sums_and_the_optimizers_state_are_updated_in_place():
    graph, trainable, rest = nnx.split(small_model(), LoraParam, ...)
    step = make_step(graph, cpt_loss_fn, OPTIMIZER, total_steps=10)
    state = step.init(trainable)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    batch = CptBatch(tokens, tokens, tokens, jax.ShapeDtypeStruct((), jnp.float32))
    total = jax.eval_shape(step.gradients, trainable, rest, batch)

    def held(*trees):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))

    added = step.add.lower(total, total).compile().memory_analysis()
    updated = step.update.lower(trainable, state, jnp.int32(0), total).compile().memory_analysis()
    assert added.alias_size_in_bytes == held(total)
    assert updated.alias_size_in_bytes == held(trainable, state)
