"""What the JAX engine computes on packed rows, through the functions it trains with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam, Rotary, RowContext
from jax_medllm.model.logprobs import token_logprobs
from jax_medllm.model.partly_dense import SomeLayers
from jax_medllm.train.batches import CptBatch
from jax_medllm.train.loop import cpt_loss_fn
from jax_medllm.weights.adapters import TRAINED, adapter_arrays, adapter_tensors, assign
from jax_medllm.weights.read import read_model
from medllm.config import RematPolicy
from medllm.model.adapter import Adapter, read_adapter
from medllm.model.directory import ModelDirectory
from medllm.quantization import Quantization
from parity_tests.packed_rows import Rows, target_mask


class Results(NamedTuple):
    """Residual stream [l+1, b, s, d], logits [b, s, v], log-probabilities [b, s-1], loss, gradients under PEFT's names."""

    states: np.ndarray
    logits: np.ndarray
    logprobs: np.ndarray
    loss: np.ndarray
    gradients: dict[str, np.ndarray]


def open_trainable(base: Path, adapter: Path, dtype: Any, quantization: Quantization = "none") -> DenseDecoder:
    """The model in ``base`` with the PEFT adapter in ``adapter`` as the one that is trained."""
    given = read_adapter(adapter)
    model = read_model(ModelDirectory(base), lora=given.lora, quantization=quantization, dtype=dtype)
    set_adapter(model, given)
    return model


def set_adapter(model: DenseDecoder, adapter: Adapter) -> None:
    """Put an adapter in place of the one that is trained; there is no reference of it."""
    assign(model, adapter_arrays(model, adapter, TRAINED))


def forward_and_backward(model: DenseDecoder, rows: Rows, *, remat: RematPolicy = "none") -> Results:
    """Everything that is compared, of one batch."""
    graph, trainable, rest = nnx.split(model, LoraParam, ...)
    tokens, segment_ids, positions = (jnp.asarray(array) for array in rows)
    batch = CptBatch(tokens, segment_ids, positions, jnp.asarray(1 / target_mask(rows[1]).sum()))
    *found, gradients = _forward_and_backward(graph, trainable, rest, batch, remat)
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), found)
    return Results(*wide, adapter_tensors(nnx.merge(graph, gradients, rest)))


@partial(jax.jit, static_argnums=(0, 4))
def _forward_and_backward(graph: Any, trainable: Any, rest: Any, batch: CptBatch, remat: RematPolicy) -> tuple[Any, ...]:
    def loss(trainable):
        return cpt_loss_fn(nnx.merge(graph, trainable, rest), batch, remat=remat)[0]

    model = nnx.merge(graph, trainable, rest)
    inputs = {"segment_ids": batch.segment_ids, "positions": batch.positions}
    hidden = model.hidden(batch.tokens, **inputs)
    logprobs = token_logprobs(hidden[:, :-1], model.head_weight(), batch.tokens[:, 1:])
    value, gradients = jax.value_and_grad(loss)(trainable)
    return residual_stream(model, batch.tokens, **inputs), model.logits(hidden), logprobs, value, gradients


def residual_stream(model: DenseDecoder, tokens: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """[l+1, b, s, d] after the embedding and after every layer."""
    rotary, context = (
        Rotary.at(positions, model.config, model.dtype),
        RowContext.of(model.config.window, segment_ids, positions),
    )
    graph, whole, layers = nnx.split(model.layers, SomeLayers, ...)

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        x, _ = nnx.merge(graph, whole, layer)(x, rotary, context, True)
        return x, x

    embedded = model.embed_tokens(tokens)
    return jnp.concatenate([embedded[None], jax.lax.scan(step, embedded, layers)[1]])


def jax_loss(model: DenseDecoder, tokens, segment_ids, positions) -> tuple[jax.Array, jax.Array]:
    """Loss as the oracle defines it, from the logits; and the logits."""
    hidden = model.hidden(jnp.asarray(tokens), segment_ids=jnp.asarray(segment_ids), positions=jnp.asarray(positions))
    logits = model.logits(hidden)
    counted = target_mask(segment_ids)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(picked * counted).sum() / counted.sum(), logits
