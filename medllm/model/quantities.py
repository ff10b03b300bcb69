"""What an audit compares inside a decoder layer, in the order in which it is computed.

One table for all stacks: a quantity is the input or the output of a submodule that has the same name in transformers and in
:mod:`jax_medllm.model.decoder`, or what the attention is handed after the rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medllm.architecture import Architecture, layer_path


@dataclass(frozen=True)
class Quantity:
    """A value inside a layer.

    Attributes:
        name: What it is.
        module: The module that is at fault where it is wrong and everything before it is right; "" is the layer itself.
        tap: The submodule it is read at; None for what the attention is handed.
        side: Whether it goes into that submodule or comes out.
    """

    name: str
    module: str
    tap: str | None
    side: Literal["in", "out"] = "out"

    def module_of(self, layer: int) -> str:
        """The module's full name in layer ``layer``."""
        return layer_path(layer) + (f".{self.module}" if self.module else "")


LAYER = (
    Quantity("input norm", "input_layernorm", "input_layernorm"),
    Quantity("q before rotary", "self_attn.q_proj", "self_attn.q_proj"),
    Quantity("k before rotary", "self_attn.k_proj", "self_attn.k_proj"),
    Quantity("v", "self_attn.v_proj", "self_attn.v_proj"),
    Quantity("q norm", "self_attn.q_norm", "self_attn.q_norm"),
    Quantity("k norm", "self_attn.k_norm", "self_attn.k_norm"),
    Quantity("q after rotary", "self_attn", None),
    Quantity("k after rotary", "self_attn", None),
    Quantity("attention output", "self_attn", "self_attn.o_proj", "in"),
    Quantity("o_proj output", "self_attn.o_proj", "self_attn.o_proj"),
    Quantity("residual after attention", "", "post_attention_layernorm", "in"),
    Quantity("post-attention norm", "post_attention_layernorm", "post_attention_layernorm"),
    Quantity("gate", "mlp.gate_proj", "mlp.gate_proj"),
    Quantity("up", "mlp.up_proj", "mlp.up_proj"),
    Quantity("activation product", "mlp", "mlp.down_proj", "in"),
    Quantity("down", "mlp.down_proj", "mlp.down_proj"),
    Quantity("layer output", "", ""),
)


def quantities(architecture: Architecture) -> tuple[Quantity, ...]:
    """Those of :data:`LAYER` that the layers of a model have: of norms, what is declared."""
    absent = {quantity.tap for quantity in LAYER if quantity.tap and quantity.tap.endswith("norm")} - set(architecture.norms)
    return tuple(quantity for quantity in LAYER if quantity.tap not in absent)


def taps(architecture: Architecture) -> dict[str, dict[str, str]]:
    """The submodules that are listened to: name → side of it → what is read there."""
    found: dict[str, dict[str, str]] = {}
    for quantity in quantities(architecture):
        if quantity.tap:
            found.setdefault(quantity.tap, {})[quantity.side] = quantity.name
    return found
