"""Values that damage has found to end in a traceback, each now refused in a line that names where it stands."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentError

from medllm.corpus.documents import load_documents
from medllm.errors import UserError
from medllm.exam.loaders import load_problems
from medllm.stage_config import CorpusConfig
from tests.fuzz.formats import FORMATS


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("config.json", {"num_hidden_layers": "{}"}, "num_hidden_layers"),
        ("config.json", {"hidden_size": [1]}, "hidden_size"),
        ("config.json", {"vocab_size": float("inf")}, "vocab_size"),
        ("config.json", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("config.json", {"num_attention_heads": 3}, "num_key_value_heads"),
        ("config.json", {"num_attention_heads": 10**6, "num_key_value_heads": 1, "head_dim": None}, "hidden_size"),
        ("config.json", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("config.json", {"model_type": {}}, "model_type"),
        ("config.json", {"max_window_layers": {}}, "max_window_layers"),
        ("config.json", {"layer_types": [["x"]]}, "layer_types"),
        ("config.json", {"rope_theta": None}, "rope_theta"),
        ("config.json", {"rope_theta": 0}, "rope_theta"),
        ("config.json", {"rope_scaling": [1]}, "rope_scaling"),
        ("config.json", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope scaling"),
        ("config.json", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ("config.json", {"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "config.json"),
        ("adapter_config.json", {"lora_alpha": float("inf")}, "lora.alpha"),
        ("adapter_config.json", {"r": float("inf")}, "r, lora_alpha or a pattern"),
        ("adapter_config.json", {"rank_pattern": [1]}, "r, lora_alpha or a pattern"),
        ("adapter_config.json", {"layers_to_transform": "0"}, "layers_to_transform"),
        ("adapter_config.json", {"target_modules": "(("}, "no regular expression"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "tokenizer cannot be read"),
        ("tokenizer.json", {"pre_tokenizer": 7}, "tokenizer cannot be read"),
        ("tokenizer_config.json", {"model_max_length": ["a"]}, "model_max_length"),
        ("tokenizer_config.json", {"chat_template": "{{ 1 / 0 }}"}, "division by zero"),
        ("tokenizer_config.json", {"chat_template": "{{ " + nested(500) + " }}"}, "chat template"),
        ("layout", {"question": ["q"]}, "question"),
        ("layout", {"options": {"a": "b"}}, "options"),
        ("layout", {"numeric": {"field": "a"}}, "numeric"),
        ("layout", {"answers_beside": {"file": "../x", "id": 1}}, "answers_beside"),
        ("settings of cpt", {"training": [{"epochs": 1}, {"epochs": 2}]}, "training"),
        ("settings of cpt", {"training": {"epochs": None}}, "training.epochs"),
        ("settings of cpt", {"model": "\0"}, "model"),
        ("settings of cpt", {"lora": {"alpha": float("nan")}}, "lora.alpha"),
    ],
)
def test_a_value_is_refused_by_name(tmp_path, name, changes, says):
    FORMATS[name].example(tmp_path)
    file = tmp_path / FORMATS[name].file
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))
    with pytest.raises((UserError, ArgumentError), match=says):
        FORMATS[name].read(tmp_path)


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.file.endswith((".json", ".jsonl"))])
def test_json_that_is_nested_beyond_its_reader_is_refused(tmp_path, name):
    FORMATS[name].example(tmp_path)
    (tmp_path / FORMATS[name].file).write_text('{"a": ' + nested(100_000) + "}")
    with pytest.raises(UserError):
        FORMATS[name].read(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62] * 2, pa.timestamp("ms")),
        pa.array([2**62] * 2, pa.duration("s")),
        pa.array([2**30] * 2, pa.date32()),
        pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"\xff\xfe"] * 2, pa.binary()).buffers()[1:]]),
    ],
    ids=lambda values: str(values.type),
)
def test_a_cell_that_python_cannot_hold_is_refused(tmp_path, values):
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": values, "problem_text": values}), file)
    for read in (lambda: load_documents(CorpusConfig(documents=(str(file),))), lambda: load_problems(file)):
        with pytest.raises(UserError, match=r"not a readable Parquet file"):
            read()


@pytest.mark.parametrize("changes", [{"_format_columns": []}, {"_format_type": "numpy"}])
def test_how_a_saved_folder_formats_its_rows_is_not_asked(tmp_path, changes):
    kind = FORMATS["documents, state.json"]
    kind.example(tmp_path)
    file = tmp_path / kind.file
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = load_documents(CorpusConfig(documents=(str(tmp_path / "data"),)))
    assert [document.text for document in found.documents] == ["本文", "別"]
