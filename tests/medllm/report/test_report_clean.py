"""The score on clean problems, and its paired interval."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.scoring import ProblemResult
from medllm.report.clean import clean_difference, clean_score, leaked_ids
from medllm.report.statistics import Bootstrap

DRAW = Bootstrap(resamples=600)


def results(correct, points=None):
    points = points if points is not None else np.ones(len(correct), int)
    return [
        ProblemResult(str(n), bool(right), int(worth)) for n, (right, worth) in enumerate(zip(correct, points, strict=True))
    ]


def test_both_scores_count_points_and_the_difference_is_theirs():
    scored = clean_score(results([1, 0, 1, 0], [3, 1, 1, 1]), {"0"}, DRAW)
    assert (scored.leaked, scored.clean) == (1, 3)
    assert (scored.all_problems.value, scored.clean_problems.value) == (pytest.approx(4 / 6), pytest.approx(1 / 3))
    assert scored.difference.value == pytest.approx(1 / 3 - 4 / 6)


def test_without_a_leak_both_are_one():
    scored = clean_score(results([1, 0, 1]), {"elsewhere"}, DRAW)
    assert (scored.difference.value, scored.difference.low, scored.difference.high) == (0.0, 0.0, 0.0)


def test_the_interval_covers_what_it_says():
    """200 problems, a fifth of them leaked and 20 points easier: the paired interval holds the truth in 95 of 100 exams."""
    chance, held, widths = np.random.default_rng(0), 0, []
    leaked = np.arange(200) < 40
    truth = 0.6 - (0.2 * 0.8 + 0.8 * 0.6)
    for _ in range(300):
        correct = chance.random(200) < np.where(leaked, 0.8, 0.6)
        found = clean_difference(correct, np.ones(200), ~leaked, DRAW)
        held += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert 0.92 <= held / 300 <= 0.98
    assert np.mean(widths) < 0.08  # two scores of the same draw; drawn apart they would give 0.2


def test_an_exam_that_leaked_whole_has_no_clean_score():
    with pytest.raises(UserError, match="no clean score"):
        clean_score(results([1, 0]), {"0", "1"}, DRAW)


def test_the_leaks_file_of_one_command_is_read_by_the_other(tmp_path, capsys):
    rows = [("p1", "Which of these is a vitamin found in the liver?"), ("p2", "Which of these bones lies beside the ulna?")]
    problems = [
        {"problem_id": key, "problem_text": text, "choices": ["iron", "retinol"], "answer": ["b"]} for key, text in rows
    ]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    (tmp_path / "text.txt").write_text("Which of these is a vitamin found in the liver?  iron, retinol")
    predictions = [{"problem_id": "p1", "prediction": "b"}, {"problem_id": "p2", "prediction": "a"}]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in predictions))
    exam, leaks = str(tmp_path / "exam.jsonl"), str(tmp_path / "leaks.json")
    assert main(["data", "leaks", "--documents", str(tmp_path / "text.txt"), "--problems", exam, "--json", leaks]) == 0
    assert leaked_ids(leaks, {"p1", "p2"}) == {"p1"}
    with pytest.raises(UserError, match=r"names 1 problems, e\.g\. p1, none of this exam"):
        leaked_ids(leaks, {"q1"})
    command = ["score", "--problems", exam, "--predictions", str(tmp_path / "predictions.jsonl"), "--leaks", leaks]
    assert main([*command, "--json", str(tmp_path / "score.json")]) == 0
    scored = json.loads((tmp_path / "score.json").read_text())
    assert (scored["points"], scored["clean"]["clean_problems"]["value"], scored["clean"]["leaked"]) == (1, 0.0, 1)
    assert "-0.500" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", '{"leaks": 3}', '{"leaks": [{"id": "p1"}]}', "{"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "leaks.json").write_text(text)
    with pytest.raises(UserError, match=r"leaks\.json.*data leaks --json"):
        leaked_ids(tmp_path / "leaks.json", {"p1"})
