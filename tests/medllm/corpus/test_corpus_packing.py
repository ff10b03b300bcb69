"""Packing: nothing lost, nothing mixed, little wasted."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm.corpus.documents import Document
from medllm.corpus.packing import PackedRows, check_rows, pack, tokenize_documents
from medllm.errors import UserError

PAD = -1
document_lengths = st.lists(st.integers(min_value=0, max_value=40), max_size=40)
row_lengths = st.integers(min_value=2, max_value=16)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which no token comes twice, so that every one can be found again."""
    starts = np.cumsum([0, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


def segments(rows: PackedRows) -> list[tuple[list[int], list[int]]]:
    """(tokens, positions) of every segment of every row."""
    found = []
    for tokens, segment_ids, positions in zip(rows.tokens, rows.segment_ids, rows.positions, strict=True):
        for segment in range(1, segment_ids.max() + 1):
            mine = segment_ids == segment
            found.append((tokens[mine].tolist(), positions[mine].tolist()))
    return found


@settings(deadline=None)
@given(document_lengths, row_lengths)
def test_every_token_appears_once_and_in_order(lengths, length):
    documents = numbered(lengths)
    rows = pack(documents, length, PAD, "packed")
    expected = sorted(document[start : start + length] for document in documents for start in range(0, len(document), length))
    assert sorted(tokens for tokens, _ in segments(rows)) == expected


@settings(deadline=None)
@given(document_lengths, row_lengths)
def test_segments_are_contiguous_counted_from_one_and_positions_restart(lengths, length):
    rows = pack(numbered(lengths), length, PAD, "packed")
    for tokens, segment_ids in zip(rows.tokens, rows.segment_ids, strict=True):
        used = int((segment_ids > 0).sum())
        assert used > 0, "a row without a document"
        assert (segment_ids[:used] > 0).all()
        assert (segment_ids[used:] == 0).all()
        assert (tokens[used:] == PAD).all()
        assert segment_ids[0] == 1
        assert set(np.diff(segment_ids[:used])) <= {0, 1}
    assert (rows.positions[rows.segment_ids == 0] == 0).all()
    for _, positions in segments(rows):
        assert positions == list(range(len(positions)))


@settings(deadline=None)
@given(document_lengths, row_lengths)
def test_targets_are_all_tokens_but_the_first_of_each_segment(lengths, length):
    rows = pack(numbered(lengths), length, PAD, "packed")
    targets = rows.tokens[rows.targets].tolist()
    assert sorted(targets) == sorted(token for tokens, _ in segments(rows) for token in tokens[1:])


@settings(deadline=None)
@given(document_lengths, row_lengths)
def test_no_two_rows_would_fit_into_one(lengths, length):
    rows = pack(numbered(lengths), length, PAD, "packed")
    used = sorted((rows.segment_ids > 0).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > length, "best fit opens a row only where no other has room"


@settings(deadline=None)
@given(document_lengths, row_lengths)
def test_wrapped_rows_are_the_stream_cut_anywhere(lengths, length):
    documents = numbered(lengths)
    rows = pack(documents, length, PAD, "wrapped")
    total = sum(lengths)
    assert rows.tokens.shape == (-(-total // length), length)
    assert rows.tokens.reshape(-1)[:total].tolist() == list(range(total))
    assert (rows.segment_ids.reshape(-1) == (np.arange(rows.tokens.size) < total)).all()
    assert (rows.tokens.reshape(-1)[total:] == PAD).all()
    assert (rows.positions[rows.segment_ids == 1] == np.arange(total) % length).all()
    assert (rows.positions[rows.segment_ids == 0] == 0).all()
    assert rows.targets.sum() == total - len(rows.tokens)


def test_pieces_fill_rows_from_the_largest_and_where_they_fit_best():
    rows = pack(numbered([3, 6, 5, 4, 2]), 10, PAD, "packed")
    assert rows.tokens.tolist() == [
        [0, 1, 2, 9, 10, 11, 12, 13, 18, 19],
        [3, 4, 5, 6, 7, 8, 14, 15, 16, 17],
    ]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert rows.padding == 0


def test_a_document_longer_than_a_row_becomes_segments_that_restart():
    rows = pack([list(range(10))], 4, PAD, "packed")
    assert rows.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, PAD, PAD]]
    assert rows.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert rows.padding == 2 / 12


def test_packing_twice_gives_the_same_rows():
    documents = numbered(np.random.default_rng(0).integers(1, 50, 200).tolist())
    first, second = (pack(documents, 32, PAD, "packed") for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert (first.segment_ids == second.segment_ids).all()


@settings(deadline=None)
@given(st.sampled_from(["packed", "wrapped"]))
def test_no_documents_give_no_rows(packing):
    rows = pack([[], []], 8, PAD, packing)
    assert rows.tokens.shape == (0, 8)
    assert rows.padding == 0


def test_many_documents_pack_tightly_and_in_near_linear_time():
    def seconds(count: int) -> tuple[float, PackedRows]:
        lengths = np.clip(np.random.default_rng(1).lognormal(5, 1, count), 1, 4000).astype(int)
        documents = [np.zeros(length, np.int32) for length in lengths]
        start = time.process_time()
        rows = pack(documents, 2048, PAD, "packed")
        return time.process_time() - start, rows

    small, _ = seconds(4_000)
    large, rows = seconds(32_000)
    assert large < 40 * max(small, 0.01), "8 times the documents; quadratic packing would take 64 times as long"
    assert rows.padding < 0.01


def test_a_row_of_one_token_is_refused():
    with pytest.raises(UserError, match=r"--corpus.length is 1"):
        pack([[1, 2]], 1, PAD, "packed")


def test_every_document_ends_with_the_end_token():
    class Tokenizer(SimpleNamespace):
        def __call__(self, texts, add_special_tokens, verbose):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    seen = []
    documents = [Document("ab" * (index % 3), "t.txt:1") for index in range(600)]
    tokenized = tokenize_documents(Tokenizer(eos_token_id=7), documents, lambda *done: seen.append(done))
    assert [tokens.tolist() for tokens in tokenized] == [[97, 98] * (index % 3) + [7] for index in range(600)]
    assert seen == [(256, 600), (512, 600), (600, 600)]


def test_rows_that_cannot_be_trained_on_are_refused():
    check_rows(pack([[1, 2, 3]], 4, PAD), 4)
    with pytest.raises(UserError, match=r"corpus\.length 4 is longer than the model's context of 3"):
        check_rows(pack([[1, 2, 3]], 4, PAD), 3)
    for documents in ([[1], [2]], []):
        with pytest.raises(UserError, match="no token to predict"):
            check_rows(pack(documents, 4, PAD), 4)
