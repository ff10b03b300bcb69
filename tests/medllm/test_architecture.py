"""A decoder as data: read from a config, written to one, and held against the arrays that the JAX engine makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import jax.numpy as jnp
import pytest
from flax import nnx

from jax_medllm.model.decoder import Qwen2
from jax_medllm.model.linear import PackedParam
from jax_medllm.weights.adapters import variables
from medllm.architecture import HEAD, PUBLISHED, Architecture, qwen2
from medllm.axes import RULES
from medllm.config import REMAT_KEEPS, LoraConfig, RematPolicy
from medllm.errors import UserError


def hf_config(width=896, mlp=4864, layers=24, heads=14, kv_heads=2, vocabulary=151936, tied=True, **changes) -> dict:
    """A config.json as Qwen published them."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    } | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "dynamic"),
        ({"use_sliding_window": True}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_with_what_the_model_does_not_do_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        Architecture.from_hf(hf_config(**changes))


def test_a_config_without_a_size_is_refused_by_name():
    config = hf_config()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size"):
        Architecture.from_hf(config)


def test_a_config_survives_being_written_and_read():
    small = replace(qwen2(3, 64, 128, 4, 2, 97), max_positions=64, head_dim=32, rms_norm_eps=1e-5)
    assert Architecture.from_hf(small.to_hf()) == small
    assert Architecture.from_hf(hf_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})).rotary.theta == 5e5


def test_a_config_that_is_no_models_says_which_file_it_is():
    with pytest.raises(UserError, match=r"^base/config.json: model_type is 't5'; supported: 'qwen2' \(Qwen2, Qwen2.5\)$"):
        Architecture.from_hf({"model_type": "t5"}, "base/config.json")
    unnamed = hf_config()
    del unnamed["model_type"]
    with pytest.raises(UserError, match=r"config\.json: has no model_type"):
        Architecture.from_hf(unnamed)


def test_what_a_config_leaves_out_has_the_value_it_has_in_transformers():
    sparse = hf_config()
    for key in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del sparse[key]
    found = Architecture.from_hf(sparse)
    assert (found.num_kv_heads, found.head_dim, found.rms_norm_eps) == (14, 64, 1e-6)
    assert (found.rotary.theta, found.tie_embeddings) == (10000.0, False)


def arrays(model: Architecture, **settings) -> dict[str, nnx.Variable]:
    """The variables of an abstract model, by their attributes' names."""
    made = nnx.eval_shape(lambda: Qwen2(model, rngs=nnx.Rngs(0), **settings))
    return {".".join(map(str, path)): variable for path, variable in variables(made).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_jax_model_is_made_of_the_tensors_that_are_declared(tied):
    model = qwen2(3, 64, 96, 4, 2, 50, tied=tied)
    made = arrays(model)
    around = {name.removeprefix("model."): tensor.axes for name, tensor in model.around.items()}
    within = {f"layers.{name}": tensor.axes for name, tensor in model.layer.items()}
    assert made.keys() == around.keys() | within.keys()
    for name, variable in made.items():
        axes = around[name] if name in around else variable.axes[:1] + within[name]
        assert variable.axes == axes, name
        assert variable.shape == tuple(axis.size for axis in axes), name
        assert (variable.axes[0].name == "layers") == (name in within), name


def test_a_checkpoint_has_the_tensors_of_each_layer_and_those_around_them():
    model = qwen2(3, 64, 96, 4, 2, 50)
    assert len(model.tensors) == 3 * len(model.layer) + len(model.around)
    assert model.tensors["model.layers.2.mlp.down_proj.weight"].shape == (64, 96)
    assert model.tensors["model.layers.0.self_attn.k_proj.bias"].shape == (32,)
    assert sum(tensor.size for tensor in model.tensors.values()) == model.parameters
    assert HEAD in model.tensors
    assert HEAD not in replace(model, tie_embeddings=True).tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_are_those_of_the_arrays(name):
    model = PUBLISHED[name]
    dense = sum(one.size * one.dtype.itemsize for one in arrays(model, dtype=jnp.bfloat16).values())
    assert model.weight_bytes("none", 2) == dense
    packed = arrays(model, dtype=jnp.bfloat16, quantization="nf4").values()
    held = sum(one.size * one.dtype.itemsize for one in packed)
    scales = sum(isinstance(one, PackedParam) for one in packed) / 4 * model.num_layers
    assert 0 <= held - model.weight_bytes("nf4", 2) < 4 * scales, "the last block of scales of a weight may be short"


def test_an_adapter_has_the_parameters_that_are_counted():
    model = PUBLISHED["qwen2.5-0.5b"]
    made = arrays(model, lora=LoraConfig(rank=8))
    matrices = (variable for name, variable in made.items() if name.endswith(("lora.A", "lora.B")))
    assert sum(math.prod(one.shape) for one in matrices) == model.adapter_parameters(8)


def test_every_logical_axis_has_a_rule_or_stays_whole():
    named = {axis.name for tensor in qwen2(1, 64, 96, 4, 2, 50).tensors.values() for axis in tensor.axes}
    assert named - RULES.keys() == {"norm", "head_width"}
    assert RULES.keys() - named == {"batch", "sequence", "adapter"}, "of activations, and of what is no tensor of a checkpoint"


def test_each_remat_policy_keeps_less_than_the_one_before():
    assert tuple(REMAT_KEEPS) == get_args(RematPolicy)
    results = qwen2(1, 64, 96, 4, 2, 50).results.keys()
    kept = [results if names is None else set(names) for names in REMAT_KEEPS.values()]
    assert all(less < more for more, less in pairwise(kept))
