"""A model whose every answer is planted: right, or wrong for a cause that is known, in the words that models use."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from medllm.engine import Generation
from medllm.exam.flips import Cause
from medllm.exam.problem import LETTERS, Problem

STEMS = (
    "最も考えられるのはどれか。1つ選べ。",
    "この患者にまず行うべきなのはどれか。1つ選べ。",
    "誤っているのはどれか。1つ選べ。",
    "What is the most likely diagnosis?",
)


def problems(count: int) -> list[Problem]:
    """Made-up problems of five options over five years."""
    return [
        Problem(
            f"p{number}",
            f"症例{number}。{STEMS[number % len(STEMS)]}",
            tuple(
                f"{kind}{number}号{sign}"
                for kind, sign in zip(("肺炎", "検査", "切除", "薬剤", "病"), "甲乙丙丁戊", strict=True)
            ),
            (LETTERS[number % 5],),
            year=2018 + number % 5,
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class _Said:
    """What a text is made of: the options' letters and texts that are right, answered and concluded with."""

    right: str
    answer: str
    answer_text: str
    other: str
    other_text: str


_Form = Callable[[_Said], tuple[str, str, str]]
"""What is said → the text, its finish, and the stop string that ended it."""


def _ended(*texts: str) -> list[_Form]:
    return [lambda said, text=text: (text.format(**vars(said)), "stop", "") for text in texts]


RIGHT: list[_Form] = _ended(
    "胸痛がある。よって{answer}が正解。\n答え:{answer}",
    "所見に合う。したがって、正解は{answer}である。\n答え: {answer}",
    "The findings fit.\n\nAnswer: {answer}",
    "答え: {answer}\n解説: 所見に合う。",
    "所見に合う。\n【回答】{answer}",
)
WRONG: Mapping[Cause, list[_Form]] = {
    "ran_on": [
        *_ended(
            "所見をまとめる。\n問題: 次の症例で正しいのはどれか。\na: 甲\nb: 乙\n答え:{right}",
            "所見に合う。\n【問題】次の症例。\n答え:{right}",
        ),
        lambda said: ("所見に合うかを考える。", "stop", "\n問題:"),
        lambda said: ("所見をまとめる。\n質問: 別の症例はどれか。それは", "length", ""),
    ],
    "cut_off": [
        lambda said: ("所見を順に見る。まず呼吸音は正常であり、次に", "length", ""),
        lambda said: ("所見を順に見る。" * 20, "length", ""),
        lambda said: ("<think>まず所見を順に見る。答え:a", "length", ""),
    ],
    "unread": _ended(
        "所見だけでは決められません。",
        "所見に合う。\n答え: {right}または{other}",
        "回答できません。情報が不足しています。",
        "The findings fit several of them.",
    ),
    "contradicts": _ended(
        "所見に合う。よって正解は{other}である。\n答え:{answer}",
        "所見に合う。したがって、答えは{other_text}です。\n答え: {answer}",
        "The findings fit. Therefore, the correct answer is {other}.\nAnswer: {answer}",
        "答え: {answer}\n解説: 所見に合う。以上より、正解は{other}である。",
        "所見に合う。答えとして最も適切なのは{other}である。\n答え:{answer}",
        "所見に合う。\nしたがって、本問では{other_text}を選ぶ。\n【回答】{answer}",
        "The findings fit. Hence {other} is the correct choice.\nAnswer: ({answer})",
        "### 結論\n答えは {other}: {other_text} です。\n\n### 回答\n{answer}",
    ),
    "reasoning": _ended(
        "所見に合う。よって正解は{answer}である。\n答え:{answer}",
        "所見に合う。{other_text}は考えにくい。\n答え: {answer}",
        "{other_text}との鑑別を要する。よって答えは{answer_text}である。\n答え:{answer}",
        "The findings fit. Therefore, the answer is {answer}.\nAnswer: {answer}",
        "所見に合う。よって正解は{answer}である。\n答え:{answer}\n問題: 次の症例はどれか。\n答え:{right}",
        "答え: {answer}\n解説: 呼吸音は正常であり、次に",
        "所見に合う。{other_text}に見えるが、答えは{answer_text}である。\n\n{answer}",
        "a: 合わない。\nb: 合わない。\nc: 合わない。\nd: 合わない。\ne: 合わない。\n答え: {answer}",
        "{other} may fit, but the answer is {answer}.\nAnswer: {answer}",
        "所見は{other_text}にも合うが、次の所見から{answer}とする。\n答え:{answer}",
        "### 結論\n答えは {answer}: {answer_text} です。\n\n### 回答\n{answer}",
    ),
}


@dataclass
class PlantedEngine:
    """Answers each problem as it was planted: ``outcomes`` has, by problem, the cause of a wrong answer, or None.

    Attributes:
        exam: The problems, found by their question in the prompt.
        outcomes: What becomes of each.
        seed: Of the words.
    """

    exam: Sequence[Problem]
    outcomes: Mapping[str, Cause | None]
    seed: int = 0
    name: str = "planted"
    said: Counter[Cause | None] = field(default_factory=Counter)

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        """One answer a prompt."""
        by_number = {problem.problem_id: problem for problem in self.exam}
        return [[self._answer(by_number[f"p{_text(prompt).rsplit('症例', 1)[1].split('。')[0]}"])] for prompt in prompts]

    def _answer(self, problem: Problem) -> Generation:
        rng, cause = random.Random(f"{self.seed} {problem.problem_id}"), self.outcomes[problem.problem_id]
        (right,) = problem.answer
        answer = right if cause is None else rng.choice([letter for letter in "abcde" if letter != right])
        # An explanation may name the right option, or a third one.
        other = rng.choice([letter for letter in "abcde" if letter != answer])
        texts = dict(zip("abcde", problem.choices, strict=True))
        form = rng.choice(RIGHT if cause is None else WRONG[cause])
        self.said[cause] += 1
        text, finish, stop = form(_Said(right, answer, texts[answer], other, texts[other]))
        return Generation(text, (), finish, stop)


def _text(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].content


def planted(exam: Sequence[Problem], shares: Mapping[Cause, float], rng: random.Random) -> dict[str, Cause | None]:
    """What becomes of each problem, as drawn: each cause with its share, else right."""
    causes: list[Cause | None] = [*shares, None]
    weights = [*shares.values(), 1 - sum(shares.values())]
    return {problem.problem_id: cause for problem, cause in zip(exam, rng.choices(causes, weights, k=len(exam)), strict=True)}
