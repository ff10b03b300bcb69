"""A plan for a folder in 4 bits counts the layers that its config leaves dense, and its head, as they are held."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jax_medllm.mesh.layout import Layout, device_bytes
from jax_medllm.plan.programs import trace
from medllm.architecture import Architecture
from medllm.errors import UserError
from medllm.model.directory import ModelDirectory
from medllm.plan import planning
from medllm.plan.request import Request
from tests.small_model import small_config

SIZES = small_config(hidden_size=64, intermediate_size=128, num_layers=3, head_dim=16, tie_embeddings=False)
SKIPPED = ["model.layers.1.mlp.down_proj", "k_proj"]


def base_bytes(monkeypatch: pytest.MonkeyPatch, folder: Any, skipped: list[str] | None, layers: int = 3) -> int:
    """Of the base weights in the programs that a plan asks for."""
    settings = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    quantized = {"quantization_config": settings | {"llm_int8_skip_modules": skipped}}
    (folder / "config.json").write_text(json.dumps(SIZES.to_hf() | quantized))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(planning, "run_in_child", lambda module, task, given, **_: asked.update(given))
    request = Request(str(folder), target="cpu:1", length=32)
    model = Architecture.from_hf(SIZES.to_hf() | {"num_hidden_layers": layers})
    planning._compiled(request, planning.Target.parse("cpu:1"), model, None)
    stage = trace("cpt", json.loads(json.dumps(asked["settings"])), Layout.of("fsdp=1"))
    return device_bytes(stage.held["base"])


def test_what_a_config_leaves_dense_is_counted_beside_codes_of_zeros(monkeypatch, tmp_path):
    packed = base_bytes(monkeypatch, tmp_path, None)
    down, k, k_packed = 64 * 128, 32 * 64, 32 * 64 // 2 + 32 + 4 + 4  # codes, a scale a row, theirs, their mean
    found = base_bytes(monkeypatch, tmp_path, [*SKIPPED, "lm_head"])
    assert found - packed == 2 * down + 4 * 3 + 3 * (2 * k - k_packed)  # a place for each layer of down
    assert base_bytes(monkeypatch, tmp_path, SKIPPED) == found  # a packed head is held dense
    assert ModelDirectory(tmp_path).left_dense == {"k_proj": (0, 1, 2), "down_proj": (1,)}


def test_of_the_shallow_model_that_a_prediction_compiles_only_its_own_layers_count(monkeypatch, tmp_path):
    assert base_bytes(monkeypatch, tmp_path, SKIPPED[:1], 1) == base_bytes(monkeypatch, tmp_path, None, 1)


def test_a_quantization_that_is_not_read_is_not_planned_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES.to_hf() | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="quantization_config has quant_method 'gptq'"):
        ModelDirectory(tmp_path).left_dense  # noqa: B018
