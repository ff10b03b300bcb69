"""A micro-batch computed layer by layer, forwards and backwards, and what of it is not finite.

The layers are the model's own, run one at a time by one compiled program each way, and the loss is the stage's, of hidden
states that are given to it: what is read is what a training step computes, but for the compiler's order of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.mesh.layout import constrain, place_rows
from jax_medllm.model.decoder import RESIDUAL, DenseDecoder, Layer, LoraParam, Rotary, RowContext
from jax_medllm.model.rows import ResponseBatch
from jax_medllm.model.taps import OverheardContext, tap
from jax_medllm.train.batches import CptBatch, PreferenceBatch
from medllm.architecture import PROJECTIONS
from medllm.errors import UserError
from medllm.model.quantities import quantities
from medllm.replay import Arrays, Batch, Part, Reading, Replay

LossFn = Callable[[Any, Any], tuple[Array, Any]]
"""``(model, batch) -> (loss, metrics)`` of a micro-batch; both add up over the micro-batches of a step. Metrics are a named
tuple of scalars with a field ``loss``, other tuples of the kind within it. Of the model it asks for hidden states and head."""

_CHUNK = 64
"""Positions of a row whose logits are looked at together."""


def arrays_of(batch: CptBatch | PreferenceBatch) -> Arrays:
    """A micro-batch's arrays by their names: ``tokens``, ``responses.tokens``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def batch_of(batch: Batch, arrays: Arrays) -> CptBatch | PreferenceBatch:
    """The micro-batch that :func:`arrays_of` made these of.

    Raises:
        UserError: they are of no such one.
    """
    try:
        if batch.stage == "cpt":
            return CptBatch(**arrays)
        prefix = "responses."
        responses = {name.removeprefix(prefix): one for name, one in arrays.items() if name.startswith(prefix)}
        others = {name: one for name, one in arrays.items() if not name.startswith(prefix)}
        return PreferenceBatch(ResponseBatch(**responses), **others)
    except TypeError as error:
        raise UserError(f"the batch of step {batch.step} has not the arrays of a micro-batch ({error})") from error


def replay(model: DenseDecoder, loss_fn: LossFn, batch: CptBatch | PreferenceBatch, part: Part) -> Replay:
    """Loss and gradient of a micro-batch, and every tensor on the way.

    Args:
        model: With the adapter that is trained.
        loss_fn: The stage's, :func:`jax_medllm.train.loop.cpt_loss_fn` or ``preference_loss_fn`` of its settings.
        batch: The micro-batch, on the host.
        part: What it is.
    """
    batch = place_rows(batch)
    walk = _Walk(model)
    loss_fn(_Given(model, walk.forward), batch)
    assert walk.hidden is not None

    graph, state = nnx.split(model)

    @jax.jit
    def of_hidden(hidden: Array, state: Any, batch: Any) -> Any:
        return loss_fn(_Given(nnx.merge(graph, state), lambda *_, **__: hidden), batch)[0]

    loss, slope = jax.value_and_grad(of_hidden)(walk.hidden, state, batch)
    walk.read(None, {"logits": _logits(model, walk.hidden), "loss": _size(loss)})
    norm = walk.backward(slope)
    return Replay(part, float(loss), float(norm), walk.readings)


class _Given:
    """What a loss asks of a model, with hidden states from elsewhere where the adapter is on."""

    def __init__(self, model: DenseDecoder, hidden: Callable[..., Array]):
        self._model, self._hidden = model, hidden

    def hidden(self, tokens: Any, *, adapter: bool = True, **settings: Any) -> Array:
        """Those of the model, or the given ones."""
        return self._hidden(tokens, **settings) if adapter else self._model.hidden(tokens, adapter=False, **settings)

    def head_weight(self) -> Array:
        """The model's."""
        return self._model.head_weight()


class _Walk:
    """The model, layer by layer, with a reading of every tensor."""

    def __init__(self, model: DenseDecoder):
        self._model = model
        parts: Any = nnx.split(model.layers, LoraParam, ...)
        self._graph, self._adapters, self._weights = parts
        self._inputs: list[Array] = []
        self._rows: Any = None
        self.hidden: Array | None = None
        self.readings: list[Reading] = []

    def forward(self, tokens: Any, *, segment_ids: Any, positions: Any, parent_ids: Any = None, remat: str = "none") -> Array:
        """Hidden states after the final norm, as :meth:`DenseDecoder.hidden` computes them; ``remat`` changes no number."""
        del remat
        self._rows = segment_ids, positions, parent_ids
        config = self._model.config

        @jax.jit
        def run(adapters: Any, weights: Any, index: Array, x: Array, rows: Any) -> tuple[Array, dict[str, _Size]]:
            record: dict[str, Array] = {}
            layer = self._merged(_slice(adapters, index), _slice(weights, index))
            tap(layer, config, record)
            record["layer output"] = self._run(layer, x, rows, record)
            return record["layer output"], {one.name: _size(record[one.name]) for one in quantities(config)}

        x = self._model.embed_tokens(tokens)
        self.read(None, {"embedding": _size(x)})
        for index in range(config.num_layers):
            self._inputs.append(x)
            x, sizes = run(self._adapters, self._weights, np.int32(index), x, self._rows)
            self.read(index, {one.name: sizes[one.name] for one in quantities(config)})
        self._inputs.append(x)
        self.hidden = self._model.norm(x)
        self.read(None, {"last norm": _size(self.hidden)})
        return self.hidden

    def backward(self, slope: Float[Array, "b s d"]) -> Float[Array, ""]:
        """From the gradient of the hidden states after the final norm down; the norm of the adapter's gradient."""

        @jax.jit
        def run(adapters: Any, weights: Any, index: Array, x: Array, rows: Any, slope: Array) -> tuple[Array, Any, Array]:
            weights = _slice(weights, index)

            def output(adapters: Any, x: Array) -> Array:
                return self._run(self._merged(adapters, weights), x, rows, {})

            _, pull = jax.vjp(output, _slice(adapters, index), x)
            of_adapter, slope = pull(slope)
            sizes = {name: _size(matrix) for name, matrix in _matrices(of_adapter).items()}
            return slope, sizes, jnp.square(optax.global_norm(of_adapter))

        self.read(None, {"gradient of last norm": _size(slope)})
        _, pull = jax.vjp(self._model.norm, self._inputs[-1])
        (slope,) = pull(slope)
        squares = []
        for index in reversed(range(self._model.config.num_layers)):
            self.read(index, {"gradient of layer output": _size(slope)})
            slope, sizes, square = run(self._adapters, self._weights, np.int32(index), self._inputs[index], self._rows, slope)
            self.read(index, {f"gradient of {name}": sizes[name] for name in sorted(sizes, key=_backwards)})
            squares.append(square)
        return jnp.sqrt(jnp.stack(squares).sum())

    def read(self, layer: int | None, sizes: Mapping[str, _Size]) -> None:
        """Note tensors, in the order in which they were computed."""
        found = jax.device_get(list(sizes.values()))  # of a dictionary it would return the alphabet's order
        for what, (largest, wrong) in zip(sizes, found, strict=True):
            self.readings.append(Reading(what, layer, float(largest), int(wrong)))

    def _merged(self, adapters: Any, weights: Any) -> Layer:
        return nnx.merge(self._graph, adapters, weights)

    def _run(self, layer: Layer, x: Array, rows: Any, record: dict[str, Array]) -> Array:
        _, positions, _ = rows
        context = OverheardContext(RowContext.of(self._model.config.window, *rows), record)
        out, _ = layer(x, Rotary.at(positions, self._model.config, self._model.dtype), context, True)
        return constrain(out, *RESIDUAL)


_Size = tuple[Array, Array]
"""The largest magnitude among a tensor's finite numbers, and how many of its numbers are not finite."""


def _size(x: Array) -> _Size:
    finite = jnp.isfinite(x)
    return jnp.max(jnp.where(finite, jnp.abs(x), 0), initial=0), jnp.sum(~finite)


def _slice(state: Any, index: Array) -> Any:
    """A layer of arrays stacked over the layers."""
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), state)


def _matrices(gradient: nnx.State) -> dict[str, Array]:
    """The matrices of a layer's adapter, by names like ``mlp.up_proj.lora_B``."""
    found = {}
    for path, variable in nnx.to_flat_state(gradient):
        block, kind, _, matrix = (str(part) for part in path)
        found[f"{block}.{kind}.lora_{matrix}"] = variable[...]
    return found


def _backwards(matrix: str) -> tuple[int, str]:
    """The place of a matrix in the order in which gradients come to a layer's: what a program returns is in the alphabet's."""
    path, _, name = matrix.rpartition(".")
    return -list(PROJECTIONS.values()).index(path), name


def _logits(model: DenseDecoder, hidden: Float[Array, "b s d"]) -> _Size:
    """The size of all logits, of which a part is held at a time."""
    parts = (model.logits(hidden[:, start : start + _CHUNK]) for start in range(0, hidden.shape[1], _CHUNK))
    sizes = [_size(part) for part in parts]
    return jnp.stack([largest for largest, _ in sizes]).max(), jnp.stack([wrong for _, wrong in sizes]).sum()
