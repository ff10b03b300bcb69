"""A decoder as data: what is said of it once, and what follows from that.

An :class:`Architecture` is read from a ``config.json`` and written to one. Its tensors with their logical axes, the number of
its parameters and their bytes are derived from it, and so is what builds, loads, plans and measures a model of it: the JAX
model is made of the axes declared here. No framework is imported, and nothing is computed with weights.

A family of models is an entry of :data:`medllm.families.FAMILIES`; a published size is one of
:data:`medllm.published.PUBLISHED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from medllm.axes import Axis
from medllm.errors import UserError
from medllm.families import FAMILIES, Family
from medllm.quantization import PACKINGS
from medllm.rotary import RotaryRule

Number = TypeVar("Number", int, float)

PROJECTIONS: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""The linear layers of a decoder layer in the order they compute, and Hugging Face's path of each inside the layer."""

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""The tensors around the layers; the last is there where it is not tied to the first."""

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""The norms of queries and of keys, where a family has them."""


@dataclass(frozen=True)
class Projection:
    """A linear layer of a decoder layer, W [out, in].

    Attributes:
        out: The axis of its outputs.
        into: The axis of its inputs.
        bias: Whether it has one.
    """

    out: Axis
    into: Axis
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of its weight."""
        return self.out.size, self.into.size


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
        kind: ``linear``: a weight that a quantization packs; ``bias``; ``norm``; ``table``: a row for each token.
        axes: Its logical axes.
    """

    kind: Literal["linear", "bias", "norm", "table"]
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As on disk."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1  # of what an array's axis may have, and far from any model's

_KEYS: Mapping[str, tuple[str, type]] = {
    "num_layers": ("num_hidden_layers", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_heads": ("num_attention_heads", int),
    "num_kv_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "vocab_size": ("vocab_size", int),
    "max_positions": ("max_position_embeddings", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "tie_embeddings": ("tie_word_embeddings", bool),
}
"""Our name → what a ``config.json`` calls it, and its type there."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense decoder: grouped-query attention with rotary positions, SwiGLU, RMSNorm before each.

    Attributes:
        family: Its entry of :data:`medllm.families.FAMILIES`.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_heads: Query heads.
        num_kv_heads: Key/value heads, which divide the query heads.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding.
        max_positions: Longest text.
        rotary: How heads turn with their position.
        rms_norm_eps: Added to the mean square in every norm.
        tie_embeddings: The embedding is the output matrix too.
        biased: The projections that have a bias.
        window: Positions that a query sees, its own included; None for all before it.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rotary: RotaryRule
    rms_norm_eps: float
    tie_embeddings: bool
    biased: tuple[str, ...] = ()
    window: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str | Path = "config.json") -> Architecture:
        """Read the contents of a Hugging Face ``config.json``.

        Args:
            config: The contents.
            where: What an error calls the file.

        Raises:
            UserError: the model is of no supported family, lacks a size, or uses a feature that is not supported.
        """
        family = config.get("model_type", next(iter(FAMILIES)))  # what a config lacks that names none is said of the first
        if not isinstance(family, str) or family not in FAMILIES:
            known = ", ".join(f"{name!r} ({one.releases})" for name, one in FAMILIES.items())
            raise UserError(f"{where}: model_type is {family!r}; supported: {known}")
        kind = FAMILIES[family]
        found = {ours: _size(config, ours, where) for ours, (key, _) in _KEYS.items() if config.get(key) is not None}
        optional = ("num_kv_heads", "head_dim", "rms_norm_eps", "tie_embeddings")
        needed = [*(key for ours, (key, _) in _KEYS.items() if ours not in optional), "model_type"]
        if missing := [key for key in needed if config.get(key) is None]:
            raise UserError(f"{where}: has no {missing[0]}; a {kind.name} config has it")
        _refuse_unsupported(config, kind, where)
        given = {ours for ours, (key, _) in _KEYS.items() if key in config}  # null says as much as a number
        found |= {ours: size for ours, size in kind.defaults.items() if ours not in given}
        found.setdefault("num_kv_heads", found["num_heads"])
        found.setdefault("head_dim", found["hidden_size"] // found["num_heads"])
        if not found["head_dim"] or found["num_heads"] % found["num_kv_heads"]:
            heads = f"{found['num_heads']} heads, {found['num_kv_heads']} of keys, hidden_size {found['hidden_size']}"
            raise UserError(f"{where}: {heads}: num_key_value_heads must divide num_attention_heads, and these hidden_size")
        found.setdefault("rms_norm_eps", 1e-6)
        found.setdefault("tie_embeddings", False)
        rotary, biased, window = RotaryRule.from_hf(config, where), kind.biases(config), kind.window(config, where)
        return cls(family=family, rotary=rotary, biased=biased, window=window, **found)

    def to_hf(self) -> dict[str, Any]:
        """Contents of a ``config.json`` that transformers opens; the weights' type is not in it."""
        family = FAMILIES[self.family]
        return {
            "architectures": [f"{family.name}ForCausalLM"],
            "model_type": self.family,
            "hidden_act": family.activation,
            **{key: getattr(self, ours) for ours, (key, _) in _KEYS.items()},
            **self.rotary.to_hf(),
            **family.to_hf(self.biased, self.window, self.num_layers),
        }

    @property
    def norms(self) -> dict[str, int]:
        """The norms of a decoder layer, under their names inside it, and the width that each normalizes."""
        of_heads = dict.fromkeys(HEAD_NORMS, self.head_dim) if FAMILIES[self.family].head_norms else {}
        return of_heads | {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}

    @property
    def heads_width(self) -> int:
        """Of all queries of a token, and of what attention makes of them."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of all keys of a token, and of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, Projection]:
        """The linear layers of a decoder layer, in the order of :data:`PROJECTIONS`."""
        heads = Axis("heads", self.heads_width, self.num_heads)
        kv_heads = Axis("kv_heads", self.kv_width, self.num_kv_heads)
        mlp = Axis("mlp", self.intermediate_size)
        width, width_in = Axis("embed", self.hidden_size), Axis("embed_in", self.hidden_size)
        axes = {
            "q_proj": (heads, width_in),
            "k_proj": (kv_heads, width_in),
            "v_proj": (kv_heads, width_in),
            "o_proj": (width, replace(heads, name="heads_in")),
            "gate_proj": (mlp, width_in),
            "up_proj": (mlp, width_in),
            "down_proj": (width, replace(mlp, name="mlp_in")),
        }
        return {name: Projection(*axes[name], bias=name in self.biased) for name in PROJECTIONS}

    @property
    def layer(self) -> dict[str, Tensor]:
        """The tensors of one decoder layer, under their names inside it."""
        found = {}
        for name, projection in self.projections.items():
            found[f"{PROJECTIONS[name]}.weight"] = Tensor("linear", (projection.out, projection.into))
            if projection.bias:
                found[f"{PROJECTIONS[name]}.bias"] = Tensor("bias", (replace(projection.out, name="bias"),))
        return found | {f"{name}.weight": Tensor("norm", (Axis("norm", size),)) for name, size in self.norms.items()}

    @property
    def around(self) -> dict[str, Tensor]:
        """The tensors around the layers: :data:`EMBEDDING`, :data:`NORM` and, where it is not tied, :data:`HEAD`."""
        found = {
            EMBEDDING: Tensor("table", (Axis("vocab", self.vocab_size), Axis("columns", self.hidden_size))),
            NORM: Tensor("norm", (Axis("norm", self.hidden_size),)),
        }
        if not self.tie_embeddings:
            found[HEAD] = Tensor("table", (Axis("head_vocab", self.vocab_size), Axis("head_width", self.hidden_size)))
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, in the order a forward pass meets them."""
        embedding, *after = self.around.items()
        layer = self.layer.items()
        within = [(f"{layer_path(index)}.{name}", tensor) for index in range(self.num_layers) for name, tensor in layer]
        return dict([embedding, *within, *after])

    @property
    def results(self) -> dict[str, int]:
        """Width of each result inside a layer that the backward pass may ask for; what leaves the layer is not among them."""
        outputs = {name: projection.out.size for name, projection in self.projections.items() if name != "down_proj"}
        of_heads = dict(zip(HEAD_NORMS, (self.heads_width, self.kv_width), strict=True))
        norms = {name: of_heads.get(name, size) for name, size in self.norms.items()}
        return {**outputs, **norms, "attention": self.heads_width, "activation": self.intermediate_size}

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self._sum(lambda tensor: tensor.size)

    @property
    def linear_parameters(self) -> int:
        """Of the linear layers, biases apart."""
        return self._sum(lambda tensor: tensor.size if tensor.kind == "linear" else 0)

    def adapter_parameters(self, rank: int) -> int:
        """Of a LoRA adapter on all linear layers."""
        return self.num_layers * rank * sum(sum(projection.shape) for projection in self.projections.values())

    def weight_bytes(self, held: str, item: int) -> float:
        """Bytes of the weights: those of linear layers packed, where ``held`` is a packing; any other number takes ``item``."""
        packing = PACKINGS.get(held)
        return self._sum(lambda one: packing.bytes_of(one.size) if packing and one.kind == "linear" else one.size * item)

    def _sum(self, of: Callable[[Tensor], Number]) -> Number:
        return self.num_layers * sum(map(of, self.layer.values())) + sum(map(of, self.around.values()))


def layer_path(index: int) -> str:
    """Hugging Face's name of a decoder layer."""
    return f"model.layers.{index}"


def _size(config: Mapping[str, Any], ours: str, where: object) -> Any:
    """A number of a ``config.json``, or whether it ties its tables."""
    key, kind = _KEYS[ours]
    value = config[key]
    most = MOST_LAYERS if ours == "num_layers" else _LARGEST_SIZE
    fits, expected = {
        bool: (isinstance(value, bool), "true or false"),
        float: (isinstance(value, float) and 0 < value < 1, "a small positive number"),
        int: (type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most}"),
    }[kind]
    if not fits:
        raise UserError(f"{where}: {key} is {value!r}; expected {expected}")
    return value


def _refuse_unsupported(config: Mapping[str, Any], family: Family, where: object) -> None:
    if (activation := config.get("hidden_act", family.activation)) != family.activation:
        raise UserError(f"{where}: hidden_act {activation!r} is not supported; a {family.name} has {family.activation!r}")
    if config.get("attention_dropout"):
        raise UserError(f"{where}: attention_dropout is not supported; set it to 0")
