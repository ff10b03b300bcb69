"""docs/data.md is true: the readers take its examples, need the fields it calls required, and no others."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from medllm.cli import main
from medllm.corpus.documents import load_documents
from medllm.errors import UserError
from medllm.exam.loaders import load_problems, write_problems
from medllm.exam.predictions import Prediction, read_predictions
from medllm.exam.problem import Problem
from medllm.families import FAMILIES
from medllm.model.adapter import read_adapter
from medllm.preferences.records import Preference, Sample, read_preferences
from medllm.report.runs import report_from_runs
from medllm.rotary import SCALINGS
from medllm.stage_config import CorpusConfig
from tests.pages import DATA, documented, inline_commands, names, tables, write_examples


def declared(heading: str, number: int = 0) -> dict[str, bool]:
    """Field → whether the page calls it required, of a table below a heading."""
    return {name: cells[1] == "yes" for cells in tables(DATA, heading)[number] for name in names(cells[0])}


@pytest.fixture
def examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    return tmp_path


def is_required(read, row: dict, field: str) -> bool:
    """Whether ``read`` refuses a row without a field, and says so."""
    try:
        read({name: value for name, value in row.items() if name != field})
    except UserError as error:
        return field in str(error)
    return False


def line_reader(read, folder: Path):
    """``read`` on a file of one row."""

    def one(row: dict) -> None:
        (folder / "one.jsonl").write_text(json.dumps(row), encoding="utf-8")
        read(folder / "one.jsonl")

    return one


def first_line(file: str) -> dict:
    return json.loads(Path(file).read_text(encoding="utf-8").splitlines()[0])


def test_every_form_of_problem_file_is_read(examples):
    ours = load_problems("problems.jsonl").problems
    assert [(p.accepted, p.points, p.is_numeric) for p in ours] == [
        ((("b",),), 1, False),
        ((("b", "c"),), 3, False),
        ((("120",),), 1, True),
    ]
    (igakuqa,) = load_problems("igakuqa").problems
    assert (igakuqa.year, igakuqa.section, igakuqa.category, igakuqa.kinki) == (2018, "A", "colours", ("a",))
    (jmmlu,) = load_problems("jmmlu/colours.csv").problems
    assert (jmmlu.category, jmmlu.answer) == ("colours", ("b",))
    (pharmacist,) = load_problems("pharmacist").problems
    assert (pharmacist.year, pharmacist.answer, pharmacist.explanation) == (2012, ("b",), "Salt is a substance.")


def test_the_fields_of_a_problem_are_those_that_are_written_and_read(examples):
    whole = Problem("1", "?", ("x", "y"), ("a",), 2, True, "because", 2016, "A", "colours", ("b",), "file:1", "text")
    write_problems("whole.jsonl", [whole])
    assert load_problems("whole.jsonl").problems == (whole,)
    row, said = first_line("whole.jsonl"), declared("Problems")
    assert row.keys() == said.keys()
    assert {field: is_required(line_reader(load_problems, examples), row, field) for field in row} == said


def test_the_documents_are_read(examples):
    found = load_documents(CorpusConfig(documents=("documents.jsonl", "documents.csv"))).documents
    assert len(found) == 3
    read = line_reader(lambda file: load_documents(CorpusConfig(documents=(str(file),))), examples)
    assert is_required(read, first_line("documents.jsonl"), "text")
    assert not is_required(read, first_line("documents.jsonl"), "title")


def test_the_preferences_are_read_and_exported_as_the_page_says(examples):
    (preference,) = read_preferences("preferences.jsonl")
    assert declared("Preferences").keys() == {field.name for field in fields(Preference)}
    assert declared("Preferences", 1).keys() == {field.name for field in fields(Sample)}
    row, read = first_line("preferences.jsonl"), line_reader(read_preferences, examples)
    assert {field: is_required(read, row, field) for field in row} == declared("Preferences")
    sample = row["chosen"][0]
    of_sample = {field: is_required(lambda one: read({**row, "chosen": [one]}), sample, field) for field in sample}
    assert of_sample == declared("Preferences", 1)
    assert preference.chosen[0].settings["finish"] == "stop"
    expected = Path("trl.jsonl").read_text(encoding="utf-8")
    (command,) = (command for command in inline_commands(DATA) if "export-trl --" in command)
    assert main(shlex.split(command)[1:]) == 0
    assert Path("trl.jsonl").read_text(encoding="utf-8") == expected


def test_the_predictions_are_read(examples):
    assert len(read_predictions("predictions.jsonl")) == 3
    assert declared("Predictions").keys() == {field.name for field in fields(Prediction)}
    row, read = first_line("predictions.jsonl"), line_reader(read_predictions, examples)
    assert {field: is_required(read, row, field) for field in row} == declared("Predictions")


def test_the_adapter_is_read(examples):
    config = Path("adapter/adapter_config.json")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {f"{module}.lora_A.weight": np.zeros((2, 4), np.float32), f"{module}.lora_B.weight": np.ones((4, 2), np.float32)}
    save_file(matrices, "adapter/adapter_model.safetensors")
    lora = read_adapter("adapter").lora
    assert (lora.rank, lora.alpha, lora.targets) == (2, 4.0, ("q_proj",))

    def read(row: dict) -> None:
        config.write_text(json.dumps(row))
        read_adapter("adapter")

    whole = {**first_line(str(config)), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    said = declared("Adapters")
    assert {field: is_required(read, whole, field) for field in said} == said


def test_the_settings_are_taken(examples, capsys):
    with pytest.raises(SystemExit) as done:
        main(["cpt", "--config", "cpt.yaml", "--print_config"])
    assert done.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["model"]["quantization"], found["training"]["epochs"]) == ("nf4", 2)


def test_the_run_folders_of_the_page_can_be_reported(examples):
    Path("predictions.jsonl").rename("runs/evaluate/predictions.jsonl")
    for stage in ("rpo", "evaluate"):
        Path(f"runs/{stage}/config.yaml").write_text("engine: jax\n")
        Path(f"runs/{stage}/environment.json").write_text("{}\n")
    found = report_from_runs(["runs/rpo", "runs/evaluate"])
    for run in found.runs:
        assert run.result.keys() == documented("result.json", run.stage), run.stage
    assert {name for line in found.runs[0].metrics for name in line} == documented("metrics.jsonl", "rpo")
    assert [(cell.setting, cell.results[0].correct) for cell in found.cells] == [("3-shot", True)]


def test_the_families_and_rotary_rules_of_the_page_are_those_that_are_opened():
    rows = tables(DATA, "Families")[0]
    assert {names(cells[0])[0]: cells[1] for cells in rows} == {name: one.releases for name, one in FAMILIES.items()}
    positions = next(line for line in DATA.read_text(encoding="utf-8").splitlines() if line.startswith("Positions"))
    assert set(names(positions)) >= {"default", *SCALINGS}
