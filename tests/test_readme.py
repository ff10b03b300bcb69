"""README and docs stay true: their Python runs, their commands and options exist, what they point to is there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from medllm.cli import COMMANDS, main
from medllm.command_words import check_options, find_command

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands(page: Path) -> list[list[str]]:
    """Every ``medllm …`` command line of a page, in words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("medllm ")]


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"), ids=lambda code: code.split("\n")[0][:40])
def test_the_readmes_python_runs(code, tmp_path, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medllm").symlink_to(ROOT / "medllm")
    problem = {"problem_id": "1", "problem_text": "?", "choices": ["x", "y"], "answer": ["a"]}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"problem_id": "1", "prediction": "a", "explanation": "a"}))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    if "sheet" in names:
        assert names["sheet"].points == 1
    else:
        assert float(names["loss"]) > 0
        assert names["gradients"]


@PAGE
def test_every_command_on_a_page_parses(page):
    for words in commands(page):
        if words[1].startswith("--"):
            continue
        name, command, rest = find_command(words[1:], COMMANDS)
        check_options(name, [word for word in rest if word not in ("--help", "--debug")], command.parser())


@PAGE
def test_what_a_page_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"(?:scripts|parity_tests)/[\w./]+\w", text):
        assert (ROOT / script).exists(), script


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"`medllm ([a-z |]+)`", text)
    assert listed is not None
    assert set(listed[1].split(" | ")) == set(COMMANDS)


def test_version_and_help_exit_cleanly(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as done:
            main([option])
        assert done.value.code == 0
    assert capsys.readouterr().err == ""
