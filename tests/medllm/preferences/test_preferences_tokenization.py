"""Groups of tokens: one shared prompt, every response once, every pair what it would be alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medllm.config import PairConfig
from medllm.errors import UserError
from medllm.preferences.pairs import Rank, training_pairs
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import TokenizedGroup, check_preferences, tokenize_preferences

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


def test_a_merge_that_swallows_the_whole_prompt_leaves_an_empty_one(tokenizer):
    group = tokenize_group(tokenizer, preference("ab", "e", "c"), ALL)
    assert (group.prompt, group.responses) == ((), ((ABE, END), (A, B, C, END)))


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
    assert (found.pairs, found.dropped_pairs, found.unpaired) == (3, 2, 1)
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
    with pytest.raises(UserError, match=r"problem 110A1: .* have 13 tokens, .* context is 8; set --pairs\.max_length 8"):
        check(preference("ab", "c" * 10, "d"), context=8)
