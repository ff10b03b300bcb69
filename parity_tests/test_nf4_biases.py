"""Biases on every packed layer, as a Llama with ``attention_bias`` and ``mlp_bias`` has them: beside the codes, in full."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.read import load_model
from medllm.architecture import PROJECTIONS
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.model.adapter import merge_adapter, read_adapter, write_adapter
from medllm.model.directory import ModelDirectory
from medllm.quantization import Quantization
from medllm.stages.convert import convert_model
from parity_tests.both_stacks import check_greedy_texts, logits
from parity_tests.folders import Tensors, changed
from parity_tests.jax_results import open_trainable
from parity_tests.packed_rows import rows
from parity_tests.tolerances import FLOAT32_FORWARD, NF4_OWN_SCALES
from torch_ref.model import open_model

KIND = "llama, biased"
REAL = rows()[1] != 0


def config(path: Path, quantization: Quantization = "nf4", adapter: Path | None = None) -> ModelConfig:
    return ModelConfig(str(path), adapter=adapter and str(adapter), quantization=quantization, dtype="float32")


@pytest.mark.parametrize("quantization", ["nf4", "nf4-single"])
def test_a_folder_that_bitsandbytes_packed_has_transformers_logits(nf4_model, quantization):
    packed = nf4_model(kind=KIND, quantization=quantization)
    names = ModelDirectory(packed.path).names()
    assert sum(name.endswith(".bias") for name in names) == 2 * len(PROJECTIONS)
    opened = config(packed.path, quantization)
    FLOAT32_FORWARD.assert_close(logits(load_model(opened)), logits(open_model(opened)), "logits")


def test_packed_when_it_is_opened_it_has_the_logits_of_bitsandbytes_own_packing(tiny_model):
    opened = config(tiny_model(kind=KIND))
    NF4_OWN_SCALES.assert_close(logits(load_model(opened)), logits(open_model(opened)), "logits")


def test_an_adapter_comes_from_peft_and_goes_back_to_it(nf4_model, tiny_adapter, tmp_path):
    packed = nf4_model(kind=KIND)
    given = tiny_adapter(packed.dense, targets="all-linear")
    adapter = read_adapter(given)
    ours = open_trainable(packed.path, given, jnp.float32, "nf4")
    write_adapter(tmp_path / "ours", adapter.lora, adapter_tensors(ours), str(packed.path))
    theirs = logits(open_model(config(packed.path, adapter=tmp_path / "ours")))
    FLOAT32_FORWARD.assert_close(logits(ours), theirs, "trained")
    FLOAT32_FORWARD.assert_close(logits(load_model(config(packed.path, adapter=given))), theirs, "frozen")


def test_converted_it_is_opened_by_transformers_with_the_same_logits(tiny_model, tiny_adapter, tmp_path):
    base = tiny_model(kind=KIND)
    adapter = tiny_adapter(base, targets="all-linear")
    merge_adapter(base, adapter, tmp_path / "merged")
    convert_model(str(base), str(tmp_path / "packed"), [str(adapter)], quantization="nf4", dtype="float32")
    opened = config(tmp_path / "packed")
    found, packed_by_bitsandbytes = logits(load_model(opened)), logits(open_model(config(tmp_path / "merged")))
    FLOAT32_FORWARD.assert_close(found, logits(open_model(opened)), "logits")
    NF4_OWN_SCALES.assert_close(found, packed_by_bitsandbytes, "packed by bitsandbytes")
    dense, packed = ModelDirectory(base), ModelDirectory(tmp_path / "packed")
    for name in (name for name in dense.names() if name.endswith(".bias")):
        np.testing.assert_array_equal(packed.read(name), dense.read(name), err_msg=name)


@pytest.mark.parametrize("kind", [KIND, "qwen3", "mistral, window"])
def test_greedy_continuations_of_a_packed_folder_are_transformers_token_for_token(nf4_model, kind):
    check_greedy_texts(config(nf4_model(kind=kind).path), 12)


def drop_biases(held: Tensors) -> None:
    for name in [name for name in held if name.endswith("mlp.up_proj.bias")]:
        del held[name]


def test_a_bias_that_the_config_asks_for_and_the_folder_lacks_is_named(nf4_model, tmp_path):
    path = changed(nf4_model(kind=KIND).path, tmp_path / "model", drop_biases)
    for opening in (load_model, open_model):
        with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.bias"):
            opening(config(path))


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_biases_that_the_config_does_not_ask_for_are_named(nf4_model, tmp_path, field):
    path = changed(nf4_model(kind=KIND).path, tmp_path / "model", config={field: False})
    for opening in (load_model, open_model):
        with pytest.raises(UserError, match=r"_proj\.bias"):
            opening(config(path))
