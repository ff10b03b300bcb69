"""Problem files of every format load, load back as written, and a bad line is named by file and number."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm.config import ProblemsFormat
from medllm.errors import UserError
from medllm.exam import loaders
from medllm.exam.field_map import SAID, known_layouts
from medllm.exam.loaders import load_problems, write_problems
from medllm.exam.problem import LETTERS, Problem

ROW = {
    "problem_id": "901A1",
    "problem_text": "ミロリ星の空は何色か。",
    "choices": ["赤", "青", "緑", "黒", "白"],
    "text_only": True,
    "answer": ["c"],
    "points": "1",
}


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return path


def row(**changes):
    return ROW | changes


def without(field):
    return {name: value for name, value in ROW.items() if name != field}


def igakuqa(root):
    """An IgakuQA checkout in small: two sections, metadata, predictions, and the shots."""
    lines(root / "data/2031/901-A.jsonl", row(points="3", text_only=False), row(problem_id="901A2", answer=["e", "a"]))
    lines(
        root / "data/2031/901-A_metadata.jsonl",
        {"problem_id": "901A1", "category": "天文", "kinki": ["ｅ", "a"]},
        {"problem_id": "901A2", "category": "気象", "kinki": ["dcb"]},
    )
    lines(root / "data/2031/901-B.jsonl", row(problem_id="901B1"))
    lines(root / "data/2031/901-B_translate.jsonl", {"problem_id": "901B1", "problem_text_en": "What colour?"})
    lines(root / "baseline_results/2031/901-A_gpt4.jsonl", {"problem_id": "901A1", "prediction": "c"})
    lines(root / "baseline_results/2031/901-A_student-majority.jsonl", {"problem_id": "901A1", "prediction": "c"})
    lines(root / "prompts/prompt.jsonl", row(problem_id="900A1", explanation="緑の雲がある。"))
    return root


@pytest.mark.parametrize("folder", [".", "data", "data/2031"])
def test_igakuqa_checkout_and_its_data_folder_load_the_same_exam(tmp_path, folder):
    loaded = load_problems(igakuqa(tmp_path) / folder)
    assert [problem.problem_id for problem in loaded.problems] == ["901A1", "901A2", "901B1"]
    assert loaded.skipped == {}


def test_igakuqa_rows_are_joined_with_metadata_year_and_section(tmp_path):
    first, second, third = load_problems(igakuqa(tmp_path)).problems
    assert (first.year, first.section, first.category, first.kinki) == (2031, "A", "天文", ("a", "e"))
    assert (first.points, first.text_only, first.answer) == (3, False, ("c",))
    assert (second.answer, second.kinki) == (("a", "e"), ("b", "c", "d"))
    assert (third.section, third.category, third.kinki) == ("B", None, ())
    assert first.source == f"{tmp_path}/data/2031/901-A.jsonl:1"


def test_igakuqa_file_outside_a_year_folder_takes_its_year_from_the_exam_number(tmp_path):
    (problem,) = load_problems(lines(tmp_path / "exam/112-C.jsonl", row())).problems
    assert (problem.year, problem.section) == (2018, "C")


def test_shots_load_when_named_though_a_folder_leaves_them_out(tmp_path):
    (shot,) = load_problems(igakuqa(tmp_path) / "prompts/prompt.jsonl").problems
    assert (shot.problem_id, shot.explanation, shot.year) == ("900A1", "緑の雲がある。", None)


def test_igakuqa_special_answers_load(tmp_path):
    path = lines(
        tmp_path / "special.jsonl",
        row(problem_id="either", answer=["a or d"]),
        row(problem_id="number", choices=[], answer=["1.2"]),
        row(problem_id="zero", points="0"),
        row(problem_id="eight", choices=list("一二三四五六七八"), answer=["h"]),
    )
    either, number, zero, eight = load_problems(path).problems
    assert (either.accepted, either.answer_count) == ((("a",), ("d",)), 1)
    assert (number.is_numeric, number.answer) == (True, ("1.2",))
    assert (zero.points, eight.answer, len(eight.choices)) == (0, ("h",), 8)


def test_generic_rows_need_only_the_four_fields(tmp_path):
    four = {name: ROW[name] for name in ("problem_id", "problem_text", "choices", "answer")}
    (problem,) = load_problems(lines(tmp_path / "own.jsonl", four | {"year": 2016, "source": "book, p. 3"})).problems
    assert (problem.points, problem.text_only, problem.explanation) == (1, True, None)
    assert (problem.year, problem.source) == (2016, "book, p. 3")


def test_csv_without_header_loads_with_byte_order_mark_padding_and_quoted_newlines(tmp_path):
    path = tmp_path / "astronomy.csv"
    rows = '空は何色か？,赤, 青 ,緑,黒,C\n"次のうち、\n星はどれか",甲,乙,丙,丁,A\n最後の問題,1,2,3,4,D\n'
    path.write_text(rows, encoding="utf-8-sig")
    first, second, third = load_problems(path).problems
    assert (first.problem_id, first.text, first.choices, first.answer) == (
        "astronomy-1",
        "空は何色か？",
        ("赤", "青", "緑", "黒"),
        ("c",),
    )
    assert second.text == "次のうち、\n星はどれか"
    assert (third.source, third.category) == (f"{path}:4", "astronomy")


def test_pharmacist_rows_map_digits_to_letters_and_comments_to_explanations(tmp_path):
    path = lines(
        tmp_path / "2013.jsonl",
        row(problem_id="p1", answer=["5", "1"], comment="白と赤。"),
        row(problem_id="p2", choices="IMAGES", answer=["2"], comment="図。"),
        row(problem_id="p3", answer=["解なし"], comment=""),
        row(problem_id="p4", answer=["1", "2（いずれか一つ）"], comment=""),
        row(problem_id="p5", answer=["2"], text_only=False, comment=""),
    )
    loaded = load_problems(path)
    first, last = loaded.problems
    assert (first.answer, first.explanation, first.year) == (("a", "e"), "白と赤。", 2013)
    assert (last.answer, last.explanation, last.text_only) == (("b",), None, False)
    assert loaded.skipped == {
        SAID["images"]: 1,
        f"{SAID['no_option']}: 解なし": 1,
        f"{SAID['no_option']}: 2（いずれか一つ）": 1,
    }


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@st.composite
def problems(draw):
    choices = tuple(draw(st.lists(text, max_size=8)))
    letters = LETTERS[: len(choices)]
    answer = draw(st.lists(st.sampled_from(letters), min_size=1, max_size=3, unique=True)) if choices else ["12.5"]
    return Problem(
        problem_id=draw(text),
        text=draw(text),
        choices=choices,
        answer=tuple(sorted(answer)),
        points=draw(st.integers(0, 3)),
        text_only=draw(st.booleans()),
        explanation=draw(st.none() | text),
        year=draw(st.none() | st.integers(1990, 2030)),
        section=draw(st.none() | st.sampled_from("ABCDEF")),
        category=draw(st.none() | text),
        kinki=tuple(sorted(draw(st.sets(st.sampled_from("abcde"))))),
        source=draw(text),
    )


@given(st.lists(problems(), min_size=1, max_size=4, unique_by=lambda problem: problem.problem_id))
def test_written_problems_load_back_unchanged(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("written") / "problems.jsonl"
    write_problems(path, written)
    assert load_problems(path).problems == tuple(written)


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield Problem("x", "空は何色か。", ("赤", "青"), ("a",))
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_problems(tmp_path / "problems.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"problem_id": "x", ', "not JSON"),
        ("[1]", "expected a JSON object, found list"),
        (without("problem_id"), "'problem_id' is missing"),
        (without("problem_text"), "'problem_text' is missing"),
        (without("choices"), "'choices' is missing"),
        (without("answer"), "'answer' is missing"),
        (row(answer=["f"]), "answer 'f' is not among the choices a to e"),
        (row(answer=["a or f"]), "answer 'f' is not among the choices"),
        (row(answer=["ab"]), "answer 'ab' is not among the choices"),
        (row(answer=["A"]), "answer 'A' is not among the choices"),
        (row(answer=[]), "has no answer"),
        (row(answer=["a", "a"]), "names an answer twice"),
        (row(answer="a"), "'answer' holds 'a'; expected a list of texts"),
        (row(choices=["赤", 2]), "expected a list of texts"),
        (row(choices=[], answer=["1", "2"]), "expected one number"),
        (row(points="many"), "'points' holds 'many'; expected a whole number"),
        (row(points=-1), "'points' holds -1"),
        (row(text_only="yes"), "'text_only' holds 'yes'; expected true or false"),
        (row(year="soon"), "'year' holds 'soon'"),
        (row(explanation=3), "'explanation' holds 3; expected text"),
        (row(problem_text=" "), "'problem_text' is empty"),
        (row(problem_id=""), "'problem_id' is empty"),
        (ROW, "problem_id 901A1 occurs twice"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, said):
    path = lines(tmp_path / "bad.jsonl", ROW, "", bad)
    with pytest.raises(UserError) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


def test_the_same_id_in_two_files_names_both_lines(tmp_path):
    lines(tmp_path / "a.jsonl", ROW)
    lines(tmp_path / "b.jsonl", row(problem_id="other"), ROW)
    with pytest.raises(UserError, match=r"b\.jsonl:2: .*first at .*a\.jsonl:1"):
        load_problems(tmp_path)


def test_a_pharmacist_digit_beyond_the_choices_is_an_error_not_a_skipped_row(tmp_path):
    path = lines(tmp_path / "2013.jsonl", row(answer=["6"], comment=""))
    with pytest.raises(UserError, match=r"2013\.jsonl:1: answer '6' is not among the choices, numbered 1 to 5"):
        load_problems(path)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("問い,赤,青,緑,A", "5 columns, expected 6"),
        ("問い,赤,青,緑,黒,白,A", "7 columns, expected 6"),
        ("問い,赤,青,緑,黒,E", "answer 'e' is not among the choices"),
        ('"問い,赤,青,緑,黒,A', "not CSV"),
    ],
)
def test_a_bad_csv_row_is_named_by_file_and_line(tmp_path, bad, said):
    path = tmp_path / "bad.csv"
    path.write_text(f'"二行の\n問い",赤,青,緑,黒,A\n{bad}\n', encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


def test_bad_metadata_is_named_by_file_and_line(tmp_path):
    root = igakuqa(tmp_path)
    lines(root / "data/2031/901-B_metadata.jsonl", {"problem_id": "901B1"}, "{")
    with pytest.raises(UserError, match=r"901-B_metadata\.jsonl:2: not JSON"):
        load_problems(root)
    lines(root / "data/2031/901-B_metadata.jsonl", {"problem_id": "901B1"}, {"problem_id": "901B1"})
    with pytest.raises(UserError, match=r"901-B_metadata\.jsonl:2: metadata of problem 901B1 occurs twice"):
        load_problems(root)


def test_paths_that_hold_no_problems_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such problem file or folder"):
        load_problems(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no problem files in this folder"):
        load_problems(tmp_path)
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no problems"):
        load_problems(lines(tmp_path / "empty.jsonl", " "))
    with pytest.raises(UserError, match=r"empty\.csv: holds no problems"):
        load_problems(lines(tmp_path / "empty.csv"))
    with pytest.raises(UserError, match=r"notes\.txt: problems are read from"):
        load_problems(lines(tmp_path / "notes.txt", ROW))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem_id": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8"):
        load_problems(tmp_path / "latin.jsonl")


def test_a_format_is_one_of_ours_or_a_layout():
    assert {*get_args(ProblemsFormat)} == {"auto", "igakuqa", "jsonl", *loaders._MAPS}
    assert {*loaders._MAPS.values()} <= {layout.name for layout in known_layouts()}


def test_a_named_format_is_not_guessed(tmp_path):
    path = lines(tmp_path / "2013.jsonl", row(comment="白。", answer=["2"]))
    assert load_problems(path, problems_format="pharmacist").problems[0].answer == ("b",)
    with pytest.raises(UserError, match="answer '2' is not among the choices"):
        load_problems(path, problems_format="jsonl")
    with pytest.raises(UserError, match=r"an IgakuQA file is called NNN-S\.jsonl"):
        load_problems(path, problems_format="igakuqa")
    with pytest.raises(UserError, match="not a file of the format 'jmmlu'"):
        load_problems(path, problems_format="jmmlu")
