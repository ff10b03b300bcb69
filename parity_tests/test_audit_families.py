"""``medllm parity`` over the families: sound models pass, and what is a family's own is named where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jax_medllm.model import decoder
from medllm.rotary import Llama3, Yarn
from parity_tests.test_audit import Tensors, a_name, audit, changed, layer, named
from parity_tests.tiny_models import WINDOW

SOUND = [
    ("qwen3", "nf4"),
    ("llama 3", "none"),
    ("llama, biased", "nf4"),
    ("mistral, window", "nf4-single"),
    ("qwen2, yarn", "none"),
]


@pytest.mark.parametrize(("kind", "quantization"), SOUND)
def test_a_sound_model_with_an_adapter_passes_every_check(tiny_model, tiny_adapter, kind, quantization):
    base = tiny_model(kind=kind)
    found = audit(base, adapter=str(tiny_adapter(base, targets="all-linear")), quantization=quantization)
    assert found.ok, found.first_divergence
    quantities = {check.quantity for check in found.checks}
    assert ({"q norm", "k norm"} <= quantities) == (kind == "qwen3")
    assert "gradient of lora_A" in quantities


# --- faults in an engine ---------------------------------------------------------------------------------------------------

Call = Callable[..., Any]


def no_norm_of_heads(stock: Call) -> Call:
    def call(self: Any, *given: Any) -> Any:
        self.q_norm = self.k_norm = lambda heads: heads
        return stock(self, *given)

    return call


def norm_after_rotation(stock: Call) -> Call:
    def call(self: Any, x: jax.Array, rotary: Call, context: Any, adapter: bool) -> Any:
        class Late:
            def attend(_, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
                return context.attend(self_norms[0](rotary(q)), self_norms[1](rotary(k)), v)

        self_norms = self.q_norm, self.k_norm
        self.q_norm = self.k_norm = lambda heads: heads
        return stock(self, x, lambda heads: heads, Late(), adapter)

    return call


def no_smooth_band(stock: Call) -> Call:
    def scaled(self: Llama3, rule: Any, periods: np.ndarray) -> np.ndarray:
        waves = 2 * np.pi * periods
        return np.where(waves > self.original_max_position_embeddings, 1 / periods / self.factor, 1 / periods)

    return scaled


def no_attention_factor(stock: Any) -> Any:
    return 1.0


def longer_window(stock: Call) -> Any:
    return lambda window, *given: stock(window + 1, *given)


def no_bias(stock: Call) -> Call:
    return lambda self, x, **settings: stock(self, x, **settings) - (0 if self.bias is None else self.bias[...])


IN_ENGINE = [
    ("qwen3", decoder.Attention, "__call__", no_norm_of_heads, "self_attn.q_norm", "q norm"),
    ("qwen3", decoder.Attention, "__call__", norm_after_rotation, "self_attn.q_norm", "q norm"),
    ("llama 3", Llama3, "scaled", no_smooth_band, "self_attn", "q after rotary"),
    ("qwen2, yarn", Yarn, "attention_factor", no_attention_factor, "self_attn", "q after rotary"),
    ("mistral, window", decoder.RowContext, "of", longer_window, "self_attn", "attention output"),
    ("llama, biased", decoder.Linear, "__call__", no_bias, "self_attn.q_proj", "q before rotary"),
]


@pytest.mark.parametrize(("kind", "owner", "name", "fault", "module", "quantity"), IN_ENGINE, ids=a_name)
def test_a_fault_in_a_familys_own_part_is_named(jax_engine, tiny_model, kind, owner, name, fault, module, quantity):
    jax_engine.setattr(owner, name, fault(getattr(owner, name)))
    found = audit(tiny_model(kind=kind, layers=1), bisect=True)
    assert named(found) == (0, f"model.layers.0.{module}", quantity)
    assert found.first_divergence.stack == "jax"


# --- faults in a folder ----------------------------------------------------------------------------------------------------


def biased(module: str, index: int) -> Callable[[Tensors], None]:
    """Biases of attention that are zero, but for one."""

    def plant(tensors: Tensors) -> None:
        for number in range(2):
            for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
                width = tensors[layer(number, f"self_attn.{kind}")].shape[0]
                value = 0.01 * ((kind, number) == (module, index))
                tensors[layer(number, f"self_attn.{kind}", "bias")] = np.full(width, value, np.float32)

    return plant


def scaled_norm(tensors: Tensors) -> None:
    tensors[layer(1, "self_attn.k_norm")] *= np.float32(1.0001)


ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.9}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}
IN_FOLDER = [
    ("llama", biased("o_proj", 1), {"attention_bias": True}, 1, "self_attn.o_proj", "o_proj output"),
    ("qwen3", scaled_norm, {}, 1, "self_attn.k_norm", "k norm"),
    ("llama 3", None, {"rope_parameters": LLAMA3}, 0, "self_attn", "q after rotary"),
    ("qwen2, yarn", None, {"rope_parameters": YARN}, 0, "self_attn", "q after rotary"),
    ("mistral, window", None, {"sliding_window": WINDOW - 1}, 0, "self_attn", "attention output"),
]


@pytest.mark.parametrize("ours", [True, False], ids=["the model", "the reference"])
@pytest.mark.parametrize(("kind", "tensors", "config", "index", "module", "quantity"), IN_FOLDER, ids=a_name)
def test_a_folder_that_says_otherwise_is_named(tiny_model, tmp_path, kind, tensors, config, index, module, quantity, ours):
    base = tiny_model(kind=kind)
    folders = [base, changed(base, tmp_path / "faulty", tensors, config)]
    model, reference = folders[::-1] if ours else folders
    found = audit(model, reference=str(reference), bisect=True)
    assert named(found) == (index, f"model.layers.{index}.{module}", quantity)
