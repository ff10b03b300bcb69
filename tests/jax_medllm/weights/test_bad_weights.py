"""Weight files that cannot be read, through the command line: one line that names tensor or file, exit code 2, nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_medllm.weights.read import write_quantized
from medllm.cli import main
from medllm.mini.study import BASE
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.files import INDEX, WEIGHTS
from tests.refusal import refused

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The embedded model in 4 bits."""
    out = tmp_path_factory.mktemp("packed") / "model"
    write_quantized(BASE, out, "nf4", "float32")
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "本文である。"}) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(folder, capsys) -> Callable[..., str]:
    """Train on ``model``, hold the refusal to one line and exit code 2, and to leaving the folder as it was."""

    def refused_training(*settings: str) -> str:
        given = ["--model.path", "model", "--model.dtype", "float32", "--run", "run", "--corpus.documents", "text.jsonl"]
        given += ["--corpus.length", "64"]
        return refused(folder, capsys, "cpt", *given, *settings)

    return refused_training


def sharded(folder: Path) -> tuple[Path, dict]:
    """The embedded model in shards, and its index."""
    base = ModelDirectory(BASE)
    tensors = ((name, base.read(name)) for name in base.names())
    write_model(folder / "model", base.config, tensors, shard_bytes=1_000_000, companions_from=BASE)
    return folder / "model" / INDEX, json.loads((folder / "model" / INDEX).read_text())


def changed(source: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """A copy of a model directory with some tensors changed."""
    shutil.copytree(source, folder / "model")
    tensors = load_file(folder / "model" / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "model" / WEIGHTS)


def test_a_truncated_file(folder, refusal):
    shutil.copytree(BASE, folder / "model")
    weights = folder / "model" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refusal()
    assert WEIGHTS in line
    assert "truncated" in line


def test_a_tensor_missing_from_the_index(folder, refusal):
    index, listed = sharded(folder)
    del listed["weight_map"][NAME]
    index.write_text(json.dumps(listed))
    assert NAME in refusal()


def test_an_index_that_names_the_wrong_shard(folder, refusal):
    index, listed = sharded(folder)
    other = next(file for file in listed["weight_map"].values() if file != listed["weight_map"][NAME])
    listed["weight_map"][NAME] = other
    index.write_text(json.dumps(listed))
    line = refusal()
    assert NAME in line
    assert other in line


def test_a_shard_that_is_not_there(folder, refusal):
    _, listed = sharded(folder)
    (folder / "model" / listed["weight_map"][NAME]).unlink()
    assert listed["weight_map"][NAME] in refusal()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type fp4"),
        ({"blocksize": 128}, "blocksize 128"),
        ({"nested_blocksize": 64}, "nested_blocksize 64"),
        ({"nested_blocksize": None}, "--model.quantization nf4-single"),
        ({"shape": [8, 64]}, "shape (8, 64)"),
        ({"shape": "wide"}, "shape wide"),
        ({"nested_offset": None}, "offset None"),
    ],
    ids=str,
)
def test_a_4bit_state_that_is_not_read(folder, packed, refusal, state, message):
    def change(tensors: dict[str, np.ndarray]) -> None:
        described = json.loads(tensors[STATE].tobytes()) | state
        tensors[STATE] = np.frombuffer(json.dumps(described).encode(), np.uint8)

    changed(packed, folder, change)
    line = refusal("--model.quantization", "nf4")
    assert NAME in line
    assert message in line


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map"])
def test_a_part_of_a_4bit_weight_that_is_too_short(folder, packed, refusal, part):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAME + part] = tensors[NAME + part][:-1]

    changed(packed, folder, change)
    assert f"{NAME}{part} " in refusal("--model.quantization", "nf4")


def test_a_part_of_a_4bit_weight_that_is_missing(folder, packed, refusal):
    changed(packed, folder, lambda tensors: tensors.pop(f"{NAME}.nested_absmax"))
    assert f"{NAME}.nested_absmax" in refusal("--model.quantization", "nf4")


def test_a_state_that_is_no_json(folder, packed, refusal):
    changed(packed, folder, lambda tensors: tensors.update({STATE: np.zeros(9, np.uint8)}))
    assert STATE in refusal("--model.quantization", "nf4")


def test_an_int8_weight(folder, refusal):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAME] = tensors[NAME].astype(np.int8)
        tensors[f"{NAME.removesuffix('.weight')}.SCB"] = np.ones(len(tensors[NAME]), np.float32)

    changed(BASE, folder, change)
    line = refusal()
    assert NAME in line
    assert "int8" in line


def test_a_4bit_model_opened_as_a_dense_one(folder, packed, refusal):
    shutil.copytree(packed, folder / "model")
    assert "--model.quantization nf4" in refusal()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_4_bits_cannot_hold(folder, refusal, wrong):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAME] = tensors[NAME].astype(np.float32)
        tensors[NAME][3, 5] = wrong

    changed(BASE, folder, change)
    line = refusal("--model.quantization", "nf4")
    assert NAME in line
    assert "NaN or infinity" in line
    assert main(["convert", "--model", "model", "--quantization", "nf4", "--out", "out"]) == 2
    assert not (folder / "out").exists()


def test_a_4bit_model_is_not_quantized_again(folder, packed, capsys):
    assert main(["convert", "--model", str(packed), "--quantization", "nf4", "--out", "out"]) == 2
    assert "4 bits already" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_conversion_needs_something_to_do(folder, capsys):
    assert main(["convert", "--model", str(BASE), "--out", "out"]) == 2
    assert "--adapter" in capsys.readouterr().err
