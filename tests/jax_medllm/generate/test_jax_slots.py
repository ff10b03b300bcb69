"""Which prompt is read when, and in how many tokens: the schedule of generation, over a decoder that only keeps count."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_medllm.generate.cached_decoder import CHUNK
from jax_medllm.generate.queue import generate
from medllm.config import Sampling

END, WORD = 0, 1


@dataclass(frozen=True)
class Rows:
    """What stands in the slots: the tokens left of each row's answer, and those of its own that are stored."""

    left: np.ndarray
    finished: np.ndarray
    length: np.ndarray


@dataclass
class Counting:
    """A decoder whose answer to a prompt is as many words as the prompt's last token says."""

    ends: tuple[int, ...] = (END,)
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(max_positions=100_000))
    prefixes: list[int] = field(default_factory=list)
    read: list[tuple[int, ...]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    looked: list[int] = field(default_factory=list)

    def prefix(self, tokens):
        self.prefixes.append(len(tokens))

    def empty(self, rows, length):
        return Rows(np.zeros(rows, int), np.ones(rows, bool), np.zeros(rows, int))

    def fill(self, slots, prefix, fill):
        self.read.append(fill.prompts.shape)
        left, finished, length = slots.left.copy(), np.array(slots.finished), slots.length.copy()
        for source, target in zip(fill.source, fill.target, strict=True):
            left[target] = fill.prompts[source, fill.lengths[source] - 1]
            finished[target] = False
            length[target] = fill.lengths[source]
        return Rows(left, finished, length)

    def keep(self, slots, rows):
        return Rows(slots.left[rows], slots.finished[rows], slots.length[rows])

    def extend(self, slots, prefix, sampling, stored):
        self.steps.append(len(slots.left))
        self.looked.append(stored)
        assert (slots.length[~slots.finished] <= stored).all(), "what a row has stored is read"
        made = np.where(np.arange(CHUNK) < slots.left[:, None], WORD, END)
        length = slots.length + np.minimum(slots.left + 1, CHUNK)
        return Rows(np.maximum(slots.left - CHUNK, 0), slots.finished | (slots.left < CHUNK), length), jnp.asarray(made)


def answers(decoder, prompts, batch_size, max_new_tokens=5000, **sampling):
    asked_for = Sampling(max_new_tokens=max_new_tokens, **sampling)
    found = generate(decoder, prompts, asked_for, lambda tokens: "w" * len(tokens), batch_size)
    return [[len(generation.tokens) for generation in row] for row in found]


def asked(lengths, own=10, header=()):
    return [[*header, *(100 + i, *[7] * (own - 2)), length] for i, length in enumerate(lengths)]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 70)), min_size=1, max_size=40),
    st.integers(1, 33),
    st.integers(1, 5),
    st.integers(0, 80),
)
def test_every_prompt_gets_its_answers_whatever_the_slots(problems, batch_size, samples, header):
    prompts = [[7] * header + [i + 100] * own + [length] for i, (own, length) in enumerate(problems)]
    found = answers(Counting(), prompts, batch_size, samples=samples, temperature=1.0)
    assert found == [[length] * samples for _, length in problems]


def test_a_step_reads_hardly_more_than_is_stored_and_few_steps_are_compiled():
    decoder = Counting()
    answers(decoder, asked([1999, 1999]), 2, max_new_tokens=2000)
    stored = 10 + CHUNK * np.arange(len(decoder.looked))
    assert len(set(decoder.looked)) == 4
    assert (np.array(decoder.looked) - stored).max() < 2000 / 4 + CHUNK + 32
    assert decoder.looked == sorted(decoder.looked)
    short = Counting()
    answers(short, asked([90]), 1, max_new_tokens=90)
    assert len(set(short.looked)) == 1, "a short text is not worth a second compilation"


def test_one_long_answer_holds_up_nothing():
    decoder = Counting()
    chunks = 12
    # Each short answer takes one chunk; with one row of four held by the long one, three rows take the others.
    lengths = [CHUNK * chunks - 1, *[CHUNK - 1] * (3 * chunks)]
    assert answers(decoder, asked(lengths), 4) == [[length] for length in lengths]
    assert len(decoder.steps) == chunks


def test_a_free_row_does_not_wait_for_a_quarter_of_a_large_batch():
    decoder = Counting()
    # After the first chunk two rows of 32 are free at a time.
    lengths = [CHUNK * (1 + i // 2) - 1 for i in range(32)] + [CHUNK - 1] * 30
    answers(decoder, asked(lengths), 32)
    assert len(decoder.steps) == 16
    assert min(rows for rows, _ in decoder.read) == 2


def test_the_last_answers_go_on_in_a_smaller_batch():
    decoder = Counting()
    answers(decoder, asked([CHUNK * 20 - 1, CHUNK * 10 - 1, *[CHUNK - 1] * 30]), 32)
    assert decoder.steps == [32] + [2] * 19


def test_prompts_are_read_with_others_of_like_length():
    decoder = Counting()
    own = np.random.default_rng(0).integers(20, 400, 64)
    prompts = [[100 + i] * n + [5] for i, n in enumerate(own)]
    answers(decoder, prompts, 32)
    padded = sum(rows * size for rows, size in decoder.read)
    assert padded < 1.35 * (own + 1).sum()
    assert len(set(decoder.read)) <= 8, "every shape is compiled"


def test_the_samples_of_a_prompt_read_it_once():
    decoder = Counting()
    answers(decoder, asked([CHUNK - 1] * 16), 16, samples=4, temperature=1.0)
    assert sum(rows for rows, _ in decoder.read) <= 2 * 16  # room for a prompt whose samples are split over two reads


@pytest.mark.parametrize(("first", "second"), [(20, 20), (40, 3)])
def test_a_header_is_read_once_by_each_family_of_prompts(first, second):
    decoder = Counting()
    one, two = list(range(1000, 2000)), list(range(3000, 3700))
    prompts = asked([5] * first, header=one) + asked([6] * second, header=two)
    found = generate(decoder, prompts[::-1], Sampling(max_new_tokens=8), lambda tokens: "w" * len(tokens), 8)
    assert [len(generation.tokens) for (generation,) in found] == [6] * second + [5] * first
    assert sorted(decoder.prefixes) == [672, 992]
    assert sum(rows * size for rows, size in decoder.read) < 100 * (first + second)


def test_prompts_with_little_in_common_stay_in_one_batch():
    decoder = Counting()
    answers(decoder, asked([5] * 4, header=range(1000, 1064)) + asked([6] * 4, header=range(3000, 3064)), 8)
    assert decoder.prefixes == [0]
    assert decoder.steps == [8]
