"""``medllm parity`` on folders that say more than one thing: a reading of ours that is not transformers' is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax
import pytest

from jax_medllm.weights import read
from medllm.architecture import EMBEDDING
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.model import directory
from medllm.model.directory import ModelDirectory
from medllm.rotary import RotaryRule
from medllm.stage_config import AuditConfig
from medllm_parity import ends
from medllm_parity.audit import run_audit
from medllm_parity.measure import Audit
from parity_tests.folders import changed, embedding_as_head, head_twice, own_head, partly_dense_model, without_prefix


def audit(path: Path, **settings: str | bool) -> Audit:
    bisect = bool(settings.pop("bisect", False))
    return run_audit(AuditConfig(ModelConfig(str(path), dtype="float32", **settings), rows=3, tokens=24, bisect=bisect))


@pytest.fixture(scope="module")
def partly_dense(tiny_model, tmp_path_factory) -> Path:
    return partly_dense_model(tiny_model(), tmp_path_factory.mktemp("partly") / "model")


@pytest.fixture
def two_rules(tiny_model, tmp_path) -> Path:
    """A config that says one rule in the new spelling and another in the old one."""
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    return changed(tiny_model(), tmp_path / "model", config=both)


@pytest.fixture
def misread(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches of what reads a folder; what was compiled with them is forgotten."""
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("plant", [own_head, embedding_as_head, head_twice, without_prefix])
def test_a_folder_that_is_opened_as_transformers_opens_it_passes(tiny_model, tmp_path, plant):
    found = audit(changed(tiny_model(tied=True), tmp_path / "model", plant))
    assert found.ok, found.first_divergence


def test_layers_that_are_stored_dense_pass(partly_dense):
    found = audit(partly_dense, quantization="nf4")
    assert found.ok, found.first_divergence


def test_two_spellings_of_positions_pass_as_transformers_reads_them(two_rules):
    found = audit(two_rules)
    assert found.ok, found.first_divergence


def test_positions_that_are_read_from_the_other_spelling_are_named(misread, two_rules):
    stock = RotaryRule.from_hf
    misread.setattr(RotaryRule, "from_hf", lambda config, where: stock({**config, "rope_scaling": None}, where))
    first = audit(two_rules, bisect=True).first_divergence
    assert (first.module, first.quantity, first.stack) == ("model.layers.0.self_attn", "q after rotary", "jax")


def test_a_head_that_is_read_as_tied_is_named(misread, tiny_model, tmp_path):
    path = changed(tiny_model(tied=True), tmp_path / "model", own_head)
    tied = cached_property(lambda self: replace(self.described, tie_embeddings=True))
    tied.__set_name__(ModelDirectory, "architecture")
    misread.setattr(ModelDirectory, "architecture", tied)
    with pytest.raises(UserError, match=r"holds lm_head\.weight"):
        audit(path)


def test_a_head_that_is_taken_for_the_embedding_is_named(misread, tiny_model, tmp_path):
    path = changed(tiny_model(tied=True), tmp_path / "model", own_head)
    misread.setattr(directory, "equal_tables", lambda *_: True)
    with pytest.raises(UserError, match=r"has no tensor lm_head\.weight"):  # which transformers opens
        audit(path)


def test_the_embedding_in_place_of_a_head_is_named(misread, tiny_model, tmp_path):
    path = changed(tiny_model(tied=True), tmp_path / "model", own_head)
    misread.setattr(ends, "table_name", lambda _: EMBEDDING)
    first = audit(path, bisect=True).first_divergence
    assert (first.module, first.quantity, first.stack) == ("lm_head", "logits", "jax")


def test_a_dense_layer_that_is_quantized_is_named(misread, partly_dense):
    misread.setattr(read, "_dense_layers", lambda _: {})
    first = audit(partly_dense, quantization="nf4", bisect=True).first_divergence
    assert (first.module, first.quantity, first.stack) == ("model.layers.0.self_attn.v_proj", "v", "jax")
