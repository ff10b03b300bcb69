"""Problems → prompts, and the responses a model is shown or trained on.

Two templates. ``igakuqa`` is the benchmark's own prompt: the wording and the chat layout of the scripts published with
IgakuQA (Kasai et al., arXiv 2303.18027), the examples given as earlier turns. ``curation`` is the template the paper prints
for its preference data, spaces included::

    Question: {question}
    {options}
     Explanation:{explanation}
     Answer:{answer}

As a completion, examples come before the question, separated by a blank line, and the prompt ends where the model goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from medllm.errors import PromptError, UserError
from medllm.exam.problem import LETTERS, Problem
from medllm.model.tokenizer import Message, Prompt

AnswerAs = Literal["letters", "text"]
Template = Literal["igakuqa", "curation"]
Format = Literal["completion", "chat"]

SYSTEM_MESSAGE = "医師国家試験を解きます。"

# The paper asks for an explanation before the answer but publishes no Japanese wording. This one is ours, and stands only here.
_EXPLAIN_FIRST = "まず解説を書き、最後の行の「答え:」に続けて答えを書いてください。"
_EXPLANATION_LABEL = "解説:"

# The benchmark's script asks nothing at all of a numeric problem, and has no wording for answers written out.
_NUMBER_WANTED = "数値で答えてください。"
_TEXT_WANTED = "必ず選択肢の中からちょうど{count}個選び、選択肢の文をそのまま書いてください。"

_ANSWER_LABEL = "答え:"
_SHOT_SEPARATOR = "\n\n"
_NEXT_QUESTION = {"igakuqa": "\n問題:", "curation": "\nQuestion:"}


def curation_prompt(problem: Problem, shots: Sequence[Problem], *, answer_as: AnswerAs = "letters") -> str:
    """The paper's template, ending in ``\\n Explanation:``, after the shots with their explanations and answers.

    Raises:
        UserError: a shot has no explanation.
    """
    turns = [_explained_question(shot) + curation_response(shot, answer_as=answer_as) for shot in shots]
    return _SHOT_SEPARATOR.join([*turns, _explained_question(problem)])


def curation_response(problem: Problem, *, answer_as: AnswerAs) -> str:
    """The right response to :func:`curation_prompt`: ``{explanation}\\n Answer:{answer}``.

    Raises:
        UserError: the problem has no explanation.
    """
    return f"{_explanation(problem)}\n Answer:{render_answer(problem, problem.accepted[0], answer_as)}"


def render_answer(problem: Problem, letters: Sequence[str], answer_as: AnswerAs) -> str:
    """An answer as IgakuQA writes it (``a,b``), or as the options' own texts joined by ``、``.

    A number is written as it is. Line breaks inside an option become spaces: an answer is one line.

    Raises:
        UserError: a letter the problem has no option for.
    """
    if problem.is_numeric or answer_as == "letters":
        return ",".join(letters)
    return "、".join(" ".join(_choice(problem, letter).split()) for letter in letters)


def evaluation_prompt(
    problem: Problem,
    shots: Sequence[Problem],
    *,
    template: Template,
    explanation: bool,
    format: Format,
    answer_as: AnswerAs,
) -> Prompt:
    """The prompt of one exam problem; no shots means zero-shot.

    Returns:
        Text to continue (``completion``), or turns that end in the user's question (``chat``).

    Raises:
        UserError: an explanation is asked for and a shot has none.
    """
    ask, respond = _TEMPLATES[template, explanation]
    if format == "completion":
        turns = [ask(shot, answer_as) + respond(shot, answer_as) for shot in shots]
        return _SHOT_SEPARATOR.join([*turns, ask(problem, answer_as)])
    messages = [Message("system", SYSTEM_MESSAGE)]
    for shot in shots:
        messages += [Message("user", ask(shot, answer_as)), Message("assistant", respond(shot, answer_as))]
    return (*messages, Message("user", ask(problem, answer_as)))


def stop_strings(template: Template, explanation: bool) -> tuple[str, ...]:
    """Where a base model has begun the next question.

    A blank line ends a bare answer; an explanation may hold blank lines of its own, so only the next question ends it.
    """
    following = _NEXT_QUESTION[template]
    return (following,) if explanation else (_SHOT_SEPARATOR, following)


def _explained_question(problem: Problem) -> str:
    return f"{_question(problem)}\n Explanation:"


def _question(problem: Problem) -> str:
    return "\n".join([f"Question: {problem.question}", *_options(problem)])


def _options(problem: Problem) -> list[str]:
    return [f"{letter}: {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False)]


def _ask_igakuqa(problem: Problem, answer_as: AnswerAs) -> str:
    return "\n".join([f"問題: {problem.question}", *_options(problem), _request(problem, answer_as), _ANSWER_LABEL])


def _ask_igakuqa_explained(problem: Problem, answer_as: AnswerAs) -> str:
    request = _request(problem, answer_as) + _EXPLAIN_FIRST
    return "\n".join([f"問題: {problem.question}", *_options(problem), request, _EXPLANATION_LABEL])


def _request(problem: Problem, answer_as: AnswerAs) -> str:
    if problem.is_numeric:
        return _NUMBER_WANTED
    if answer_as == "text":
        return _TEXT_WANTED.format(count=problem.answer_count)
    # The benchmark names a to e even where there are six to eight options; only shorter lists, which it does not have, differ.
    letters = ",".join(LETTERS[: min(len(problem.choices), 5)])
    return f"必ず{letters}の中からちょうど{problem.answer_count}個選んでください。"


def _answer(problem: Problem, answer_as: AnswerAs) -> str:
    return render_answer(problem, problem.accepted[0], answer_as)


def _explanation(problem: Problem) -> str:
    if not problem.explanation:
        where = f"{problem.source}: " if problem.source else ""
        raise UserError(
            f"{where}problem {problem.problem_id} has no explanation, but one is to be shown or trained on; "
            "add the field 'explanation', or leave the problem out"
        )
    return problem.explanation


def _choice(problem: Problem, letter: str) -> str:
    position = LETTERS.find(letter)
    if len(letter) != 1 or not 0 <= position < len(problem.choices):
        raise UserError(
            f"problem {problem.problem_id} has no option '{letter}': its options are {LETTERS[: len(problem.choices)]}"
        )
    return problem.choices[position]


_Part = Callable[[Problem, AnswerAs], str]

_TEMPLATES: dict[tuple[str, bool], tuple[_Part, _Part]] = {
    ("igakuqa", False): (_ask_igakuqa, _answer),
    ("igakuqa", True): (
        _ask_igakuqa_explained,
        lambda problem, answer_as: f"{_explanation(problem)}\n{_ANSWER_LABEL}{_answer(problem, answer_as)}",
    ),
    ("curation", False): (lambda problem, answer_as: f"{_question(problem)}\n Answer:", _answer),
    ("curation", True): (
        lambda problem, answer_as: _explained_question(problem),
        lambda problem, answer_as: curation_response(problem, answer_as=answer_as),
    ),
}
"""(template, explanation) → the question as asked, and the response to it."""


@contextmanager
def naming_problems(problems: Sequence[Problem]) -> Iterator[None]:
    """Inside, an engine's :class:`PromptError` becomes an error that names the problem the prompt was made for."""
    try:
        yield
    except PromptError as error:
        problem = problems[error.index]
        raise UserError(f"{problem.source}: problem {problem.problem_id}: {error.reason}") from error
