"""A tokenizer and a preference file small enough to read, with the cases that have gone wrong; and what TRL makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from medllm.config import PairConfig
from medllm.preferences.pairs import trl_rows
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


def trl_dataset(tokenizer: Any, preferences: list[Preference], config: PairConfig) -> Dataset:
    """All pairs of all problems after DPOTrainer's own preparation."""
    return prepared_by_trl(tokenizer, trl_rows(preferences, config), config)


def prepared_by_trl(tokenizer: Any, given: list[dict[str, str]], config: PairConfig) -> Dataset:
    """Rows after DPOTrainer's own preparation. It reads one attribute of the trainer, which needs no model for that."""
    rows = Dataset.from_list(given)
    settings = DPOConfig(output_dir="unused", max_length=config.max_length, report_to=[], use_cpu=True, bf16=False)
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, settings, "train")


def trl_sequences(tokenizer: Any, prepared: Dataset, max_length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of each row as the collator hands them to the model, cut at ``max_length``."""
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)
    sequences = []
    for row in prepared:
        batch = collate([row])
        halves = []
        for ids, seen, completion in zip(
            batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["completion_mask"].tolist(), strict=True
        ):
            prompt = [token for token, real, ours in zip(ids, seen, completion, strict=True) if real and not ours]
            halves.append((prompt, [token for token, ours in zip(ids, completion, strict=True) if ours]))
        assert halves[0][0] == halves[1][0]
        sequences.append((halves[0][0], halves[0][1], halves[1][1]))
    return sequences
