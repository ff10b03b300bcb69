"""Files of a model folder: which of them count, and what the tensors in them are to transformers 5.

The rules are those of ``PreTrainedModel.from_pretrained``; where it would choose without a word, the folder is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from medllm.architecture import HEAD
from medllm.errors import UserError
from medllm.text_files import read_json_object

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
_PIECE = 1 << 22  # numbers of a table that are compared at a time


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: the file, and its name there."""

    file: Path
    name: str


def stored_tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[Stored]:
    """Every tensor of the files that count: one file before an index, and of an index all that its shards hold.

    Args:
        folder: Of the model.
        config: Contents of its ``config.json``.

    Raises:
        UserError: there are no such files, a shard is missing, or it holds other tensors than the index says.
    """
    named = config.get("transformers_weights")
    single, index = folder / WEIGHTS, folder / INDEX
    if named not in (None, WEIGHTS if single.exists() else INDEX):
        raise UserError(f"{folder}/config.json: transformers_weights names {named}; only {WEIGHTS} or {INDEX} is read")
    if single.exists():
        yield from (Stored(single, name) for name in _names_in(single))
        return
    if not index.exists():
        raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}; only safetensors weights are read")
    weight_map = read_json_object(index, "the index of a sharded model").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index}: weight_map is {str(weight_map)[:100]}; expected the file of each tensor, by the tensor's name"
        )
    if strange := [shard for shard in weight_map.values() if not _is_beside(shard)]:
        raise UserError(f"{index}: weight_map names {str(strange[0])[:100]!r}; expected the name of a file in the same folder")
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise UserError(f"{index}: names {missing[0]}, which is not there ({len(missing)} missing); copy all shards")
    held = {shard: _names_in(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise UserError(f"{folder / shard}: the index places {name} here, but the file has no such tensor")
    for shard, names in held.items():
        for name in names:
            if weight_map.get(name) != shard:  # transformers opens it all the same, instead of what the index names
                raise UserError(f"{folder / shard}: holds {name}, which {INDEX} does not place here; copy the whole model")
            yield Stored(folder / shard, name)


def opened_name(stored: str) -> str:
    """The name under which transformers opens a tensor: a prefix of the decoder's own is added or taken off."""
    if stored.startswith(("model.model.", f"model.{HEAD}")):
        return stored.removeprefix("model.")
    return f"model.{stored}" if stored.startswith(("layers.", "norm.", "embed_tokens.")) else stored


def equal_tables(one: Stored, other: Stored) -> bool:
    """Whether two tables have the same shape and the same numbers, whatever their types."""
    with open_safetensors(one.file) as first, open_safetensors(other.file) as second:
        parts = first.get_slice(one.name), second.get_slice(other.name)
        shape = parts[0].get_shape()
        if shape != parts[1].get_shape():
            return False
        step = max(1, _PIECE // shape[-1])
        rows = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return all(np.array_equal(*(part[some].astype(np.float32) for part in parts)) for some in rows)


def open_safetensors(file: Path) -> Any:
    """A safetensors file, read lazily by tensor and slice.

    Raises:
        UserError: it is not there, is truncated or of another format.
    """
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); it may be truncated: copy it again") from error


def _is_beside(shard: Any) -> bool:
    """Whether it is a file's name alone, which leads out of no folder."""
    return isinstance(shard, str) and re.fullmatch(r"[\w.\-]{1,200}", shard) is not None and shard not in (".", "..")


def _names_in(file: Path) -> dict[str, None]:
    """Names of the tensors of a file, in their order there."""
    with open_safetensors(file) as stream:
        return dict.fromkeys(stream.keys())
