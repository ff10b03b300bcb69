"""Chunked log-probabilities against log_softmax, and shared prompts against one row a response."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.batches import pad_responses
from jax_medllm.logprobs import response_logprobs, token_logprobs
from jax_medllm.model import LoraParam, Qwen2
from medllm.config import LoraConfig
from tests.small_model import small_config

SMALL = small_config(tie_embeddings=False, max_positions=64)


def arrays(dtype, batch=2, length=7, width=5, vocab=11):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((batch, length, width)), dtype)
    head = jnp.asarray(random.standard_normal((vocab, width)), dtype)
    return hidden, head, jnp.asarray(random.integers(0, vocab, (batch, length)))


def plain(hidden, head, targets):
    logits = jnp.einsum("bsd,vd->bsv", hidden, head)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("in_flight", [1, 30, 70, 10**6])
def test_equals_log_softmax_with_its_gradient_whatever_the_chunk(in_flight):
    with jax.enable_x64(True):
        hidden, head, targets = arrays(jnp.float64)
        weight = jnp.asarray(np.random.default_rng(1).standard_normal(targets.shape))
        got, pull = jax.vjp(lambda h: token_logprobs(h, head, targets, in_flight), hidden)
        expected, pull_plain = jax.vjp(lambda h: plain(h, head, targets), hidden)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(token_logprobs(hidden, head, targets, in_flight), expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(pull(weight)[0], pull_plain(weight)[0], rtol=0, atol=1e-13)


def test_bfloat16_states_give_fp32_logprobs_and_a_bfloat16_gradient():
    hidden, head, targets = arrays(jnp.bfloat16)
    value, pull = jax.vjp(lambda h: token_logprobs(h, head, targets), hidden)
    exact = plain(hidden.astype(jnp.float32), head.astype(jnp.float32), targets)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, atol=1e-5)
    assert pull(jnp.ones_like(value))[0].dtype == jnp.bfloat16


def test_extreme_scores_neither_overflow_nor_lose_the_gradient():
    hidden, head, targets = arrays(jnp.float32)
    value, gradient = jax.value_and_grad(lambda h: token_logprobs(h, 1e4 * head, targets).sum())(hidden)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(gradient)).all()


def test_memory_for_logits_does_not_grow_with_the_sequence():
    vocab, width, in_flight = 4096, 4, 2**14
    sizes = []
    for length in (64, 512):
        shapes = (
            jax.ShapeDtypeStruct((1, length, width), jnp.float32),
            jax.ShapeDtypeStruct((vocab, width), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
        )
        grad = jax.jit(jax.grad(lambda h, w, t: token_logprobs(h, w, t, in_flight).sum()))
        sizes.append(grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 512 * vocab * 4 / 4  # far below the logits of the longer sequence
    assert sizes[1] - sizes[0] < 64 * (512 - 64) * width


def model_with_adapter(dtype):
    model = Qwen2(SMALL, lora=LoraConfig(rank=4, alpha=8), dtype=dtype, rngs=nnx.Rngs(0))
    state = nnx.state(model, LoraParam)
    noise = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape, leaf.dtype), state)
    nnx.update(model, noise)
    return model


@pytest.mark.parametrize("adapter", [True, False])
def test_a_shared_prompt_gives_each_response_the_logprobs_of_a_row_of_its_own(adapter):
    groups = [((5, 6, 7), [(8, 9), (10, 11, 12, 13), (14,)]), ((1, 2, 3, 4, 5), [(20, 21, 22), (23,)])]
    with jax.enable_x64(True):
        model = model_with_adapter(jnp.float64)
        shared = response_logprobs(model, pad_responses(groups, 3, 8, 3, 5), adapter=adapter).reshape(3, 3, 5)
        for row, (prompt, responses) in enumerate(groups):
            for column, response in enumerate(responses):
                tokens = jnp.asarray([prompt + response])
                ones = jnp.ones_like(tokens)
                hidden = model.hidden(tokens, segment_ids=ones, positions=jnp.arange(tokens.shape[1])[None], adapter=adapter)
                alone = plain(hidden[:, :-1], model.head_weight(), tokens[:, 1:])[0, len(prompt) - 1 :]
                np.testing.assert_allclose(shared[row, column, : len(response)], alone, atol=1e-12)
        assert np.isfinite(np.asarray(shared)).all()
