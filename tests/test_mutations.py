"""The mutation check: its faults can be planted, the docs list them, and the script tells caught from survived and broken."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mutate import ROOT, SECTION, read_faults

FAULTS = read_faults()
TEST = "from medllm.numbers import double\n\ndef test_two():\n    assert double(2) == 4\n"
REFUSED = "\nimport pytest\n\ndef test_none():\n    with pytest.raises(TypeError):\n        double(None)\n"


@pytest.fixture
def project(tmp_path):
    """``project(test, {fault: (old, new)})`` → a git working tree of one product module, one parity test and these faults."""

    def write(test: str, faults: dict[str, tuple[str, str]]) -> Path:
        root = tmp_path / "root"
        declared = ['file = "medllm/numbers.py"', 'first = "parity_tests/test_double.py"']
        for name, (old, new) in faults.items():
            declared += ["[[fault]]", f'name = "{name}"', 'models = "a fault"', f'old = "{old}"', f'new = "{new}"']
        files = {
            "medllm/__init__.py": "",
            "medllm/numbers.py": "def double(x):\n    return 2 * x\n",
            "parity_tests/test_double.py": test,
            "scripts/faults/all.toml": "\n".join(declared),
        }
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        return root

    return write


def mutate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/mutate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def error_of(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that is the user's."""
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    return ended.stderr.strip().splitlines()[-1]


def test_every_fault_can_be_planted_and_leaves_python():
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        mutated = fault.planted_in(text)
        if fault.file.endswith(".py"):
            text, mutated = (ast.dump(ast.parse(one)) for one in (text, mutated))
        assert mutated != text, f"{fault.name} changes nothing"
        assert (ROOT / fault.first).exists(), f"{fault.name}: no {fault.first}"


def test_there_are_enough_faults_and_no_two_are_the_same():
    assert len(FAULTS) >= 40
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_the_docs_list_every_fault_and_the_test_that_catches_it():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    section = page.partition(f"\n{SECTION}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [[fault.name, fault.models, f"`{fault.file}`"] for fault in FAULTS]
    assert all(row[3].startswith("caught: `test_") for row in rows)


def test_a_fault_is_caught_by_an_assertion_and_by_nothing_else(project, tmp_path):
    faults = {
        "tripled": ("2 * x", "3 * x"),
        "commuted": ("2 * x", "x * 2"),
        "accepted": ("2 * x", "2 * x if x else 0"),
        "raises": ("2 * x", "2 * y"),
        "not-importable": ("def double", "import no_such_module; double"),
    }
    root = project(TEST + REFUSED, faults)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{SECTION}\n\nWhat it is.\n\n| an | old |\n|---|---|\n\n## More\n\n| a | table |\n")
    ended = mutate("--root", root, "--jobs", 2, "--markdown", "--json", tmp_path / "found.json", "--docs", page)
    found = {verdict["name"]: verdict for verdict in json.loads((tmp_path / "found.json").read_text())}
    verdicts = {"tripled": "caught", "commuted": "survived", "raises": "broken", "not-importable": "broken"}
    verdicts["accepted"] = "caught"
    assert {name: verdict["verdict"] for name, verdict in found.items()} == verdicts
    assert found["tripled"]["test"] == "parity_tests/test_double.py::test_two"
    assert "NameError" in found["raises"]["message"]
    assert "| tripled | a fault | `medllm/numbers.py` | caught: `test_two` |" in ended.stdout
    assert page.read_text() == f"# Page\n\n{SECTION}\n\nWhat it is.\n\n{ended.stdout}\n## More\n\n| a | table |\n"
    assert "2 of 5 faults caught" in ended.stderr
    assert ended.returncode == 1
    assert (root / "medllm/numbers.py").read_text().count("2 * x") == 1, "the working tree is as it was"


def test_the_test_that_the_docs_name_is_run_first(project):
    root = project(f"{TEST}\n\ndef test_three():\n    assert double(3) == 6\n", {"tripled": ("2 * x", "3 * x")})
    ended = []
    for named in ("test_three", "test_that_was_renamed"):
        (root / "docs").mkdir(exist_ok=True)
        (root / "docs/faults.md").write_text(f"| tripled | a fault | `medllm/numbers.py` | caught: `{named}` |\n")
        ended.append(mutate("--root", root).stderr)
    assert "parity_tests/test_double.py::test_three: " in ended[0]
    assert "parity_tests/test_double.py::test_two: " in ended[1]


def test_an_interrupted_run_goes_on_with_the_faults_it_has_no_verdict_on(project, tmp_path):
    root = project(TEST, {"tripled": ("2 * x", "3 * x"), "halved": ("2 * x", "x / 2")})
    known = {"name": "tripled", "verdict": "caught", "test": "an earlier run's", "message": "", "seconds": 1.0}
    (tmp_path / "found.json").write_text(json.dumps([known]))
    assert mutate("--root", root, "--json", tmp_path / "found.json", "--resume").returncode == 0
    first, second = json.loads((tmp_path / "found.json").read_text())
    assert first == known
    assert (second["name"], second["verdict"]) == ("halved", "caught")


def test_a_suite_that_is_red_without_a_fault_proves_nothing(project):
    root = project("def test_two():\n    assert 1 == 2\n", {"tripled": ("2 * x", "3 * x")})
    assert "without any fault parity_tests/test_double.py::test_two fails" in error_of(mutate("--root", root))


def test_a_suite_that_imports_the_product_from_elsewhere_proves_nothing(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "medllm").mkdir(parents=True)
    (elsewhere / "medllm" / "numbers.py").write_text("double = abs\n")
    (elsewhere / "medllm" / "__init__.py").touch()
    test = f"import sys\nsys.path.insert(0, '{elsewhere}')\nfrom medllm.numbers import double\n\ndef test_it(): double(2)\n"
    root = project(test, {"tripled": ("2 * x", "3 * x")})
    assert "elsewhere/medllm/__init__.py and not the copy" in error_of(mutate("--root", root))


def test_text_that_does_not_occur_once_is_not_planted(project):
    root = project(TEST, {"tripled": ("4 * x", "3 * x")})
    assert "`old` occurs 0 times in medllm/numbers.py" in error_of(mutate("--root", root))


def test_an_unknown_fault_is_bad_usage():
    assert error_of(mutate("--only", "no-such")).endswith("no fault is named no-such; --list shows their names")


def test_a_real_fault_is_caught_in_a_copy_of_this_tree(tmp_path):
    ended = mutate("--only", "response-end-doubled", "--json", tmp_path / "found.json")
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["verdict"] == "caught"
    assert found["test"].startswith("parity_tests/test_preference_tokenization.py::")
