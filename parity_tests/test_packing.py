"""Packed rows against the packing of transformers and TRL: the documents of each row, positions, labels, logits, loss."""

from __future__ import annotations

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Qwen2ForCausalLM
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from jax_medllm.train.batches import Step, cpt_step
from jax_medllm.train.loop import cpt_loss_fn
from jax_medllm.weights.read import read_model
from medllm.corpus.packing import PackedRows, pack
from medllm.model.directory import ModelDirectory
from parity_tests.jax_results import jax_loss
from parity_tests.tiny_models import VOCAB
from parity_tests.tolerances import FLOAT32_FORWARD
from torch_ref.cpt import RowFeatures

LENGTH = 24
IGNORED = -100


def documents(seed: int = 0, count: int = 40, longest: int = LENGTH) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length) for length in rng.integers(1, longest + 1, count)]


def rows_of_trl(token_documents: list[np.ndarray], strategy: str) -> list[dict[str, list[int]]]:
    dataset = Dataset.from_dict({"input_ids": [tokens.tolist() for tokens in token_documents]})
    return list(pack_dataset(dataset, LENGTH, strategy))


def documents_of(rows: PackedRows) -> list[list[list[int]]]:
    """The documents of each row."""
    return [
        [tokens[segments == segment].tolist() for segment in range(1, segments.max() + 1)]
        for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [LENGTH, 3 * LENGTH], ids=["all fit", "some are split"])
def test_rows_hold_trls_pieces_and_are_as_full_as_trls(seed, longest):
    """Which of two rows with equal room takes a piece is a tie: it changes neither the pieces nor how full rows become."""
    given = documents(seed, longest=longest)
    theirs = []
    for row in rows_of_trl(given, "bfd_split"):
        ends = np.cumsum(row["seq_lengths"])
        theirs.append([row["input_ids"][end - size : end] for end, size in zip(ends, row["seq_lengths"], strict=True)])
    ours = documents_of(pack(given, LENGTH, 0))
    assert sorted(chain(*ours)) == sorted(chain(*theirs))
    assert sorted(sum(map(len, row)) for row in ours) == sorted(sum(map(len, row)) for row in theirs)


def test_wrapped_rows_are_trls():
    given = documents(longest=2 * LENGTH)
    rows = pack(given, LENGTH, 0, "wrapped")
    ours = [tokens[segments > 0].tolist() for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True)]
    assert ours == [row["input_ids"] for row in rows_of_trl(given, "wrapped")]


def row_features(rows: PackedRows, index: int) -> dict[str, list[int]]:
    """What the reference recipe trains on, of one row, its padding taken off."""
    real = rows.segment_ids[index] > 0
    return {name: values[torch.from_numpy(real)].tolist() for name, values in RowFeatures(rows)[index].items()}


def test_positions_and_labels_are_those_of_both_collators():
    rows = pack(documents(), LENGTH, 0)
    assert (rows.segment_ids == 0).any()
    for index, parts in enumerate(documents_of(rows)):
        ours = row_features(rows, index)
        packed = {"input_ids": list(chain(*parts)), "seq_lengths": [len(part) for part in parts]}
        flattened = DataCollatorWithFlattening()([{"input_ids": part} for part in parts])
        of_trl = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed])
        for theirs in (flattened, of_trl):
            for name in ("input_ids", "position_ids", "labels"):
                assert ours[name] == theirs[name][0].tolist(), f"row {index}: {name}"
        targets = np.array(ours["labels"]) != IGNORED
        np.testing.assert_array_equal(rows.targets[index][rows.segment_ids[index] > 0], targets)


def test_a_padding_free_batch_of_transformers_has_our_logits_and_loss(tiny_model):
    """transformers finds the documents of its flattened batch in ``position_ids``; ours have segment ids and padding."""
    base = tiny_model()
    rows = pack(documents(count=12), LENGTH, 0)
    count = len(rows.tokens)
    features = [{"input_ids": part} for parts in documents_of(rows) for part in parts]
    batch = {name: value for name, value in DataCollatorWithFlattening()(features).items() if torch.is_tensor(value)}
    stock = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(**batch, use_cache=False)
    model = read_model(ModelDirectory(base))
    real = rows.segment_ids > 0
    _, logits = jax_loss(model, rows.tokens, rows.segment_ids, rows.positions)
    FLOAT32_FORWARD.assert_close(logits[real], expected.logits[0], "logits")
    (micro_batch,) = jax.tree.map(jnp.asarray, cpt_step(rows, Step(0, (tuple(range(count)),))))
    loss, _ = cpt_loss_fn(model, micro_batch)
    FLOAT32_FORWARD.assert_close(loss, expected.loss, "loss")
