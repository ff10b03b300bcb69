"""4-bit directories, in and out: what ``save_pretrained`` writes is read as it is, what we write ``from_pretrained`` opens."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.quantized_weight import KINDS
from jax_medllm.weights.bnb_files import packed_config, packed_parts
from jax_medllm.weights.read import load_model, model_tensors, read_model, write_quantized
from medllm.config import ALL_LINEAR, ModelConfig
from medllm.errors import UserError
from medllm.model.adapter import module_name
from medllm.model.directory import ModelDirectory, write_model
from medllm.quantization import Quantization
from parity_tests.jax_results import jax_loss
from parity_tests.oracle import row_logits
from parity_tests.packed_rows import rows
from parity_tests.tolerances import FLOAT32_FORWARD, NF4_OWN_SCALES
from torch_ref.model import open_model


def opened(path: Path, dtype: torch.dtype, **settings) -> torch.nn.Module:
    """A model as transformers and bitsandbytes open it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="cpu", **settings)


def quantized(path: Path, dtype: torch.dtype, quantization: Quantization = "nf4", **settings) -> torch.nn.Module:
    double = quantization == "nf4"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double} | settings
    return opened(path, dtype, quantization_config=BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype))


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor in a directory."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), framework="np") as stream:
            for name in stream.keys():  # noqa: SIM118
                part = stream.get_slice(name)
                tensors[name] = part.get_dtype(), tuple(part.get_shape()), stream.get_tensor(name).tobytes()
    return tensors


def check_stored(found: Path, expected: Path) -> None:
    ours, theirs = stored(found), stored(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def packed_tensors(model: DenseDecoder) -> dict[str, np.ndarray]:
    """What a model holds, as bitsandbytes stores it."""
    packed: dict[str, np.ndarray] = {}
    for kind in ALL_LINEAR:
        names = [f"{module_name(layer, kind)}.weight" for layer in range(model.config.num_layers)]
        block = getattr(model.layers, names[0].split(".")[3])
        stack = getattr(block, kind).quantized.value()
        for layer, name in enumerate(names):
            packed |= dict(packed_parts(name, jax.tree.map(lambda part, layer=layer: part[layer], stack), model.dtype))
    return {name: value for name, value in model_tensors(model) if name not in packed} | packed


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return row_logits(model, *rows()).numpy()


def real_tokens() -> np.ndarray:
    return rows()[1] != 0


@pytest.mark.parametrize("quantization", KINDS)
def test_a_bitsandbytes_directory_loads_bit_for_bit_and_has_pefts_logits(tiny_model, tiny_adapter, tmp_path, quantization):
    base = tiny_model(kv_heads=4)
    adapter = tiny_adapter(base)
    stock = open_model(ModelConfig(path=str(base), quantization=quantization, dtype="float32"))
    stock.save_pretrained(tmp_path / "packed")
    packed = ModelConfig(str(tmp_path / "packed"), adapter=str(adapter), quantization=quantization, dtype="float32")
    reference, model = open_model(packed), load_model(packed)

    dense = dict(model_tensors(read_model(ModelDirectory(tmp_path / "packed"), quantization=quantization)))
    for name, module in stock.named_modules():
        if f"{name}.weight" in dense and hasattr(module.weight, "quant_state"):
            expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            np.testing.assert_array_equal(dense[f"{name}.weight"], expected.numpy())

    _, logits = jax_loss(model, *rows())
    FLOAT32_FORWARD.assert_close(logits[real_tokens()], logits_of(reference)[real_tokens()], "logits")


def test_a_model_quantized_here_has_the_logits_of_one_quantized_by_bitsandbytes(tiny_model):
    config = ModelConfig(str(tiny_model(layers=3)), quantization="nf4", dtype="float32")
    _, logits = jax_loss(load_model(config), *rows())
    NF4_OWN_SCALES.assert_close(logits[real_tokens()], logits_of(open_model(config))[real_tokens()], "logits")


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sharded_4bit_directory_of_any_type_comes_back_byte_for_byte(tiny_model, tmp_path, dtype, tied, quantization):
    quantized(tiny_model(dtype, tied=tied), dtype, quantization).save_pretrained(tmp_path / "theirs", max_shard_size="12kB")
    directory = ModelDirectory(tmp_path / "theirs")
    assert len(list(directory.path.glob("*.safetensors"))) > 3
    type_name = str(dtype).removeprefix("torch.")
    model = read_model(directory, quantization=quantization, dtype=jnp.dtype(type_name))
    write_model(tmp_path / "ours", packed_config(directory.config, quantization, type_name), packed_tensors(model).items())
    check_stored(tmp_path / "ours", tmp_path / "theirs")
    assert ModelDirectory(tmp_path / "ours").config == directory.config


def test_bytes_stored_as_another_type_are_the_same_bytes(tiny_model, tmp_path):
    base = tiny_model()
    for name, storage in (("bytes", torch.uint8), ("floats", torch.bfloat16)):
        quantized(base, torch.float32, bnb_4bit_quant_storage=storage).save_pretrained(tmp_path / name)
    assert ModelDirectory(tmp_path / "floats").dtype("model.layers.0.mlp.up_proj.weight") == jnp.bfloat16
    models = [read_model(ModelDirectory(tmp_path / name), quantization="nf4") for name in ("bytes", "floats")]
    first, second = (packed_tensors(model) for model in models)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_opens_what_we_write_and_holds_our_bytes(tiny_model, tmp_path, dtype, tied):
    base = tiny_model(tied=tied, layers=3)
    type_name = str(dtype).removeprefix("torch.")
    write_quantized(base, tmp_path / "ours", "nf4", type_name, shard_bytes=20_000)
    ours = packed_tensors(load_model(ModelConfig(str(base), quantization="nf4", dtype=type_name)))

    model = opened(tmp_path / "ours", dtype)
    packed = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == 3 * 7
    for name, module in packed.items():
        state = module.weight.quant_state
        assert (state.dtype, state.quant_type, state.blocksize, state.state2.blocksize) == (dtype, "nf4", 64, 256)
        held = (module.weight.data, state.absmax, state.state2.absmax, state.code, state.state2.code)
        parts = ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
        for part, tensor in zip(parts, held, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), ours[name + part], err_msg=name + part)
        described = json.loads(ours[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
        assert state.offset.item() == described["nested_offset"]
        assert list(state.shape) == described["shape"]
    # What bitsandbytes writes of it is, byte for byte, what it was opened from: ours → theirs → ours. In its
    # "original format" transformers 5.23 cannot save a model that was opened in 4 bits.
    model.save_pretrained(tmp_path / "theirs", save_original_format=False)
    check_stored(tmp_path / "theirs", tmp_path / "ours")
    assert ModelDirectory(tmp_path / "theirs").config["quantization_config"] == json.loads(
        json.dumps(packed_config({}, "nf4", type_name)["quantization_config"])
    )


def test_without_double_quantization_we_write_what_transformers_quantizes(tiny_model, tmp_path):
    base = tiny_model(layers=3)
    write_quantized(base, tmp_path / "ours", "nf4-single", "float32", shard_bytes=20_000)
    quantized(base, torch.float32, "nf4-single").save_pretrained(tmp_path / "theirs")
    check_stored(tmp_path / "ours", tmp_path / "theirs")
    assert ModelDirectory(tmp_path / "ours").config["quantization_config"] == json.loads(
        json.dumps(ModelDirectory(tmp_path / "theirs").config["quantization_config"])
    )


@pytest.mark.parametrize("quantization", KINDS)
def test_a_directory_we_write_has_the_logits_it_has_in_transformers(tiny_model, tmp_path, quantization):
    write_quantized(tiny_model(), tmp_path / "ours", quantization, "float32")
    config = ModelConfig(str(tmp_path / "ours"), quantization=quantization, dtype="float32")
    _, logits = jax_loss(load_model(config), *rows())
    FLOAT32_FORWARD.assert_close(logits[real_tokens()], logits_of(open_model(config))[real_tokens()], "logits")


@pytest.mark.parametrize(
    ("kind", "asked"), [("nf4", "nf4-single"), ("nf4", "none"), ("nf4-single", "nf4"), ("nf4-single", "none")]
)
def test_a_directory_is_opened_as_the_kind_it_has_by_both_engines(tiny_model, tmp_path, kind, asked):
    write_quantized(tiny_model(), tmp_path / "packed", kind, "float32")
    for opened_by in (load_model, open_model):
        with pytest.raises(UserError, match=f"stored as {kind}; open this model with --model.quantization {kind}$"):
            opened_by(ModelConfig(str(tmp_path / "packed"), quantization=asked, dtype="float32"))


def test_fp4_and_int8_are_refused_by_file_and_name(tiny_model, tmp_path):
    base = tiny_model()
    quantized(base, torch.float32, bnb_4bit_quant_type="fp4").save_pretrained(tmp_path / "fp4")
    opened(base, torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(tmp_path / "int8")
    for name in ("fp4", "int8"):
        tensor = r"model\.layers\.0\.\S+\.weight"
        said = rf"{name}/model.safetensors: {tensor} is stored in bitsandbytes' {name}; dense, nf4, nf4-single can be read"
        with pytest.raises(UserError, match=said):
            read_model(ModelDirectory(tmp_path / name), quantization="nf4")
        with pytest.raises(UserError, match=rf"{name}/config.json: the weights are bitsandbytes' {name}"):
            open_model(ModelConfig(str(tmp_path / name), quantization="nf4", dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "found"), [({"blocksize": 128}, "blocksize 128"), ({"quant_type": "fp4"}, "quant_type fp4")]
)
def test_another_block_size_is_refused_by_file_and_tensor(tiny_model, tmp_path, changes, found):
    write_quantized(tiny_model(), tmp_path / "ours", "nf4-single", "float32")
    directory = ModelDirectory(tmp_path / "ours")
    tensors = {name: directory.read(name) for name in directory.names()}
    name = "model.layers.1.mlp.up_proj.weight"
    described = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes()) | changes
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    write_model(tmp_path / "other", directory.config, tensors.items())
    with pytest.raises(UserError, match=rf"other/model.safetensors: {name} has {found}; (64|nf4) can be read"):
        load_model(ModelConfig(str(tmp_path / "other"), quantization="nf4-single", dtype="float32"))
