"""One decoder layer of the torch stack: transformers' own module, PEFT's adapters, bitsandbytes' 4-bit linears.

The same object is first run as transformers runs it, in the audit's type, and then, lifted, in float64 on the very same
weights: a linear layer's weight is widened where it is used, one at a time, so that the truth needs no float64 copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any, NamedTuple

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.quantizers_utils import should_convert_module

from jax_medllm.weights.bnb_files import stored, suffixes
from medllm.architecture import PROJECTIONS, layer_path
from medllm.model.adapter import Adapter
from medllm.model.directory import ModelDirectory
from medllm.model.quantities import quantities, taps
from medllm.quantization import PACKINGS, Quantization
from medllm_parity.oracle import is_norm, lift, row_mask, window_of
from medllm_parity.rows import Rows

_ADAPTER = "adapter"
_ATTENTION = "sdpa"  # what from_pretrained chooses


def to_torch(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of ``array`` (bfloat16 included), without a copy where the type stays."""
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.to(dtype)


class TorchLayer:
    """A decoder layer, loaded alone.

    Args:
        directory: Where its tensors are.
        config: The model's configuration, as transformers reads it.
        index: Which layer.
        dtype: Type of weights and computation.
        quantization: How the linear kinds are held: read as they are from a packed directory, quantized here from a dense one.
        adapters: The adapters on top, in order.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        config: PreTrainedConfig,
        index: int,
        dtype: torch.dtype,
        quantization: Quantization,
        *,
        adapters: Sequence[Adapter] = (),
    ):
        self.dtype = dtype
        self._config = config
        config._attn_implementation = "audited"
        parts = StockParts.of(config)
        with torch.device("meta"):
            layer: Any = parts.layer(config, index)
        prefix = f"{layer_path(index)}."
        for name, expected in layer.state_dict().items():
            stem, _, leaf = name.rpartition(".")
            module = layer.get_submodule(stem)
            linear = leaf == "weight" and stem in PROJECTIONS.values()
            if quantization in PACKINGS and linear and _converts(config, prefix + stem):
                weight = _weight4bit(directory, prefix + name, dtype, PACKINGS[quantization].double)
                replacement = _linear4bit(weight, expected.shape, module.bias, dtype)
                layer.set_submodule(stem, replacement)
            else:
                tensor = to_torch(directory.read(prefix + name), dtype)
                setattr(layer.get_submodule(stem), leaf, torch.nn.Parameter(tensor, requires_grad=False))
        self._taps = taps(directory.architecture)
        self._quantities = quantities(directory.architecture)
        self._linears = {kind: layer.get_submodule(path) for kind, path in PROJECTIONS.items()}
        self._attention = layer.self_attn
        self._attention.computes_with = _ATTENTION
        self._rotary = parts.rotary(config)
        self._stem = _Stem(config, layer, index, self._rotary)
        self._peft = _adapted(self._stem, index, adapters)
        self._layer = self._stem.model.layers[str(index)].eval()
        self.lifted = False

    def lift(self) -> None:
        """From here on compute in float64, on the same weights: the truth."""
        lift(self._stem)
        self._stem.config._attn_implementation = "audited"
        self._attention.computes_with = "unrounded"
        for linear in self._linears.values():
            linear.forward = MethodType(_wide_linear, linear)
        for module in self._layer.modules():
            if isinstance(module, LoraLayer):
                module.lora_A.double(), module.lora_B.double()
            elif is_norm(module):
                module.double()
        self.lifted = True

    def run(self, hidden: torch.Tensor, rows: Rows, *, adapter: bool = True) -> dict[str, torch.Tensor]:
        """Every quantity of the layer, [c·b, s, n], for hidden states [c·b, s, d] of c copies of the rows."""
        record: dict[str, torch.Tensor] = {}
        hooks = [
            hook
            for name, sides in self._taps.items()
            for hook in _tap(self._layer.get_submodule(name), sides, lambda n, x: record.update({n: x}))
        ]
        self._attention.tap = lambda name, heads: record.update({name: heads.transpose(1, 2).flatten(2)})
        try:
            with torch.no_grad():
                record["layer output"] = self.forward(hidden, rows, adapter=adapter)
        finally:
            self._attention.tap = None
            for hook in hooks:
                hook.remove()
        return {quantity.name: record[quantity.name].detach().flatten(2) for quantity in self._quantities}

    def forward(self, hidden: torch.Tensor, rows: Rows, *, adapter: bool = True) -> torch.Tensor:
        """The layer's output, as the model calls it."""
        copies = hidden.shape[0] // rows.tokens.shape[0]
        positions = torch.from_numpy(np.tile(rows.positions, (copies, 1))).long()
        mask = row_mask(np.tile(rows.segment_ids, (copies, 1)), hidden.dtype, window_of(self._config))
        off = nullcontext() if adapter or self._peft is None else self._peft.disable_adapter()
        with off:
            return self._layer(hidden, attention_mask=mask, position_embeddings=self._rotary(hidden, positions))

    def lora_matrices(self) -> dict[str, torch.nn.Parameter]:
        """The adapters' matrices: ``mlp.up_proj.lora_A.0`` is A of the first adapter."""
        return {
            f"{path}.lora_{matrix}.{name.removeprefix(_ADAPTER)}": layer.weight
            for path in PROJECTIONS.values()
            if isinstance(module := self._layer.get_submodule(path), LoraLayer)
            for matrix, layers in (("A", module.lora_A), ("B", module.lora_B))
            for name, layer in layers.items()
        }


class StockParts(NamedTuple):
    """The classes a family's model is built of in transformers."""

    layer: type[torch.nn.Module]
    norm: type[torch.nn.Module]
    rotary: type[torch.nn.Module]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> StockParts:
        """Those of the model with this configuration, in which nothing is computed."""
        shallow = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1, "layer_types": None})
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shallow).model
        return cls(type(model.layers[0]), type(model.norm), type(model.rotary_emb))


class _Stem(torch.nn.Module):
    """A model with a single layer in it, under the name it has in the whole model, so that PEFT's rules see that name."""

    def __init__(self, config: PreTrainedConfig, layer: torch.nn.Module, index: int, rotary: torch.nn.Module):
        super().__init__()
        self.config = config
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleDict({str(index): layer})
        self.model.rotary_emb = rotary


def _adapted(stem: _Stem, index: int, adapters: Sequence[Adapter]) -> peft.PeftModel | None:
    """Put the adapters' matrices of this layer on it with PEFT, all of them active."""
    wrapped: peft.PeftModel | None = None
    names = []
    for number, adapter in enumerate(adapters):
        prefix = f"base_model.model.{layer_path(index)}."
        tensors = {name: to_torch(tensor) for name, tensor in adapter.tensors.items() if name.startswith(prefix)}
        if not tensors:
            continue
        config = peft.LoraConfig.from_pretrained(adapter.path)
        # PEFT expands "all-linear", patterns and layers_to_transform against a whole model; here they are names already.
        config.target_modules = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors})
        config.layers_to_transform = config.layers_pattern = None
        config.inference_mode = False
        name = f"{_ADAPTER}{number}"
        if wrapped is None:
            wrapped = peft.PeftModel(stem, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        peft.set_peft_model_state_dict(wrapped, tensors, adapter_name=name)
        names.append(name)
    if wrapped is not None:
        wrapped.base_model.set_adapter(names)
    return wrapped


def _converts(config: Any, module: str) -> bool:
    """Whether transformers makes a linear layer of the model one of 4 bits, by what the folder says of its quantization."""
    said = getattr(config, "quantization_config", None) or {}
    return should_convert_module(module, said.get("llm_int8_skip_modules") or [])


def _weight4bit(directory: ModelDirectory, name: str, dtype: torch.dtype, double: bool) -> bnb.nn.Params4bit:
    """A packed weight as it is; a dense one quantized as transformers has bitsandbytes do it when it opens a model."""
    packed = packed_weight(directory, name, dtype)
    if packed is not None:
        return packed
    return bnb.nn.Params4bit(to_torch(directory.read(name), dtype), quant_type="nf4", compress_statistics=double).to("cpu")


def packed_weight(directory: ModelDirectory, name: str, dtype: torch.dtype) -> bnb.nn.Params4bit | None:
    """A packed weight as bitsandbytes holds it, to be dequantized to ``dtype``; None where it is dense."""
    packed = stored(directory, name)
    if packed is None:
        return None
    parts = {suffix.removeprefix("."): to_torch(directory.read(f"{name}{suffix}")) for suffix in suffixes(packed.kind)}
    weight = bnb.nn.Params4bit.from_prequantized(to_torch(directory.read(name)), parts, device="cpu")
    # The audit's type, not the one the directory was saved in: the dequantized weight is rounded once, to the former.
    weight.quant_state.dtype = dtype
    return weight


def _linear4bit(weight: bnb.nn.Params4bit, shape: Sequence[int], bias: Any, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(shape[1], shape[0], bias is not None, compute_dtype=dtype, quant_type="nf4")
    linear.weight = weight
    weight.module = linear
    linear.quant_state = weight.quant_state
    # On a CPU with AVX512-BF16 an evaluation-mode forward would repack the weight, after which biased layers raise.
    linear.support_avx512bf16_for_cpu = False
    return linear


def dense(linear: torch.nn.Module) -> torch.Tensor:
    """The weight a linear layer multiplies with."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight


class _WideProduct(torch.autograd.Function):
    """x Wᵀ in float64; the float64 weight lives as long as the product, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: torch.nn.Module) -> torch.Tensor:
        ctx.linear = linear
        return x @ dense(linear).double().T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ dense(ctx.linear).double(), None


def _wide_linear(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = _WideProduct.apply(x, self)
    return y if self.bias is None else y + self.bias.double()


def _tap(module: torch.nn.Module, sides: Mapping[str, str], keep: Callable[[str, torch.Tensor], None]) -> list[Any]:
    """Hooks that keep what goes into and what comes out of a module, where the table of quantities asks for it."""
    hooks = []
    if "in" in sides:
        hooks.append(module.register_forward_pre_hook(lambda _, given: keep(sides["in"], given[0])))
    if "out" in sides:
        hooks.append(module.register_forward_hook(lambda _, __, out: keep(sides["out"], out)))
    return hooks


def _audited(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any) -> Any:
    """The attention the module computes with, overheard."""
    if getattr(module, "tap", None) is not None:
        module.tap("q after rotary", query)
        module.tap("k after rotary", key)
    return ALL_ATTENTION_FUNCTIONS[module.computes_with](module, query, key, value, mask, **settings)


AttentionInterface.register("audited", _audited)
AttentionMaskInterface.register("audited", eager_mask)
