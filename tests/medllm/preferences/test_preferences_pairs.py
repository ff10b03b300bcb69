"""The hierarchy ground truth > chosen > rejected, as pairs."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from medllm.config import PairConfig
from medllm.preferences.pairs import Rank, export_trl, select_pairs, training_pairs, trl_rows
from medllm.preferences.records import Preference, Sample


def preference(chosen: list[str], rejected: list[str], ground_truth: str = "GT", problem_id: str = "110A1") -> Preference:
    samples = [tuple(Sample(text, "a") for text in texts) for texts in (chosen, rejected)]
    return Preference(problem_id, "prompt", Sample(ground_truth, "a"), *samples)


def texts(preference: Preference, config: PairConfig) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in training_pairs([preference], config)]


ALL = PairConfig(max_chosen=0, max_rejected=0)


def test_one_sample_of_each_rank_gives_the_three_pairs_of_the_paper():
    paired = select_pairs(preference(["C"], ["R"]), PairConfig())
    assert [response.text for response in paired.responses] == ["GT", "C", "R"]
    assert paired.ranks == (Rank.GROUND_TRUTH, Rank.CHOSEN, Rank.REJECTED) == (2, 1, 0)
    assert paired.pairs == ((0, 1), (0, 2), (1, 2))


def test_the_first_distinct_samples_are_kept_and_zero_keeps_all():
    several = preference(["C1", "C1", "C2", "C3"], ["R1", "R2"])
    assert texts(several, PairConfig(max_chosen=2, max_rejected=1)) == [
        ("GT", "C1"), ("GT", "C2"), ("GT", "R1"), ("C1", "R1"), ("C2", "R1"),
    ]  # fmt: skip
    assert len(texts(several, ALL)) == 3 + 2 + 3 * 2


def test_problems_without_chosen_or_rejected_give_what_pairs_there_are():
    assert texts(preference(["C"], []), PairConfig()) == [("GT", "C")]
    assert texts(preference([], ["R"]), PairConfig()) == [("GT", "R")]
    assert texts(preference([], []), PairConfig()) == []


def test_a_sample_equal_to_the_ground_truth_makes_no_pair_with_it_and_takes_no_place():
    assert texts(preference(["GT", "C"], ["GT", "R"]), PairConfig()) == [("GT", "C"), ("GT", "R"), ("C", "R")]


words = st.lists(st.sampled_from("abcdef"), max_size=6)


@settings(deadline=None)
@given(words, words, st.sampled_from("abx"), st.integers(0, 3), st.integers(0, 3))
def test_pairs_are_distinct_prefer_the_higher_rank_and_keep_within_limits(chosen, rejected, truth, most_chosen, most_rejected):
    config = PairConfig(max_chosen=most_chosen, max_rejected=most_rejected)
    paired = select_pairs(preference(chosen, rejected, truth), config)
    kept = [response.text for response in paired.responses]
    assert len(set(kept)) == len(kept)
    assert len(set(paired.pairs)) == len(paired.pairs)
    assert all(paired.ranks[high] > paired.ranks[low] for high, low in paired.pairs)
    count = {rank: paired.ranks.count(rank) for rank in Rank}
    assert count[Rank.GROUND_TRUTH] == 1
    assert count[Rank.CHOSEN] <= (most_chosen or len(chosen))
    assert count[Rank.REJECTED] <= (most_rejected or len(rejected))
    assert len(paired.pairs) == count[Rank.CHOSEN] + count[Rank.REJECTED] + count[Rank.CHOSEN] * count[Rank.REJECTED]
    if not most_chosen:
        assert count[Rank.CHOSEN] == len(set(chosen) - {truth})


def test_export_writes_exactly_trls_columns(tmp_path):
    file = tmp_path / "trl.jsonl"
    both = [preference(["C"], ["R"]), preference([], ["別"], problem_id="110A2")]
    assert export_trl(both, file) == 4
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == trl_rows(both, PairConfig())
    assert rows[0] == {"prompt": "prompt", "chosen": "GT", "rejected": "C"}
    assert rows[3] == {"prompt": "prompt", "chosen": "GT", "rejected": "別"}
