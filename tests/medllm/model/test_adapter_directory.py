"""Adapters on disk: what is read, merged, written and refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from medllm.config import ALL_LINEAR, LoraConfig
from medllm.errors import UserError
from medllm.model.adapter import (
    Adapter,
    check_adapter,
    check_trained,
    merge_adapter,
    module_name,
    read_adapter,
    tensor_name,
    write_adapter,
)
from medllm.model.directory import ModelDirectory, write_model

pytest_plugins = ["tests.small_weights"]
MODULE = module_name(0, "q_proj")
LORA = LoraConfig(rank=2, alpha=8.0, targets=("q_proj",))


def matrices(ranks=None, inputs=8, outputs=6):
    """Random A and B of each module, by default rank 2 in both layers."""
    rng = np.random.default_rng(1)
    ranks = ranks or {module_name(layer, "q_proj"): 2 for layer in range(2)}
    tensors = {}
    for module, rank in ranks.items():
        tensors[tensor_name(module, "A")] = rng.normal(size=(rank, inputs)).astype(np.float32)
        tensors[tensor_name(module, "B")] = rng.normal(size=(outputs, rank)).astype(np.float32)
    return tensors


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("rslora", [False, True])
def test_merge_adds_scaled_b_a_in_float32_and_rounds_once(tmp_path, base, weights, rslora):
    tensors = matrices()
    write_adapter(tmp_path / "adapter", LoraConfig(2, 8.0, ("q_proj",), rslora), tensors, str(base))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    a, b = list(tensors.values())[:2]
    scaling = 8.0 / (2**0.5 if rslora else 2)
    expected = weights[f"{MODULE}.weight"].astype(np.float64) + scaling * (b.astype(np.float64) @ a.astype(np.float64))
    merged = ModelDirectory(tmp_path / "merged")
    got = merged.read(f"{MODULE}.weight")
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=2**-8)
    assert np.mean(got == expected.astype(ml_dtypes.bfloat16)) > 0.95, "one rounding: elsewhere only a tie could differ"
    np.testing.assert_array_equal(merged.read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(merged.read(f"{MODULE}.bias"), weights[f"{MODULE}.bias"])


def test_a_merged_model_brings_tokenizer_and_generation_config(tmp_path, base):
    write_adapter(tmp_path / "adapter", LORA, matrices(), str(base))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (tmp_path / "merged" / name).read_text() == (base / name).read_text()


def test_several_adapters_are_added_before_the_one_rounding(tmp_path, base, weights):
    tensors = matrices()
    for name in ("first", "second"):
        write_adapter(tmp_path / name, LORA, tensors, str(base))
    merge_adapter(base, [str(tmp_path / "first"), str(tmp_path / "second")], tmp_path / "merged")
    a, b = list(tensors.values())[2:]
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(ModelDirectory(tmp_path / "merged").read(name), weights[name] + 2 * 4.0 * (b @ a), rtol=1e-5)


def test_an_adapter_reads_back_as_written(tmp_path):
    lora = LoraConfig(2, 3.0, ("q_proj", "down_proj"), True, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 5.0})
    tensors = matrices({MODULE: 4})
    write_adapter(tmp_path / "a", lora, tensors, "base")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.lora == lora
    assert list(adapter.modules()) == [MODULE]
    for name, value in tensors.items():
        np.testing.assert_array_equal(adapter.tensors[name], value)


def test_a_pattern_matches_the_end_of_a_modules_name_from_a_dot_on():
    lora = LoraConfig(8, 16.0, rank_pattern={"layers.1.self_attn.q_proj": 4, "q_proj": 2}, alpha_pattern={"_proj": 1.0})
    assert [lora.rank_of(module_name(layer, "q_proj")) for layer in (0, 1, 11)] == [2, 4, 2], "the first that matches counts"
    assert lora.rank_of(module_name(1, "k_proj")) == 8
    assert lora.scaling_of(module_name(1, "k_proj")) == 2.0, "no name has a dot before _proj"
    assert lora.scaling_of(module_name(1, "q_proj")) == 4.0, "alpha over the module's own rank"
    only = LoraConfig(targets=("layers.1.mlp.up_proj",))
    assert [only.rank_of(module_name(layer, "up_proj")) for layer in (0, 1, 11)] == [0, 16, 0]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"target_modules": "all-linear"}, ALL_LINEAR),
        ({"target_modules": r".*layers\.1.*\.(q|v)_proj"}, (module_name(1, "q_proj"), module_name(1, "v_proj"))),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, (module_name(1, "q_proj"),)),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, (module_name(0, "q_proj"),)),
    ],
    ids=str,
)
def test_every_selection_of_modules_becomes_names(tmp_path, selection, expected):
    write_adapter(tmp_path / "a", LORA, matrices(), "base")
    change_config(tmp_path / "a", **selection)
    assert read_adapter(tmp_path / "a").lora.targets == expected


def test_an_adapter_for_another_model_is_refused_before_anything_is_written(tmp_path, base):
    write_adapter(tmp_path / "wide", LORA, matrices(inputs=10), "base")
    with pytest.raises(UserError, match=r"\(6, 10\).*\(6, 8\)"):
        merge_adapter(base, tmp_path / "wide", tmp_path / "out")
    write_adapter(tmp_path / "deep", LORA, matrices({module_name(9, "q_proj"): 2}), "base")
    with pytest.raises(UserError, match=r"layers\.9"):
        merge_adapter(base, tmp_path / "deep", tmp_path / "out")
    write_adapter(tmp_path / "shallow", LORA, matrices({MODULE: 2}), "base")
    with pytest.raises(UserError, match=r"no matrices for model\.layers\.1\.self_attn\.q_proj"):
        merge_adapter(base, tmp_path / "shallow", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_merged_into_four_bits(tmp_path, weights):
    write_model(tmp_path / "packed", {"quantization_config": {"load_in_4bit": True}}, weights.items())
    write_adapter(tmp_path / "a", LORA, matrices(), "base")
    with pytest.raises(UserError, match=r"4 bits.*--handover stack"):
        merge_adapter(tmp_path / "packed", tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_weight_is_checked_by_the_shape_it_stands_for(tmp_path):
    state = np.frombuffer(json.dumps({"shape": [6, 8]}).encode(), np.uint8)
    packed = {
        f"{MODULE}.weight": np.zeros((24, 1), np.uint8),
        f"{MODULE}.weight.quant_state.bitsandbytes__nf4": state,
    }
    write_model(tmp_path / "packed", {}, packed.items())
    directory = ModelDirectory(tmp_path / "packed")
    check_adapter(Adapter(LORA, matrices({MODULE: 2})), directory)
    with pytest.raises(UserError, match=r"\(6, 16\).*\(6, 8\)"):
        check_adapter(Adapter(LORA, matrices({MODULE: 2}, inputs=16)), directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa"}, "'pissa', which also changes the base weights"),
        ({"target_modules": ["lm_head"]}, "targets lm_head"),
        ({"target_modules": []}, "targets no module"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "c_attn"}, "selects no linear layer"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"rank_pattern": {"(q": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
        ({"rank_pattern": ["q_proj"]}, "not what PEFT writes"),
        ({"r": "eight"}, "not what PEFT writes"),
        ({"r": 0}, "at least 1"),
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused_by_what_they_are(tmp_path, change, message):
    write_adapter(tmp_path / "a", LORA, matrices(), "base")
    change_config(tmp_path / "a", **change)
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(tmp_path / "a")
    assert str(tmp_path / "a") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("lora", "tensors", "message"),
    [
        (LORA, {tensor_name(MODULE, "A"): np.ones((2, 8))}, "lora_A of .* has no matching lora_B"),
        (LORA, {tensor_name(MODULE, "B"): np.ones((6, 2))}, "lora_B of .* has no matching lora_A"),
        (LORA, {}, "empty save"),
        (LORA, matrices({MODULE: 3}), r"A \(3, 8\) and B \(6, 3\).* rank 2"),
        (LoraConfig(2, targets=("q_proj",), rank_pattern={"q_proj": 3}), matrices({MODULE: 2}), "rank 3"),
        (LORA, matrices({module_name(0, "k_proj"): 2}), "k_proj, which target_modules .* does not name"),
        (LORA, matrices() | {f"base_model.model.{MODULE}.lora_magnitude_vector": np.ones(6)}, "no matrix of a LoRA adapter"),
    ],
    ids=["no B", "no A", "empty", "rank", "rank pattern", "untargeted", "DoRA"],
)
def test_tensors_that_do_not_fit_their_settings_are_named(lora, tensors, message):
    with pytest.raises(UserError, match=message):
        Adapter(lora, tensors, "given").modules()


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such adapter folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no adapter tensors"):
        write_adapter(tmp_path / "a", LORA, {}, "base")
    write_adapter(tmp_path / "a", LORA, matrices(), "base")
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        read_adapter(tmp_path / "a")
    file.unlink()
    with pytest.raises(UserError, match="only safetensors adapters are read"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path / "a")


def test_an_adapter_that_a_training_left_is_whole_finite_and_changes_something(tmp_path, capsys):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": np.ones((2, 4), np.float32), f"{module}.lora_B.weight": np.ones((4, 2), np.float32)}
    with pytest.raises(UserError, match="no such adapter folder"):
        check_trained(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", LoraConfig(rank=2, targets=("q_proj",)), tensors, "base")
    check_trained(tmp_path / "adapter")
    assert capsys.readouterr().err == ""
    for value in (np.nan, 0.0):
        tensors[f"{module}.lora_B.weight"] = np.full((4, 2), value, np.float32)
        write_adapter(tmp_path / str(value), LoraConfig(rank=2, targets=("q_proj",)), tensors, "base")
    with pytest.raises(UserError, match=r"q_proj\.lora_B\.weight is not finite"):
        check_trained(tmp_path / "nan")
    check_trained(tmp_path / "0.0")
    assert "every B is still zero" in capsys.readouterr().err
