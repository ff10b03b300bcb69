"""Hidden state after every layer, logits, loss and every LoRA gradient: the JAX model against the float64 truth and Qwen2."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2Config as HfConfig
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from jax_medllm.model.decoder import Rotary
from jax_medllm.weights.read import read_model
from medllm.architecture import HEAD, Architecture
from medllm.config import ModelConfig, RematPolicy
from medllm.model.directory import ModelDirectory
from medllm.quantization import PACKINGS
from medllm_parity.oracle import lift
from parity_tests import torch_results
from parity_tests.jax_results import Results, forward_and_backward, jax_loss, open_trainable
from parity_tests.oracle import float64_copy, float64_model, row_logits, row_states_and_logits
from parity_tests.packed_rows import rows, target_mask
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT64_FORWARD, FLOAT64_GRADIENT
from torch_ref.model import open_model

SHAPES = [
    {"tied": False, "heads": 4, "kv_heads": 4},
    {"tied": True, "heads": 4, "kv_heads": 2},
    {"tied": False, "heads": 4, "kv_heads": 1},
]
CASES = [*((shape, "none") for shape in SHAPES), *((SHAPES[1], remat) for remat in get_args(RematPolicy) if remat != "none")]
LONG = 32_768
DOCUMENTS_OF_ROWS = [(1, 1), (1, 2), (1, 3), (2, 1)]


def check_against_truth(found: Results, truth: Results, segment_ids: np.ndarray) -> None:
    """Every quantity of a float64 model; padding means nothing and is left out."""
    real = segment_ids != 0
    assert found.states.shape == truth.states.shape
    for layer, (state, expected) in enumerate(zip(found.states, truth.states, strict=True)):
        FLOAT64_FORWARD.assert_close(state[real], expected[real], f"residual stream after {layer} layers")
    FLOAT64_FORWARD.assert_close(found.logits[real], truth.logits[real], "logits")
    targets = target_mask(segment_ids)
    FLOAT64_FORWARD.assert_close(found.logprobs[targets], truth.logprobs[targets], "log-probabilities")
    FLOAT64_FORWARD.assert_close(found.loss, truth.loss, "loss")
    assert found.gradients.keys() == truth.gradients.keys()
    assert len(found.gradients) == 2 * 7 * (len(found.states) - 1)
    for name, gradient in found.gradients.items():
        FLOAT64_GRADIENT.assert_close(gradient, truth.gradients[name], name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_declared_tensors_are_those_of_transformers_model(tiny_model, shape):
    directory = ModelDirectory(tiny_model(**shape))
    with torch.device("meta"):
        stock = Qwen2ForCausalLM(HfConfig.from_pretrained(directory.path)).state_dict()
    if shape["tied"]:
        stock.pop(HEAD)  # the embedding once more
    declared = {name: tensor.shape for name, tensor in directory.architecture.tensors.items()}
    assert declared == {name: tuple(tensor.shape) for name, tensor in stock.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lifting_the_oracle_changes_nothing_in_fp32(tiny_model, shape):
    model = Qwen2ForCausalLM.from_pretrained(tiny_model(**shape), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        stock = row_states_and_logits(model, *rows())
        lifted = row_states_and_logits(lift(model), *rows())
    for before, after in zip(stock, lifted, strict=True):
        assert torch.equal(before, after)


def test_a_doubled_model_without_lifting_is_not_the_truth(tiny_model):
    model = Qwen2ForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32, attn_implementation="eager").double()
    with torch.no_grad():
        difference = (row_logits(model, *rows()) - row_logits(float64_model(tiny_model()), *rows())).abs().max()
    assert difference > 1e-9


@pytest.mark.parametrize(("shape", "remat"), CASES, ids=str)
def test_every_layer_logits_loss_and_gradient_equal_the_float64_truth(float64, tiny_model, tiny_adapter, shape, remat):
    base = tiny_model(**shape)
    adapter = tiny_adapter(base)
    truth = torch_results.forward_and_backward(float64_model(base, adapter, trainable=True), rows())
    found = forward_and_backward(open_trainable(base, adapter, jnp.float64), rows(), remat=remat)
    check_against_truth(found, truth, rows()[1])


@pytest.mark.device
def test_positions_up_to_32k_give_the_float64_truth(float64, tiny_model, tiny_adapter):
    base = tiny_model(context=LONG)
    adapter = tiny_adapter(base)
    far = rows(until=LONG)
    assert far[2].max() > 4 * 4096
    truth = torch_results.forward_and_backward(float64_model(base, adapter, trainable=True), far)
    check_against_truth(forward_and_backward(open_trainable(base, adapter, jnp.float64), far), truth, far[1])


def test_a_row_of_more_than_4096_tokens_has_the_true_logits(float64, tiny_model):
    base = tiny_model(heads=2, kv_heads=1, layers=1, context=LONG)
    row = rows(documents=((4200,),))
    with torch.no_grad():
        expected = row_logits(float64_model(base), *row).numpy()
    FLOAT64_FORWARD.assert_close(
        jax.jit(jax_loss)(read_model(ModelDirectory(base), dtype=jnp.float64), *row)[1], expected, "logits"
    )


@pytest.mark.device
@pytest.mark.parametrize("quantization", PACKINGS)
def test_a_4_bit_model_equals_float64_arithmetic_on_its_dequantized_weights(float64, nf4_model, tiny_adapter, quantization):
    packed = nf4_model(quantization=quantization, kv_heads=1)
    adapter = tiny_adapter(packed.dense)
    stock = open_model(ModelConfig(str(packed.path), quantization=quantization, dtype="float32"))
    truth = torch_results.forward_and_backward(float64_copy(stock, adapter, trainable=True), rows())
    found = forward_and_backward(open_trainable(packed.path, adapter, jnp.float64, quantization), rows())
    check_against_truth(found, truth, rows()[1])


def test_fp32_states_and_logits_equal_hugging_face(tiny_model, tiny_adapter):
    base = tiny_model(**SHAPES[1])
    real = rows()[1] != 0
    adapter = tiny_adapter(base)
    found = forward_and_backward(open_trainable(base, adapter, jnp.float32), rows())
    model = open_model(ModelConfig(str(base), adapter=str(adapter), dtype="float32"))
    with torch.no_grad():
        states, logits = row_states_and_logits(model, *rows())
    for layer, (state, expected) in enumerate(zip(found.states, states.numpy(), strict=True)):
        FLOAT32_FORWARD.assert_close(state[real], expected[real], f"residual stream after {layer} layers")
    FLOAT32_FORWARD.assert_close(found.logits[real], logits.numpy()[real], "logits")


@pytest.mark.device
def test_rotary_angles_keep_hugging_faces_precision_to_the_last_position_of_the_72b():
    sizes = {"vocab_size": 9, "hidden_size": 8192, "intermediate_size": 8, "num_attention_heads": 64, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = HfConfig(**sizes, num_key_value_heads=8, rope_parameters=rope, max_position_embeddings=32768)
    positions = np.arange(0, 32768, 37)[None]
    theirs = np.stack(Qwen2RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)))[..., :64].astype(np.float64)
    rotary = Rotary.at(jnp.asarray(positions), Architecture.from_hf(config.to_dict()), jnp.dtype(jnp.float32))
    ours = np.stack([rotary.cos, rotary.sin])[..., :64].astype(np.float64)
    angles = positions[..., None] / 1e6 ** (np.arange(0, 128, 2) / 128)
    truth = np.stack([np.cos(angles), np.sin(angles)])
    assert np.abs(ours - truth).max() <= 1.01 * np.abs(theirs - truth).max()
    # fp32 angles near 30,000 are multiples of 0.002
    assert np.abs(ours - theirs).max() <= 0.002


def test_a_packed_document_has_the_logits_it_has_alone(float64, tiny_model):
    model = read_model(ModelDirectory(tiny_model()), dtype=jnp.float64)
    tokens, segment_ids, positions = rows()
    here = [segment_ids[row] == segment for row, segment in DOCUMENTS_OF_ROWS]
    alone = [np.zeros((len(here), tokens.shape[1]), np.int64) for _ in range(3)]
    for number, ((row, _), place) in enumerate(zip(DOCUMENTS_OF_ROWS, here, strict=True)):
        for array, value in zip(alone, (tokens[row, place], 1, np.arange(place.sum())), strict=True):
            array[number, : place.sum()] = value
    packed, apart = (jax_loss(model, *arrays)[1] for arrays in ((tokens, segment_ids, positions), alone))
    for number, ((row, segment), place) in enumerate(zip(DOCUMENTS_OF_ROWS, here, strict=True)):
        FLOAT64_FORWARD.assert_close(packed[row, place], apart[number, : place.sum()], f"row {row}, document {segment}")
