"""Attention to keys in several places, against one softmax over all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.generate import cached_attention
from jax_medllm.generate.cached_attention import Prefilling, Stored, attend_parts
from jax_medllm.generate.cached_decoder import Decoder, Fill
from jax_medllm.model.decoder import DenseDecoder
from tests.small_model import small_config

B, S, H, K, X = 3, 5, 6, 2, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def keys_values(seed, tokens, rows=B):
    shape = (rows, K, tokens, X) if rows else (K, tokens, X)
    return normal(seed, *shape), normal(seed + 1, *shape)


def stored(keys, values):
    return Stored(jnp.asarray(keys.swapaxes(-1, -2)), jnp.asarray(values))


def one_softmax(q, parts):
    """Every query and head by itself, in numpy; ``parts`` are keys, values and what is seen."""
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(B, S, H):
        kv = h // (H // K)
        seen = [np.broadcast_to(True if mask is None else mask, (B, S, keys.shape[-2]))[b, s] for keys, _, mask in parts]
        keys = np.concatenate([(k if k.ndim == 3 else k[b])[kv][m] for (k, _, _), m in zip(parts, seen, strict=True)])
        values = np.concatenate([(v if v.ndim == 3 else v[b])[kv][m] for (_, v, _), m in zip(parts, seen, strict=True)])
        scores = keys @ q[b, s, h] / np.sqrt(X)
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights @ values / weights.sum()
    return out


def test_places_add_up_to_one_softmax_over_all_keys():
    q = 3 * normal(0, B, S, H, X)
    shared, own, recent = keys_values(1, 11, rows=0), keys_values(3, 7), keys_values(5, 4)
    sees_own = normal(7, B, S, 7) > 0
    sees_own[1, 2] = False  # a place of which a query sees nothing
    sees_recent = np.tril(np.ones((S, 4), bool))[None]
    parts = [(*shared, None), (*own, sees_own), (*recent, sees_recent)]
    with jax.enable_x64(True):
        masks = [None, jnp.asarray(sees_own), jnp.asarray(sees_recent)]
        found = attend_parts(jnp.asarray(q), [(stored(*kv), m) for kv, m in zip((shared, own, recent), masks, strict=True)])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, one_softmax(q, parts), rtol=0, atol=1e-13)


@pytest.mark.parametrize("in_flight", [1, 2 * B * H * 16, 10**9])
def test_a_prompt_read_some_queries_at_a_time_is_read_alike(monkeypatch, in_flight):
    monkeypatch.setattr(cached_attention, "_SCORES_IN_FLIGHT", in_flight)
    q, (keys, values), shared = normal(0, B, S, H, X), keys_values(1, S), keys_values(3, 11, rows=0)
    with jax.enable_x64(True):
        arrays = (jnp.asarray(part.swapaxes(1, 2)) for part in (keys, values))
        found, own = Prefilling(stored(*shared)).attend(jnp.asarray(q), *arrays)
    expected = one_softmax(q, [(*shared, None), (keys, values, np.tril(np.ones((S, S), bool))[None])])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(own.keys, keys.swapaxes(-1, -2))
    np.testing.assert_array_equal(own.values, values)


def temporary_bytes(decoder, header, own=64, prompts=4):
    """Of reading prompts behind a header of so many tokens, the header's own keys and values apart."""
    config = decoder.config
    prefix = Stored(
        jnp.zeros((config.num_layers, config.num_kv_heads, config.head_dim, header)),
        jnp.zeros((config.num_layers, config.num_kv_heads, header, config.head_dim)),
    )
    index = np.arange(prompts, dtype=np.int32)
    tokens, lengths = np.ones((prompts, own), np.int32), np.full(prompts, own, np.int32)
    fill = Fill(tokens, lengths, index, index, jax.random.split(jax.random.key(0), prompts))
    lowered = decoder._fill.lower(decoder.state, decoder.empty(prompts, own), prefix, fill)
    layer = sum(part.nbytes for part in prefix) // config.num_layers
    return lowered.compile().memory_analysis().temp_size_in_bytes - layer


def test_memory_for_reading_prompts_does_not_grow_with_the_header(monkeypatch):
    decoder = Decoder(DenseDecoder(small_config(num_heads=16, num_kv_heads=2, max_positions=8192), rngs=nnx.Rngs(0)), (0,))
    scores = 4 * 16 * 4096
    monkeypatch.setattr(cached_attention, "_SCORES_IN_FLIGHT", 2 * scores)
    short, long = (temporary_bytes(decoder, header) for header in (1024, 4032))
    assert long < 64 * scores * 4 / 8  # all scores of the longer one would take eight times as much
    assert long < short + 2**20
