"""Chunked log-probabilities against log_softmax, and shared prompts against one row a response."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model import logprobs
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.logprobs import response_logprobs, token_logprobs
from jax_medllm.model.rows import response_rows
from medllm.config import LoraConfig
from tests.forced_devices import found_on_eight
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


@pytest.mark.parametrize("in_flight", [1, 4, 6, 1000])
def test_equals_log_softmax_with_its_gradient_whatever_the_chunk(in_flight):
    with jax.enable_x64(True):
        hidden, head, targets = arrays(jnp.float64)
        weight = jnp.asarray(np.random.default_rng(1).standard_normal(targets.shape))
        got, pull = jax.vjp(lambda h: token_logprobs(h, head, targets, in_flight=in_flight), hidden)
        expected, pull_plain = jax.vjp(lambda h: plain(h, head, targets), hidden)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(token_logprobs(hidden, head, targets, in_flight=in_flight), expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(pull(weight)[0], pull_plain(weight)[0], rtol=0, atol=1e-13)


def test_positions_that_do_not_count_are_zero_and_have_no_gradient():
    with jax.enable_x64(True):
        hidden, head, targets = arrays(jnp.float64)
        counted = np.array([[1, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]])
        got, pull = jax.vjp(lambda h: token_logprobs(h, head, targets, jnp.asarray(counted), in_flight=4), hidden)
        expected, pull_plain = jax.vjp(lambda h: plain(h, head, targets), hidden)
        np.testing.assert_allclose(got, counted * expected, rtol=0, atol=1e-13)
        weight = jnp.ones_like(got)
        np.testing.assert_allclose(pull(weight)[0], pull_plain(weight * counted)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("last", "computed"), [(0, 0), (1, 2), (2, 2), (3, 4), (7, 7)])
def test_positions_after_the_last_that_counts_are_not_computed(last, computed):
    hidden, head, targets = arrays(jnp.float32)
    counted = jnp.zeros(targets.shape, jnp.int32).at[1, :last].set(1)
    looked_at = []

    def watched(logits):
        jax.debug.callback(lambda part: looked_at.append(part.shape), logits)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        inner = logprobs._logits
        patch.setattr(logprobs, "_logits", lambda *given: watched(inner(*given)))
        token_logprobs(hidden, head, targets, counted, in_flight=4)
        jax.effects_barrier()
    # Chunks of two positions of both rows; the last one begins earlier rather than reach beyond the row.
    assert looked_at == [(2, 1, 2, 11)] * -(-computed // 2)


def test_a_head_that_is_trained_is_refused():
    hidden, head, targets = arrays(jnp.float32)
    with pytest.raises(TypeError, match="no gradient for the head"):
        jax.grad(lambda w: token_logprobs(hidden, w, targets).sum())(head)


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.bfloat16, "DEFAULT"), (jnp.float32, "HIGHEST")])
def test_products_take_one_pass_in_bfloat16_and_are_exact_in_fp32(dtype, precision):
    hidden, head, targets = arrays(dtype)
    text = str(jax.make_jaxpr(lambda h: jax.vjp(lambda h: token_logprobs(h, head, targets), h)[0])(hidden))
    products = text.split("dot_general[")[1:]
    assert len(products) == 2
    for product in products:
        assert f"precision=(Precision.{precision}, Precision.{precision})" in product
        assert "preferred_element_type=float32" in product


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


def temporary_bytes(length, vocab, width=8, in_flight=64):
    shapes = (
        jax.ShapeDtypeStruct((1, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    grad = jax.jit(jax.grad(lambda h, w, t: token_logprobs(h, w, t, t, in_flight=in_flight).sum()))
    return grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_temporary_memory_is_one_chunk_of_logits_whatever_the_length_and_the_vocabulary(monkeypatch):
    vocab, in_flight = 4096, 64
    chunk = 4 * in_flight * vocab
    assert temporary_bytes(256, vocab) < 1.1 * chunk
    assert temporary_bytes(2048, vocab) < 1.1 * chunk
    monkeypatch.setattr(logprobs, "_LOGITS_IN_FLIGHT", in_flight * vocab)
    assert temporary_bytes(2048, 4 * vocab) < 1.1 * chunk


@pytest.fixture(scope="module")
def sharded():
    """What :mod:`tests.sharded_logprobs` found on eight devices."""
    return found_on_eight("tests.sharded_logprobs")


@pytest.mark.parametrize("mesh", ["vocab=8", "batch=2,vocab=4"])
def test_a_head_sharded_over_the_vocabulary_gives_the_same_values_and_gradients(sharded, mesh):
    found = sharded[mesh]
    assert found["largest"] > 1
    assert found["value_error"] < 2e-6 * found["largest"]
    assert found["gradient_error"] < 2e-6 * found["largest"]


@pytest.mark.parametrize("mesh", ["vocab=8", "batch=2,vocab=4"])
def test_a_sharded_head_is_never_gathered_and_only_sums_of_tokens_cross_the_mesh(sharded, mesh):
    kinds = {kind for kind, _ in sharded[mesh]["collectives"]}
    assert kinds == {"all-reduce"}
    most = sharded[mesh]["chunk_positions"] * sharded[mesh]["width"]
    assert max(size for _, size in sharded[mesh]["collectives"]) <= most


def model_with_adapter(dtype):
    model = DenseDecoder(SMALL, lora=LoraConfig(rank=4, alpha=8), dtype=dtype, rngs=nnx.Rngs(0))
    state = nnx.state(model, LoraParam)
    noise = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape, leaf.dtype), state)
    nnx.update(model, noise)
    return model


@pytest.mark.parametrize("adapter", [True, False])
def test_a_shared_prompt_gives_each_response_the_logprobs_of_a_row_of_its_own(adapter):
    groups = [((5, 6, 7), [(8, 9), (10, 11, 12, 13), (14,)]), ((1, 2, 3, 4, 5), [(20, 21, 22), (23,)])]
    with jax.enable_x64(True):
        model = model_with_adapter(jnp.float64)
        batch = jax.tree.map(jnp.asarray, response_rows(groups, 3, 13))
        shared = response_logprobs(model, batch, adapter=adapter)
        hidden_of = jax.jit(model.hidden, static_argnames="adapter")
        for row, (prompt, responses) in enumerate(groups):
            for column, response in enumerate(responses):
                text = prompt + response
                tokens = jnp.asarray([text + (0,) * (10 - len(text))])
                inside = jnp.arange(10)[None] < len(text)
                positions = jnp.arange(10)[None]
                hidden = hidden_of(tokens, segment_ids=inside.astype(int), positions=positions, adapter=adapter)
                alone = plain(hidden[:, :-1], model.head_weight(), tokens[:, 1:])[0, len(prompt) - 1 : len(text) - 1]
                np.testing.assert_allclose(shared[row][batch.responses[row] == column], alone, atol=1e-12)
        assert np.isfinite(np.asarray(shared)).all()
