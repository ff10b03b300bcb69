"""What a stage that ran out of memory is told: what was needed, and which of its settings take less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from medllm.config import MeshConfig, ModelConfig, Recipe
from medllm.errors import UserError
from medllm.host.faults import chain
from medllm.host.memory import size_words
from medllm.model.directory import ModelDirectory
from medllm.stage_config import CptConfig, RpoConfig

_KINDS = ("MemoryError", "OutOfMemoryError", "_ArrayMemoryError", "bad_alloc")
"""Names of Python's own error, PyTorch's, NumPy's."""
_SAID = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|can't allocate memory|std::bad_alloc")
"""In the texts of those that have no kind of their own: XLA's, PyTorch's on a CPU."""
_ASKED = (
    re.compile(r"(?P<bytes>\d{4,}) ?bytes"),
    re.compile(r"Used (?P<words>[\d.]+ ?[KMGT]i?B?) of"),
    re.compile(r"(?:allocate|allocation of|allocating) (?P<words>[\d.]+ ?[KMGT]i?B)"),
)
_DISK = re.compile(r"writing|No space left", re.IGNORECASE)
"""TensorStore calls a full disk RESOURCE_EXHAUSTED too."""


@contextmanager
def advising(config: MeshConfig, engine: str) -> Iterator[None]:
    """Inside, an error for want of memory, of whichever framework, at its compiler or in a step, is one line.

    Args:
        config: The stage's.
        engine: Whose name; the JAX engine has meshes.

    Raises:
        UserError: in place of such an error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not any(map(is_shortage, chain(error))):
            raise
        raise UserError(
            f"out of memory{needed(error)}{_weights(config)}; lower {', '.join(remedies(config, engine))}"
        ) from error


def needed(error: BaseException) -> str:
    """What was asked for in vain, as far as the error says it."""
    for one in chain(error):
        for pattern in _ASKED:
            if found := pattern.search(str(one)):
                asked = found.groupdict()
                words = size_words(int(asked["bytes"])) if asked.get("bytes") else asked["words"]
                return f": {words} were asked for" if "Used" not in pattern.pattern else f": {words} are needed"
    return ""


def remedies(config: Any, engine: str) -> Iterator[str]:
    """The settings of a stage that take memory and can be lowered still, each with what it is, what costs least first."""
    if isinstance(config, Recipe):
        training = config.training
        if training.batch_size > 1:
            yield f"--training.batch_size ({training.batch_size}; --training.accumulation makes up for it)"
        if training.remat not in ("layer", "auto"):
            yield f"--training.remat (layer, from {training.remat})"
    elif config.batch_size > 1:
        yield f"--batch_size ({config.batch_size})"
    if config.model.quantization == "none":
        yield "--model.quantization (nf4)"
    if config.model.dtype == "float32":
        yield "--model.dtype (bfloat16)"
    if isinstance(config, CptConfig):
        yield f"--corpus.length ({config.corpus.length:,})"
    elif isinstance(config, RpoConfig):
        yield f"--pairs.max_length ({config.pairs.max_length:,})"
    elif hasattr(config, "sampling"):
        yield f"--sampling.max_new_tokens ({config.sampling.max_new_tokens:,})"
    if engine == "jax":
        yield f"or spread it over more devices (--mesh{f', now {config.mesh}' if config.mesh else ''})"


def is_shortage(error: BaseException) -> bool:
    """Whether an error, of whichever framework, says that memory ran out."""
    said = str(error)
    return type(error).__name__ in _KINDS or bool(_SAID.search(said) and not _DISK.search(said))


def _weights(config: Any) -> str:
    """What the planner counts for the weights."""
    model: ModelConfig = config.model
    with suppress(UserError):
        sizes = ModelDirectory(model.path).described
        taken = sizes.weight_bytes(model.quantization, 4 if model.dtype == "float32" else 2)
        return f" (the weights alone take {size_words(taken)}; medllm plan says what takes the rest)"
    return ""
