"""Models and adapters on disk: what is read, written, merged and refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from medllm.config import LoraConfig
from medllm.errors import UserError
from medllm.model_directory import ModelDirectory, merge_adapter, read_adapter, write_adapter, write_model

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": rng.normal(size=(12, 8)).astype(np.float32),
        f"{MODULE}.weight": rng.normal(size=(6, 8)).astype(ml_dtypes.bfloat16),
        f"{MODULE}.bias": rng.normal(size=(6,)).astype(np.float16),
    }


@pytest.fixture
def base(tmp_path, weights):
    write_model(tmp_path / "base", {"model_type": "qwen2"}, weights.items())
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def adapter_tensors(rank=2, inputs=8, outputs=6, module=MODULE):
    rng = np.random.default_rng(1)
    return {
        f"base_model.model.{module}.lora_A.weight": rng.normal(size=(rank, inputs)).astype(np.float32),
        f"base_model.model.{module}.lora_B.weight": rng.normal(size=(outputs, rank)).astype(np.float32),
    }


def test_one_file_and_many_shards_read_back_the_same(tmp_path, weights):
    write_model(tmp_path / "one", {}, weights.items())
    write_model(tmp_path / "many", {}, weights.items(), shard_bytes=1)
    assert len(list((tmp_path / "many").glob("model-*-of-00003.safetensors"))) == 3
    for folder in ("one", "many"):
        directory = ModelDirectory(tmp_path / folder)
        assert set(directory.names()) == set(weights)
        for name, value in weights.items():
            assert directory.shape(name) == value.shape
            assert directory.dtype(name) == value.dtype
            np.testing.assert_array_equal(directory.read(name), value)
            np.testing.assert_array_equal(directory.read_slice(name, slice(1, 3)), value[1:3])


@pytest.mark.parametrize("rslora", [False, True])
def test_merge_adds_scaled_b_a_in_float32_and_rounds_once(tmp_path, base, weights, rslora):
    lora = LoraConfig(rank=2, alpha=8.0, targets=("q_proj",), rslora=rslora)
    tensors = adapter_tensors()
    write_adapter(tmp_path / "adapter", lora, tensors, str(base))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    a, b = tensors.values()
    scaling = 8.0 / (2**0.5 if rslora else 2)
    expected = weights[f"{MODULE}.weight"].astype(np.float64) + scaling * (b.astype(np.float64) @ a.astype(np.float64))
    merged = ModelDirectory(tmp_path / "merged")
    got = merged.read(f"{MODULE}.weight")
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=2**-8)
    np.testing.assert_array_equal(merged.read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_an_adapter_reads_back_as_written(tmp_path):
    lora = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "down_proj"))
    tensors = adapter_tensors()
    write_adapter(tmp_path / "a", lora, tensors, "base")
    adapter = read_adapter(tmp_path / "a")
    assert (adapter.rank, adapter.alpha, adapter.scaling, adapter.targets) == (2, 3.0, 1.5, ("q_proj", "down_proj"))
    assert list(adapter.modules()) == [MODULE]


def test_a_write_that_fails_leaves_nothing(tmp_path, weights):
    def failing():
        yield "a", np.ones(3)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_model(tmp_path / "model", {}, failing())
    assert list(tmp_path.iterdir()) == []


def test_missing_things_are_named(tmp_path, base):
    with pytest.raises(UserError, match="no such model folder"):
        ModelDirectory(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        ModelDirectory(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="not readable as JSON"):
        ModelDirectory(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="only safetensors weights are read"):
        ModelDirectory(tmp_path / "empty").names()
    with pytest.raises(UserError, match=r"has no tensor lm_head\.weight"):
        ModelDirectory(base).read("lm_head.weight")


def test_a_missing_shard_is_named(tmp_path, weights):
    write_model(tmp_path / "m", {}, weights.items(), shard_bytes=1)
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003"):
        ModelDirectory(tmp_path / "m").names()


def test_a_truncated_file_is_refused(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        ModelDirectory(base).names()


def test_an_adapter_for_another_model_is_refused_before_anything_is_written(tmp_path, base):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    write_adapter(tmp_path / "wide", lora, adapter_tensors(inputs=10), "base")
    with pytest.raises(UserError, match=r"\(6, 10\).*\(6, 8\)"):
        merge_adapter(base, tmp_path / "wide", tmp_path / "out")
    write_adapter(tmp_path / "deep", lora, adapter_tensors(module="model.layers.9.self_attn.q_proj"), "base")
    with pytest.raises(UserError, match=r"layers\.9"):
        merge_adapter(base, tmp_path / "deep", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "biases"),
        ({"target_modules": ["lm_head"]}, "targets lm_head"),
        ({"target_modules": ".*proj"}, "pattern"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change, message):
    write_adapter(tmp_path / "a", LoraConfig(rank=2), adapter_tensors(), "base")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a")


def test_an_incomplete_or_empty_adapter_is_refused(tmp_path):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    with pytest.raises(UserError, match="no adapter tensors"):
        write_adapter(tmp_path / "a", lora, {}, "base")
    write_adapter(tmp_path / "a", lora, adapter_tensors(), "base")
    tensors = adapter_tensors()
    first, second = tensors
    save_file({first: tensors[first]}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no matching lora_B"):
        read_adapter(tmp_path / "a").modules()
    save_file({second: tensors[second]}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="empty save"):
        read_adapter(tmp_path / "a").modules()
