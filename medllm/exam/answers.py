"""Generated text → the answer it gives, the rule that found it, or why there is none.

The grammar is written down in docs/answers.md. A text is compared after NFKC and lower-casing, as the benchmark's scripts do to
model outputs; without its thoughts and its markup (:mod:`medllm.exam.markup`); and only up to where another question or turn
begins (:mod:`medllm.exam.endings`). Rules look for the part that answers, one after the other; what it names is
read by :mod:`medllm.exam.letters` and :mod:`medllm.exam.numbers`, all of it or nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from medllm.exam.endings import ANSWER_WORD, own_part
from medllm.exam.letters import Doubt, Options, clean, read_letters, read_lines
from medllm.exam.markup import folded, framed, unmarked, without_thoughts
from medllm.exam.numbers import read_number, without_boxes
from medllm.exam.problem import Problem

Rule = Literal["json", "label", "sentence", "only", "first_line", "conclusion"]
Reason = Literal["empty", "filtered", "cut_off", "no_label", "ambiguous", "refused", "too_many"]

# A longer text is read by its beginning and its end: no model writes as much before it answers, and none should be waited for.
_LONGEST = 100_000
# As much of a line as an answer is looked for in: of what announces it, and of lines without.
_LONGEST_LINE = 1_000
_MOST_SENTENCES = 100
_MOST_LINES = 40  # that an answer's own lines may take

# At the beginning of a line, or of a sentence in it.
_LEAD = r"(?:^|(?<=[。.!?]))[ \t#>\-・•■◆●▶★☆✅→⇒]*(?:\d{1,2}[.)][ \t]*)?"
_ANNOUNCED = (
    rf"(?:{ANSWER_WORD}|[解回]答例|解|答|選択"
    r"|(?:the |my )?(?:correct |best |right |final |selected |chosen )+(?:option|choice))"
)
_COLON = (
    rf"{_LEAD}[\"「【(\[<《〔]*{_ANNOUNCED}[ \t]*(?:\([^)\n]{{0,20}}\))?[\"」】)\]>》〕]*"
    r"(?:[ \t]*[:=→⇒]|[ \t]+[-–—]+(?=[ \t])|\.[ \t]+(?=[(\[]?[a-j]\b)|[ \t]+(?=[(\[]?[a-j][)\]]?[。.]?$))[ \t]*"
)
_BRACKETS = rf"[【\[〔《〈「<][ \t]*{ANSWER_WORD}[ \t]*[】\]〕》〉」>][ \t]*:?"
_HEADING = rf"{_LEAD}[\"「【(\[<《〔]*{ANSWER_WORD}[\"」】)\]>》〕]*[ \t]*$"
_ASKED_AND_ANSWERED = r"(?<=\n)a:[ \t]"
LABEL = re.compile(rf"(?P<box>\\boxed\{{)|{_COLON}|{_BRACKETS}|{_HEADING}", re.MULTILINE)
_QUESTION_FIRST = re.compile(rf"\s*q(?:uestion)?\s*:[^\n]*\n(?:.*{_ASKED_AND_ANSWERED})", re.DOTALL)
_BOXED = re.compile(r"([^{}]{0,2000})(?:\}|\Z)")
KEY = re.compile(
    r"[\"'](?:final[_ ]?|correct[_ ]?|selected[_ ]?|model[_ ]?"
    r"|最終)?(?:answers?|prediction|choices?|option|答え|回答|解答|正解|正答)"
    r"(?:[_ ]?(?:choices?|option|letters?|idx|key))?[\"']\s*:\s*"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|\[[^\]]*\]|\{[^{}]*\}|-?\d[\d.,]*|[a-z])"
)

_IS = r"[ \t](?:is|are|was|would be|should be|must be|will be|seems to be|appears to be|remains)\b[ \t:]*"
_ABOUT = r"(?:[ \t](?:to|for|here|in|of|based on)\b[^.\n]{0,60}?)?"
_SAYS = re.compile(
    rf"{ANSWER_WORD}(?:としては|は|が)[ \t、,:]*|{ANSWER_WORD}{_ABOUT}{_IS}|{ANSWER_WORD}[ \t]*[:=→⇒][ \t]*"
    r"|\bi(?:[ \t]would|'d)?[ \t](?:choose|select|pick|go[ \t]with)[ \t:]+"
)
_NAMES = re.compile(
    rf"(?:のは|ものは|選択肢は|診断(?:名)?は|結論は|疾患は|(?:治療|検査|処置|対応|方針|原因|薬剤?)(?:法|薬)?は)[ \t、,:]*"
    rf"|(?:diagnosis|option|choice|one|conclusion|step|treatment|cause|\bit){_ABOUT}{_IS}|\bit's[ \t]+"
)
_BACKWARDS = re.compile(
    r"[ \t]*(?:が|を)[ \t]*(?:最も|唯一|最終的に)?[ \t]*(?:正解|正答|答え|解答|回答|選択|選ぶ|選び|該当|適切|適当|正しい|妥当)"
    r"|[ \t](?:is|are)[ \t](?:the[ \t])?(?:single[ \t]|only[ \t]|most[ \t]"
    r"|best[ \t])*(?:correct|right|best|answer|appropriate|likely)\b"
)
THUS = re.compile(
    r"^(?:(?:[^。\n]{1,80}(?:できません|できない|ありません|不明です|難しいです)が|したがって|従って|よって|ゆえに|故に|以上より|以上から|以上のことから|以上を踏まえ(?:ると|て)?|このことから|これらから|これより|そのため|つまり|"
    r"結論として(?:は)?|結論(?=[、,:\s])|∴|therefore|thus|hence|so|overall|in conclusion"
    r"|in summary|consequently|accordingly|conclusion)[、,:\s]*)+"
)
_NAMED = re.compile(
    r"^[^:\n誤不除]{0,12}?(?:選択肢|治療法?|診断名?|検査|処置|対応|方針|結論|判断"
    r"|option|choice|diagnosis|treatment|conclusion)[ \t]*:[ \t]*"
    r"(?=[(\[]?[a-j][)\]]?(?:[,、・ ]+[a-j])*$)"
)
_REASONS = re.compile(r"[\[(【《<*# ]*(?:理由|解説|根拠|explanation|reason|rationale)")
_JUDGED = re.compile(
    r"(?:[-・•]\s*)?[(\[]?(?P<letter>[a-z1-9])[)\]]?(?:[\s:.)]).{0,80}?[\s:\-–—(は]*"
    r"(?:(?P<holds>○|〇|✓|✔|✅|正しい|適切|(?<!in)correct|right|true)|×|✗|✘|❌|誤り|誤っている|不適切|正しくない|incorrect|wrong|false)"
    r"(?:です|である)?[)。.]?$"
)
_HEDGES = re.compile(
    r"^(?:[\s、,:\"'→⇒\-]|恐らく|おそらく|多分|たぶん|やはり|most\b|very\b"
    r"|likely\b|probably\b|possibly\b|to be\b|therefore\b|thus\b|clearly\b"
    r"|definitely\b|indeed\b|best\b|both\b|the\b|that\b|最も可能性が高いのは|option\b|choice\b)+"
)
_INTRODUCES = re.compile(r"(?:以下|次|下記|following|below)[^。]*[。:]?$|[:→]$|^\S{0,40}(?:つ|個)です[。]?$")
_OPEN_END = re.compile(r"[^\s。.!?！？」』)\]】}\"'…:*]\s*\Z|[、,]\s*\Z")
_REFUSES = re.compile(
    r"(?:判断|回答|解答|特定|選択|お答え|答え|決定|断定|確定|診断|提供)(?:が|は|を|する|に?こと)*(?:でき(?:ません|ない|かね)|られません|しかね|不可能|困難)"
    r"|(?:答え|選べ)(?:られ)?(?:ません|ない)|分かりません|わかりません|(?:画像|写真|図|情報)[^。\n]{0,30}(?:ありません|ない(?:ため|ので)|不足|必要です)|該当(?:するもの)?(?:なし|がない|はない)"
    r"|\b(?:cannot|can't|can not|could not|unable to|not able to)\b|\bi(?: do not|don't) know\b"
    r"|\bnone of the (?:above|options)\b|申し訳|\bi'm sorry\b|not (?:enough|sufficient) information"
)


@dataclass(frozen=True)
class Reading:
    """What was read in a text.

    Attributes:
        answer: Letters in order, or the number of a numeric problem as text; empty where nothing, or nothing single, is said.
        rule: Which rule read it; empty where nothing is read.
        reason: Why nothing is read; empty where something is.
    """

    answer: tuple[str, ...] = ()
    rule: Rule | Literal[""] = ""
    reason: Reason | Literal[""] = ""


@dataclass(frozen=True)
class Readings:
    """How many texts were read by each rule, and how many were not, by reason."""

    rules: dict[str, int]
    reasons: dict[str, int]

    @classmethod
    def count(cls, readings: Iterable[Reading]) -> Readings:
        """Count them."""
        every = list(readings)
        rules, reasons = (Counter(filter(None, (getattr(one, name) for one in every))) for name in ("rule", "reason"))
        return cls(dict(sorted(rules.items())), dict(sorted(reasons.items())))

    @classmethod
    def from_json(cls, value: Any) -> Readings | None:
        """What a ``result.json`` holds; None where it is of before they were counted, or is no such thing."""
        try:
            found = cls(**value)
        except TypeError:
            return None
        return found if isinstance(found.rules, dict) and isinstance(found.reasons, dict) else None

    def words(self) -> str:
        """For a line of text: ``read by label 3, sentence 1; not read: refused 1``."""
        parts = [
            f"{said} {', '.join(f'{name} {count}' for name, count in counts.items())}"
            for said, counts in (("read by", self.rules), ("not read:", self.reasons))
            if counts
        ]
        return "; ".join(parts)


def extract_answer(text: str, problem: Problem, *, explanation: bool, cut_off: bool | None = None) -> Reading:
    """The answer a response gives.

    Args:
        text: The response, without the prompt.
        problem: Whose options may be meant; how many options are wanted decides between readings of the same words.
        explanation: The response was asked to explain before it answers: the middle of an explanation is no answer.
        cut_off: The response is known to have been cut off, or to have ended by itself; where neither is known, its last words
            have to tell.

    Returns:
        Letters win where an option's text is itself a letter.
    """
    spoken, thinking = without_thoughts(text)
    if len(spoken) > _LONGEST:
        spoken = f"{spoken[: _LONGEST // 2]}\n{spoken[-_LONGEST // 2 :]}"
    plain = framed(folded(without_boxes(spoken) if problem.is_numeric else spoken))
    plain = unmarked(own_part(plain)).strip()
    if not clean(plain):
        return Reading(reason="cut_off" if thinking or cut_off else "empty")
    return _Reader(plain, problem, explanation).read(cut_off=True if thinking else cut_off)


_Found = tuple[str, ...] | Doubt


class _Reader:
    """One text, and the rules that look for what in it answers."""

    def __init__(self, plain: str, problem: Problem, explanation: bool) -> None:
        self.plain = plain
        self.problem = problem
        self.explanation = explanation
        self.options = Options.of(problem)
        self.lines = [clean(line) for line in plain.split("\n")]
        self.unfinished = bool(_OPEN_END.search(plain))

    def read(self, *, cut_off: bool | None) -> Reading:
        """By the first rule that finds something."""
        rules: dict[Rule, Callable[[], _Found]] = {
            "json": self._json,
            "label": self._label,
            "only": self._only,
            "sentence": self._sentence,
            "first_line": self._first_line,
            "conclusion": self._conclusion,
        }
        for name, rule in rules.items():
            found = rule()
            if isinstance(found, str):
                return Reading(reason=found)
            if found:
                return Reading(found, name)
        return Reading(reason=self._reason(cut_off))

    def _says_something(self, text: str) -> bool:
        return bool(re.search(r"\w", text)) or clean(text) in self.options.texts.values()

    def _reason(self, cut_off: bool | None) -> Reason:
        if not re.search(r"\w", self.plain):
            return "cut_off" if cut_off else "empty"
        if _REFUSES.search(self.plain):
            return "refused"
        labels = self._labels()
        nothing_behind = bool(labels) and not self._says_something(self.plain[labels[-1].end() :])
        as_if = cut_off is None and (nothing_behind or (self.explanation and self.unfinished))
        return "cut_off" if cut_off or as_if else "no_label"

    # --- what answers ------------------------------------------------------------------------------------------------------

    def _json(self) -> _Found:
        """The value of the first key that announces an answer, in an object whole or torn."""
        for match in KEY.finditer(self.plain):
            written = match["value"]
            try:
                value = json.loads(written)
            except (ValueError, RecursionError):
                value = written.strip("'\"[]")
            several = value.values() if isinstance(value, dict) else [value]
            for one in several:
                said = ", ".join(map(str, one)) if isinstance(one, list) else str(one)
                if found := self._value([clean(folded(said))]):
                    return found
        return ()

    def _labels(self) -> list[re.Match[str]]:
        labels = list(LABEL.finditer(self.plain))
        if _QUESTION_FIRST.match(self.plain):
            labels += re.finditer(_ASKED_AND_ANSWERED, self.plain)
        return sorted(labels, key=lambda label: label.start())

    def _label(self) -> _Found:
        """What the last label announces that announces anything."""
        end = len(self.plain)
        for label in reversed(self._labels()):
            behind = self.plain[label.end() : end]
            if label.groupdict().get("box") and (content := _BOXED.match(behind)):
                behind = content.group(1)
            if self._says_something(behind):
                return self._value([clean(line) for line in behind.split("\n", _MOST_LINES)[:_MOST_LINES]])
            end = label.start()
        return ()

    def _only(self) -> _Found:
        """The text is nothing but an answer."""
        lines = [line for line in self.lines if line]
        if verdicts := self._verdicts(lines):
            return verdicts
        if len(lines) == 1:
            return self._value(lines) if not next(self._says(lines[0]), ()) else ()
        if self.problem.is_numeric or len(lines) > len(self.options.texts):
            return ()
        return read_lines(lines, self.options) if all(map(self._read, lines)) else ()

    def _verdicts(self, lines: list[str]) -> _Found:
        """Lines that say of every option whether it holds: those judged otherwise than the rest, where as many are wanted."""
        judged = [_JUDGED.match(line) for line in lines]
        if len(lines) != len(self.options.texts) or not all(judged) or len(lines) < 3:
            return ()
        sides: dict[bool, list[str]] = {True: [], False: []}
        for verdict in filter(None, judged):
            sides[verdict["holds"] is not None].append(self.options.letter(verdict["letter"]))
        wanted = [side for side in sides.values() if len(side) == self.options.count and all(side)]
        return tuple(sorted(wanted[0])) if len(wanted) == 1 else "ambiguous"

    def _sentence(self) -> _Found:
        """Sentences that say what the answer is, where they agree; else the one in the last line.

        Of an explanation only what it begins or ends with: between, it may say what others would answer.
        """
        lines = [line for line in self.lines if line]
        asked = {0, len(lines) - 1}
        if not self.explanation:
            asked = {index for index in range(len(lines)) if min(index, len(lines) - 1 - index) < _MOST_LINES}
        if self.explanation and self.unfinished:
            asked.discard(0) if len(lines) > 1 else None
        said: dict[int, _Found] = {}
        for index in sorted(asked):
            for found in self._says(lines[index], lines[index + 1 : index + _MOST_LINES]):
                said[index] = found
        if not said:
            return ()
        if len(set(said.values())) == 1 or len(lines) - 1 in said:
            return said[max(said)]
        return "ambiguous"

    def _first_line(self) -> _Found:
        """The first line, where no explanation was asked for; where one was, letters alone in a line of their own."""
        filled = (index for index, line in enumerate(self.lines) if line)
        first, rest = next(filled), next(filled, None)
        if self.explanation:
            reasons = next((index for index, line in enumerate(self.lines) if _REASONS.match(line)), 0)
            if reasons > first and (found := self._value(self.lines[first:reasons], bare=True)):
                return found
            alone = [line for line in self.lines if line and set(line) <= set("abcdefghij,、 ・と()")]
            if self.problem.is_numeric or self.unfinished or len(alone) != 1 or alone[0] != self.lines[first]:
                return ()
            return read_letters(alone[0], self.options)
        if self.problem.is_numeric:
            number = re.fullmatch(r"(?:約|およそ)?[+-]?[\d,.]+[^\d=+*/×÷]{0,12}", self.lines[first])
            return read_number(self.lines[first], self.problem) if number or rest is None else ()
        return self._value(self.lines[first:], bare=True) or next(self._names(self.lines[first]), ())

    def _conclusion(self) -> _Found:
        """What the last line concludes."""
        line = next(line for line in reversed(self.lines) if line)
        line = re.sub(r"^(?:[#>\-・•*→⇒]\s*)+", "", line[-_LONGEST_LINE:])
        last = line.rpartition("。")[2]
        line = last if THUS.match(last) else line
        concluded = THUS.sub("", _NAMED.sub("", line))
        if self.problem.is_numeric:
            says = concluded != line or re.search(r"[=≒≈]|となる|となり|です$|である$|になる", line)
            last = next((part for part in reversed(concluded.split("。")) if re.search(r"\d", part)), "")
            return read_number(last, self.problem) if says or not self.explanation else ()
        every = [one for one in self.lines if one]
        if concluded == line and any(self._begins_with_option(one) for one in every[:-1]):
            return next(self._names(line), ())
        found = read_letters(_HEDGES.sub("", concluded), self.options) if not self._assesses(line) else ()
        return found or next(self._names(concluded, thus=concluded != line), ())

    # --- what it names -----------------------------------------------------------------------------------------------------

    def _value(self, lines: list[str], *, bare: bool = False, within: bool = False) -> _Found:
        """What the first line that is not empty names; the next ones where it only introduces them, or names too few."""
        lines = [line[:_LONGEST_LINE] for line in lines[:_MOST_LINES]]
        for index, line in enumerate(lines):
            if not line:
                continue
            found = self._read(line) if self.problem.is_numeric else self._letters(lines[index:], bare=bare)
            if found:
                return found
            said = () if within else next(self._says(line, lines[index + 1 :]), ())
            if said or not _INTRODUCES.search(line):
                return said
        return ()

    def _letters(self, lines: list[str], *, bare: bool) -> _Found:
        found = self._read(lines[0]) or self._read(_HEDGES.sub("", lines[0]))
        if isinstance(found, str) or not found:
            return found
        if len(found) < self.options.count or (bare and len(lines) > 1 and lines[1]):
            together = read_lines(lines, self.options)
            return together or found
        return found

    def _says(self, line: str, following: list[str] | None = None) -> Iterator[_Found]:
        """What sentences of a line say the answer is."""
        for match in islice(_SAYS.finditer(line), _MOST_SENTENCES):
            behind = _HEDGES.sub("", line[match.end() :][:_LONGEST_LINE])
            found = self._read(behind)
            if not found and following and (_INTRODUCES.search(behind) or not behind):
                found = self._value(following, within=True)
            if found:
                yield found

    def _names(self, line: str, *, thus: bool = False) -> Iterator[_Found]:
        """What sentences of a line name as what was asked for, in other words than an answer's."""
        for match in islice(_NAMES.finditer(line), _MOST_SENTENCES):
            if found := self._read(_HEDGES.sub("", line[match.end() :][:_LONGEST_LINE])):
                yield found
        for match in islice(_BACKWARDS.finditer(line), _MOST_SENTENCES):
            if not thus and not re.search(
                "正解|正答|答え?$|解答|回答|answer|選|該当" if not self.explanation else "正解|正答|答え|answer", match.group()
            ):
                continue  # "b is right" answers no question for what is wrong
            before = THUS.sub("", re.split(r"[。]|\.\s", line[: match.start()][-_LONGEST_LINE:])[-1].strip())
            found = self._read(before)
            if not found:
                head, _, tail = before.replace("、", ",").rpartition(",")
                head, tail = (head, tail) if tail else ("", before)
                tail = tail.rpartition("は")[2]
                mentions = (
                    re.search(rf"(?<![a-z])[{''.join(self.options.texts)}](?![a-z])", head) if self.options.texts else None
                )
                found = () if mentions else self._read(tail.strip())
            if found:
                yield found

    def _read(self, part: str) -> _Found:
        part = part[:_LONGEST_LINE]
        return read_number(part, self.problem) if self.problem.is_numeric else read_letters(part, self.options)

    def _begins_with_option(self, line: str) -> bool:
        head = re.match(r"(?:[-・•]\s*)?[(\[]?([a-z1-9])[)\]]?(?:[\s:.)は]|が)", line)
        return bool(head and self.options.letter(head.group(1)))

    def _assesses(self, line: str) -> bool:
        """Whether a line says of an option whether it is right, as one line of an explanation among others."""
        return self.explanation and bool(re.search(r"誤り|正しい|正しく|適切|wrong|incorrect", line)) and not THUS.match(line)
