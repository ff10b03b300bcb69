"""The scripts of the paper's run go from the base model to the report, here with a small model and a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medllm.exam.loaders import write_problems
from medllm.mini.diet import cpt_documents
from medllm.mini.problems import exam_problems, shot_problems, train_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from tests.pages import documented

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = "--model.dtype float32 --training.max_steps 1 --training.accumulation 2 --lora.rank 4"
OF_TEMPLATES = "--held_out.exact 0.95 --held_out.near 0.9"  # as the embedded study has it of its own exam
SETTINGS = {
    "CPT_ARGS": f"{TINY} {OF_TEMPLATES} --corpus.length 128",
    "CURATE_ARGS": f"{OF_TEMPLATES} --model.dtype float32 --answer_as text --limit 4 "
    "--sampling.samples 2 --sampling.max_new_tokens 48",
    "RPO_ARGS": f"{TINY} {OF_TEMPLATES} --pairs.max_length 512",
    "EVALUATE_ARGS": "--model.dtype float32 --template curation --answer_as text --limit 4 --sampling.max_new_tokens 48",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A corpus, problems up to 2017, shots and an exam, as files."""
    folder = tmp_path_factory.mktemp("inputs")
    world = make_world()
    write_problems(folder / "problems.jsonl", train_problems(world, 1))
    write_problems(folder / "exam.jsonl", exam_problems(world, 1))
    write_problems(folder / "shots.jsonl", shot_problems(world, 3))
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in cpt_documents(world, 1)[:12])
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("script", "engine"), [("reproduce_72b_a100.sh", "torch"), ("reproduce_72b_tpu.sh", "jax")])
def test_the_papers_run_goes_through_on_a_small_model(script, engine, inputs, tmp_path):
    pytest.importorskip(engine)
    environment = os.environ | SETTINGS
    environment |= {
        "PYTHON_BIN": str(Path(sys.executable).parent),
        "JAX_PLATFORMS": "cpu",
        "MODEL": str(BASE),
        "CORPUS": str(inputs / "corpus.jsonl"),
        "PROBLEMS": str(inputs / "problems.jsonl"),
        "SHOTS": str(inputs / "shots.jsonl"),
        "EXAM": str(inputs / "exam.jsonl"),
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(["bash", str(SCRIPTS / script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = {file.parent.name: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/result.json")}
    assert {name: result["engine"] for name, result in results.items()} == dict.fromkeys(
        ("cpt", "curate", "rpo", "evaluate-explanation-false", "evaluate-explanation-true"), engine
    )
    assert results["evaluate-explanation-true"]["setting"] == "3-shot with explanation"
    for result in results.values():
        assert result.keys() <= documented("result.json", result["stage"]), "docs/data.md names every field"
    assert (tmp_path / "out" / "report.html").exists()


def test_a_missing_setting_is_named():
    done = subprocess.run(
        ["bash", str(SCRIPTS / "reproduce_72b_tpu.sh")],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "set MODEL" in done.stderr
