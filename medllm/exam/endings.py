"""How a generated text ends: with the model's own answer, in another question, or nowhere.

Three things go wrong at the end of a text, and a score alone shows none of them:

- **run-on**: behind its own answer the model begins another question or another turn, and goes on with that;
- **cut off**: ``max_new_tokens`` came before the end;
- **unread**: no answer was found in it.

What begins another question or turn is declared here and nowhere else. An answer is only looked for before it
(:mod:`medllm.exam.answers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from medllm.exam.markup import TOKEN, folded, framed, without_thoughts

ANSWER_WORD = (
    "(?:最終的な|最終|最も適切な|正しい|模範|final |correct |best |right |the |my |your ){0,4}"
    "(?:answers?|ans|答え|解答|回答|正解|正答)(?:の?(?:選択肢|番号|記号|組み?合わ?せ)|肢|[ _](?:choice|option|letter))?"
)
"""What an answer is announced with, in a :func:`folded` text."""

_LINE = r"(?:^|\n)[ \t#>*「【(\[]*"
_PLAIN_LINE = r"(?:^|\n)[ \t「【(\[]*"  # a heading (### 問題:) may be what a model orders its own text by
_ROLE = r"(?:user|assistant|human|ユーザー|アシスタント|あなた)"
_QUESTION = (
    rf"(?:次の|別の|新しい|\d+個目の|第|new |next |{_ROLE}への)?(?:(?:練習)?問題文?|例題|類題|設問|質問|問|question)[ \t]*\d*"
)
_ANOTHER = re.compile(
    "|".join(
        f"(?:{label})(?=\\s*\\S)"  # a label with nothing behind it is where the text was over
        for label in (
            rf"{_PLAIN_LINE}{_QUESTION}[】」)\]*]*[ \t]*:",
            rf"\n[ \t]*[【\[]{_QUESTION}[】\]]",
            r"\n[ \t#>*]*q[ \t]*\d*[ \t]*[:.][ \t]",
            rf"{_LINE}(?:{_ROLE}|instructions?|input|指示|入力)[】」)\]*]*[ \t]*:",
            # A role may have run together with what stood before it (``さいころuser``); "a drug user" is none.
            rf"(?:^|\n)[ \t]*\S{{0,24}}{_ROLE}[ \t]*:?[ \t]*(?=\n)",
            TOKEN,
        )
    )
)
# What a text may hold before its own answer too, where it repeats the question first: another one's only behind an answer.
_ANSWERED = re.compile(
    rf"(?:^|\n)[ \t#>*「【(\"]*{ANSWER_WORD}[】」)*\"]*[ \t]*:[ \t*(\[]*(?=\w)"
    rf"|【{ANSWER_WORD}】[ \t*(]*(?=\w)"
    r"|\A\s*[*(「【]*[a-z0-9](?:[ \t]*[,、・と][ \t]*[a-z0-9]){0,5}[)」】]*(?:[ \t]*[:.][^\n]{0,80})?[*。.]*[ \t]*(?=\n)"
)
_ASKED_AGAIN = re.compile(
    r"(?:選んで|選び|答えて|回答して|解答して|出力して)(?:ください|なさい)[。.]?[ \t]*\n\s*\S"
    rf"|(?:どれか|何か|選べ|答えよ|求めよ)[。.?][ \t]*(?:\d+つ選べ[。.])?[ \t]*\n"
    rf"\s*(?:[(「]?[a1][)」]?[\s:.]|[【「]?{ANSWER_WORD}[】」]?[ \t]*:)"
    r"|\?[ \t]*\n\s*\(?a[).:][ \t]*[^\n]*\n\s*\(?b[).:][ \t]"
    rf"|(?:です|どれ|でしょう|何)か\?[ \t]*\n\s*[【「]?{ANSWER_WORD}[】」]?[ \t]*:"
    rf"|{_LINE}\d{{1,3}}歳の?(?:男|女|妊婦|患者|初産婦|経産婦)(?=[^\0]{{0,400}}?\n[ \t#*【「]*{ANSWER_WORD}[ \t】」]*:)"
    rf"|{_LINE}\d{{2,3}}[a-i]\d{{1,3}}(?=[\s.:】])"
    rf"|{_LINE}{_QUESTION}[】」)\]*]*[ \t]*:\s*\S"
    rf"|{_LINE}(?:あなたは[^。\n]{{0,60}}です|you are an? )"
    rf"|{_LINE}(?:次の|別の|以下の)(?:問題|設問|質問|問い|文(?:章)?を)"
    rf"|{_LINE}(?:問題|設問|質問|問|question|q)[ \t]*\d+[ \t.】\]]*(?=[\s.】])"
    rf"|{_LINE}(?:選択肢|options|choices)[】」)]*[ \t]*:?[ \t]*\n+[ \t]*\(?a\b"
)


def own_part(plain: str, prompt: str = "") -> str:
    """A :func:`folded` text up to where another question or turn begins; all of it where none does.

    Another one stands behind something: a text may first repeat the question that it answers.

    Args:
        plain: The text.
        prompt: What was asked. Its own first line, anew, begins another question too.
    """
    begun = len(plain) - len(plain.lstrip())
    ends = [match.start() for match in _ANOTHER.finditer(plain) if plain[begun : match.start()].strip()]
    if answered := _ANSWERED.search(plain):
        ends += [match.start() for match in _ASKED_AGAIN.finditer(plain, answered.end())]
    first = next((line.strip() for line in folded(prompt).split("\n") if line.strip()), "")
    again = plain.find(f"\n{first}", begun + 1) if first else -1
    return plain[: min([*ends, *([again] if again >= 0 else [])])] if ends or again >= 0 else plain


def runs_on(text: str, prompt: str = "") -> bool:
    """Whether a generated text goes on behind its answer with another question or turn."""
    plain = framed(folded(without_thoughts(text)[0]))
    return len(own_part(plain, prompt)) < len(plain)


@dataclass(frozen=True)
class Ending:
    """How one text ended.

    Attributes:
        run_on: It begins another question or turn, or a stop string ended it that does.
        stopped: A stop string ended it, not the model.
        cut_off: ``max_new_tokens`` ended it.
        unread: No answer was found in it.
    """

    run_on: bool
    stopped: bool
    cut_off: bool
    unread: bool


def ending(text: str, *, prompt: str = "", stop: str = "", cut_off: bool = False, unread: bool = False) -> Ending:
    """How a text ended.

    Args:
        text: What was generated.
        prompt: What was asked, where it is a text to continue.
        stop: The stop string that ended it, which is no part of ``text``.
        cut_off: ``max_new_tokens`` ended it.
        unread: No answer was found in it.
    """
    # Behind a stop string something would have followed.
    return Ending(runs_on(f"{text}{stop}…" if stop else text, prompt), bool(stop), cut_off, unread)


@dataclass(frozen=True)
class EndingCounts:
    """How many texts of an exam ended in each way of :class:`Ending`; a text may be counted in several."""

    texts: int
    run_on: int
    stopped: int
    cut_off: int
    unread: int

    @classmethod
    def count(cls, endings: Iterable[Ending]) -> EndingCounts:
        """Count them."""
        rows = [asdict(one) for one in endings]
        return cls(len(rows), *(sum(row[name] for row in rows) for name in ("run_on", "stopped", "cut_off", "unread")))

    @classmethod
    def from_json(cls, value: Any) -> EndingCounts | None:
        """What a ``result.json`` holds; None where it is of before they were counted, or is no such thing."""
        try:
            return cls(**value)
        except TypeError:
            return None

    def words(self) -> str:
        """``3 run on, 0 cut off, 2 unread``: as it stands beside a score."""
        return f"{self.run_on} run on, {self.cut_off} cut off, {self.unread} unread"
