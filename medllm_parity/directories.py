"""What can be said about a model directory before its first tensor is read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers import PreTrainedConfig as HfConfig

from jax_medllm.weights.bnb_files import stored, suffixes
from medllm.architecture import HEAD
from medllm.errors import UserError
from medllm.model.directory import ModelDirectory
from medllm.quantization import Quantization

_COMPARED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def check_directory(directory: ModelDirectory, quantization: Quantization) -> None:
    """Every tensor a model of this configuration has is there, in a file that is whole, and in its shape; and no other.

    Raises:
        UserError: it is not; weights are stored in another quantization than this, or in one that is not read.
    """
    expected = directory.architecture.tensors
    read_hf_config(directory.path)
    packed = {name: kept for name in expected if (kept := stored(directory, name))}
    parts = {f"{name}{suffix}" for name, kept in packed.items() for suffix in suffixes(kept.kind)}
    known = {*expected, *parts}
    for name in [*expected, *sorted(parts)]:
        if name not in directory:
            raise UserError(f"{directory.path}: has no tensor {name}, which its config.json asks for; copy the whole model")
    for name in directory.names():
        if name not in known:
            raise UserError(f"{directory.path}: holds {name}, which a model with this config.json does not have")
    for name, tensor in expected.items():
        may_be_packed = tensor.kind == "linear" or name == HEAD
        if name in packed and not ((kind := packed[name].kind.name) == quantization and may_be_packed):
            raise UserError(f"{directory.path}: {name} is stored as {kind}; open this model with --model.quantization {kind}")
        found = packed[name].shape if name in packed else directory.shape(name)
        if found != tensor.shape:
            raise UserError(f"{directory.path}: {name} has shape {found}; its config.json makes it {tensor.shape}")
    directory.check_quantization(quantization)


def check_same_shape(ours: ModelDirectory, theirs: ModelDirectory) -> None:
    """The two models can be compared layer by layer.

    Raises:
        UserError: they differ in a size.
    """
    a, b = (directory.architecture for directory in (ours, theirs))
    for field in _COMPARED:
        if getattr(a, field) != getattr(b, field):
            raise UserError(
                f"{theirs.path}: {field} is {getattr(b, field)}, that of {ours.path} is {getattr(a, field)}; "
                "only models of the same sizes can be compared (--reference)"
            )


def read_hf_config(path: Path) -> HfConfig:
    """A ``config.json`` as transformers reads it.

    Raises:
        UserError: transformers refuses it.
    """
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}/config.json: transformers does not accept it: {reason}") from error
