"""Public layouts are recognised by their fields; what is no problem is not taken for one; other benches' results are read."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from medllm.cli import main
from medllm.errors import UserError
from medllm.exam.field_map import known_layouts
from medllm.exam.loaders import load_problems, write_problems
from medllm.exam.predictions import Prediction, in_letters, in_no_letters, read_predictions
from medllm.exam.scoring import score
from medllm.stages.problems import of_subjects

COLOURS = ["赤", "青", "緑"]
EXAM = {"problem_id": "1", "problem_text": "何色か。", "choices": COLOURS, "answer": ["b"]}

SHEET = {"index": "1", "text_only": True, "kinki": "", "human_accuracy": "0.9", "points": "1", "answer": "A"}
"""A row of KokushiMD-10 without its question."""

# layout → (rows, one problem's id, choices, answer, points, year, text_only)
ROWS = {
    "yakugakuqa": ([EXAM | {"answer": ["2"], "comment": "青い。"}], ("1", COLOURS, ("b",), 1, None, True)),
    "aistairc": ([EXAM | {"problem_id": 0, "points": 1}], ("file-0", COLOURS, ("b",), 1, None, True)),
    "medrect": (
        [
            {
                "id": "119A1",
                "question": "何色か。",
                "choices": {"a": "赤", "b": "青"},
                "answer": ["b"],
                "case_classification": {},
            }
        ],
        ("119A1", ["赤", "青"], ("b",), 1, 2025, True),
    ),
    "jmle2026": (
        [
            {
                "question_id": "120B-26",
                "block": "B",
                "number": 26,
                "question_type": "multiple_choice",
                "question_text": "26　何色か。\n\n\u3000a\u3000赤\n\n\u3000b\u3000青\n\n\u3000c\u3000緑",
                "requires_image": True,
                "num_choices_to_select": 1,
                "answer": ["b"],
            }
        ],
        ("120B-26", COLOURS, ("b",), 3, 2026, False),
    ),
    "kokushimd": (
        [
            {**SHEET, "question": "何色か。", "a": "赤", "b": "青", "answer": "B", "points": 2.0},
            {**SHEET, "question": "何色か。", "a": "赤", "b": "青", "answer": "NA", "points": "1"},
        ],
        ("file-1", ["赤", "青"], ("b",), 2, None, True),
    ),
    "jmedbench": (
        [{"sample_id": "s1", "question": "何色か。", "options": COLOURS, "answer_idx": 1, "n_options": 3}],
        ("s1", COLOURS, ("b",), 1, None, True),
    ),
    "mmmlu": (
        [dict(zip(("", "Question", "A", "B", "C", "D", "Answer", "Subject"), "0何赤青緑白Ba", strict=True))],
        ("file-1", ["赤", "青", "緑", "白"], ("b",), 1, None, True),
    ),
    "jmedllm": (
        [dict(zip(("tag", "question", "optionA", "optionB", "optionC", "optionD", "answer"), "t何赤青緑白B", strict=True))],
        ("file-1", ["赤", "青", "緑", "白"], ("b",), 1, None, True),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_layout_is_recognised_by_its_fields(tmp_path, name):
    rows, expected = ROWS[name]
    (tmp_path / "file.json").write_text(json.dumps(rows), encoding="utf-8")
    loaded = load_problems(tmp_path)
    problem = loaded.problems[0]
    found = (problem.problem_id, list(problem.choices), problem.answer, problem.points, problem.year, problem.text_only)
    assert (found, loaded.layouts) == (expected, {name: 1})
    assert loaded.skipped == ({"no gold answer": 1} if len(rows) > 1 else {})


def test_gold_answers_may_stand_beside_and_options_begin_with_their_letters(tmp_path):
    (tmp_path / "questions").mkdir()
    (tmp_path / "results").mkdir()
    lettered = [f"{letter}. {colour}" for letter, colour in zip("abc", COLOURS, strict=True)]
    rows = [{"number": f"119B{n}", "question": "何色か。", "choices": lettered, "has_image": n == 26} for n in (25, 26)]
    (tmp_path / "questions" / "any.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "results" / "correct_answers.csv").write_text("問題番号,解答\n119B25,a\n119B26,bc\n", encoding="utf-8-sig")
    loaded = load_problems(tmp_path)
    facts = [(p.answer, p.points, p.choices[0], p.section, p.year, p.text_only) for p in loaded.problems]
    assert facts == [(("a",), 1, "赤", "B", 2025, True), (("b", "c"), 3, "赤", "B", 2025, False)]
    assert [path.rpartition("/")[2] for path in loaded.ignored] == ["correct_answers.csv"]


def test_what_is_no_problem_in_a_folder_is_never_one(tmp_path):
    files = {
        "exam.jsonl": EXAM,
        "metadata_1.jsonl": {"problem_id": "1", "category": "colours"},
        "model.jsonl": {"problem_id": "1", "prediction": "b"},
        "prompt_translate.jsonl": EXAM | {"problem_id": "shot"},
        "prompts/any.jsonl": EXAM | {"problem_id": "shot2"},
    }
    for name, row in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "results.json").write_text(json.dumps({"results": [{"question_id": "1", "predicted": ["b"]}]}))
    loaded = load_problems(tmp_path)
    assert [problem.problem_id for problem in loaded.problems] == ["1"]
    assert len(loaded.ignored) == 3


def test_an_abstract_is_a_context_and_a_column_a_subject(tmp_path):
    row = {"sample_id": "1", "question": "効くか。", "options": ["はい", "いいえ"], "answer_idx": 1, "n_options": 2}
    (tmp_path / "pubmedqa.jsonl").write_text(json.dumps(row | {"metadata": {"context": "効かなかった。"}}), encoding="utf-8")
    (problem,) = load_problems(tmp_path / "pubmedqa.jsonl").problems
    assert (problem.text, problem.context, problem.question) == ("効くか。", "効かなかった。", "効かなかった。\n効くか。")
    write_problems(tmp_path / "again.jsonl", [problem])
    assert load_problems(tmp_path / "again.jsonl").problems == (problem,)
    csv = ',Question,A,B,C,D,Answer,Subject\n0,"何色か、空は。",赤,青,緑,白,B,anatomy\n1,何か。,赤,青,緑,白,A,law\n'
    (tmp_path / "mmlu_JA-JP.csv").write_text(csv, encoding="utf-8")
    problems = load_problems(tmp_path / "mmlu_JA-JP.csv").problems
    assert [(one.text, one.answer, one.category) for one in problems] == [
        ("何色か、空は。", ("b",), "anatomy"),
        ("何か。", ("a",), "law"),
    ]
    assert [one.category for one in of_subjects(problems, ("law",))] == ["law"]
    assert of_subjects(problems, ()) == problems
    with pytest.raises(UserError, match=r"of the subject 'biology' \(--subjects\); the files have anatomy, law"):
        of_subjects(problems, ("law", "biology"))


def test_a_layout_of_ones_own_and_bad_rows_by_reason(tmp_path):
    layout = tmp_path / "mine.yaml"
    layout.write_text("known_by: [nr, stem]\nid: nr\nquestion: stem\noptions: options\nanswer: key\nanswer_as: digits\n")
    rows = [{"nr": nr, "stem": "何色か。", "options": COLOURS, "key": key} for nr, key in ((1, 2), (2, 7), (3, None))]
    file, out = tmp_path / "set.json", tmp_path / "out.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"set\.json: row 2: answer '7' is not among the choices"):
        load_problems(file, layout=layout)
    words = ["data", "problems", str(file), "--layout", str(layout), "--on_bad_row", "skip", "--json", str(out)]
    assert main(words) == 0
    found = json.loads(out.read_text())
    assert (found["problems"], found["layouts"], found["years"]) == (1, {"mine": 1}, {"unknown": 1})
    assert sum(found["skipped"].values()) == 2
    assert all(reason.startswith("bad row: ") for reason in found["skipped"])
    layout.write_text("question: stem\ncolour: red\n")
    with pytest.raises(UserError, match="known_by"):
        load_problems(file, layout=layout)


def test_every_layout_that_is_known_tells_itself_from_igakuqa_rows():
    assert [one.name for one in known_layouts() if one.knows([EXAM])] == []


def test_results_of_other_benches_are_predictions(tmp_path):
    results = [
        {"question_id": "q1", "predicted": ["b", "d"], "raw_response": "【回答】b,d"},
        {"question_id": "q2", "predicted": None},
    ]
    answers = [{"question_number": "119A1", "answers": [{"answer": "bd", "explanation": "b と d。"}]}]
    for name, value in (("a", {"results": results}), ("b", {"results": answers}), ("c", [{"index": 3, "pred": "B"}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert read_predictions(tmp_path) == (
        Prediction("q1", "b,d", "【回答】b,d"),
        Prediction("q2", ""),
        Prediction("119A1", "b,d", "answer: bd\nexplanation: b と d。"),
        Prediction("3", "B"),
    )


@pytest.mark.parametrize(
    ("given", "alphabet", "read"),
    [
        (["2", "1,3"], "digits", ["b", "a,c"]),
        (["B", "C, A"], "upper case", ["b", "a,c"]),
        (["b", "2"], "letters", ["b", "2"]),
        (["b", "B"], "letters", ["b", "B"]),
        (["a, b", "B"], "letters", ["a, b", "B"]),  # spaces are the official rule's to forgive, not a file's alphabet
        (["Ｂ", "Ｃ、Ａ"], "upper case", ["b", "a,c"]),
        (["２", "１，３"], "digits", ["b", "a,c"]),
        (["②", "①・③"], "digits", ["b", "a,c"]),
        (["ｂ", "ｃ，ａ"], "full width", ["b", "a,c"]),
        (["2", "4"], "digits", ["b", "4"]),  # of three options
        (["", ""], "letters", ["", ""]),
        (["緑色", "b."], "letters", ["緑色", "b."]),
    ],
)
def test_a_file_in_another_alphabet_is_read_in_letters(given, alphabet, read):
    predictions = [Prediction(f"q{n}", one) for n, one in enumerate(given)] + [Prediction("number", "26")]
    found, said = in_letters(predictions, {"q0": 3, "q1": 3, "number": 0})
    assert ([one.prediction for one in found], said) == ([*read, "26"], alphabet)
    letters = [one for one in read if one and set(one) <= set("abc, ")]
    assert in_no_letters(found, {"q0": 3, "q1": 3, "number": 0}) == len(list(filter(None, read))) - len(letters)


def test_an_answer_sheet_scores_numbered_predictions_as_its_own_scorer_does(tmp_path):
    """KokushiMD-10's repository holds no questions; its scorer joins by row, and drops all but letters and digits."""
    sheet, results = tmp_path / "exams", tmp_path / "results"
    sheet.mkdir(), results.mkdir()
    rows = [
        {**SHEET, "answer": "CA", "kinki": ["D"], "points": "3"},
        {**SHEET, "answer": "B"},
        {**SHEET, "answer": "NA"},
        {**SHEET, "answer": "42", "points": 1.0},
        {**SHEET, "answer": "E", "corrected_question_index": "7"},
        {**SHEET, "answer": "F"},
    ]
    (sheet / "医師_2020_b.json").write_text(json.dumps(rows), encoding="utf-8")
    (sheet / "医師_2020_b_history.json").write_text(json.dumps([{**row, "pred": "A"} for row in rows]), encoding="utf-8")
    said = [{"pred": "A, C."}, {"pred": "D"}, {"pred": "A"}, {"pred": "42"}, {"pred": "E"}, {"pred": "F"}]
    (results / "医師_2020_b_pred.json").write_text(json.dumps(said), encoding="utf-8")
    loaded = load_problems(sheet)
    assert loaded.skipped == {"no gold answer": 2}
    assert [Path(file).name for file in loaded.ignored] == ["医師_2020_b_history.json"]
    first = loaded.problems[0]
    assert (first.problem_id, first.answer, first.kinki, first.points) == ("医師_2020_b-1", ("a", "c"), ("d",), 3)
    assert (first.year, first.section, first.category, first.text_only) == (2020, "B", "医師", False)
    kept = [one for one in read_predictions(results) if one.problem_id not in loaded.skipped_ids]
    sheet_of = score(loaded.problems, kept)
    assert (sheet_of.points, sheet_of.correct, sheet_of.questions) == (3 + 1 + 1, 3, 4)


def test_digits_are_letters_where_options_are_numbered(tmp_path):
    options = {"1": "赤", "2": "青", "3": "緑"}
    rows = [
        {**SHEET, "question": "何色か。", **options, "answer": "31"},
        {**SHEET, "question": "何色か。", **options, "answer": "2"},
    ]
    (tmp_path / "看護_2021_a.json").write_text(json.dumps(rows), encoding="utf-8")
    said = tmp_path / "看護_2021_a_pred.json"
    problems = load_problems(tmp_path / "看護_2021_a.json").problems
    assert [problem.answer for problem in problems] == [("a", "c"), ("b",)]
    said.write_text(json.dumps([{"pred": "13"}, {"pred": "2"}]), encoding="utf-8")
    read, alphabet = in_letters(read_predictions(said), {problem.problem_id: 3 for problem in problems})
    assert ([one.prediction for one in read], alphabet) == (["a,c", "b"], "digits")


def test_a_number_in_full_width_digits_is_the_number():
    found, _ = in_letters(
        [Prediction("q", "b"), Prediction("n", "－１２．５"), Prediction("m", "約１２")], {"q": 3, "n": 0, "m": 0}
    )
    assert [one.prediction for one in found] == ["b", "-12.5", "約１２"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["赤", "青"], "the 2 predictions are in signs that are not read: problem q0 has '赤'; expected letters"),
        (["ア", "イ"], "the 2 predictions are in signs that are not read"),
        (["1", "0"], "problem q1 has the prediction '0': digits number the options from 1"),
    ],
)
def test_a_file_in_signs_that_cannot_be_read_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        in_letters([Prediction(f"q{n}", one) for n, one in enumerate(given)], {"q0": 3, "q1": 3})


def test_predictions_for_rows_left_out_are_counted_under_the_ids_of_their_problems(tmp_path, capsys):
    """Whatever left the row out, and whether the id is the row's own, the file's, or the row's number."""
    cells = 'どれか。,赤,青,緑,黒,B\nどれか,赤,青,緑,黒,X\nどれか。,赤,"青",緑\n'
    (tmp_path / "colours.csv").write_text(cells, encoding="utf-8")
    twice = [EXAM | {"problem_id": name} for name in ("1", "1")]
    lines = [*map(json.dumps, twice), "not json", json.dumps(EXAM | {"problem_id": "2", "answer": ["z"]})]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    loaded = load_problems(tmp_path, skip_bad_rows=True)
    assert [problem.problem_id for problem in loaded.problems] == ["colours-1", "1"]
    assert loaded.skipped_ids == {"colours-2", "colours-3", "2", ""}
    assert sorted(loaded.skipped) == [
        "bad row: 4 columns, expected 6 columns (question,A,B,C,D,answer); quote a cell that holds a comma",
        "bad row: its problem_id was there before",
        "bad row: not JSON (Expecting value, column 1); expected a JSON object a line",
        "bad row: the problem: answer 'x' is not among the choices a to d",
        "bad row: the problem: answer 'z' is not among the choices a to c",
    ]
    answers = [{"problem_id": name, "prediction": "b"} for name in ("colours-1", "colours-3", "1", "2")]
    (tmp_path / "answers").mkdir()
    file = tmp_path / "answers" / "predictions.jsonl"
    file.write_text("\n".join(map(json.dumps, answers)))
    out = tmp_path / "score.json"
    words = ["--problems", str(tmp_path), "--predictions", str(file), "--on_bad_row", "skip", "--json", str(out)]
    assert main(["score", *words]) == 0
    assert "2 for rows left out" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["points"], found["predictions_left_out"], sum(found["skipped"].values())) == (2, 2, 5)


def test_numbers_of_a_table_with_gaps_are_whole(tmp_path):
    """pandas holds a column of whole numbers as 3.0 where one is missing."""
    layout = tmp_path / "mine.yaml"
    layout.write_text("known_by: [nr, stem]\nid: nr\nquestion: stem\noptions: options\nanswer: key\nanswer_as: digits\n")
    rows = {"nr": [1.0, 2.0], "stem": ["何色か。", "いくつか。"], "options": [COLOURS, []], "key": [2.0, 5.0]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "set.parquet")
    loaded = load_problems(tmp_path / "set.parquet", layout=layout)
    assert [(problem.problem_id, problem.answer) for problem in loaded.problems] == [("1", ("b",)), ("2", ("5",))]
    (tmp_path / "a.json").write_text(json.dumps([{"index": 1.0, "pred": 2.0}]))
    assert read_predictions(tmp_path / "a.json") == (Prediction("1", "2"),)


def test_a_layout_of_ones_own_is_for_the_files_that_have_its_fields(tmp_path):
    layout = tmp_path / "mine.yaml"
    layout.write_text("known_by: [nr, stem]\nid: nr\nquestion: stem\noptions: options\nanswer: key\n")
    (tmp_path / "own.json").write_text(json.dumps([{"nr": 1, "stem": "何色か。", "options": COLOURS, "key": "b"}]))
    (tmp_path / "exam.jsonl").write_text(json.dumps(EXAM | {"problem_id": "2"}))
    loaded = load_problems(tmp_path, layout=layout)
    assert loaded.layouts == {"jsonl": 1, "mine": 1}
    (tmp_path / "other.json").write_text(json.dumps([{"stem": "何色か。"}]))
    with pytest.raises(UserError, match="no layout that is known, nor has it the fields of mine"):
        load_problems(tmp_path / "other.json", layout=layout)


@pytest.mark.parametrize(
    ("known_by", "question", "said"),
    [
        ("[]", "stem", "known_by and question name fields"),
        ("['']", "stem", "known_by and question name fields"),
        ("[stem]", "''", "known_by and question name fields"),
        ("stem", "stem", "known_by is 'stem', which is not what a layout has there"),
        ("[stem]", "[stem]", "question is .*, which is not what a layout has there"),
    ],
)
def test_a_layout_that_any_row_or_none_would_have_is_refused(tmp_path, known_by, question, said):
    layout = tmp_path / "mine.yaml"
    layout.write_text(f"known_by: {known_by}\nquestion: {question}\n")
    with pytest.raises(UserError, match=said):
        load_problems(tmp_path, layout=layout)


def test_a_bad_row_without_an_id_says_what_it_lacks(tmp_path):
    rows = [EXAM, {name: value for name, value in EXAM.items() if name != "problem_id"}]
    (tmp_path / "exam.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_problems(tmp_path, skip_bad_rows=True).skipped == {
        "bad row: the field 'problem_id' is missing; a problem needs problem_id, problem_text, choices and answer": 1
    }
