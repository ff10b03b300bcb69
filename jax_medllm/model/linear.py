"""A linear layer of a transformer: base weight (dense or packed) + LoRA, stacked over the layers of the model.

    y = x Wᵀ (+ b) + scaling · (x Aᵀ) Bᵀ          W [out, in]   A [rank, in]   B [out, rank]

Every array has a leading layer axis; the model scans over it and each layer sees its own slice. An array is declared once, by
``declare``: shape, logical axes, type and initializer. Abstract shapes come from ``nnx.eval_shape`` over the declarations and
shardings from the logical axes they carry.

A packed weight is dequantized where it is used, and again in the backward pass: between the two only the packed codes stay in
memory, never the dense weight.

In fp32 and wider, where there are more tokens than it pays for, the update is added to the weight instead, W + scaling · B A:
one product in place of three, and no further array as large as the output. Narrower types would round the update away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.mesh.layout import Layout, constrain, entry, gathered, in_use
from jax_medllm.model.attention import matmul_precision
from jax_medllm.model.nf4 import byte_scales, check_width, dequantize_halves
from jax_medllm.model.quantized_weight import KINDS, QuantizedWeight, code_axes, scale_axes
from medllm.axes import Axis
from medllm.config import ALL_LINEAR, LoraConfig
from medllm.model.adapter import module_name
from medllm.quantization import Quantization

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


class LoraParam(nnx.Param):
    """A matrix of the adapter that is trained."""


class FrozenLoraParam(nnx.Variable):
    """A matrix of an adapter that is part of the model and not trained."""


class LoraScaling(nnx.Variable):
    """What an adapter's update is multiplied by, in each layer. Not trained."""


class PackedParam(nnx.Variable):
    """An array of a packed weight. Not trainable."""


def declare(
    kind: type[nnx.Variable], axes: tuple[Axis, ...], dtype: jnp.dtype, initializer: Initializer, key: jax.Array
) -> nnx.Variable:
    """The one declaration of an array: an NNX variable whose ``axes`` metadata are its logical axes."""
    return kind(initializer(key, tuple(axis.size for axis in axes), dtype), axes=axes)


class Lora(nnx.Module):
    """The two matrices of a low-rank update, in PEFT's shapes, and its scaling.

    Layers may differ in rank: the stack is as wide as the widest, and the rows of A and columns of B beyond a layer's rank are
    zero. The product of the two has no gradient there, so they stay zero.
    """

    def __init__(
        self,
        kind: type[nnx.Variable],
        target: str,
        config: LoraConfig,
        layers: Axis,
        out_axis: Axis,
        in_axis: Axis,
        dtype: jnp.dtype,
    ):
        modules = [module_name(layer, target) for layer in range(layers.size)]
        ranks = np.array([config.rank_of(module) for module in modules])
        rank = Axis("rank", int(ranks.max()))
        key = jax.random.fold_in(jax.random.key(config.seed), ALL_LINEAR.index(target))
        # fp32 masters whatever the computation's type; float64 only where everything is.
        master = jnp.promote_types(dtype, jnp.float32)
        used = (np.arange(rank.size) < ranks[:, None])[:, :, None]
        uniform = _uniform(1 / math.sqrt(in_axis.size))
        inputs, outputs = (Axis("adapter", axis.size, may_stay_whole=True) for axis in (in_axis, out_axis))
        self.A = declare(kind, (layers, rank, inputs), master, lambda *given: jnp.where(used, uniform(*given), 0), key)
        self.B = declare(kind, (layers, outputs, rank), master, nnx.initializers.zeros, key)
        self._used = (rank, in_axis), (out_axis, rank)
        scaling = np.array([config.scaling_of(module) for module in modules])
        self.scaling = declare(LoraScaling, (layers,), master, lambda *_: jnp.asarray(scaling, master), key)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """scaling · (x Aᵀ) Bᵀ in the type of ``x``."""
        a, b = self.matrices(x.dtype)
        if in_use() is None:
            return low_rank_matmul(x, a, b)
        return matmul(matmul(x, a), b)  # the compiler lays its gradients out as the matrices lie

    def matrices(self, dtype: jnp.dtype) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
        """A and scaling · B in a type, where they are used."""
        a, b = self.A[...].astype(dtype), (self.scaling[...] * self.B[...]).astype(dtype)
        return gathered(a, self.A.axes[1:], self._used[0]), gathered(b, self.B.axes[1:], self._used[1])


class Linear(nnx.Module):
    """Base weight, optional bias, frozen adapters and optional trained adapter.

    Args:
        target: PEFT's name of the module (``q_proj`` …).
        lora: The trained adapter, where it targets this module.
        frozen_loras: Adapters that belong to the model: they stay on when the trained one is switched off.
        reference: Beside the trained adapter stands a frozen one of its shape, which is on exactly when the trained one is off.
    """

    def __init__(
        self,
        target: str,
        layers: Axis,
        out_axis: Axis,
        in_axis: Axis,
        *,
        bias: bool = False,
        lora: LoraConfig | None,
        frozen_loras: tuple[LoraConfig, ...],
        reference: bool,
        quantization: Quantization,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(0.02)
        packed = quantization != "none"
        axes = (layers, out_axis, in_axis)
        self.axes = axes[1:]
        self.weight = None if packed else declare(nnx.Param, axes, dtype, normal, rngs.params())
        self.quantized = PackedWeight(KINDS[quantization], *axes, normal, rngs.params()) if packed else None
        bias_axes = layers, replace(out_axis, name="bias")
        self.bias = declare(nnx.Param, bias_axes, dtype, nnx.initializers.zeros, rngs.params()) if bias else None

        def adapter(kind: type[nnx.Variable], config: LoraConfig | None) -> Lora | None:
            if config is None or not any(config.covers(module_name(layer, target)) for layer in range(layers.size)):
                return None
            return Lora(kind, target, config, layers, out_axis, in_axis, dtype)

        self.lora = adapter(LoraParam, lora)
        self.reference_lora = adapter(FrozenLoraParam, lora) if reference else None
        self.frozen_loras = nnx.List([adapter(FrozenLoraParam, config) for config in frozen_loras])

    def __call__(self, x: Float[Array, "*b in"], *, adapter: bool = True) -> Float[Array, "*b out"]:
        """Apply the layer; ``adapter=False`` leaves the trained adapter out, at trace time."""
        x = self._spread(x, self.axes[1])
        loras = [lora for lora in (*self.frozen_loras, self.lora if adapter else self.reference_lora) if lora is not None]
        if self.quantized is not None:
            y = self.packed_product(x)
        else:
            assert self.weight is not None
            weight = gathered(self.weight[...], self.axes)
            if loras and _pays_to_add(x, weight):
                y, loras = adapted_matmul(x, weight, tuple(lora.matrices(x.dtype) for lora in loras)), []
            else:
                y = matmul(x, weight)
        if self.bias is not None:
            y = y + self.bias[...]
        for lora in loras:
            y = y + lora(x)
        return self._spread(y, self.axes[0])

    def packed_product(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """x Wᵀ of a packed layer."""
        assert self.quantized is not None
        return nf4_matmul(x, self.quantized.value(), self.axes)

    def _spread(self, activation: Float[Array, "*b n"], axis: Axis) -> Float[Array, "*b n"]:
        return constrain(activation, "batch", "sequence", axis.name) if activation.ndim == 3 else activation


class PackedWeight(nnx.Module):
    """The arrays of a packed weight, each stacked over the layers."""

    def __init__(
        self,
        kind: type[QuantizedWeight],
        layers: Axis,
        out_axis: Axis,
        in_axis: Axis,
        initializer: Initializer,
        key: jax.Array,
    ):
        check_width(in_axis.size)
        dense = initializer(key, (layers.size, out_axis.size, in_axis.size), jnp.float32)
        made = jax.lax.map(kind.quantize, dense)
        self.kind = kind
        self.shape = dense.shape
        for name, part in kind.parts.items():
            axes = (layers, *part.axes(out_axis, in_axis))
            setattr(self, name, declare(PackedParam, axes, part.dtype, lambda *_, name=name: getattr(made, name), key))

    def value(self) -> QuantizedWeight:
        """The arrays as one pytree (of one layer, or of all where the stack is whole)."""
        return self.kind(**{name: getattr(self, name)[...] for name in self.kind.parts})


def matmul(x: Float[Array, "*b in"], weight: Float[Array, "out in"]) -> Float[Array, "*b out"]:
    """x Wᵀ with a weight in Hugging Face's orientation, at full precision for fp32 and float64."""
    return jnp.einsum("...i,oi->...o", x, weight, precision=matmul_precision(x.dtype))


def matmul_back(g: Float[Array, "*b out"], weight: Float[Array, "out in"]) -> Float[Array, "*b in"]:
    """g W, the gradient of :func:`matmul` by its input."""
    return jnp.einsum("...o,oi->...i", g, weight, precision=matmul_precision(g.dtype))


Matrices = tuple[Float[Array, "_ in"], Float[Array, "out _"]]
"""A and scaling · B of a low-rank update; of several, each has a rank of its own."""


@jax.custom_vjp
def low_rank_matmul(x: Float[Array, "*b in"], a: Float[Array, "r in"], b: Float[Array, "out r"]) -> Float[Array, "*b out"]:
    """(x Aᵀ) Bᵀ."""
    return matmul(matmul(x, a), b)


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    narrow = matmul(x, a)
    return matmul(narrow, b), (x, narrow, a, b)


def _low_rank_backward(kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, narrow, a, b = kept
    narrow_slope = matmul_back(g, b)
    return matmul_back(narrow_slope, a), *_matrix_slopes(x, narrow, g, narrow_slope)


low_rank_matmul.defvjp(_low_rank_forward, _low_rank_backward)


@jax.custom_vjp
def adapted_matmul(
    x: Float[Array, "*b in"], weight: Float[Array, "out in"], updates: tuple[Matrices, ...]
) -> Float[Array, "*b out"]:
    """x (W + Σ B A)ᵀ.

    Raises:
        TypeError: the weight is differentiated; only the input and the updates have a gradient.
    """
    return matmul(x, _adapted(weight, updates))


def _adapted_forward(x: Any, weight: Any, updates: Any) -> tuple[Array, tuple[Any, ...]]:
    if weight.perturbed:
        raise TypeError(
            "adapted_matmul has no gradient for the weight under an adapter: differentiate with respect to the input and the "
            "adapter's matrices alone"
        )
    kept = x.value, weight.value, tuple((a.value, b.value) for a, b in updates)
    return adapted_matmul(*kept), kept


def _adapted_backward(kept: tuple[Any, ...], g: Array) -> tuple[Array, None, tuple[Matrices, ...]]:
    x, weight, updates = kept
    slopes = tuple(_matrix_slopes(x, matmul(x, a), g, matmul_back(g, b)) for a, b in updates)
    return matmul_back(g, _adapted(weight, updates)), None, slopes


adapted_matmul.defvjp(_adapted_forward, _adapted_backward, symbolic_zeros=True)


def _adapted(weight: Float[Array, "out in"], updates: tuple[Matrices, ...]) -> Float[Array, "out in"]:
    return sum((matmul_back(b, a) for a, b in updates), weight)


def _pays_to_add(x: Float[Array, "*b in"], weight: Float[Array, "out in"]) -> bool:
    """B A takes fewer operations than (x Aᵀ) Bᵀ, the sum is precise enough, and no device would compute it for others."""
    tokens = math.prod(x.shape[:-1])
    return x.dtype.itemsize >= 4 and in_use() is None and tokens * sum(weight.shape) > math.prod(weight.shape)


def _matrix_slopes(
    x: Float[Array, "*b in"], narrow: Float[Array, "*b r"], g: Float[Array, "*b out"], narrow_slope: Float[Array, "*b r"]
) -> Matrices:
    """Gradients of A and B from x, x Aᵀ, the output's gradient g and g B.

    Both are products [r, ·]: a CPU's library takes five times as long for the same numbers as [out, r]. The barrier keeps the
    compiler from folding the transpose after them into the product, or into a copy of g.
    """
    over_tokens = partial(jnp.tensordot, axes=(tuple(range(x.ndim - 1)),) * 2, precision=matmul_precision(x.dtype))
    of_a, of_b = jax.lax.optimization_barrier((over_tokens(narrow_slope, x), over_tokens(narrow, g)))
    return of_a, of_b.T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def nf4_matmul(
    x: Float[Array, "*b in"], weight: QuantizedWeight, axes: tuple[Axis, Axis] | None = None
) -> Float[Array, "*b out"]:
    """x Wᵀ with a quantized weight, dequantized to the type of ``x``. Only ``x`` has a gradient.

    Args:
        x: Inputs.
        weight: The weight.
        axes: Its logical axes, by which its codes are gathered before they are dequantized.
    """
    # Else the compiler makes the dense weight once for the forward and the backward pass, and keeps it in between.
    x, weight = jax.lax.optimization_barrier((x, _gathered(weight, axes)))
    return matmul(_as_held(x[..., 0::2], x[..., 1::2], axes), _dense(weight, axes, x.dtype))


def _nf4_matmul_forward(
    x: Float[Array, "*b in"], weight: QuantizedWeight, axes: tuple[Axis, Axis] | None
) -> tuple[Float[Array, "*b out"], QuantizedWeight]:
    return nf4_matmul(x, weight, axes), weight


def _nf4_matmul_backward(
    axes: tuple[Axis, Axis] | None, weight: QuantizedWeight, g: Float[Array, "*b out"]
) -> tuple[Float[Array, "*b in"], None]:
    return nf4_matmul_back(g, weight, axes), None


nf4_matmul.defvjp(_nf4_matmul_forward, _nf4_matmul_backward)


def nf4_matmul_back(
    g: Float[Array, "*b out"], weight: QuantizedWeight, axes: tuple[Axis, Axis] | None
) -> Float[Array, "*b in"]:
    """g W, the gradient of :func:`nf4_matmul` by its input."""
    g, weight = jax.lax.optimization_barrier((g, _gathered(weight, axes)))
    slopes = matmul_back(g, _dense(weight, axes, g.dtype))
    even, odd = jnp.split(slopes.reshape(*g.shape[:-1], _pieces(axes), -1), 2, axis=-1)
    return jnp.stack([even, odd], axis=-1).reshape(slopes.shape)


def _gathered(weight: QuantizedWeight, axes: tuple[Axis, Axis] | None) -> QuantizedWeight:
    """The weight where it is used."""
    if axes is None:
        return weight
    # What has the weight's rows is spread as they are; everything else is whole on every device.
    spread = {name: of for name, part in weight.parts.items() if axes[0] in (of := part.axes(*axes))}
    return replace(weight, **{name: gathered(getattr(weight, name), of) for name, of in spread.items()})


def _dense(weight: QuantizedWeight, axes: tuple[Axis, Axis] | None, dtype: jnp.dtype) -> Float[Array, "out in"]:
    """The weight with its columns in the order of :func:`_as_held`."""
    absmax = weight.scales()
    layout = in_use()
    if layout is None or axes is None:
        scales = byte_scales(absmax, 0, weight.packed.shape[1])
    else:
        scales = _own_scales(layout, absmax, axes, weight.packed.shape)
    even, odd = dequantize_halves(weight.packed, scales, dtype)
    return _as_held(even, odd, axes)


def _as_held(even: Array, odd: Array, axes: tuple[Axis, Axis] | None) -> Array:
    """Columns in the order in which the codes hold them: on each device those of even number, the bytes' high halves, before
    those of odd number. A product over such columns needs no array in which the two alternate, which accelerators are slow to
    make."""
    pieces = _pieces(axes)
    if pieces == 1:  # reshapes that change nothing still cost a TPU copies
        return jnp.concatenate([even, odd], axis=-1)
    even, odd = (half.reshape(*half.shape[:-1], pieces, -1) for half in (even, odd))
    return jnp.concatenate([even, odd], axis=-1).reshape(*even.shape[:-2], -1)


def _pieces(axes: tuple[Axis, Axis] | None) -> int:
    """Devices that share the columns of a weight where it is used."""
    layout = in_use()
    if layout is None or axes is None:
        return 1
    return layout.pieces(layout.used(code_axes(*axes))[1])


def _own_scales(layout: Layout, absmax: Array, axes: tuple[Axis, Axis], shape: tuple[int, int]) -> Array:
    """The scales of the bytes that each device has, which may have a part of a row that cuts a block."""
    codes, scales = (layout.used(part(*axes)) for part in (code_axes, scale_axes))
    count = layout.sharding(codes).shard_shape(shape)[1]
    cut = codes[1] != scales[1]  # each device has the scales of whole rows

    def own(absmax: Array) -> Array:
        return byte_scales(absmax, jax.lax.axis_index(entry(codes[1])) * count if cut else 0, count)

    return jax.shard_map(own, mesh=layout.mesh, in_specs=scales, out_specs=codes, check_vma=False)(absmax)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
