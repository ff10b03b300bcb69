"""The leak check finds an exam question however it was typeset, and nothing else."""

from __future__ import annotations

import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm.corpus.documents import Document
from medllm.corpus.leaks.exact import THRESHOLD, ExactSearch, Leak, normalize
from medllm.exam.loaders import load_problems
from medllm.exam.problem import Problem

KANA = "".join(map(chr, range(0x3042, 0x3094)))
KANJI = "".join(map(chr, range(0x4E00, 0x4E80)))
question_text = st.text("０１２abcＡＢ症例患者発熱咳嗽頭痛男性女性歳", min_size=20, max_size=80)
filler_text = st.text(KANA, max_size=200)


def problem(text: str, *choices: str, problem_id: str = "112A1") -> Problem:
    return Problem(problem_id, text, choices, ("a",) if choices else ("1",))


def find_leaks(documents: list[Document], problems: list[Problem], threshold: float = THRESHOLD, n: int = 13) -> list[Leak]:
    """What is found in all of the documents, in the order of the problems."""
    search = ExactSearch(problems, threshold, n)
    for document in documents:
        search.add(document)
    return [leak for _, leak in sorted(search.best().items())]


def typeset(text: str, randomness: random.Random) -> str:
    """The same text with widths changed and white space, line breaks and punctuation strewn in."""
    wide = {letter: chr(ord(letter) + 0xFEE0) for letter in map(chr, range(0x21, 0x7F))}
    letters = []
    for letter in text:
        narrow = unicodedata.normalize("NFKC", letter)
        letters.append(randomness.choice([letter, narrow, wide.get(narrow, narrow)]))
        letters.append(randomness.choice(["", "", "", " ", "\n", "\u3000", "、", "-", "_"]))
    return "".join(letters)


@settings(deadline=None)
@given(question_text, filler_text, filler_text, st.randoms(use_true_random=False))
def test_an_embedded_question_is_found_whatever_its_width_and_spacing(text, before, after, randomness):
    documents = [Document(before, "a.txt:1"), Document(before + typeset(text, randomness) + after, "b.txt:1")]
    assert find_leaks(documents, [problem(text)]) == [Leak("112A1", "b.txt:1", 1.0)]


@settings(deadline=None)
@given(question_text, st.lists(filler_text, max_size=4))
def test_an_unrelated_text_is_not_a_leak(text, fillers):
    assert find_leaks([Document(filler, "a.txt:1") for filler in fillers], [problem(text)], threshold=0.01) == []


@settings(deadline=None)
@given(
    st.text("abcd", max_size=60), st.lists(st.text("abcd", min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 8)
)
def test_overlap_is_the_share_of_distinct_n_grams_and_options_in_one_document(text, questions, n):
    problems = [problem(question, problem_id=str(index)) for index, question in enumerate(questions)]
    found = {leak.problem_id: leak.overlap for leak in find_leaks([Document(text, "a:1")], problems, threshold=0.5, n=n)}
    for index, question in enumerate(questions):
        size = min(n, len(question))
        grams = {question[start : start + size] for start in range(len(question) - size + 1)}
        share = sum(gram in text for gram in grams) / len(grams)
        assert found.get(str(index), 0.0) == (share if share >= 0.5 else 0.0)


def test_a_stock_question_is_a_leak_only_with_its_options():
    stock = problem("誤っているのはどれか。2つ選べ。", "肝硬変", "虫垂炎", "大腸憩室炎", "胆石症", "膵炎")
    alone = Document("問1 誤っているのはどれか。2つ選べ。 a 血圧 b 脈拍", "a.txt:1")
    whole = Document("誤っているのはどれか。２つ選べ\n1 肝硬変\n2 虫垂炎\n3 大腸憩室炎\n4 胆石症\n5 膵炎", "b.txt:1")
    assert find_leaks([alone], [stock]) == []
    assert find_leaks([alone, whole], [stock]) == [Leak("112A1", "b.txt:1", 1.0)]


def test_questions_shorter_than_an_n_gram_are_found_too_and_wordless_ones_are_passed_over():
    short = problem("正しいのは?", "一", "二")
    assert find_leaks([Document("正しいのは 1 一 2 二", "a.txt:1")], [short, problem("?!", "一")]) == [
        Leak("112A1", "a.txt:1", 1.0)
    ]


def test_the_document_that_holds_most_is_named_and_problems_keep_their_order():
    first, second = KANJI[:60], KANJI[60:120]
    documents = [Document(second + first[:55], "a:1"), Document(first, "a:2"), Document(first, "a:3")]
    leaks = find_leaks(documents, [problem(first, problem_id="one"), problem(second, problem_id="two")])
    assert leaks == [Leak("one", "a:2", 1.0), Leak("two", "a:1", 1.0)]


def test_pieces_strewn_over_several_documents_are_not_added_up():
    text = KANJI[:60]
    assert find_leaks([Document(text[:40], "a:1"), Document(text[20:], "a:2")], [problem(text)]) == []


def test_normalizing_keeps_letters_and_digits_alone():
    assert normalize("Ｈｂ １２.５ g/dL、「ｶﾞｽ」_①") == "hb125gdlガス1"


def test_ten_million_characters_are_checked_against_two_thousand_questions_in_seconds():
    randomness = random.Random(0)
    text = "".join(randomness.choices(KANA + KANJI, k=100_000))
    documents = [Document(text[start:] + text[:start], f"a:{start}") for start in range(0, 100_000, 1_000)]
    problems = [
        problem("".join(randomness.choices(KANA + KANJI, k=150)), problem_id=str(number)) for number in range(1_999)
    ] + [problem(text[500:650], problem_id="leaked")]
    began = time.process_time()
    leaks = find_leaks(documents, problems)
    assert time.process_time() - began < 20
    assert [(leak.problem_id, leak.overlap) for leak in leaks] == [("leaked", 1.0)]


def test_the_real_exam_is_found_in_itself_and_not_in_case_reports():
    exam, real = os.environ.get("IGAKUQA_DIR"), os.environ.get("MEDLLM_REAL_DATA")
    if not exam or not real:
        pytest.skip("set IGAKUQA_DIR to an IgakuQA checkout and MEDLLM_REAL_DATA to a folder with jmed/")
    problems = load_problems(exam).problems
    leaked = [Document(one.text + "\n" + "\n".join(one.choices), one.problem_id) for one in problems[::40]]
    assert {leak.problem_id for leak in find_leaks(leaked, problems)} >= {one.problem_id for one in problems[::40]}
    reports = [
        Document(text, file.name)
        for file in sorted((Path(real) / "jmed").glob("*.jsonl"))
        for text in file.read_text(encoding="utf-8").splitlines()
    ]
    assert find_leaks(reports, problems) == []
