"""Codes turned round for a TPU's products are the same codes, in the same place, and there once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.linear import PackedParam
from jax_medllm.train.batches import CptBatch
from jax_medllm.train.loop import cpt_loss_fn, make_gradients
from jax_medllm.weights.code_layout import lay_codes
from medllm.config import LoraConfig
from tests.small_model import small_config

# 128 outputs of q and o and of down, 64 of k and v, 192 of gate and up: whole tiles of 128 lanes, half of one, one and a half.
CONFIG = small_config(hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=32)
WHOLE_TILES = {"q_proj", "o_proj", "down_proj"}
TURNED, AS_READ = (0, 2, 1), (0, 1, 2)


def a_model() -> DenseDecoder:
    return DenseDecoder(CONFIG, lora=LoraConfig(rank=4), quantization="nf4", dtype="float32", rngs=nnx.Rngs(0))


def codes(model: DenseDecoder) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(model, PackedParam))
    return {path[-3]: variable.get_value() for path, variable in state if path[-1] == "packed"}


def order(array: jax.Array) -> tuple[int, ...]:
    return tuple(array.format.layout.major_to_minor)


def test_codes_that_fill_tiles_are_turned_round_in_place():
    model = a_model()
    before = codes(model)
    values = {name: np.array(array) for name, array in before.items()}
    lay_codes(model, "tpu")
    after = codes(model)
    assert {name: order(array) for name, array in after.items()} == {
        name: TURNED if name in WHOLE_TILES else AS_READ for name in after
    }
    for name, array in after.items():
        np.testing.assert_array_equal(np.asarray(array), values[name])
        assert before[name].is_deleted() == (name in WHOLE_TILES), "a stack is in memory once"


def test_devices_without_tiles_keep_codes_as_they_are_read():
    model = a_model()
    before = codes(model)
    lay_codes(model)
    assert all(codes(model)[name] is array for name, array in before.items())


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_gradients_are_the_same_and_the_program_takes_the_codes_as_they_lie(remat):
    tokens = jnp.arange(1, 9)[None]
    batch = CptBatch(tokens, jnp.ones_like(tokens), jnp.arange(8)[None], jnp.float32(1.0))

    def computed(model: DenseDecoder):
        graph, trainable, frozen = nnx.split(model, LoraParam, ...)
        # B is zero at first, and with it the gradient of A.
        trainable = jax.tree.map(lambda matrix: matrix + 0.01, trainable)
        arguments = (trainable, frozen, batch)
        program = make_gradients(graph, partial(cpt_loss_fn, remat=remat)).lower(*arguments).compile()
        orders = {tuple(leaf.layout.major_to_minor) for leaf in jax.tree.leaves(program.input_formats[0][1])}
        return *program(*arguments), orders

    straight, (expected,), orders = computed(a_model())
    assert TURNED not in orders
    turned = a_model()
    lay_codes(turned, "tpu")
    gradients, (loss,), orders = computed(turned)
    assert TURNED in orders
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(straight), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7 * float(jnp.abs(other).max()) + 1e-12)
