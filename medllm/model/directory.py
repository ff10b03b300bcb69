"""Models on disk: Hugging Face directories, read tensor by tensor and written whole or not at all.

Only safetensors is read; a file is opened by slice, never held in memory as a whole. Everything here is numpy, so that both
engines, and a machine with neither, can check and write models. Adapters are :mod:`medllm.model.adapter`'s.

A folder holds what transformers 5 opens it as: which file counts, which name a tensor goes by, whether an output matrix is tied
follow its rules (``PreTrainedModel.from_pretrained``). Where it would choose without a word, the folder is refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from medllm.architecture import EMBEDDING, HEAD, PROJECTIONS, Architecture, layer_path
from medllm.errors import UserError
from medllm.model.files import ADAPTER, INDEX, WEIGHTS, Stored, equal_tables, open_safetensors, opened_name, stored_tensors
from medllm.quantization import DESCRIPTION, Quantization, check_stored, packing_name, stays_dense
from medllm.run import atomic_path, write_json
from medllm.text_files import parse_json, read_json_object

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
# What makes a model directory complete besides its weights: copied along when a model is merged or converted.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_ROTARY_BUFFER = re.compile(r"rotary_emb\.inv_freq")
_ROTARY_TOLERANCE = 2.0**-7  # old checkpoints hold the frequencies in their 16-bit type


class ModelDirectory:
    """A Hugging Face model directory with a ``config.json`` and one or more safetensors files.

    Tensors go by the names transformers opens them under, whatever they are called in the file.

    Raises:
        UserError: no such folder, one that holds an adapter, no or unreadable config; on reading: no safetensors weights, a
            shard named by the index is missing or holds other tensors than the index says, two tensors that are opened as the
            same one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such model folder; give a Hugging Face directory (--model.path)")
        if (self.path / ADAPTER).exists():
            raise UserError(
                f"{self.path}: holds an adapter ({ADAPTER}), which transformers puts on the weights it opens there; give the "
                "base model's folder, without one, and the adapter's as an adapter (--model.adapter)"
            )
        self.config: dict[str, Any] = read_json_object(self.path / "config.json", "a Hugging Face model folder has one")

    @cached_property
    def architecture(self) -> Architecture:
        """What its ``config.json`` describes. Tables that it ties, and that differ in the checkpoint, are two.

        Raises:
            UserError: no model that is supported, or its tensors contradict it.
        """
        described = self.described
        self.check_rotation(described.rotary.theta, described.head_dim)
        return replace(described, tie_embeddings=described.tie_embeddings and HEAD not in self)

    @property
    def described(self) -> Architecture:
        """What its ``config.json`` alone describes, before a tensor is looked at.

        Raises:
            UserError: no model that is supported.
        """
        return Architecture.from_hf(self.config, self.path / "config.json")

    @property
    def settled_config(self) -> dict[str, Any]:
        """``config.json`` for a folder with this one's tensors: it ties no tables that differ."""
        differ = self.config.get("tie_word_embeddings") and HEAD in self
        return {**self.config, "tie_word_embeddings": False} if differ else self.config

    @property
    def packed(self) -> bool:
        """Whether it is stored in 4 bits; weights in it that are dense are so by choice."""
        return any(name.endswith(DESCRIPTION) for name in self.names())

    @property
    def left_dense(self) -> dict[str, tuple[int, ...]]:
        """By what ``config.json`` alone says of 4 bits: of each linear kind that is not packed everywhere, the dense layers.

        Raises:
            UserError: no model that is supported, or a quantization that is not read.
        """
        check_stored(self.config, self.path / "config.json")
        if not self.config.get("quantization_config"):
            return {}
        layers = range(self.described.num_layers)
        found = {
            kind: tuple(layer for layer in layers if stays_dense(f"{layer_path(layer)}.{path}", self.config))
            for kind, path in PROJECTIONS.items()
        }
        return {kind: numbers for kind, numbers in found.items() if numbers}

    @property
    def packing(self) -> Quantization:
        """How its linear layers are stored: the setting that it is opened with."""
        described = next((found for name in self.names() if (found := self.description(name))), None)
        return "none" if described is None else _kind(described)

    def description(self, name: str) -> dict[str, Any] | None:
        """What bitsandbytes says of a weight it packed; None where the weight is dense, or not there.

        Raises:
            UserError: it is not JSON, or has no shape.
        """
        if (state := f"{name}{DESCRIPTION}") not in self:
            return None
        expected = "expected what bitsandbytes writes; copy it again"
        said = parse_json(self.read(state).tobytes().decode("utf-8", "replace"), f"{self.path}: {state}", expected)
        shape = said.get("shape") if isinstance(said, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise UserError(f"{self.path}: {state} describes no weight: shape {shape}; {expected}")
        return said

    def check_quantization(self, quantization: Quantization) -> None:
        """Hold linear layers against what ``config.json`` says of them, and against the setting the folder is opened with.

        Raises:
            UserError: as for :func:`medllm.quantization.check_stored`, or a layer is packed and said to be dense, dense and
                said to be packed, or packed in another kind than ``quantization``; the head is said to be packed, and is the
                embedding.
        """
        check_stored(self.config, self.path / "config.json")
        settings = self.config.get("quantization_config")
        if not settings:
            return
        # Without a list transformers leaves the output matrix dense; with one, what the list does not name is packed.
        listed = settings.get("llm_int8_skip_modules") is not None
        if listed and self.config.get("tie_word_embeddings") and HEAD not in self and not stays_dense("lm_head", self.config):
            raise UserError(
                f"{self.path}/config.json: llm_int8_skip_modules does not name lm_head, which is tied to the embedding and so "
                "not packed; transformers cannot compute with that: add lm_head to the list"
            )
        linear = (*PROJECTIONS.values(), *(("lm_head",) if listed else ()))
        for name in self.names():
            module = name.removesuffix(".weight")
            if module == name or not module.endswith(linear):
                continue
            described = self.description(name)
            if (described is not None) == stays_dense(module, self.config):
                how = "in 4 bits" if described else "dense"
                raise UserError(
                    f"{self.file(name)}: {name} is stored {how}, and config.json says otherwise (llm_int8_skip_modules in "
                    "quantization_config); copy the whole model"
                )
            if described and (kind := _kind(described)) != quantization:
                raise UserError(f"{self.path}: {name} is stored as {kind}; open this model with --model.quantization {kind}")

    def check_rotation(self, theta: float, head_dim: int) -> None:
        """Hold rotary frequencies that old checkpoints carry, and nobody reads, against the model's own.

        Args:
            theta: The base of the periods.
            head_dim: Width of a head.

        Raises:
            UserError: a layer was trained with other ones.
        """
        expected = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        for name, stored in self._buffers.items():
            with open_safetensors(stored.file) as stream:
                found = stream.get_tensor(stored.name).astype(np.float64)
            if found.shape != expected.shape or not np.allclose(found, expected, rtol=_ROTARY_TOLERANCE, atol=1e-7):
                raise UserError(
                    f"{stored.file}: {name} holds other frequencies than config.json gives (rope_theta {theta:g}, {head_dim} "
                    "channels a head); transformers leaves it unread: mend config.json, or remove the tensor"
                )

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        """Tensor name → where it is, as transformers opens it."""
        found: dict[str, Stored] = {}
        for one in stored_tensors(self.path, self.config):
            if _ROTARY_BUFFER.search(one.name):
                continue
            name = opened_name(one.name)
            if name in found:
                both = f"{found[name].name} and {one.name}"
                raise UserError(f"{one.file}: {both} are the same tensor to transformers; leave one of them")
            found[name] = one
        if self.config.get("tie_word_embeddings") and HEAD in found:
            if EMBEDDING not in found:
                found[EMBEDDING] = found.pop(HEAD)
            elif equal_tables(found[EMBEDDING], found[HEAD]):
                del found[HEAD]
        return found

    @cached_property
    def _buffers(self) -> dict[str, Stored]:
        """The rotary frequencies in it, which are no weights."""
        return {one.name: one for one in stored_tensors(self.path, self.config) if _ROTARY_BUFFER.search(one.name)}

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._place(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header alone."""
        with open_safetensors(self.file(name)) as stream:
            return tuple(stream.get_slice(self._place(name).name).get_shape())

    def logical_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, also where bitsandbytes stored it packed: its description keeps the shape."""
        described = self.description(name)
        return self.shape(name) if described is None else tuple(described["shape"])

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a tensor, read from the header alone."""
        with open_safetensors(self.file(name)) as stream:
            stored = stream.get_slice(self._place(name).name).get_dtype()
        if stored not in _DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {stored}; the types read are {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type (bf16 as ``ml_dtypes.bfloat16``)."""
        with open_safetensors(self.file(name)) as stream:
            return stream.get_tensor(self._place(name).name)

    def read_slice(self, name: str, index: Any) -> np.ndarray:
        """Part of a tensor; nothing else of its file is read."""
        with open_safetensors(self.file(name)) as stream:
            return stream.get_slice(self._place(name).name)[index]

    def _place(self, name: str) -> Stored:
        if name not in self._stored:
            raise UserError(f"{self.path}: has no tensor {name}; the model does not match its config.json or is incomplete")
        return self._stored[name]


def _kind(described: Mapping[str, Any]) -> Quantization:
    """The kind of 4 bits of a weight that is described so."""
    return cast(Quantization, packing_name(described.get("nested_blocksize") is not None))


def write_model(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int = 4 << 30,
    companions_from: str | Path | None = None,
) -> None:
    """Write a Hugging Face model directory, one shard in memory at a time.

    Args:
        path: The folder; it appears only when complete.
        config: Contents of ``config.json``.
        tensors: Names and values, in the order they are stored.
        shard_bytes: Size from which a new shard is begun.
        companions_from: Model folder whose tokenizer and generation config are copied along.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    with atomic_path(Path(path)) as scratch:
        scratch.mkdir()
        shards: list[list[str]] = []
        pending: dict[str, np.ndarray] = {}
        total = size = 0

        def flush() -> None:
            nonlocal size
            save_file(pending, scratch / f"shard-{len(shards):05d}", {"format": "pt"})
            shards.append(list(pending))
            pending.clear()
            size = 0

        for name, value in tensors:
            _check_finite(Path(path), name, value)
            if pending and size + value.nbytes > shard_bytes:
                flush()
            pending[name] = np.ascontiguousarray(value)
            size += value.nbytes
            total += value.nbytes
        flush()
        _name_shards(scratch, shards, total)
        write_json(scratch / "config.json", dict(config))
        if companions_from is not None:
            copy_companions(Path(companions_from), scratch)


def _check_finite(path: Path, name: str, value: np.ndarray) -> None:
    # numpy has no infinity in integers, which packed weights are, and calls bfloat16 no floating type
    if value.dtype.kind not in "iub" and not np.isfinite(value).all():
        raise UserError(
            f"{path}: is not written, {name} would hold NaN or infinity: what it is made of holds it, or is too large for "
            f"{value.dtype}; mend the model or the adapter it comes from"
        )


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "shard-00000").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number:05d}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes a model directory complete besides its weights, as far as it is there."""
    for name in _COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
