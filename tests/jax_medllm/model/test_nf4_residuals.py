"""Between the passes a quantized model keeps packed weights, never dense ones, and its gradients are the dense model's.

What is kept is read off the backward function that ``jax.vjp`` returns: its leaves are the residuals. They are traced, not
computed, so it takes no numbers to see them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model import linear
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.linear import Linear, PackedParam, matmul, nf4_matmul
from jax_medllm.model.quantized_weight import KINDS, QuantizedWeight
from jax_medllm.train.batches import CptBatch
from jax_medllm.train.loop import cpt_loss_fn
from jax_medllm.weights.adapters import assign, variables
from medllm.axes import Axis
from medllm.config import LoraConfig, RematPolicy
from medllm.quantization import Quantization
from tests.small_model import small_config

# No activation of seven tokens has as many numbers as a weight, nor has the embedding.
CONFIG = small_config(hidden_size=64, intermediate_size=128, num_layers=3, head_dim=16)
TOKENS = jnp.arange(1, 8)[None]
LORA = LoraConfig(rank=4, alpha=8.0)


def naive_matmul(x: jax.Array, weight: QuantizedWeight, axes: Any = None) -> jax.Array:
    """Without the custom derivative: the dense weight is a residual."""
    return matmul(x, weight.dequantize(x.dtype))


def dense_residuals(function: Any, trained: Any, rest: Any, sizes: set[int]) -> list[str]:
    """The residuals of ``function(trained, rest)`` that could be a dequantized weight: floating, and of its size."""

    def backward(trained: Any, rest: Any) -> Any:
        return jax.vjp(lambda given: function(given, rest), trained)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, trained, rest))
    assert leaves
    return [str(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size in sizes]


def dense_sizes(module: Any) -> set[int]:
    """How many numbers the dequantized weights of ``module`` have, or half of them: of one layer, and of the stack."""
    stacks = [part for path, part in nnx.to_flat_state(nnx.state(module, PackedParam)) if path[-1] == "packed"]
    assert stacks
    return {share * stack.size // layers for stack in stacks for layers in (1, stack.shape[0]) for share in (1, 2)}


def abstract_model(dtype: Any, quantization: Quantization = "nf4") -> DenseDecoder:
    return nnx.eval_shape(lambda: DenseDecoder(CONFIG, lora=LORA, quantization=quantization, dtype=dtype, rngs=nnx.Rngs(0)))


def loss_of(model: DenseDecoder, remat: RematPolicy = "none") -> tuple[Any, Any, Any]:
    """The training loss as a function of the adapter and the rest of the model, and those two."""
    graph, trained, rest = nnx.split(model, LoraParam, ...)
    batch = CptBatch(TOKENS, jnp.ones_like(TOKENS), jnp.arange(7)[None], jnp.asarray(1 / 6))

    def loss(trained: Any, rest: Any) -> jax.Array:
        return cpt_loss_fn(nnx.merge(graph, trained, rest), batch, remat=remat)[0]

    return loss, trained, rest


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_with_a_packed_weight_keeps_no_dense_one(dtype, kind):
    given = jax.ShapeDtypeStruct((5, 192), dtype), kind.shapes(128, 192)
    assert dense_residuals(nf4_matmul, *given, sizes={128 * 192, 128 * 96}) == []
    assert len(dense_residuals(naive_matmul, *given, sizes={128 * 192, 128 * 96})) == 1


def test_a_linear_layer_with_adapters_keeps_no_dense_weight(monkeypatch):
    axes = Axis("layers", 1), Axis("mlp", 128), Axis("embed", 192)
    settings = {"frozen_loras": (LORA,), "reference": True, "quantization": "nf4", "dtype": jnp.dtype(jnp.float32)}
    layer = nnx.eval_shape(lambda: Linear("up_proj", *axes, bias=True, lora=LORA, rngs=nnx.Rngs(0), **settings))
    graph, trained, rest = nnx.split(layer, LoraParam, ...)

    def apply(given: Any, rest: Any) -> jax.Array:
        trained, x = given
        return nnx.merge(graph, *jax.tree.map(lambda array: array[0], (trained, rest)))(x)

    given = (trained, jax.ShapeDtypeStruct((5, 192), jnp.float32)), rest
    assert dense_residuals(apply, *given, sizes=dense_sizes(layer)) == []
    monkeypatch.setattr(linear, "nf4_matmul", naive_matmul)
    assert len(dense_residuals(apply, *given, sizes=dense_sizes(layer))) == 1


@pytest.mark.parametrize("remat", get_args(RematPolicy))
@pytest.mark.parametrize(("dtype", "quantization"), [(jnp.float32, "nf4"), (jnp.bfloat16, "nf4"), (jnp.bfloat16, "nf4-single")])
def test_the_training_loss_keeps_no_dense_weight(dtype, quantization, remat):
    model = abstract_model(dtype, quantization)
    assert dense_residuals(*loss_of(model, remat), sizes=dense_sizes(model)) == []


@pytest.mark.parametrize("remat", get_args(RematPolicy))
def test_of_layers_that_are_dense_among_packed_ones_nothing_is_kept_but_what_is_held(remat):
    def build() -> DenseDecoder:
        dense = {"down_proj": (1,), "o_proj": (0, 2)}
        return DenseDecoder(CONFIG, lora=LORA, quantization="nf4", dense=dense, dtype=jnp.float32, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    kept = dense_residuals(*loss_of(model, remat), sizes=dense_sizes(model))
    assert sorted(kept) == [str(jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in ((1, 64, 128), (2, 64, 64))]


def test_the_check_finds_the_stack_of_each_kind_of_weight_without_the_custom_derivative(monkeypatch):
    monkeypatch.setattr(linear, "nf4_matmul", naive_matmul)
    model = abstract_model(jnp.float32)
    assert len(dense_residuals(*loss_of(model), sizes=dense_sizes(model))) == 7


@partial(jax.jit, static_argnums=(0, 1))
def random_states(
    dtype: str, quantization: Quantization
) -> tuple[tuple[nnx.GraphDef, nnx.State], tuple[nnx.GraphDef, nnx.State]]:
    """A quantized model with B random, so that every gradient is there, and the dense one its codes stand for."""

    def build(quantization: Any) -> DenseDecoder:
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # a generator that is quick to compile
        return DenseDecoder(CONFIG, lora=LORA, quantization=quantization, dtype=jnp.dtype(dtype), rngs=rngs)

    model, dense = build(quantization), build("none")
    held = {path: variable[...] for path, variable in variables(model).items()}
    for number, (path, value) in enumerate(held.items()):
        if path[-1] == "B":
            held[path] = 0.1 * jax.random.normal(jax.random.key(number, impl="rbg"), value.shape, value.dtype)
    assign(model, held)
    for path in list(held):
        if path[-1] == "packed":
            kind = KINDS[quantization]
            parts = kind(**{name: held.pop((*path[:-1], name)) for name in kind.parts})
            held[(*path[:-2], "weight")] = jax.vmap(partial(kind.dequantize, dtype=model.dtype))(parts)
    assert held.keys() == variables(dense).keys()
    assign(dense, held)
    return nnx.split(model), nnx.split(dense)


@pytest.mark.parametrize(
    ("dtype", "bound", "remat", "quantization"),
    [
        ("float64", 1e-10, "none", "nf4"),
        ("float64", 1e-10, "layer", "nf4"),
        ("float64", 1e-10, "layer", "nf4-single"),
        ("float32", 1e-5, "none", "nf4"),
        ("bfloat16", 2e-2, "none", "nf4"),
    ],
)
def test_gradients_are_those_of_the_dense_model_with_the_dequantized_weights(dtype, bound, remat, quantization):
    with jax.enable_x64(dtype == "float64"):
        results = []
        for split in random_states(dtype, quantization):
            loss, trained, rest = loss_of(nnx.merge(*split), remat)
            results.append(jax.jit(jax.value_and_grad(loss))(trained, rest))
        (loss, found), (expected_loss, expected) = results
        np.testing.assert_allclose(loss, expected_loss, rtol=bound)
        leaves = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
        assert len(leaves) == 7 * 2
        for gradient, wanted in leaves:
            assert np.abs(wanted).max() > 0
            assert np.abs(gradient - wanted).max() <= bound * np.abs(wanted).max()
