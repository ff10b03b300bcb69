"""An exam is sat prompt by prompt, and options are compared by their likelihood."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medllm.config import ModelConfig, Sampling
from medllm.engine import Generation
from medllm.errors import UserError
from medllm.exam.evaluation import check_exam, evaluate, write_predictions
from medllm.exam.option_prompts import OPTION_PROMPTS, option_prompt
from medllm.exam.option_scores import score_options
from medllm.exam.predictions import Prediction, read_predictions
from medllm.exam.problem import Problem
from medllm.exam.scoring import score
from medllm.stage_config import EvaluateConfig

CHOICES = ("赤", "青", "緑色", "黒", "白")
PROBLEMS = tuple(
    Problem(f"q{number}", f"第{number}ミロリ星の空は何色か。", CHOICES, ("abcde"[number % 5],)) for number in range(11)
)
SHOT = Problem("shot", "月は何色か。", CHOICES, ("b", "d"), explanation="青と黒である。")


class ScriptedEngine:
    """Says what a script makes of each prompt; remembers how it was called."""

    name = "scripted"

    def __init__(self, script):
        self.script, self.calls = script, []

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        self.calls.append((list(prompts), sampling, batch_size))
        for done in (1, len(prompts)) if progress else ():
            progress(done, len(prompts))
        return [[Generation(self.script(prompt), (), "stop")] for prompt in prompts]


def config(**changes):
    return EvaluateConfig(ModelConfig("model"), "run", ("problems.jsonl",), **changes)


def number_of(prompt):
    return int(prompt.rsplit("第", 1)[1].split("ミロリ")[0])


def test_a_model_that_knows_the_answers_gets_every_point():
    engine = ScriptedEngine(lambda prompt: f"{'abcde'[number_of(prompt) % 5]}\n")
    predictions = evaluate(engine, PROBLEMS, [SHOT], config())
    assert predictions[2] == Prediction("q2", "c", "c\n")
    assert score(PROBLEMS, predictions).correct == len(PROBLEMS)
    prompts = [prompt for call in engine.calls for prompt in call[0]]
    assert [number_of(prompt) for prompt in prompts] == list(range(11))
    assert all(prompt.startswith("問題: 月は何色か。") and "答え:b,d\n\n" in prompt for prompt in prompts)


def test_the_answer_after_the_explanation_counts_and_the_whole_text_is_kept():
    text = "aではない。\n Answer:e"
    settings = config(explanation=True, template="curation")
    predictions = evaluate(ScriptedEngine(lambda prompt: text), PROBLEMS[:1], [SHOT], settings)
    assert predictions == [Prediction("q0", "e", text)]


def test_a_model_that_does_not_answer_gets_an_empty_prediction():
    predictions = evaluate(ScriptedEngine(lambda prompt: "わかりません。"), PROBLEMS[:2], (), config())
    assert [prediction.prediction for prediction in predictions] == ["", ""]
    assert score(PROBLEMS[:2], predictions).unanswered == 2


def test_several_letters_are_joined_as_the_official_scoring_splits_them():
    two = Problem("two", "2つ選べ。", CHOICES, ("b", "c"))
    predictions = evaluate(ScriptedEngine(lambda prompt: "緑色、青"), [two], (), config(answer_as="text"))
    assert predictions[0].prediction == "b,c"
    assert score([two], predictions).points == 1


def test_a_completion_stops_at_the_next_question_and_a_chat_at_its_end():
    engine = ScriptedEngine(lambda prompt: "a")
    sampling = Sampling(stop=("###",), max_new_tokens=7, temperature=0.5, seed=3)
    evaluate(engine, PROBLEMS[:1], (), config(sampling=sampling))
    evaluate(engine, PROBLEMS[:1], (), config(sampling=sampling, format="chat"))
    (_, completion, _), ((conversation,), chat, _) = engine.calls
    assert completion.stop == ("###", "\n\n", "\n問題:")
    assert (completion.max_new_tokens, completion.temperature, completion.seed) == (7, 0.5, 3)
    assert chat == sampling
    assert [message.role for message in conversation] == ["system", "user"]


def test_progress_is_the_engines_own_and_reaches_the_number_of_problems():
    engine, seen = ScriptedEngine(lambda prompt: "a"), []
    evaluate(engine, PROBLEMS, (), config(batch_size=2), lambda done, total, doing="": seen.append((done, total)))
    assert seen == [(1, 11), (8, 11), (9, 11), (11, 11)]
    assert [call[2] for call in engine.calls] == [2, 2]


def test_a_problem_is_not_asked_after_its_own_answer_was_shown():
    shown = Problem("another id", PROBLEMS[3].text, CHOICES, ("d",))
    with pytest.raises(UserError, match="problem q3 is asked and is also shown with its answer as example another id"):
        check_exam(PROBLEMS, [shown], config())


def test_a_problem_is_not_asked_twice():
    twice = [dataclasses.replace(one, source=f"e.jsonl:{line}") for line, one in enumerate(PROBLEMS[:1] * 2, 1)]
    with pytest.raises(UserError, match=r"e\.jsonl:2: problem q0 was already in e\.jsonl:1"):
        check_exam(twice, (), config())


def test_several_samples_are_refused():
    with pytest.raises(UserError, match=r"set --sampling\.samples to 1, not 4"):
        check_exam(PROBLEMS, (), config(sampling=Sampling(samples=4, temperature=1.0)))


def test_predictions_written_are_the_predictions_read(tmp_path):
    predictions = (Prediction("q0", "a,b", "説明\n答え:a,b"), Prediction("q1", "", ""))
    write_predictions(tmp_path / "run/predictions.jsonl", predictions)
    assert read_predictions(tmp_path / "run/predictions.jsonl") == predictions


class CharacterTokenizer:
    """One token a character, but ``：X`` is a single token, so that an option can merge into the prompt's end."""

    def __call__(self, texts, add_special_tokens, verbose):
        return {"input_ids": [[ord(letter) for letter in text.replace("：X", "×")] for text in texts]}


class LikelihoodEngine:
    """Log-probability of a token: minus its cost, 1 where none is given."""

    name = "likelihood"

    def __init__(self, **costs):
        self.costs, self.seen = {ord(letter): cost for letter, cost in costs.items()}, []

    def logprobs(self, continuations, batch_size=32):
        self.seen += continuations
        return [
            np.array([-self.costs.get(token, 1.0) for token in continuation.completion], np.float32)
            for continuation in continuations
        ]


def test_options_are_ranked_by_summed_and_by_mean_likelihood():
    engine = LikelihoodEngine(赤=2.5, 緑=1.2, 色=1.2, 青=2.0)
    problems = [
        Problem("sum", "空は。", ("赤", "緑色", "青"), ("c",)),  # sums 2.5, 2.4, 2.0; per token 2.5, 1.2, 2.0
        Problem("mean", "海は。", ("赤", "緑色", "青"), ("b",)),
        Problem("two", "2つ選べ。", ("赤", "緑色", "青"), ("a", "b")),
        Problem("number", "何日か。", (), ("3",)),
        Problem("either", "星は。", ("赤", "青"), ("a or b",)),
    ]
    scores = score_options(engine, CharacterTokenizer(), problems)
    assert [result.problem_id for result in scores.results] == ["sum", "mean", "either"]
    assert scores.results[0].nll == pytest.approx((2.5, 2.4, 2.0))
    assert scores.results[0].tokens == (1, 2, 1)
    assert [result.chosen for result in scores.results] == ["c", "c", "b"]
    assert [result.chosen_per_token for result in scores.results] == ["b", "b", "b"]
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.normalized_accuracy == pytest.approx(2 / 3)
    assert scores.left_out == {"several right options": 1, "numeric problem": 1}


# Written out from templates/mcqa.py of nii-nlp/med-eval, and from the pairs in the table of its README.
JMEDBENCH = {
    "mcqa_minimal": ("空は。\n", "要約。\n空は。\n", "空は。\nA. 赤\nB. 青\n", "要約。\n空は。\nA. 赤\nB. 青\n"),
    "mcqa_with_options_jp": (
        "質問：空は。\nA. 赤\nB. 青\n答え：",
        "要旨：要約。\n質問：空は。\n答え：",
        "質問：空は。\nA. 赤\nB. 青\n答え：",
        "要旨：要約。\n質問：空は。\nA. 赤\nB. 青\n答え：",
    ),
    "mcqa_with_options": (
        "Question: 空は。\nA. 赤\nB. 青\nAnswer: ",
        "Abstract: 要約。\nQuestion: 空は。\nAnswer: ",
        "Question: 空は。\nA. 赤\nB. 青\nAnswer: ",
        "Abstract: 要約。\nQuestion: 空は。\nA. 赤\nB. 青\nAnswer: ",
    ),
    "mcqa": (
        "Question: 空は。\nAnswer: ",
        "Abstract: 要約。\nQuestion: 空は。\nAnswer: ",
        "Question: 空は。\nA. 赤\nB. 青\nAnswer: ",
        "Abstract: 要約。\nQuestion: 空は。\nA. 赤\nB. 青\nAnswer: ",
    ),
    "mcqa_jp": (
        "質問：空は。\n回答：",
        "要旨：要約。\n質問：空は。\n答え：",
        "質問：空は。\nA. 赤\nB. 青\n回答：",
        "要旨：要約。\n質問：空は。\nA. 赤\nB. 青\n答え：",
    ),
}


@pytest.mark.parametrize("prompt", JMEDBENCH)
@pytest.mark.parametrize("context", [None, "要約。"])
@pytest.mark.parametrize("method", ["options", "letters"])
def test_the_option_prompts_are_jmedbenchs(prompt, context, method):
    engine = LikelihoodEngine()
    asked = Problem("x", "空は。", ("赤", "青"), ("a",), context=context)
    score_options(engine, CharacterTokenizer(), [asked], prompt=prompt, method=method)
    text = JMEDBENCH[prompt][2 * (method == "letters") + bool(context)]
    read = [["".join(map(chr, tokens)) for tokens in (one.prompt, one.completion)] for one in engine.seen]
    before = text.rstrip()
    answers = "赤青" if method == "options" else "AB"
    assert read == [[before, text[len(before) :] + answer] for answer in answers], (
        "the last space is the option's, as in lm-eval"
    )


@pytest.mark.parametrize(
    ("context", "beginning", "end"),
    [
        (None, "あなたは医学博士です。", "質問：空は。\n選択肢：\nA. 赤\nB. 青\n答え："),
        ("要約。", "臨床科学と医学知識の専門家である医師として、", "お答えください。\n要旨：要約。\n質問：空は。\n答え："),
    ],
)
def test_the_instructed_prompt_is_another_where_there_is_a_context(context, beginning, end):
    text = option_prompt(Problem("x", "空は。", ("赤", "青"), ("a",), context=context), "4o_mcqa_instructed_jp")
    assert text.startswith(beginning)
    assert text.endswith(end)
    assert set(OPTION_PROMPTS) == {*JMEDBENCH, "4o_mcqa_instructed_jp"}


def test_by_letters_the_likeliest_letter_is_chosen_whatever_its_option_says():
    engine = LikelihoodEngine(A=2.0, B=3.0, C=0.5, 赤=0.1)
    scores = score_options(
        engine, CharacterTokenizer(), [Problem("x", "空は。", ("赤", "緑", "青"), ("c",), category="sky")], method="letters"
    )
    assert [(one.chosen, one.correct, one.category) for one in scores.results] == [("c", True, "sky")]
    assert scores.results[0].nll == pytest.approx((2.0, 3.0, 0.5))


@pytest.mark.parametrize(
    ("choices", "prompt_ends", "completions"),
    [
        (("赤", "青"), "：", ["赤", "青"]),
        (("X", "XY"), "え", ["×", "×Y"]),
        (("赤", "X"), "え", ["：赤", "×"]),  # all after the same tokens, or their likelihoods could not be compared
    ],
    ids=["none", "all", "one"],
)
def test_options_that_merge_into_the_prompt_are_scored_whole(choices, prompt_ends, completions):
    engine = LikelihoodEngine()
    scores = score_options(engine, CharacterTokenizer(), [Problem("x", "空は。", choices, ("a",))])
    assert {chr(one.prompt[-1]) for one in engine.seen} == {prompt_ends}
    assert ["".join(map(chr, one.completion)) for one in engine.seen] == completions
    assert scores.results[0].tokens == tuple(map(len, completions))


@pytest.fixture(scope="module")
def bytes_and_words():
    """A token a byte, but `` F``, `` R``, ``：「`` and what a space makes with the first byte of 発 are tokens of their own."""
    letters = {text: "".join(piece for piece, _ in SPLIT.pre_tokenize_str(text)) for text in (" F", " R", "：「", " 発")}
    merges = [(letters[" F"][0], "F"), (letters[" R"][0], "R"), tuple(letters[" 発"][:2])]
    merges += [(letters["：「"][:end], letters["：「"][end]) for end in range(1, len(letters["：「"]))]
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=merges))
    core.pre_tokenizer, core.decoder = SPLIT, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize("prompt", sorted(OPTION_PROMPTS))
@pytest.mark.parametrize("choices", [("Fever and cough", "Rash and cough"), ("発熱", "咳"), ("「発熱」", "咳"), ("「", "「「")])
def test_every_option_is_scored_in_all_its_characters_after_the_same_prompt(bytes_and_words, prompt, choices):
    engine = LikelihoodEngine()
    score_options(engine, bytes_and_words, [Problem("x", "どれ。", choices, ("a",))], prompt=prompt)
    (asked,) = {one.prompt for one in engine.seen}
    for one, choice in zip(engine.seen, choices, strict=True):
        assert bytes_and_words.decode(one.completion).lstrip(" ：\n") == choice
        assert bytes_and_words.decode([*asked, *one.completion]).endswith(choice)
        assert [*asked, *one.completion] == bytes_and_words(bytes_and_words.decode([*asked, *one.completion]))["input_ids"]


def test_what_cannot_be_scored_by_likelihood_is_refused():
    numeric = Problem("n", "何日か。", (), ("3",))
    empty = Problem("e", "どれか。", (" ", "赤"), ("b",), source="file.jsonl:2")
    with pytest.raises(UserError, match="no problem has exactly one right option"):
        score_options(LikelihoodEngine(), CharacterTokenizer(), [numeric])
    with pytest.raises(UserError, match=r"file\.jsonl:2: problem e has an empty option"):
        score_options(LikelihoodEngine(), CharacterTokenizer(), [empty])
    with pytest.raises(UserError, match="no prompt is called 'best'; there are mcqa_minimal"):
        score_options(LikelihoodEngine(), CharacterTokenizer(), [PROBLEMS[0]], prompt="best")
