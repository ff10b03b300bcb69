"""Each engine's study runs where the other's framework is not installed."""

import json
import subprocess
import sys

import pytest

# Makes packages look absent to every import and every "is it installed?" in the process.
_WITHOUT = """
import sys
from importlib import machinery
blocked = set(sys.argv[1].split(","))
found = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in blocked else found(name, path, target)
)
from medllm.cli import main
code = main(sys.argv[2:])
assert not blocked & set(sys.modules), blocked & set(sys.modules)
sys.exit(code)
"""


def run_without(packages: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "absent"),
    [("jax", "torch,peft,trl,accelerate,bitsandbytes"), ("torch", "jax,jaxlib,flax,optax,orbax")],
)
def test_the_study_runs_without_the_other_framework(engine, absent, tmp_path):
    out = tmp_path / "study"
    done = run_without(
        absent, "mini", "--engine", engine, "--preset", "mini_smoke", "--out", str(out), "--json", str(tmp_path / "r.json")
    )
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").exists()
    assert json.loads((tmp_path / "r.json").read_text())["engine"] == engine


@pytest.mark.parametrize(("engine", "package"), [("jax", "jax"), ("torch", "torch"), ("openai", "openai")])
def test_an_engine_that_is_not_installed_is_named_with_its_install_command(engine, package, tmp_path):
    problems = tmp_path / "p.jsonl"
    problems.write_text(json.dumps({"problem_id": "1", "problem_text": "?", "choices": ["x", "y"], "answer": ["a"]}) + "\n")
    settings = ["--model.path", "m", "--run", str(tmp_path / "run"), "--problems", str(problems), "--shot_count", "0"]
    done = run_without(package, "evaluate", "--engine", engine, *settings)
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_the_audit_names_the_stack_that_is_not_installed(package, tmp_path):
    done = run_without(package, "parity", "--model.path", "m", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"'{package}': pip install" in done.stderr
    assert not (tmp_path / "out").exists()
