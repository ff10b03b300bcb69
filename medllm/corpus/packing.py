"""Documents → rows of equal length for continued pretraining.

``packed`` fills rows best-fit-decreasing and keeps documents apart; a document longer than a row is cut into row-sized
pieces, each a segment of its own. ``wrapped`` writes all documents into one stream and cuts it anywhere::

    length 8, documents AAAAA BBB CCCC                packed                 wrapped
                                                 A A A A A B B B        A A A A A B B B
                                    segments     1 1 1 1 1 2 2 2        1 1 1 1 1 1 1 1
                                                 C C C C · · · ·        C C C C · · · ·
                                    segments     1 1 1 1 0 0 0 0        1 1 1 1 0 0 0 0
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int, Int32
from numpy import ndarray

from medllm.errors import UserError
from medllm.host.progress import Progress
from medllm.model.tokenizer import encode_texts, end_token

if TYPE_CHECKING:
    from medllm.corpus.documents import Document

_TOKENIZED_AT_A_TIME = 256
_NAMED = 8
"""Documents that a message names."""


def target_mask(segment_ids: Int[Any, "b s"]) -> Bool[Any, "b s-1"]:
    """True where the *next* position is a training target: same segment, and no padding. Any framework's arrays."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)


@dataclass(frozen=True)
class PackedRows:
    """Token rows of equal length.

    Attributes:
        tokens: Token ids; padding positions hold the pad token.
        segment_ids: 1, 2, 3 … for the documents of a row, 0 for padding. A position sees only its own segment.
        positions: Position inside the document; restarts at 0 with each segment.
        documents: Which documents each row has something of, by their numbers; empty where that is not known.
        sources: Where each document is from, by its number; empty where that is not known.
    """

    tokens: Int32[ndarray, "rows length"]
    segment_ids: Int32[ndarray, "rows length"]
    positions: Int32[ndarray, "rows length"]
    documents: Sequence[Sequence[int]] = ()
    sources: Sequence[str] = ()

    def named(self, rows: Sequence[int]) -> str:
        """What a user knows ``rows`` by: the documents in them, else their numbers."""
        if not self.documents:
            return f"rows {', '.join(str(row) for row in rows)}"
        numbers = list(dict.fromkeys(number for row in rows for number in self.documents[row]))
        names = [self.sources[number] if self.sources else str(number + 1) for number in numbers]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"documents {', '.join(dict.fromkeys(names[:_NAMED]))}{more}"

    @property
    def targets(self) -> Bool[ndarray, "rows length"]:
        """True where a token is predicted from the one before it: the tokens the loss is taken over."""
        return np.pad(target_mask(self.segment_ids), ((0, 0), (1, 0)))

    def with_targets(self) -> PackedRows:
        """The rows that train something: one that holds a single token of each document in it predicts none."""
        kept = self.targets.any(axis=1)
        documents = [numbers for numbers, trains in zip(self.documents, np.asarray(kept), strict=False) if trains]
        return PackedRows(self.tokens[kept], self.segment_ids[kept], self.positions[kept], documents, self.sources)

    @property
    def padding(self) -> float:
        """Fraction of all positions that hold padding (0 for no rows)."""
        return float(np.mean(self.segment_ids == 0)) if self.segment_ids.size else 0.0


def tokenize_documents(
    tokenizer: Any, documents: Sequence[Document], progress: Progress | None = None
) -> list[Int32[ndarray, "_"]]:
    """Token ids of each document, its end-of-text token appended.

    Arrays rather than lists: a corpus of a billion tokens is 4 GB this way, and 36 GB as Python integers.

    Args:
        tokenizer: A fast tokenizer from :func:`medllm.model.tokenizer.load_tokenizer`.
        documents: What :func:`medllm.corpus.documents.load_documents` found.
        progress: Called with (documents done, documents in all).
    """
    end = end_token(tokenizer)
    tokenized = []
    for start in range(0, len(documents), _TOKENIZED_AT_A_TIME):
        texts = [document.text for document in documents[start : start + _TOKENIZED_AT_A_TIME]]
        tokenized += [np.asarray([*ids, end], dtype=np.int32) for ids in encode_texts(tokenizer, texts)]
        if progress:
            progress(len(tokenized), len(documents))
    return tokenized


def pack(
    token_documents: Sequence[Sequence[int] | Int[ndarray, "_"]],
    length: int,
    pad_id: int,
    packing: Literal["packed", "wrapped"] = "packed",
) -> PackedRows:
    """Lay tokenized documents into rows; every token appears exactly once and in order inside its document.

    Args:
        token_documents: Token ids of each document, end-of-text token included; empty ones take no room.
        length: Tokens in a row.
        pad_id: Token id of the padding.
        packing: ``packed`` or ``wrapped``, see the module's docstring.

    Raises:
        UserError: rows of fewer than two tokens, which could not hold a single prediction.
    """
    if length < 2:
        raise UserError(f"--corpus.length is {length}: a row needs at least 2 tokens to predict one from the other")
    documents = [np.asarray(tokens, dtype=np.int32) for tokens in token_documents]
    if packing == "wrapped":
        return _wrap(documents, length, pad_id)
    return _pack(documents, length, pad_id)


def check_rows(rows: PackedRows, context: int) -> None:
    """Refuse rows that cannot be trained on.

    Raises:
        UserError: they are longer than the model's ``context``, or hold no token to predict.
    """
    length = rows.tokens.shape[1]
    if length > context:
        raise UserError(f"corpus.length {length} is longer than the model's context of {context}; lower it")
    if not rows.targets.any():
        raise UserError("the corpus has no token to predict: every document is a single token, or empty")


def _wrap(documents: list[ndarray], length: int, pad_id: int) -> PackedRows:
    stream = np.concatenate([np.zeros(0, np.int32), *documents])
    rows = -(-len(stream) // length)
    tokens = np.full(rows * length, pad_id, dtype=np.int32)
    segment_ids = np.zeros(rows * length, dtype=np.int32)
    tokens[: len(stream)] = stream
    segment_ids[: len(stream)] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), rows)
    positions[len(stream) :] = 0
    ends = np.cumsum([len(document) for document in documents])
    starts = np.arange(rows) * length
    first, last = np.searchsorted(ends, starts, "right"), np.searchsorted(ends, starts + length, "left")
    members = [range(begin, min(end + 1, len(documents))) for begin, end in zip(first.tolist(), last.tolist(), strict=True)]
    shape = (rows, length)
    return PackedRows(tokens.reshape(shape), segment_ids.reshape(shape), positions.reshape(shape), members)


def _pack(documents: list[ndarray], length: int, pad_id: int) -> PackedRows:
    numbers = [number for number, tokens in enumerate(documents) for _ in range(0, len(tokens), length)]
    pieces = [tokens[start : start + length] for tokens in documents for start in range(0, len(tokens), length)]
    rows = _best_fit([len(piece) for piece in pieces], length)
    tokens = np.full((len(rows), length), pad_id, dtype=np.int32)
    segment_ids = np.zeros((len(rows), length), dtype=np.int32)
    positions = np.zeros((len(rows), length), dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, start=1):
            end = start + len(pieces[member])
            tokens[row, start:end] = pieces[member]
            segment_ids[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            start = end
    return PackedRows(tokens, segment_ids, positions, [[numbers[member] for member in members] for members in rows])


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing: the largest piece left goes where it leaves the least room, or opens a new row.

    Returns the pieces of each row in their original order, rows in the order of their first piece. At most ``capacity``
    different amounts of room exist, so finding the tightest row is one bisection.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for piece in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[piece]
        tightest = bisect_left(rooms, size)
        if tightest < len(rooms):
            room = rooms[tightest]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[tightest]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - size
        if left:
            candidates = rows_with_room.setdefault(left, [])
            if not candidates:
                insort(rooms, left)
            candidates.append(row)
    return sorted(sorted(row) for row in rows)
