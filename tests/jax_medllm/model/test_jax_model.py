"""The JAX model by itself: sizes, decoding, shared prompts, the adapter switch, compile size, memory between passes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.generate.cached_decoder import CHUNK, Decoder, Fill
from jax_medllm.model.decoder import DenseDecoder, LoraParam, PackedParam
from jax_medllm.model.linear import LoraScaling, adapted_matmul, nf4_matmul
from jax_medllm.model.quantized_weight import NF4Weight
from medllm.architecture import Architecture
from medllm.config import LoraConfig, Sampling
from tests.medllm.test_architecture import hf_config
from tests.small_model import small_config

TINY = small_config(
    vocab_size=97, hidden_size=64, intermediate_size=128, num_layers=3, head_dim=16, tie_embeddings=False, max_positions=64
)
# name: width, mlp, layers, heads, kv heads, vocabulary, tied, parameters published on the model's page
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True, 494_032_768),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True, 1_543_714_304),
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3_085_938_688),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 7_615_616_512),
    "14B": (5120, 13824, 48, 40, 8, 152064, False, 14_770_033_664),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 32_763_876_352),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 72_706_203_648),
}


@cache
def build(**settings) -> DenseDecoder:
    """A random model with random biases, and random B where it has an adapter. Its generator is quick to compile."""

    @jax.jit
    def initial() -> tuple[nnx.GraphDef, nnx.State]:
        model = DenseDecoder(TINY, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")), **settings)
        for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
            if path[-1] in ("bias", "B"):
                variable = variable.replace(0.3 * jax.random.normal(jax.random.key(number, impl="rbg"), variable.shape))
                nnx.update(model, nnx.from_flat_state({path: variable}))
        return nnx.split(model)

    return nnx.merge(*initial())


@partial(jax.jit, static_argnames="adapter")
def packed(model: DenseDecoder, tokens, segment_ids, positions, parent_ids=None, adapter: bool = True) -> jax.Array:
    return model.hidden(tokens, segment_ids=segment_ids, positions=positions, parent_ids=parent_ids, adapter=adapter)


def hidden(model: DenseDecoder, tokens: jax.Array, adapter: bool = True) -> jax.Array:
    """One document a row."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return packed(model, tokens, jnp.ones_like(tokens), positions, adapter=adapter)


def fill(prompts: jax.Array, lengths: list[int], target: list[int]) -> Fill:
    """Every row of ``prompts`` into the slot ``target`` names."""
    rows = len(lengths)
    keys = jax.random.split(jax.random.key(0), rows)
    return Fill(np.asarray(prompts), np.asarray(lengths, np.int32), np.arange(rows), np.asarray(target), keys)


def random_tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, TINY.vocab_size, shape))


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_size_has_its_published_number_of_parameters(size):
    *sizes, parameters = PUBLISHED[size]
    config = Architecture.from_hf(hf_config(*sizes))
    abstract = nnx.eval_shape(lambda: DenseDecoder(config, rngs=nnx.Rngs(0)))
    assert sum(v.size for v in jax.tree.leaves(nnx.state(abstract))) == parameters


def test_72b_in_nf4_takes_about_41_gigabytes():
    config = Architecture.from_hf(hf_config(*PUBLISHED["72B"][:-1]))
    abstract = nnx.eval_shape(lambda: DenseDecoder(config, quantization="nf4", dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    packed = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(nnx.state(abstract, PackedParam)))
    total = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(nnx.state(abstract)))
    assert packed * 8 / (72_706_203_648 - 2 * 152064 * 8192) == pytest.approx(4.127, abs=2e-3)
    assert 40e9 < total < 42e9


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_decoding_rows_of_different_lengths_equals_one_pass_over_each(quantization):
    model = build(quantization=quantization, lora=LoraConfig(rank=4))
    decoder = Decoder(model, ends=(-1,))
    tokens, lengths, target = random_tokens(3, 7), [7, 3, 5], [2, 0, 1]
    slots = decoder.fill(decoder.empty(3, 16), None, fill(tokens, lengths, target))
    prompts_read = hidden(model, tokens)
    for row, (length, slot) in enumerate(zip(lengths, target, strict=True)):
        np.testing.assert_allclose(slots.hidden[slot], prompts_read[row, length - 1], atol=2e-5)
    slots, written = decoder.extend(slots, None, Sampling())
    for row, (length, slot) in enumerate(zip(lengths, target, strict=True)):
        text = jnp.concatenate([tokens[row, :length], written[slot], jnp.zeros(7 - length, int)])
        np.testing.assert_allclose(slots.hidden[slot], hidden(model, text[None])[0, length + CHUNK - 1], atol=2e-5)


def test_a_prefix_computed_once_serves_every_row():
    model = build()
    decoder = Decoder(model, ends=(-1,))
    tokens = random_tokens(3, 10).at[:, :6].set(random_tokens(6))
    slots = decoder.fill(decoder.empty(3, 4), decoder.prefix(tokens[0, :6].tolist()), fill(tokens[:, 6:], [4, 2, 3], [0, 1, 2]))
    expected = hidden(model, tokens)
    for row, last in enumerate([9, 7, 8]):
        np.testing.assert_allclose(slots.hidden[row], expected[row, last], atol=2e-5)


def test_a_full_row_that_has_ended_is_not_overwritten_while_others_go_on():
    decoder = Decoder(build(), ends=(-1,))
    slots = decoder.fill(decoder.empty(2, 4), None, fill(random_tokens(2, 4), [4, 2], [0, 1]))
    before = jax.tree.map(np.array, slots.own)
    slots, _ = decoder.extend(replace(slots, finished=jnp.array([True, False])), None, Sampling())
    np.testing.assert_array_equal(slots.length, [4, 2 + CHUNK])
    np.testing.assert_array_equal(slots.own.keys[:, 0, :, :, :4], before.keys[:, 0, :, :, :4])
    np.testing.assert_array_equal(slots.own.values[:, 0, :, :4], before.values[:, 0, :, :4])


def test_responses_that_share_a_prompt_have_the_states_of_separate_rows():
    model = build()
    prompt, first, second = random_tokens(5), random_tokens(4) + 1, random_tokens(3) + 2
    tokens = jnp.concatenate([prompt, first, second])[None] % TINY.vocab_size
    segment_ids = jnp.array([[1] * 5 + [2] * 4 + [3] * 3])
    parent_ids = jnp.where(segment_ids > 1, 1, 0)
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]])
    together = packed(model, tokens, segment_ids, positions, parent_ids)[0]
    np.testing.assert_allclose(together[:9], hidden(model, tokens[:, :9])[0], atol=2e-5)
    alone = hidden(model, jnp.concatenate([tokens[:, :5], tokens[:, 9:]], axis=1))[0]
    np.testing.assert_allclose(together[9:], alone[5:], atol=2e-5)


def test_padding_leaves_no_trace_and_stays_finite():
    model = build()
    tokens = random_tokens(1, 8)
    segment_ids = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0]])
    positions = jnp.arange(8)[None] * segment_ids
    first = packed(model, tokens, segment_ids, positions)
    other = packed(model, tokens.at[:, 5:].set(3), segment_ids, positions)
    np.testing.assert_array_equal(first[:, :5], other[:, :5])
    assert np.isfinite(first).all()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_adapter_switched_off_is_the_model_without_it(quantization):
    with_adapter = build(quantization=quantization, lora=LoraConfig(rank=4))
    without = nnx.eval_shape(lambda: DenseDecoder(TINY, quantization=quantization, rngs=nnx.Rngs(0)))
    nnx.update(without, nnx.state(with_adapter, nnx.Not(nnx.Any(LoraParam, LoraScaling))))
    tokens = random_tokens(2, 6)
    off = hidden(with_adapter, tokens, adapter=False)
    np.testing.assert_array_equal(off, hidden(without, tokens))
    assert np.abs(hidden(with_adapter, tokens) - off).max() > 1e-2


def test_only_adapter_matrices_are_lora_params_and_each_array_names_its_axes():
    lora = LoraConfig(rank=4, targets=("q_proj", "down_proj"))
    model = nnx.eval_shape(
        lambda: DenseDecoder(TINY, lora=lora, frozen_loras=(LoraConfig(rank=2),), quantization="nf4", rngs=nnx.Rngs(0))
    )
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, LoraParam))}
    assert trained == {
        ("layers", block, target, "lora", matrix)
        for block, target in (("self_attn", "q_proj"), ("mlp", "down_proj"))
        for matrix in "AB"
    }
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert tuple(axis.size for axis in variable.axes) == variable.shape, path
        assert (variable.axes[0].name == "layers") == (path[0] == "layers"), path


def test_the_compiled_program_does_not_grow_with_depth():
    def size(layers: int) -> int:
        config = replace(TINY, num_layers=layers)
        model = nnx.eval_shape(lambda: DenseDecoder(config, lora=LoraConfig(rank=4), quantization="nf4", rngs=nnx.Rngs(0)))
        graph, lora, rest = nnx.split(model, LoraParam, ...)
        tokens = jnp.zeros((1, 8), jnp.int32)

        def loss(lora, rest):
            merged = nnx.merge(graph, lora, rest)
            return merged.hidden(tokens, segment_ids=tokens, positions=tokens, remat="layer").sum()

        return len(jax.jit(jax.grad(loss)).lower(lora, rest).compile().as_text())

    assert size(8) < 1.1 * size(2)


def test_a_weight_under_an_adapter_is_not_differentiated_and_says_so():
    rng = np.random.default_rng(0)
    x, weight, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 8), (6, 8), (2, 8), (6, 2)))

    def loss(x, weight, a, b):
        return adapted_matmul(x, weight, ((a, b),)).sum()

    def plain(x, weight, a, b):
        return (x @ (weight + b @ a).T).sum()

    with pytest.raises(TypeError, match="no gradient for the weight under an adapter"):
        jax.grad(loss, argnums=1)(x, weight, a, b)
    found, expected = (jax.jit(jax.grad(function, argnums=(0, 2, 3)))(x, weight, a, b) for function in (loss, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_quantized_layer_keeps_only_packed_bytes_for_the_backward_pass():
    rng = np.random.default_rng(0)
    weight = jax.jit(NF4Weight.quantize)(rng.normal(size=(128, 192)))
    x = jnp.asarray(rng.normal(size=(5, 192)), jnp.float32)
    y, backward = jax.vjp(lambda x: nf4_matmul(x, weight), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert kept < 128 * 192
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    dense = weight.dequantize(jnp.float32)
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(backward(g)[0], g @ dense, rtol=1e-5, atol=1e-4)


def test_a_whole_quantized_model_keeps_no_dense_stack_between_the_passes():
    config = replace(TINY, num_layers=16, hidden_size=128, intermediate_size=256, head_dim=32)
    model = nnx.eval_shape(lambda: DenseDecoder(config, lora=LoraConfig(rank=2), quantization="nf4", rngs=nnx.Rngs(0)))
    graph, lora, rest = nnx.split(model, LoraParam, ...)
    tokens = jnp.zeros((1, 4), jnp.int32)

    def loss(lora, rest):
        return nnx.merge(graph, lora, rest).hidden(tokens, segment_ids=tokens, positions=tokens).sum()

    dense_bytes = 16 * 4 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256)
    temporary = jax.jit(jax.grad(loss)).lower(lora, rest).compile().memory_analysis().temp_size_in_bytes
    assert temporary < dense_bytes / 4
