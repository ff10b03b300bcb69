"""What the trajectories of both stages share: the adapter, the optimizer, the JAX loop and how two logs are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.batches import TrainingData
from jax_medllm.train.loop import LossFn, StepMetrics, make_step, train
from jax_medllm.train.optimizer import AdamState
from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.read import read_model
from medllm.config import LoraConfig, OptimizerConfig, TrainingConfig
from medllm.model.adapter import read_adapter, write_adapter
from medllm.model.directory import ModelDirectory
from medllm.run import Run
from parity_tests.jax_results import set_adapter
from parity_tests.tolerances import Tolerance

LORA = LoraConfig(rank=4, alpha=6.0, seed=5)
# Decay, a schedule that bends, and a clip that binds in some steps and not in others.
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, warmup_ratio=0.2, clip_norm=12.0)
STEPS = 20
TRAINED = ("qwen2", "qwen3", "llama 3", "mistral, window")
"""Kinds of models whose trajectories are followed."""


def train_from(
    base: Path, start: Mapping[str, np.ndarray], loss_fn: LossFn, data: TrainingData, run: Run
) -> dict[str, np.ndarray]:
    """Train in fp32, through the engine's loop, from the adapter ``start`` on; answers with the final adapter."""
    folder = run.path / "start"
    write_adapter(folder, LORA, start, str(base))
    model = read_model(ModelDirectory(base), lora=LORA, dtype=jnp.float32)
    set_adapter(model, read_adapter(folder))
    train(model, loss_fn, data, OPTIMIZER, TrainingConfig(), run, settings={})
    return adapter_tensors(model)


def jax_steps(
    model: DenseDecoder, loss_fn: LossFn, data: TrainingData
) -> Iterator[tuple[StepMetrics, dict[str, np.ndarray], AdamState]]:
    """The engine's optimizer step, one after the other: its metrics, the adapter and AdamW's state after it.

    The moments of the state are under the names of the adapter's file.
    """
    graph, trainable, rest = nnx.split(model, LoraParam, ...)
    step = make_step(graph, loss_fn, OPTIMIZER, len(data.steps))
    trainable = jax.tree.map(jnp.copy, trainable)
    state = step.init(trainable)

    def named(tree: Any) -> dict[str, np.ndarray]:
        return adapter_tensors(nnx.merge(graph, tree, rest))

    for index, planned in enumerate(data.steps):
        batches = jax.tree.map(jnp.asarray, data.batches(planned))
        trainable, state, metrics = step(trainable, state, jnp.int32(index), rest, batches)
        (adam,) = (part for part in state if isinstance(part, AdamState))
        yield metrics, named(trainable), AdamState(int(adam.count), named(adam.mu), named(adam.nu))


def check_tensors(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: Tolerance, what: str = "") -> None:
    """Every tensor of an adapter, or of a moment."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        tolerance.assert_close(value, expected[name], f"{what} {name}".strip())


def check_log(
    found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], tolerance: Tolerance, names: Sequence[str]
) -> None:
    """Every logged number of every step."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for name in names:
        tolerance.assert_close([line[name] for line in found], [line[name] for line in expected], name)
