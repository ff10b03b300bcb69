"""A model as either stack opened it: its logits, and greedy texts that are the same of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jax_medllm.generate.cached_decoder import Decoder
from jax_medllm.generate.queue import generate
from jax_medllm.weights.read import load_model
from medllm.config import ModelConfig, Sampling
from parity_tests.oracle import row_logits
from parity_tests.packed_rows import rows
from parity_tests.tiny_models import VOCAB
from torch_ref.model import open_model

NEW = 10


def logits(model: Any) -> np.ndarray:
    """Of :func:`parity_tests.packed_rows.rows`, but for padding, by a model of either stack."""
    tokens, segments, positions = rows()
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            found = row_logits(model, tokens, segments, positions).numpy()
    else:
        found = np.asarray(model.logits(model.hidden(tokens, segment_ids=segments, positions=positions)))
    return found[segments != 0]


def check_greedy_texts(opened: ModelConfig, count: int) -> None:
    """So many random prompts go on as transformers has them go on, token for token."""
    prompts = np.random.default_rng(0).integers(0, VOCAB, (count, 9))
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 0}
    ids = torch.from_numpy(prompts)
    expected = open_model(opened).generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, 9:].tolist()
    found = generate(Decoder(load_model(opened), (VOCAB,)), prompts.tolist(), Sampling(max_new_tokens=NEW), str, count)
    assert [list(generation.tokens) for (generation,) in found] == expected
