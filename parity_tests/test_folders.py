"""Folders that say more than one thing: what transformers opens them as, both engines open them as, or refuse them by name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jax_medllm.model.partly_dense import PartlyDense
from jax_medllm.weights.read import load_model, model_tensors, read_model, write_quantized
from medllm.architecture import HEAD
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.model.adapter import merge_adapter
from medllm.model.directory import ModelDirectory
from medllm.model.files import INDEX, WEIGHTS
from medllm.quantization import Quantization
from parity_tests import torch_results
from parity_tests.both_stacks import check_greedy_texts, logits
from parity_tests.folders import (
    Tensors,
    changed,
    embedding_as_head,
    head_twice,
    own_head,
    partly_dense_model,
    with_another_prefix,
    without_prefix,
)
from parity_tests.jax_results import forward_and_backward, open_trainable
from parity_tests.oracle import float64_copy
from parity_tests.packed_rows import rows
from parity_tests.test_model import check_against_truth
from parity_tests.tolerances import FLOAT32_FORWARD
from torch_ref.model import open_model

UP = "model.layers.0.mlp.up_proj.weight"


def by_transformers(path: Path) -> np.ndarray:
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu"))


def opened_alike(path: Path, quantization: Quantization = "none") -> np.ndarray:
    """The logits of the JAX engine, held against the reference engine's."""
    config = ModelConfig(str(path), quantization=quantization, dtype="float32")
    ours, theirs = logits(load_model(config)), logits(open_model(config))
    FLOAT32_FORWARD.assert_close(ours, theirs, "logits")
    return ours


def assert_refused(path: Path, said: str, quantization: Quantization = "none") -> None:
    """Neither engine opens a folder, and both say this of it."""
    for opening in (load_model, open_model):
        with pytest.raises(UserError, match=said):
            opening(ModelConfig(str(path), quantization=quantization, dtype="float32"))


# --- an output matrix where the two tables are tied --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "plant"),
    [("qwen2", own_head), ("qwen3", own_head), ("llama", embedding_as_head), ("mistral", head_twice)],
)
def test_a_head_beside_a_tied_embedding_is_what_transformers_makes_of_it(tiny_model, tmp_path, kind, plant):
    tied = tiny_model(tied=True, kind=kind)
    path = changed(tied, tmp_path / "model", plant)
    ours = opened_alike(path)
    FLOAT32_FORWARD.assert_close(ours, by_transformers(path), "logits")
    same = float(np.abs(ours - by_transformers(tied)).max()) < 1e-3
    assert same == (plant is not own_head)


def test_a_head_of_its_own_survives_conversion_and_merging(tiny_model, tiny_adapter, tmp_path):
    tied = tiny_model(tied=True)
    path = changed(tied, tmp_path / "model", own_head)
    head = load_file(path / WEIGHTS)[HEAD].numpy()
    write_quantized(path, tmp_path / "packed", "nf4", "float32")
    merge_adapter(path, tiny_adapter(tied), tmp_path / "merged")
    for out in (tmp_path / "packed", tmp_path / "merged"):
        directory = ModelDirectory(out)
        np.testing.assert_array_equal(directory.read(HEAD), head)
        assert directory.config["tie_word_embeddings"] is False
    opened_alike(tmp_path / "packed", "nf4")
    merge_adapter(changed(tied, tmp_path / "twice", head_twice), tiny_adapter(tied), tmp_path / "once")
    assert HEAD not in ModelDirectory(tmp_path / "once")
    assert ModelDirectory(tmp_path / "once").config["tie_word_embeddings"] is True


# --- names and files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", [without_prefix, with_another_prefix])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_prefix_that_transformers_mends_is_mended(tiny_model, nf4_model, tmp_path, plant, quantization):
    stock = tiny_model() if quantization == "none" else nf4_model().path
    path = changed(stock, tmp_path / "model", plant)
    np.testing.assert_array_equal(opened_alike(path, quantization), opened_alike(stock, quantization))
    if quantization == "none":
        FLOAT32_FORWARD.assert_close(opened_alike(path), by_transformers(path), "logits")


def test_two_tensors_that_are_opened_as_one_are_refused(tiny_model, tmp_path):
    path = changed(tiny_model(), tmp_path / "model", lambda held: held.update({UP.removeprefix("model."): 2 * held[UP]}))
    assert_refused(path, r"layers\.0\.mlp\.up_proj\.weight are the same tensor to transformers")


def test_one_file_goes_before_an_index(tiny_model, tmp_path):
    path = changed(tiny_model(), tmp_path / "model")
    held = load_file(path / WEIGHTS)
    save_file({name: 2 * tensor for name, tensor in held.items()}, path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "model-00001-of-00001.safetensors")}
    (path / INDEX).write_text(json.dumps(index))
    FLOAT32_FORWARD.assert_close(opened_alike(path), by_transformers(path), "logits")
    (path / WEIGHTS).unlink()
    FLOAT32_FORWARD.assert_close(opened_alike(path), by_transformers(path), "logits")


def test_what_a_shard_holds_and_the_index_does_not_name_is_refused(tiny_model, tmp_path):
    path = changed(tiny_model(tied=True), tmp_path / "model", own_head)
    shard = "model-00001-of-00001.safetensors"
    (path / WEIGHTS).rename(path / shard)
    names = [name for name in load_file(path / shard) if name != HEAD]  # transformers reads all of a shard
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    assert_refused(path, rf"{shard}: holds {HEAD}, which {INDEX} does not place here")


def test_weights_under_another_name_are_refused(tiny_model, tmp_path):
    path = changed(tiny_model(), tmp_path / "model", config={"transformers_weights": "other.safetensors"})
    assert_refused(path, "transformers_weights names other.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotary_frequencies_of_old_checkpoints_are_looked_at(tiny_model, tmp_path, dtype):
    def buffers(theta: float, held: Tensors) -> None:
        frequencies = (1 / theta ** (torch.arange(0, 16, 2) / 16)).to(dtype)
        held |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in range(2)}

    same = changed(tiny_model(), tmp_path / "same", partial(buffers, 1e4))
    FLOAT32_FORWARD.assert_close(opened_alike(same), by_transformers(same), "logits")
    other = changed(tiny_model(), tmp_path / "other", partial(buffers, 1e6))
    assert_refused(other, r"model\.layers\.0\.self_attn\.rotary_emb\.inv_freq holds other frequencies .*rope_theta 10000")


@pytest.mark.parametrize("old", [{"type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}, None], ids=str)
def test_of_two_spellings_of_positions_the_one_counts_that_transformers_takes(tiny_model, tmp_path, old):
    new = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
    path = changed(tiny_model(), tmp_path / "model", config={"rope_parameters": new, "rope_scaling": old})
    FLOAT32_FORWARD.assert_close(opened_alike(path), by_transformers(path), "logits")


# --- quantization_config -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partly_dense(tiny_model, tmp_path_factory) -> Path:
    return partly_dense_model(tiny_model(layers=3), tmp_path_factory.mktemp("partly") / "model")


def test_what_is_stored_dense_stays_dense(partly_dense):
    opened_alike(partly_dense, "nf4")
    model = load_model(ModelConfig(str(partly_dense), quantization="nf4", dtype="float32"))
    linear = {**vars(model.layers.mlp), **vars(model.layers.self_attn)}
    whole = {name for name, one in linear.items() if getattr(one, "weight", None) is not None}
    some = {name: one.dense.numbers for name, one in linear.items() if isinstance(one, PartlyDense)}
    assert whole == {"v_proj"}
    assert some == {"gate_proj": (0,), "up_proj": (0,), "down_proj": (0, 2), "o_proj": (1,)}
    stock = load_file(partly_dense / WEIGHTS)
    np.testing.assert_array_equal(np.asarray(model.layers.mlp.up_proj.dense.weight[...]), stock[UP].numpy()[None])


def test_what_is_stored_dense_among_packed_layers_goes_out_as_it_came(partly_dense):
    directory = ModelDirectory(partly_dense)
    written = dict(model_tensors(read_model(directory, quantization="nf4")))
    stock = dict(open_model(ModelConfig(str(partly_dense), quantization="nf4", dtype="float32")).named_modules())
    assert written.keys() == directory.architecture.tensors.keys()
    for name, tensor in written.items():
        held = stock[name.removesuffix(".weight").removesuffix(".bias")]
        if name.endswith("weight") and type(held).__name__ == "Linear4bit":
            expected = bnb.dequantize_4bit(held.weight.data, held.weight.quant_state).numpy()
        else:
            expected = directory.read(name)
        np.testing.assert_array_equal(tensor, expected, err_msg=name)


def test_training_over_dense_layers_among_packed_ones_equals_float64_arithmetic(
    float64, partly_dense, tiny_model, tiny_adapter
):
    adapter = tiny_adapter(tiny_model(layers=3), targets="all-linear")
    stock = open_model(ModelConfig(str(partly_dense), quantization="nf4", dtype="float32"))
    truth = torch_results.forward_and_backward(float64_copy(stock, adapter, trainable=True), rows())
    found = forward_and_backward(open_trainable(partly_dense, adapter, jnp.float64, "nf4"), rows())
    check_against_truth(found, truth, rows()[1])


def test_greedy_texts_over_dense_layers_among_packed_ones_are_transformers(partly_dense):
    check_greedy_texts(ModelConfig(str(partly_dense), quantization="nf4", dtype="float32"), 8)


def test_a_layer_that_is_not_stored_as_the_config_says_is_refused(nf4_model, tmp_path):
    packed = nf4_model()

    def dense(held: Tensors) -> None:
        for name in [name for name in held if name.startswith(UP)]:
            del held[name]
        held[UP] = load_file(packed.dense / WEIGHTS)[UP]

    assert_refused(
        changed(packed.path, tmp_path / "dense", dense), rf"{UP} is stored dense, and config\.json says otherwise", "nf4"
    )
    settings = ModelDirectory(packed.path).config["quantization_config"] | {"llm_int8_skip_modules": ["lm_head", "up_proj"]}
    skipped = changed(packed.path, tmp_path / "skipped", config={"quantization_config": settings})
    assert_refused(skipped, rf"{UP} is stored in 4 bits, and config\.json says otherwise", "nf4")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"),
        ("load_in_4bit", False),
        ("bnb_4bit_blocksize", 128),
        ("llm_int8_skip_modules", "lm_head"),
        ("llm_int8_skip_modules", ["("]),
    ],
)
def test_a_field_that_is_not_read_is_refused(nf4_model, tmp_path, field, value):
    packed = nf4_model().path
    settings = ModelDirectory(packed).config["quantization_config"] | {field: value}
    assert_refused(
        changed(packed, tmp_path / "model", config={"quantization_config": settings}), rf"config\.json: .*{field}", "nf4"
    )


def test_scales_are_what_each_weight_says_of_them(nf4_model, tmp_path):
    packed = nf4_model().path
    settings = ModelDirectory(packed).config["quantization_config"] | {"bnb_4bit_use_double_quant": False}
    path = changed(packed, tmp_path / "model", config={"quantization_config": settings})
    np.testing.assert_array_equal(opened_alike(path, "nf4"), opened_alike(packed, "nf4"))
    assert_refused(path, "stored as nf4; open this model with --model.quantization nf4$", "nf4-single")


def test_a_config_without_a_quantization_is_quantized_when_asked(tiny_model, tmp_path):
    path = changed(tiny_model(), tmp_path / "model", config={"quantization_config": None})
    model = open_model(ModelConfig(str(path), quantization="nf4", dtype="float32"))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_a_4bit_folder_is_computed_in_the_type_that_is_asked_for(tiny_model, tmp_path, stored):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=stored)
    packed = AutoModelForCausalLM.from_pretrained(tiny_model(stored), dtype=stored, quantization_config=settings)
    packed.save_pretrained(tmp_path / "model")
    model = open_model(ModelConfig(str(tmp_path / "model"), quantization="nf4-single", dtype="float32"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    opened_alike(tmp_path / "model", "nf4-single")


# --- numbers that are none ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_written(tiny_model, tiny_adapter, tmp_path, name, wrong):
    base = tiny_model()

    def plant(held: Tensors) -> None:
        held[name].view(-1)[3] = wrong

    path = changed(base, tmp_path / "model", plant)
    before = sorted(tmp_path.iterdir())
    packing = partial(write_quantized, path, tmp_path / "out", "nf4")
    merging = partial(merge_adapter, path, tiny_adapter(base), tmp_path / "out")
    for write in (packing, merging):
        with pytest.raises(UserError, match=rf"{name} .*NaN or infinity"):
            write()
        assert sorted(tmp_path.iterdir()) == before


def test_a_sum_too_large_for_its_type_is_not_written(tiny_model, tiny_adapter, tmp_path):
    base = tiny_model(torch.float16)
    adapter = tiny_adapter(base, alpha=1e9)
    with pytest.raises(UserError, match=r"_proj\.weight would hold NaN or infinity: .*too large for float16"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
