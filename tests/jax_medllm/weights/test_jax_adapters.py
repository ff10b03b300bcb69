"""Adapters whose layers differ in rank, in training: what fills up the stacks stays zero."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.batches import CptBatch
from jax_medllm.train.loop import cpt_loss_fn, make_step
from jax_medllm.weights.adapters import adapter_tensors
from medllm.config import LoraConfig, OptimizerConfig
from medllm.model.adapter import module_name
from tests.small_model import small_config

LORA = LoraConfig(
    rank=4,
    alpha=8.0,
    targets=("q_proj", "layers.1.mlp.down_proj"),
    rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 3},
)


@pytest.fixture
def model():
    return DenseDecoder(small_config(), lora=LORA, rngs=nnx.Rngs(0))


def stacks(model) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model, LoraParam))}


def padding(path, stack) -> np.ndarray:
    """The part of a stack that belongs to no layer's adapter."""
    ranks = [LORA.rank_of(module_name(layer, path[2])) for layer in range(len(stack))]
    parts = [layer[rank:] if path[-1] == "A" else layer[:, rank:] for layer, rank in zip(stack, ranks, strict=True)]
    return np.concatenate([part.reshape(-1) for part in parts])


def test_a_stack_is_as_wide_as_its_widest_layer_and_exports_each_layers_own_rank(model):
    shapes = {
        name.removeprefix("base_model.model.model.layers."): value.shape for name, value in adapter_tensors(model).items()
    }
    assert shapes == {
        "0.self_attn.q_proj.lora_A.weight": (2, 32),
        "0.self_attn.q_proj.lora_B.weight": (32, 2),
        "1.self_attn.q_proj.lora_A.weight": (4, 32),
        "1.self_attn.q_proj.lora_B.weight": (32, 4),
        "1.mlp.down_proj.lora_A.weight": (3, 48),
        "1.mlp.down_proj.lora_B.weight": (32, 3),
    }
    assert model.layers.self_attn.k_proj.lora is None


def test_padding_stays_exactly_zero_under_adam_with_weight_decay(model):
    config = OptimizerConfig(learning_rate=3e-2, weight_decay=0.5, warmup_ratio=0.0)
    graph, trainable, frozen = nnx.split(model, LoraParam, ...)
    step = make_step(graph, cpt_loss_fn, config, total_steps=10)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 53, (2, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    batches = [CptBatch(tokens, jnp.ones_like(tokens), positions, jnp.ones(()))]
    before = stacks(model)
    state = step.init(trainable)
    for index in range(5):
        trainable, state, _ = step(trainable, state, jnp.int32(index), frozen, batches)
    nnx.update(model, trainable)
    assert sum(padding(path, stack).size for path, stack in before.items()) == 2 * (32 + 32) + 3 * (48 + 32)
    for path, stack in stacks(model).items():
        assert not padding(path, stack).any(), path
        assert np.abs(stack - before[path]).max() > 1e-3, path
