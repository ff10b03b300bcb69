"""Our preference tokens against those TRL's own DPOTrainer puts into its dataset and its batches."""

from __future__ import annotations

import os

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from jax_medllm.train.batches import PreferenceData, Step
from medllm.config import PairConfig, TrainingConfig
from medllm.model.tokenizer import load_tokenizer
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import EQUAL, tokenize_preferences
from parity_tests.preference_cases import prepared_by_trl, trl_dataset, trl_sequences

EOS = "<|endoftext|>"


def byte_level_bpe(merges: list[tuple[str, str]], *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all 256 bytes plus the given merges, which may join anything: words are not split first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, core.token_to_id(EOS))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS)


def spelled(text: str) -> list[str]:
    """The byte-level characters of ``text``, as merges spell them."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return list("".join(piece for piece, _ in pieces))


def chain(text: str) -> list[tuple[str, str]]:
    """Merges that build ``text`` into one token, left to right."""
    letters = spelled(text)
    return [("".join(letters[:index]), letters[index]) for index in range(1, len(letters))]


MERGES = [*chain(" A"), *chain(":「"), *chain(":b"), *chain("は"), *chain("答え"), *chain("he"), *chain("x\n")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe(MERGES)


def preference(prompt: str, ground_truth: str, chosen: list[str], rejected: list[str], problem_id: str = "110A1") -> Preference:
    samples = [tuple(Sample(text, "a") for text in texts) for texts in (chosen, rejected)]
    return Preference(problem_id, prompt, Sample(ground_truth, "a"), *samples)


def our_sequences(tokenizer, preferences: list[Preference], config: PairConfig) -> list[tuple[list[int], list[int], list[int]]]:
    groups = tokenize_preferences(tokenizer, preferences, config).groups
    return [tuple(list(ids) for ids in tokens) for group in groups for tokens in group.pair_tokens()]


def assert_same_as_trl(tokenizer, preferences: list[Preference], config: PairConfig) -> list:
    """Pair by pair, but for those of which TRL trains on the same tokens as preferred and as not: they are dropped here."""
    prepared = trl_dataset(tokenizer, preferences, config)
    ours = our_sequences(tokenizer, preferences, config)
    theirs = trl_sequences(tokenizer, prepared, config.max_length)
    assert ours == [row for row in theirs if row[1] != row[2]]
    return ours


PLAIN = preference(
    "Question: 正しいのはどれか。\na: 一\nb: 二\n Explanation:",
    "一は正しい。\n Answer:a",
    ["はい\n Answer:a"],
    ["いいえ\n Answer:b"],
)
MERGED = preference(
    "Q\n Explanation:", "「引用」\n Answer:a", ["because\n Answer:a"], ["次に\n Answer:b", "「違う」\n Answer:c"]
)


def test_pairs_are_tokenized_as_trl_tokenizes_them(tokenizer):
    assert len(assert_same_as_trl(tokenizer, [PLAIN, MERGED], PairConfig(max_rejected=0))) == 8


def test_a_merge_across_the_boundary_moves_the_completion_start_as_in_trl(tokenizer):
    config = PairConfig(max_chosen=0, max_rejected=0)
    ours = assert_same_as_trl(tokenizer, [MERGED], config)
    prompt_lengths = {len(prompt) for prompt, _, _ in ours}
    assert len(prompt_lengths) == 1, "every pair here holds a response that merges with the colon"

    unmerged_pair = preference("Q\n Explanation:", "次", ["because"], ["三", "四"])
    ours = assert_same_as_trl(tokenizer, [unmerged_pair], config)
    (group,) = tokenize_preferences(tokenizer, [unmerged_pair], config).groups
    assert len({len(prompt) for prompt, _, _ in ours}) == 2
    assert sorted(set(group.pair_starts)) == [0, 1]


def test_an_end_of_text_that_is_already_there_is_not_doubled(tokenizer):
    ended = preference("Q\n Explanation:", f"一\n Answer:a{EOS}", ["二\n Answer:a"], [f"三{EOS}"])
    ours = assert_same_as_trl(tokenizer, [ended], PairConfig())
    for _, high, low in ours:
        assert high.count(tokenizer.eos_token_id) == low.count(tokenizer.eos_token_id) == 1


def test_an_empty_response_is_the_end_token_alone_as_in_trl(tokenizer):
    ours = assert_same_as_trl(tokenizer, [preference("Q:", "一", [], [""])], PairConfig())
    assert ours[0][2] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("max_length", [2, 3, 14, 15, 16, 17, 18, 20, 27, 40, 60])
def test_truncation_and_dropped_rows_are_those_of_trl(tokenizer, max_length):
    assert_same_as_trl(tokenizer, [PLAIN, MERGED], PairConfig(max_chosen=0, max_rejected=0, max_length=max_length))


def test_of_pairs_cut_to_equal_tokens_trl_is_given_none(tokenizer):
    """What each engine trains on: the groups of one hold the pairs of the texts that the other is given."""
    config = PairConfig(max_chosen=0, max_rejected=0, max_length=15)
    found = tokenize_preferences(tokenizer, [PLAIN, MERGED], config)
    assert found.dropped[EQUAL] == 1
    prepared = prepared_by_trl(tokenizer, [pair.trl_row() for pair in found.texts], config)
    ours = [tuple(map(list, pair)) for group in found.groups for pair in group.pair_tokens()]
    assert trl_sequences(tokenizer, prepared, 15) == ours


def test_a_tokenizer_that_adds_a_start_token_is_followed_too():
    ours = assert_same_as_trl(byte_level_bpe(MERGES, bos=True), [PLAIN, MERGED], PairConfig())
    assert all(prompt[0] == 256 + len(MERGES) for prompt, _, _ in ours)


def test_the_qwen_tokenizer_gives_what_trl_makes_of_it():
    folder = os.environ.get("QWEN_TOKENIZER_DIR")
    if not folder:
        pytest.skip("set QWEN_TOKENIZER_DIR to a folder with Qwen2.5's vocab.json and merges.txt")
    qwen = load_tokenizer(folder)
    texts = [
        "「引用」で始まる。\n Answer:a",
        "正しい。\n Answer:a",
        " space first",
        "\n\n改行",
        "(a)は誤り\n Answer:b,c",
        "12歳",
    ]
    problem = preference("Question: ６５歳の男性。\na: はい\nb: いいえ\n Explanation:", texts[0], texts[1:3], texts[3:])
    for max_length in (4096, 30, 22):
        assert_same_as_trl(qwen, [problem, PLAIN, MERGED], PairConfig(0, 0, max_length=max_length))


def test_batches_and_masks_are_those_of_trls_collator(tokenizer):
    """All pairs in one batch: a padded row each there; here a row a problem, each prompt and response once."""
    given = [PLAIN, MERGED, preference("Q\n Explanation:", "次", ["because"], ["三"])]
    config = PairConfig(max_chosen=0, max_rejected=0, max_length=75)
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=config.max_length)
    theirs = collate(list(trl_dataset(tokenizer, given, config)))
    groups = tokenize_preferences(tokenizer, given, config).groups
    data = PreferenceData(groups, TrainingConfig(batch_size=len(groups), accumulation=1))
    (batch,) = data.batches(Step(0, (tuple(range(len(groups))),)))
    rows = batch.responses
    used = np.argwhere(batch.weights)
    count = len(used)
    assert len(groups) == len(given)
    assert count < batch.weights.size, "some pairs are padding"
    assert sum(len(group.pairs) for group in groups) == count == len(theirs["input_ids"]) // 2
    np.testing.assert_allclose(batch.weights[batch.weights > 0], 1 / count)
    assert batch.starts.any()
    for number, (row, pair) in enumerate(used):
        for half, response in enumerate(batch.pairs[row, pair]):
            ids, seen, completion = (
                theirs[name][number + half * count].numpy() for name in ("input_ids", "attention_mask", "completion_mask")
            )
            # What the response's positions read, from the prompt's first token on, and what they predict.
            inputs = rows.tokens[row][(rows.segment_ids[row] == 1) | (rows.responses[row] == response)]
            own = rows.targets[row][rows.responses[row] == response]
            assert inputs.tolist() == ids[seen > 0][:-1].tolist()
            assert own.tolist() == ids[seen > 0][-len(own) :].tolist()
            assert own[batch.starts[row, pair] :].tolist() == ids[completion > 0].tolist()
