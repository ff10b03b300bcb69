"""Models and adapters on disk: Hugging Face and PEFT directories, read tensor by tensor and written whole or not at all.

Only safetensors is read; a file is opened by slice, never held in memory as a whole. Everything here is numpy, so that both
engines, and a machine with neither, can check, merge and write models.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medllm.config import ALL_LINEAR, LoraConfig
from medllm.errors import UserError
from medllm.run import atomic_path, write_json

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_PREFIX = "base_model.model."
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
        self.config: dict[str, Any] = _read_json(self.path / "config.json", "a Hugging Face model folder has one")

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor name → the file that holds it."""
        index = self.path / INDEX
        if index.exists():
            weight_map = _read_json(index, "the index of a sharded model").get("weight_map", {})
            missing = sorted({name for name in weight_map.values() if not (self.path / name).exists()})
            if missing:
                raise UserError(f"{index}: names {missing[0]}, which is not there ({len(missing)} missing); copy all shards")
            return {tensor: self.path / name for tensor, name in weight_map.items()}
        single = self.path / WEIGHTS
        if not single.exists():
            raise UserError(f"{self.path}: no {WEIGHTS} and no {INDEX}; only safetensors weights are read")
        with _open(single) as stream:
            return dict.fromkeys(stream.keys(), single)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header alone."""
        with self._opened(name) as stream:
            return tuple(stream.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a tensor, read from the header alone."""
        with self._opened(name) as stream:
            return _DTYPES[stream.get_slice(name).get_dtype()]

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
        stream = _open(self._files[name])
        if name not in stream.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            raise UserError(f"{self._files[name]}: the index places {name} here, but the file has no such tensor")
        return stream


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's format. ``tensors`` has PEFT's keys; A is [rank, in], B is [out, rank]."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    path: str = ""

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def modules(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Base module name (``model.layers.0.self_attn.q_proj``) → (A, B)."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for key, a in self.tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            stem = key.removesuffix(".lora_A.weight")
            b = self.tensors.get(f"{stem}.lora_B.weight")
            if b is None:
                raise UserError(f"{self.path}: {key} has no matching lora_B; the adapter is incomplete")
            if a.shape[0] != self.rank or b.shape[1] != self.rank:
                raise UserError(f"{self.path}: {stem} is {a.shape} and {b.shape}, but {ADAPTER_CONFIG} says rank {self.rank}")
            found[stem.removeprefix(_ADAPTER_PREFIX)] = (a, b)
        if not found:
            raise UserError(f"{self.path}: the adapter holds no lora_A tensors (an empty save); train or export it again")
        return found


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA directory.

    Raises:
        UserError: no adapter there, or one of a kind that is not supported (DoRA, biases, saved modules, rank patterns …).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; give a PEFT directory (with {ADAPTER_CONFIG})")
    config = _read_json(folder / ADAPTER_CONFIG, "a PEFT folder has one")
    _refuse_unsupported(folder, config)
    file = folder / ADAPTER_WEIGHTS
    if not file.exists():
        raise UserError(f"{folder}: no {ADAPTER_WEIGHTS}; only safetensors adapters are read")
    with _open(file) as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    targets = config.get("target_modules") or ()
    return Adapter(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora", False)),
        targets=ALL_LINEAR if targets == "all-linear" else tuple(sorted(targets, key=_target_order)),
        tensors=tensors,
        path=str(folder),
    )


def write_adapter(path: str | Path, lora: LoraConfig, tensors: Mapping[str, np.ndarray], base_model: str) -> None:
    """Write a directory that ``peft.PeftModel.from_pretrained`` loads. ``tensors`` has PEFT's keys.

    Raises:
        UserError: there is nothing to write.
    """
    if not tensors:
        raise UserError(f"{path}: no adapter tensors to write")
    with atomic_path(Path(path)) as scratch:
        scratch.mkdir()
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}, scratch / ADAPTER_WEIGHTS, {"format": "pt"}
        )
        write_json(scratch / ADAPTER_CONFIG, _peft_config(lora, base_model))


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
            _copy_companions(Path(companions_from), scratch)


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write ``base`` with ``adapter`` added to its weights: W + scaling · B A, in fp32, rounded once to the stored type.

    This is the hand-over between the two training stages: the merged weights are quantized anew by whoever opens them,
    so nothing is ever added to an already quantized weight. One tensor is in memory at a time.

    Raises:
        UserError: the adapter targets a module the base does not have, or its shapes do not fit.
    """
    model = ModelDirectory(base)
    lora = read_adapter(adapter)
    updates = {f"{module}.weight": pair for module, pair in lora.modules().items()}
    for name, (a, b) in updates.items():
        if name not in model:
            raise UserError(f"{adapter}: has an update for {name}, which {base} does not have; is it for another model?")
        expected = (b.shape[0], a.shape[1])
        if model.shape(name) != expected:
            raise UserError(f"{adapter}: the update of {name} is {expected}, the weight in {base} is {model.shape(name)}")

    def merged() -> Iterable[tuple[str, np.ndarray]]:
        for name in model.names():
            weight = model.read(name)
            if name in updates:
                a, b = (part.astype(np.float32) for part in updates[name])
                weight = (weight.astype(np.float32) + np.float32(lora.scaling) * (b @ a)).astype(weight.dtype)
            yield name, weight

    write_model(out, model.config, merged(), companions_from=base)


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); it may be truncated: copy it again") from error


def _read_json(file: Path, expectation: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no {file.name} here; {expectation}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON object was expected, found {type(value).__name__}")
    return value


def _refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    missing = [key for key in ("peft_type", "r", "lora_alpha") if key not in config]
    if missing:
        raise UserError(f"{folder / ADAPTER_CONFIG}: has no {missing[0]}; a PEFT LoRA adapter has it")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: a {config.get('peft_type')} adapter; only LORA adapters are read")
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "layers_to_transform", "fan_in_fan_out"):
        if config.get(key):
            raise UserError(f"{folder}: the adapter uses {key}, which is not supported; export a plain LoRA adapter")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder}: the adapter trains biases ({config['bias']}); only bias='none' is supported")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(f"{folder}: target_modules is a pattern ({targets!r}); only a list of module names is supported")
    unknown = [] if isinstance(targets, str) else sorted(set(targets or ()) - set(ALL_LINEAR))
    if unknown:
        raise UserError(f"{folder}: the adapter targets {unknown[0]}; supported targets are {', '.join(ALL_LINEAR)}")


def _target_order(target: str) -> int:
    return ALL_LINEAR.index(target)


def _peft_config(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    settings = asdict(lora)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "use_rslora": settings["rslora"],
        "target_modules": list(settings["targets"]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


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


def _copy_companions(source: Path, target: Path) -> None:
    for name in _COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
