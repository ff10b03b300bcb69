"""``medllm parity`` as a command: what it writes, its exit code, and what it refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medllm.cli import main
from medllm.config import ModelConfig
from medllm.model.directory import ModelDirectory
from parity_tests.test_audit import LAYERS, Tensors, a_name, changed, layer, swap
from torch_ref.model import open_model


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(layers=LAYERS)


def command(*arguments: str) -> list[str]:
    return ["parity", *arguments, "--rows", "3", "--tokens", "24"]


def test_the_command_writes_a_result_and_a_page_and_exits_0(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command("--model.path", str(base), "--out", str(out), "--json", str(tmp_path / "r.json"))) == 0
    assert "the two stacks agree" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert (result["ok"], result["first_divergence"]) == (True, None)
    assert {"name", "error", "tolerance", "ok"} <= set(result["checks"][0])
    page = (out / "audit.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page


def test_the_command_names_a_fault_and_exits_1(base, tmp_path, capsys):
    faulty = changed(base, tmp_path / "<faulty>", lambda t: swap(t, layer(2, "mlp.gate_proj"), layer(2, "mlp.up_proj")))
    arguments = command("--model.path", str(faulty), "--reference", str(base), "--bisect", "--out", str(tmp_path / "out"))
    assert main(arguments) == 1
    assert "the two part at model.layers.2.mlp.gate_proj: gate" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    first = result["first_divergence"]
    assert (result["ok"], first["layer"], first["module"], first["quantity"]) == (
        False,
        2,
        "model.layers.2.mlp.gate_proj",
        "gate",
    )
    assert first["error"] > first["tolerance"]
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert page.count("✗</span></td>") == sum(not c["ok"] for c in result["checks"] if c["layer"] is not None)
    assert "<faulty>" not in page


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def forget_a_tensor(folder: Path) -> None:
    index = dict.fromkeys([*ModelDirectory(folder).names(), layer(2, "mlp.up_proj", "extra")], "shard.safetensors")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")  # one file would go before an index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, "truncated"),
        (forget_a_tensor, "up_proj.extra"),
        (edit_config(model_type="mixtral"), "mixtral"),
        (edit_config(num_hidden_layers=4, layer_types=None), "model.layers.3."),
        (edit_config(num_hidden_layers=2, layer_types=None), "model.layers.2."),
        (edit_config(num_hidden_layers=5), "layer_types"),
        (edit_config(intermediate_size=192), "mlp.gate_proj.weight has shape (128, 64)"),
    ],
    ids=a_name,
)
@pytest.mark.parametrize("side", ["--model.path", "--reference"])
def test_a_folder_that_cannot_be_audited_is_one_line(base, tmp_path, capsys, spoil, said, side):
    bad = changed(base, tmp_path / "bad")
    spoil(bad)
    paths = {"--model.path": str(base)} | {side: str(bad)}
    assert_refused(tmp_path, capsys, said, *(word for pair in paths.items() for word in pair))


def test_models_of_other_sizes_and_a_4_bit_state_of_another_kind_are_refused(base, tiny_model, tmp_path, capsys):
    assert_refused(tmp_path, capsys, "num_layers is 2", "--model.path", str(base), "--reference", str(tiny_model()))
    open_model(ModelConfig(str(base), quantization="nf4", dtype="float32")).save_pretrained(tmp_path / "packed")
    assert_refused(tmp_path, capsys, "--model.quantization nf4", "--model.path", str(tmp_path / "packed"))
    name = layer(1, "mlp.up_proj", "weight.quant_state.bitsandbytes__nf4")

    def fp4(tensors: Tensors) -> None:
        state = json.loads(tensors[name].tobytes()) | {"blocksize": 128}
        tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    other = changed(tmp_path / "packed", tmp_path / "other", fp4)
    assert_refused(tmp_path, capsys, "blocksize 128", "--model.path", str(other), "--model.quantization", "nf4")


def test_an_adapter_for_another_model_is_refused(base, tiny_model, tiny_adapter, tmp_path, capsys):
    wide = tiny_adapter(tiny_model(hidden=128))
    assert_refused(tmp_path, capsys, str(wide), "--model.path", str(base), "--model.adapter", str(wide))


def test_rows_that_do_not_fit_and_text_that_cannot_be_read_are_refused(base, tmp_path, capsys):
    assert_refused(tmp_path, capsys, "rows is 2", "--model.path", str(base), "--rows", "2")
    assert_refused(tmp_path, capsys, "512 positions", "--model.path", str(base), "--tokens", "513")
    assert_refused(tmp_path, capsys, "nowhere.txt", "--model.path", str(base), "--text", "nowhere.txt")


def assert_refused(folder: Path, capsys, said: str, *arguments: str) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["parity", *arguments, "--out", str(folder / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert sorted(folder.rglob("*")) == before
