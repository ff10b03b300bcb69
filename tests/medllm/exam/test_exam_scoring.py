"""The official score, to the point, and the pass rule."""

import json
import os
from pathlib import Path

import pytest

from medllm.errors import UserError
from medllm.exam.loaders import load_problems
from medllm.exam.predictions import write_predictions
from medllm.exam.problem import Problem
from medllm.exam.scoring import Prediction, Tally, is_correct, read_predictions, score

CHOICES = ("赤", "青", "緑", "黒", "白")


def problem(problem_id, answer=("a",), **fields):
    return Problem(problem_id, "ミロリ星の空は何色か。", fields.pop("choices", CHOICES), tuple(answer), **fields)


@pytest.mark.parametrize(
    ("answer", "prediction", "strict", "lenient"),
    [
        (("a", "b"), "a,b", True, True),
        (("a", "b"), "b,a", True, True),
        (("a", "b"), "b, a", False, True),
        (("a", "b"), "a", False, False),
        (("a", "b"), "a,b,c", False, False),
        (("a",), "a,a", False, False),
        (("a",), " a", False, True),
        (("a",), "A", False, False),
        (("a",), "", False, False),
        (("a or d",), "a", True, True),
        (("a or d",), "d", True, True),
        (("a or d",), " d", False, True),
        (("a or d",), "a,d", False, False),
        (("a or d",), "b", False, False),
    ],
)
def test_the_official_rule(answer, prediction, strict, lenient):
    assert is_correct(problem("x", answer), prediction) is strict
    assert is_correct(problem("x", answer), prediction, lenient=True) is lenient


def test_numbers_are_compared_as_text():
    number = problem("x", ("1.2",), choices=())
    assert is_correct(number, "1.2")
    assert not is_correct(number, "1.20")


def test_the_problem_without_a_right_answer_is_always_right():
    assert is_correct(problem("116A71", ("a",)), "e")
    sheet = score([problem("116A71", ("a",), points=1)], [])
    assert (sheet.points, sheet.unanswered) == (1, 1)


def test_points_and_counts_are_tallied_by_year_section_subject_and_image():
    problems = [
        problem("1", points=3, year=2030, section="B", category="天文"),
        problem("2", points=1, year=2030, section="A", category="気象", text_only=False),
        problem("3", points=0, year=2031, section="A", category="気象"),
        problem("4", points=1, year=2031, section="A"),
        problem("5", points=2),
    ]
    predictions = [Prediction("4", "b"), Prediction("1", "a"), Prediction("3", "a"), Prediction("2", "")]
    sheet = score(problems, predictions)
    assert (sheet.points, sheet.possible, sheet.correct, sheet.questions, sheet.unanswered) == (3, 7, 2, 5, 2)
    assert sheet.by_year == {"2030": Tally(3, 4, 1, 2), "2031": Tally(0, 1, 1, 2), "unknown": Tally(0, 2, 0, 1)}
    assert sheet.by_section == {"A": Tally(0, 2, 1, 3), "B": Tally(3, 3, 1, 1), "unknown": Tally(0, 2, 0, 1)}
    assert sheet.by_category["気象"] == Tally(0, 1, 1, 2)
    assert sheet.text_only == Tally(3, 6, 2, 4)
    assert sheet.mean_of_years == pytest.approx((3 / 4 + 0 / 1 + 0 / 2) / 3)
    assert [(r.problem_id, r.correct, r.points, r.prediction) for r in sheet.results] == [
        ("1", True, 3, "a"),
        ("2", False, 1, ""),
        ("3", True, 0, "a"),
        ("4", False, 1, "b"),
        ("5", False, 2, None),
    ]


def test_the_sheet_is_plain_json():
    sheet = score([problem("1", year=2030, section="A", kinki=("b",))], [Prediction("1", "b")])
    plain = json.loads(json.dumps(sheet.to_json()))
    assert plain["points"] == 0
    assert plain["by_year"] == {"2030": {"points": 0, "possible": 1, "correct": 0, "questions": 1}}
    assert plain["kinki"] == ["1"]
    assert plain["results"] == [{"problem_id": "1", "correct": False, "points": 1, "prediction": "b"}]
    assert plain["verdicts"]["2030"]["passed"] == "unknown"


def exam(year=2018):
    """400 problems worth 500 points: sections B and E hold 25 of one point and 25 of three each. Answer a, b is prohibited."""
    sizes = {"A": 75, "B": 50, "C": 75, "D": 75, "E": 50, "F": 75}
    return [
        problem(
            f"{section}{number}", year=year, section=section, kinki=("b",), points=3 if section in "BE" and number > 25 else 1
        )
        for section, size in sizes.items()
        for number in range(1, size + 1)
    ]


def verdict(problems, wrong=(), prohibited=()):
    letter = {**dict.fromkeys(wrong, "c"), **dict.fromkeys(prohibited, "b")}
    predictions = [Prediction(one.problem_id, letter.get(one.problem_id, "a")) for one in problems]
    (found,) = score(problems, predictions).verdicts.values()
    return found.required, found.general, found.kinki, found.passed


def general(count):
    return [one.problem_id for one in exam() if one.section in "ACDF"][:count]


def test_a_candidate_passes_at_the_marks_and_fails_one_below():
    required = [f"B{number}" for number in range(26, 39)]  # 13 of three points, and one more of one point: 160 of 200 left
    at_the_marks = [*required, "B1", *general(300 - 208)]
    assert verdict(exam(), at_the_marks) == ("pass", "pass", "pass", "pass")
    assert verdict(exam(), [*at_the_marks, "B2"]) == ("fail", "pass", "pass", "fail")
    assert verdict(exam(), [*required, "B1", *general(300 - 207)]) == ("pass", "fail", "pass", "fail")


def test_three_prohibited_choices_pass_and_four_fail():
    assert verdict(exam(), prohibited=general(3)) == ("pass", "pass", "pass", "pass")
    assert verdict(exam(), prohibited=general(4)) == ("pass", "pass", "fail", "fail")


def test_what_cannot_be_decided_is_unknown_and_says_why():
    assert verdict(exam(1999)) == ("pass", "unknown", "pass", "unknown")
    assert verdict(exam(1999), prohibited=general(4)) == ("pass", "unknown", "fail", "fail")
    assert verdict(exam()[:-1]) == ("unknown",) * 4
    bare = [problem(one.problem_id, year=2018, section=one.section, points=one.points) for one in exam()]
    assert verdict(bare) == ("pass", "pass", "unknown", "unknown")
    (part,) = score(exam()[:-1], []).verdicts.values()
    assert part.reason == "399 problems are not a whole exam (400 in sections A to F)"
    (unknown_cut,) = score(exam(1999), []).verdicts.values()
    assert unknown_cut.reason == "the general cut of 1999 is not known here"


def test_a_prohibited_choice_counts_though_it_is_one_of_several():
    sheet = score([problem("1", ("c", "d"), kinki=("a", "e"))], [Prediction("1", "c, e")])
    assert sheet.kinki == ("1",)


def test_predictions_that_do_not_fit_the_problems_are_refused():
    with pytest.raises(UserError, match="2 predictions are for problems that are not asked, first y"):
        score([problem("x")], [Prediction("x", "a"), Prediction("y", "a"), Prediction("z", "a")])
    with pytest.raises(UserError, match="prediction x is given twice"):
        score([problem("x")], [Prediction("x", "a"), Prediction("x", "b")])
    with pytest.raises(UserError, match="problem x is given twice"):
        score([problem("x"), problem("x")], [])
    with pytest.raises(UserError, match="no problems to score"):
        score([], [])


def predictions_file(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return path


def test_predictions_read_from_file_folder_pattern_and_run(tmp_path):
    first = predictions_file(tmp_path / "2030/901-A_one.jsonl", {"problem_id": "1", "prediction": "a", "explanation": "赤"})
    predictions_file(tmp_path / "2030/901-B_one.jsonl", {"problem_id": "2", "prediction": "b,c"})
    assert read_predictions(first) == (Prediction("1", "a", "赤"),)
    both = (Prediction("1", "a", "赤"), Prediction("2", "b,c", ""))
    assert read_predictions(tmp_path) == both
    predictions_file(tmp_path / "2030/901-A_two.jsonl", {"problem_id": "1", "prediction": "e"})
    assert read_predictions(f"{tmp_path}/*/*_one.jsonl") == both
    run = tmp_path / "run"
    predictions_file(run / "metrics.jsonl", {"step": 1})
    write_predictions(run / "predictions.jsonl", both)
    assert read_predictions(run) == both


def test_two_systems_in_one_folder_are_refused_with_the_way_out(tmp_path):
    predictions_file(tmp_path / "901-A_chatgpt.jsonl", {"problem_id": "1", "prediction": "a"})
    other = [{"problem_id": "0", "prediction": "a"}, {"problem_id": "1", "prediction": "b"}]
    predictions_file(tmp_path / "901-A_gpt4.jsonl", *other)
    with pytest.raises(UserError) as error:
        read_predictions(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/901-A_gpt4.jsonl:2: a second prediction for problem 1")
    assert f"{tmp_path}/901-A_chatgpt.jsonl:1" in said
    assert "*_gpt4.jsonl" in said


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not JSON"),
        ('"a"', "expected a JSON object"),
        ({"prediction": "a"}, "'problem_id' is missing"),
        ({"problem_id": "2"}, "'prediction' is missing"),
        ({"problem_id": "2", "prediction": ["a"]}, "'prediction' holds ['a']; expected text"),
        ({"problem_id": "2", "prediction": "a", "explanation": None}, "'explanation' holds None"),
        ({"problem_id": "1", "prediction": "a"}, "a second prediction for problem 1"),
    ],
)
def test_a_bad_prediction_is_named_by_file_and_line(tmp_path, bad, said):
    path = predictions_file(tmp_path / "bad.jsonl", {"problem_id": "1", "prediction": "a"}, "", bad)
    with pytest.raises(UserError) as error:
        read_predictions(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


def test_paths_without_predictions_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.jsonl", f"{tmp_path}/*_gpt4.jsonl"):
        with pytest.raises(UserError, match="no prediction files here"):
            read_predictions(path)
    with pytest.raises(UserError, match="holds no predictions"):
        read_predictions(predictions_file(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(("system", "points", "passed"), [("gpt4", 382, "pass"), ("chatgpt", 266, "fail")])
def test_scores_published_predictions_to_the_point(system, points, passed):
    folder = os.environ.get("IGAKUQA_DIR")
    if not folder:
        pytest.skip("IGAKUQA_DIR is not set: a checkout of IgakuQA")
    problems = load_problems(Path(folder) / "data/2018").problems
    sheet = score(problems, read_predictions(f"{folder}/baseline_results/2018/*_{system}.jsonl"))
    assert (sheet.points, sheet.possible, sheet.questions, sheet.unanswered) == (points, 499, 400, 0)
    assert sheet.verdicts["2018"].passed == passed
