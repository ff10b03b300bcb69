"""The annotations of public functions are checked where these are called: what is wrong there, and what is right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jax_medllm.model.attention import Visibility, attend
from jax_medllm.model.linear import matmul
from jax_medllm.model.logprobs import token_logprobs
from jax_medllm.model.quantized_weight import NF4Weight
from jax_medllm.train.batches import CptBatch, target_mask
from jax_medllm.train.losses import dpo_loss
from medllm.corpus.packing import PackedRows
from medllm.report.statistics import score_interval

ROW = np.ones((2, 4), np.int32)
WRONG = {
    "lengths of q and v": lambda: attend(*(jnp.ones((1, s, 2, 8)) for s in (4, 4, 3)), Visibility(jnp.ones((1, 4), jnp.int32))),
    "targets of another length": lambda: token_logprobs(jnp.ones((1, 4, 8)), jnp.ones((9, 8)), jnp.ones((1, 3), jnp.int32)),
    "targets that are no integers": lambda: token_logprobs(jnp.ones((1, 4, 8)), jnp.ones((9, 8)), jnp.ones((1, 4))),
    "a weight the other way round": lambda: matmul(jnp.ones((3, 8)), jnp.ones((8, 5))),
    "pairs without their axis": lambda: dpo_loss(jnp.ones(4), jnp.ones(4), jnp.ones(4), beta=0.1),
    "a weight to pack with three axes": lambda: NF4Weight.quantize(jnp.ones((2, 64, 64))),
    "segments of one row": lambda: target_mask(ROW[0]),
    "rows and segments that differ": lambda: CptBatch(ROW, ROW[:1], ROW, np.asarray(1.0)),
    "packed rows of floats": lambda: PackedRows(ROW.astype(np.float32), ROW, ROW),
    "points of other problems": lambda: score_interval(np.ones(3, bool), np.ones(4)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_an_error_at_the_function_that_gets_it(call):
    with pytest.raises(TypeCheckError, match="Type-check error whilst checking the parameters of"):
        call()


def test_a_wrong_shape_is_an_error_when_it_is_traced_too():
    with pytest.raises(TypeCheckError, match=r"jax_medllm\.model\.linear\.matmul"):
        jax.jit(matmul)(jnp.ones((3, 8)), jnp.ones((8, 5)))


def test_what_jax_makes_of_a_pytree_is_not_held_to_the_shapes_of_its_fields():
    batch = CptBatch(ROW, ROW, ROW, np.asarray(0.5))
    assert jax.tree.map(lambda _: "anything", batch).tokens == "anything"
    assert jax.vmap(lambda rows: rows.tokens.sum())(jax.tree.map(lambda array: jnp.stack([array] * 3), batch)).shape == (3,)
