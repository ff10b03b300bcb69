"""Each engine's study runs where the other's framework is not installed, from the wheel that is handed out."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

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


ROOT = Path(__file__).resolve().parents[1]


def built(folder: Path) -> Path:
    """The wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and beside it what this one has, but not this project's folder."""
    made = tmp_path_factory.mktemp("installed")
    venv.create(made / "venv", with_pip=False)
    programs = made / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built(made / "dist"))], check=True)
    (packages,) = (made / "venv" / "lib").glob("python*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def run_installed(programs: Path, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """A program of that environment, from another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    head = [str(programs / command[0]), *command[1:]]
    return subprocess.run(head, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_without(packages: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wheel_is_the_same_to_the_byte_and_brings_its_command(installed, tmp_path):
    (first,) = (installed.parents[1] / "dist").glob("*.whl")
    assert first.read_bytes() == built(tmp_path).read_bytes()
    where = run_installed(installed, tmp_path, "python", "-c", "import medllm, jax_medllm; print(medllm.__file__)")
    assert where.stdout.startswith(str(installed.parent)), where
    assert run_installed(installed, tmp_path, "medllm", "--version").stdout.startswith("medllm ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "absent"),
    [("jax", "torch,peft,trl,accelerate,bitsandbytes"), ("torch", "jax,jaxlib,flax,optax,orbax")],
)
def test_the_study_runs_from_the_wheel_without_the_other_framework(engine, absent, installed, tmp_path):
    out = tmp_path / "study"
    words = ["mini", "--engine", engine, "--preset", "mini_smoke", "--out", str(out), "--json", str(tmp_path / "r.json")]
    done = run_installed(installed, tmp_path, "python", "-c", _WITHOUT, absent, *words)
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
