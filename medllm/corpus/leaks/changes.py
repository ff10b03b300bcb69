"""Copies of problems, changed to a degree: what the search for near copies is measured on.

A change takes a problem, a level from 0 (untouched) to 1 and a source of chance, and gives the problem as somebody might
have it. ``as_text`` writes one into a running text, in one of the ways in which options are numbered.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace

from medllm.exam.problem import Problem

Change = Callable[[Problem, float, random.Random], Problem]

_WORDS = re.compile(
    r"[\u4e00-\u9fff々]+|[\u30a1-\u30ffー]+|[\u3041-\u309f]+|[A-Za-z]+|[0-9０-９]+(?:[.．][0-9０-９]+)?|.", re.DOTALL
)
_CLAUSES = re.compile(r"[^、。,.;]*[、。,.;]?\s*")
_NUMBERING = ("abcde", "12345", "①②③④⑤", "ABCDE", "アイウエオ", "ａｂｃｄｅ")
_LOOK_ALIKES = [
    "ロ口",
    "ニ二",
    "カ力",
    "エ工",
    "タ夕",
    "ハ八",
    "ト卜",
    "ー一",
    "O0",
    "l1",
    "I1",
    "S5",
    "B8",
    "ベべ",
    "リり",
    "へヘ",
    "つっ",
    "やゃ",
]
_SYNONYMS = {
    "患者": "症例",
    "男性": "男",
    "女性": "女",
    "来院": "受診",
    "搬入": "搬送",
    "主訴": "訴え",
    "出現": "発症",
    "増悪": "悪化",
    "持続": "継続",
    "認める": "みられる",
    "認めない": "みられない",
    "異常": "変化",
    "治療": "処置",
    "薬": "薬剤",
    "検査": "精査",
    "診断": "判断",
    "疾患": "病気",
    "原因": "要因",
    "症状": "症候",
    "発熱": "熱発",
    "嘔吐": "吐き気",
    "腹痛": "腹部の痛み",
    "頭痛": "頭の痛み",
    "呼吸困難": "息苦しさ",
    "適切": "妥当",
    "正しい": "正確な",
    "誤っている": "正しくない",
    "考えられる": "疑われる",
    "必要": "要する",
    "patient": "subject",
    "man": "gentleman",
    "woman": "lady",
    "physician": "doctor",
    "likely": "probable",
    "appropriate": "suitable",
    "treatment": "therapy",
    "diagnosis": "condition",
    "following": "options",
}
_KANJI = (
    "本人時間場所方法経過状態変動部位程度要点結果内容性質水準比較傾向範囲形式過程単位構造系統段階条件関係影響効果機能成分割合"
)
_KANA = "のにはをがでとれるすしたてもなりらまさかこ"
_LATIN = "etaoinshrdlucmf"


def retypeset(problem: Problem, level: float, chance: random.Random) -> Problem:
    """Widths, spaces, line breaks and readings beside kanji, at a share ``level`` of the characters."""
    return _everywhere(problem, lambda text: _each(text, level, chance, _typeset))


def scanned(problem: Problem, level: float, chance: random.Random) -> Problem:
    """A share ``level`` of the characters read wrongly: as one that looks alike, or as another, twice, or not at all."""
    return _everywhere(problem, lambda text: _each(text, level, chance, _misread))


def reworded(problem: Problem, level: float, chance: random.Random) -> Problem:
    """A share ``level`` of the words put otherwise, and as large a share of the clauses moved; numbers stay.

    A word is a run of one script. It gives way to a synonym where there is one in the list, else to another word of its
    script: for a search by characters a synonym is just that.
    """

    def words(text: str) -> str:
        return "".join(_other_word(word, chance) if chance.random() < level else word for word in _WORDS.findall(text))

    def clauses(text: str) -> str:
        parts = [part for part in _CLAUSES.findall(text) if part]
        for at in range(len(parts) - 1):
            if chance.random() < level:
                parts[at], parts[at + 1] = parts[at + 1], parts[at]
        return "".join(parts)

    return _everywhere(replace(problem, text=clauses(problem.text)), words)


def options_shuffled(problem: Problem, level: float, chance: random.Random) -> Problem:
    """A share ``level`` of the options in each other's places."""
    places = [place for place in range(len(problem.choices)) if chance.random() < level]
    options = list(problem.choices)
    for place, other in zip(places, chance.sample(places, len(places)), strict=True):
        options[place] = problem.choices[other]
    return replace(problem, choices=tuple(options))


def options_translated(problem: Problem, level: float, chance: random.Random) -> Problem:
    """A share ``level`` of the options in another language; numbers and Latin terms stay, the question does."""

    def other(option: str) -> str:
        words = _WORDS.findall(option)
        return " ".join(
            word if re.match(r"[A-Za-z0-9０-９]", word) else _word(_LATIN, chance, 7) for word in words if word.strip()
        )

    return replace(problem, choices=tuple(other(one) if chance.random() < level else one for one in problem.choices))


def options_dropped(problem: Problem, level: float, chance: random.Random) -> Problem:
    """A share ``level`` of the options left out."""
    return replace(problem, choices=tuple(one for one in problem.choices if chance.random() >= level))


def all_at_once(problem: Problem, level: float, chance: random.Random) -> Problem:
    """Typeset anew, options shuffled and some dropped, a third of ``level`` of words changed and of characters misread."""
    problem = reworded(options_dropped(options_shuffled(problem, 1.0, chance), level / 2, chance), level / 3, chance)
    return retypeset(scanned(problem, level / 3, chance), level, chance)


CHANGES: Mapping[str, Change] = {
    "typeset anew": retypeset,
    "misread characters": scanned,
    "other words": reworded,
    "options shuffled": options_shuffled,
    "options translated": options_translated,
    "options dropped": options_dropped,
    "all at once": all_at_once,
}


def as_text(problem: Problem, chance: random.Random) -> str:
    """Question and options as a text has them, numbered in one of the usual ways."""
    signs, behind = chance.choice(_NUMBERING), chance.choice([" ", ". ", "：", ") ", "　"])
    between = chance.choice(["\n", "\n", "　", " / "])
    options = (f"{signs[number % len(signs)]}{behind}{option}" for number, option in enumerate(problem.choices))
    return problem.text + "\n" + between.join(options)


def _everywhere(problem: Problem, change: Callable[[str], str]) -> Problem:
    return replace(problem, text=change(problem.text), choices=tuple(map(change, problem.choices)))


def _each(text: str, level: float, chance: random.Random, change: Callable[[str, random.Random], str]) -> str:
    return "".join(change(letter, chance) if chance.random() < level else letter for letter in text)


def _typeset(letter: str, chance: random.Random) -> str:
    narrow = unicodedata.normalize("NFKC", letter)
    wide = chr(ord(narrow) + 0xFEE0) if len(narrow) == 1 and "!" <= narrow <= "~" else narrow
    reading = f"({_word('あいうえおかきくけこ', chance, 3)})" if "\u4e00" <= letter <= "\u9fff" else ""
    return chance.choice([narrow, wide, letter + " ", letter + "\n", letter + "\u3000", letter + reading])


def _misread(letter: str, chance: random.Random) -> str:
    alike = [pair.replace(letter, "", 1) for pair in _LOOK_ALIKES if letter in pair]
    if alike:
        return chance.choice(alike)
    script = next((one for one in (_KANJI, _KANA, _LATIN) if _script(letter) == _script(one[0])), _LATIN)
    return chance.choice([chance.choice(script), chance.choice(script), letter + letter, ""])


def _script(letter: str) -> str:
    return "kanji" if "\u4e00" <= letter <= "\u9fff" else "kana" if "\u3041" <= letter <= "\u30ff" else "other"


def _other_word(word: str, chance: random.Random) -> str:
    if word in _SYNONYMS:
        return _SYNONYMS[word]
    if not word.strip() or not word[0].isalpha():
        return word
    alphabet = {"kanji": _KANJI, "kana": _KANA}.get(_script(word[0]), _LATIN)
    return _word(alphabet, chance, len(word))


def _word(alphabet: str, chance: random.Random, length: int) -> str:
    return "".join(chance.choices(alphabet, k=max(1, length)))
