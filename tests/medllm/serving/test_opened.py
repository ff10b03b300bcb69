"""A published folder as the engines open it: what is in it, and nothing that another folder says of where a text ends."""

import re
from pathlib import Path

import numpy as np
import pytest

from medllm.cli import main
from medllm.model.directory import ModelDirectory
from medllm.model.endings import Endings, read_endings
from medllm.model.tokenizer import load_tokenizer
from medllm.serving.opened import published_model
from tests.refusal import refused
from tests.served_folder import PLAIN, STOP, adapter_on, beside, published

ANOTHER = "質問者:" + PLAIN


@pytest.fixture
def base(tmp_path):
    """A base that ends its texts otherwise than what is published of it."""
    return published(tmp_path / "base", stop=None, end=9, template=ANOTHER)


@pytest.fixture
def adapter(base, tmp_path):
    return adapter_on(base, tmp_path / "adapter", published(tmp_path / "right"))


@pytest.mark.parametrize("where", ["named", "beside"])
def test_an_adapter_is_opened_on_its_base_under_its_own_contract(base, adapter, tmp_path, where):
    folder = adapter if where == "named" else beside(adapter, base, tmp_path / "whole")
    with published_model(folder, "float32") as model:
        tokenizer, weights = load_tokenizer(model.path), ModelDirectory(model.path)
        assert (model.adapters, model.quantization, tokenizer.chat_template) == ((folder,), "none", PLAIN)
        assert read_endings(tokenizer, model.path) == Endings((0,), (STOP,))
        assert weights.names() == ModelDirectory(base).names()
        name = weights.names()[0]
        np.testing.assert_array_equal(weights.read(name), ModelDirectory(base).read(name))
    assert not Path(model.path).exists()


@pytest.mark.parametrize("kind", ["nf4", "nf4-single"])
def test_weights_in_4_bits_are_opened_as_they_are_stored(tmp_path, kind):
    pytest.importorskip("jax")
    right, packed = published(tmp_path / "right"), str(tmp_path / "packed")
    assert main(["convert", "--model", right, "--out", packed, "--quantization", kind]) == 0
    with published_model(packed, "float32") as model:
        assert (model.path, model.adapters, model.quantization) == (packed, (), kind)
    with published_model(adapter_on(packed, tmp_path / "adapter", right), "float32") as model:
        assert model.quantization == kind


def test_an_adapter_whose_base_is_not_here_says_so(tmp_path, capsys):
    adapter = adapter_on("Qwen/Qwen2.5-72B", tmp_path / "adapter", published(tmp_path / "right"))
    (tmp_path / "exam.jsonl").write_text('{"problem_id": "1", "problem_text": "?", "choices": ["x", "y"], "answer": ["a"]}\n')
    asked = ("--problems", str(tmp_path / "exam.jsonl"), "--shot_count", "0")
    line = refused(tmp_path, capsys, "check-serving", "--model", adapter, *asked)
    assert re.search(r"base_model_name_or_path is 'Qwen/Qwen2\.5-72B', no folder here", line), line


def test_a_model_folder_that_holds_an_adapter_is_not_opened_without_it(base, adapter, tmp_path, capsys):
    """transformers would put it on the weights."""
    whole = beside(adapter, base, tmp_path / "whole")
    line = refused(tmp_path, capsys, "convert", "--model", whole, "--out", str(tmp_path / "out"), "--quantization", "nf4")
    assert "holds an adapter (adapter_config.json)" in line
