"""How generated texts end: run on, cut off, unread."""

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from medllm.config import ModelConfig
from medllm.engine import Generation
from medllm.exam.answers import extract_answer
from medllm.exam.endings import Ending, EndingCounts, ending, runs_on
from medllm.exam.evaluation import sit
from medllm.exam.problem import Problem
from medllm.exam.scoring import ProblemResult
from medllm.report.page import render
from medllm.report.results import Cell
from medllm.report.statistics import Bootstrap
from medllm.report.study import ReportInput
from medllm.stage_config import EvaluateConfig

PROBLEM = Problem("q1", "ミロリ星の空は何色か。", ("赤", "青", "緑"), ("b",))


@pytest.mark.parametrize(
    "going_on",
    [
        "\n問題: 40歳の男性。",
        "\n\n問題文:\n40歳の男性。",
        "\n【問題】\n40歳の男性。",
        "\n【問題2】40歳の男性。",
        "\n次の問題：40歳の男性。",
        "\nQuestion: What is blue?",
        "\n### Question 2: What is blue?",
        "\nさいころuser\n40歳の男性。",
        "\nuser: 40歳の男性。",
        "\nassistant\n答え: c",
        "\nあなた:空は赤い。",
        "<|im_start|>user",
        "<|endoftext|>月は",
        "\n必ずa,b,cの中からちょうど1個選んでください。\n月は",
        "\n選択肢\na: 一\nb: 二\nc: 三",
    ],
)
def test_a_text_that_begins_another_question_or_turn_behind_its_answer_runs_on(going_on):
    own = "空は青い。\n答え: b"
    assert not runs_on(own)
    assert runs_on(own + going_on)
    # What comes behind is another question's: it is not read for this one.
    assert extract_answer(f"{own}{going_on}\n答え: a", PROBLEM, explanation=True).answer == ("b",)


def test_a_text_that_begins_its_prompt_anew_runs_on():
    prompt = "\nミロリ星の空は何色か。\na: 赤\nb: 青"
    assert runs_on("答え: b\nミロリ星の空は何色か。\na: 赤", prompt)
    assert not runs_on("答え: b", prompt)
    assert not runs_on("ミロリ星の空は何色か。\n答え: b", prompt)  # said first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "問題: ミロリ星の空は何色か。\n空は青い。\n答え: b",  # the question that it answers, said first
        "必ずa,b,cの中からちょうど1個選んでください。\n空は青い。\n答え: b",
        "a: 誤り。\nb: 正しい。\nc: 誤り。\n答え: b",
        "答え: b\n解説:\na: 誤り。\nb: 正しい。\nc: 誤り。",  # its own options, explained behind the answer
        "この患者は injection drug user\nである。\n答え: b",
        "2019年 一般問題: 78 の類題である。\n答え: b",
        "この問題:「空は何色か」は易しい。\n答え: b",
        "答え: b\nあなた:",  # a label with nothing behind it is where the text was over
    ],
)
def test_a_text_that_ends_with_its_own_answer_does_not(text):
    assert not runs_on(text)


def test_a_text_that_a_stop_string_ended_before_another_question_ran_on():
    assert ending("青い。\n Answer:b", stop="\nQuestion:") == Ending(True, True, False, False)
    assert ending("b", stop="\n\n") == Ending(False, True, False, False)
    assert ending("b", stop="###") == Ending(False, True, False, False)


def test_they_are_counted_in_every_evaluation():
    texts = iter(
        [
            Generation("b", (), "stop"),
            Generation("b", (), "stop", "\n問題:"),
            Generation("b\n【問題】月は何色か。", (), "stop"),
            Generation("空は", (), "length"),
            Generation("さあ", (), "stop"),
        ]
    )

    class Engine:
        name = "scripted"

        def generate(self, prompts, sampling, batch_size=32, progress=None):
            return [[next(texts)] for _ in prompts]

    problems = [Problem(f"q{number}", f"第{number}の空は何色か。", PROBLEM.choices, ("b",)) for number in range(5)]
    sat = sit(Engine(), problems, (), EvaluateConfig(ModelConfig("model"), "run", ("problems.jsonl",)))
    counted = EndingCounts.count(ended for _, ended, _ in sat)
    assert counted == EndingCounts(texts=5, run_on=2, stopped=1, cut_off=1, unread=2)
    assert counted.words() == "2 run on, 1 cut off, 2 unread"
    assert EndingCounts.from_json(json.loads(json.dumps(asdict(counted)))) == counted


def test_a_result_of_before_they_were_counted_has_none():
    assert EndingCounts.from_json(None) is None
    assert EndingCounts.from_json({"texts": 3}) is None


def test_they_stand_beside_the_score_in_a_report():
    result = ProblemResult("q1", True, 1)
    counted, before = EndingCounts(texts=1, run_on=13, stopped=2, cut_off=5, unread=7), None
    cells = tuple(Cell(name, "3-shot", (result,), ended) for name, ended in (("new", counted), ("old", before)))
    page = render(ReportInput("title", "jax", {}, cells, draw=Bootstrap(resamples=20)))
    assert page.count(" run on, ") == 1
    assert "13 run on, 5 cut off, 7 unread" in page


def test_the_published_answers_to_the_119th_exam_run_on_and_are_right_less_often_where_they_do():
    """Preferred-MedLLM-Qwen-72B as it was served there, and the instruct model beside it."""
    folder = os.environ.get("IGAKUQA119_DIR")
    if not folder:
        pytest.skip("IGAKUQA119_DIR is not set: a checkout of IgakuQA119 (questions, answers, results)")
    found = {model: _published(Path(folder), model) for model in ("pfn-medllm-qwen-72b", "qwen2_5-72b")}
    assert {model: (len(on), len(off)) for model, (on, off) in found.items()} == {
        "pfn-medllm-qwen-72b": (94, 106),
        "qwen2_5-72b": (0, 200),
    }
    on, off = found["pfn-medllm-qwen-72b"]
    assert (sum(on), sum(off)) == (46, 86)  # 49 % right where it runs on, 81 % where it ends


def _published(folder: Path, model: str) -> tuple[list[bool], list[bool]]:
    """Whether each answer of sections A–C is right: of the texts that run on, and of the others."""
    with (folder / "results/correct_answers.csv").open(encoding="utf-8-sig") as stream:
        gold = {row[0]: sorted(row[1]) for row in csv.reader(stream)}
    texts: tuple[list[bool], list[bool]] = ([], [])
    for section in "ABC":
        rows = json.loads((folder / f"answers/119{section}_{model}.json").read_text("utf-8"))["results"]
        for row in rows:
            (answer,) = row["answers"]
            # As the model wrote it: the format asked for the answer first.
            text = f"answer: {answer['answer']}\nexplanation: {answer['explanation']}"
            right = sorted(str(answer["answer"]).replace(",", "").replace(" ", "")) == gold[row["question_number"]]
            texts[not runs_on(text, f"問題: {row['question_text']}")].append(right)
    return texts
