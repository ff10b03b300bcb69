"""``medllm parity``: faults planted one at a time are named by layer and quantity, and sound models pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from jax_medllm.model import attention, linear, nf4
from jax_medllm.model import decoder as model
from jax_medllm.weights.read import read_model
from medllm.config import ModelConfig
from medllm.mini.study import BASE
from medllm.model.adapter import merge_adapter, read_adapter, write_adapter
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.tokenizer import load_tokenizer
from medllm.stage_config import AuditConfig
from medllm_parity import audit as audits
from medllm_parity.audit import run_audit
from medllm_parity.measure import Audit
from medllm_parity.rows import make_rows
from parity_tests.oracle import float64_model, row_logits
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT64_FORWARD
from torch_ref.model import open_model

LAYERS = 3
ROWS = {"rows": 3, "tokens": 24}
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(layers=LAYERS)


@pytest.fixture(scope="session")
def adapter(base: Path, tiny_adapter: Callable[..., Path]) -> Path:
    return tiny_adapter(base)


def audit(path: Path, **settings: Any) -> Audit:
    opened = {name: settings.pop(name) for name in ("adapter", "quantization") if name in settings}
    return run_audit(AuditConfig(ModelConfig(str(path), dtype=settings.pop("dtype", "float32"), **opened), **ROWS, **settings))


def changed(
    base: Path, out: Path, tensors: Callable[[Tensors], Any] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """``base`` written again with a fault in its tensors or in its config."""
    directory = ModelDirectory(base)
    found = {name: directory.read(name).copy() for name in directory.names()}
    if tensors is not None:
        tensors(found)
    write_model(out, directory.config | dict(config or {}), found.items(), companions_from=base)
    return out


def layer(index: int, module: str, leaf: str = "weight") -> str:
    return f"model.layers.{index}.{module}.{leaf}"


# --- a sound model passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-single"])
def test_a_sound_model_with_an_adapter_passes_every_check(base, adapter, dtype, quantization):
    found = audit(base, adapter=str(adapter), dtype=dtype, quantization=quantization)
    assert found.ok, found.first_divergence
    assert found.to_json()["first_divergence"] is None
    names = {check.name for check in found.checks}
    for expected in ("k after rotary", "k after rotary (adapter off)", "down"):
        module = "mlp.down_proj" if expected == "down" else "self_attn"
        assert {f"model.layers.{index}.{module}: {expected}" for index in range(LAYERS)} <= names
    assert ("model.layers.0: nf4 codes" in names) == (quantization != "none")
    assert ("model.layers.0: nf4 scale codes" in names) == (quantization == "nf4")
    assert ("model.layers.0: nf4 scales" in names) == (quantization == "nf4-single")
    gradients = [check for check in found.checks if check.quantity.startswith("gradient of lora")]
    assert len(gradients) == LAYERS * 7 * 2
    assert all(check.reference_error > 0 for check in gradients)


def test_tied_tables_and_several_adapters_pass(tiny_model, tiny_adapter):
    tied = tiny_model(tied=True, kv_heads=1)
    adapters = (str(tiny_adapter(tied, seed=1)), str(tiny_adapter(tied, rank=2, targets=("k_proj", "up_proj"), seed=2)))
    assert audit(tied, adapter=adapters).ok


def test_layer_by_layer_both_stacks_compute_what_they_compute_as_a_whole(base, adapter, monkeypatch):
    """The final states of the sweep are those of transformers' whole model, of the JAX model, and of the float64 oracle."""
    kept = []
    head = audits.ends.head
    monkeypatch.setattr(audits.ends, "head", lambda *given: kept.append(given[2]) or head(*given))
    audit(base, adapter=str(adapter))
    states = kept[0]
    rows = make_rows(np.random.default_rng(0).integers(0, 96, 72), **ROWS)
    given = (rows.tokens, rows.segment_ids, rows.positions)
    table = torch.from_numpy(ModelDirectory(base).read("lm_head.weight"))
    with torch.no_grad():
        whole = row_logits(open_model(ModelConfig(str(base), adapter=str(adapter), dtype="float32")), *given)
        assert torch.equal(states.torch[:3] @ table.T, whole)
        FLOAT64_FORWARD.assert_close(
            states.truth[:3] @ table.double().T, row_logits(float64_model(base, adapter), *given), "truth"
        )
    product = read_model(ModelDirectory(base), adapter=read_adapter(adapter))
    hidden = product.hidden(jnp.asarray(rows.tokens), segment_ids=rows.segment_ids, positions=rows.positions)
    FLOAT32_FORWARD.assert_close(states.jax[:3], hidden, "JAX")


# --- faults in a saved checkpoint ------------------------------------------------------------------------------------------


def swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def scale(name: str, factor: float) -> Callable[[Tensors], None]:
    def plant(tensors: Tensors) -> None:
        tensors[name] *= np.float32(factor)

    return plant


def swap_heads(tensors: Tensors) -> None:
    for leaf in ("weight", "bias"):
        name = layer(1, "self_attn.q_proj", leaf)
        heads = tensors[name].reshape(4, 16, -1)
        tensors[name] = np.ascontiguousarray(heads[[0, 2, 1, 3]]).reshape(tensors[name].shape)


def one_row(name: str, row: int) -> Callable[[Tensors], None]:
    def plant(tensors: Tensors) -> None:
        tensors[name][row] *= np.float32(1.01)

    return plant


def one_weight(tensors: Tensors) -> None:
    tensors[layer(2, "mlp.down_proj")][5, 7] += np.float32(0.01)


def transpose(tensors: Tensors) -> None:
    name = layer(0, "self_attn.o_proj")
    tensors[name] = np.ascontiguousarray(tensors[name].T)


IN_TENSORS = [
    (scale(layer(1, "self_attn.k_proj", "bias"), 0), 1, "self_attn.k_proj", "k before rotary"),
    (scale(layer(2, "self_attn.v_proj", "bias"), 1.001), 2, "self_attn.v_proj", "v"),
    (lambda t: swap(t, layer(2, "mlp.gate_proj"), layer(2, "mlp.up_proj")), 2, "mlp.gate_proj", "gate"),
    (scale(layer(1, "mlp.up_proj"), 1.0001), 1, "mlp.up_proj", "up"),
    (scale(layer(2, "input_layernorm"), 1.0001), 2, "input_layernorm", "input norm"),
    (scale(layer(0, "post_attention_layernorm"), 1.0001), 0, "post_attention_layernorm", "post-attention norm"),
    (transpose, 0, "self_attn.o_proj", "o_proj output"),
    (swap_heads, 1, "self_attn.q_proj", "q before rotary"),
    (one_weight, 2, "mlp.down_proj", "down"),
]
AROUND_LAYERS = [
    (one_row("model.embed_tokens.weight", 17), "model.embed_tokens", "embedding", "token 17"),
    (one_row("lm_head.weight", 23), "lm_head", "logits", "token 23"),
    (scale("model.norm.weight", 1.0001), "model.norm", "final norm", ""),
]
IN_CONFIG = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10010.0}}, "self_attn", "q after rotary"),
    ({"rms_norm_eps": 1.2e-5}, "input_layernorm", "input norm"),
]


def named(found: Audit) -> tuple[int | None, str, str]:
    """Layer, module and quantity of the first divergence, and that the bisection stopped there."""
    first = found.first_divergence
    assert first is not None
    assert found.stopped
    assert found.checks[-1] is first
    assert first.error > first.tolerance
    return first.layer, first.module, first.quantity


def a_name(value: Any) -> str:
    """Of a test's parameter, the same in every process: no addresses of functions."""
    return getattr(value, "__name__", str(value))[-24:]


@pytest.mark.parametrize(("plant", "index", "module", "quantity"), IN_TENSORS, ids=a_name)
def test_a_changed_tensor_is_named(base, tmp_path, plant, index, module, quantity):
    faulty = changed(base, tmp_path / "faulty", plant)
    found = audit(faulty, reference=str(base), bisect=True)
    assert named(found) == (index, f"model.layers.{index}.{module}", quantity)


@pytest.mark.parametrize(("plant", "module", "quantity", "where"), AROUND_LAYERS, ids=a_name)
def test_a_change_outside_the_layers_is_named(base, tmp_path, plant, module, quantity, where):
    found = audit(changed(base, tmp_path / "faulty", plant), reference=str(base), bisect=True)
    assert named(found) == (None, module, quantity)
    assert where in found.first_divergence.where


@pytest.mark.parametrize(("config", "module", "quantity"), IN_CONFIG, ids=a_name)
def test_a_changed_setting_is_named(base, tmp_path, config, module, quantity):
    found = audit(changed(base, tmp_path / "faulty", config=config), reference=str(base), bisect=True)
    assert named(found) == (0, f"model.layers.0.{module}", quantity)


def test_the_fault_may_be_in_the_reference_just_as_well(base, tmp_path):
    faulty = changed(base, tmp_path / "faulty", scale(layer(1, "self_attn.k_proj", "bias"), 0))
    found = audit(base, reference=str(faulty), bisect=True)
    assert named(found) == (1, "model.layers.1.self_attn.k_proj", "k before rotary")


def test_without_bisection_all_of_it_is_audited_and_later_layers_are_cleared(base, tmp_path):
    faulty = changed(base, tmp_path / "faulty", scale(layer(1, "self_attn.k_proj", "bias"), 0))
    found = audit(faulty, reference=str(base))
    wrong = {check.layer for check in found.checks if not check.ok}
    assert wrong == {1, None}  # the layer, and the logits of the whole model
    assert not found.stopped
    drift = {(d.layer, d.quantity): d.jax for d in found.drift}
    assert drift[0, "layer output"] < 1e-5 < 1e-3 < drift[2, "layer output"]


def test_a_scale_of_a_4_bit_checkpoint_is_named(base, tmp_path):
    open_model(ModelConfig(str(base), quantization="nf4", dtype="float32")).save_pretrained(tmp_path / "packed")
    name = layer(1, "mlp.down_proj", "weight.absmax")

    def plant(tensors: Tensors) -> None:
        tensors[name][40] += 1  # a step of the dynamic map in one block of 64 weights

    faulty = changed(tmp_path / "packed", tmp_path / "faulty", plant)
    assert audit(tmp_path / "packed", quantization="nf4").ok
    found = audit(faulty, quantization="nf4", reference=str(tmp_path / "packed"), bisect=True)
    assert named(found) == (1, "model.layers.1.mlp.down_proj", "down")


def test_another_tokenizer_is_named_before_anything_is_computed(tmp_path):
    shutil.copytree(BASE, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    vocab = settings["model"]["vocab"]
    first, second = (piece for piece, index in vocab.items() if index in (300, 301))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "text.txt").write_text(load_tokenizer(BASE).decode([400, 300, 500]), encoding="utf-8")
    found = audit(BASE, reference=str(tmp_path / "other"), text=str(tmp_path / "text.txt"), bisect=True)
    assert named(found) == (None, "tokenizer", "token ids")
    assert len(found.checks) == 1


def test_a_merged_model_is_its_base_with_the_adapter(base, adapter, tmp_path):
    merge_adapter(base, adapter, tmp_path / "merged")
    assert audit(tmp_path / "merged", reference=str(base), reference_adapter=str(adapter)).ok
    assert not audit(tmp_path / "merged", reference=str(base)).ok


# --- faults in an adapter --------------------------------------------------------------------------------------------------


def test_another_alpha_is_named(base, adapter, tmp_path):
    given = read_adapter(adapter)
    write_adapter(tmp_path / "faulty", replace(given.lora, alpha=given.lora.alpha * 1.01), given.tensors, str(base))
    found = audit(base, adapter=str(tmp_path / "faulty"), reference_adapter=str(adapter), bisect=True)
    assert named(found) == (0, "model.layers.0.self_attn.q_proj", "q before rotary")


def test_a_matrix_of_an_adapter_is_named(base, adapter, tmp_path):
    given = read_adapter(adapter)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors = {key: value * (key != name) for key, value in given.tensors.items()}
    write_adapter(tmp_path / "faulty", given.lora, tensors, str(base))
    found = audit(base, adapter=str(tmp_path / "faulty"), reference_adapter=str(adapter))
    assert found.first_divergence.name == "model.layers.1.self_attn.v_proj: v"
    assert all(check.ok for check in found.checks if "adapter off" in check.name)


# --- faults in an engine ---------------------------------------------------------------------------------------------------


def mask_off_by_one(self: attention.Visibility, queries: jax.Array, keys: jax.Array) -> jax.Array:
    return (self.segments[:, queries, None] == self.segments[:, None, keys]) & (keys <= queries[:, None] + 1)


def heads_in_turn(q: jax.Array, k: jax.Array, v: jax.Array, visible: attention.Visibility) -> jax.Array:
    order = np.argsort(np.arange(q.shape[2]) % k.shape[2], kind="stable")
    return attention.attend(q[:, :, order], k, v, visible)[:, :, np.argsort(order)]


def interleaved(self: Any, heads: jax.Array) -> jax.Array:
    turned = jnp.stack([-heads[..., 1::2], heads[..., 0::2]], axis=-1).reshape(heads.shape)
    return heads * self.cos[:, :, None] + turned * self.sin[:, :, None]


def unscaled(self: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return self.A[...].astype(dtype), self.B[...].astype(dtype)


def gelu(self: Any, x: jax.Array, adapter: bool) -> jax.Array:
    return self.down_proj(jax.nn.gelu(self.gate_proj(x, adapter=adapter)) * self.up_proj(x, adapter=adapter), adapter=adapter)


def low_nibble_first(packed: jax.Array, scales: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return nf4.dequantize_halves(packed << 4 | packed >> 4, scales, dtype)


IN_JAX = [
    (attention.Visibility, "mask", mask_off_by_one, {}, "self_attn", "attention output"),
    (model, "attend", heads_in_turn, {}, "self_attn", "attention output"),
    (model.Rotary, "__call__", interleaved, {}, "self_attn", "q after rotary"),
    (linear.Lora, "matrices", unscaled, {"adapter": True}, "self_attn.q_proj", "q before rotary"),
    (model.Mlp, "__call__", gelu, {}, "mlp", "activation product"),
    (linear, "dequantize_halves", low_nibble_first, {"quantization": "nf4"}, "self_attn.q_proj", "q before rotary"),
]


@pytest.mark.parametrize(("owner", "name", "fault", "settings", "module", "quantity"), IN_JAX, ids=a_name)
def test_a_fault_of_the_jax_engine_is_named(jax_engine, base, adapter, owner, name, fault, settings, module, quantity):
    jax_engine.setattr(owner, name, fault)
    settings = {key: str(adapter) if key == "adapter" else value for key, value in settings.items()}
    found = audit(base, **settings, bisect=True)
    assert named(found) == (0, f"model.layers.0.{module}", quantity)
    assert found.first_divergence.stack == "jax"


def test_a_fault_of_a_backward_pass_alone_is_named(jax_engine, base, adapter):
    stock = attention.attend
    jax_engine.setattr(model, "attend", lambda q, k, v, visible: stock(q, jax.lax.stop_gradient(k), v, visible))
    found = audit(base, adapter=str(adapter), bisect=True)
    assert named(found) == (LAYERS - 1, "model.layers.2.self_attn.k_proj", "gradient of lora_B")


def test_a_fault_of_the_torch_stack_is_called_its_own(monkeypatch, base):
    monkeypatch.setattr(modeling_qwen2, "rotate_half", lambda x: x.flip(-1))
    stock = audits.TorchLayer.lift

    def lift(self):
        monkeypatch.undo()  # the truth computes soundly
        stock(self)

    monkeypatch.setattr(audits.TorchLayer, "lift", lift)
    found = audit(base, bisect=True)
    assert named(found) == (0, "model.layers.0.self_attn", "q after rotary")
    assert found.first_divergence.stack == "torch"
