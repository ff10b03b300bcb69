"""A tokenizer and a preference file small enough to read, with the cases that have gone wrong in preference training."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medllm.config import PairConfig
from medllm.preferences.records import Preference, Sample

PAIRS = PairConfig(max_chosen=2, max_rejected=2, max_length=40)


def letters() -> PreTrainedTokenizerFast:
    """One token a letter, and one merge that joins the last letter of a prompt with the first of a response."""
    vocab = {token: index for index, token in enumerate([*"!abcdefghijklmnopqrstuvwxyz :\nQA", "Ab"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("A", "b")]))
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def preferences() -> list[Preference]:
    """Responses of unequal number and length, token 0 among them, one cut at ``max_length``, one merged with its prompt."""

    def problem(name: str, prompt: str, truth: str, chosen: list[str], rejected: list[str]) -> Preference:
        chosen_samples, rejected_samples = ([Sample(text, "a") for text in texts] for texts in (chosen, rejected))
        return Preference(name, prompt, Sample(truth, "a"), tuple(chosen_samples), tuple(rejected_samples))

    return [
        problem("full", "Q: one\nA", ": fever! a", [": no fever a", ": cold! a"], [": b", ": it is a long way round to d"]),
        problem("short", "Q: the second question\nA", ": so it goes! and on c", [], [": d"]),
        problem("merged", "Q: two\nA", " cold! a", [" ! cold a"], ["bed rest"]),
    ]
