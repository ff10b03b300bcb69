"""Models on disk: Hugging Face directories, read tensor by tensor and written whole or not at all.

Only safetensors is read; a file is opened by slice, never held in memory as a whole. Everything here is numpy, so that both
engines, and a machine with neither, can check and write models. Adapters are :mod:`medllm.model.adapter`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medllm.architecture import Architecture
from medllm.errors import UserError
from medllm.quantization import DESCRIPTION
from medllm.run import atomic_path, write_json

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
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
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class ModelDirectory:
    """A Hugging Face model directory with a ``config.json`` and one or more safetensors files.

    Raises:
        UserError: no such folder, no or unreadable config, no safetensors weights, a shard named by the index is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such model folder; give a Hugging Face directory (--model.path)")
        self.config: dict[str, Any] = read_json(self.path / "config.json", "a Hugging Face model folder has one")

    @property
    def architecture(self) -> Architecture:
        """What its ``config.json`` describes.

        Raises:
            UserError: no model that is supported.
        """
        return Architecture.from_hf(self.config, self.path / "config.json")

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor name → the file that holds it."""
        index = self.path / INDEX
        if index.exists():
            weight_map = read_json(index, "the index of a sharded model").get("weight_map", {})
            missing = sorted({name for name in weight_map.values() if not (self.path / name).exists()})
            if missing:
                raise UserError(f"{index}: names {missing[0]}, which is not there ({len(missing)} missing); copy all shards")
            return {tensor: self.path / name for tensor, name in weight_map.items()}
        single = self.path / WEIGHTS
        if not single.exists():
            raise UserError(f"{self.path}: no {WEIGHTS} and no {INDEX}; only safetensors weights are read")
        with open_safetensors(single) as stream:
            return dict.fromkeys(stream.keys(), single)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header alone."""
        with self._opened(name) as stream:
            return tuple(stream.get_slice(name).get_shape())

    def logical_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, also where bitsandbytes stored it packed: its description keeps the shape."""
        state = f"{name}{DESCRIPTION}"
        return tuple(json.loads(self.read(state).tobytes())["shape"]) if state in self else self.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a tensor, read from the header alone."""
        with self._opened(name) as stream:
            stored = stream.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {stored}; the types read are {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type (bf16 as ``ml_dtypes.bfloat16``)."""
        with self._opened(name) as stream:
            return stream.get_tensor(name)

    def read_slice(self, name: str, index: Any) -> np.ndarray:
        """Part of a tensor; nothing else of its file is read."""
        with self._opened(name) as stream:
            return stream.get_slice(name)[index]

    def _opened(self, name: str) -> Any:
        if name not in self._files:
            raise UserError(f"{self.path}: has no tensor {name}; the model does not match its config.json or is incomplete")
        stream = open_safetensors(self._files[name])
        if name not in stream.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            raise UserError(f"{self._files[name]}: the index places {name} here, but the file has no such tensor")
        return stream


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


def open_safetensors(file: Path) -> Any:
    """A safetensors file, read lazily by tensor and slice.

    Raises:
        UserError: it is not there, is truncated or of another format.
    """
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); it may be truncated: copy it again") from error


def read_json(file: Path, expectation: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing (``expectation`` says what it is for), or is no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no {file.name} here; {expectation}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON object was expected, found {type(value).__name__}")
    return value


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
