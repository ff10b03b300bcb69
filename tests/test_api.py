"""The Python API: ``medllm`` and ``jax_medllm`` hand out what they list, docs/api.md describes it, and its examples run."""

import importlib
import json
import subprocess
import sys

import pytest

import medllm
from scripts.api_page import HEADING, PAGE, homes, write
from tests.forced_devices import environment
from tests.pages import ROOT, blocks, documented, in_run_folder, write_examples

BY_HAND = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
EXAMPLES = [block.text for block in blocks(PAGE, "python") if block.text in BY_HAND]


def test_importing_medllm_imports_nothing_else():
    code = (
        "import sys, time\n"
        "began = time.perf_counter()\n"
        "import medllm\n"
        "assert time.perf_counter() - began < 1\n"
        "from medllm import CptConfig, score, UserError\n"
        "assert not {'jax', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["medllm", "jax_medllm"])
def test_every_public_name_is_there_and_comes_from_its_own_module(package):
    if package == "jax_medllm":
        pytest.importorskip("jax")
    found = importlib.import_module(package)
    assert found.__all__ == sorted(homes(package))
    assert set(found.__all__) <= set(dir(found))
    for name, module in homes(package).items():
        assert getattr(found, name).__module__ == module, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'medllm' has no attribute 'no_such'"):
        medllm.no_such  # noqa: B018


def test_the_page_is_what_the_docstrings_say():
    assert PAGE.read_text(encoding="utf-8") == write(), "run python scripts/api_page.py"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The folder in which the examples ran, one after the other, on what docs/data.md gives as files; the names of the last."""
    pytest.importorskip("jax")
    folder = tmp_path_factory.mktemp("examples")
    (folder / "medllm").symlink_to(ROOT / "medllm")
    write_examples(folder)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in EXAMPLES:
            if "mesh=" in code:  # devices are counted when JAX starts
                run = [sys.executable, "-c", code]
                found = environment(1) | {"PYTHONPATH": str(ROOT)}
                done = subprocess.run(run, env=found, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            else:
                names = {}
                exec(compile(code, str(PAGE), "exec"), names)
    return folder, names


def test_the_examples_train_generate_and_score(examples):
    assert len(EXAMPLES) == 5
    losses = examples[1]["losses"]
    assert losses[-1] < losses[0]


def test_the_examples_train_the_same_on_a_mesh(examples):
    one, two = (json.loads((examples[0] / f"runs/{name}/result.json").read_text()) for name in ("cpt", "mesh"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_a_training_run_leaves_what_docs_data_says(examples):
    run = examples[0] / "runs/cpt"
    assert json.loads((run / "result.json").read_text()).keys() == documented("result.json", "cpt")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == documented("metrics.jsonl", "cpt")
    assert {path.name for path in run.iterdir()} <= in_run_folder()
