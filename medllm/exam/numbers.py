"""The part of a text that answers a numeric problem → its number.

Circled digits are the boxes of the answer sheet, not digits: ``①26Torr`` is 26, ``①2②6`` too, ``①②`` alone nothing. A gold
answer may be what is marked in the boxes, without the point that is printed between them.
"""

from __future__ import annotations

import re
from decimal import Decimal

from medllm.exam.letters import Doubt, clean
from medllm.exam.markup import folded
from medllm.exam.problem import Problem

_NUMBER = re.compile(r"(?<![\d.^_a-z])(?<![a-zμ%]/)[+-]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?![\d]|\.\d)")
_BOX = "[\N{CIRCLED DIGIT ONE}-\N{CIRCLED NUMBER TWENTY}]"
_FILLED_BOXES = re.compile(
    rf"(?:{_BOX}\s*[:：=＝にはが]?\s*[0-9０-９](?![0-9０-９])[ 　\s,、。]*(?P<point>[.．]?)[ 　\t]*){{2,}}"
)
_POINT_BETWEEN = re.compile(rf"{_BOX}\s*[.．・]\s*{_BOX}")
_RESULT = re.compile(r"[=≒≈→⇒]|四捨五入(?:して|すると|し、|した結果)")
_RATE = re.compile(r"(?:1|毎)(?:日|回|時間|分|kg)(?:あたり|当たり|につき|量)")
_POWER = re.compile(r"\d\s*\^")
_REMARK = re.compile(r"[(\[「『][^()\[\]「」『』]*[)\]」』]?")
_BEFORE = r"(?:約|およそ|おおよそ|ほぼ|概ね|about|approximately|around|roughly|ca\.|~|>|≧|is|は|:|\s|[a-zμ]+\s*=)*"
_HEAD = re.compile(rf"{_BEFORE}(?P<number>{_NUMBER.pattern})\s*(?P<rest>.*)", re.DOTALL)
_UNIT = re.compile(
    r"\s*(?!か|から|または|もしくは|あるいは|or\b)[^\s\d、。,;:×*÷+=/~〜-]{0,12}(?:/[^\s\d、。,;]{1,12})?(?=$|[、。;:](?!\s*[\d.]+\D{0,6}$)|,(?!\d)|\s+[^\d\s×*÷+=/~x-])"
)


def without_boxes(text: str) -> str:
    """A raw text with the digits in the boxes of an answer sheet joined, and without the boxes."""

    def joined(boxes: re.Match[str]) -> str:
        plain = re.sub(rf"{_BOX}|[\s:：=＝にはが,、。]", "", boxes.group())
        return f"{plain} " if not plain.endswith((".", "．")) else plain

    return re.sub(_BOX, "", _FILLED_BOXES.sub(joined, text))


def read_number(line: str, problem: Problem) -> tuple[str, ...] | Doubt:
    """The number that a cleaned line gives, written as the gold answer where they are equal; ``()`` where it gives none.

    The one number behind the last sign of a result; else the one number there is outside remarks in brackets; else the one that
    the line begins with, where nothing but its unit stands behind it. Else several numbers are ambiguous.
    """
    said = next((sentence for sentence in line.split("。") if _NUMBER.search(sentence)), "")
    part = _RESULT.split(said)[-1]
    if not _NUMBER.search(part):
        part = said
    for aside in (_REMARK, _RATE):
        part = aside.sub(" ", part) if _NUMBER.search(aside.sub(" ", part)) else part
    found = {_plain(number.group()) for number in _NUMBER.finditer(part)}
    if _POWER.search(part):
        return "ambiguous"
    if len(found) > 1:
        head = _HEAD.fullmatch(part.strip())
        if head is None or not _UNIT.match(head["rest"]):
            return "ambiguous"
        found = {_plain(head["number"])}
    return (_as_gold(found.pop(), problem),) if found else ()


def _plain(number: str) -> str:
    return number.replace(",", "").removeprefix("+")


def _as_gold(number: str, problem: Problem) -> str:
    gold = problem.answer[0]
    wanted = _NUMBER.fullmatch(clean(folded(gold)))
    if wanted is None:
        return number
    plain = _plain(wanted.group())
    unpointed = "." not in plain and _hides_a_point(plain, problem.text)
    if "." in number and unpointed and number.replace(".", "") == plain:
        return gold
    same = Decimal(plain) == Decimal(number) and not (unpointed and plain.startswith("0") and len(plain) > 1)
    return gold if same else number


def _hides_a_point(plain: str, question: str) -> bool:
    """Whether a gold answer of digits alone may be what is marked in boxes with a point between them.

    It is where the question prints such boxes; and it may be where the question is not known, or has no boxes but a gold answer
    that begins with a zero.
    """
    boxed = bool(re.search(_BOX, question))
    return (
        bool(_POINT_BETWEEN.search(question))
        or not question.strip()
        or (not boxed and plain.startswith("0") and len(plain) > 1)
    )
