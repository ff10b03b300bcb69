"""What each policy keeps of a layer: the same numbers from all, less memory from one to the next."""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.auto_remat import fitting_policy
from jax_medllm.train.batches import CptBatch, PreferenceData
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn
from medllm.config import LoraConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.preferences.tokenization import TokenizedGroup
from tests.small_model import small_config

POLICIES = get_args(RematPolicy)
GROUPS = [
    TokenizedGroup("two pairs", (3, 4, 5, 6), ((7, 8, 9), (10, 11), (12,)), (2, 1, 0), ((0, 1), (0, 2)), (0, 0)),
    TokenizedGroup("one pair", (3, 4), ((7, 8, 9, 10, 11), (10,)), (2, 0), ((0, 1),), (0,)),
]


def gradient_of(loss_fn, model, batch):
    graph, trainable, rest = nnx.split(model, LoraParam, ...)
    return jax.jit(jax.value_and_grad(lambda lora: loss_fn(nnx.merge(graph, lora, rest), batch)[0]))(trainable)


@pytest.fixture(scope="module")
def results():
    """Loss and gradients of preference training under every policy, in float64."""
    with jax.enable_x64(True):
        model = DenseDecoder(small_config(), lora=LoraConfig(rank=4, alpha=8), dtype=jnp.float64, rngs=nnx.Rngs(0))
        state = nnx.state(model, LoraParam)
        nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), state))
        data = PreferenceData(GROUPS, TrainingConfig(epochs=1, batch_size=2, accumulation=1))
        (batch,) = jax.tree.map(jnp.asarray, data.batches(data.steps[0]))
        loss = partial(preference_loss_fn, loss_config=PreferenceLoss(beta=0.3, alpha=2.0))
        return {policy: gradient_of(partial(loss, remat=policy), model, batch) for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_every_policy_gives_the_loss_and_gradients_of_keeping_everything(results, policy):
    expected_loss, expected = results["none"]
    loss, gradients = results[policy]
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-14)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.slow
def test_every_policy_keeps_less_than_the_one_before():
    """In Qwen2.5's proportions: the MLP three and a half times as wide as the model, fewer key/value heads than heads."""
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    batch = CptBatch(tokens, tokens, tokens, jax.ShapeDtypeStruct((), jnp.float32))

    def temporary(policy, layers):
        config = small_config(
            hidden_size=128, intermediate_size=448, num_layers=layers, num_heads=2, num_kv_heads=1, head_dim=64, vocab_size=64
        )
        model = nnx.eval_shape(lambda: DenseDecoder(config, lora=LoraConfig(rank=4), quantization="nf4", rngs=nnx.Rngs(0)))
        graph, trainable, rest = nnx.split(model, LoraParam, ...)

        def loss(lora, rest, batch):
            return cpt_loss_fn(nnx.merge(graph, lora, rest), batch, remat=policy)[0]

        return jax.jit(jax.grad(loss)).lower(trainable, rest, batch).compile().memory_analysis().temp_size_in_bytes

    # What eight more layers keep; what one layer needs while it is computed is in both.
    found = [temporary(policy, 16) - temporary(policy, 8) for policy in POLICIES]
    # fp32 bytes a position of the results each policy gives up: q, k, v and o, what attention gives and a log-sum-exp a head.
    mlp, attention = 2 * 448, 128 + 2 * 64 + 128 + 128 + 2
    position = 4 * 256 * 8
    assert found[0] > found[1]
    assert found[1] - found[2] == pytest.approx(mlp * position, rel=0.01)
    assert found[2] - found[3] == pytest.approx(attention * position, rel=0.01)


def test_auto_takes_the_first_policy_that_fits():
    """Limits between what two policies need, counted here from the compiled steps themselves."""
    config = small_config(num_layers=8, intermediate_size=448)
    model = DenseDecoder(config, lora=LoraConfig(rank=4), rngs=nnx.Rngs(0))
    tokens = jnp.ones((2, 128), jnp.int32)
    batch = CptBatch(tokens, tokens, jnp.broadcast_to(jnp.arange(128), (2, 128)), jnp.float32(1))
    graph, trainable, rest = nnx.split(model, LoraParam, ...)
    arguments = sum(leaf.nbytes for leaf in jax.tree.leaves((trainable, rest, batch)))
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))

    def needed(policy):
        def gradients(lora):
            return jax.value_and_grad(lambda lora: cpt_loss_fn(nnx.merge(graph, lora, rest), batch, remat=policy)[0])(lora)

        memory = jax.jit(gradients).lower(trainable).compile().memory_analysis()
        return arguments + memory.temp_size_in_bytes + adapter + 2 * adapter

    needs = [needed(policy) for policy in POLICIES]
    assert needs == sorted(needs, reverse=True)
    for policy, own, more in zip(POLICIES[1:], needs[1:], needs, strict=False):
        between = (own + more) / 2
        assert fitting_policy(model, cpt_loss_fn, batch, accumulates=False, limit=between) == policy
    assert fitting_policy(model, cpt_loss_fn, batch, accumulates=False, limit=2 * needs[0]) == "none"
    assert fitting_policy(model, cpt_loss_fn, batch, accumulates=False, limit=0) == "layer"
