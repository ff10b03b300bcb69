"""A problem of the exam in a run's texts is named by text and problem, changed copies too."""

import random

import pytest

from medllm.corpus.documents import Document
from medllm.corpus.leaks.changes import as_text, reworded, scanned
from medllm.corpus.leaks.exact import ExactSearch
from medllm.corpus.leaks.made_up import made_up_problems, made_up_texts
from medllm.exam.loaders import write_problems
from medllm.verify.data import TrainingData, check_leaks


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    file = tmp_path_factory.mktemp("exam") / "exam.jsonl"
    problems = made_up_problems(40)
    write_problems(file, problems)
    return file, problems


def said(exam, *texts):
    documents = [Document(text, f"documents.jsonl:{line}") for line, text in enumerate(texts, 1)]
    return [(one.status, one.words) for one in check_leaks(TrainingData(None, None, documents, {}), (str(exam),))]


@pytest.mark.parametrize("change", [scanned, reworded])
def test_a_changed_copy_is_named_that_is_nowhere_word_for_word(exam, change):
    file, problems = exam
    chance = random.Random(1)
    copy = as_text(change(problems[10], 0.2, chance), chance)
    exact = ExactSearch(problems)
    exact.add(Document(copy, ""))
    assert not exact.best()
    ((status, words),) = said(file, *made_up_texts(1), copy)
    assert status == "refuted"
    assert words.startswith(
        f"documents.jsonl:2: no exam in the data: problem {problems[10].problem_id} of the exam: a changed copy"
    )


def test_the_problem_itself_is_named_as_word_for_word(exam):
    file, problems = exam
    assert said(file, as_text(problems[10], random.Random(1))) == [
        ("refuted", f"documents.jsonl:1: no exam in the data: problem {problems[10].problem_id} of the exam: 100% of it")
    ]


def test_what_was_looked_for_and_how_is_said_where_nothing_is_there(exam):
    file, _ = exam
    assert said(file, *made_up_texts(3)) == [
        ("proved", "no exam in the data: 40 problems looked for in 3 texts, word for word and changed")
    ]
