"""Loading: every way a directory or an adapter can fail to fit the model is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.read import load_model, model_tensors
from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.model.adapter import Adapter, write_adapter
from medllm.model.directory import ModelDirectory, write_model
from tests.small_model import small_config

CONFIG = small_config(vocab_size=50, hidden_size=64, intermediate_size=128, head_dim=16, max_positions=64)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return dict(model_tensors(DenseDecoder(CONFIG, rngs=nnx.Rngs(0))))


@pytest.fixture
def write(tmp_path, tensors):
    """Write the model with some tensors changed (None: left out)."""

    def written(changes: dict[str, np.ndarray | None] | None = None, **settings) -> ModelConfig:
        kept = {name: value for name, value in (tensors | (changes or {})).items() if value is not None}
        write_model(tmp_path / "model", CONFIG.to_hf(), kept.items(), shard_bytes=40_000)
        return ModelConfig(str(tmp_path / "model"), dtype="float32", **settings)

    return written


def adapter(tensors: dict[str, np.ndarray] | None = None, **changes) -> Adapter:
    shapes = {"q_proj": ("self_attn", 64, 64), "down_proj": ("mlp", 128, 64)}
    rng = np.random.default_rng(0)
    made = {}
    for layer in range(2):
        for target, (block, width, out) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{block}.{target}"
            made[f"{stem}.lora_A.weight"] = rng.normal(size=(2, width)).astype(np.float32)
            made[f"{stem}.lora_B.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
    return Adapter(dataclasses.replace(LORA, **changes), made if tensors is None else tensors, "given")


def test_two_models_of_one_blueprint_have_numbers_of_their_own(write):
    """They are traced once; each is still its reader's own."""
    config = write()
    one, other = (load_model(config, lora=LORA) for _ in range(2))
    expected = dict(model_tensors(other)) | adapter_tensors(other)
    nnx.update(one, jax.tree.map(lambda leaf: leaf + 1, nnx.state(one)))
    found = dict(model_tensors(other)) | adapter_tensors(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_models_in_float64_and_in_float32_are_of_two_traces(write):
    config = dataclasses.replace(write(), dtype="float64")
    narrow = load_model(config)
    with jax.enable_x64(True):
        wide = load_model(config)
    types = [{str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} for model in (narrow, wide)]
    assert types == [{"float32"}, {"float64"}]


def test_a_sharded_model_is_read_back_as_it_was_written(write, tensors):
    config = write()
    assert (Path(config.path) / "model.safetensors.index.json").exists()
    again = dict(model_tensors(load_model(config)))
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_weights_are_rounded_to_the_type_that_is_asked_for(write, tensors):
    config = ModelConfig(write().path, dtype="bfloat16")
    for name, value in model_tensors(load_model(config, lora=LORA)):
        np.testing.assert_array_equal(value.view(np.uint16), tensors[name].astype(jnp.bfloat16).view(np.uint16))
    assert {v.dtype for v in adapter_tensors(load_model(config, lora=LORA)).values()} == {np.dtype(np.float32)}


def test_nf4_packs_the_linears_and_leaves_the_rest_exact(write, tensors):
    model = load_model(write(quantization="nf4"))
    for name, value in model_tensors(model):
        if name.endswith("proj.weight"):
            assert 0.01 < np.abs(value - tensors[name]).max() / np.abs(tensors[name]).max() < 0.2, name
        else:
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    assert model.layers.mlp.up_proj.weight is None


def test_a_tied_model_that_stores_its_head_twice_is_read(write, tensors):
    model = load_model(write({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    np.testing.assert_array_equal(model.head_weight(), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"model.norm.weight": np.ones(32, np.float32)}, r"model\.norm\.weight has shape \(32,\).* \(64,\)"),
        ({"model.layers.2.mlp.up_proj.weight": np.ones((2, 2), np.float32)}, r"holds model\.layers\.2\.mlp\.up_proj\.weight"),
    ],
    ids=["missing", "misshapen", "superfluous"],
)
def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(write, changes, message):
    with pytest.raises(UserError, match=message):
        load_model(write(changes))


def test_the_initial_adapter_depends_on_its_seed_alone(write):
    config = write()
    first, same = (adapter_tensors(load_model(config, lora=LORA)) for _ in range(2))
    other = adapter_tensors(load_model(config, lora=LoraConfig(2, 4.0, LORA.targets, seed=1)))
    wider = adapter_tensors(load_model(config, lora=LoraConfig(2, 4.0, seed=0)))
    for name, value in first.items():
        np.testing.assert_array_equal(value, same[name])
        np.testing.assert_array_equal(value, wider[name])
    assert np.abs(first[A0] - other[A0]).max() > 0.01
    assert np.abs(first[A0] - first[A0.replace("layers.0", "layers.1")]).max() > 0.01


def test_an_adapter_goes_in_and_comes_out_unchanged(write):
    given = adapter()
    found = adapter_tensors(load_model(write(), lora=given))
    assert found.keys() == given.tensors.keys()
    for name, value in given.tensors.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {}}, "has no tensor base_model"),
        ({"tensors": adapter().tensors | {A0: np.ones((2, 32))}}, r"q_proj\.lora_A\.weight has shape \(2, 32\).* \(2, 64\)"),
        ({"tensors": adapter().tensors | {A0.replace("layers.0", "layers.2"): np.ones((2, 64))}}, r"layers\.2.*no place"),
    ],
    ids=["missing", "misshapen", "superfluous"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(write, changes, message):
    with pytest.raises(UserError, match=message):
        load_model(write(), lora=adapter(**changes))


def test_a_models_own_adapter_is_read_from_its_folder(write, tmp_path):
    config = write()
    write_adapter(tmp_path / "adapter", LORA, adapter().tensors, config.path)
    model = load_model(ModelConfig(config.path, adapter=str(tmp_path / "adapter"), dtype="float32"))
    name = "model.layers.0.self_attn.q_proj.weight"
    b, a = (adapter().tensors[A0.replace("lora_A", f"lora_{matrix}")] for matrix in "BA")
    expected = ModelDirectory(config.path).read(name) + 2.0 * (b @ a)
    np.testing.assert_allclose(dict(model_tensors(model))[name], expected, rtol=1e-5, atol=1e-6)
