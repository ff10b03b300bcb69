"""Values that damage has found to end in a traceback, each now refused in a line that names where it stands."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from jsonargparse import ArgumentError

from medllm.corpus.documents import load_documents
from medllm.errors import UserError
from medllm.exam.loaders import load_problems
from medllm.stage_config import CorpusConfig
from tests.fuzz.formats import FORMATS
from tests.fuzz.trial import REFUSED, read_one

ANSWER = {"problem_id": "p", "sample": 0, "prompt": "5b1c", "text": "", "tokens": [], "finish": "stop", "stopped": ""}
ROW = {"problem_id": "1", "correct": True, "points": 1}


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
        ("run, result.json", {"score": {"results": [ROW], "by_year": {"2024": {"points": 1}}}}, "'points' and 'possible'"),
        ("run, result.json", {"score": {"results": [ROW], "by_category": ["x"]}}, "'correct' and 'questions'"),
        ("run, result.json", {"score": {"results": [ROW | {"points": 10**400}]}}, "'points'"),
        ("run, provenance.json", {"outputs": ["a"]}, "outputs"),
        ("run, provenance.json", {"sessions": [{"inputs": {"problems": ["a"]}}]}, "session 1: digests"),
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
    assert read_one(FORMATS[name].read, tmp_path) == REFUSED
    with pytest.raises((UserError, ArgumentError), match=says):
        FORMATS[name].read(tmp_path)


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.file.endswith((".json", ".jsonl"))])
def test_json_that_is_nested_beyond_its_reader_is_refused(tmp_path, name):
    FORMATS[name].example(tmp_path)
    (tmp_path / FORMATS[name].file).write_text('{"a": ' + nested(100_000) + "}\n")
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


TEXTS = (".json", ".jsonl", ".yaml", ".txt", ".csv")
TORN = "run that goes on, metrics.jsonl"  # whose last line, torn, does not count


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.file.endswith(TEXTS) and name != TORN])
def test_a_torn_byte_order_mark_is_no_empty_file(tmp_path, name):
    FORMATS[name].example(tmp_path)
    (tmp_path / FORMATS[name].file).write_bytes(b"\xef\xbb")
    assert read_one(FORMATS[name].read, tmp_path) == REFUSED


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("run, answers.journal", nested(100_000)),
        (
            "run, answers.journal",
            '{"problem_id": "p", "sample": 0, "prompt": "5b1c", "text": 1, "tokens": [], "finish": "", "stopped": ""}',
        ),
        ("run that goes on, metrics.jsonl", nested(100_000)),
        ("run that goes on, metrics.jsonl", '{"loss": 1.0}'),
        ("run that goes on, metrics.jsonl", "[1]"),
        ("run that goes on, metrics.jsonl", f'{{"step": 1, "loss": {10**30}}}'),
    ],
)
def test_a_line_before_the_last_is_refused_by_its_number(tmp_path, name, line):
    FORMATS[name].example(tmp_path)
    file = tmp_path / FORMATS[name].file
    file.write_text(f"{line}\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    with pytest.raises(UserError, match=f"{file.name}:1: is no line of"):
        FORMATS[name].read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layout": "\ud800"}, "no name of a file"),
        ({"layout": "\0"}, "no name of a file"),
        ({"problems": 3}, "problems"),
        ({"problems": [["x"]]}, "problems"),
        ({"layout": ["x"]}, "layout"),
        ({"shot_count": "x"}, "shot_"),
    ],
)
def test_what_a_report_asks_of_settings_is_refused_by_name(tmp_path, settings, says):
    kind = FORMATS["run, config.yaml of an exam"]
    kind.example(tmp_path)
    file = tmp_path / kind.file
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    with pytest.raises(UserError, match=says):
        kind.read(tmp_path)


def test_a_page_is_made_of_what_an_older_run_says_otherwise(tmp_path):
    """What is shown beside the figures, and is of another kind than it was expected to be, is left out."""
    kind = FORMATS["run, environment.json"]
    kind.example(tmp_path)
    for name, changes in (
        ("cpt/environment.json", {"packages": "jax", "command": "medllm"}),
        ("evaluate-base-3-shot/result.json", {"readings": {"rules": [], "reasons": []}, "seconds": float("inf")}),
    ):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    kind.whole(tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
