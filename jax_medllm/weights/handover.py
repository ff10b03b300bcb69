r"""What each hand-over of an adapter costs, measured on the opened models: in the weights and in what the model says.

With the unquantized weight :math:`W` and the adapter's update :math:`U = s\,BA`, the exact model has :math:`W + U`. After

- ``merge`` it has :math:`Q(W + U)`: what is written is rounded to the stored type, then quantized by whoever trains on it,
- ``stack`` and ``continue`` it has :math:`Q(W) + U`.

The relative weight error is :math:`\lVert\hat W - (W + U)\rVert / \lVert W + U\rVert` (Frobenius). What the model says differs
by :math:`\mathrm{KL}(p_\text{exact} \Vert p_\text{handed over})`, in nats, averaged over the positions of a held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.weights.read import model_tensors, read_model
from medllm.corpus.packing import PackedRows
from medllm.host.progress import Progress
from medllm.model.adapter import Adapter
from medllm.model.directory import ModelDirectory
from medllm.quantization import Quantization

_ROWS = 4
_LOGITS_IN_FLIGHT = 2**24


@dataclass(frozen=True)
class HandoverError:
    """How far a handed-over model is from the exact one.

    Attributes:
        handover: ``merge``, ``stack`` or ``continue``.
        weight_error: Relative error over all adapted weights together.
        worst_weight: The adapted weight with the largest relative error of its own.
        worst_weight_error: That error.
        kl: KL(exact ‖ handed over), nats a token.
    """

    handover: str
    weight_error: float
    worst_weight: str
    worst_weight_error: float
    kl: float


def handover_errors(
    base: ModelDirectory,
    adapters: Sequence[Adapter],
    merged: ModelDirectory,
    rows: PackedRows,
    quantization: Quantization,
    progress: Progress = lambda done, total, doing="": None,
) -> list[dict[str, Any]]:
    """Errors of the three hand-overs (the fields of :class:`HandoverError`). All arithmetic is fp32.

    Two models are held at a time: the exact one, and one that was handed over.

    Args:
        base: The unquantized weights.
        adapters: Adapters that were merged.
        merged: What :func:`medllm.model.adapter.merge_adapter` wrote, dense or already in 4 bits.
        rows: Held-out text.
        quantization: How the second stage stores its frozen weights.
        progress: Called with (models measured, models in all).

    Raises:
        UserError: a model cannot be read.
    """
    exact = read_model(base, adapter=adapters)
    expected = _hidden(exact, rows)
    progress(1, 3)
    adapted = {f"{module}.weight" for adapter in adapters for module in adapter.modules()}
    beside = partial(read_model, base, adapter=adapters, quantization=quantization)
    into = partial(read_model, merged, quantization=quantization)
    errors = []
    for done, (names, opened) in enumerate(((("merge",), into), (("stack", "continue"), beside)), 2):
        model = opened()
        total, worst, worst_error = _weight_errors(exact, model, adapted)
        kl = _mean_kl(exact, expected, model, _hidden(model, rows))
        errors += [asdict(HandoverError(name, total, worst, worst_error, kl)) for name in names]
        del model
        progress(done, 3)
    return errors


def _weight_errors(exact: DenseDecoder, model: DenseDecoder, adapted: set[str]) -> tuple[float, str, float]:
    """(relative error over the adapted weights, the worst one's name, its relative error), a weight at a time."""
    difference, norm = 0.0, 0.0
    worst, worst_error = "", -1.0
    for (name, expected), (_, found) in zip(model_tensors(exact), model_tensors(model), strict=True):
        if name not in adapted:
            continue
        wide = expected.astype(np.float64)
        here, size = float(np.sum((found - wide) ** 2)), float(np.sum(wide**2))
        difference, norm = difference + here, norm + size
        if here > worst_error**2 * size or worst_error < 0:
            worst, worst_error = name, math.sqrt(here / size) if size else 0.0
    return math.sqrt(difference / norm), worst, worst_error


def _hidden(model: DenseDecoder, rows: PackedRows) -> Float[np.ndarray, "n d"]:
    """Final hidden states of all positions that are no padding, a few rows at a time."""
    found = []
    for start in range(0, len(rows.tokens), _ROWS):
        parts = (rows.tokens, rows.segment_ids, rows.positions)
        tokens, segment_ids, positions = (_first_rows(part[start : start + _ROWS]) for part in parts)
        hidden = np.asarray(_forward(model, tokens, segment_ids, positions))
        found.append(hidden[segment_ids != 0])
    return np.concatenate(found)


def _first_rows(part: np.ndarray) -> np.ndarray:
    """Filled up with rows of padding (segment 0), so that one compilation serves all batches."""
    return np.pad(part, ((0, _ROWS - len(part)), (0, 0)))


@jax.jit
def _forward(model: DenseDecoder, tokens: Array, segment_ids: Array, positions: Array) -> Float[Array, "b s d"]:
    return model.hidden(tokens, segment_ids=segment_ids, positions=positions)


def _mean_kl(exact: DenseDecoder, expected: np.ndarray, model: DenseDecoder, found: np.ndarray) -> float:
    """Mean over positions, the logits a chunk at a time."""
    chunk = max(1, min(len(expected), _LOGITS_IN_FLIGHT // exact.config.vocab_size))
    total = 0.0
    for start in range(0, len(expected), chunk):
        pair = [
            np.pad(part, ((0, chunk - len(part)), (0, 0)))
            for part in (expected[start : start + chunk], found[start : start + chunk])
        ]
        each = np.asarray(_kl(exact, pair[0], model, pair[1]), np.float64)
        total += float(each[: len(expected) - start].sum())
    return total / len(expected)


@jax.jit
def _kl(
    exact: DenseDecoder, expected: Float[Array, "n d"], model: DenseDecoder, found: Float[Array, "n d"]
) -> Float[Array, " n"]:
    p, q = (jax.nn.log_softmax(one.logits(hidden)) for one, hidden in ((exact, expected), (model, found)))
    # p(log p − log q) with Σp(q/p − 1) = 0 added: no term is negative, so small divergences do not cancel away.
    return jnp.sum(jnp.exp(p) * (jnp.expm1(q - p) - (q - p)), axis=-1)
