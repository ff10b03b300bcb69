"""The part of a text that answers → the options it names.

A reader takes all of what it is given or nothing: a list is never cut short where it stops being understood. The forms, in this
order: letters alone (``a,b``, ``(a)と(b)``, ``ab``); the options' own texts; items, each a letter with or without a text
behind it (``c: text``, ``c (text)``, ``c text``, ``option c``), joined by separators and followed by the end of a sentence; the
options' own texts with other words around them. Numbers stand for letters where no option begins with a digit (``2,4`` → b, d).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medllm.exam.markup import folded, unmarked
from medllm.exam.problem import LETTERS, Problem

Doubt = Literal["ambiguous", "too_many"]

_SEPARATORS = re.compile(r"(?:[\s,、，・/&+;と]|および|及び|ならびに|並びに|かつ|そして|それに|それと|さらに|and\b|plus\b)+")
_OR = re.compile(r"\s*[,、]?\s*(?:または|又は|もしくは|若しくは|あるいは|或いは|or\b|か、?(?=[\s(「]*[a-z]\b))")
_ORS = re.compile(r"または|又は|もしくは|若しくは|あるいは|\bor\b")
_PREFIX = re.compile(r"(?:選択肢|肢|options?\b|choices?\b|(?:the )?letters?\b|answers?\b|番号)[ \t]*(?:は|:)?[ \t]*")
_OPENING = re.compile(r"[(\[「『【〈<{\"'“‘]")
_CLOSING = re.compile(r"[)\]」』】〉>}\"'”’]")
_BRACKETED = re.compile(r"\s*[(\[「『〈]([^()\[\]「」『』〈〉\n]*)[)\]」』〉]")
_NEXT_ITEM = re.compile(r"[\s,、;と・]\s*(?:および|and )?[(\[「]?(?P<letter>[a-z1-9])[)\]」]?\s*[:.)]")
_SENTENCE_END = re.compile(r"[。\n]|\.\s")
_ENDING = re.compile(
    r"\s*(?:$|[。.!?※)」』】\]}]|[,、:;]"
    # No letter of a list goes lost.
    r"(?!\s*(?!not|because|since|as\b|unlike|except)\w{1,8}?\s*[(「]?[a-z][)」]?\s*(?:$|[。.,、]))"
    r"|[(\[「『](?=[^\n]*$)"  # a remark
    r"|[-–—]+\s|\s[-–—]"
    r"|\s*の?\s*[1-9二三四五](?:つ|個)(?!目)"
    r"|です|でしょう|である|であり|であった|だ(?!が|けど|と)|だと(?:思|考)|で[、,]|となる|となります|となった|と(?:考え|思|判断|言|いえ|推|答|な|す)|に(?:なる|なり|該当|当て|相当)"
    r"|が(?:正|適|最|該|答|当|選|妥|考|誤|あ)|を(?:選|答|回)|こそ|のみ"
    r"|の(?:選択|みで|もの)|\s*(?:is|are|would be|seems)\s+(?:the\s+)?(?:\w+\s+){0,2}?(?:correct"
    r"|right|best|answer|choice|option|true|likely|appropriate)"
    r"|\s(?:because|since|due to|based on|as (?:it|the)|which))"
)
_NOISE = re.compile(
    r"[\s,、。.・:;()「」『』【】〈〉\[\]\"'と]|および|及び|ならびに|です|である|でしょう|だ$|が正解|が正しい|が最も|適切|(?:選択肢|答え?)は?"
    r"|(?:と|が)?(?:考えられ|疑われ|思われ|診断され)(?:る|ます)|と?なる$|となります|と(?:いえる|言える|考える)$"
)
_RATHER = re.compile(r"^.{1,80}?(?:では?なく(?:て)?|じゃなく(?:て)?)[、,]?\s*|^(?:not|rather than) .{1,80}?[ ,]+but\s+")
_DIFFERENT = re.compile(
    r"(?:だ)?と?思(?:われがち|いがち|われ(?:る|ます)が)|に見え(?:る|ます)が|では?(?:な|あり)|じゃな|以外|でもな|\bnot\b|\bexcept\b"
)


@dataclass(frozen=True)
class Options:
    """What a problem's answer may be, as texts are compared.

    Attributes:
        texts: The options' folded texts by letter.
        count: How many are to be chosen.
        numbered: Numbers may stand for letters.
    """

    texts: Mapping[str, str]
    count: int
    numbered: bool

    @classmethod
    def of(cls, problem: Problem) -> Options:
        """A problem's."""
        texts = {letter: clean(folded(choice)) for letter, choice in zip(LETTERS, problem.choices, strict=False)}
        return cls(
            texts, problem.answer_count, len(texts) < 10 and not any(re.match(r"\W*\d", text) for text in texts.values())
        )

    def letter(self, sign: str) -> str:
        """The letter that a sign stands for; empty where it stands for none."""
        if self.numbered and len(sign) == 1 and sign in "123456789" and int(sign) <= len(self.texts):
            return LETTERS[int(sign) - 1]
        return sign if sign in self.texts else ""


def clean(line: str) -> str:
    """Without emphasis, with single spaces, without a full stop at the end: how lines and options are compared."""
    return " ".join(unmarked(line).split()).rstrip("。. ")


def read_letters(line: str, options: Options) -> tuple[str, ...] | Doubt:
    """The options that a cleaned line names; ``()`` where it names none in a form that is known.

    ``ambiguous`` where it leaves the choice open, or names one option and writes another's text; ``too_many`` where it
    names more than are wanted.
    """
    line = _RATHER.sub("", line)
    for reader in (_listed, _written_out, _items, _mentioned):
        found = reader(line, options)
        if found == "ambiguous":
            return "ambiguous"
        if found:
            return tuple(sorted(found)) if len(found) <= options.count else "too_many"
    return ()


def read_lines(lines: list[str], options: Options) -> tuple[str, ...] | Doubt:
    """The options that lines name together: one a line, up to an empty line, or until as many are named as are wanted.

    A list of more lines than are wanted is the question's own list of options, or no choice between them.
    """
    found: set[str] = set()
    gap = False
    for line in _unnumbered(lines):
        if not line:
            gap = True
            continue
        one = _line_item(line, options, alone=not found)
        if isinstance(one, str):
            return one
        if not one or (gap and len(found) >= options.count):
            break
        found.update(one)
        if len(found) > options.count:
            return "too_many"
        gap = False
    return tuple(sorted(found))


def _unnumbered(lines: list[str]) -> list[str]:
    """Without the numbers of a list whose lines are numbered 1, 2, …"""
    numbers = [re.match(r"(\d+)[.)]\s*(?=\S)", line) for line in lines if line]
    counted = [int(number.group(1)) for number in numbers if number]
    if len(counted) < 2 or counted != list(range(1, len(counted) + 1)) or not all(numbers[: len(counted)]):
        return lines
    return [re.sub(r"^\d+[.)]\s*(?=\S)", "", line) for line in lines]


def _line_item(line: str, options: Options, *, alone: bool) -> tuple[str, ...] | Doubt:
    """What one line of several names; behind the first, a letter alone or with its own text."""
    line = re.sub(r"^(?:[-・•>+#]\s*)+", "", line).rstrip(",、;")
    if alone or re.fullmatch(r"[(\[]?[a-z1-9][)\]]?[.:)]?", line):
        return read_letters(line, options)
    for letter, text in options.texts.items():
        head = re.match(rf"[(\[]?{letter}[)\]]?\s*[:.)、]?\s*(?P<rest>.+)", line)
        if line == text or (head and text and (head["rest"].startswith(text) or head["rest"] in text)):
            return (letter,)
    return ()


def _listed(line: str, options: Options) -> tuple[str, ...]:
    """Nothing but letters, with separators or, where they are as many as are wanted, without."""
    bare = re.sub(r"[(\[「『【\"'<{)\]」』】>}.:]|番(?:目)?", " ", line)
    signs = _SEPARATORS.sub(" ", bare).split()
    of_one_kind = len({sign.isdigit() for sign in signs}) == 1  # "1. b" is no list
    if of_one_kind and all(options.letter(sign) for sign in signs) and (len(signs) > 1 or len(bare.split()) == 1):
        return tuple({options.letter(sign) for sign in signs})
    run = "".join(line.split())
    together = len(run) == options.count == len(set(run)) and all(map(options.letter, run))
    return tuple(map(options.letter, run)) if together else ()


def _written_out(line: str, options: Options) -> tuple[str, ...]:
    """Nothing but the texts of as many options as are wanted, where they can be read in one way only."""
    readings = _spelt(line, options.texts, options.count)
    return tuple(readings.pop()) if len(readings) == 1 else ()


def _spelt(line: str, texts: Mapping[str, str], count: int) -> set[frozenset[str]]:
    """Every set of ``count`` options whose texts, joined by ``、`` in some order, are ``line``.

    By sets and not by orders: ten equal options have three million of these.
    """
    read = {frozenset[str](): 0}  # which options were read, and up to where, which follows from them
    for left in reversed(range(count)):
        read = {
            used | {letter}: position + len(text) + 1
            for used, position in read.items()
            for letter, text in texts.items()
            if letter not in used and (line.startswith(f"{text}、", position) if left else line[position:] == text)
        }
    return set(read)


def _items(line: str, options: Options) -> tuple[str, ...] | Doubt:
    """Letters, each with or without a text behind it, up to the end of a sentence."""
    found: list[str] = []
    position = 0
    while item := _item(line, position, options):
        if isinstance(item, str):
            return "ambiguous"
        letter, end = item
        found.append(letter)
        if (other := _OR.match(line, end)) and _names_one(line, other.end(), options):
            return "ambiguous"
        gap = _SEPARATORS.match(line, end)
        position = gap.end() if gap else end
        if not gap or not _item(line, position, options):
            position = end
            break
    if not found or not _ENDING.match(line, position) or _DIFFERENT.match(line[position:].lstrip()):
        return ()
    return tuple(set(found))


def _names_one(line: str, position: int, options: Options) -> bool:
    position += len(line[position:]) - len(line[position:].lstrip())
    return bool(_item(line, position, options)) or any(
        text and line.startswith(text, position) for text in options.texts.values()
    )


def _item(line: str, position: int, options: Options) -> tuple[str, int] | Doubt | None:
    """The letter of the item at a position, and where the item ends."""
    if prefix := _PREFIX.match(line, position):
        position = prefix.end()
    opened = _OPENING.match(line, position)
    position = opened.end() if opened else position
    letter = options.letter(line[position : position + 1])
    if not letter or re.match(r"[a-z0-9]|[.,]\d", line[position + 1 : position + 3]):
        return None
    numbered = line[position].isdigit()
    position += 1
    if numbered and line.startswith("番", position):
        position += 2 if line.startswith("番目", position) else 1
    if opened and (closing := _CLOSING.match(line, position)):
        position = closing.end()
    text = _text_behind(line, position, letter, options)
    listed = clean(re.sub(r"^[\s:.)]+", "", line[position:]))  # "1. text" numbers a list
    if (text == "ambiguous" or listed in options.texts) and numbered and not opened:
        return next(((one, len(line)) for one, other in options.texts.items() if listed in (one, other)), "ambiguous")
    if isinstance(text, str):
        return "ambiguous"
    if text is not None:
        return letter, text
    # A letter without a text: the end of a sentence, a separator or another item follows.
    follows = any(form.match(line, position) for form in (_ENDING, _SEPARATORS, _OR))
    return (letter, position) if follows else None


def _text_behind(line: str, position: int, letter: str, options: Options) -> int | Doubt | None:
    """Where the text behind a letter ends; ``ambiguous`` where it is another option's; None where there is none."""
    lead = re.match(r"\s*(?:[:.)、=/]|[-–—]+|の)?\s*", line[position:])
    begun = position + (lead.end() if lead else 0)
    own = options.texts[letter]
    if own and line.startswith(own, begun):
        end = begun + len(own)
        remark = _BRACKETED.match(line, end)
        if remark or _ENDING.match(line, end) or _SEPARATORS.match(line, end):
            return remark.end() if remark else end
    if remark := _BRACKETED.match(line, position):
        return _checked(remark.group(1), remark.end(), letter, options)
    if re.match(r"\s*(?:[:)]|\.(?=\s|[^\W\d_a-z])|[-–—]+\s)\s*\S", line[position:]) or _says_own(line[begun:], own):
        following = _NEXT_ITEM.search(line, begun)
        while following and not options.letter(following["letter"]):
            following = _NEXT_ITEM.search(line, following.end())
        stop = _SENTENCE_END.search(line, begun)
        end = min([len(line), *(one.start() for one in (following, stop) if one)])
        return _checked(line[begun:end], end, letter, options)
    return None


def _says_own(text: str, own: str) -> bool:
    """``d 気胸`` where d is 自然気胸: a text of two characters or more that is part of the option's."""
    said = re.split(r"[\s,、。]|です|である", text, maxsplit=1)[0]
    return len(said) > 1 and (f" {said} " in f" {own} " if said.isascii() else said in own)


def _checked(text: str, end: int, letter: str, options: Options) -> int | Doubt:
    """``end``, unless the text is another option's, or leaves the choice open between two letters."""
    said = re.sub(r"(?:です|である|が正解)?[。.\s]*$", "", text.strip())
    others = [one for one, other in options.texts.items() if one != letter and other and other == said]
    open_choice = _ORS.search(text) and any(
        re.search(rf"(?:または|又は|もしくは|あるいは|\bor)\s*[(「]?{one}(?![a-z])", text)
        for one in options.texts
        if one != letter
    )
    return "ambiguous" if (others and options.texts[letter] != said) or open_choice else end


def _mentioned(line: str, options: Options) -> tuple[str, ...] | Doubt:
    """Texts of options, longest first, with little but separators between them; none that two options share."""
    found: set[str] = set()
    rest = line
    for text in sorted(set(options.texts.values()), key=lambda text: (-len(text), text)):
        if text and text in rest:
            owners = [letter for letter, option in options.texts.items() if option == text]
            if len(owners) > 1:
                return ()
            found.update(owners)
            lettered = re.search(rf"{re.escape(text)}\s*[(\[「](?:選択肢|option |choice )?\s*([a-z])[)\]」]", rest)
            if lettered and lettered.group(1) not in owners and lettered.group(1) in options.texts:
                return "ambiguous"
            rest = (rest.replace(lettered.group(), " ") if lettered else rest).replace(text, " ")
    if len(found) > 1 and _ORS.search(rest) and not _NOISE.sub("", _ORS.sub("", rest)):
        return "ambiguous"
    if found:  # a remark, but for one that names a letter
        rest = re.sub(r"\s[(\[「](?![a-z][)\]」])[^()\[\]「」]{2,60}[)\]」]", " ", rest)
    return () if _NOISE.sub("", rest) else tuple(found)
