"""What stands in a generated text and is no part of its words: thoughts, chat markup, emphasis, LaTeX.

A model's thoughts are not its answer, whatever they say. They stand between tags (``<think>``, ``[THINK]``, Cohere's and
MedGemma's tokens, gpt-oss' channels); where only the closing tag is there, the prompt had opened it; where only the opening one
is, the model never came to its answer.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import islice

BOX = r"\boxed{"
"""What every way to frame an answer becomes: LaTeX's own, ``<answer>``, GLM's box tokens."""

_NAMES = "(?:(?:seed:)?think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)"
_TAGS = re.compile(
    rf"(?=<\||[<\[◁][/a-zA-Z]|a(?:nalysis|ssistantfinal))(?:(?P<opens>[<\[◁](?i:{_NAMES})[>\]▷]|<\|(?i:start|begin_of)_(?i:{_NAMES})\|>|<unused94>"
    r"|<\|channel\|>(?:analysis|commentary)[^<\n]*<\|message\|>|\Aanalysis(?=[A-Z]))"
    rf"|[<\[◁]/(?i:{_NAMES})[>\]▷]|<\|(?i:end|end_of)_(?i:{_NAMES})\|>|<unused95>"
    r"|<\|channel\|>final[^<\n]*<\|message\|>|assistantfinal(?=\W|[A-Z]|\b))"
)
# No text has as many that a model wrote to be read; those behind them stay where they are.
_MOST_TAGS = 10_000

TOKEN = (
    r"(?:<\|[^|<>\n]{1,40}\|>|\[\|[^|\[\]\n]{1,40}\|\]|</?s>"
    r"|\[/?inst\]|\[(?:eos|end|eot)\]|<(?:eos|bos|pad|start_of_turn|end_of_turn)>)"
)
"""A special token in a folded text."""

_LEADING = re.compile(rf"\s*(?:{TOKEN}\s*(?:(?:assistant|model|chatbot|final)\b(?=\s*(?:\n|{TOKEN}))\s*)?)+")
_FRAMES = re.compile(r"<\|begin_of_box\|>|<(?:final[_ ])?ans(?:wer)?>|<\|end_of_box\|>|</(?:final[_ ])?ans(?:wer)?>")
_BOX_BESIDE_BOX = re.compile(r"(\\boxed\{[^{}\n]{0,200})\}[ \t,、と・&$]*(?:and|および)?[ \t$]*\\boxed\{")
_MOST_BOXES = 10
_BREAK = re.compile(r"<br[ ]*/?>")
_SOFT = re.compile(r"<\|(?:begin|end)_of_solution\|>|<\|(?:start|end)_(?:response|text|action)\|>")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|bf|rm)[ \t]*\{([^{}\n]{0,200})\}")
_LATEX_SIGN = re.compile(
    r"\\(?P<operator>times|cdot|div|approx|fallingdotseq|simeq|rightarrow|to|therefore)\b|\\[,;:!()\[\] ]|\$"
)
_LATEX_AS = {"times": "×", "cdot": "×", "div": "÷", "rightarrow": "→", "to": "→", "therefore": "∴"}
_EMPHASIS = re.compile(r"\*+|`+|__+|</?(?:b|strong|em|i|u|p|br|mark|span)[ ]*/?>")


def folded(text: str) -> str:
    """The text as it is compared: NFKC (full-width → half-width), lower case, a minus sign as a hyphen."""
    return unicodedata.normalize("NFKC", text).lower().replace("\N{MINUS SIGN}", "-")


def without_thoughts(text: str) -> tuple[str, bool]:
    """A raw text without what its model thought, and whether it ends inside a thought."""
    kept: list[str] = []
    start, thinking = 0, False
    for tag in islice(_TAGS.finditer(text), _MOST_TAGS):
        if tag["opens"] and not thinking:
            kept.append(text[start : tag.start()])
        elif not tag["opens"] and not thinking:
            kept.clear()  # the prompt had opened it
        start, thinking = tag.end(), bool(tag["opens"])
    if not thinking:
        kept.append(text[start:])
    return "\n".join(part for part in kept if part.strip()), thinking


def framed(plain: str) -> str:
    """A :func:`folded` text with every frame around an answer as :data:`BOX`, without the tokens in front of it."""
    plain = _FRAMES.sub(lambda frame: "}" if frame.group()[1:2] == "/" or "end_of" in frame.group() else BOX, plain)
    plain = _SOFT.sub("", _BREAK.sub("\n", plain))
    for _ in range(_MOST_BOXES):  # several on one line are one answer
        plain, joined = _BOX_BESIDE_BOX.subn(r"\1, ", plain)
        if not joined:
            break
    leading = _LEADING.match(plain)
    return plain[leading.end() :] if leading else plain


def unmarked(plain: str) -> str:
    """A :func:`folded` text without emphasis, tokens and LaTeX's ways to write words and signs; line by line as it was."""
    plain = re.sub(TOKEN, "", plain)
    for _ in range(3):  # \boxed{\text{\textbf{d}}}
        plain = _LATEX_TEXT.sub(r"\1", plain)
    plain = _LATEX_SIGN.sub(lambda sign: _LATEX_AS.get(sign["operator"] or "", "≒" if sign["operator"] else ""), plain)
    return _EMPHASIS.sub("", plain)
