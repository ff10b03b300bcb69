"""Groups of tokens: one shared prompt, every response once, every pair what it would be alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from medllm.config import PairConfig
from medllm.errors import UserError
from medllm.preferences.pairs import Rank, training_pairs
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import EQUAL, FULL, NO_PROMPT, TokenizedGroup, check_preferences, tokenize_preferences

ALL = PairConfig(max_chosen=0, max_rejected=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters a to e; ``bd`` and ``abe`` are tokens of their own."""
    merges = [("b", "d"), ("b", "e"), ("a", "be")]
    vocab = {token: index for index, token in enumerate([*"abcde", "bd", "be", "abe"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


A, B, C, D, E, BD, BE, ABE, END = range(9)


def preference(prompt: str, truth: str, chosen: str = "", rejected: str = "", problem_id: str = "110A1") -> Preference:
    samples = [tuple(Sample(text, "a") for text in texts.split()) for texts in (chosen, rejected)]
    return Preference(problem_id, prompt, Sample(truth, "a"), *samples)


def tokenize_group(tokenizer: PreTrainedTokenizerFast, problem: Preference, config: PairConfig) -> TokenizedGroup | None:
    """The one group of a problem; None where no pair is left."""
    return next(iter(tokenize_preferences(tokenizer, [problem], config).groups), None)


def test_responses_share_one_prompt_and_end_with_the_end_token(tokenizer):
    group = tokenize_group(tokenizer, preference("ab", "ca", "ac", "cc"), ALL)
    assert group.prompt == (A, B)
    assert group.responses == ((C, A, END), (A, C, END), (C, C, END))
    assert group.ranks == (Rank.GROUND_TRUTH, Rank.CHOSEN, Rank.REJECTED)
    assert group.pairs == ((0, 1), (0, 2), (1, 2))
    assert group.pair_starts == (0, 0, 0)


def test_a_merge_in_one_response_shortens_the_shared_prompt_and_other_pairs_start_later(tokenizer):
    group = tokenize_group(tokenizer, preference("ab", "c", "d", "a"), ALL)
    assert group.prompt == (A,)
    assert group.responses == ((B, C, END), (BD, END), (B, A, END))
    assert group.pair_starts == (0, 1, 0)
    assert list(group.pair_tokens()) == [
        ((A,), (B, C, END), (BD, END)),
        ((A, B), (C, END), (A, END)),
        ((A,), (BD, END), (B, A, END)),
    ]


def test_a_pair_without_a_token_of_its_prompt_is_dropped_and_counted(tokenizer):
    merged = preference("ab", "e", "c", "d", problem_id="merged")
    found = tokenize_preferences(tokenizer, [merged, preference("", "c", "d", problem_id="empty")], ALL)
    assert found.dropped == {NO_PROMPT: 3}
    (group,) = found.groups
    assert list(group.pair_tokens()) == [((A,), (B, C, END), (BD, END))], "ab and e are one token; ab before c and d are two"
    assert [(pair.chosen, pair.rejected) for pair in found.texts] == [("c", "d")]


def test_the_token_that_begins_a_text_is_no_token_of_its_prompt(tokenizer):
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END)])
    begins = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    found = tokenize_preferences(begins, [preference("", "c", "d"), preference("a", "c", "d", problem_id="110A2")], ALL)
    assert found.dropped == {NO_PROMPT: 1}
    assert [group.prompt for group in found.groups] == [(END, A)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "most"),
    [("cca", "ccb", 4), ("c", "c<end>", 9), ("\u00e9", "e\u0301", 9), ("cc", "ccc", 4)],
    ids=["beyond the cut", "end token written out", "composed otherwise", "cut at its end"],
)
def test_responses_of_the_same_tokens_are_no_pair(chosen, rejected, most):
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate("abcd\u00e9")}, merges=[]))
    core.normalizer = normalizers.NFC()
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    composes = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    problem = Preference("110A1", "bb", Sample("d", "a"), (Sample(chosen, "a"),), (Sample(rejected, "b"),))
    found = tokenize_preferences(composes, [problem], PairConfig(max_length=most))
    assert found.dropped == {EQUAL: 1}
    assert [(pair.chosen, pair.rejected) for pair in found.texts] == [("d", chosen), ("d", rejected)]
    assert found.pairs == sum(len(group.pairs) for group in found.groups) == 2


def test_long_responses_are_cut_at_the_end_and_counted(tokenizer):
    found = tokenize_preferences(tokenizer, [preference("aaa", "cccc", "c", "ccccc")], PairConfig(max_length=6))
    assert found.truncated == 2
    assert found.groups[0].responses == ((C, C, C), (C, END), (C, C, C))


def test_pairs_whose_prompt_fills_the_length_are_dropped_and_counted(tokenizer):
    problems = [
        preference("aaaa", "c", "d", problem_id="full"),
        preference("aab", "c", "d", "a", problem_id="partly"),
        preference("a", "c", problem_id="alone"),
        preference("a", "c", "cc", problem_id="whole"),
    ]
    seen = []
    found = tokenize_preferences(tokenizer, problems, PairConfig(max_length=3), lambda *done: seen.append(done))
    assert [group.problem_id for group in found.groups] == ["partly", "whole"]
    assert found.groups[0].pairs == ((0, 1), (1, 2)), "the pair of c and a has the prompt a a b, which leaves it no room"
    assert (found.pairs, found.dropped, found.unpaired) == (3, {FULL: 2}, 1)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_response_left_without_a_pair_is_left_out(tokenizer):
    found = tokenize_group(tokenizer, preference("aab", "c", "d", "a"), PairConfig(max_length=3, max_rejected=0))
    assert found.responses == ((B,), (BD,), (B,))
    only_rejected = tokenize_group(tokenizer, preference("ab", "c", rejected="a d"), PairConfig(max_length=2, max_rejected=0))
    assert only_rejected.pairs == ((0, 1),)
    assert only_rejected.responses == ((B,), (BD,))
    assert only_rejected.ranks == (Rank.GROUND_TRUTH, Rank.REJECTED)


letters = st.text("abcde", min_size=1, max_size=5)


@settings(deadline=None)
@given(letters, letters, st.lists(letters, max_size=3), st.lists(letters, max_size=3), st.integers(2, 8))
def test_every_pair_is_what_it_would_be_on_its_own(tokenizer, prompt, truth, chosen, rejected, max_length):
    config = PairConfig(max_chosen=0, max_rejected=0, max_length=max_length)
    problem = preference(prompt, truth, " ".join(chosen), " ".join(rejected))
    group = tokenize_group(tokenizer, problem, config)
    alone = []
    for pair in training_pairs([problem], config):
        single = tokenize_group(tokenizer, preference(pair.prompt, pair.chosen, rejected=pair.rejected), config)
        if single is not None:
            assert single.pair_starts == (0,)
            alone.append((single.prompt, *single.responses))
    assert (list(group.pair_tokens()) if group else []) == alone


def test_preferences_that_cannot_be_trained_on_are_refused(tokenizer):
    def check(*given: Preference, max_length: int = 64, context: int = 64) -> None:
        data = tokenize_preferences(tokenizer, given, PairConfig(max_length=max_length))
        check_preferences(data, max_length, context, "p.jsonl")

    check(preference("ab", "c", "d"))
    with pytest.raises(UserError, match=r"p\.jsonl: no pair to train on: 1 problems have none, and in 0 pairs"):
        check(preference("ab", "c"))
    with pytest.raises(UserError, match=r"1 pairs the prompt alone fills pairs\.max_length 2"):
        check(preference("aab", "c", "a"), max_length=2)
    with pytest.raises(UserError, match=r"in 0 pairs .*; 1 × no token of the prompt is left"):
        check(preference("", "c", "d"))
    with pytest.raises(UserError, match=r"problem 110A1: .* have 13 tokens, .* context is 8; set --pairs\.max_length 8"):
        check(preference("ab", "c" * 10, "d"), context=8)
