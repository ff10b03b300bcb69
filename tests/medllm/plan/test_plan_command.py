"""``medllm plan`` as a user meets it: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from medllm.architecture import Architecture
from medllm.cli import main
from medllm.host.installation import install_command
from medllm.plan import command, planning, search
from medllm.plan.models import planned_model
from medllm.plan.plan import Plan
from medllm.plan.targets import DEVICES, Target
from tests.medllm.test_cli import fails

TINY = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A model folder; nothing but its config is read."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    """What is refused is refused before anything is compiled."""

    def compile_(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(planning, "run_in_child", compile_)


# --- a plan ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory) -> tuple[int, dict[str, Any], str, list[tuple[int, int, str]]]:
    """Exit code, JSON and page of a plan that fits, and what was told of its progress."""
    out = tmp_path_factory.mktemp("planned")
    told: list[tuple[int, int, str]] = []
    arguments = ["--model", tiny, "--target", "cpu:2", "--mesh", "data=1,tensor=2", "--length", "64", "--quantization", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "progress_bar", lambda label: nullcontext(lambda *what: told.append(what)))
        code = main(["plan", *arguments, "--json", str(out / "plan.json"), "--html", str(out / "plan.html")])
    return code, json.loads((out / "plan.json").read_text()), (out / "plan.html").read_text(), told


def test_a_plan_that_fits_ends_with_zero(planned):
    assert planned[0] == 0
    assert planned[1]["fits"] is planned[1]["ok"] is True


def test_a_plan_says_what_is_compiled_of_how_many(planned):
    assert planned[3] == [
        (0, 2, "compiling gradients (1 of 2) for cpu:2"),
        (1, 2, "compiling update (2 of 2) for cpu:2"),
    ]


def test_the_json_says_what_the_stage_takes(planned):
    plan = planned[1]
    assert (plan["device"], plan["devices"], plan["mesh"]) == ("cpu", 2, {"tensor": 2})
    assert set(plan["by_kind"]) == {"base", "adapters", "moments", "batch", "activations", "output"}
    assert plan["gib_per_device"] == pytest.approx(sum(plan["by_kind"].values()))
    assert plan["headroom_gib"] == pytest.approx(plan["memory_gib"] - plan["gib_per_device"])
    assert plan["compile_s"] > 0
    assert plan["tokens_per_step"] == 64


def test_a_step_takes_as_long_as_what_takes_longest(planned):
    plan = planned[1]
    rates, seconds = plan["rates"], plan["seconds"]
    assert seconds["compute"] == pytest.approx(plan["flops"] / rates["flops"])
    assert seconds["memory"] == pytest.approx(plan["bytes"] / rates["memory_bytes"])
    assert seconds["interconnect"] == pytest.approx(sum(one["bytes"] for one in plan["collectives"]) / rates["link_bytes"])
    assert plan["step_s"] == seconds[plan["bound"]] == max(seconds.values()) > 0
    assert plan["tokens_per_s"] == pytest.approx(plan["tokens_per_step"] / plan["step_s"])


def test_a_mesh_of_tensors_adds_up_activations(planned):
    kinds = {one["kind"] for one in planned[1]["collectives"]}
    assert "all-reduce" in kinds or "reduce-scatter" in kinds


def test_the_page_is_written(planned, tiny):
    assert planned[2].startswith("<!DOCTYPE html>")
    assert Path(tiny).name in planned[2]


def test_a_plan_that_does_not_fit_ends_with_one(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Target, "memory_gib", 1e-4)
    arguments = ["--model", tiny, "--target", "cpu:1", "--stage", "generate", "--length", "16", "--rows", "1"]
    assert main(["plan", *arguments, "--quantization", "fp32", "--json", str(tmp_path / "plan.json")]) == 1
    assert "does NOT fit" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen2.5-72"], "--model qwen2.5-72: neither a known name nor a folder; did you mean qwen2.5-72b?"),
        (["--model", "gpt"], "known by name are qwen2.5-0.5b, qwen2.5-1.5b"),
        (["--target", "a100:4"], "--target a100:4: no device is called 'a100' (did you mean a100-40g or a100-80g?)"),
        (["--target", "tpu"], "there are a100-40g, a100-80g, h100, h200, v4, v5e, v5p, v6e, cpu"),
        (["--target", "h100:2x2"], "'2x2' is no number of devices; write h100:4"),
        (["--target", "h100:0"], "'0' is no number of devices"),
        (["--target", "v5e:16"], "'16' is no v5e topology; it has 2 sizes, as v5e:4x4"),
        (["--target", "v5p:2x2"], "it has 3 sizes, as v5p:4x4x4"),
        (["--rows", "0"], "--rows is 0; at least 1 is needed"),
        (["--length", "8"], "--length is 8; at least 16 is needed"),
        (["--length", "262144"], "a text of 262144 tokens is asked for, and qwen2.5-7b has a context of 131072"),
        (["--stage", "rpo", "--responses", "1"], "--responses is 1; at least 2 is needed"),
        (["--stage", "rpo", "--length", "4096"], "--length is for cpt and generate"),
        (["--prompt", "512"], "--prompt is for rpo and generate"),
        (["--stage", "generate", "--length", "512", "--prompt", "512"], "a slot holds a prompt and what follows it"),
        (["--search", "--mesh", "fsdp=4"], "--search tries all meshes, and --mesh fsdp=4 names one"),
        (["--search", "--most", "0"], "--most is 0; at least 1 is needed"),
        (["--remat", "some"], "remat"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_at_once(arguments, said, capsys):
    given = arguments if "--model" in arguments else ["--model", "qwen2.5-7b", *arguments]
    assert said in fails(capsys, "plan", *given)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "cpu:4", "--mesh", "tensor=4"], "of 2 heads does not divide over tensor=4; it would over 1, 2"),
        (["--target", "cpu:2", "--mesh", "fsdp=3"], "--mesh fsdp=3: "),
        (["--target", "cpu:2", "--mesh", "model=2"], "no mesh axis is called 'model'"),
        (["--target", "cpu:2", "--rules", "width=fsdp"], "no logical axis is called 'width'"),
        (["--target", "v5e:3x5"], "--target v5e:3x5: the compiler knows no such topology"),
        (["--target", "v5e:3x5", "--search"], "--target v5e:3x5: the compiler knows no such topology"),
    ],
)
def test_what_the_compiling_process_refuses_is_one_line_too(tiny, arguments, said, capsys, tmp_path):
    if "v5e" in arguments[1] and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[test]'")
    written = ["--json", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")]
    extra = ["--most", "2", "--rows", "1"] if "--search" in arguments else []
    code = main(["plan", "--model", tiny, "--length", "64", *arguments, *extra, *written])
    printed = capsys.readouterr()
    assert (code, len(printed.err.splitlines())) == (2, 1), printed.err
    assert said in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{}", "config.json: has no num_hidden_layers; a Qwen2 config has it"),
        (json.dumps({**TINY, "vocab_size": None, "x": 1}).replace('"vocab_size": null, ', ""), "has no vocab_size"),
        ("{", "config.json: not JSON"),
    ],
)
def test_a_folder_without_a_models_sizes_is_refused(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    for search_too in ([], ["--search"], ["--stage", "generate"]):
        assert said in fails(capsys, "plan", "--model", str(tmp_path), "--target", "cpu:2", *search_too)


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "mixtral"}))
    assert "mixtral" in fails(capsys, "plan", "--model", str(tmp_path), "--target", "cpu:1", "--length", "64")


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_page_is_not_written_over_a_folder(tiny, tmp_path, capsys):
    assert "is a folder; name a file" in fails(capsys, "plan", "--model", tiny, "--target", "cpu:1", "--html", str(tmp_path))


def without(*missing: str) -> Callable[..., Any]:
    """``find_spec`` of a machine without some packages: what is part of a missing one raises."""
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if any(name.startswith(f"{one}.") for one in missing):
            raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}")
        return None if name in missing else find(name, package)

    return find_spec


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(
    ("target", "missing", "named"),
    [
        ("v5e:2x2", "libtpu", "libtpu"),
        ("h100", "jax_plugins", "jax_plugins.xla_cuda12"),
        ("h100", "jax_cuda12_plugin", "jax_cuda12_plugin"),
        ("h100", "nvidia", "nvidia.cuda_nvcc"),
        ("cpu", "jax", "jax"),
    ],
)
@pytest.mark.parametrize("search_too", [[], ["--search"]])
def test_a_missing_compiler_is_named_with_its_install_command(target, missing, named, search_too, monkeypatch, capsys):
    present = {"libtpu", "jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc"} - {named}
    find = without(missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name in present else find(name, *rest))
    said = fails(capsys, "plan", "--model", "qwen2.5-0.5b", "--target", target, *search_too)
    assert said == f"medllm: medllm plan --target {target} needs the package '{named}': {install_command('plan')}"


# --- a search --------------------------------------------------------------------------------------------------------------


def test_a_search_ranks_what_fits_and_says_why_the_rest_fell_out(tiny, tmp_path, capsys):
    """Four meshes over two devices, one of them left out by --most."""
    arguments = ["--model", tiny, "--target", "cpu:2", "--length", "16", "--rows", "1", "--quantization", "fp32"]
    out = tmp_path / "search.json"
    code = main(["plan", *arguments, "--search", "--most", "2", "--json", str(out), "--html", str(tmp_path / "search.html")])
    found = json.loads(out.read_text())
    assert code == 0
    fitting = [row for row in found["candidates"] if row["fits"]]
    assert len(fitting) == 2
    rates = [row["tokens_per_s"] for row in fitting]
    assert rates == sorted(rates, reverse=True)
    assert found["best"]["tokens_per_s"] == rates[0]
    assert found["best"]["mesh"] == fitting[0]["mesh"]
    assert [row["why"] for row in found["candidates"][2:]] == ["not compiled: --most 2 were"] * (len(found["candidates"]) - 2)
    assert (tmp_path / "search.html").read_text().startswith("<!DOCTYPE html>")
    assert "tokens/s" in capsys.readouterr().out


@pytest.fixture
def a_plan_for_each(monkeypatch):
    """A search whose plans need no compiler: a GiB a row and one more for each policy that keeps more; only tensor fits 4."""
    asked = []

    def make_plan(request):
        asked.append(request)
        more = {"layer": 0, "attention": 1, "projections": 2, "none": 3}[request.remat]
        if request.mesh == "data=2":
            raise RuntimeError("the compiler gave up")
        compiled = {"by_kind": {"base": request.rows + more}, "flops": 1e12, "tokens_per_step": request.rows, "compile_s": 1}
        return Plan(request, Target.parse(request.target), planned_model(request.model), compiled)

    monkeypatch.setattr(search, "make_plan", make_plan)
    monkeypatch.setattr(Target, "memory_gib", 4.0)
    return asked


def test_each_candidate_has_the_policy_that_computes_least_again(tiny, a_plan_for_each):
    found = search.search(planning.Request(tiny, "cpt", "cpu:2", quantization="fp32", length=64), 32, lambda _: None).to_json()
    chosen = {(tuple(row["mesh"].items()), row["rows"]): row["remat"] for row in found["candidates"] if row["fits"]}
    assert chosen[(("tensor", 2),), 1] == "none"
    assert chosen[(("tensor", 2),), 2] == "projections"
    assert chosen[(("tensor", 2),), 4] == "layer"
    assert ((("tensor", 2),), 8) not in chosen
    tried = {(row["mesh"].get("tensor"), row["rows"], row["remat"]): row["why"] for row in found["candidates"]}
    assert tried[2, 8, "layer"] == "needs 8.0 GiB; 4.0 are there"
    assert {row["why"] for row in found["candidates"] if row["mesh"] == {"data": 2}} == {
        "did not compile: the compiler gave up"
    }
    assert all(request.remat == "none" for request in a_plan_for_each if request.rows == 1)


def test_what_cannot_fit_is_not_compiled(tiny, a_plan_for_each, monkeypatch):
    monkeypatch.setattr(Target, "memory_gib", 1e-6)
    found = search.search(planning.Request(tiny, "cpt", "cpu:2", quantization="fp32", length=64), 32, lambda _: None).to_json()
    assert a_plan_for_each == []
    assert found["fits"] is found["ok"] is False
    assert found["best"] is None
    assert all(row["why"].startswith("needs 0.0 GiB at least; ") for row in found["candidates"])


def test_a_search_over_one_more_axis_tries_meshes_of_all_devices(tiny, a_plan_for_each, monkeypatch):
    monkeypatch.setattr(search, "MESH_AXES", {**search.MESH_AXES, "expert": "experts"})
    request = planning.Request(tiny, "cpt", "cpu:4", quantization="fp32", length=64, rows=1)
    found = search.search(request, 100, lambda _: None).to_json()
    meshes = [row["mesh"] for row in found["candidates"]]
    assert all(math.prod(mesh.values()) == 4 for mesh in meshes)
    assert {"expert": 4} in meshes


# --- targets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "topology", "count"),
    [
        ("a100-80g:4", "1x1x4", 4),
        ("h200", "1x1x1", 1),
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v6e", "v6e:1x1", 1),
        ("v4:2x2x1", "v4:2x2x1", 4),
    ],
)
def test_a_target_is_a_kind_of_device_and_how_many(text, topology, count):
    target = Target.parse(text)
    assert (target.topology, target.count) == (topology, count)


def test_parts_of_this_machine_share_its_memory():
    assert Target.parse("cpu:4").memory_gib == DEVICES["cpu"].memory_gib / 4
    assert Target.parse("h100:4").memory_gib == DEVICES["h100"].memory_gib


def test_generation_is_over_heads_first_and_training_over_shards(tiny):
    target, model = Target.parse("a100-80g:4"), Architecture.from_hf(TINY)
    assert planning.default_mesh(planning.Request(tiny, "generate"), target, model) == "tensor=2,fsdp=2"
    assert planning.default_mesh(planning.Request(tiny, "cpt"), target, model) == "fsdp=4"
