"""Weights in and out: Hugging Face models, PEFT adapters, bitsandbytes 4-bit directories.

One rule maps an array of the model to its tensors on disk, in both directions: an attribute path is Hugging Face's module
path, orientation included, and an array below ``layers`` is the stack of one tensor a layer. Tensors are read some rows at a
time into their place in the stack, quantized on the way, so beside the model memory holds a piece of one tensor.

Of a directory in 4 bits, layers that are stored dense are held dense, the others of their kind packed
(:mod:`jax_medllm.model.partly_dense`). A packed output matrix is held as the numbers it is multiplied as: it is multiplied with
anew for every few positions of a row, and its rows are looked up (:mod:`jax_medllm.model.logprobs`), for which it would be
dequantized each time. That costs memory, not accuracy.

A model's own adapters (``ModelConfig.adapter``) stay frozen low-rank terms beside the weight, as PEFT computes them; nothing is
ever added to a quantized weight. Adapters' own arrays are :mod:`jax_medllm.weights.adapters`'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_medllm.mesh.host_memory import release_free_memory
from jax_medllm.mesh.layout import place_parameter
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import FrozenLoraParam, LoraParam, LoraScaling, PackedParam
from jax_medllm.model.nf4 import quantize_blocks
from jax_medllm.model.partly_dense import Place, SomeLayers
from jax_medllm.model.quantized_weight import QuantizedWeight, dequantize_rows
from jax_medllm.weights.adapters import REFERENCE, TRAINED, Path, adapter_arrays, assign, frozen, frozen_update, variables
from jax_medllm.weights.blueprint import Blueprint
from jax_medllm.weights.bnb_files import packed_config, packed_parts, read_packed, stored, suffixes
from jax_medllm.weights.filling import Stack
from medllm.architecture import HEAD
from medllm.config import ALL_LINEAR, LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.model.adapter import Adapter, module_name, read_adapter
from medllm.model.directory import ModelDirectory, write_model
from medllm.quantization import Quantization

_PIECE = 1 << 22  # numbers of a tensor that are read, and quantized, at a time


def load_model(model: ModelConfig, *, lora: LoraConfig | Adapter | None = None) -> DenseDecoder:
    """Open a model directory, with the adapters the configuration names (frozen) and one to train where asked.

    Raises:
        UserError: the directory is of no supported family, or a tensor is missing, superfluous or of another shape.
    """
    return read_model(
        ModelDirectory(model.path),
        lora=lora,
        adapter=[read_adapter(path) for path in model.adapters],
        quantization=model.quantization,
        dtype=model.dtype,
    )


def read_model(
    directory: ModelDirectory,
    *,
    lora: LoraConfig | Adapter | None = None,
    adapter: Adapter | Sequence[Adapter] = (),
    quantization: Quantization = "none",
    dtype: Any = jnp.float32,
) -> DenseDecoder:
    """As :func:`load_model`, from opened directories and in any floating type.

    A bitsandbytes NF4 directory is read as it is, codes and scales, when ``quantization`` is its own. Dense weights are rounded
    to ``dtype`` before they are quantized, as bitsandbytes does.

    Args:
        directory: The weights.
        lora: The adapter to train: the settings of a fresh one, or one that is trained further. Beside the latter its frozen
            copy is loaded, which takes its place where the trained adapter is switched off.
        adapter: One that belongs to the model and stays frozen, or several.
        quantization: How the seven linear kinds are stored.
        dtype: Type of the other weights and of the computation.

    Raises:
        UserError: as for :func:`load_model`.
    """
    adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    blueprint = Blueprint(
        directory.architecture,
        lora=lora.lora if isinstance(lora, Adapter) else lora,
        frozen_loras=tuple(one.lora for one in adapters),
        reference=isinstance(lora, Adapter),
        quantization=quantization,
        dense=tuple(_dense_layers(directory).items()),
        dtype=jnp.dtype(dtype),
    )
    model = blueprint.model()
    arrays = _base_arrays(model, directory, quantization)
    given = {frozen(index): one for index, one in enumerate(adapters)}
    if isinstance(lora, Adapter):
        given |= {TRAINED: lora, REFERENCE: lora}
    for place, one in given.items():
        arrays |= adapter_arrays(model, one, place)
    if blueprint.lora is not None or adapters:
        arrays |= {path: variable[...] for path, variable in blueprint.adapters(model) if path not in arrays}
    assign(model, arrays)
    release_free_memory()
    return model


def model_tensors(model: DenseDecoder) -> Iterator[tuple[str, np.ndarray]]:
    """Base weights under Hugging Face's names, in the model's type, one tensor in host memory at a time.

    Quantized weights come out dequantized. Frozen adapters are added in fp32, with one rounding; the trained one is not in it
    (:func:`jax_medllm.weights.adapters.adapter_tensors`).
    """
    arrays = variables(model)
    for name, slot in _base_slots(model).items():
        parts = _parts(arrays, slot)
        weight = np.asarray(parts.dequantize(model.dtype) if isinstance(parts, QuantizedWeight) else parts)
        if slot.layer is not None and slot.path[-1] in ("weight", "quantized"):
            update = frozen_update(model, arrays, slot.module, slot.layer)
            if update is not None:
                weight = (weight.astype(update.dtype) + update).astype(weight.dtype)
        yield name, weight


def write_quantized(
    source: str | FilePath,
    out: str | FilePath,
    quantization: Quantization,
    dtype: Any = jnp.bfloat16,
    shard_bytes: int = 1 << 30,
) -> None:
    """Write a dense model directory anew with its linear layers packed, as ``save_pretrained`` writes a quantized model.

    Memory holds one shard of the result and a piece of one tensor.

    Args:
        source: The dense model.
        out: The folder; it appears only when complete.
        quantization: How they are packed.
        dtype: Type to which weights are rounded before they are quantized, and of those that stay dense.
        shard_bytes: Size from which a new shard is begun.

    Raises:
        UserError: ``out`` exists, or ``source`` is no dense model directory, or holds numbers that are not finite.
    """
    if FilePath(out).exists():
        raise UserError(f"{out}: already exists; give another --out, or remove it")
    directory, dtype = ModelDirectory(source), jnp.dtype(dtype)
    slots = _base_slots(Blueprint(directory.architecture, quantization=quantization, dtype=dtype).model())
    for name in slots:
        if stored(directory, name) is not None:
            raise UserError(f"{source}: {name} is in 4 bits already; give the dense model")
    _check_tensors(directory, slots, quantization)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, slot in slots.items():
            if slot.kind is None:
                yield name, directory.read(name).astype(dtype)
                continue
            weight = _quantized(directory, name, slot, slot.kind, dtype)
            if not weight.finite():
                raise _not_finite(directory, name)
            yield from packed_parts(name, weight, dtype)

    packed = packed_config(directory.settled_config, quantization, dtype)
    write_model(out, packed, tensors(), shard_bytes=shard_bytes, companions_from=source)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor goes.

    Attributes:
        path: Of an array of the model. That of a packed weight ends in ``quantized`` and stands for all arrays of it.
        layer: Whose tensor it is; None where the array has no layers.
        place: Of the layer in the array: its number, but where the array is of some layers alone.
        shape: Expected on disk.
        kind: Of a packed weight.
    """

    path: Path
    layer: int | None
    place: int | None
    shape: tuple[int, ...]
    kind: type[QuantizedWeight] | None

    @property
    def module(self) -> Path:
        """Where the linear layer is whose weight this is."""
        return self.path[: self.path.index("dense")] if "dense" in self.path else self.path[:-1]


def _base(model: DenseDecoder) -> dict[Path, nnx.Variable]:
    """The variables that come from the model directory."""
    return variables(model, nnx.Not(nnx.Any(LoraParam, FrozenLoraParam, LoraScaling, Place)))


def _base_arrays(model: DenseDecoder, directory: ModelDirectory, quantization: Quantization) -> dict[Path, Any]:
    """What the model directory holds, in its places."""
    slots = _base_slots(model)
    _check_tensors(directory, slots, quantization)
    stacks = {path: Stack(variable, path) for path, variable in _base(model).items()}
    finite = {name: _fill(stacks, directory, name, slot, model.dtype) for name, slot in slots.items()}
    arrays = {path: stack.array() for path, stack in stacks.items()}
    for path, variable in variables(model, Place).items():
        arrays[path] = place_parameter(_at(model, path[:-1]).places(variable.shape[0]), variable, path)
    for name, is_finite in finite.items():  # looked at when all is read: nothing waits for a weight to be quantized
        if not is_finite:
            raise _not_finite(directory, name)
    return arrays


def _base_slots(model: DenseDecoder) -> dict[str, _Slot]:
    """Hugging Face name → slot, for every base tensor of the model."""
    slots = {}
    # What some layers alone have comes last: it is in the place of those layers' codes.
    for path, variable in sorted(_base(model).items(), key=lambda item: isinstance(item[1], SomeLayers)):
        shape, kind = tuple(variable.shape), None
        if path[0] != "layers":
            slots[_tensor_name(path, None)] = _Slot(path, None, None, shape, None)
            continue
        holder = _at(model, path[:-1])
        if isinstance(variable, PackedParam):
            path, shape, kind = path[:-1], holder.shape, holder.kind
        for place, layer in enumerate(holder.numbers if isinstance(variable, SomeLayers) else range(shape[0])):
            slots[_tensor_name(path, layer)] = _Slot(path, layer, place, shape[1:], kind)
    return slots


def _at(model: DenseDecoder, path: Path) -> Any:
    """The module there."""
    return reduce(getattr, path, model)


def _tensor_name(path: Path, layer: int | None) -> str:
    """The rule: ``layers/self_attn/q_proj/weight``, layer 3 → ``model.layers.3.self_attn.q_proj.weight``."""
    if path[0] == "lm_head":
        return "lm_head.weight"
    parts = [str(part) for part in path if part != "dense"]
    if layer is not None:
        parts.insert(1, str(layer))
    if parts[-1] == "quantized":
        parts[-1] = "weight"
    return ".".join(["model", *parts])


def _dense_layers(directory: ModelDirectory) -> dict[str, tuple[int, ...]]:
    """Of a directory in 4 bits, the layers of each linear kind that are stored dense; none of a dense one."""
    if not directory.packed:
        return {}
    layers = range(directory.architecture.num_layers)
    return {
        kind: tuple(layer for layer in layers if stored(directory, f"{module_name(layer, kind)}.weight") is None)
        for kind in ALL_LINEAR
    }


def _check_tensors(directory: ModelDirectory, slots: dict[str, _Slot], quantization: Quantization) -> None:
    """All names and shapes, before the first tensor is read."""
    known, declared = set(slots), directory.architecture.tensors
    for name, slot in slots.items():
        if name not in directory:
            raise UserError(f"{directory.path}: has no tensor {name}, which its config.json asks for; copy the whole model")
        packed = stored(directory, name)
        if packed:
            kind = packed.kind.name
            if declared[name].kind != "linear" and name != HEAD:
                raise UserError(f"{directory.path}: {name} is stored as {kind}; only linear layers and the head are read so")
            if kind != quantization:
                raise UserError(
                    f"{directory.path}: {name} is stored as {kind}; open this model with --model.quantization {kind}"
                )
            known |= {f"{name}{suffix}" for suffix in suffixes(packed.kind)}
        shape = packed.shape if packed else directory.shape(name)
        if shape != slot.shape:
            raise UserError(f"{directory.path}: {name} has shape {shape}; its config.json makes it {slot.shape}")
        if not packed and not jnp.issubdtype(directory.dtype(name), jnp.floating):
            raise UserError(f"{directory.path}: {name} is stored as {directory.dtype(name)}; a dense or nf4 weight is needed")
    for name in directory.names():
        if name not in known:
            raise UserError(f"{directory.path}: holds {name}, which a model with this config.json does not have")
    directory.check_quantization(quantization)


def _fill(stacks: dict[Path, Stack], directory: ModelDirectory, name: str, slot: _Slot, dtype: Any) -> Any:
    """Read one tensor into its place, quantized where the model is; false where it has numbers that cannot be."""
    packed = read_packed(directory, name) if stored(directory, name) else None
    if slot.kind is None:
        for row, piece in _pieces(directory, name, slot) if packed is None else _dequantized(packed, dtype):
            stacks[slot.path].put(piece, slot.place, row)
        return packed is None or packed.finite()
    weight = packed or _quantized(directory, name, slot, slot.kind, dtype)
    for part in slot.kind.parts:
        stacks[*slot.path, part].put(getattr(weight, part), slot.place)
    return weight.finite()


def _pieces(directory: ModelDirectory, name: str, slot: _Slot) -> Iterator[tuple[int, np.ndarray]]:
    """Consecutive rows of a dense tensor, each piece with the number of its first row."""
    for rows in _row_slices(slot.shape):
        yield rows.start, directory.read_slice(name, rows)


def _dequantized(weight: QuantizedWeight, dtype: Any) -> Iterator[tuple[int, jax.Array]]:
    """The same of a packed one, as the numbers it stands for."""
    scales = _scales(weight)
    for rows in _row_slices(weight.shape):
        yield rows.start, _dequantized_rows(weight.packed[rows], scales[rows], dtype)


def _row_slices(shape: Sequence[int]) -> Iterator[slice]:
    """Rows whose numbers are a piece."""
    step = max(1, _PIECE // math.prod(shape[1:]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _quantized(directory: ModelDirectory, name: str, slot: _Slot, kind: type[QuantizedWeight], dtype: Any) -> QuantizedWeight:
    """A dense tensor, quantized as it is read."""
    done: list[tuple[jax.Array, jax.Array]] = []
    for _, piece in _pieces(directory, name, slot):
        jax.block_until_ready(done[-1:])  # one piece is quantized while the next is read, no more
        done.append(_quantize_rows(piece, dtype))
    return _join(done, slot.shape[0], kind)


@partial(jax.jit, static_argnums=1)
def _quantize_rows(rows: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return quantize_blocks(rows.astype(dtype))


@jax.jit
def _scales(weight: QuantizedWeight) -> jax.Array:
    return weight.scales()


_dequantized_rows = partial(jax.jit, static_argnums=2)(dequantize_rows)


@partial(jax.jit, static_argnums=(1, 2))
def _join(pieces: list[tuple[jax.Array, jax.Array]], rows: int, kind: type[QuantizedWeight]) -> QuantizedWeight:
    packed, absmax = (jnp.concatenate(parts) for parts in zip(*pieces, strict=True))
    return kind.of_blocks(packed, absmax, rows)


def _not_finite(directory: ModelDirectory, name: str) -> UserError:
    return UserError(f"{directory.path}: {name} holds NaN or infinity, or numbers too large to average; nf4 cannot store them")


def _parts(arrays: dict[Path, Any], slot: _Slot) -> QuantizedWeight | jax.Array:
    """What the model holds in a place."""
    if slot.kind is not None:
        return slot.kind(**{part: arrays[(*slot.path, part)][slot.place] for part in slot.kind.parts})
    return arrays[slot.path][...] if slot.place is None else arrays[slot.path][slot.place]
