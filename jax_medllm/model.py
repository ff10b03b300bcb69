"""Qwen2.5 in Flax NNX, 0.5B to 72B.

The layers are one module whose every array has a leading layer axis; ``lax.scan`` runs it, so compile time does not grow with
depth. Attribute names are Hugging Face's, which makes the weight table of :mod:`jax_medllm.weights` a single rule.

Axes: b batch, s sequence, d model width, f mlp width, h query heads, k key/value heads, x head dimension, v vocabulary,
l layers.

Training and scoring::

    hidden = model.hidden(tokens, segment_ids=segment_ids, positions=positions)      # [b, s, d]
    logits = model.logits(hidden)                                                    # [b, s, v]

Generation, with a key/value cache, is :mod:`jax_medllm.decoder`: it runs the same layers through :meth:`Qwen2.hidden_in`.

Trained and frozen arrays separate by variable type: ``nnx.split(model, LoraParam, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jax_medllm.attention import KERNEL_OUTPUT, Visibility, attend, matmul_precision
from jax_medllm.embedding import lookup
from jax_medllm.linear import FrozenLoraParam, Linear, LoraParam, PackedParam, declare
from jax_medllm.sharding import Axis, constrain
from medllm.config import LoraConfig, RematPolicy
from medllm.errors import UserError
from medllm.quantization import Quantization

__all__ = ["FrozenLoraParam", "LoraParam", "PackedParam", "Qwen2", "Qwen2Config"]

_NARROW, _WIDE = "attention projections", "mlp projections"
_KEPT: dict[RematPolicy, tuple[str, ...]] = {
    "layer": (),
    "attention": (_NARROW, KERNEL_OUTPUT),
    "projections": (_NARROW, KERNEL_OUTPUT, _WIDE),
}
"""Beside each layer's input: the results a policy keeps, by the names they have in :class:`Attention`, in the TPU's attention
kernel and in :class:`Mlp`."""


RESIDUAL = ("batch", "sequence", None)
"""Logical axes of the residual stream."""


@dataclass(frozen=True)
class Qwen2Config:
    """The sizes of a Qwen2 model, in our names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    max_positions: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2Config:
        """Read the contents of a Hugging Face ``config.json``.

        Raises:
            UserError: the model is not a Qwen2, lacks a size, or uses a feature that is not supported.
        """
        _refuse_unsupported(config)
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
                rope_theta=float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0))),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                max_positions=int(config["max_position_embeddings"]),
            )
        except KeyError as error:
            raise UserError(f"config.json: has no {error.args[0]}; a Qwen2 config has it") from None

    def to_hf(self) -> dict[str, Any]:
        """Contents of a ``config.json`` that transformers opens."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "use_sliding_window": False,
        }


@dataclass(frozen=True)
class _Build:
    """What every module of the model is built with."""

    config: Qwen2Config
    lora: LoraConfig | None
    frozen_loras: tuple[LoraConfig, ...]
    reference: bool
    quantization: Quantization
    dtype: jnp.dtype
    rngs: nnx.Rngs

    @property
    def layers(self) -> Axis:
        return Axis("layers", self.config.num_layers)

    @property
    def embed(self) -> Axis:
        return Axis("embed", self.config.hidden_size)

    @property
    def embed_in(self) -> Axis:
        return Axis("embed_in", self.config.hidden_size)

    def linear(self, target: str, out_axis: Axis, in_axis: Axis, bias: bool = False) -> Linear:
        return Linear(
            target,
            self.layers,
            out_axis,
            in_axis,
            bias=bias,
            lora=self.lora,
            frozen_loras=self.frozen_loras,
            reference=self.reference,
            quantization=self.quantization,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm(self, *layers: Axis) -> RMSNorm:
        axes = (*layers, Axis("norm", self.config.hidden_size))
        weight = declare(nnx.Param, axes, self.dtype, nnx.initializers.ones, self.rngs.params())
        return RMSNorm(weight, self.config.rms_norm_eps)

    def table(self, rows: str, columns: str) -> Table:
        axes = (Axis(rows, self.config.vocab_size), Axis(columns, self.config.hidden_size))
        return Table(declare(nnx.Param, axes, self.dtype, nnx.initializers.normal(0.02), self.rngs.params()))


class Table(nnx.Module):
    """One row for each token of the vocabulary: the embedding, or the output matrix."""

    def __init__(self, weight: nnx.Variable):
        self.weight = weight

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
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


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and biases on q, k and v."""

    def __init__(self, build: _Build):
        config = build.config
        self.config = config
        heads = Axis("heads", config.num_heads * config.head_dim, config.num_heads)
        kv_heads = Axis("kv_heads", config.num_kv_heads * config.head_dim, config.num_kv_heads)
        self.q_proj = build.linear("q_proj", heads, build.embed_in, bias=True)
        self.k_proj = build.linear("k_proj", kv_heads, build.embed_in, bias=True)
        self.v_proj = build.linear("v_proj", kv_heads, build.embed_in, bias=True)
        self.o_proj = build.linear("o_proj", build.embed, replace(heads, name="heads_in"))

    def __call__(self, x: Float[Array, "b s d"], rotary: Rotary, context: Any, adapter: bool) -> tuple[Array, Any]:
        """Attend; ``context`` takes queries, keys and values and answers with what the queries see."""
        b, s, _ = x.shape
        projected = (
            checkpoint_name(project(x, adapter=adapter), _NARROW).reshape(b, s, -1, self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = projected
        out, kept = context.attend(rotary(q), rotary(k), v)
        return checkpoint_name(self.o_proj(out.reshape(b, s, -1), adapter=adapter), _NARROW), kept


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, build: _Build):
        mlp = Axis("mlp", build.config.intermediate_size)
        self.gate_proj = build.linear("gate_proj", mlp, build.embed_in)
        self.up_proj = build.linear("up_proj", mlp, build.embed_in)
        self.down_proj = build.linear("down_proj", build.embed, replace(mlp, name="mlp_in"))

    def __call__(self, x: Float[Array, "b s d"], adapter: bool) -> Float[Array, "b s d"]:
        """Apply the block."""
        gate = checkpoint_name(self.gate_proj(x, adapter=adapter), _WIDE)
        gate, x = jax.lax.optimization_barrier((gate, x))  # or both dense weights are made, and lie in memory, together
        up = checkpoint_name(self.up_proj(x, adapter=adapter), _WIDE)
        return self.down_proj(jax.nn.silu(gate) * up, adapter=adapter)


class Layer(nnx.Module):
    """One decoder layer; as part of the model its arrays are stacked over all layers."""

    def __init__(self, build: _Build):
        self.input_layernorm = build.norm(build.layers)
        self.self_attn = Attention(build)
        self.post_attention_layernorm = build.norm(build.layers)
        self.mlp = Mlp(build)

    def __call__(self, x: Float[Array, "b s d"], rotary: Rotary, context: Any, adapter: bool) -> tuple[Array, Any]:
        """The layer's output and what it leaves for the cache."""
        attended, kept = self.self_attn(self.input_layernorm(x), rotary, context, adapter)
        x = constrain(x + attended, *RESIDUAL)
        return x + self.mlp(self.post_attention_layernorm(x), adapter), kept


class Qwen2(nnx.Module):
    """The model.

    Args:
        config: Its sizes.
        lora: Adapter to train (``LoraParam``): A random, B zero.
        frozen_loras: Adapters that belong to the model (``FrozenLoraParam``), in the order they are added.
        reference: The trained adapter has a frozen counterpart, which takes its place where it is switched off.
        quantization: How the seven linear kinds are held; embeddings, norms and biases stay in ``dtype``.
        dtype: Type of weights and computation; LoRA matrices are fp32.
        rngs: Keys of the random base weights. To load weights instead use :func:`jax_medllm.weights.load_model`.
    """

    def __init__(
        self,
        config: Qwen2Config,
        *,
        lora: LoraConfig | None = None,
        frozen_loras: tuple[LoraConfig, ...] = (),
        reference: bool = False,
        quantization: Quantization = "none",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = _Build(config, lora, frozen_loras, reference, quantization, jnp.dtype(dtype), rngs)
        self.config = config
        self.lora = lora
        self.frozen_loras = frozen_loras
        self.dtype = build.dtype
        self.embed_tokens = build.table("vocab", "columns")
        self.layers = Layer(build)
        self.norm = build.norm()
        self.lm_head = None if config.tie_embeddings else build.table("head_vocab", "head_width")

    def hidden(
        self,
        tokens: Int[Array, "b s"],
        *,
        segment_ids: Int[Array, "b s"],
        positions: Int[Array, "b s"],
        parent_ids: Int[Array, "b s"] | None = None,
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
        context = RowContext.of(segment_ids, parent_ids)
        return self.norm(self._run(tokens, positions, lambda _: context, adapter, remat=remat)[0])

    def hidden_states(
        self,
        tokens: Int[Array, "b s"],
        *,
        segment_ids: Int[Array, "b s"],
        positions: Int[Array, "b s"],
        adapter: bool = True,
    ) -> Float[Array, "l+1 b s d"]:
        """The residual stream after the embedding and after every layer, before the final norm; for audits.

        Arguments as for :meth:`hidden`.
        """
        context = RowContext.of(segment_ids, None)
        _, after = self._run(tokens, positions, lambda _: context, adapter, leave=lambda x, _: x)
        return jnp.concatenate([self.embed_tokens(tokens)[None], after])

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Scores over the vocabulary, accumulated in fp32 (float64 for float64)."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        precision = matmul_precision(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, self.head_weight(), precision=precision, preferred_element_type=wide)

    def head_weight(self) -> Float[Array, "v d"]:
        """The output matrix: the embedding where the two are tied."""
        table = (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]
        return constrain(table, "head_vocab", None, first="head_vocab")

    def hidden_in(
        self, tokens: Int[Array, "b s"], *, positions: Int[Array, "b s"], context: Callable[[Any], Any], cache: Any
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
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"],
        context: Callable[[Any], Any],
        adapter: bool,
        cache: Any = None,
        *,
        leave: Callable[[Array, Any], Any] = lambda _, kept: kept,
        remat: RematPolicy = "none",
    ) -> tuple[Float[Array, "b s d"], Any]:
        """Embed, and scan the layers with their slice of the cache: the residual stream, and what the layers leave, stacked.

        ``leave`` makes that of a layer's output and of what its attention kept.
        """
        rotary = Rotary.at(positions, self.config, self.dtype)
        graph, stacked = nnx.split(self.layers)

        def step(x: Array, layer: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            state, past = layer
            x, kept = nnx.merge(graph, state)(x, rotary, context(past), adapter)
            return constrain(x, *RESIDUAL), leave(x, kept)

        if remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        return jax.lax.scan(step, self.embed_tokens(tokens), (stacked, cache))


@dataclass(frozen=True)
class RowContext:
    """What a layer of a whole row attends to: its own keys and values."""

    visible: Visibility

    @classmethod
    def of(cls, segment_ids: Int[Array, "b s"], parent_ids: Int[Array, "b s"] | None) -> RowContext:
        return cls(jax.tree.map(jnp.asarray, Visibility(segment_ids, parent_ids)))

    def attend(self, q: Float[Array, "b s h x"], k: Array, v: Array) -> tuple[Float[Array, "b s h x"], None]:
        """What the queries see; nothing is left behind."""
        return attend(q, k, v, self.visible), None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotary:
    """Rotation of heads by position (RoFormer, arXiv 2104.09864), in Hugging Face's half-split layout."""

    cos: Float[Array, "b s x"]
    sin: Float[Array, "b s x"]

    @classmethod
    def at(cls, positions: Int[Array, "b s"], config: Qwen2Config, dtype: jnp.dtype) -> Rotary:
        wide = jnp.promote_types(dtype, jnp.float32)
        # The power rounded to fp32, then its reciprocal: the last bits decide the angle at position 30,000.
        periods = (config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)).astype(wide)
        angles = positions[..., None].astype(wide) * (1 / periods)
        both = jnp.concatenate([angles, angles], axis=-1)
        return cls(jnp.cos(both), jnp.sin(both))

    def __call__(self, heads: Float[Array, "b s n x"]) -> Float[Array, "b s n x"]:
        """Rotate; in fp32 or wider, rounded once."""
        first, second = jnp.split(heads, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        return (heads * self.cos[:, :, None] + turned * self.sin[:, :, None]).astype(heads.dtype)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings: transformers 5 writes ``rope_parameters``, earlier ones ``rope_scaling`` and a bare theta."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "qwen2":
        raise UserError(f"config.json: model_type is {config.get('model_type')!r}; only 'qwen2' (Qwen2, Qwen2.5) is supported")
    kind = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    if kind not in ("default", None):
        raise UserError(f"config.json: rope scaling {kind!r} is not supported; use a model without it (rope_scaling null)")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError("config.json: sliding window attention is not supported; set use_sliding_window to false")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; Qwen2.5 has 'silu'")
    if config.get("attention_dropout"):
        raise UserError("config.json: attention_dropout is not supported; set it to 0")
