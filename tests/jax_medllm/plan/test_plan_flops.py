"""The planner's operations, against closed forms and XLA's own count."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, PartitionSpec

from jax_medllm.mesh.layout import Layout
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.plan.flops import matrix_flops
from jax_medllm.plan.programs import trace
from medllm.bench.shapes import ModelShape
from medllm.config import LoraConfig
from tests.small_model import small_config

N = 2 * 8 * 8 * 8
"""Of a product of two 8 × 8 matrices."""


def counted(function, *arguments, while_trips=1):
    return matrix_flops(jax.make_jaxpr(function)(*arguments), while_trips)


def square(*leading):
    return jnp.ones((*leading, 8, 8))


def test_a_product_is_two_operations_for_each_multiply_and_add():
    assert counted(jnp.matmul, jnp.ones((5, 7)), jnp.ones((7, 3))) == 2 * 5 * 7 * 3
    assert counted(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), jnp.ones((4, 5, 7)), jnp.ones((4, 3, 7))) == 2 * 4 * 5 * 7 * 3


def test_a_scan_counts_its_body_as_often_as_it_runs():
    assert counted(lambda x, stack: jax.lax.scan(lambda x, w: (x @ w, None), x, stack), square(), square(6)) == 6 * N


def test_what_is_computed_anew_for_the_backward_pass_counts_again():
    def run(remat):
        layer = jax.checkpoint(lambda x: jnp.sin(x @ x) @ x) if remat else lambda x: jnp.sin(x @ x) @ x
        return counted(jax.grad(lambda x: layer(x).sum()), square())

    # Two forward; each has two slopes. Anew is only the first: no slope asks for the last product's value.
    assert (run(remat=False), run(remat=True)) == (6 * N, 7 * N)


def test_of_a_choice_the_branches_with_products_count_as_if_taken_equally_often():
    branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
    assert counted(lambda i, x: jax.lax.switch(i, branches, x), 1, square()) == 3 * N // 2


def test_a_loop_counts_as_often_as_the_caller_says():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    assert counted(run, square(), while_trips=5) == 5 * N


def test_what_runs_on_each_device_counts_on_each_and_no_more():
    mesh = AbstractMesh((4, 2), ("a", "b"))
    everywhere = partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    assert counted(everywhere(lambda x: x @ x), square()) == 8 * N
    # Arrays are whole along an axis that is left to the compiler.
    assert counted(everywhere(lambda x: x @ x, axis_names={"b"}), square()) == 2 * N


@pytest.mark.parametrize("sometimes", [False, True], ids=["always", "where a tile is needed"])
def test_a_kernel_counts_at_each_point_of_its_grid(sometimes):
    def kernel(x, y, out):
        def compute():
            out[...] = x[...] @ y[...]

        pl.when(pl.program_id(0) != 1)(compute) if sometimes else compute()

    def run(x, y):
        rows = pl.BlockSpec((8, 8), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        specs = {"in_specs": [rows, pl.BlockSpec((8, 8), lambda i: (0, 0))], "out_specs": rows}
        return pl.pallas_call(kernel, shape, grid=(3,), **specs, interpret=True)(x, y)

    assert counted(run, jnp.ones((24, 8)), square()) == 3 * N


def test_a_derivative_that_is_written_out_counts_once():
    @jax.custom_vjp
    def product(x):
        return x @ x

    product.defvjp(lambda x: (product(x), x), lambda x, g: (g @ x.T + x.T @ g,))
    assert counted(product, square()) == N
    assert counted(jax.grad(lambda x: product(x).sum()), square()) == 3 * N


def test_the_count_is_xlas_where_nothing_loops():
    """One layer and one block of attention, so that no loop runs twice: XLA counts bodies once. The embedding has a gradient,
    lest XLA leave out what goes back to it.

    XLA also counts what is no product, such as norms, softmax and the rotary embedding: some tens of operations for each of
    the activations' elements, where the products have hundreds (twice a width) for each.
    """
    config = small_config(num_layers=1, hidden_size=512, intermediate_size=1024, head_dim=128, vocab_size=64)
    model = nnx.eval_shape(lambda: DenseDecoder(config, lora=LoraConfig(rank=8), rngs=nnx.Rngs(0)))
    graph, lora, rest = nnx.split(model, LoraParam, ...)
    tokens = jax.ShapeDtypeStruct((1, 64), np.int32)

    def loss(lora, rest, tokens):
        model = nnx.merge(graph, lora, rest)
        return jnp.square(model.hidden(tokens, segment_ids=tokens, positions=tokens)).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(lora, rest, tokens)
    found, xla = matrix_flops(traced.jaxpr), traced.lower().compile().cost_analysis()["flops"]
    assert 0.95 * xla < found < xla


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_a_step_is_two_operations_for_each_weight_and_token_in_each_pass(remat):
    """Frozen weights have no gradient, so that there is a pass forward and one back to the activations, and with remat one
    forward again, without the last product of down_proj and of its adapter: what a layer hands on is known. The head has a
    product forward, and one for its direction.
    """
    shape = ModelShape(layers=4, width=256, mlp=704, heads=4, kv_heads=2, vocabulary=1024, rank=2)
    rows, length = 2, 128
    settings = {"quantization": "nf4", "rank": shape.rank, "rows": rows, "remat": remat, "accumulation": 1, "length": length}
    stage = trace("cpt", {**settings, "model": shape.architecture.to_hf()}, Layout.of("data=1", devices=jax.devices()[:1]))
    gradients = stage.programs[0]
    width, kv, mlp = shape.width, shape.width // 2, shape.mlp
    linear = width * (2 * width + 2 * kv) + 3 * width * mlp
    adapters = shape.rank * (6 * width + 2 * kv + 3 * (width + mlp))
    # Of one of its products, for each token: of two tiles of queries the first attends to half of the row.
    attention = length * width * 3 // 4
    again = {"none": 0, "layer": linear + adapters + 2 * attention - (width * mlp + shape.rank * width)}[remat]
    # Backward, the adapters' matrices have a slope too, and attention computes its scores again.
    a_layer = (linear + adapters + 2 * attention) + (linear + 2 * adapters + 5 * attention) + again
    head = 2 * shape.vocabulary * width
    assert matrix_flops(gradients.traced.jaxpr, gradients.while_trips) == 2 * rows * length * (shape.layers * a_layer + head)
