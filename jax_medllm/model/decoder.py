"""A dense decoder in Flax NNX: what :class:`medllm.architecture.Architecture` says, computed.

The layers are one module whose every array has a leading layer axis; ``lax.scan`` runs it, so compile time does not grow with
depth. Attribute names are Hugging Face's, which makes the weight table of :mod:`jax_medllm.weights.read` a single rule.

Axes: b batch, s sequence, d model width, f mlp width, h query heads, k key/value heads, x head dimension, v vocabulary,
l layers.

Training and scoring::

    hidden = model.hidden(tokens, segment_ids=segment_ids, positions=positions)      # [b, s, d]
    logits = model.logits(hidden)                                                    # [b, s, v]

Generation, with a key/value cache, is :mod:`jax_medllm.generate.cached_decoder`: it runs the same layers through
:meth:`DenseDecoder.hidden_in`.

Trained and frozen arrays separate by variable type: ``nnx.split(model, LoraParam, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jax_medllm.mesh.layout import constrain
from jax_medllm.mesh.pytree import pytree
from jax_medllm.model.attention import Visibility, Window, attend, matmul_precision
from jax_medllm.model.embedding import lookup
from jax_medllm.model.linear import FrozenLoraParam, Linear, LoraParam, PackedParam, declare
from jax_medllm.model.partly_dense import PartlyDense, SomeLayers
from medllm.architecture import EMBEDDING, HEAD, HEAD_NORMS, NORM, Architecture, Tensor
from medllm.axes import Axis
from medllm.config import REMAT_KEEPS, LoraConfig, RematPolicy
from medllm.quantization import Quantization

__all__ = ["DenseDecoder", "FrozenLoraParam", "LoraParam", "PackedParam"]

RESIDUAL = ("batch", "sequence", None)
"""Logical axes of the residual stream."""


@dataclass(frozen=True)
class _Build:
    """What every module of the model is built with."""

    config: Architecture
    lora: LoraConfig | None
    frozen_loras: tuple[LoraConfig, ...]
    reference: bool
    quantization: Quantization
    dense: Mapping[str, tuple[int, ...]]
    dtype: jnp.dtype
    rngs: nnx.Rngs

    @property
    def layers(self) -> Axis:
        return Axis("layers", self.config.num_layers)

    def linear(self, target: str) -> Linear:
        declared = self.config.projections[target]
        dense = self.dense.get(target, ())
        whole = self.quantization == "none" or len(dense) == self.config.num_layers
        made = partial(PartlyDense, dense=dense) if dense and not whole else Linear
        return made(
            target,
            self.layers,
            declared.out,
            declared.into,
            bias=declared.bias,
            lora=self.lora,
            frozen_loras=self.frozen_loras,
            reference=self.reference,
            quantization="none" if whole else self.quantization,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm_in_layer(self, name: str) -> RMSNorm | Unnormed:
        declared = self.config.layer.get(f"{name}.weight")
        return Unnormed() if declared is None else self.norm(declared, self.layers)

    def norm(self, declared: Tensor, *layers: Axis) -> RMSNorm:
        weight = declare(nnx.Param, (*layers, *declared.axes), self.dtype, nnx.initializers.ones, self.rngs.params())
        return RMSNorm(weight, self.config.rms_norm_eps)

    def table(self, declared: Tensor) -> Table:
        return Table(declare(nnx.Param, declared.axes, self.dtype, nnx.initializers.normal(0.02), self.rngs.params()))


class Table(nnx.Module):
    """One row for each token of the vocabulary: the embedding, or the output matrix."""

    def __init__(self, weight: nnx.Variable):
        self.weight = weight

    def __call__(self, tokens: Int[ArrayLike, "b s"]) -> Float[Array, "b s d"]:
        """The rows of ``tokens``."""
        return lookup(self.weight[...], tokens, self.weight.axes, ("batch", "sequence"))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · weight; the mean and the root in fp32 (float64 for float64 inputs)."""

    def __init__(self, weight: nnx.Variable, eps: float):
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalize the last axis."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        root = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * (wide * root).astype(x.dtype)


class Unnormed(nnx.Module):
    """Where a family declares no norm."""

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """As it is."""
        return x


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, build: _Build):
        self.config = build.config
        self.q_proj = build.linear("q_proj")
        self.k_proj = build.linear("k_proj")
        self.v_proj = build.linear("v_proj")
        self.o_proj = build.linear("o_proj")
        self.q_norm, self.k_norm = (build.norm_in_layer(name) for name in HEAD_NORMS)

    def __call__(self, x: Float[Array, "b s d"], rotary: Rotary, context: Any, adapter: bool) -> tuple[Array, Any]:
        """Attend; ``context`` takes queries, keys and values and answers with what the queries see."""
        b, s, _ = x.shape
        projected = (
            checkpoint_name(project(x, adapter=adapter), name).reshape(b, s, -1, self.config.head_dim)
            for name, project in (("q_proj", self.q_proj), ("k_proj", self.k_proj), ("v_proj", self.v_proj))
        )
        q, k, v = projected
        out, kept = context.attend(rotary(self.q_norm(q)), rotary(self.k_norm(k)), v)
        return checkpoint_name(self.o_proj(out.reshape(b, s, -1), adapter=adapter), "o_proj"), kept


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, build: _Build):
        self.gate_proj = build.linear("gate_proj")
        self.up_proj = build.linear("up_proj")
        self.down_proj = build.linear("down_proj")

    def __call__(self, x: Float[Array, "b s d"], adapter: bool) -> Float[Array, "b s d"]:
        """Apply the block."""
        gate = checkpoint_name(self.gate_proj(x, adapter=adapter), "gate_proj")
        gate, x = jax.lax.optimization_barrier((gate, x))  # or both dense weights are made, and lie in memory, together
        up = checkpoint_name(self.up_proj(x, adapter=adapter), "up_proj")
        return self.down_proj(jax.nn.silu(gate) * up, adapter=adapter)


class Layer(nnx.Module):
    """One decoder layer; as part of the model its arrays are stacked over all layers."""

    def __init__(self, build: _Build):
        self.input_layernorm = build.norm_in_layer("input_layernorm")
        self.self_attn = Attention(build)
        self.post_attention_layernorm = build.norm_in_layer("post_attention_layernorm")
        self.mlp = Mlp(build)

    def __call__(self, x: Float[Array, "b s d"], rotary: Rotary, context: Any, adapter: bool) -> tuple[Array, Any]:
        """The layer's output and what it leaves for the cache."""
        attended, kept = self.self_attn(self.input_layernorm(x), rotary, context, adapter)
        x = constrain(x + attended, *RESIDUAL)
        return x + self.mlp(self.post_attention_layernorm(x), adapter), kept


class DenseDecoder(nnx.Module):
    """The model.

    Args:
        config: Its sizes, and what its family fixes.
        lora: Adapter to train (``LoraParam``): A random, B zero.
        frozen_loras: Adapters that belong to the model (``FrozenLoraParam``), in the order they are added.
        reference: The trained adapter has a frozen counterpart, which takes its place where it is switched off.
        quantization: How the seven linear kinds are held; embeddings, norms and biases stay in ``dtype``.
        dense: Kinds among them of which some layers, or all, stay in ``dtype`` too, and which.
        dtype: Type of weights and computation; LoRA matrices are fp32.
        rngs: Keys of the random base weights. To load weights instead use :func:`jax_medllm.weights.read.load_model`.
    """

    def __init__(
        self,
        config: Architecture,
        *,
        lora: LoraConfig | None = None,
        frozen_loras: tuple[LoraConfig, ...] = (),
        reference: bool = False,
        quantization: Quantization = "none",
        dense: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = _Build(config, lora, frozen_loras, reference, quantization, dense, jnp.dtype(dtype), rngs)
        self.config = config
        self.lora = lora
        self.frozen_loras = frozen_loras
        self.dtype = build.dtype
        around = config.around
        self.embed_tokens = build.table(around[EMBEDDING])
        self.layers = Layer(build)
        self.norm = build.norm(around[NORM])
        self.lm_head = build.table(around[HEAD]) if HEAD in around else None

    def hidden(
        self,
        tokens: Int[ArrayLike, "b s"],
        *,
        segment_ids: Int[ArrayLike, "b s"],
        positions: Int[ArrayLike, "b s"],
        parent_ids: Int[ArrayLike, "b s"] | None = None,
        adapter: bool = True,
        remat: RematPolicy = "none",
    ) -> Float[Array, "b s d"]:
        """Hidden states after the final norm.

        Args:
            tokens: Token ids.
            segment_ids: Attention is causal, along the row, within equal segments; 0 marks padding, whose output is finite
                and means nothing.
            positions: Rotary position of each token.
            parent_ids: A second segment that a token sees (0: none). A prompt of segment 1 followed by responses of segments
                2, 3, … with parent 1 and positions that go on from the prompt's end is computed once for all of them.
            adapter: False switches the trained adapter off, at trace time; the frozen one stays.
            remat: What is kept of each layer for the backward pass, see :data:`medllm.config.RematPolicy`.
        """
        context = RowContext.of(self.config.window, segment_ids, positions, parent_ids)
        return self.norm(self._run(tokens, positions, lambda _: context, adapter, remat=remat)[0])

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Scores over the vocabulary, accumulated in fp32 (float64 for float64)."""
        return head_logits(hidden, self.head_weight(), self.dtype)

    def head_weight(self) -> Float[Array, "v d"]:
        """The output matrix: the embedding where the two are tied."""
        table = (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]
        return constrain(table, "head_vocab", None, first="head_vocab")

    def hidden_in(
        self, tokens: Int[ArrayLike, "b s"], *, positions: Int[ArrayLike, "b s"], context: Callable[[Any], Any], cache: Any
    ) -> tuple[Float[Array, "b s d"], Any]:
        """Hidden states of ``tokens`` under an attention of the caller's making.

        Args:
            tokens: Token ids.
            positions: Their rotary positions.
            context: From a layer's slice of ``cache`` to an object whose ``attend(q, k, v)`` answers with the attended
                values ``[b, s, h, x]`` and what the layer leaves behind.
            cache: A pytree whose arrays have a leading layer axis, or None.

        Returns:
            The hidden states, and what the layers left, stacked.
        """
        x, kept = self._run(tokens, positions, context, True, cache)
        return self.norm(x), kept

    def _run(
        self,
        tokens: Int[ArrayLike, "b s"],
        positions: Int[ArrayLike, "b s"],
        context: Callable[[Any], Any],
        adapter: bool,
        cache: Any = None,
        *,
        remat: RematPolicy = "none",
    ) -> tuple[Float[Array, "b s d"], Any]:
        """Embed, and scan the layers with their slice of the cache: the residual stream, and what the layers leave, stacked."""
        rotary = Rotary.at(positions, self.config, self.dtype)
        graph, *states = nnx.split(self.layers, SomeLayers, ...)
        whole, stacked = states

        def step(x: Array, layer: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            state, past = layer
            x, kept = nnx.merge(graph, whole, state)(x, rotary, context(past), adapter)
            return constrain(x, *RESIDUAL), kept

        if (names := REMAT_KEEPS[remat]) is not None:
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        return jax.lax.scan(step, self.embed_tokens(tokens), (stacked, cache))


def head_logits(hidden: Float[Array, "*b d"], table: Float[Array, "v d"], dtype: jnp.dtype) -> Float[Array, "*b v"]:
    """Scores over a vocabulary, or a part of it, in the matrix precision of ``dtype`` and accumulated in fp32 or wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, table, precision=matmul_precision(dtype), preferred_element_type=wide)


@dataclass(frozen=True)
class RowContext:
    """What a layer of a whole row attends to: its own keys and values."""

    visible: Visibility

    @classmethod
    def of(
        cls,
        window: int | None,
        segment_ids: Int[ArrayLike, "b s"],
        positions: Int[ArrayLike, "b s"],
        parent_ids: Int[ArrayLike, "b s"] | None = None,
    ) -> RowContext:
        """For rows of a model with that window, see :meth:`DenseDecoder.hidden`."""
        near = None  # in a row that is no longer than the window, everything is
        if window is not None and window < jnp.shape(segment_ids)[-1]:
            near = Window(positions, positions - (window - 1))
        return cls(jax.tree.map(jnp.asarray, Visibility(segment_ids, parent_ids, window=near)))

    def attend(self, q: Float[Array, "b s h x"], k: Array, v: Array) -> tuple[Float[Array, "b s h x"], None]:
        """What the queries see; nothing is left behind."""
        return attend(q, k, v, self.visible), None


@pytree
@dataclass(frozen=True)
class Rotary:
    """Rotation of heads by position: :class:`medllm.rotary.RotaryRule`, computed."""

    cos: Float[Array, "b s x"]
    sin: Float[Array, "b s x"]

    @classmethod
    def at(cls, positions: Int[ArrayLike, "b s"], config: Architecture, dtype: jnp.dtype) -> Rotary:
        wide = jnp.promote_types(dtype, jnp.float32)
        rule = config.rotary
        angles = positions[..., None].astype(wide) * rule.frequencies(config.head_dim, wide)
        both = jnp.concatenate([angles, angles], axis=-1)
        return cls(*(turn(both) * rule.attention_factor for turn in (jnp.cos, jnp.sin)))

    def __call__(self, heads: Float[Array, "b s n x"]) -> Float[Array, "b s n x"]:
        """Rotate; in fp32 or wider, rounded once."""
        first, second = jnp.split(heads, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        return (heads * self.cos[:, :, None] + turned * self.sin[:, :, None]).astype(heads.dtype)
