"""Every format that a user's file may have: a good example, how it is damaged, and what reads it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from medllm.cli import COMMANDS, parse
from medllm.command import Command
from medllm.config import LoraConfig
from medllm.corpus.documents import load_documents
from medllm.engine import Generation
from medllm.exam.loaders import load_problems
from medllm.exam.option_journal import OPTION_JOURNAL, KeptOption, OptionJournal
from medllm.exam.predictions import in_letters, read_predictions
from medllm.journal import JOURNAL, Journal, Kept
from medllm.metrics import Metrics
from medllm.mini.study import BASE
from medllm.model.adapter import WEIGHTS, module_name, open_adapters, tensor_name, write_adapter
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.endings import read_endings
from medllm.model.files import ADAPTER, INDEX
from medllm.model.random import random_tensors
from medllm.model.tokenizer import Message, check_vocabulary, decode, encode_prompt, encode_texts, load_tokenizer
from medllm.preferences.records import read_preferences
from medllm.provenance import PROVENANCE
from medllm.report.formats import WRITERS
from medllm.report.page import write_report
from medllm.report.results import StudyTable
from medllm.report.runs import report_from_runs
from medllm.report.study import ReportInput
from medllm.report.tables import terminal_table, terminal_text, to_json, years_to_json
from medllm.stage_config import CorpusConfig
from medllm.text_files import read_json_object
from medllm.verify.files import check_files
from medllm.verify.record import open_record
from tests.fuzz.format import Damage, Format
from tests.fuzz.mutations import damaged_bytes, damaged_header, damaged_json, damaged_lines, damaged_table, damaged_value
from tests.fuzz.server_replies import REPLIES
from tests.small_model import small_config
from tests.written_study import DRAW, write_study

PROBLEM = {"problem_id": "112A1", "problem_text": "どれか。", "choices": ["甲", "乙"], "answer": ["a"], "points": "1"}
PROBLEMS = [PROBLEM | {"explanation": "甲である。", "year": 2018}, PROBLEM | {"problem_id": "112A2", "kinki": ["b"]}]
PREFERENCE = {
    "problem_id": "1",
    "prompt": "問",
    "ground_truth": {"text": "Answer:a", "answer": "a", "seed": None, "settings": {}},
    "chosen": [{"text": "Answer:a", "answer": "a", "seed": 0, "settings": {"temperature": 1.0}}],
    "rejected": [{"text": "Answer:b", "answer": "b", "seed": 1, "settings": {}}],
}
TURNS = (Message("system", "簡潔に。"), Message("user", "どれか。"))
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def _lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text, encoding="utf-8")


def _table(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def _arrow(folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": "本文"}, {"text": "別"}]).save_to_disk(folder / "data")


def _exam(folder: Path) -> None:
    _write("112-A.jsonl", _lines(PROBLEMS), folder)
    _write("112-A_metadata.jsonl", _lines([{"problem_id": "112A1", "category": "内科", "kinki": ["b"]}]), folder)


def _model(folder: Path, *, shard_bytes: int = 1 << 30) -> None:
    import numpy as np

    small = small_config(vocab_size=600)
    tensors = random_tensors(small, lambda *shape: np.zeros(shape, np.float32))
    write_model(folder / "model", small.to_hf() | {"eos_token_id": 0}, tensors, shard_bytes=shard_bytes)
    _write("generation_config.json", json.dumps({"eos_token_id": [0, 1], "stop_strings": ["。\n"]}), folder / "model")


def _open_model(folder: Path) -> None:
    model = ModelDirectory(folder / "model")
    found = model.architecture
    model.check_quantization("none")
    found.rotary.frequencies(found.head_dim)
    for name, tensor in found.tensors.items():
        if model.logical_shape(name) != tensor.shape:
            break
        model.dtype(name)


def _adapter(folder: Path) -> None:
    import numpy as np

    _model(folder)
    small = small_config()
    shapes = {module_name(layer, name): one.shape for layer in range(2) for name, one in small.projections.items()}
    shapes = {module: shape for module, shape in shapes.items() if module.endswith(("q_proj", "up_proj"))}
    lora = LoraConfig(
        rank=4, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 2}, alpha_pattern={r"0\.mlp\.up_proj": 3.0}
    )
    tensors = {}
    for module, (out, into) in shapes.items():
        rank = lora.rank_of(module)
        tensors[tensor_name(module, "A")] = np.zeros((rank, into), np.float32)
        tensors[tensor_name(module, "B")] = np.zeros((out, rank), np.float32)
    write_adapter(folder / "adapter", lora, tensors, "base")


def _open_adapter(folder: Path) -> None:
    (adapter,) = open_adapters([folder / "adapter"], ModelDirectory(folder / "model"))
    for module in adapter.modules():
        adapter.lora.scaling_of(module)


def _tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / name)
    settings = read_json_object(folder / "tokenizer_config.json", "")
    _write("tokenizer_config.json", json.dumps(settings | {"chat_template": TEMPLATE}), folder)


def _open_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, 1 << 20, folder)
    for ids in encode_texts(tokenizer, ["本文", "a b"]):
        decode(tokenizer, ids)
    encode_prompt(tokenizer, TURNS)


def _settings(settings: Mapping[str, Any], folder: Path) -> None:
    _write("settings.yaml", json.dumps(settings), folder)


def _parse(command: str, needed: list[str], folder: Path) -> None:
    found = COMMANDS[command]
    assert isinstance(found, Command)
    parse(command, found, ["--config", str(folder / "settings.yaml"), *needed])


CPT = {
    "model": {"path": "base", "quantization": "nf4", "dtype": "bfloat16"},
    "run": "run",
    "corpus": {"documents": ["a.txt"], "length": 128},
    "lora": {"rank": 8, "alpha": 16.0, "targets": ["q_proj"], "rank_pattern": {"q_proj": 4}},
    "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.99]},
    "training": {"epochs": 1, "batch_size": 2},
    "mesh": "data=1",
}
EVALUATE = {"model": {"path": "base"}, "run": "run", "problems": ["a.jsonl"], "sampling": {"temperature": 0.5}, "shot_count": 0}
LAYOUT = {"known_by": ["q", "options"], "question": "q", "options": "options", "answer": "gold", "skips": ["images"]}


def _layout(folder: Path) -> None:
    _write("layout.yaml", json.dumps(LAYOUT), folder)
    _write("rows.jsonl", _lines([{"q": "どれか。", "options": {"a": "甲", "b": "乙"}, "gold": "a"}]), folder)


def _report(folder: Path) -> tuple[ReportInput, StudyTable | None]:
    study = report_from_runs([folder / "cpt", folder / "curate", folder / "evaluate-base-3-shot"], draw=DRAW)
    table, sets = study.table(), study.sets_table()
    for written in WRITERS.values():
        written(table, study.cells, sets)
    if table:
        terminal_text(terminal_table(table, published=True))
        json.dumps([to_json(table), years_to_json(study.cells)])
    return study, table


def _report_page(folder: Path) -> None:
    study, table = _report(folder)
    write_report(folder / "report.html", study, table)


def _verified(folder: Path) -> None:
    check_files(open_record(folder / "evaluate-base-3-shot"))


def _answers(folder: Path) -> None:
    Journal(folder / JOURNAL).add(
        Kept(f"p{number}", 0, "5b1c", Generation("甲\nAnswer:a", (3, 1, 4), "stop"), {"model": "m"}) for number in range(3)
    )


def _options(folder: Path) -> None:
    OptionJournal(folder / OPTION_JOURNAL).add(
        KeptOption(f"p{number}", 0, "5b1c", 1.5, 3, {"model": "m"}) for number in range(3)
    )


_CSV = "question,A,B,C,D,answer\nどれか。,甲,乙,丙,丁,A\n二問,1,2,3,4,B\n"
_PREDICTIONS = [{"problem_id": "1", "prediction": "a,b", "explanation": "甲"}, {"problem_id": "2", "prediction": "c"}]
_TEXTS = [{"text": "本文", "n": 1}, {"text": "別の本文", "n": 2}]


def _problems(name: str, folder: Path) -> object:
    return load_problems(folder / name)


def _documents(name: str, folder: Path) -> object:
    return load_documents(CorpusConfig(documents=(str(folder / name),)))


def _predictions(name: str, folder: Path) -> None:
    in_letters(read_predictions(folder / name), {"1": 5, "2": 5})


def _rows(name: str, text: str, read: Callable[[str, Path], object], *damages: Damage) -> Format:
    return Format(partial(_write, name, text), name, partial(read, name), damages)


def _run_file(name: str, *damages: Damage) -> Format:
    return Format(write_study, name, _report, damages, whole=_report_page)


def _journal(name: str, example: Callable[[Path], object], read: Callable[[Path], object]) -> Format:
    return Format(example, name, lambda folder: read(folder / name), (damaged_lines,))


def yaml_of_json(data: bytes, rng: random.Random) -> bytes:
    """A file of settings that is JSON, its values damaged, in YAML's own way of writing them."""
    return yaml.safe_dump(json.loads(damaged_json(data, rng)), allow_unicode=False).encode()


def _damaged_yaml(data: bytes, rng: random.Random) -> bytes:
    """A file of settings, its values damaged."""
    return yaml.safe_dump(damaged_value(yaml.safe_load(data), rng)).encode()


FORMATS: Mapping[str, Format] = {
    "problems, JSON lines": _rows("p.jsonl", _lines(PROBLEMS), _problems, damaged_lines),
    "problems, JSON": _rows("p.json", json.dumps(PROBLEMS), _problems, damaged_json),
    "problems, CSV": _rows("p.csv", _CSV, _problems),
    "problems, Parquet": Format(
        partial(_table, "p.parquet", PROBLEMS), "p.parquet", partial(_problems, "p.parquet"), (damaged_table,)
    ),
    "metadata": Format(_exam, "112-A_metadata.jsonl", partial(_problems, "112-A.jsonl"), (damaged_lines,)),
    "predictions, JSON lines": _rows("a.jsonl", _lines(_PREDICTIONS), _predictions, damaged_lines),
    "predictions, JSON": _rows("a.json", json.dumps({"results": _PREDICTIONS}), _predictions, damaged_json),
    "preferences": _rows("p.jsonl", _lines([PREFERENCE]), lambda name, folder: read_preferences(folder / name), damaged_lines),
    "documents, JSON lines": _rows("d.jsonl", _lines(_TEXTS), _documents, damaged_lines),
    "documents, JSON": _rows("d.json", json.dumps(_TEXTS), _documents, damaged_json),
    "documents, CSV": _rows("d.csv", "text,n\n本文,1\n別の本文,2\n", _documents),
    "documents, text": _rows("d.txt", "本文\n別の本文\n", _documents),
    "documents, Parquet": Format(
        partial(_table, "d.parquet", _TEXTS), "d.parquet", partial(_documents, "d.parquet"), (damaged_table,)
    ),
    "documents, Arrow": Format(_arrow, "data/data-00000-of-00001.arrow", partial(_documents, "data")),
    "documents, state.json": Format(_arrow, "data/state.json", partial(_documents, "data"), (damaged_json,)),
    "documents, dataset_info.json": Format(_arrow, "data/dataset_info.json", partial(_documents, "data"), (damaged_json,)),
    ADAPTER: Format(_adapter, f"adapter/{ADAPTER}", _open_adapter, (damaged_json,)),
    WEIGHTS: Format(_adapter, f"adapter/{WEIGHTS}", _open_adapter, (damaged_header,)),
    "config.json": Format(_model, "model/config.json", _open_model, (damaged_json,)),
    "model.safetensors": Format(_model, "model/model.safetensors", _open_model, (damaged_header,)),
    "generation_config.json": Format(
        _model,
        "model/generation_config.json",
        lambda folder: read_endings(load_tokenizer(BASE), folder / "model"),
        (damaged_json,),
    ),
    INDEX: Format(partial(_model, shard_bytes=20000), f"model/{INDEX}", _open_model, (damaged_json,)),
    "tokenizer.json": Format(_tokenizer, "tokenizer.json", _open_tokenizer, (damaged_json,)),
    "tokenizer_config.json": Format(_tokenizer, "tokenizer_config.json", _open_tokenizer, (damaged_json,)),
    "settings of cpt": Format(
        partial(_settings, CPT), "settings.yaml", partial(_parse, "cpt", []), (damaged_json, yaml_of_json)
    ),
    "settings of evaluate": Format(
        partial(_settings, EVALUATE), "settings.yaml", partial(_parse, "evaluate", []), (damaged_json, yaml_of_json)
    ),
    "layout": Format(
        _layout,
        "layout.yaml",
        lambda folder: load_problems(folder / "rows.jsonl", layout=folder / "layout.yaml"),
        (damaged_json, yaml_of_json),
    ),
    "run, config.yaml": _run_file("cpt/config.yaml", damaged_bytes, _damaged_yaml),
    "run, config.yaml of an exam": _run_file("evaluate-base-3-shot/config.yaml", _damaged_yaml),
    "run, result.json": _run_file("evaluate-base-3-shot/result.json", damaged_json),
    "run, metrics.jsonl": _run_file("cpt/metrics.jsonl", damaged_lines),
    "run, environment.json": _run_file("cpt/environment.json", damaged_json),
    "run, predictions.jsonl": _run_file("evaluate-base-3-shot/predictions.jsonl", damaged_lines),
    "run, provenance.json": Format(write_study, f"evaluate-base-3-shot/{PROVENANCE}", _verified, (damaged_json,)),
    f"run, {JOURNAL}": _journal(JOURNAL, _answers, Journal),
    f"run, {OPTION_JOURNAL}": _journal(OPTION_JOURNAL, _options, OptionJournal),
    "run that goes on, metrics.jsonl": Format(
        write_study, "cpt/metrics.jsonl", lambda folder: Metrics(folder / "cpt").forget_after(12), (damaged_lines,)
    ),
    **REPLIES,
}
