"""The engine on a mesh: opens, trains, resumes elsewhere, answers and scores as on one device."""

from __future__ import annotations

import pytest

from jax_medllm.engine import JaxEngine
from medllm.config import MeshConfig, ModelConfig
from medllm.engines import open_engine
from medllm.errors import UserError
from tests.forced_devices import found_on_eight
from tests.sharded_engine import CASES
from tests.sharded_families import FAMILIES, QUANTIZATIONS


@pytest.fixture(scope="module")
def worked():
    """What :mod:`tests.sharded_engine` found on eight devices."""
    return found_on_eight("tests.sharded_engine")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", CASES)
def test_what_the_engine_does_on_a_mesh_is_what_it_does_on_one_device(worked, quantization):
    """Adapters after a few steps differ by more than one step's rounding: Adam divides small gradients by themselves."""
    found = worked[quantization]
    assert found["same texts"]
    assert found["logprobs"] < 1e-5
    assert max(found["cpt"], found["resumed on one device"], found["rpo"]) < 1e-3, found
    assert found["bytes on a device"] < 0.4 * found["bytes in all"]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_on_a_mesh_as_on_one_device_token_for_token(worked, family, quantization):
    """On one device they are transformers' own (``parity_tests/test_families.py``)."""
    found = worked["families"][f"{family} {quantization}"]
    assert found["on the mesh"] == found["texts"]
    assert len({tuple(text) for text in found["texts"]}) == len(found["texts"]), "each prompt has an answer of its own"
    assert found["logprobs"] < 1e-5


@pytest.mark.slow
def test_a_folder_that_is_packed_in_part_with_its_head_packed_is_the_same_on_a_mesh(worked):
    found = worked["families"]["partly packed"]
    assert found["on the mesh"] == found["texts"]
    assert found["logprobs"] < 1e-5
    assert found["gradients"] < 1e-5


def test_a_mesh_is_the_jax_engines():
    for name in ("torch", "openai"):
        with pytest.raises(UserError, match=rf"--mesh and --rules spread the JAX engine's arrays; for --engine {name}"):
            open_engine(name, ModelConfig("unused"), MeshConfig(mesh="fsdp=2"))


def test_rules_without_a_mesh_are_an_error():
    with pytest.raises(UserError, match="--rules mlp= spreads arrays over a mesh, and there is none; add --mesh"):
        JaxEngine(ModelConfig("unused"), MeshConfig(rules="mlp="))
