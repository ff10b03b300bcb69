"""How much of what is computed is padding: on the real folders, and on invented lengths of like shape."""

from __future__ import annotations

import os
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from jax_medllm.train.batches import PreferenceData
from medllm.config import PairConfig, TrainingConfig
from medllm.corpus.documents import load_documents
from medllm.corpus.packing import pack, tokenize_documents
from medllm.exam.loaders import load_problems
from medllm.exam.prompts import curation_prompt, curation_response
from medllm.model.tokenizer import load_tokenizer
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import TokenizedGroup, tokenize_preferences
from medllm.stage_config import CorpusConfig

GROUP_PADDING = 0.10
ROW_PADDING = 0.02
BATCHES = list(product((1, 2, 4), (1, 4, 16)))
MOST_LENGTHS = 16


@pytest.fixture(scope="module")
def real():
    """The folder of real documents and problems, and Qwen2.5's tokenizer."""
    data, tokenizer = os.environ.get("MEDLLM_REAL_DATA"), os.environ.get("QWEN_TOKENIZER_DIR")
    if not data or not tokenizer:
        pytest.skip("set MEDLLM_REAL_DATA to a folder with jmed/ and yakugakuqa/, QWEN_TOKENIZER_DIR to Qwen2.5's tokenizer")
    return Path(data), load_tokenizer(tokenizer)


def real_groups(real, shots, most):
    """Problems in the curation template; chosen and rejected samples are explanations of other problems, up to four of each."""
    folder, tokenizer = real
    draw = random.Random(0)
    problems = [problem for problem in load_problems(folder / "yakugakuqa").problems if problem.explanation]

    def sample(problem):
        return Sample(curation_response(problem, answer_as="letters"), "a")

    def preference(problem):
        examples = [other for other in draw.sample(problems, shots + 1) if other is not problem][:shots]
        chosen, rejected = (tuple(sample(draw.choice(problems)) for _ in range(draw.randint(0, 4))) for _ in range(2))
        return Preference(problem.problem_id, curation_prompt(problem, examples), sample(problem), chosen, rejected)

    config = PairConfig(max_chosen=most, max_rejected=most)
    return tokenize_preferences(tokenizer, [preference(problem) for problem in problems], config).groups


def invented_groups(shots, most, count=1200):
    """Lengths drawn as the real ones are distributed: skewed, from a few dozen tokens to ten times the median."""
    draw = np.random.default_rng(0)

    def lengths(median, spread, size):
        return np.clip(np.exp(draw.normal(np.log(median), spread, size)), 8, 8 * median).astype(int).tolist()

    def group(index):
        (prompt,) = lengths(150, 0.6, 1)
        header = lengths(350, 0.5, shots)
        numbers = [draw.integers(0, 5) for _ in range(2)] if most == 0 else [draw.integers(0, 2) for _ in range(2)]
        responses = lengths(170, 0.7, 1 + max(1, sum(numbers)))
        pairs = tuple((0, low) for low in range(1, len(responses)))
        tokens = tuple((7,) * length for length in responses)
        return TokenizedGroup(f"p{index}", (7,) * (prompt + sum(header)), tokens, (), pairs, (0,) * len(pairs))

    return [group(index) for index in range(count)]


def check_padding(groups):
    """Under a tenth, in few lengths, whatever the batch."""
    for size, accumulation in BATCHES:
        data = PreferenceData(groups, TrainingConfig(epochs=1, batch_size=size, accumulation=accumulation))
        steps = data.steps
        rows = [batch.responses for step in steps for batch in data.batches(step)]
        positions = sum(batch.segment_ids.size for batch in rows)
        padding = sum((batch.segment_ids == 0).sum() for batch in rows) / positions
        assert data.padding == pytest.approx(padding, abs=1e-12)
        lengths = {batch.segment_ids.shape[1] for batch in rows}
        print(f"batch_size {size} accumulation {accumulation}: {padding:.4f} in {len(lengths)} lengths")
        assert padding < GROUP_PADDING, (size, accumulation)
        assert len(lengths) <= MOST_LENGTHS


@pytest.mark.parametrize("most", [1, 0], ids=["one sample of each rank", "all samples"])
@pytest.mark.parametrize("shots", [0, 3])
def test_under_a_tenth_of_the_real_groups_is_padding(real, shots, most):
    groups = real_groups(real, shots, most)
    assert len(groups) > 1000
    check_padding(groups)


@pytest.mark.parametrize("most", [1, 0], ids=["one sample of each rank", "all samples"])
@pytest.mark.parametrize("shots", [0, 3])
def test_under_a_tenth_of_groups_of_uneven_lengths_is_padding(shots, most):
    groups = invented_groups(shots, most)
    sizes = [len(group.prompt) + sum(map(len, group.responses)) for group in groups]
    assert max(sizes) > 2 * np.median(sizes) > 4 * min(sizes) / 1.5
    check_padding(groups)


@pytest.mark.parametrize("length", [2048, 4096])
def test_under_two_hundredths_of_the_real_rows_are_padding(real, length):
    folder, tokenizer = real
    problems = tuple(str(file) for file in sorted((folder / "yakugakuqa").glob("*.jsonl")))
    documents = load_documents(CorpusConfig(documents=(str(folder / "jmed"),), problems=problems)).documents
    rows = pack(tokenize_documents(tokenizer, documents), length, tokenizer.pad_token_id)
    print(f"length {length}: {rows.padding:.4f} of {len(rows.tokens)} rows")
    assert rows.padding < ROW_PADDING


def test_under_two_hundredths_of_rows_of_uneven_documents_are_padding():
    draw = np.random.default_rng(0)
    documents = [np.full(int(length), 7) for length in np.exp(draw.normal(np.log(380), 0.6, 1700)) + 1]
    assert max(map(len, documents)) > 5 * np.median([len(document) for document in documents])
    for length in (2048, 4096):
        assert pack(documents, length, 0).padding < ROW_PADDING
