"""A published folder as an engine opens it: whole weights, weights in 4 bits, or an adapter under its own contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.model.adapter import WEIGHTS
from medllm.model.directory import ModelDirectory, copy_companions
from medllm.model.endings import GENERATION
from medllm.model.files import ADAPTER
from medllm.run import write_json
from medllm.text_files import read_json_object


@contextmanager
def published_model(folder: str, dtype: Literal["float32", "bfloat16"]) -> Iterator[ModelConfig]:
    """How an engine opens a published folder, for the time of the block.

    An adapter's folder has a tokenizer, a chat template and a generation config of its own: its base is opened under those.
    Where the base's ``config.json`` and weights lie beside the adapter, they are the base, as to transformers.

    Raises:
        UserError: the folder is none, or the base that an adapter names is no folder here.
    """
    path = Path(folder)
    if not (path / ADAPTER).exists():
        yield ModelConfig(folder, quantization=ModelDirectory(path).packing, dtype=dtype)
        return
    base = path if (path / "config.json").exists() else _named_base(path)
    with TemporaryDirectory() as scratch:
        _put_together(base, path, Path(scratch))
        yield ModelConfig(scratch, folder, quantization=ModelDirectory(scratch).packing, dtype=dtype)


def _named_base(adapter: Path) -> Path:
    """The base model's folder, which an adapter names.

    Raises:
        UserError: it is none, or not here.
    """
    named = read_json_object(adapter / ADAPTER, "a PEFT folder has one").get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise UserError(
            f"{adapter / ADAPTER}: base_model_name_or_path is {named!r}, no folder here; put the path of the base model there"
        )
    return ModelDirectory(named).path


def _put_together(base: Path, contract: Path, folder: Path) -> None:
    """The weights of one folder; tokenizer, chat template and generation config of another."""
    for file in base.glob("*.safetensors*"):
        if file.name != WEIGHTS:
            (folder / file.name).symlink_to(file.resolve())
    copy_companions(contract, folder)
    config = read_json_object(base / "config.json", "a Hugging Face model folder has one")
    said = read_json_object(contract / GENERATION, "a published folder has one")
    write_json(folder / "config.json", {**config, "eos_token_id": said.get("eos_token_id")})
