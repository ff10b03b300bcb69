"""What the families of decoders differ in, as far as no ``config.json`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from medllm.errors import UserError

_WINDOW = 4096
"""transformers' window where a ``config.json`` of a family that may have one does not say."""

Sliding = Literal["never", "from a layer on", "always"]
"""Where a family's window is: nowhere; in the layers that ``layer_types`` or ``max_window_layers`` says, if
``use_sliding_window`` does; in every layer, unless ``sliding_window`` is null."""


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    Attributes:
        name: What its classes in transformers begin with.
        releases: Models of it, for messages.
        biased: The projections that have a bias.
        bias_settings: What a ``config.json`` may say → the projections that have a bias then.
        head_norms: Queries and keys are normalized, head by head, before they turn.
        sliding: Which layers see a window alone.
        defaults: Our name of a size → what transformers takes where a ``config.json`` does not say; None for what follows from
            other sizes.
        activation: Between gate and up, as ``hidden_act`` calls it.
    """

    name: str
    releases: str
    biased: tuple[str, ...] = ()
    bias_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_norms: bool = False
    sliding: Sliding = "never"
    defaults: Mapping[str, int | None] = field(default_factory=dict)
    activation: str = "silu"

    def biases(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The projections that have a bias in a model with this ``config.json``."""
        asked_for = [kinds for setting, kinds in self.bias_settings.items() if config.get(setting)]
        return self.biased + tuple(kind for kinds in asked_for for kind in kinds)

    def window(self, config: Mapping[str, Any], where: object) -> int | None:
        """Positions a query sees in every layer, its own included; None for all before it.

        Raises:
            UserError: some layers see a window and others all.
        """
        window = config.get("sliding_window", _WINDOW)
        first = config.get("max_window_layers", 28)
        listed = config.get("layer_types")
        whole = (window is None or (type(window) is int and window > 0)) and type(first) is int
        if not whole or not isinstance(listed, list | None) or not all(isinstance(kind, str) for kind in listed or ()):
            raise UserError(
                f"{where}: sliding_window {window!r}, max_window_layers {first!r} or layer_types is not what "
                "transformers writes: whole numbers, and a list of names"
            )
        if self.sliding == "always":
            return window
        if self.sliding == "never":
            return None
        layers = config["num_hidden_layers"]
        derived = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        if not config.get("use_sliding_window"):
            window, derived = None, ["full_attention"] * layers
        kinds = set(listed or derived)
        if kinds == {"full_attention"}:
            return None
        if kinds == {"sliding_attention"} and window is not None:
            return window
        raise UserError(
            f"{where}: sliding_window on some layers is not supported (use_sliding_window, max_window_layers, layer_types); "
            "either all layers see a window, or none does"
        )

    def to_hf(self, biased: tuple[str, ...], window: int | None, layers: int) -> dict[str, Any]:
        """The entries of a ``config.json`` that :meth:`biases` and :meth:`window` read."""
        found: dict[str, Any] = {name: set(kinds) <= set(biased) for name, kinds in self.bias_settings.items()}
        if self.sliding != "never":
            found["sliding_window"] = window
        if self.sliding == "from a layer on":
            found |= {"use_sliding_window": window is not None, "max_window_layers": 0 if window else layers}
        return found


_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION: Mapping[str, tuple[str, ...]] = {"attention_bias": (*_QKV, "o_proj")}
_MLP: Mapping[str, tuple[str, ...]] = {"mlp_bias": ("gate_proj", "up_proj", "down_proj")}

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family("Qwen2", "Qwen2, Qwen2.5", biased=_QKV, sliding="from a layer on", defaults={"num_kv_heads": 32}),
    "qwen3": Family(
        "Qwen3",
        "Qwen3",
        bias_settings=_ATTENTION,
        head_norms=True,
        sliding="from a layer on",
        defaults={"num_kv_heads": 32, "head_dim": 128},
    ),
    "llama": Family("Llama", "Llama 2 and 3, Swallow, sarashina2", bias_settings={**_ATTENTION, **_MLP}),
    "mistral": Family("Mistral", "Mistral 7B, Mistral Small", sliding="always", defaults={"num_kv_heads": 8}),
}
"""The families that are supported, by their ``model_type``."""
