"""A study as large as a page has to carry: 2,000 questions, ten models, each without and with an explanation, made up.

python -m tests.large_study OUT.html    # its page
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from medllm.exam.flips import Flip
from medllm.exam.problem import Problem
from medllm.exam.scoring import ProblemResult
from medllm.report.page import render
from medllm.report.questions import gather
from medllm.report.results import Cell
from medllm.report.sittings import Form, Said, Sitting
from medllm.report.statistics import Bootstrap
from medllm.report.study import ReportInput
from tests.chromium import DESKTOP, PHONE, Opened, chromium

QUESTIONS, MODELS = 2000, 10
SETTINGS = ("3-shot", "3-shot with explanation")
_WORDS = [
    "".join(random.Random(seed).choices("心肺肝腎脳血圧熱痛炎症薬剤投与検査診断治療所見患者疾患急慢性の はがをにで、する", k=4))
    for seed in range(3000)
]


def large_study() -> ReportInput:
    """Explanations of about 240 characters; every sixth answer is wrong, and every wrong one of an explanation a flip."""
    draw = random.Random(0)
    problems = {f"{100 + i % 20}{'ABCDEF'[i % 6]}{i}": i for i in range(QUESTIONS)}
    exam = {
        name: Problem(name, _text(draw, 20), tuple(_text(draw, 2) for _ in "abcde"), ("abcde"[i % 5],), year=2000 + i % 20)
        for name, i in problems.items()
    }
    cells, sittings, flips = [], [], {}
    for model in map("model {}".format, range(MODELS)):
        right = {setting: {name: draw.random() > 1 / 6 for name in exam} for setting in SETTINGS}
        for setting in SETTINGS:
            form = Form(
                tuple(
                    {
                        "template": "igakuqa",
                        "explanation": setting == SETTINGS[1],
                        "format": "completion",
                        "answer_as": "letters",
                    }.items()
                ),
                _text(draw, 200) if not sittings else sittings[0].form.before,
            )
            answer = {name: exam[name].answer[0] if right[setting][name] else "e" for name in exam}
            texts = {name: f"{_text(draw, 60) if setting == SETTINGS[1] else ''}\n答え: {answer[name]}" for name in exam}
            results = tuple(ProblemResult(name, right[setting][name], 1, answer[name]) for name in exam)
            cells.append(Cell(model, setting, results))
            sittings.append(Sitting(form, {name: Said(text, "label") for name, text in texts.items()}))
        plain, explained = (right[setting] for setting in SETTINGS)
        flips[model] = tuple(Flip(name, plain[name], "reasoning") for name in exam if plain[name] != explained[name])
    questions = gather(cells, exam, sittings, flips)
    return ReportInput("A large study", "jax", {}, tuple(cells), questions=questions, draw=Bootstrap(20, method="percentile"))


def _text(draw: random.Random, words: int) -> str:
    return "".join(draw.choices(_WORDS, k=words))


def measure(page: Path, times: int = 5) -> None:
    """Print the size of a page, and the least and the most milliseconds that opening, filtering and searching it take."""
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    with chromium() as browser:
        for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
            taken: dict[str, list[float]] = {"open": [], "of a processor": [], "filter": [], "search": [], "search again": []}
            for _ in range(times):
                with Opened(browser, page, size=size) as opened:
                    taken["of a processor"].append(1000 * opened.processor_seconds)
                    taken["open"].append(opened.milliseconds)
                    for what, begin in (("filter", _CHOOSE), ("search", _SEARCH), ("search again", _SEARCH_AGAIN)):
                        taken[what].append(opened.page.evaluate(f"({_TIMED})", begin))
            print(name, "; ".join(f"{what} {min(ms):.0f} to {max(ms):.0f} ms" for what, ms in taken.items()))


_CHOOSE, _SEARCH, _SEARCH_AGAIN = (("flip", "lost"), ("text", "炎症"), ("text", "血圧"))
# From the event until the list has been drawn anew; the page itself waits 150 ms for more letters of a search.
_TIMED = """async ([name, value]) => {
  const field = document.querySelector(`#filters [name=${name}]`), begun = performance.now();
  const list = document.getElementById("found");
  const drawn = new Promise((resolve) => new MutationObserver(resolve).observe(list, {childList: true}));
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  await drawn;
  return performance.now() - begun;
}"""


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(render(large_study()), encoding="utf-8")
    measure(file)
