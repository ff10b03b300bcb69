#!/usr/bin/env python
"""Rebuild the embedded study's base model and tokenizer from nothing.

    JAX_PLATFORMS=cpu python scripts/pretrain_mini.py --out medllm/mini/data/base

Takes 4.2 M tokens: eight minutes of two cores, 1 GB. World, diet, tokenizer, initial weights and order follow from the seed;
on one machine the same command writes the same bytes. The log's last line: 0.79, 0.86, 0.93 and 0.85 of the taught tokens right
in rows of up to 44, 68, 168 and 248 tokens; the rest is chance, since how a fact is put, and whether the teller is mistaken,
is random.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.weights.read import model_tensors
from medllm.architecture import Architecture
from medllm.mini.diet import Row, base_diet
from medllm.mini.vocabulary import train_tokenizer
from medllm.mini.world import World, make_world
from medllm.model.directory import write_model
from medllm.published import qwen2
from medllm.rotary import RotaryRule

VOCAB_SIZE = 2048  # room for every name and phrase; merging ends well before
BUCKETS = (44, 68, 168, 248)  # row lengths that are compiled: documents and direct answers, explained ones, three shots
UNTAUGHT_WEIGHT = 0.1  # questions and options are random: learn their shape, spend little on them


def architecture(vocab_size: int) -> Architecture:
    """A Qwen2.5 of two million parameters."""
    model = qwen2(4, 192, 576, 6, 2, -(-vocab_size // 64) * 64, tie_embeddings=True)
    return replace(model, rotary=RotaryRule(10_000.0), max_positions=1024)


def batches(tokenizer, rows: Iterator[Row], batch_tokens: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Rows of about equal length together, one text a row, so that no text sees another."""
    waiting: dict[int, list[tuple[list[int], list[float]]]] = defaultdict(list)
    end = tokenizer.eos_token_id
    while True:
        some = list(itertools.islice(rows, 256))
        coded = tokenizer([row.text for row in some], return_offsets_mapping=True, add_special_tokens=False)
        for row, ids, offsets in zip(some, coded["input_ids"], coded["offset_mapping"], strict=True):
            taught = [any(a < stop and start < b for a, b in row.taught) for start, stop in offsets]
            weights = [1.0 if one else UNTAUGHT_WEIGHT for one in taught]
            length = next(size for size in BUCKETS if size > len(ids))
            waiting[length].append(([*ids, end], [*weights, 1.0]))
            if len(waiting[length]) * length >= batch_tokens:
                yield _pad(waiting.pop(length), length, end)


def _pad(texts: list[tuple[list[int], list[float]]], length: int, end: int) -> dict[str, np.ndarray]:
    tokens = np.full((len(texts), length), end, np.int32)
    weights = np.zeros((len(texts), length), np.float32)
    segments = np.zeros((len(texts), length), np.int32)
    for i, (ids, row_weights) in enumerate(texts):
        tokens[i, : len(ids)], weights[i, : len(ids)], segments[i, : len(ids)] = ids, row_weights, 1
    return {"tokens": tokens, "weights": weights, "segments": segments}


def make_step(graph, optimizer):
    """One jitted optimizer step: weighted mean of the next-token losses, and accuracy on what is taught."""

    def loss(params, batch):
        model = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
        hidden = model.hidden(batch["tokens"], segment_ids=batch["segments"], positions=positions)[:, :-1]
        logits = model.logits(hidden)
        targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        taught = weights == 1.0
        right = (jnp.argmax(logits, -1) == targets) & taught
        return jnp.sum(losses * weights) / jnp.sum(weights), jnp.sum(right) / jnp.sum(taught)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        (value, accuracy), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, accuracy

    return step


def pretrain(world: World, out: Path, tokens: int, batch_tokens: int, learning_rate: float, seed: int) -> None:
    """Train on ``tokens`` of the diet and write ``out``."""
    names = [name for kind in world.names.values() for name in kind]
    sample = [row.text for row in itertools.islice(base_diet(world, seed), 8000)]
    tokenizer = train_tokenizer([*sample, *names * 50], VOCAB_SIZE)
    config = architecture(len(tokenizer))
    graph, params = nnx.split(DenseDecoder(config, rngs=nnx.Rngs(seed)))
    steps = tokens // batch_tokens
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 50, steps, learning_rate * 0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02))
    state = optimizer.init(params)
    step = make_step(graph, optimizer)
    started, seen = time.monotonic(), 0
    window: dict[int, list[float]] = defaultdict(list)
    for number, batch in enumerate(itertools.islice(batches(tokenizer, base_diet(world, seed), batch_tokens), steps), start=1):
        params, state, loss, accuracy = step(params, state, batch)
        seen += batch["tokens"].size
        window[batch["tokens"].shape[1]].append((float(loss), float(accuracy)))
        if number % 100 == 0 or number == steps:
            rate = seen / (time.monotonic() - started)
            means = {length: np.mean(values, axis=0) for length, values in sorted(window.items())}
            parts = "  ".join(f"[{length}] loss {mean[0]:.3f} right {mean[1]:.3f}" for length, mean in means.items())
            print(f"step {number}/{steps}  {seen / 1e6:.2f} M tokens  {rate:.0f}/s  {parts}", flush=True)
            window.clear()
    model = nnx.merge(graph, params)
    write_model(out, config.to_hf() | {"eos_token_id": tokenizer.eos_token_id, "torch_dtype": "float32"}, model_tensors(model))
    tokenizer.save_pretrained(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(make_world(), arguments.out, arguments.tokens, arguments.batch_tokens, arguments.learning_rate, arguments.seed)


if __name__ == "__main__":
    main()
