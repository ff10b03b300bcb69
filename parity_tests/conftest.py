"""Tiny models shared by the parity tests, and the switch to float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import torch

from medllm.config import ModelConfig
from medllm.quantization import Quantization
from parity_tests.tiny_models import TinyModel, write_tiny_adapter, write_tiny_model
from torch_ref.model import open_model


@pytest.fixture
def float64() -> Iterator[None]:
    """JAX computes in float64 for the length of this test; everywhere else it stays in fp32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def jax_engine(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches of the JAX engine take effect: what was compiled without them is forgotten, before and after."""
    jax.clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(tied=…, heads=…, kv_heads=…, layers=…, dtype=…)`` → directory of a random model, written once a session."""
    folder = tmp_path_factory.mktemp("models")
    written: dict[tuple[TinyModel, torch.dtype], Path] = {}

    def model(dtype: torch.dtype = torch.float32, **shape: int | bool) -> Path:
        key = (TinyModel(**shape), dtype)
        if key not in written:
            written[key] = write_tiny_model(folder, *key)
        return written[key]

    return model


class Packed(NamedTuple):
    """A model bitsandbytes quantized, and the dense one it was made of."""

    path: Path
    dense: Path


@pytest.fixture(scope="session")
def nf4_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Packed]:
    """As ``tiny_model``, quantized and saved by bitsandbytes, so that both stacks hold the same codes and scales."""
    folder = tmp_path_factory.mktemp("packed")

    def model(dtype: torch.dtype = torch.float32, quantization: Quantization = "nf4", **shape: int | bool) -> Packed:
        dense = tiny_model(dtype, **shape)
        packed = Packed(folder / quantization / dense.name, dense)
        if not packed.path.exists():
            config = ModelConfig(str(dense), quantization=quantization, dtype=str(dtype).removeprefix("torch."))
            open_model(config).save_pretrained(packed.path)
        return packed

    return model


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_adapter(base, rank=…, targets=…, seed=…)`` → directory of a random PEFT adapter, B not zero."""

    def adapter(base: Path, **settings: object) -> Path:
        return write_tiny_adapter(base, tmp_path_factory.mktemp("adapter"), **settings)

    return adapter
