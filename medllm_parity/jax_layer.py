"""One decoder layer of the JAX stack: read, run and differentiated by the code of :mod:`jax_medllm` itself.

Nothing of the layer is written anew here. Its submodules and its attention context are wrapped so that what passes through them
is kept; all layers of one shape share one compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.model.decoder import Layer, Rotary, RowContext
from jax_medllm.model.linear import FrozenLoraParam
from jax_medllm.model.taps import OverheardContext, submodule, tap
from jax_medllm.weights.read import read_model
from medllm.architecture import PROJECTIONS, Architecture
from medllm.model.adapter import Adapter
from medllm.model.quantities import quantities
from medllm.quantization import Quantization
from medllm_parity.layer_view import LayerView, adapter_view
from medllm_parity.rows import Rows


class JaxLayer:
    """A decoder layer, loaded alone.

    Args:
        view: The layer as a directory.
        index: Which layer it is.
        dtype: Type of weights and computation.
        quantization: How the linear kinds are held.
        adapters: The adapters on top, in order.
    """

    def __init__(
        self, view: LayerView, index: int, dtype: Any, quantization: Quantization, *, adapters: Sequence[Adapter] = ()
    ):
        here = {number: part for number, adapter in enumerate(adapters) if (part := adapter_view(adapter, index))}
        self._numbers = list(here)
        model = read_model(view, adapter=list(here.values()), quantization=quantization, dtype=dtype)
        self.config = model.config
        self.dtype = model.dtype
        parts: Any = nnx.split(model.layers, FrozenLoraParam, ...)
        self.graph, self.adapters, self.weights = parts

    def run(self, hidden: Float[Array, "cb s d"], rows: Rows, *, adapter: bool = True) -> dict[str, Array]:
        """Every quantity of the layer, [c·b, s, n], for hidden states of c copies of the rows."""
        segment_ids, positions = _tiled(rows, hidden.shape[0])
        return _record(self.graph, self.adapters, self.weights, hidden, segment_ids, positions, self.config, adapter)

    def backward(self, hidden: Float[Array, "b s d"], cotangent: Float[Array, "b s d"], rows: Rows) -> dict[str, np.ndarray]:
        """Gradients of the adapters' matrices: ``mlp.up_proj.lora_A.0`` is A of the first adapter."""
        segment_ids, positions = _tiled(rows, hidden.shape[0])
        found = _backward(self.graph, self.adapters, self.weights, hidden, segment_ids, positions, cotangent, self.config)
        gradients = {}
        for path, variable in nnx.to_flat_state(found):
            block, kind, _, number, matrix = (str(part) for part in path)
            gradients[f"{block}.{kind}.lora_{matrix}.{self._numbers[int(number)]}"] = np.asarray(variable[...][0], np.float64)
        return gradients


def _tiled(rows: Rows, count: int) -> tuple[np.ndarray, np.ndarray]:
    copies = (count // rows.tokens.shape[0], 1)
    return np.tile(rows.segment_ids, copies), np.tile(rows.positions, copies)


def _merged(graph: Any, *states: Any) -> Layer:
    """The layer of a model of one layer, without the layer axis."""
    return nnx.merge(graph, *(jax.tree.map(lambda array: array[0], state) for state in states))


@partial(jax.jit, static_argnames=("graph", "config", "adapter"))
def _record(
    graph: Any,
    adapters: Any,
    weights: Any,
    hidden: Array,
    segment_ids: Array,
    positions: Array,
    config: Architecture,
    adapter: bool,
) -> dict[str, Array]:
    layer = _merged(graph, adapters, weights)
    if not adapter:
        for path in PROJECTIONS.values():
            submodule(layer, path).frozen_loras = nnx.List([])
    record: dict[str, Array] = {}
    tap(layer, config, record)
    context = OverheardContext(RowContext.of(config.window, segment_ids, positions), record)
    record["layer output"], _ = layer(hidden, Rotary.at(positions, config, hidden.dtype), context, True)
    left_out = jnp.full(hidden.shape[:2], jnp.nan)  # what a layer that should compute it does not is off, and named
    return {
        quantity.name: record.get(quantity.name, left_out).reshape(*hidden.shape[:2], -1) for quantity in quantities(config)
    }


@partial(jax.jit, static_argnames=("graph", "config"))
def _backward(
    graph: Any,
    adapters: Any,
    weights: Any,
    hidden: Array,
    segment_ids: Array,
    positions: Array,
    cotangent: Array,
    config: Architecture,
) -> Any:
    def output(adapters: Any) -> Array:
        rotary = Rotary.at(positions, config, hidden.dtype)
        return _merged(graph, adapters, weights)(hidden, rotary, RowContext.of(config.window, segment_ids, positions), True)[0]

    _, pull = jax.vjp(output, adapters)
    return pull(cotangent)[0]
