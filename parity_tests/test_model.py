"""The JAX model against transformers' Qwen2: logits, loss and every LoRA gradient, in float64 and in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2Config as HfConfig
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from jax_medllm.model import LoraParam, Qwen2, Qwen2Config, _Rotary
from jax_medllm.weights import adapter_tensors, read_model, set_adapter
from medllm.config import LoraConfig
from medllm.model_directory import ModelDirectory, read_adapter
from medllm_parity.oracle import float64_model, lift, row_logits, row_loss
from medllm_parity.tolerances import BFLOAT16_EXCESS, FLOAT32_FORWARD, FLOAT64_FORWARD, FLOAT64_GRADIENT
from parity_tests.tiny_models import VOCAB

SHAPES = [
    {"tied": False, "heads": 4, "kv_heads": 4},
    {"tied": True, "heads": 4, "kv_heads": 2},
    {"tied": False, "heads": 4, "kv_heads": 1},
]


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three rows: one document, three packed documents with padding after them, and a short one with padding."""
    lengths = [[14], [5, 3, 4], [6]]
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (3, 14))
    segment_ids, positions = np.zeros((3, 14), np.int64), np.zeros((3, 14), np.int64)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            segment_ids[row, start : start + length] = number + 1
            positions[row, start : start + length] = np.arange(length)
            start += length
    return tokens, segment_ids, positions


def jax_loss(model: Qwen2, tokens, segment_ids, positions, remat: bool = False):
    """Loss and logits as the oracle defines them."""
    inputs = {"segment_ids": jnp.asarray(segment_ids), "positions": jnp.asarray(positions)}
    hidden = model.hidden(jnp.asarray(tokens), **inputs, remat=remat)
    logits = model.logits(hidden)
    counted = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(picked * counted).sum() / counted.sum(), logits


def trained(base, adapter, dtype) -> Qwen2:
    given = read_adapter(adapter)
    model = read_model(ModelDirectory(base), lora=LoraConfig(given.rank, given.alpha, given.targets, given.rslora), dtype=dtype)
    set_adapter(model, given)
    return model


def test_lifting_the_oracle_changes_nothing_in_fp32(tiny_model):
    model = Qwen2ForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        stock = row_logits(model, *rows())
        lifted = row_logits(lift(model), *rows())
    assert torch.equal(stock, lifted)


def test_a_doubled_model_without_lifting_is_not_the_truth(tiny_model):
    model = Qwen2ForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32, attn_implementation="eager").double()
    with torch.no_grad():
        difference = (row_logits(model, *rows()) - row_logits(float64_model(tiny_model()), *rows())).abs().max()
    assert difference > 1e-9


@pytest.mark.parametrize(("shape", "remat"), [*((shape, False) for shape in SHAPES), (SHAPES[1], True)], ids=str)
def test_logits_loss_and_every_lora_gradient_equal_the_float64_truth(float64, tiny_model, tiny_adapter, shape, remat):
    base = tiny_model(**shape)
    adapter = tiny_adapter(base)
    tokens, segment_ids, positions = rows()
    oracle = float64_model(base, adapter, trainable=True)
    expected = row_logits(oracle, tokens, segment_ids, positions)
    expected_loss = row_loss(expected, tokens, segment_ids)
    expected_loss.backward()

    graph, lora, rest = nnx.split(trained(base, adapter, jnp.float64), LoraParam, ...)

    @jax.jit
    def step(lora):
        def loss(lora):
            return jax_loss(nnx.merge(graph, lora, rest), tokens, segment_ids, positions, remat)

        return jax.value_and_grad(loss, has_aux=True)(lora)

    (loss, logits), gradients = step(lora)
    real = segment_ids != 0
    FLOAT64_FORWARD.check(logits[real], expected.detach()[torch.from_numpy(real)], "logits")
    FLOAT64_FORWARD.check(loss, expected_loss.detach(), "loss")
    found = adapter_tensors(nnx.merge(graph, gradients, rest))
    wanted = {name.replace(".default", ""): p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * 7 * 2
    for name, gradient in found.items():
        FLOAT64_GRADIENT.check(gradient, wanted[name], name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_logits_equal_hugging_face(tiny_model, shape):
    base = tiny_model(**shape)
    tokens, segment_ids, positions = rows()
    stock = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = row_logits(stock, tokens, segment_ids, positions).numpy()
    _, logits = jax_loss(read_model(ModelDirectory(base)), tokens, segment_ids, positions)
    real = segment_ids != 0
    FLOAT32_FORWARD.check(logits[real], expected[real], "logits")


def test_bf16_logits_are_no_further_from_the_truth_than_hugging_faces(tiny_model):
    errors: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for seed in range(4):
        base = tiny_model(torch.bfloat16, seed=seed)
        inputs = rows(seed)
        real = inputs[1] != 0
        stock = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
        with torch.no_grad():
            truth = row_logits(float64_model(base), *inputs).numpy()[real]
            theirs = row_logits(stock, *inputs).double().numpy()[real]
        _, logits = jax_loss(read_model(ModelDirectory(base), dtype=jnp.bfloat16), *inputs)
        errors["ours"].append(np.asarray(logits, np.float64)[real] - truth)
        errors["theirs"].append(theirs - truth)
    ours, theirs = (np.sqrt(np.mean(np.square(errors[side]))) for side in ("ours", "theirs"))
    assert ours <= BFLOAT16_EXCESS.relative * theirs, f"{ours:.3g} against {theirs:.3g} ({BFLOAT16_EXCESS.reason})"


def test_rotary_angles_keep_hugging_faces_precision_to_the_last_position_of_the_72b():
    sizes = {"vocab_size": 9, "hidden_size": 8192, "intermediate_size": 8, "num_attention_heads": 64, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = HfConfig(**sizes, num_key_value_heads=8, rope_parameters=rope, max_position_embeddings=32768)
    positions = np.arange(0, 32768, 37)[None]
    theirs = np.stack(Qwen2RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)))[..., :64].astype(np.float64)
    rotary = _Rotary.at(jnp.asarray(positions), Qwen2Config.from_hf(config.to_dict()), jnp.dtype(jnp.float32))
    ours = np.stack([rotary.cos, rotary.sin])[..., :64].astype(np.float64)
    angles = positions[..., None] / 1e6 ** (np.arange(0, 128, 2) / 128)
    truth = np.stack([np.cos(angles), np.sin(angles)])
    assert np.abs(ours - truth).max() <= 1.01 * np.abs(theirs - truth).max()
    # fp32 angles near 30,000 are multiples of 0.002
    assert np.abs(ours - theirs).max() <= 0.002


def test_a_packed_document_has_the_logits_it_has_alone(float64, tiny_model):
    model = read_model(ModelDirectory(tiny_model()), dtype=jnp.float64)
    tokens, segment_ids, positions = rows()
    _, packed = jax_loss(model, tokens, segment_ids, positions)
    for row, segment in [(1, 1), (1, 2), (1, 3), (2, 1)]:
        here = segment_ids[row] == segment
        alone = tokens[row, here][None]
        _, expected = jax_loss(model, alone, np.ones_like(alone), np.arange(alone.shape[1])[None])
        FLOAT64_FORWARD.check(packed[row, here], expected[0], f"row {row}, document {segment}")
