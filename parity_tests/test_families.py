"""Every family, its rotary rules, biases, head norms and windows, against transformers' own model of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jax_medllm.generate.cached_decoder import Decoder
from jax_medllm.generate.queue import generate
from jax_medllm.model.decoder import Rotary
from jax_medllm.model.rows import MULTIPLE
from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.read import model_tensors, read_model
from medllm.architecture import HEAD, Architecture
from medllm.config import ModelConfig, Sampling
from medllm.model.adapter import read_adapter, write_adapter
from medllm.model.directory import ModelDirectory
from medllm_parity.oracle import lift
from parity_tests import torch_results
from parity_tests.jax_results import forward_and_backward, open_trainable
from parity_tests.oracle import float64_copy, float64_model, row_states_and_logits
from parity_tests.packed_rows import rows
from parity_tests.test_model import check_against_truth
from parity_tests.tiny_models import KINDS, VOCAB
from parity_tests.tolerances import FLOAT32_FORWARD
from torch_ref.model import open_model

OTHERS = [kind for kind in KINDS if kind != "qwen2"]
ONE_OF_EACH = ["qwen2, yarn", "qwen3", "llama 3", "mistral, window"]
NEW = 12


@pytest.mark.parametrize("kind", KINDS)
def test_the_declared_tensors_are_those_of_transformers_model(tiny_model, kind):
    directory = ModelDirectory(tiny_model(kind=kind))
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory.path)).state_dict()
    declared = {name: tensor.shape for name, tensor in directory.architecture.tensors.items()}
    assert HEAD in declared
    assert declared == {name: tuple(tensor.shape) for name, tensor in stock.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_to_a_config_is_read_alike_by_transformers_and_here(tiny_model, kind, tmp_path):
    architecture = ModelDirectory(tiny_model(kind=kind)).architecture
    assert Architecture.from_hf(architecture.to_hf()) == architecture
    ours = AutoConfig.for_model(**architecture.to_hf())
    theirs = AutoConfig.from_pretrained(tiny_model(kind=kind))
    names = ("rope_parameters", "sliding_window", "attention_bias", "mlp_bias", "tie_word_embeddings", "rms_norm_eps")
    for name in names:
        found, expected = getattr(ours, name, None), getattr(theirs, name, None)
        if name == "rope_parameters":
            found, expected = ({k: v for k, v in one.items() if k != "truncate"} for one in (found, expected))
            expected = {"beta_fast": 32.0, "beta_slow": 1.0} | expected if expected["rope_type"] == "yarn" else expected
        assert found == expected, name


@pytest.mark.parametrize("kind", OTHERS)
def test_lifting_the_oracle_changes_nothing_in_fp32(tiny_model, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind=kind), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        stock = row_states_and_logits(model, *rows())
        lifted = row_states_and_logits(lift(model), *rows())
    for before, after in zip(stock, lifted, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_layer_logits_loss_and_gradient_equal_the_float64_truth(float64, tiny_model, tiny_adapter, kind):
    base = tiny_model(kind=kind)
    adapter = tiny_adapter(base, targets="all-linear")
    truth = torch_results.forward_and_backward(float64_model(base, adapter, trainable=True), rows())
    found = forward_and_backward(open_trainable(base, adapter, jnp.float64), rows())
    check_against_truth(found, truth, rows()[1])


@pytest.mark.parametrize("kind", [*ONE_OF_EACH[1:], "llama, biased"])
def test_a_4_bit_model_equals_float64_arithmetic_on_its_dequantized_weights(float64, nf4_model, tiny_adapter, kind):
    packed = nf4_model(kind=kind)
    adapter = tiny_adapter(packed.dense)
    stock = open_model(ModelConfig(str(packed.path), quantization="nf4", dtype="float32"))
    truth = torch_results.forward_and_backward(float64_copy(stock, adapter, trainable=True), rows())
    found = forward_and_backward(open_trainable(packed.path, adapter, jnp.float64, "nf4"), rows())
    check_against_truth(found, truth, rows()[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_out_as_it_came(tiny_model, kind):
    directory = ModelDirectory(tiny_model(kind=kind))
    written = dict(model_tensors(read_model(directory)))
    assert sorted(written) == sorted(directory.names())
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, directory.read(name), err_msg=name)


@pytest.mark.parametrize("kind", [*ONE_OF_EACH, "llama, biased"])
def test_fp32_states_and_logits_equal_hugging_face(tiny_model, tiny_adapter, kind, tmp_path):
    """With an adapter that PEFT wrote and the JAX engine wrote again."""
    base = tiny_model(kind=kind)
    real = rows()[1] != 0
    given = read_adapter(tiny_adapter(base, targets="all-linear"))
    ours = open_trainable(base, given.path, jnp.float32)
    write_adapter(tmp_path, given.lora, adapter_tensors(ours), str(base))
    found = forward_and_backward(ours, rows())
    model = open_model(ModelConfig(str(base), adapter=str(tmp_path), dtype="float32"))
    with torch.no_grad():
        states, logits = row_states_and_logits(model, *rows())
    for layer, (state, expected) in enumerate(zip(found.states, states.numpy(), strict=True)):
        FLOAT32_FORWARD.assert_close(state[real], expected[real], f"residual stream after {layer} layers")
    FLOAT32_FORWARD.assert_close(found.logits[real], logits.numpy()[real], "logits")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_hundred_greedy_continuations_are_transformers_token_for_token(tiny_model, kind):
    """With those of the same length there, in refilled slots with a shared beginning here, over the end of a window."""
    base, rng = tiny_model(kind=kind), np.random.default_rng(0)
    shared = rng.integers(0, VOCAB, MULTIPLE).tolist()  # the least that is read once for all
    prompts = [shared + rng.integers(0, VOCAB, length).tolist() for length in rng.integers(1, 12, 100)]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 0}
    expected = {}
    for length in set(map(len, prompts)):
        ids = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        for row in stock.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist():
            expected[tuple(row[:length])] = tuple(row[length:])
    decoder = Decoder(read_model(ModelDirectory(base)), (VOCAB,))
    found = generate(decoder, prompts, Sampling(max_new_tokens=NEW), lambda tokens: str(list(tokens)), 25)
    assert [generation.tokens for (generation,) in found] == [expected[tuple(prompt)] for prompt in prompts]


ROPES = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "rope_theta": 1e5, "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    | {"mscale_all_dim": 0.7, "beta_fast": 24, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 0.9},
]


@pytest.mark.parametrize("head_dim", [64, 128, 80])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope['rope_type']} {rope.get('factor', 1):g}")
def test_rotary_angles_are_transformers_to_position_131072(rope, head_dim):
    """A last bit of an fp32 frequency is a hundredth of a radian at the end."""
    sizes = {"vocab_size": 9, "hidden_size": 4 * head_dim, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    config = AutoConfig.for_model("llama", **sizes, **heads, rope_parameters=dict(rope), max_position_embeddings=131072)
    with torch.device("cpu"):
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    positions = np.arange(0, 131072, 61)[None]
    theirs = np.stack(rotary(torch.zeros(1), torch.from_numpy(positions)))[..., : head_dim // 2].astype(np.float64)
    architecture = Architecture.from_hf(config.to_dict())
    ours = np.stack(_turned(architecture, positions, jnp.float32))[..., : head_dim // 2].astype(np.float64)
    with torch.no_grad():
        lift(torch.nn.ModuleDict({"rotary": rotary}), config)
        truth = np.stack(rotary(torch.zeros(1, dtype=torch.float64), torch.from_numpy(positions)))[..., : head_dim // 2]
    assert np.abs(ours - truth).max() <= 1.01 * np.abs(theirs - truth).max()
    # torch's power of fp32 numbers is in places a last bit beside the nearest one, which numpy's is.
    np.testing.assert_array_max_ulp(architecture.rotary.frequencies(head_dim, np.float32), rotary.inv_freq.numpy(), 2)
    with jax.enable_x64(True):
        exact = np.stack(_turned(architecture, positions, jnp.float64))[..., : head_dim // 2]
    np.testing.assert_allclose(exact, truth, atol=1e-9)


def _turned(architecture: Architecture, positions: np.ndarray, dtype: object) -> tuple[np.ndarray, np.ndarray]:
    rotary = Rotary.at(jnp.asarray(positions), architecture, jnp.dtype(dtype))
    return np.asarray(rotary.cos), np.asarray(rotary.sin)
