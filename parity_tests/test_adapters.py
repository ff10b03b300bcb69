"""Adapters and models cross the border both ways: PEFT opens what JAX writes, and JAX what PEFT writes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Qwen2ForCausalLM

from jax_medllm.weights import adapter_tensors, model_tensors, read_model, set_adapter
from medllm.config import LoraConfig
from medllm.model_directory import Adapter, ModelDirectory, merge_adapter, read_adapter, write_adapter, write_model
from medllm_parity.oracle import float64_model, row_logits
from medllm_parity.tolerances import FLOAT32_FORWARD, FLOAT64_FORWARD
from parity_tests.test_model import jax_loss, rows

TOKENS, SEGMENT_IDS, POSITIONS = rows()
REAL = SEGMENT_IDS != 0
SETTINGS = [
    {"rank": 4, "alpha": 6.0},
    {"rank": 3, "alpha": 5.0, "rslora": True, "targets": ("q_proj", "v_proj", "down_proj")},
]


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return row_logits(model, TOKENS, SEGMENT_IDS, POSITIONS).numpy()[REAL]


def jax_logits(model) -> np.ndarray:
    return np.asarray(jax_loss(model, TOKENS, SEGMENT_IDS, POSITIONS)[1])[REAL]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_peft_adapter_under_a_model_gives_pefts_logits(float64, tiny_model, tiny_adapter, settings):
    base = tiny_model()
    adapter = tiny_adapter(base, **settings)
    model = read_model(ModelDirectory(base), adapter=read_adapter(adapter), dtype=jnp.float64)
    FLOAT64_FORWARD.check(jax_logits(model), torch_logits(float64_model(base, adapter)), "logits")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_loads_an_adapter_written_by_jax(tiny_model, tmp_path, settings):
    base = tiny_model()
    lora = LoraConfig(**settings)
    model = read_model(ModelDirectory(base), lora=lora)
    rng = np.random.default_rng(3)
    tensors = {name: rng.normal(0, 0.2, value.shape) for name, value in adapter_tensors(model).items()}
    set_adapter(model, Adapter(lora.rank, lora.alpha, lora.rslora, lora.targets, tensors))
    write_adapter(tmp_path / "adapter", lora, adapter_tensors(model), str(base))
    theirs = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    FLOAT32_FORWARD.check(jax_logits(model), torch_logits(theirs), "logits")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            np.testing.assert_array_equal(parameter.detach(), adapter_tensors(model)[name.replace(".default", "")])


def test_a_frozen_adapter_stays_on_when_the_trained_one_is_switched_off(float64, tiny_model, tiny_adapter):
    base = tiny_model()
    frozen, trained = tiny_adapter(base, seed=1), tiny_adapter(base, rank=2, seed=2)
    given = read_adapter(trained)
    model = read_model(
        ModelDirectory(base), adapter=read_adapter(frozen), lora=LoraConfig(2, given.alpha, given.targets), dtype=jnp.float64
    )
    set_adapter(model, given)
    inputs = {"segment_ids": jnp.asarray(SEGMENT_IDS), "positions": jnp.asarray(POSITIONS)}
    on = model.logits(model.hidden(jnp.asarray(TOKENS), **inputs))[REAL]
    off = model.logits(model.hidden(jnp.asarray(TOKENS), **inputs, adapter=False))[REAL]
    FLOAT64_FORWARD.check(off, torch_logits(float64_model(base, frozen)), "the reference")
    both = float64_model(base, frozen)
    both.load_adapter(trained, "trained")
    both.double().base_model.set_adapter(["default", "trained"])
    FLOAT64_FORWARD.check(on, torch_logits(both), "the policy")


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
