"""A decoder as data: read from a config, written to one, and held against the arrays that the JAX engine makes of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import PackedParam
from jax_medllm.weights.adapters import variables
from medllm.architecture import HEAD, Architecture
from medllm.axes import RULES
from medllm.config import REMAT_KEEPS, LoraConfig, RematPolicy
from medllm.errors import UserError
from medllm.families import FAMILIES
from medllm.published import PUBLISHED, qwen2
from medllm_parity.oracle import window_of


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
        ({"model_type": "mixtral"}, "mixtral"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "single layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "dynamic"),
        ({"use_sliding_window": True, "max_window_layers": 12}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 12}, "sliding"),
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
    with pytest.raises(
        UserError, match=r"^base/config.json: model_type is 't5'; supported: 'qwen2' \(Qwen2, Qwen2.5\), 'qwen3' \(Qwen3\), "
    ):
        Architecture.from_hf({"model_type": "t5"}, "base/config.json")
    unnamed = hf_config()
    del unnamed["model_type"]
    with pytest.raises(UserError, match=r"config\.json: has no model_type"):
        Architecture.from_hf(unnamed)


OPTIONAL = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "sliding_window", "use_sliding_window")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left_out", [*((key,) for key in OPTIONAL), OPTIONAL], ids="+".join)
def test_what_a_config_leaves_out_has_the_value_it_has_in_transformers(family, left_out):
    config = hf_config(model_type=family, num_attention_heads=64, hidden_size=4096, sliding_window=77)
    sparse = {key: value for key, value in config.items() if key not in left_out}
    found, stock = Architecture.from_hf(sparse), AutoConfig.for_model(**sparse)
    assert (found.num_kv_heads, found.rms_norm_eps) == (stock.num_key_value_heads, stock.rms_norm_eps)
    assert found.head_dim == getattr(stock, "head_dim", 64)
    assert (found.rotary.theta, found.tie_embeddings) == (stock.rope_parameters["rope_theta"], stock.tie_word_embeddings)
    assert found.window == window_of(stock)


ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "yarn", "llama3"]),
        "type": st.sampled_from(["default", "linear", "yarn"]),
        "rope_theta": st.sampled_from([1e4, 5e5]),
        "factor": st.sampled_from([2.0, 4]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.sampled_from([4.0, 3]),
        "original_max_position_embeddings": st.sampled_from([512, 1024]),
        "attention_factor": st.sampled_from([0.5, 1.2]),
        "beta_fast": st.sampled_from([None, 16]),
        "mscale": st.just(0.8),
        "mscale_all_dim": st.just(0.5),
        "truncate": st.booleans(),
    },
)
OF_ROPES = {"rope_scaling": st.none() | ROPES, "rope_parameters": st.none() | ROPES, "rope_theta": st.sampled_from([1e6, 2e6])}


@settings(max_examples=300, deadline=None)
@given(entries=st.fixed_dictionaries({}, optional=OF_ROPES | {"original_max_position_embeddings": st.just(2048)}))
def test_old_and_new_spellings_of_a_rotary_rule_are_read_in_transformers_order(entries):
    """Whatever stands where: the frequencies are transformers', or the config is refused where transformers fails on it."""
    config = {key: value for key, value in hf_config(model_type="llama", **entries).items() if key in {*hf_config(), *entries}}
    if "rope_theta" not in entries:
        del config["rope_theta"]
    try:
        stock = AutoConfig.for_model(**copy.deepcopy(config))
        kind = stock.rope_parameters["rope_type"]
        rule = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        expected, factor = rule(stock)
    except (KeyError, TypeError):
        with pytest.raises(UserError):
            Architecture.from_hf(config)
        return
    found = Architecture.from_hf(config).rotary
    np.testing.assert_array_max_ulp(found.frequencies(64, np.float32), expected.numpy(), 2)
    assert found.attention_factor == pytest.approx(factor, rel=1e-12)


def arrays(model: Architecture, **settings) -> dict[str, nnx.Variable]:
    """The variables of an abstract model, by their attributes' names."""
    made = nnx.eval_shape(lambda: DenseDecoder(model, rngs=nnx.Rngs(0), **settings))
    return {".".join(map(str, path)): variable for path, variable in variables(made).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_jax_model_is_made_of_the_tensors_that_are_declared(tied):
    model = qwen2(3, 64, 96, 4, 2, 50, tie_embeddings=tied)
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
