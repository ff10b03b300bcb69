"""The README's Python runs, and so does the one command of it that no other test runs."""

import json
import shlex

import pytest

from medllm.cli import main
from medllm.exam.loaders import load_problems
from tests.pages import README, ROOT, blocks, commands, write_examples


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda block: block.text.split("\n")[0][:40])
def test_the_readmes_python_runs(block, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medllm").symlink_to(ROOT / "medllm")
    write_examples(tmp_path)
    exec(compile(block.text, "README.md", "exec"), {})
    lines = [json.loads(line) for line in (tmp_path / "runs/cpt/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert capsys.readouterr().out.strip()


def test_published_predictions_are_scored_by_the_readmes_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    published = tmp_path / "igakuqa/baseline_results/2018/112-A_gpt4.jsonl"
    published.parent.mkdir(parents=True)
    (problem,) = load_problems("igakuqa/data/2018").problems
    published.write_text(json.dumps({"problem_id": problem.problem_id, "prediction": ",".join(problem.answer)}))
    (command,) = (command for command in commands(README) if command.startswith("medllm score"))
    assert main(shlex.split(command)[1:]) == 0
    assert json.loads((tmp_path / "gpt4.json").read_text())["correct"] == 1


def test_version_and_help_exit_cleanly(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as done:
            main([option])
        assert done.value.code == 0
    assert capsys.readouterr().err == ""
