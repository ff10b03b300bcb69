"""What an explanation by itself concludes: the options its concluding sentence names as what is asked for.

An answer can contradict the explanation in front of it: ``… よってdが正しい。``, then ``答え:b``. Whether it does is asked
here, by a rule that rather says nothing than something wrong. From the text everything that announces an answer is taken out
first (:mod:`medllm.exam.answers` reads that); then:

1. The concluding sentence is the last one that begins with a word of conclusion (``したがって``, ``therefore``) or says what
   the answer is; where none does, the very last sentence. What comes behind a conclusion and takes it back (``しかし``,
   ``however``) leaves none.
2. It must name as many options as are wanted, by letter or by their texts, in a form in which an answer is given: what the
   answer is said to be, what is said to be right, what stands behind the word of conclusion, or the predicate
   (``治療薬はdである``, ``the cause is d``). A sentence in which an option is only mentioned names none.
3. A sentence that denies or weighs (``誤り``, ``ではない``, ``鑑別``, ``not``, ``or``) names none; and where the question asks
   for what is wrong, only the word answer itself counts: there ``bが正しい`` is no answer.

Numbers are not compared: a last line of arithmetic has several.
"""

from __future__ import annotations

import re

from medllm.exam.answers import KEY, LABEL, THUS, extract_answer
from medllm.exam.endings import own_part
from medllm.exam.letters import Options, clean, read_letters
from medllm.exam.markup import folded, framed, unmarked, without_thoughts
from medllm.exam.problem import Problem

# As answers are looked for: no model writes as much, and none should be waited for.
_LONGEST = 100_000
_LONGEST_SENTENCE = 1_000
_SENTENCE = re.compile(r"[。!?\n]+|\.(?=\s|$)")
_HEADING = re.compile(
    r"[\s\"'#*・:,{}【\[(]*(?:解説|説明|理由|根拠|explanation|reason(?:ing)?|rationale)[\"'】\])]*[ \t]*:[ \t\"]*"
)
_SAYS = re.compile(
    r"(?:正解|正答|答え|解答|回答)(?:は|が|として|である|です|となる)|が(?:正解|正答|答え)|を(?:選択|選ぶ|選び)"
    r"|answer\b|i (?:choose|select)\b"
)
_TAKEN_BACK = re.compile(r"^(?:しかし|だが|ところが|とはいえ|ただし|一方|however\b|but\b|although\b|yet\b)")
_DENIES = re.compile(
    r"誤(?![嚥飲])|不適|不正|ではな|でな[いく]|ではありま|できな|否定|除外|除[くい]|以外|鑑別|合併|にく[いか]|可能性(?:が低|が?あ|は)|かもしれ"
    r"|または|又は|あるいは|もしくは|と異な"
    r"|\bnot\b|n't\b|\bno\b|\bincorrect|\bwrong|\bfalse\b|\bunlikely|\bexcept|\bexclud|\brule[sd]? out|\bor\b|\bmay\b|\bmight\b"
    r"|\bcould\b|\brather than\b|\bdifferential|\bunlike\b"
)
_ASKS_FOR_WRONG = re.compile(
    r"誤(?![嚥飲])|不適|でない|ではない|ないの|ないもの|みられない|除[くい]|にくい|\bnot\b|\bexcept\b|\bincorrect|\bfalse\b|\bleast\b|\bwrong"
)
_RIGHT = re.compile(
    r"(?:が|を)(?:最も)?(?:正し|適切|適当|妥当|該当|選択|選ぶ|当ては)|\bis (?:the )?(?:most )?(?:correct|right|appropriate)"
)
_ITEM = re.compile(r"[-・•]?\s*[(\[]?[a-j1-9][)\]]?\s*[:.)、]")  # a line that weighs one option of a list
_PREDICATE = re.compile(
    r".*(?:は|\b(?:is|are|was)\b)[\s、,:]*(?P<names>.+?)(?:である|です|だ|となる|になる|と(?:考え|診断|判断)[^は]{0,8})?$"
)


def concluded(text: str, problem: Problem) -> tuple[str, ...]:
    """The options that an explanation concludes with; empty where it names none, or not for certain.

    Args:
        text: The whole response, its answer with it.
        problem: Whose options may be meant.

    Returns:
        As many letters as are to be chosen, in order.
    """
    if problem.is_numeric:
        return ()
    options = Options.of(problem)
    sentence = _concluding(_reasoning(text))
    named = _named(sentence, problem, options) if sentence else ()
    return named if len(named) == options.count else ()


def _reasoning(text: str) -> str:
    """A text without what announces its answer: what stands before that, else what stands behind it."""
    plain = unmarked(own_part(framed(folded(without_thoughts(text)[0][-_LONGEST:])))).strip()
    labels = [*LABEL.finditer(plain), *KEY.finditer(plain)]
    if not labels:
        return plain
    last = max(labels, key=lambda label: label.start())
    before = plain[: last.start()]
    if re.search(r"\w", _HEADING.sub("", before)):
        return before
    return plain[last.end() :].partition("\n")[2]


def _concluding(reasoning: str) -> str:
    """The sentence that concludes; empty where there is none, or where one behind it takes it back."""
    sentences = [clean(_HEADING.sub("", part)).strip("\"'{}(),、 ") for part in _SENTENCE.split(reasoning)]
    sentences = [sentence for sentence in sentences if re.search(r"\w", sentence)]
    if not sentences:
        return ""
    thus = {index for index, one in enumerate(sentences) if THUS.match(f"{one} ")}
    # Of a heading (結論:) the sentence behind it.
    thus = {index if re.search(r"\w", THUS.sub("", f"{sentences[index]} ")) else index + 1 for index in thus}
    concluding = [index for index, one in enumerate(sentences) if index in thus or _SAYS.search(one)]
    chosen = concluding[-1] if concluding else len(sentences) - 1
    taken_back = any(_TAKEN_BACK.match(one) for one in sentences[chosen + 1 :])
    return "" if taken_back or len(sentences[chosen]) > _LONGEST_SENTENCE else sentences[chosen]


def _named(sentence: str, problem: Problem, options: Options) -> tuple[str, ...]:
    """What a sentence names as what is asked for."""
    words = sentence
    for option in sorted(options.texts.values(), key=len, reverse=True):  # an option may be a denial itself
        words = words.replace(option, " ") if len(option) > 1 else words
    if _DENIES.search(words) or (_ASKS_FOR_WRONG.search(folded(problem.text)) and not _SAYS.search(words)):
        return ()
    if _SAYS.search(words) or _RIGHT.search(words):
        return extract_answer(sentence, problem, explanation=True).answer or _mentioned(sentence, options)
    if _ITEM.match(sentence):
        return ()
    claim = THUS.sub("", sentence)
    predicate = _PREDICATE.match(claim)
    for part in (claim, predicate["names"] if predicate else ""):
        found = read_letters(part, options)
        if found and not isinstance(found, str):
            return found
    return _mentioned(sentence, options) if THUS.match(sentence) else ()


def _mentioned(sentence: str, options: Options) -> tuple[str, ...]:
    """The options whose texts a sentence has, the longest first; none where anything is in doubt."""
    found: set[str] = set()
    rest = THUS.sub("", sentence)
    for text in sorted(set(options.texts.values()), key=lambda text: (-len(text), text)):
        if len(text) > 1 and text in rest:
            owners = [letter for letter, option in options.texts.items() if option == text]
            if len(owners) > 1:
                return ()
            found.update(owners)
            rest = rest.replace(text, " ")
    letters = {letter for letter in re.findall(r"(?<![a-z0-9])[a-z](?![a-z0-9])", rest) if letter in options.texts}
    return () if letters - found or re.search("な[いく]|ませ", rest) else tuple(sorted(found))
