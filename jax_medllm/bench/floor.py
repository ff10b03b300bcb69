"""Times the operations of a training step one by one, as the product's own modules compute them (:mod:`medllm.bench.floor`).

A backward pass is timed alone: the forward pass runs before, and what it leaves is an argument. So are weights and masks: of
constants the compiler would compute ahead what a step computes each time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.model import linear
from jax_medllm.model.attention import Visibility, attend
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.logprobs import token_logprobs
from medllm.bench.floor import LAYERS, TARGETS
from medllm.bench.shapes import ModelShape
from medllm.config import LoraConfig

_LEAST_RUNS = 3

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""An operation's name, a function and its arguments."""


def floor(*, model: dict[str, Any], rows: int, length: int, seconds: float) -> dict[str, Any]:
    """Seconds of each operation, median; operations a second of a matrix product and bytes a second of a copy here."""
    shape = ModelShape(**model)
    x, wide = (_random(key, rows * length, width, dtype=shape.dtype) for key, width in enumerate((shape.width, shape.mlp)))
    weight = _random(2, shape.mlp, shape.width, dtype=shape.dtype)

    def rates() -> tuple[float, float]:
        product = 2 * rows * length * shape.width * shape.mlp / _median(jax.jit(linear.matmul), (x, weight), seconds)
        return product, 2 * wide.nbytes / _median(jax.jit(lambda array: array + 1), (wide,), seconds)

    before = rates()
    found = {name: _median(jax.jit(function), given, seconds) for name, function, given in _cases(shape, rows, length)}
    matrix, copy = (max(pair) for pair in zip(before, rates(), strict=True))  # other work on the machine slows either
    return {"matrix_flops": matrix, "copy_bytes": copy, "seconds": found}


def _cases(shape: ModelShape, rows: int, length: int) -> Iterator[Case]:
    shape = replace(shape, layers=min(LAYERS, shape.layers))
    lora = LoraConfig(rank=shape.rank)
    model = DenseDecoder(shape.architecture, lora=lora, quantization=shape.quantization, dtype=shape.dtype, rngs=nnx.Rngs(0))
    for target in TARGETS:
        yield from _linear(getattr(model.layers.mlp, target), target, shape.dtype, rows, length)
    yield from _attention(shape, rows, length)
    yield from _head(model, rows, length)
    yield from _elementwise(model, shape, rows, length)
    yield from _layers(model, shape, rows, length)


def _linear(layers: linear.Linear, target: str, dtype: str, rows: int, length: int) -> Iterator[Case]:
    out, width = (axis.size for axis in layers.axes)
    x, g = (_random(key, rows, length, size, dtype=dtype) for key, size in enumerate((width, out)))
    graph, state = nnx.split(layers)
    first = jax.tree.map(lambda array: array[0], state)

    def dense(x: Array, state: Any) -> Array:
        return nnx.merge(graph, state)(x, adapter=False)

    yield f"{target}: x Wᵀ", dense, (x, first)
    yield _backward(f"{target}: g W", dense, g, x, first)
    lora = nnx.merge(graph, first).lora
    parts: Any = nnx.split(lora, nnx.PathContains("A"), nnx.PathContains("B"), ...)
    split, a, b, *rest = parts

    def low(x: Array, a: Any, b: Any, rest: Any) -> Array:
        adapter: Any = nnx.merge(split, a, b, *rest)
        return adapter(x)

    yield f"{target} LoRA: (x Aᵀ) Bᵀ", low, (x, a, b, rest)
    yield _backward(f"{target} LoRA: (g B) A", low, g, x, a, b, rest)
    yield _backward(f"{target} LoRA: dA = (g B)ᵀ x", lambda a, x, b, rest: low(x, a, b, rest), g, a, x, b, rest)
    yield _backward(f"{target} LoRA: dB = gᵀ (x Aᵀ)", lambda b, x, a, rest: low(x, a, b, rest), g, b, x, a, rest)


def _attention(shape: ModelShape, rows: int, length: int) -> Iterator[Case]:
    heads, head_dim = (shape.heads, shape.kv_heads, shape.kv_heads), shape.architecture.head_dim
    q, k, v = (_random(key, rows, length, count, head_dim, dtype=shape.dtype) for key, count in enumerate(heads))
    visible = Visibility(jnp.ones((rows, length), jnp.int32))

    def attended(given: tuple[Array, Array, Array], visible: Visibility) -> Array:
        return attend(*given, visible)

    yield "attention: forward", attended, ((q, k, v), visible)
    yield _backward("attention: backward", attended, _random(3, *q.shape, dtype=shape.dtype), (q, k, v), visible)


def _head(model: DenseDecoder, rows: int, length: int) -> Iterator[Case]:
    head = model.head_weight()
    hidden = _random(0, rows, length, head.shape[1], dtype=head.dtype)
    targets = jax.random.randint(jax.random.key(1), (rows, length), 0, head.shape[0])

    def gradient(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(lambda hidden: token_logprobs(hidden, head, targets).sum())(hidden)

    yield "head: log-probabilities", token_logprobs, (hidden, head, targets)
    yield "head: log-probabilities and gradient", gradient, (hidden, head, targets)


def _elementwise(model: DenseDecoder, shape: ModelShape, rows: int, length: int) -> Iterator[Case]:
    x, g = (_random(key, rows, length, shape.width, dtype=shape.dtype) for key in range(2))
    gate, up, wide = (_random(key, rows, length, shape.mlp, dtype=shape.dtype) for key in range(3))
    graph, state = nnx.split(model.norm)

    def normalized(x: Array, state: Any) -> Array:
        return nnx.merge(graph, state)(x)

    def activated(given: tuple[Array, Array]) -> Array:
        return jax.nn.silu(given[0]) * given[1]

    yield "RMSNorm: forward", normalized, (x, state)
    yield _backward("RMSNorm: backward", normalized, g, x, state)
    yield "SiLU(gate) · up: forward", activated, ((gate, up),)
    yield _backward("SiLU(gate) · up: backward", activated, wide, (gate, up))


def _layers(model: DenseDecoder, shape: ModelShape, rows: int, length: int) -> Iterator[Case]:
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, shape.vocabulary)
    segments = jnp.ones((rows, length), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": jnp.broadcast_to(jnp.arange(length), segments.shape)}
    g = _random(1, rows, length, shape.width, dtype=shape.dtype)
    graph, trained, *others = nnx.split(model, LoraParam, ...)

    def hidden(trained: Any, rest: Any, batch: dict[str, Array], remat: Any = "none") -> Array:
        return nnx.merge(graph, trained, rest).hidden(**batch, remat=remat)

    def gradient(trained: Any, rest: Any, batch: dict[str, Array], g: Array) -> Any:
        return jax.grad(lambda trained: (hidden(trained, rest, batch, "layer") * g).sum())(trained)

    yield f"{shape.layers} layers: forward", hidden, (trained, *others, batch)
    yield f"{shape.layers} layers: forward, recomputed, backward", gradient, (trained, *others, batch, g)


def _backward(name: str, function: Callable[..., Any], g: Array, given: Any, *fixed: Any) -> Case:
    """The backward pass of ``function(given, *fixed)`` alone, for the gradient of ``given``."""

    def forward(given: Any, fixed: tuple[Any, ...]) -> Any:
        return jax.vjp(lambda given: function(given, *fixed), given)[1]

    return name, lambda pull, g: pull(g), (jax.jit(forward)(given, fixed), g)


def _random(key: int, *shape: int, dtype: Any) -> Float[Array, "..."]:
    return jax.random.normal(jax.random.key(key), shape, dtype)


def _median(function: Callable[..., Any], given: tuple[Any, ...], seconds: float) -> float:
    """Median seconds of a call, of those that fit in ``seconds``."""
    jax.block_until_ready(function(*given))
    times: list[float] = []
    while len(times) < _LEAST_RUNS or sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(function(*given))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
