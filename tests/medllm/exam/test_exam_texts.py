"""Texts read a row, and prediction files read anew beside their official score."""

import json

import pytest

from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.answers import Readings
from medllm.exam.predictions import Prediction
from medllm.exam.problem import Problem
from medllm.exam.scoring import ReadAnew, read_anew, score
from medllm.exam.texts import read_texts

COLOURS = ["赤", "青", "緑"]
PROBLEMS = [Problem(f"q{number}", "何色か。", tuple(COLOURS), ("b",), points=number + 1) for number in range(3)]


def _rows(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def test_the_command_gives_one_reading_a_row_in_order(tmp_path):
    rows = _rows(
        tmp_path,
        {"class": "x", "text": "答え: b", "choices": COLOURS, "answer_count": 1, "explanation": True, "expected": ["b"]},
        {"text": "a,c", "choices": COLOURS, "answer_count": 2},
        {"text": "bまたはc", "choices": COLOURS},
        {"text": "7.2", "choices": [], "gold": "7.20"},
        {"text": "<think>b", "choices": COLOURS},
    )
    out = tmp_path / "readings.json"
    assert main(["data", "read", str(rows), "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == [
        {"answer": ["b"], "rule": "label", "reason": None},
        {"answer": ["a", "c"], "rule": "only", "reason": None},
        {"answer": [], "rule": None, "reason": "ambiguous"},
        {"answer": ["7.20"], "rule": "only", "reason": None},
        {"answer": [], "rule": None, "reason": "cut_off"},
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"choices": COLOURS},
        {"text": 3, "choices": COLOURS},
        {"text": "b"},
        {"text": "b", "choices": "abc"},
        {"text": "b", "choices": COLOURS, "answer_count": 4},
        {"text": "b", "choices": COLOURS, "answer_count": "1"},
        {"text": "b", "choices": COLOURS, "explanation": "no"},
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_file_and_line(tmp_path, row):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        read_texts(_rows(tmp_path, {"text": "b", "choices": COLOURS}, row))


def test_texts_read_anew_stand_beside_the_official_score_and_do_not_change_it():
    predictions = [
        Prediction("q0", "b", "答え: b"),
        Prediction("q1", " b", "正解は b です。"),
        Prediction("q2", "", "わかりません。"),
    ]
    assert score(PROBLEMS, predictions).points == 1
    expected = ReadAnew(3, Readings({"label": 1, "sentence": 1}, {"refused": 1}), {"q1": (" b", "b")})
    assert read_anew(PROBLEMS, predictions) == expected
    with pytest.raises(UserError, match="--from_text"):
        read_anew(PROBLEMS, [Prediction("q0", "b")])


def test_score_writes_both_figures(tmp_path):
    problems = _rows(
        tmp_path,
        *({"problem_id": p.problem_id, "problem_text": p.text, "choices": COLOURS, "answer": ["b"]} for p in PROBLEMS),
    )
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(json.dumps({"problem_id": "q0", "prediction": "b.", "explanation": "d\nb."}), encoding="utf-8")
    out = tmp_path / "score.json"
    words = ["score", "--problems", str(problems), "--predictions", str(predictions), "--json", str(out)]
    assert main([*words, "--from_text", "true", "--explanation", "true"]) == 0
    result = json.loads(out.read_text())
    assert (result["points"], result["read_points"]) == (0, 1)
    assert result["readings"] == {"rules": {"conclusion": 1}, "reasons": {}}
    assert main(words) == 0
    assert "read_points" not in json.loads(out.read_text())
