"""``medllm plan --calibrate``: what follows from what was measured. Measurements are given; a real probe runs once, tiny."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medllm.cli import main
from medllm.errors import UserError
from medllm.plan import calibrating, planning
from medllm.plan.calibration import Calibration, Probe, Work
from medllm.plan.targets import DEVICES
from medllm.run import this_machine
from tests.forced_devices import NOT_OPTIMIZED
from tests.medllm.plan.test_plan_command import TINY
from tests.medllm.test_cli import fails

# A layer: 3e12 operations and 1e10 bytes. The rest: 1e12 and 2e10. Bound by operations in the layers, by bytes outside.
LAYER, REST = (3e12, 1e10), (1e12, 2e10)


def work(layers: int, scale: float = 1.0) -> Work:
    """Of a model of the probed shape, or of one whose layers and rest are ``scale`` times as large."""
    flops, moved = (scale * (rest + layers * layer) for layer, rest in zip(LAYER, REST, strict=True))
    return Work(layers, flops, moved)


CALIBRATION = Calibration(
    device="h100",
    hardware="NVIDIA H100 80GB HBM3",
    stage="cpt",
    quantization="bf16",
    model="qwen2.5-7b",
    settings={"rows": 1},
    matrix_flops=5e14,
    copy_bytes=2e12,
    shallow=Probe(work(2), 0.040),
    deep=Probe(work(4), 0.060),
    versions={"jax": "0.10.2"},
    measured="2026-01-01",
)


@pytest.mark.parametrize("probe", [CALIBRATION.shallow, CALIBRATION.deep], ids=["shallow", "deep"])
def test_a_program_that_was_probed_is_predicted_to_take_what_it_took(probe):
    other = CALIBRATION.deep if probe is CALIBRATION.shallow else CALIBRATION.shallow
    assert CALIBRATION.predict(probe.work, other.work).step_s == pytest.approx(probe.step_s, rel=1e-12)


@pytest.mark.parametrize("shallow", [2, 3])
def test_a_deeper_model_lies_on_the_line_through_the_probes(shallow):
    assert CALIBRATION.layer_s == pytest.approx(0.010)
    assert CALIBRATION.rest_s == pytest.approx(0.020)
    found = CALIBRATION.predict(work(28), work(shallow))
    assert (found.layers_s, found.rest_s) == (pytest.approx(0.28), pytest.approx(0.02))


def test_a_larger_model_falls_short_of_its_roofline_by_the_same_factor():
    assert CALIBRATION.layer_factor == pytest.approx(0.010 / (3e12 / 5e14))
    assert CALIBRATION.rest_factor == pytest.approx(0.020 / (2e10 / 2e12))
    assert CALIBRATION.predict(work(10, 3.0), work(2, 3.0)).step_s == pytest.approx(3 * (0.10 + 0.02))


def test_a_layer_that_is_bound_otherwise_is_held_against_that_bound():
    """Ten times the bytes: 1e11 at 2e12 a second take longer than 3e12 operations at 5e14."""
    heavy = [replace(work(layers), bytes=REST[1] + layers * 1e11) for layers in (2, 8)]
    assert CALIBRATION.predict(heavy[1], heavy[0]).layers_s == pytest.approx(8 * CALIBRATION.layer_factor * 0.05)


def test_more_layers_take_longer_and_what_is_sent_is_added():
    times = [CALIBRATION.predict(work(layers), work(2)).step_s for layers in (3, 4, 8, 80)]
    assert times == sorted(times)
    alone, sent = CALIBRATION.predict(work(8), work(2)), CALIBRATION.predict(work(8), work(2), interconnect_s=0.5)
    assert sent.step_s == pytest.approx(alone.step_s + 0.5)


def test_noise_does_not_make_the_rest_take_less_than_nothing():
    noisy = replace(CALIBRATION, deep=Probe(work(4), 0.100))
    assert noisy.rest_s == 0
    assert noisy.predict(noisy.deep.work, noisy.shallow.work).step_s == pytest.approx(0.100)


def test_a_deeper_probe_that_was_no_slower_says_nothing():
    with pytest.raises(UserError, match=r"0.04 s for 2 layers and 0.04 s for 4 layers.*is the device busy\? calibrate again"):
        replace(CALIBRATION, deep=Probe(work(4), 0.040))


def test_a_file_gives_back_what_was_measured(tmp_path):
    file = tmp_path / "cal.json"
    file.write_text(json.dumps(CALIBRATION.to_json()))
    assert Calibration.read(file) == CALIBRATION


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory; write one with --calibrate"),
        ("{", "is not what medllm plan --calibrate writes"),
        ("[1]", "is not what medllm plan --calibrate writes"),
        (json.dumps({**CALIBRATION.to_json(), "format": "another"}), "is not what medllm plan --calibrate writes"),
        (
            json.dumps({k: v for k, v in CALIBRATION.to_json().items() if k != "deep"}),
            "is not what medllm plan --calibrate writes",
        ),
    ],
)
def test_what_is_no_calibration_is_refused_in_one_line(text, said, tmp_path, capsys):
    file = tmp_path / "cal.json"
    if text is not None:
        file.write_text(text)
    assert said in fails(capsys, "plan", "--model", "qwen2.5-7b", "--target", "cpu:1", "--calibration", str(file))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder; nothing but its config is read."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 6, "max_position_embeddings": 4096}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({}, [], "the calibration is of h100 (NVIDIA H100 80GB HBM3) and the plan for cpu; calibrate on cpu, or plan for h100"),
        ({"device": "cpu"}, [], f"is of NVIDIA H100 80GB HBM3 and this machine is {this_machine()}; calibrate here"),
        ({"device": "cpu", "hardware": this_machine()}, ["--target", "cpu:2"], "the plan for 2 parts of it"),
        ({"device": "cpu", "hardware": this_machine()}, ["--stage", "rpo"], "of --stage cpt and the plan of rpo"),
        (
            {"device": "cpu", "hardware": this_machine()},
            ["--quantization", "nf4"],
            "of --quantization bf16 and the plan of nf4",
        ),
        ({}, ["--search"], "--search ranks by the roofline"),
    ],
)
def test_a_calibration_of_something_else_is_refused_before_anything_is_compiled(
    changes, arguments, said, folder, capsys, monkeypatch
):
    monkeypatch.setattr(planning, "run_in_child", lambda *_, **__: pytest.fail("a process was started"))
    file = folder / "cal.json"
    file.write_text(json.dumps(replace(CALIBRATION, **changes).to_json()))
    given = ["--target", "cpu:1", "--quantization", "bf16", *arguments, "--calibration", str(file)]
    assert said in fails(capsys, "plan", "--model", str(folder), *given)


def compiled(module: str, name: str, settings: dict[str, Any], **_: Any) -> dict[str, Any]:
    """What the compiling process would answer, with the work of :func:`work`."""
    layers = settings["settings"]["model"]["num_hidden_layers"]
    done = work(layers)
    return {
        "by_kind": {"base": 0.001},
        "flops": done.flops,
        "bytes": done.bytes,
        "collectives": [],
        "tokens_per_step": 4096,
        "compile_s": 1.0,
        "mesh": {"data": 1},
    }


def test_a_plan_with_a_calibration_says_what_a_step_takes(folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "run_in_child", compiled)
    file, out = folder / "cal.json", folder / "plan.json"
    file.write_text(json.dumps(replace(CALIBRATION, device="cpu", hardware=this_machine()).to_json()))
    given = ["--target", "cpu:1", "--quantization", "bf16", "--length", "64", "--calibration", str(file), "--json", str(out)]
    assert main(["plan", "--model", str(folder), *given]) == 0
    predicted = json.loads(out.read_text())["predicted"]
    assert predicted["step_s"] == pytest.approx(0.02 + 6 * 0.01)
    assert predicted["tokens_per_s"] == pytest.approx(4096 / 0.08)
    said = capsys.readouterr().out
    assert f"predicted from 2 and 4 layers of qwen2.5-7b on {this_machine()}, 2026-01-01:" in said
    assert "0.080 s a step: 51,200 tokens/s" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "generate"], "--calibrate runs training steps, and --stage generate is none"),
        (["--target", "cpu:2"], "--calibrate runs on one device, and --target cpu:2 has 2"),
        (["--target", "h100"], "--target asks for a cuda device, and JAX sees cpu (cpu) here; leave it out"),
        (["--search"], "leave --search out"),
        (["--calibration", "x.json"], "leave --calibration out"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(arguments, said, folder, capsys):
    file = folder / "cal.json"
    assert said in fails(capsys, "plan", "--model", str(folder), "--length", "64", *arguments, "--calibrate", str(file))
    assert not file.exists()


def test_a_probe_that_takes_too_long_says_what_would_be_shorter(folder, capsys, monkeypatch):
    def late(*_: Any, **__: Any) -> None:
        raise RuntimeError("not done after 180 s")

    monkeypatch.setattr(calibrating, "run_in_child", late)
    said = fails(capsys, "plan", "--model", str(folder), "--length", "64", "--calibrate", str(folder / "cal.json"))
    assert "the probe was not done after 180 s; give it less to do: --rows, --length, or a smaller --model" in said


def test_devices_are_known_by_what_they_call_themselves():
    assert calibrating.device_name({"kind": "cpu", "name": "cpu"}) == "cpu"
    assert calibrating.device_name({"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}) == "h100"
    assert calibrating.device_name({"kind": "cuda", "name": "NVIDIA GeForce RTX 4090"}) is None
    assert calibrating.device_name({"kind": "tpu", "name": "TPU v5 lite"}) == "v5e"
    assert set(calibrating._TPUS.values()) == {name for name, device in DEVICES.items() if device.kind == "tpu"}


def test_a_real_probe_writes_a_file_that_a_real_plan_predicts_with(folder, capsys, monkeypatch):
    """Its own deeper program must come out at what was measured: the plan compiles the same one again."""
    variables = planning.compiling_environment

    def as_the_probe(*given: Any) -> dict[str, str]:
        found = variables(*given)
        return found | {"XLA_FLAGS": f"{found['XLA_FLAGS']} {NOT_OPTIMIZED}"}

    monkeypatch.setenv("XLA_FLAGS", NOT_OPTIMIZED)
    monkeypatch.setattr(planning, "compiling_environment", as_the_probe)
    file, out = folder / "cal.json", folder / "plan.json"
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 4}))
    given = ["--model", str(folder), "--target", "cpu:1", "--quantization", "fp32", "--length", "64"]
    code = main(["plan", *given, "--calibrate", str(file)])
    said = capsys.readouterr()
    if code == 2:  # a busy machine can make four layers the faster ones
        assert "calibrate again" in said.err
        pytest.skip("the machine is too busy to tell four layers from two")
    assert code == 0
    written = json.loads(file.read_text())
    assert [probe["layers"] for probe in written["probes"]] == [2, 4]
    assert main(["plan", *given, "--calibration", str(file), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["predicted"]["step_s"] == pytest.approx(written["probes"][1]["step_s"], rel=1e-6)
