"""Changed copies of made-up problems are found, the same exam's other questions are not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm.corpus.documents import Document
from medllm.corpus.leaks import near
from medllm.corpus.leaks.changes import CHANGES, as_text, options_dropped, retypeset
from medllm.corpus.leaks.made_up import made_up_problems, made_up_texts
from medllm.corpus.leaks.near import THRESHOLD, NearSearch, near_leaks
from medllm.corpus.leaks.pieces import BETWEEN, fold, pieces
from medllm.corpus.leaks.search import search
from medllm.exam.problem import Problem


@pytest.fixture(scope="module")
def problems():
    return made_up_problems(200)


@pytest.fixture(scope="module")
def texts():
    return made_up_texts(60)


def planted(problems, texts, name, level):
    """A document a problem with a changed copy in it, among those that hold none."""
    chance = random.Random(f"{name}/{level}")
    copies = [as_text(CHANGES[name](problem, level, chance), chance) for problem in problems]
    return [
        *(Document(text, "text:1") for text in texts),
        *(Document(f"{texts[n % len(texts)]}\n{copy}\n{texts[n % 7]}", f"copy:{n}") for n, copy in enumerate(copies)),
    ]


FOUND = [
    ("typeset anew", 0.4, 1.0),
    ("misread characters", 0.1, 0.93),
    ("other words", 0.1, 0.95),
    ("options shuffled", 1.0, 1.0),
    ("options translated", 1.0, 0.6),
    ("options dropped", 1.0, 0.6),
    ("all at once", 0.2, 0.85),
]


@pytest.mark.parametrize(("name", "level", "least"), FOUND)
def test_changed_copies_are_found_and_other_questions_of_the_exam_are_not(problems, texts, name, level, least):
    there, absent = problems[:100], problems[100:]
    found = near_leaks(planted(there, texts, name, level), problems, THRESHOLD)
    right = [one for one in found if one.problem < len(there)]
    assert len(right) >= least * len(there)
    assert all(one.source == f"copy:{one.problem}" for one in right)
    assert len(found) - len(right) <= 0.01 * len(absent)


def test_what_lies_at_the_seam_of_two_parts_of_a_long_document_is_found(problems, monkeypatch):
    """A document is looked through in parts, and in windows; a copy may begin anywhere."""
    monkeypatch.setattr(near, "_BATCH", 4096)
    filler, copy = fold("".join(made_up_texts(20, seed=5))), as_text(problems[0], random.Random(0))
    problems = problems[:60]
    alone = near_leaks([Document(copy, "alone:1")], problems, THRESHOLD)[0].found
    for shift in range(0, 500, 90):
        start = 2 * 4096 - shift
        documents = [Document(filler[:start] + copy + filler[start : start + 900], "long:1")]
        (found,) = near_leaks(documents, problems, THRESHOLD)
        assert (found.problem, found.source) == (0, "long:1")
        assert found.found >= alone - 1e-9


def test_parts_that_stand_far_apart_are_not_added_up(problems):
    problems = problems[:60]
    problem, filler = problems[0], "".join(made_up_texts(6, seed=9))
    third = len(problem.text) // 3
    parts = [problem.text[:third], problem.text[third : 2 * third], problem.text[2 * third :], "".join(problem.choices)]
    apart = max(one.found for one in near_leaks([Document(filler.join(parts), "a:1")], problems, 0.01) if one.problem == 0)
    assert apart <= max(one.found for part in parts for one in near_leaks([Document(part, "a:1")], problems, 0.0)) + 0.1


def test_two_documents_do_not_make_a_copy_together(problems):
    problem = problems[0]
    half = len(problem.text) // 2
    parts = [Document(problem.text[:half], "a:1"), Document(problem.text[half:] + "".join(problem.choices), "a:2")]
    assert max(one.found for one in near_leaks(parts, problems, 0.01)) < 0.8
    assert near_leaks([Document(problem.text + "".join(problem.choices), "a:3")], problems, 0.8)[0].problem == 0


def test_of_question_and_options_the_larger_share_counts_and_is_named(problems):
    problem, chance = problems[0], random.Random(0)
    whole = near_leaks([Document(as_text(problem, chance), "a:1")], problems, THRESHOLD)
    asked = near_leaks([Document(as_text(options_dropped(problem, 1.0, chance), chance), "a:1")], problems, THRESHOLD)
    assert (whole[0].kind, asked[0].kind) == ("question and options", "question")
    assert asked[0].found > 0.7  # of question and options together it is 0.6


def test_a_stock_question_with_stock_options_is_never_near():
    stock = Problem("1", "誤っているのはどれか。2つ選べ。", ("発熱", "腹痛", "頭痛"), ("a",))
    text = Document("誤っているのはどれか。2つ選べ。a 発熱 b 腹痛 c 頭痛", "a:1")
    assert near_leaks([text], [stock, *made_up_problems(20)], THRESHOLD) == []
    assert [leak.kind for leak in search([text], [stock])] == ["word for word"]


def test_one_name_of_its_own_does_not_make_a_problem_known():
    named = Problem("1", "ゾネ病で誤っているのはどれか。2つ選べ。", ("発熱", "腹痛", "頭痛"), ("a",))
    assert near_leaks([Document("ゾネ病で誤っていることは珍しい。", "a:1")], [named, *made_up_problems(20)], THRESHOLD) == []


def test_what_most_problems_share_says_nothing(problems):
    """A case that is all stock, shared by every problem, with a question of its own behind it."""
    case = "".join(made_up_texts(1, seed=3))
    series = [Problem(str(n), case + one.text, one.choices, ("a",)) for n, one in enumerate(problems[:60])]
    assert near_leaks([Document(case, "a:1")], series, THRESHOLD) == []
    assert [one.problem for one in near_leaks([Document(case + problems[5].text, "a:1")], series, THRESHOLD)] == [5]


def test_what_stands_there_word_for_word_is_said_to(problems):
    chance = random.Random(1)
    documents = [
        Document(as_text(problems[0], chance), "a:1"),
        Document(planted(problems[3:4], ["x"], "misread characters", 0.1)[1].text, "a:2"),
    ]
    assert [(one.problem_id, one.source, one.kind) for one in search(documents, problems)] == [
        (problems[0].problem_id, "a:1", "word for word"),
        (problems[3].problem_id, "a:2", "question and options"),
    ]


def test_documents_are_read_one_after_the_other_and_not_kept(problems):
    alive = []

    def documents():
        for number in range(300):
            yield Document(f"{number}" + "症例" * 2000, f"a:{number}")
            alive.append(len(like._waiting))

    like = NearSearch(problems)
    for document in documents():
        like.add(document)
    assert max(alive) * 4000 < 2 * (1 << 18)


@settings(deadline=None, max_examples=50)
@given(st.text("肝硬変の患者カがロ口12aAl1ー。\n ", min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_folding_undoes_typesetting(text, chance):
    typeset = retypeset(Problem("1", text, (), ("1",)), 0.5, chance).text
    assert fold(typeset) == fold(text)
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("肝硬変(かんこうへん)の患者", "肝硬変の患者"),
        ("ロ腔", "口腔"),
        ("ベッド", "べッド"),
        ("Ｏ2 l0", "0 2 10"),
        ("<ruby>肝<rt>かん</rt></ruby>", "<ruby>肝</ruby>"),
    ],
)
def test_confusable_and_annotated_texts_are_one(one, other):
    assert fold(one) == fold(other)


def test_pieces_are_as_long_as_they_say_something():
    """Two kanji, three kana, six letters: each begins where it is counted, and none reaches over a boundary."""
    kanji, kana, latin = pieces("肝硬変"), pieces("あいうえ"), pieces("abcdefg")
    assert [np.count_nonzero(one) for one in (kanji, kana, latin)] == [2, 2, 2]
    assert kanji[0] == pieces("肝硬")[0]
    assert latin[1] == pieces("bcdefg")[0]
    assert np.count_nonzero(pieces(f"肝{BETWEEN}硬")) == 0
    assert len(pieces("")) == 0
