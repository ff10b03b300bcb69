"""Adapters and models cross the border both ways: PEFT opens what JAX writes, and JAX what PEFT writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import Qwen2ForCausalLM

from jax_medllm.model.decoder import LoraParam
from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.read import model_tensors, read_model
from medllm.config import LoraConfig
from medllm.model.adapter import Adapter, merge_adapter, read_adapter, write_adapter
from medllm.model.directory import ModelDirectory, write_model
from parity_tests.jax_results import jax_loss, set_adapter
from parity_tests.oracle import float64_model, row_logits, row_loss
from parity_tests.packed_rows import rows
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT64_FORWARD, FLOAT64_GRADIENT

TOKENS, SEGMENT_IDS, POSITIONS = rows()
REAL = SEGMENT_IDS != 0
SETTINGS = [
    {"rank": 4, "alpha": 6.0},
    {"rank": 3, "alpha": 5.0, "rslora": True, "targets": ("q_proj", "v_proj", "down_proj")},
    {
        "rank": 4,
        "alpha": 6.0,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {r"layers\.1\.mlp\..*": 3.0},
    },
]
# Selections that PEFT writes and we resolve into names.
SELECTIONS = [
    {"rank": 3, "targets": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"},
    {"rank": 3, "targets": ("v_proj", "down_proj"), "layers_to_transform": [0]},
    {"rank": 2, "targets": "all-linear", "rank_pattern": {"mlp.up_proj": 5}},
]


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return row_logits(model, TOKENS, SEGMENT_IDS, POSITIONS).numpy()[REAL]


def jax_logits(model) -> np.ndarray:
    return np.asarray(jax_loss(model, TOKENS, SEGMENT_IDS, POSITIONS)[1])[REAL]


@pytest.mark.parametrize("settings", [*SETTINGS, *SELECTIONS], ids=str)
def test_a_peft_adapter_under_a_model_gives_pefts_logits(float64, tiny_model, tiny_adapter, settings):
    base = tiny_model()
    adapter = tiny_adapter(base, **settings)
    model = read_model(ModelDirectory(base), adapter=read_adapter(adapter), dtype=jnp.float64)
    FLOAT64_FORWARD.assert_close(jax_logits(model), torch_logits(float64_model(base, adapter)), "logits")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_loads_an_adapter_written_by_jax(tiny_model, tmp_path, settings):
    base = tiny_model()
    lora = LoraConfig(**settings)
    model = read_model(ModelDirectory(base), lora=lora)
    rng = np.random.default_rng(3)
    tensors = {name: rng.normal(0, 0.2, value.shape) for name, value in adapter_tensors(model).items()}
    set_adapter(model, Adapter(lora, tensors))
    write_adapter(tmp_path / "adapter", lora, adapter_tensors(model), str(base))
    theirs = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    FLOAT32_FORWARD.assert_close(jax_logits(model), torch_logits(theirs), "logits")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            np.testing.assert_array_equal(parameter.detach(), adapter_tensors(model)[name.replace(".default", "")])


@pytest.mark.parametrize("settings", [*SETTINGS[2:], *SELECTIONS[:1]], ids=str)
def test_an_adapter_of_several_ranks_has_pefts_gradients_and_goes_out_as_it_came(float64, tiny_model, tiny_adapter, settings):
    base = tiny_model()
    given = read_adapter(tiny_adapter(base, **settings))
    oracle = float64_model(base, given.path, trainable=True)
    row_loss(row_logits(oracle, TOKENS, SEGMENT_IDS, POSITIONS), TOKENS, SEGMENT_IDS).backward()
    expected = {name.replace(".default", ""): p.grad.numpy() for name, p in oracle.named_parameters() if p.requires_grad}
    model = read_model(ModelDirectory(base), lora=given, dtype=jnp.float64)
    graph, lora, rest = nnx.split(model, LoraParam, ...)
    gradients = jax.grad(lambda lora: jax_loss(nnx.merge(graph, lora, rest), TOKENS, SEGMENT_IDS, POSITIONS)[0])(lora)
    found = adapter_tensors(nnx.merge(graph, gradients, rest))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        FLOAT64_GRADIENT.assert_close(found[name], value, name)
    for name, value in adapter_tensors(model).items():
        np.testing.assert_array_equal(value, given.tensors[name], err_msg=name)
    for path, gradient in nnx.to_flat_state(gradients):
        here = sum(np.abs(found[name]).sum() for name in found if f".{path[2]}.lora_{path[-1]}." in name)
        np.testing.assert_allclose(np.abs(gradient[...]).sum(), here, rtol=1e-12, err_msg="padding has no gradient")


def test_several_frozen_adapters_add_up_as_in_peft(float64, tiny_model, tiny_adapter):
    base = tiny_model()
    first, second = tiny_adapter(base, seed=1), tiny_adapter(base, rank=2, targets=("k_proj", "gate_proj"), seed=2)
    theirs = float64_model(base, first)
    theirs.load_adapter(second, "second")
    theirs.double().base_model.set_adapter(["default", "second"])
    model = read_model(ModelDirectory(base), adapter=[read_adapter(first), read_adapter(second)], dtype=jnp.float64)
    FLOAT64_FORWARD.assert_close(jax_logits(model), torch_logits(theirs), "logits")


def test_an_adapter_that_is_trained_further_has_its_copy_as_the_reference(float64, tiny_model, tiny_adapter):
    base = tiny_model()
    given = read_adapter(tiny_adapter(base, rank_pattern={"q_proj": 2}))
    model = read_model(ModelDirectory(base), lora=given, dtype=jnp.float64)
    moved = {name: 1.5 * value for name, value in given.tensors.items()}
    set_adapter(model, Adapter(given.lora, moved))
    inputs = {"segment_ids": jnp.asarray(SEGMENT_IDS), "positions": jnp.asarray(POSITIONS)}
    reference = model.logits(model.hidden(jnp.asarray(TOKENS), **inputs, adapter=False))[REAL]
    FLOAT64_FORWARD.assert_close(reference, torch_logits(float64_model(base, given.path)), "the reference")
    assert np.abs(jax_logits(model) - reference).max() > 0.1, "the policy has moved away from it"


def test_a_frozen_adapter_stays_on_when_the_trained_one_is_switched_off(float64, tiny_model, tiny_adapter):
    base = tiny_model()
    frozen, trained = tiny_adapter(base, seed=1), tiny_adapter(base, rank=2, seed=2)
    given = read_adapter(trained)
    model = read_model(ModelDirectory(base), adapter=read_adapter(frozen), lora=given.lora, dtype=jnp.float64)
    set_adapter(model, given)
    inputs = {"segment_ids": jnp.asarray(SEGMENT_IDS), "positions": jnp.asarray(POSITIONS)}
    on = model.logits(model.hidden(jnp.asarray(TOKENS), **inputs))[REAL]
    off = model.logits(model.hidden(jnp.asarray(TOKENS), **inputs, adapter=False))[REAL]
    FLOAT64_FORWARD.assert_close(off, torch_logits(float64_model(base, frozen)), "the reference")
    both = float64_model(base, frozen)
    both.load_adapter(trained, "trained")
    both.double().base_model.set_adapter(["default", "trained"])
    FLOAT64_FORWARD.assert_close(on, torch_logits(both), "the policy")


def test_a_model_written_by_jax_opens_in_transformers_with_identical_logits(tiny_model, tmp_path):
    for tied in (False, True):
        base = tiny_model(tied=tied)
        out = tmp_path / f"{tied}"
        model = read_model(ModelDirectory(base))
        write_model(out, model.config.to_hf(), model_tensors(model))
        stock, again = (Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, out))
        np.testing.assert_array_equal(torch_logits(again), torch_logits(stock))


def test_a_model_with_a_frozen_adapter_is_written_merged(tiny_model, tiny_adapter, tmp_path):
    base = tiny_model()
    adapter = tiny_adapter(base)
    model = read_model(ModelDirectory(base), adapter=read_adapter(adapter))
    merge_adapter(base, adapter, tmp_path / "merged")
    merged = ModelDirectory(tmp_path / "merged")
    written = dict(model_tensors(model))
    assert written.keys() == set(merged.names())
    for name in merged.names():
        np.testing.assert_allclose(written[name], merged.read(name), rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_initial_adapter_is_distributed_as_pefts(tiny_model):
    model = read_model(ModelDirectory(tiny_model(hidden=128, mlp=256)), lora=LoraConfig(rank=16))
    for name, value in adapter_tensors(model).items():
        if "lora_B" in name:
            assert not value.any(), name
        else:
            bound = value.shape[1] ** -0.5
            assert np.abs(value).max() <= bound, name
            np.testing.assert_allclose(value.std(), bound / 3**0.5, rtol=0.05, err_msg=name)
    assert {v.dtype for v in adapter_tensors(model).values()} == {np.dtype(np.float32)}
