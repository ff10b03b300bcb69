"""An exam as a task of lm-evaluation-harness: what lies in the rows and in the YAML that reads them."""

import json

import pytest
import yaml

from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.harness_tasks import write_task
from medllm.exam.loaders import write_problems
from medllm.exam.problem import Problem

PROBLEMS = [
    Problem("sky", "空は何色か。", ("赤", "青"), ("b",), category="colours"),
    Problem("study", "効くか。", ("はい", "いいえ"), ("a",), context="効いた。"),
    Problem("two", "2つ選べ。", ("赤", "青", "緑"), ("a", "b")),
    Problem("either", "どれか。", ("赤", "青"), ("a or b",)),
    Problem("days", "何日か。", (), ("3",)),
]


@pytest.mark.parametrize(
    ("method", "prompts", "choices"),
    [
        (
            "options",
            ["質問：空は何色か。\nA. 赤\nB. 青\n答え：", "要旨：効いた。\n質問：効くか。\n答え："],
            [["赤", "青"], ["はい", "いいえ"]],
        ),
        (
            "letters",
            ["質問：空は何色か。\nA. 赤\nB. 青\n答え：", "要旨：効いた。\n質問：効くか。\nA. はい\nB. いいえ\n答え："],
            [["A", "B"], ["A", "B"]],
        ),
    ],
)
def test_a_task_has_its_prompts_choices_and_gold_answers(method, prompts, choices, tmp_path, capsys):
    write_problems(tmp_path / "exam.jsonl", PROBLEMS)
    words = ["data", "task", str(tmp_path / "exam.jsonl"), "--out", str(tmp_path / "tasks"), "--method", method]
    assert main(words) == 0
    assert "task exam, 2 questions; left out: several right options 2, numeric problem 1;" in capsys.readouterr().out
    task = yaml.safe_load((tmp_path / "tasks/exam.yaml").read_text(encoding="utf-8"))
    assert (task["task"], task["output_type"], task["target_delimiter"]) == ("exam", "multiple_choice", "")
    with open(task["dataset_kwargs"]["data_files"]["test"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert [row[task["doc_to_text"]] for row in rows] == prompts
    assert [row[task["doc_to_choice"]] for row in rows] == choices
    assert [row[task["doc_to_target"]] for row in rows] == [1, 0]
    assert [row["category"] for row in rows] == ["colours", ""]


def test_what_cannot_be_a_task_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--name is 'a b'; a task's name"):
        write_task(PROBLEMS, tmp_path / "out", "a b")
    with pytest.raises(UserError, match="no problem has exactly one right option"):
        write_task(PROBLEMS[2:], tmp_path / "out", "odd")
    assert not (tmp_path / "out").exists()
