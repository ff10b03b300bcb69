"""Small files that ask for much: each is refused before it takes the time or the memory."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medllm.config import LoraConfig
from medllm.corpus.documents import load_documents
from medllm.errors import UserError
from medllm.exam.letters import Options, read_letters
from medllm.exam.loaders import load_problems
from medllm.mini.study import BASE
from medllm.model.adapter import read_adapter, write_adapter
from medllm.model.directory import ModelDirectory
from medllm.model.files import ADAPTER
from medllm.model.tokenizer import Message, encode_prompt, load_tokenizer
from medllm.patterns import is_quick_pattern
from medllm.stage_config import CorpusConfig
from tests.refusal import refused

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n" for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(.*)*",
        r"(\w+\.?)+x",
        "(?:a|a)*",
        "(a|a)" * 40,
        "a?" * 40,
        "a*" * 8,
        "((",
        r"(?=(\w+)+)x",
        "(" * 3000 + ")" * 3000,
    ],
)
def test_a_pattern_that_may_take_for_ever_is_none(pattern):
    assert not is_quick_pattern(pattern)
    with pytest.raises(UserError, match="no repetition within a repetition"):
        LoraConfig(rank_pattern={pattern: 4})


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "q_proj",
            r"layers\.0\.self_attn\.q_proj",
            r".*\.layers\.[0-9]+\..*_proj",
            r"model\.layers\.(1|2[0-9])\.mlp\.up_proj",
        ),
        *(
            r".*(self_attn|mlp)\.(q|v|up)_proj$",
            r"(?:model\.)?layers\.\d{1,3}\..*",
            "|".join(f"layers.{i}.q_proj" for i in range(80)),
        ),
    ],
)
def test_a_pattern_that_people_write_is_one(pattern):
    assert is_quick_pattern(pattern)


def adapter(folder, module="model.layers.0.self_attn.q_proj", **changes):
    tensors = {f"base_model.model.{module}.lora_{one}.weight": np.zeros((4, 4), np.float32) for one in "AB"}
    write_adapter(folder / "adapter", LoraConfig(rank=4, targets=("q_proj",)), tensors, "base")
    file = folder / "adapter" / ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder / "adapter"


def test_an_adapter_is_not_searched_by_a_pattern_that_takes_for_ever(tmp_path):
    with pytest.raises(UserError, match="repeats within a repetition"):
        read_adapter(adapter(tmp_path, target_modules=r"(\w+\.?)+!"))


def test_an_adapter_of_layer_five_million_selects_no_layer(tmp_path):
    with pytest.raises(UserError, match="selects no linear layer"):
        read_adapter(adapter(tmp_path, "model.layers.5000000.self_attn.q_proj", target_modules=".*q_proj"))


@pytest.mark.parametrize("layers", [10_000_000, 0, -1, True, 2.5, "2", None, [2], 10**30])
def test_a_model_of_ten_million_layers_is_none(tmp_path, layers):
    config = ModelDirectory(BASE).config | {"num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers"):
        _ = ModelDirectory(tmp_path).described


def test_settings_that_multiply_are_not_unfolded(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laughs.yaml").write_text(f"{LAUGHS}run: *i\n")
    (tmp_path / "p.jsonl").write_text('{"q": "どれか。"}\n')
    with pytest.raises(UserError, match=r"laughs\.yaml.*line 2 refers to \*a"):
        load_problems(tmp_path / "p.jsonl", layout=tmp_path / "laughs.yaml")
    assert "laughs.yaml" in refused(tmp_path, capsys, "cpt", "--config", "laughs.yaml", "--model.path", "m")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: x\n", "model is 'x'; expected its settings by name"),
        ('run: "a\\0b"\n', "NUL"),
        ("run: r\x00\n", "not YAML"),
        ("run: r\noptimizer: {learning_rate: .inf}\n", "--optimizer.learning_rate is inf"),
        ("run: r\ntraining: {epochs: 1" + "0" * 30 + "}\n", "--training.epochs is 1000"),
        ("run: r\ntraining: {epochs: null}\n", "training.epochs"),
        ("run: " + "[" * 3000 + "]" * 3000 + "\n", "not YAML"),
        ("run: " + "[" * 100_000, "opening brackets"),
        ("run: &a [*a]\n", "*a"),
        ("run: 2026-99-99\nlora: !!int ''\n", "not YAML"),
        ("x: " + "a" * 300_000 + "\n", "262144"),
    ],
)
def test_a_file_of_settings_that_holds_none(tmp_path, capsys, text, says):
    (tmp_path / "s.yaml").write_text(text)
    assert says in refused(tmp_path, capsys, "cpt", "--config", str(tmp_path / "s.yaml"), "--model.path", "m")


def test_a_chat_template_that_loops_for_ever_is_stopped(tmp_path):
    for file in BASE.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, tmp_path / file.name)
    loops = "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(loops)
    with pytest.raises(UserError, match="more than 2000000 steps"):
        encode_prompt(load_tokenizer(tmp_path), (Message("user", "どれか。"),))


def test_ten_equal_options_that_are_all_wanted_are_read_at_once():
    texts = dict.fromkeys("abcdefghij", "同じ")
    assert read_letters("、".join(["同じ"] * 10), Options(texts, 10, numbered=False)) == tuple("abcdefghij")
    assert read_letters("、".join(["同じ"] * 9), Options(texts, 9, numbered=False)) == ()  # which nine is not said
    assert read_letters("甲、乙", Options({"a": "乙", "b": "甲", "c": "丙"}, 2, numbered=False)) == ("a", "b")


def test_a_small_parquet_file_that_unfolds_to_gigabytes(tmp_path):
    file = tmp_path / "d.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["あ" * 250_000]))
    pq.write_table(pa.table({"text": texts}), file, compression="zstd")
    assert file.stat().st_size < 4000
    with pytest.raises(UserError, match="unfolds to more than 64 MiB"):
        load_documents(CorpusConfig(documents=(str(file),)))


def test_a_parquet_file_of_rows_without_anything_in_them(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(20_000_000)}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="unfolds to more than"):
        load_documents(CorpusConfig(documents=(str(tmp_path / "d.parquet"),)))
