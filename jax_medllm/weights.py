"""Weights in and out: Hugging Face models, PEFT adapters, bitsandbytes 4-bit directories.

One rule maps an array of the model to its tensors on disk, in both directions: an attribute path is Hugging Face's module
path, orientation included, and an array below ``layers`` is the stack of one tensor a layer. Tensors are read one at a time
into their place in the stack, so the host holds one tensor, never the model.

A model's own adapter (``ModelConfig.adapter``) stays a frozen low-rank term beside the weight, as PEFT computes it; nothing
is ever added to a quantized weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.linear import FrozenLoraParam, LoraParam, PackedParam, Quantization, scaling
from jax_medllm.model import Qwen2, Qwen2Config
from jax_medllm.nf4 import NF4Weight, dequantize, quantize, weight_shapes
from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.model_directory import Adapter, ModelDirectory, read_adapter

_Path = tuple[Any, ...]
_ADAPTER_PREFIX = "base_model.model."
_PACKED_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")


def load_model(model: ModelConfig, *, lora: LoraConfig | None = None) -> Qwen2:
    """Open a model directory, with the adapter the configuration names (frozen) and a fresh one to train where asked.

    Raises:
        UserError: the directory is not a supported Qwen2, or a tensor is missing, superfluous or of another shape.
    """
    return read_model(
        ModelDirectory(model.path),
        lora=lora,
        adapter=read_adapter(model.adapter) if model.adapter else None,
        quantization=model.quantization,
        dtype=model.dtype,
    )


def read_model(
    directory: ModelDirectory,
    *,
    lora: LoraConfig | None = None,
    adapter: Adapter | None = None,
    quantization: Quantization = "none",
    dtype: Any = jnp.float32,
) -> Qwen2:
    """As :func:`load_model`, from opened directories and in any floating type.

    A bitsandbytes NF4 directory is read as it is, codes and scales, when ``quantization`` is ``nf4``. Dense weights are
    rounded to ``dtype`` before they are quantized, as bitsandbytes does.

    Raises:
        UserError: as for :func:`load_model`.
    """
    config = Qwen2Config.from_hf(directory.config)
    frozen = None if adapter is None else LoraConfig(adapter.rank, adapter.alpha, adapter.targets, adapter.rslora)

    def build() -> Qwen2:
        return Qwen2(config, lora=lora, frozen_lora=frozen, quantization=quantization, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    slots = _base_slots(model)
    _check_tensors(directory, slots, config)
    arrays = {path: jnp.zeros(v.shape, v.dtype) for path, v in _variables(model, nnx.Not(LoraParam)).items()}
    for name, slot in slots.items():
        _place(arrays, slot, _read(directory, name, slot), model.dtype)
    if adapter is not None:
        arrays |= _adapter_arrays(model, FrozenLoraParam, adapter)
    if lora is not None:
        # Only the adapter leaves the compiled function, so the random base weights it is built with are never computed.
        initial = jax.jit(lambda: nnx.state(build(), LoraParam))()
        arrays |= {path: variable[...] for path, variable in nnx.to_flat_state(initial)}
    _assign(model, arrays)
    return model


def model_tensors(model: Qwen2) -> Iterator[tuple[str, np.ndarray]]:
    """Base weights under Hugging Face's names, in the model's type, one tensor in host memory at a time.

    Quantized weights come out dequantized. A frozen adapter is added in fp32; the trained one is not in it
    (:func:`adapter_tensors`).
    """
    variables = _variables(model, ...)
    for name, slot in _base_slots(model).items():
        weight = _slot_value(variables, slot, model.dtype)
        stem = slot.path[:-1]
        down, up = variables.get((*stem, "frozen_lora", "A")), variables.get((*stem, "frozen_lora", "B"))
        if down is not None and up is not None and slot.path[-1] != "bias":
            assert model.frozen_lora is not None
            update = scaling(model.frozen_lora) * (np.asarray(up[slot.layer]) @ np.asarray(down[slot.layer]))
            weight = (weight.astype(update.dtype) + update).astype(weight.dtype)
        yield name, weight


def adapter_tensors(model: Qwen2) -> dict[str, np.ndarray]:
    """The trained adapter under PEFT's names, fp32: A [rank, in] and B [out, rank] of each layer and target."""
    return {
        name: np.asarray(variable[layer])
        for path, variable in _variables(model, LoraParam).items()
        for layer, name in enumerate(_adapter_names(path, variable.shape[0]))
    }


def set_adapter(model: Qwen2, adapter: Adapter) -> None:
    """Load a PEFT adapter into the trainable one, to go on training it.

    Raises:
        UserError: rank, scaling or targets differ from the model's adapter, or a tensor is missing, superfluous or misshapen.
    """
    lora = model.lora
    if lora is None:
        raise UserError(f"{adapter.path}: the model was opened without an adapter to train; give a lora configuration")
    given = LoraConfig(adapter.rank, adapter.alpha, adapter.targets, adapter.rslora, lora.seed)
    for field in ("rank", "alpha", "rslora"):
        if getattr(given, field) != getattr(lora, field):
            raise UserError(
                f"{adapter.path}: the adapter has {field} {getattr(given, field)}, the configuration {getattr(lora, field)}; "
                f"set --lora.{field} {getattr(given, field)}"
            )
    if set(given.targets) != set(lora.targets):
        raise UserError(
            f"{adapter.path}: the adapter targets {', '.join(given.targets)}, the configuration {', '.join(lora.targets)}; "
            "set --lora.targets to the adapter's"
        )
    _assign(model, _adapter_arrays(model, LoraParam, adapter))


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes: an array of the model, a layer of it (None: the whole), and the shape expected on disk.

    The path of a quantized weight ends in ``quantized`` and stands for all parts of it.
    """

    path: _Path
    layer: int | None
    shape: tuple[int, ...]

    @property
    def quantized(self) -> bool:
        return self.path[-1] == "quantized"


def _variables(model: Qwen2, kind: Any) -> dict[_Path, Any]:
    return dict(nnx.to_flat_state(nnx.state(model) if kind is ... else nnx.state(model, kind)))


def _base_slots(model: Qwen2) -> dict[str, _Slot]:
    """Hugging Face name → slot, for every base tensor of the model."""
    slots = {}
    for path, variable in _variables(model, ...).items():
        shape = tuple(variable.shape)
        if isinstance(variable, LoraParam | FrozenLoraParam):
            continue
        if isinstance(variable, PackedParam):
            if path[-1] != "packed":
                continue
            path, shape = path[:-1], (*shape[:-1], 2 * shape[-1])
        for layer in range(shape[0]) if path[0] == "layers" else [None]:
            slots[_tensor_name(path, layer)] = _Slot(path, layer, shape if layer is None else shape[1:])
    return slots


def _tensor_name(path: _Path, layer: int | None) -> str:
    """The rule: ``layers/self_attn/q_proj/weight``, layer 3 → ``model.layers.3.self_attn.q_proj.weight``."""
    if path[0] == "lm_head":
        return "lm_head.weight"
    parts = [str(part) for part in path]
    if layer is not None:
        parts.insert(1, str(layer))
    if parts[-1] == "quantized":
        parts[-1] = "weight"
    return ".".join(["model", *parts])


def _adapter_names(path: _Path, layers: int) -> list[str]:
    """The same for adapters: ``layers/self_attn/q_proj/lora/A`` → PEFT's name in each layer."""
    module, matrix = path[:-2], path[-1]
    return [f"{_ADAPTER_PREFIX}{_tensor_name((*module, f'lora_{matrix}', 'weight'), layer)}" for layer in range(layers)]


def _check_tensors(directory: ModelDirectory, slots: dict[str, _Slot], config: Qwen2Config) -> None:
    """All names and shapes, before the first tensor is read."""
    for name, slot in slots.items():
        if name not in directory:
            raise UserError(f"{directory.path}: has no tensor {name}, which its config.json asks for; copy the whole model")
        packed = _is_packed(directory, name)
        if packed and not slot.quantized:
            raise UserError(f"{directory.path}: {name} is stored in 4 bits; open this model with --model.quantization nf4")
        shape = tuple(_packed_state(directory, name)["shape"]) if packed else directory.shape(name)
        if shape != slot.shape:
            raise UserError(f"{directory.path}: {name} has shape {shape}; its config.json makes it {slot.shape}")
    known = set(slots) | {f"{name}{part}" for name, slot in slots.items() if slot.quantized for part in _PACKED_PARTS}
    if config.tie_embeddings:
        known.add("lm_head.weight")  # some savers write the tied matrix twice
    for name in directory.names():
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{directory.path}: holds {name}, which a Qwen2 with this config.json does not have")


def _is_packed(directory: ModelDirectory, name: str) -> bool:
    return f"{name}{_PACKED_PARTS[-1]}" in directory


def _packed_state(directory: ModelDirectory, name: str) -> dict[str, Any]:
    """bitsandbytes' description of a 4-bit tensor."""
    state = json.loads(directory.read(f"{name}{_PACKED_PARTS[-1]}").tobytes())
    expected = {"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 256}
    for key, value in expected.items():
        if state.get(key) != value:
            raise UserError(f"{directory.path}: {name} has {key} {state.get(key)}; only {value} (double-quantized nf4) is read")
    return state


def _read(directory: ModelDirectory, name: str, slot: _Slot) -> np.ndarray | NF4Weight:
    """A tensor as it is on disk: dense, or the parts of a 4-bit one."""
    if not _is_packed(directory, name):
        return directory.read(name)
    shapes = weight_shapes(*slot.shape)
    return NF4Weight(
        packed=directory.read(name).reshape(shapes.packed.shape),
        absmax_codes=directory.read(f"{name}.absmax").reshape(shapes.absmax_codes.shape),
        nested_absmax=directory.read(f"{name}.nested_absmax"),
        offset=np.float32(_packed_state(directory, name)["nested_offset"]),
    )


def _place(arrays: dict[_Path, jax.Array], slot: _Slot, tensor: np.ndarray | NF4Weight, dtype: Any) -> None:
    """Put one tensor into its stack, quantized where the model is."""
    if slot.quantized:
        packed = tensor if isinstance(tensor, NF4Weight) else _quantize_rounded(tensor, dtype)
        for part in ("packed", "absmax_codes", "nested_absmax", "offset"):
            path = (*slot.path, part)
            arrays[path] = _write_layer(arrays[path], getattr(packed, part), slot.layer)
    elif slot.layer is not None:
        arrays[slot.path] = _write_layer(arrays[slot.path], tensor, slot.layer)
    else:
        arrays[slot.path] = jnp.asarray(tensor, dtype)


@partial(jax.jit, static_argnums=1)
def _quantize_rounded(weight: jax.Array, dtype: Any) -> NF4Weight:
    return quantize(weight.astype(dtype))


@partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
    return stack.at[layer].set(tensor.astype(stack.dtype))


def _slot_value(variables: dict[_Path, Any], slot: _Slot, dtype: Any) -> np.ndarray:
    if slot.quantized:
        parts = {
            part: variables[(*slot.path, part)][slot.layer] for part in ("packed", "absmax_codes", "nested_absmax", "offset")
        }
        return np.asarray(dequantize(NF4Weight(**parts), dtype))
    variable = variables[slot.path]
    return np.asarray(variable[...] if slot.layer is None else variable[slot.layer])


def _adapter_arrays(model: Qwen2, kind: type[nnx.Variable], adapter: Adapter) -> dict[_Path, jax.Array]:
    """The stacked arrays of an adapter, each tensor checked against the model."""
    unused = dict(adapter.tensors)
    arrays = {}
    for path, variable in _variables(model, kind).items():
        layers, *shape = variable.shape
        stack = np.empty(variable.shape, variable.dtype)
        for layer, name in enumerate(_adapter_names(path, layers)):
            tensor = unused.pop(name, None)
            if tensor is None:
                raise UserError(f"{adapter.path}: the adapter has no tensor {name}; was it trained on a smaller model?")
            if tensor.shape != tuple(shape):
                raise UserError(f"{adapter.path}: {name} has shape {tensor.shape}; this model needs {tuple(shape)}")
            stack[layer] = tensor
        arrays[path] = jnp.asarray(stack)
    if unused:
        raise UserError(f"{adapter.path}: the adapter holds {next(iter(unused))}, for which this model has no place")
    return arrays


def _assign(model: Qwen2, arrays: dict[_Path, jax.Array]) -> None:
    """Set variables of the model, abstract or filled, to ``arrays``."""
    variables = {path: variable.replace(arrays[path]) for path, variable in _variables(model, ...).items() if path in arrays}
    nnx.update(model, nnx.from_flat_state(variables))
