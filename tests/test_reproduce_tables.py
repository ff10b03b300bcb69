"""Every row of the paper's tables is a preset, and one command runs it with the paper's figures beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medllm.cli import COMMANDS, main, parse
from medllm.exam.loaders import write_problems
from medllm.exam.predictions import Prediction, write_predictions
from medllm.mini.problems import exam_problems, shot_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.presets import TABLE_ROWS, table_rows
from medllm.report import paper

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce_tables.sh"
NAMED = ["--problems", "exam.jsonl"]
# The rows of each table, written out from the paper; those of GPT-4 and GPT-3.5 are predictions that were published.
TABLES = {
    1: "Preferred-MedLLM-Qwen-72B, GPT-4o, GPT-4 Turbo, Qwen2.5-72B-Instruct, Qwen2.5-72B, Llama3-Preferred-MedSwallow-70B, "
    "Llama-3.3-Swallow-70B-v0.4, GPT-4o mini, Llama-3-Swallow-70B-v0.1, sarashina2-70b",
    2: "Preferred-MedLLM-Qwen-72B, CPT + DPO, CPT, RPO without CPT, Qwen2.5-72B",
    3: "Preferred-MedLLM-Qwen-72B, CPT, Qwen2.5-72B, Qwen2.5-72B-Instruct",
}


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_a_preset_with_the_papers_figures(table):
    rows = {name: row for name, row in table_rows(TABLE_ROWS).items() if name.startswith(f"table{table}_")}
    assert sorted(row["label"] for row in rows.values()) == sorted(TABLES[table].split(", "))
    for name, row in rows.items():
        values = parse("evaluate", COMMANDS["evaluate"], ["--config", name, *NAMED])
        assert (values.label, values.model.path, values.run) == (row["label"], row["model"]["path"], f"runs/{name}")
        known = paper.published(values.label)
        if table == 3:
            assert (values.method, values.shot_count, len(known.sets)) == ("options", 0, 4)
        else:
            assert (values.method, values.shot_count, values.template) == ("generate", 3, "igakuqa")
            assert None not in (known.plain, known.explained)
        assert (values.format == "chat") == ("GPT" in values.label or "Instruct" in values.label)
        assert (values.engine == "openai") == ("GPT" in values.label)


def test_what_is_set_beside_a_row_wins(capsys):
    words = ["--config", "table1_gpt-4o", *NAMED, "--engine", "jax", "--model.path", "mine", "--sampling.max_new_tokens", "9"]
    with pytest.raises(SystemExit):
        main(["evaluate", *words, "--print_config"])
    said = yaml.safe_load(capsys.readouterr().out)
    assert (said["engine"], said["model"]["path"], said["sampling"]["max_new_tokens"]) == ("jax", "mine", 9)
    assert (said["label"], said["format"]) == ("GPT-4o", "chat")
    assert main(["evaluate", "--config", "table1_gpt-5", *NAMED]) == 2
    assert "neither a file nor a preset; there are paper_evaluate_72b, table1_gpt-4-turbo" in capsys.readouterr().err


def script(tmp_path, *rows, **environment):
    settings = "--engine jax --model.dtype float32 --model.quantization none --limit 4 --sampling.max_new_tokens 8"
    environment |= {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON_BIN": str(tmp_path),
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "OUT": str(tmp_path / "out"),
        "EVALUATE_ARGS": f"{settings} --model.path {BASE}",
    }
    # The command of this interpreter, whatever is installed beside it.
    command = tmp_path / "medllm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m medllm "$@"\n')
    command.chmod(0o755)
    return subprocess.run(["bash", str(SCRIPT), *rows], env=environment, capture_output=True, text=True, check=False)


def test_a_row_of_the_exam_and_published_predictions_stand_beside_the_papers(tmp_path):
    pytest.importorskip("jax")
    world = make_world()
    exam = tmp_path / "igakuqa"
    (exam / "data").mkdir(parents=True)
    (exam / "baseline_results/2018").mkdir(parents=True)
    problems = exam_problems(world, 1)[:4]
    write_problems(exam / "data/exam.jsonl", problems)
    write_problems(tmp_path / "shots.jsonl", shot_problems(world, 3))
    right = [Prediction(problem.problem_id, ",".join(problem.answer)) for problem in problems]
    write_predictions(exam / "baseline_results/2018/112-A_gpt4.jsonl", right)
    done = script(tmp_path, "table1_qwen2.5-72b", "table1_gpt-4", EXAM=str(exam), SHOTS=str(tmp_path / "shots.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "; published 0.802; " in done.stdout
    assert "; published 0.710; " in done.stdout
    assert "0.802 / 0.710" in done.stdout
    rows = json.loads((tmp_path / "out/report.json").read_text())["scores"]["rows"]
    assert [(row["model"], sorted(row["scores"]), row["published"]["plain"]) for row in rows] == [
        ("Qwen2.5-72B", ["3-shot", "3-shot with explanation"], 0.802),
        ("GPT-4", ["3-shot"], 0.782),
    ]


def test_a_row_of_the_zero_shot_sets_stands_beside_the_papers(tmp_path):
    pytest.importorskip("jax")
    sets = tmp_path / "sets"
    sets.mkdir()
    rows = [
        {"sample_id": str(i), "question": "何色か。", "options": ["赤い", "青い"], "answer_idx": i % 2, "n_options": 2}
        for i in range(2)
    ]
    contexts = [row | {"metadata": {"context": "空は青い。"}} for row in rows]
    for name, given in (("MedQA", rows), ("MedMCQA", rows), ("PubMedQA", contexts)):
        (sets / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    subjects = ["anatomy", "clinical_knowledge", "college_medicine", "medical_genetics", "professional_medicine", "law"]
    lines = [f"{i},何か。,赤,青,緑,白,B,{subject}" for i, subject in enumerate(subjects)]
    (sets / "MMMLU.csv").write_text("\n".join([",Question,A,B,C,D,Answer,Subject", *lines]), encoding="utf-8")
    done = script(tmp_path, "table3_qwen2.5-72b", SETS=str(sets))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/report.json").read_text())["sets"]
    assert found["sets"] == ["MMMLU", "MedQA", "MedMCQA", "PubMedQA"]
    (row,) = found["rows"]
    assert [share["published"] for share in row["shares"].values()] == [0.797, 0.652, 0.591, 0.779]
    assert [share["problems"] for share in row["shares"].values()] == [4, 2, 2, 2]
    assert set(row["subjects"]["MMMLU"]) == set(subjects[:4]), "the limit is of four; a subject that is not the paper's is out"
    assert "published 0.797" in " ".join(done.stdout.split())


def test_a_script_without_rows_says_what_to_name(tmp_path):
    done = script(tmp_path)
    assert done.returncode == 2
    assert "name rows, such as table1_gpt-4o" in done.stderr
