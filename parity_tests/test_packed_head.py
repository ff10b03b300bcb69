"""An output matrix in 4 bits, which transformers packs where no list keeps it from it: both engines, training, the audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from jax_medllm.weights import read
from jax_medllm.weights.read import load_model, read_model
from medllm.architecture import HEAD
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.model.directory import ModelDirectory
from medllm.quantization import Quantization
from medllm.stage_config import AuditConfig
from medllm_parity.audit import run_audit
from parity_tests import torch_results
from parity_tests.both_stacks import check_greedy_texts, logits
from parity_tests.folders import Tensors, changed, packed_head_model
from parity_tests.jax_results import forward_and_backward, open_trainable
from parity_tests.oracle import float64_copy
from parity_tests.packed_rows import rows
from parity_tests.test_model import check_against_truth
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT32_GRADIENT
from torch_ref.model import open_continued, open_model

REAL = rows()[1] != 0
SIZES = {"kind": "llama", "hidden": 192}  # 288 blocks in the head: two blocks of scales, the second cut short


@pytest.fixture(scope="module")
def dense(tiny_model) -> Path:
    return tiny_model(**SIZES)


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory) -> Callable[[Quantization], Path]:
    """The folder of a kind."""
    folder = tmp_path_factory.mktemp("packed-head")
    return {kind: packed_head_model(dense, folder / kind, double=kind == "nf4") for kind in ("nf4", "nf4-single")}.__getitem__


def config(path: Path, quantization: Quantization = "nf4") -> ModelConfig:
    return ModelConfig(str(path), quantization=quantization, dtype="float32")


@pytest.mark.parametrize("kind", ["nf4", "nf4-single"])
def test_its_logits_are_transformers_and_its_numbers_bitsandbytes_bit_for_bit(packed, kind, monkeypatch):
    monkeypatch.setattr(read, "_PIECE", 192 * 40)  # three pieces, the last of them shorter
    opened = config(packed(kind), kind)
    stock = open_model(opened)
    assert type(stock.lm_head).__name__ == "Linear4bit"
    found = load_model(opened)
    expected = bnb.dequantize_4bit(stock.lm_head.weight.data, stock.lm_head.weight.quant_state)
    np.testing.assert_array_equal(np.asarray(found.lm_head.weight[...]), expected.numpy())
    FLOAT32_FORWARD.assert_close(logits(found), logits(stock), "logits")


def test_it_is_held_in_the_type_of_the_model(packed):
    model = read_model(ModelDirectory(packed("nf4")), quantization="nf4", dtype=jnp.bfloat16)
    stock = open_model(ModelConfig(str(packed("nf4")), quantization="nf4", dtype="bfloat16")).lm_head.weight
    stock.quant_state.dtype = torch.bfloat16
    expected = bnb.dequantize_4bit(stock.data, stock.quant_state).float().numpy()
    assert model.lm_head.weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(model.lm_head.weight[...], np.float32), expected)


def test_training_over_it_equals_float64_arithmetic_on_its_dequantized_weights(float64, packed, dense, tiny_adapter):
    adapter = tiny_adapter(dense, targets="all-linear")
    truth = torch_results.forward_and_backward(float64_copy(open_model(config(packed("nf4"))), adapter, trainable=True), rows())
    found = forward_and_backward(open_trainable(packed("nf4"), adapter, jnp.float64, "nf4"), rows())
    check_against_truth(found, truth, rows()[1])


def test_the_reference_engine_trains_over_it_too(packed, dense, tiny_adapter):
    adapter = tiny_adapter(dense, targets="all-linear")
    opened = dataclasses.replace(config(packed("nf4")), adapter=str(adapter))
    theirs = torch_results.forward_and_backward(open_continued(opened), rows())
    ours = forward_and_backward(open_trainable(packed("nf4"), adapter, jnp.float32, "nf4"), rows())
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        FLOAT32_GRADIENT.assert_close(gradient, theirs.gradients[name], name)


def test_greedy_continuations_are_transformers_token_for_token(packed):
    check_greedy_texts(config(packed("nf4")), 8)


def test_a_config_that_ties_it_is_read_as_transformers_reads_it(packed, tmp_path):
    """A packed head is no embedding: the two stay two tables."""
    path = changed(packed("nf4"), tmp_path / "model", config={"tie_word_embeddings": True})
    found = logits(load_model(config(path)))
    FLOAT32_FORWARD.assert_close(found, logits(open_model(config(path))), "logits")
    np.testing.assert_array_equal(found, logits(load_model(config(packed("nf4")))))


def test_a_tied_head_that_the_list_does_not_keep_dense_is_refused_by_both_engines(tiny_model, tmp_path):
    """transformers opens such a folder, and fails when it computes."""
    path = packed_head_model(tiny_model(tied=True), tmp_path / "model")
    assert HEAD not in ModelDirectory(path)
    for opening in (load_model, open_model):
        with pytest.raises(UserError, match=r"llm_int8_skip_modules does not name lm_head, which is tied .* add lm_head"):
            opening(config(path))


def test_scales_that_are_not_finite_are_refused(packed, tmp_path):
    def plant(held: Tensors) -> None:
        held[f"{HEAD}.absmax"].view(-1)[3] = float("nan")

    path = changed(packed("nf4-single"), tmp_path / "model", plant)
    with pytest.raises(UserError, match=rf"{HEAD} holds NaN or infinity"):
        load_model(config(path, "nf4-single"))


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax"])
def test_another_model_of_the_head_is_found_by_the_audit(packed, tmp_path, part):
    def plant(held: Tensors) -> None:
        held[f"{HEAD}{part}"].view(torch.uint8).view(-1)[1] ^= 16

    path = changed(packed("nf4"), tmp_path / "model", plant)
    first = audited(packed("nf4"), reference=str(path), bisect=True).first_divergence
    assert (first.module, first.quantity) == ("lm_head", "logits")


def test_the_audit_passes_a_sound_one_with_an_adapter(packed, dense, tiny_adapter):
    found = audited(packed("nf4"), adapter=str(tiny_adapter(dense, targets="all-linear")))
    assert found.ok, found.first_divergence
    assert "gradient of lora_A" in {check.quantity for check in found.checks}


def test_the_audit_names_a_head_that_is_misread(packed, jax_engine):
    stock = read.dequantize_rows
    jax_engine.setattr("medllm_parity.tables.dequantize_rows", lambda codes, *given: stock(codes ^ 16, *given))
    first = audited(packed("nf4"), bisect=True).first_divergence
    assert (first.module, first.quantity, first.stack) == ("lm_head", "logits", "jax")


def audited(path: Path, *, bisect: bool = False, reference: str | None = None, adapter: str | None = None):
    model = ModelConfig(str(path), adapter=adapter, quantization="nf4", dtype="float32")
    return run_audit(AuditConfig(model, reference=reference, rows=3, tokens=24, bisect=bisect))
