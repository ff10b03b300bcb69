"""Generated text → the answer it gives.

Texts are compared after NFKC (full-width → half-width) and lower-casing, as the benchmark's scripts do to model outputs, and
only up to where another question or turn begins (:mod:`medllm.exam.endings`).
What counts as the answer, in this order: what follows the last answer label at the start of a line (``Answer:``, ``答え:``),
what follows the last one inside a sentence (``正解は``; after an explanation, in its last line only), and, where no
explanation was asked for, the first line.
There an answer is letters (``a,b``, ``(a)と(b)``, ``c: text``), or the options' own texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

from medllm.exam.endings import ANSWER_WORD, folded, own_part
from medllm.exam.problem import LETTERS, Problem

_LABEL = re.compile(rf"^[ \t#>*「【(]*{ANSWER_WORD}[】」)*]*[ \t]*:[*]*", re.MULTILINE)
_SENTENCE = re.compile(rf"{ANSWER_WORD}(?:は|[ \t]+is\b)[ \t、:]*|{ANSWER_WORD}[ \t]*:")
_SEPARATOR = r"(?:[\s,、，・/&+と]|および|及び|and\b)+"
_ENDING = r"(?:$|[.。,、:)」』】\]]|です|である|だ|が|を)"
_NOISE = re.compile(r"[\s,、。.・:;()「」『』【】\[\]\"'と]|および|及び|です|である|だ|が正解")
_PREFIX = re.compile(r"^(?:選択肢|option|choice)[ \t]*")
_NUMBER = re.compile(r"(?<![\d.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d])")


def extract_answer(text: str, problem: Problem, *, explanation: bool) -> tuple[str, ...]:
    """The answer a response gives.

    Args:
        text: The response, without the prompt.
        problem: Whose options may be meant; how many options are wanted decides between readings of the same words.
        explanation: The response explains before it answers: without an answer label it was cut off, and gives no answer.

    Returns:
        Letters in order, or the number of a numeric problem as text; ``()`` where no answer, or no single one, is given.
        Letters win where an option's text is itself a letter.
    """
    plain = own_part(folded(text))
    line = _first_line(_answering_part(plain, explanation))
    if not line:
        return ()
    return _number(line, problem) if problem.is_numeric else _letters(line, problem)


def _answering_part(plain: str, explanation: bool) -> str:
    labels = list(_LABEL.finditer(plain))
    if not labels:
        # An explanation may say which option is right and go on; what it concludes stands in its last line.
        plain = plain.rstrip().rpartition("\n")[2] if explanation else plain
        labels = list(_SENTENCE.finditer(plain))
    if not labels:
        return "" if explanation else plain
    return plain[labels[-1].end() :]


def _first_line(part: str) -> str:
    return next((clean for clean in map(_clean, part.split("\n")) if clean), "")


def _clean(line: str) -> str:
    """Without emphasis marks, with single spaces, without a full stop at the end: how lines and options are compared."""
    return " ".join(re.sub(r"[*`]", "", line).split()).rstrip("。. ")


def _number(line: str, problem: Problem) -> tuple[str, ...]:
    """The one number in the line, or in what follows its last equals sign. Written as the gold answer where they are equal."""
    found = {number.group().replace(",", "").removeprefix("+") for number in _NUMBER.finditer(line.rsplit("=", 1)[-1])}
    if len(found) != 1:
        return ()
    number = found.pop()
    gold = _NUMBER.fullmatch(_clean(folded(problem.answer[0])))
    if gold and Decimal(gold.group().replace(",", "")) == Decimal(number):
        return problem.answer
    return (number,)


def _letters(line: str, problem: Problem) -> tuple[str, ...]:
    letters = LETTERS[: len(problem.choices)]
    options = {letter: _clean(folded(choice)) for letter, choice in zip(letters, problem.choices, strict=True)}
    for reading in (_listed, _written_out, _run_together, _labelled, _mentioned):
        found = reading(line, options, problem.answer_count)
        if found:
            return found
    return ()


def _letter_list(options: dict[str, str]) -> str:
    one = rf"[(\[「『【\"']?[{''.join(options)}][)\]」』】\"']?"
    return rf"{one}(?:{_SEPARATOR}{one})*"


def _sorted_letters(matched: str, options: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(rf"(?<![a-z])[{''.join(options)}](?![a-z])", matched))))


def _listed(line: str, options: dict[str, str], count: int) -> tuple[str, ...]:
    """Nothing but letters: ``a,b``, ``(a)と(b)``."""
    return _sorted_letters(line, options) if re.fullmatch(rf"{_letter_list(options)}[)\s.:,、]*", line) else ()


def _written_out(line: str, options: dict[str, str], count: int) -> tuple[str, ...]:
    """Nothing but the texts of as many options as are wanted, where they can be read in one way only."""
    readings = {frozenset(letters) for letters in _spelt(line, options, count)}
    return tuple(sorted(readings.pop())) if len(readings) == 1 else ()


def _spelt(line: str, options: dict[str, str], count: int) -> Iterator[tuple[str, ...]]:
    """Every way to read ``line`` as ``count`` different options joined by ``、``."""
    for letter, text in options.items():
        if count == 1:
            if text == line:
                yield (letter,)
        elif line.startswith(f"{text}、"):
            others = {other: options[other] for other in options if other != letter}
            yield from ((letter, *rest) for rest in _spelt(line[len(text) + 1 :], others, count - 1))


def _run_together(line: str, options: dict[str, str], count: int) -> tuple[str, ...]:
    """As many letters as are wanted, without anything between them: ``ab``."""
    plausible = len(line) == count == len(set(line)) and set(line) <= set(options)
    return tuple(sorted(line)) if plausible else ()


def _labelled(line: str, options: dict[str, str], count: int) -> tuple[str, ...]:
    """Letters with the options' texts behind them (``c: text``), or with the end of a sentence (``cです``)."""
    for letter in sorted(options, key=lambda one: -len(options[one])):
        if options[letter]:
            line = re.sub(rf"(?<![a-z])([(\[]?{letter}[)\]]?)\s*[:.]?\s*{re.escape(options[letter])}", r"\1", line)
    line = _PREFIX.sub("", line)
    head = re.match(rf"({_letter_list(options)})(?={_ENDING})", line)
    return _sorted_letters(head.group(1), options) if head else ()


def _mentioned(line: str, options: dict[str, str], count: int) -> tuple[str, ...]:
    """Texts of options, longest first, with little but separators between them; none that two options share."""
    found: set[str] = set()
    for text in sorted(set(options.values()), key=len, reverse=True):
        if text and text in line:
            owners = [letter for letter, option in options.items() if option == text]
            if len(owners) > 1:
                return ()
            found.update(owners)
            line = line.replace(text, " ")
    return () if _NOISE.sub("", line) else tuple(sorted(found))
