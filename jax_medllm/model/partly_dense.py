"""A packed linear layer of which some layers' weights are dense, as 4-bit folders keep those that four bits would hurt.

The scan over the layers slices arrays that have all of them. Codes do, and are zero where a weight is dense; the dense weights
are an array of their own, which every layer sees whole (:class:`SomeLayers`), and each layer knows its place in it. Which of
the two products a layer takes is decided as it runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_medllm.mesh.layout import gathered
from jax_medllm.model.linear import Linear, declare, matmul, matmul_back, nf4_matmul, nf4_matmul_back
from jax_medllm.model.quantized_weight import QuantizedWeight
from medllm.axes import Axis


class SomeLayers(nnx.Variable):
    """An array of some of the layers alone. Not trainable, and not sliced by the scan over all of them."""


class Place(nnx.Variable):
    """Where in :class:`SomeLayers` each layer's weight is; -1 for a packed one. Not read from disk, and not trainable."""


class DenseWeights(nnx.Module):
    """The dense weights of some layers.

    Args:
        numbers: Which layers, ascending.
        layers: All of them.
        out_axis: Axis of the outputs.
        in_axis: Axis of the inputs.
        dtype: Type of the weights.
        rngs: Keys of random ones.
    """

    def __init__(
        self, numbers: tuple[int, ...], layers: Axis, out_axis: Axis, in_axis: Axis, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.numbers = numbers
        axes = (Axis("dense_layers", len(numbers)), out_axis, in_axis)
        self.weight = declare(SomeLayers, axes, dtype, nnx.initializers.normal(0.02), rngs.params())
        self.place = declare(
            Place, (layers,), jnp.dtype(jnp.int32), lambda *_: jnp.asarray(self.places(layers.size)), rngs.params()
        )

    def places(self, layers: int) -> Int[np.ndarray, " l"]:
        """What :class:`Place` holds."""
        found = np.full(layers, -1, np.int32)
        found[list(self.numbers)] = np.arange(len(self.numbers))
        return found


class PartlyDense(Linear):
    """:class:`jax_medllm.model.linear.Linear`, packed, with ``dense`` layers that are not.

    Args:
        dense: Their numbers, ascending.
        given: What a packed one is made of.
        settings: And its settings.
    """

    def __init__(self, *given: Any, dense: tuple[int, ...], **settings: Any):
        super().__init__(*given, **settings)
        _, *axes = given
        self.dense = DenseWeights(dense, *axes, dtype=settings["dtype"], rngs=settings["rngs"])

    def packed_product(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """x Wᵀ with this layer's weight, as it is held."""
        assert self.quantized is not None
        return chosen_matmul(x, self.quantized.value(), self.dense.weight[...], self.dense.place[...], self.axes)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chosen_matmul(
    x: Float[Array, "*b in"],
    packed: QuantizedWeight,
    dense: Float[Array, "some out in"],
    place: Int[Array, ""],
    axes: tuple[Axis, Axis],
) -> Float[Array, "*b out"]:
    """x Wᵀ with the dense weight at ``place``, or, where that is negative, with the packed one. Only ``x`` has a gradient.

    Args:
        x: Inputs.
        packed: A layer's packed weight.
        dense: The dense weights of some layers.
        place: Which of them is this layer's.
        axes: The weight's logical axes.
    """
    return jax.lax.cond(place < 0, lambda: nf4_matmul(x, packed, axes), lambda: matmul(x, gathered(dense[place], axes)))


def _forward(x: Array, packed: QuantizedWeight, dense: Array, place: Array, axes: tuple[Axis, Axis]) -> tuple[Array, Any]:
    return chosen_matmul(x, packed, dense, place, axes), (packed, dense, place)


def _backward(axes: tuple[Axis, Axis], kept: Any, g: Array) -> tuple[Array, None, None, None]:
    packed, dense, place = kept
    slope = jax.lax.cond(
        place < 0, lambda: nf4_matmul_back(g, packed, axes), lambda: matmul_back(g, gathered(dense[place], axes))
    )
    return slope, None, None, None


chosen_matmul.defvjp(_forward, _backward)
