"""The sizes that a search goes by, against the arrays of the model itself and against plans that were compiled."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import jax
import pytest
from flax import nnx

from jax_medllm.mesh.layout import Layout
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.plan.compiled import measure
from jax_medllm.plan.programs import trace
from medllm.architecture import Architecture
from medllm.plan.models import planned_model
from medllm.plan.request import Request
from medllm.plan.search import least_gib
from medllm.published import PUBLISHED

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(name: str) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Path and shape of every array of a model without an adapter."""
    model = nnx.eval_shape(lambda: DenseDecoder(PUBLISHED[name], rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield tuple(map(str, path)), variable.shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_known_by_name_has_the_parameters_that_the_engine_makes(name):
    arrays = dict(shapes(name))
    assert PUBLISHED[name].parameters == sum(map(math.prod, arrays.values()))
    linear = (math.prod(shape) for path, shape in arrays.items() if path[-1] == "weight" and path[-2] in LINEAR)
    assert PUBLISHED[name].linear_parameters == sum(linear)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
    ],
)
def test_a_model_known_by_name_has_the_parameters_of_its_published_weights(name, published):
    """As Hugging Face counts them in its safetensors files."""
    assert PUBLISHED[name].parameters == published


TINY = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


def compiled_gib(request: Request, rows: int) -> float:
    """What a plan for one device says."""
    layout = Layout.of("data=1", devices=jax.devices()[:1])
    settings = {**request.settings(), "rows": rows, "model": planned_model(request.model).to_hf()}
    return sum(measure(trace(request.stage, settings, layout), layout)["by_kind"].values())


@pytest.fixture
def tiny(tmp_path):
    """A model folder; nothing but its config is read."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("stage", "quantization", "policy", "rows"),
    [
        ("cpt", "fp32", "projections", 4),
        ("cpt", "fp32", "none", 4),
        ("cpt", "nf4-single", "layer", 1),
        ("rpo", "fp32", "layer", 2),
        ("generate", "fp32", "layer", 8),
    ],
)
def test_a_candidate_is_never_thought_larger_than_it_is(tiny, stage, quantization, policy, rows):
    lengths = {"cpt": {"length": 256}, "rpo": {"prompt": 64, "response": 64}, "generate": {"length": 256}}[stage]
    request = Request(tiny, stage, "cpu:1", rows=rows, quantization=quantization, remat=policy, **lengths)
    least = least_gib(request, {"fsdp": 1}, rows, policy, Architecture.from_hf(TINY))
    assert 0 < least <= compiled_gib(request, rows)


def test_a_policy_that_keeps_more_is_thought_larger(tiny):
    request = Request(tiny, "cpt", "cpu:1", length=256)
    model = Architecture.from_hf(TINY)
    needs = [least_gib(request, {"fsdp": 1}, 4, policy, model) for policy in ("layer", "attention", "projections", "none")]
    assert needs == sorted(set(needs))
