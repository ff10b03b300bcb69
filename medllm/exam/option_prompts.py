"""JMedBench's prompts, after which the likelihood of an option's text or letter is taken.

They are those of ``templates/mcqa.py`` of nii-nlp/med-eval, by the names that they have there without a context. A problem with
a context, an abstract of PubMedQA, is asked by the template that JMedBench pairs with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from medllm.config import OptionPrompt
from medllm.errors import UserError
from medllm.exam.problem import LETTERS, Problem


@dataclass(frozen=True)
class PromptPair:
    """The prompt of a problem that stands alone, and that of one with a ``{context}``."""

    alone: str
    in_context: str


_INSTRUCTED = (
    "あなたは医学博士です。基礎科学、臨床科学、医学知識、健康、病気、患者ケア、治療法の基礎となるメカニズムについて"
    "理解した上で、以下の選択式問題に答えなさい。以下の選択肢から正しいものを1つ選びなさい。"
    "医療ガイドラインに記載されている、現在行われている標準的な治療法に基づいて答えなさい。\n"
    "質問：{question}\n選択肢：\n{options}\n答え："
)
_INSTRUCTED_IN_CONTEXT = (
    "臨床科学と医学知識の専門家である医師として、次の文が正しいかどうか教えてください。"
    "「はい/いいえ/たぶん」のいずれかでお答えください。\n要旨：{context}\n質問：{question}\n答え："
)
_ENGLISH_IN_CONTEXT = "Abstract: {context}\nQuestion: {question}\nAnswer: "
_JAPANESE_IN_CONTEXT = "要旨：{context}\n質問：{question}\n答え："

OPTION_PROMPTS: dict[OptionPrompt, PromptPair] = {
    "mcqa_minimal": PromptPair("{question}\n", "{context}\n{question}\n"),
    "mcqa_with_options_jp": PromptPair("質問：{question}\n{options}\n答え：", _JAPANESE_IN_CONTEXT),
    "mcqa_with_options": PromptPair("Question: {question}\n{options}\nAnswer: ", _ENGLISH_IN_CONTEXT),
    "4o_mcqa_instructed_jp": PromptPair(_INSTRUCTED, _INSTRUCTED_IN_CONTEXT),
    "mcqa": PromptPair("Question: {question}\nAnswer: ", _ENGLISH_IN_CONTEXT),
    "mcqa_jp": PromptPair("質問：{question}\n回答：", _JAPANESE_IN_CONTEXT),
}
"""JMedBench's four (minimal, standard, English-centric, instructed), then two that list no options and are not among them."""


def option_prompt(problem: Problem, name: OptionPrompt, *, lettered: bool = False) -> str:
    """The prompt that a problem's answer is to follow.

    Args:
        problem: The problem.
        name: One of :data:`OPTION_PROMPTS`.
        lettered: The answer is a letter: options are listed behind the question, also by a prompt that lists none.

    Raises:
        UserError: an unknown prompt.
    """
    if name not in OPTION_PROMPTS:
        raise UserError(f"no prompt is called '{name}'; there are {', '.join(OPTION_PROMPTS)}")
    pair = OPTION_PROMPTS[name]
    template = pair.in_context if problem.context else pair.alone
    if lettered and "{options}" not in template:
        template = template.replace("{question}\n", "{question}\n{options}\n")
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS.upper(), problem.choices, strict=False))
    return template.format(context=problem.context, question=problem.text, options=options)
