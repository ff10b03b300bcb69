"""``medllm bench … --profile`` and ``medllm bench floor``: where the time of a step goes, and what would be the least."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os

import numpy as np
import pytest

from jax_medllm.bench import operations
from medllm.bench import arithmetic, floor
from medllm.bench.comparison import Figures
from medllm.bench.compiled_text import read_compiled
from medllm.bench.profile import read_tables
from medllm.bench.profile_table import (
    BETWEEN,
    Event,
    lines,
    longest,
    operator_rows,
    profile,
    read_events,
    rows,
    tab_separated,
)
from medllm.bench.shapes import CptShape, ModelShape, RpoShape
from medllm.bench.share import share_lines, shares
from medllm.cli import main

ENGINES = ("jax", "torch")
TINY = ModelShape(layers=2, width=32, mlp=48, heads=2, kv_heads=1, vocabulary=128, rank=2)
TINY_WORDS = [f"--model.{name}={value}" for name, value in dataclasses.asdict(TINY).items() if isinstance(value, int)]
RANK = 16

PATH = "jit(gradients)/transpose(jvp())/while/body/checkpoint"
TEXT = f"""HloModule jit_gradients, is_scheduled=true, entry_computation_layout={{(f32[8,64]{{1,0}})->f32[8,32]{{1,0}}}}

FileNames
1 "/somewhere/jax_medllm/train/loop.py"
2 "/somewhere/jax_medllm/model/linear.py"
3 "/somewhere/jax_medllm/model/attention/xla.py"
4 "/somewhere/jax_medllm/model/logprobs.py"

FunctionNames
1 "step"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=2}}
3 {{file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=2}}
4 {{file_name_id=4 function_name_id=1 line=1 end_line=1 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=2}}
4 {{file_location_id=4 parent_frame_id=2}}

%fused_computation (param_0: f32[8,64], param_1: f32[32,64]) -> f32[8,32] {{
  %param_0 = f32[8,64]{{1,0}} parameter(0)
  %param_1 = f32[32,64]{{1,0}} parameter(1)
  %dot.1 = f32[8,32]{{1,0}} dot(%param_0, %param_1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}, metadata={{op_name="{PATH}/rematted_computation/...i,oi->...o/dot_general" stack_frame_id=2}}
  ROOT %add.9 = f32[8,32]{{1,0}} add(%dot.1, %dot.1), metadata={{op_name="{PATH}/add" stack_frame_id=1}}
}}

%fused_computation.1 (param_0.1: f32[2,5,8,4], param_1.1: f32[2,5,4,6]) -> f32[2,5,8,6] {{
  %param_0.1 = f32[2,5,8,4]{{3,2,1,0}} parameter(0)
  %param_1.1 = f32[2,5,4,6]{{3,2,1,0}} parameter(1)
  ROOT %dot.2 = f32[2,5,8,6]{{3,2,1,0}} dot(%param_0.1, %param_1.1), lhs_batch_dims={{0,1}}, lhs_contracting_dims={{3}}, rhs_batch_dims={{0,1}}, rhs_contracting_dims={{2}}, metadata={{op_name="{PATH}/bkgst,btkx->bskgx/dot_general" stack_frame_id=3}}
}}

%body (arg: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {{
  %ynn_fusion.7 = f32[8,32]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%fused_computation, metadata={{op_name="{PATH}/add" stack_frame_id=1}}
  %softmax_fusion = f32[8,32]{{1,0}} fusion(%a), kind=kLoop, calls=%loop, metadata={{op_name="{PATH}/exp" stack_frame_id=3}}
}}

ENTRY %main (x: f32[8,64]) -> f32[8,32] {{
  %x = f32[8,64]{{1,0}} parameter(0)
  %g = f32[8,16]{{1,0}} copy(%x), metadata={{op_name="jit(gradients)/jvp()/copy" stack_frame_id=2}}
  %dot_general.5 = f32[16,64]{{1,0}} dot(%g, %x), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}, metadata={{op_name="{PATH}/nr,ni->ri/dot_general" stack_frame_id=2}}
  %while.3 = (s32[], f32[8,64]{{1,0}}) while(%x), condition=%condition, body=%body, metadata={{op_name="{PATH}/while" stack_frame_id=1}}
  ROOT %ynn_fusion.8 = f32[2,5,8,6]{{3,2,1,0}} fusion(%a, %b), kind=kCustom, calls=%fused_computation.1, metadata={{op_name="{PATH}/add" stack_frame_id=3}}
}}
"""  # noqa: E501


def event(thread, start, end, name, run="1", program="jit_gradients"):
    return Event(thread, float(start), float(end), program, run, name)


def seconds_of(found):
    return {one.name: pytest.approx(one.seconds) for one in found.operations}


def test_a_fusion_is_what_its_product_is():
    instruction = read_compiled(TEXT).instructions["ynn_fusion.7"]
    assert instruction.flops == 2 * 8 * 64 * 32
    assert instruction.products[0].sides == (8, 64, 32)
    assert instruction.operation.endswith("rematted_computation/...i,oi->...o/dot_general")
    assert instruction.files == ("/somewhere/jax_medllm/model/linear.py", "/somewhere/jax_medllm/train/loop.py")


def test_a_batched_product_counts_once_for_each_of_the_batch():
    instruction = read_compiled(TEXT).instructions["ynn_fusion.8"]
    assert instruction.flops == 2 * 2 * 5 * 8 * 4 * 6
    assert instruction.products[0].sides == (8, 4, 6)


def test_what_is_fused_is_no_instruction_of_its_own():
    names = read_compiled(TEXT).instructions
    assert names.keys() == {"ynn_fusion.7", "softmax_fusion", "x", "g", "dot_general.5", "while.3", "ynn_fusion.8"}


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="HloModule"):
        read_compiled("BufferAssignment:\n")


def test_time_belongs_to_the_innermost_operation():
    found = profile(
        [event(1, 0, 10, "ynn_fusion.8"), event(1, 2, 5, "ynn_fusion.7"), event(1, 3, 4, "g")], [read_compiled(TEXT)]
    )
    assert seconds_of(found) == {"ynn_fusion.8": 7.0, "ynn_fusion.7": 2.0, "g": 1.0}
    assert found.seconds == 10.0


def test_an_instant_with_two_operations_counts_half_to_each():
    found = profile([event(1, 0, 10, "ynn_fusion.8"), event(2, 4, 6, "ynn_fusion.7")], [read_compiled(TEXT)])
    assert seconds_of(found) == {"ynn_fusion.8": 9.0, "ynn_fusion.7": 1.0}


def test_a_loop_is_the_time_of_what_it_runs_and_no_more():
    events = [event(1, 0, 10, "while.3"), event(1, 1, 4, "ynn_fusion.7"), event(1, 6, 8, "ynn_fusion.7")]
    found = profile(events, [read_compiled(TEXT)])
    assert seconds_of(found) == {"ynn_fusion.7": 5.0}
    assert found.operations[0].runs == 2
    assert found.operations[0].flops == 2 * 2 * 8 * 64 * 32
    assert {row.name: row.seconds for row in rows(found, 1)}[BETWEEN] == pytest.approx(5.0)


def test_rows_say_part_and_phase_and_add_up_to_the_step():
    names = ["ynn_fusion.7", "ynn_fusion.8", "softmax_fusion", "dot_general.5", "g", "nobody_knows"]
    events = [event(1, start, start + 2, name) for start, name in zip(range(0, 12, 2), names, strict=True)]
    events.append(event(1, 14, 18, "anything", run="2", program="jit_update"))
    table = rows(profile(events, [read_compiled(TEXT)], RANK), 2)
    assert [(row.name, row.seconds) for row in table] == [
        ("weights, recomputed", 1.0),
        ("LoRA, backward", 1.0),
        ("attention, backward", 1.0),
        ("attention, rest, backward", 1.0),
        ("elementwise and copies, forward", 1.0),
        ("optimizer", 2.0),
        ("unknown", 1.0),
        (BETWEEN, 0.0),
    ]
    assert sum(row.seconds for row in table) == 8.0  # 12 + 4 s of two runs, in two steps; the pause between them is in none
    assert table[1].flops == 2 * 8 * 16 * 64 / 2


def test_rows_too_short_to_matter_are_one():
    events = [event(1, 0, 1000, "ynn_fusion.7"), event(1, 1000, 1001, "g"), event(1, 1001, 1002, "softmax_fusion")]
    table = rows(profile(events, [read_compiled(TEXT)], RANK), 1)
    assert [row.name for row in table] == ["weights, recomputed", "everything else", BETWEEN]
    assert table[1].seconds == pytest.approx(2.0)


def test_the_table_shows_rates_of_products_and_their_share_of_the_machines():
    found = profile([event(1, 0, 1, "ynn_fusion.7"), event(1, 1, 4, "softmax_fusion")], [read_compiled(TEXT)], RANK)
    flops = 2 * 8 * 64 * 32
    said = lines(rows(found, 1), matrix_gflops=2 * flops / 1e9)
    (product,) = [line for line in said if line.startswith("weights")]
    (other,) = [line for line in said if line.startswith("attention, rest")]
    assert product.split()[-3:] == ["25.0%", "0.0", "50%"]
    assert other.split()[-2:] == ["3.0000", "75.0%"]
    assert said[-1].split() == ["step", "4.0000", "100.0%", "0.0", "12%"]
    assert longest(found, 1, 1)[0].startswith("softmax_fusion")


def test_every_instruction_is_a_line_most_seconds_first():
    found = profile([event(1, 0, 2, "ynn_fusion.7"), event(1, 2, 10, "softmax_fusion")], [read_compiled(TEXT)], RANK)
    header, first, second = (line.split("\t") for line in tab_separated(found, 2).splitlines())
    assert dict(zip(header, first, strict=True))["instruction"] == "softmax_fusion"
    line = dict(zip(header, second, strict=True))
    assert float(line["seconds a step"]) == 1.0
    assert float(line["share"]) == 0.2
    assert line["phase"] == "recomputed"
    assert line["result"].startswith("f32[8,32]")


def test_of_two_programs_with_one_name_a_run_is_of_the_one_that_has_its_instructions():
    other = TEXT.replace("ynn_fusion.7", "ynn_fusion.70").replace("softmax_fusion = f32[8,32]", "softmax_fusion = f32[9,32]")
    events = [event(1, 0, 1, "ynn_fusion.7"), event(1, 1, 2, "softmax_fusion")]
    events += [event(1, 5, 6, "ynn_fusion.70", run="2"), event(1, 6, 7, "softmax_fusion", run="2")]
    for texts in ([TEXT, other], [other, TEXT]):
        found = profile(events, [read_compiled(text) for text in texts])
        assert all(one.instruction is not None for one in found.operations)
        shapes = {one.instruction.shape for one in found.operations if one.name == "softmax_fusion"}
        assert shapes == {"f32[8,32]{1,0}", "f32[9,32]{1,0}"}


def test_of_a_trace_only_operations_of_the_programs_asked_for_are_read():
    def traced(name, **args):
        return {"ph": "X", "tid": 4, "ts": 1e6, "dur": 5e5, "name": name, "args": args}

    trace = {
        "traceEvents": [
            {"ph": "M", "tid": 4, "name": "thread_name", "args": {"name": "tf_XLAEigen/1"}},
            {"ph": "X", "tid": 4, "ts": 0, "dur": 9e9, "name": "ThunkExecutor::Execute"},
            traced("end: g"),
            traced("g", hlo_op="g", hlo_module="jit_gradients", run_id="1"),
            traced("h", hlo_op="h", hlo_module="jit_open", run_id="2"),
        ]
    }
    assert read_events(trace, ["jit_gradients"]) == [event(4, 1, 1.5, "g")]
    assert len(read_events(trace)) == 2


def test_operators_are_products_attention_and_the_rest():
    operators = [
        {"name": "aten::addmm", "seconds": 4.0, "flops": 100},
        {"name": "aten::mm", "seconds": 2.0, "flops": 50},
        {"name": "aten::_scaled_dot_product_flash_attention_for_cpu", "seconds": 3.0, "flops": 0},
        {"name": "aten::mul", "seconds": 1.0, "flops": 7},
    ]
    table = operator_rows(operators, 2)
    assert [(row.seconds, row.flops) for row in table] == [(3.0, 75.0), (1.5, 0.0), (0.5, 0.0)]


def test_a_cpt_steps_pairs_and_predictions_are_those_of_its_documents():
    shape = CptShape(TINY, rows=3, length=16, steps=2)
    segments = shape.data().segment_ids
    causal = np.tril(np.ones((16, 16), bool))
    seen = (segments[:, :, None] == segments[:, None, :]) & causal
    step = arithmetic.work_of(shape)
    assert step.tokens == 48
    assert step.visible == seen.sum() // 2
    assert step.predicted == (segments[:, 1:] == segments[:, :-1]).sum() // 2


def test_preferences_pair_by_pair_are_more_work_than_problem_by_problem():
    shape = RpoShape(TINY, problems=2, prompt=12, response=6)
    together, apart = (arithmetic.work_of(shape, pairwise=pairwise) for pairwise in (False, True))
    assert together.tokens == 2 * (12 + 3 * 6)
    assert apart.tokens == 2 * 3 * 2 * (12 + 6)


def figures_of(rate: float, matmul_gflops: float, remat: str | None) -> Figures:
    return Figures(rate, peak_rss_gib=1.0, compile_s=0.0, matmul_gflops=matmul_gflops, remat=remat)


def test_the_share_of_the_matrix_rate_counts_what_each_engine_recomputes():
    shape = CptShape(TINY, rows=3, length=16, steps=2)
    found = {}
    for ours, theirs in (("none", "none"), ("attention", "layer"), ("layer", "none")):
        figures = {engine: figures_of(96.0, 1e-2, kept) for engine, kept in zip(ENGINES, (ours, theirs), strict=True)}
        reached = shares(shape, figures)
        found[ours], found["torch " + theirs] = (reached[engine].matrix_share for engine in ENGINES)
        flops = arithmetic.training_flops(TINY, arithmetic.work_of(shape), ours)
        assert reached["jax"].step_gflops == pytest.approx(2 * flops / 1e9)  # two steps a second
        assert f"{found[ours]:.0%} of its matrix rate" in share_lines(reached)[0]
    assert found["none"] < found["attention"] < found["layer"]
    assert (found["none"], found["layer"]) == (found["torch none"], found["torch layer"])


def test_a_profile_of_training_shows_the_products_of_a_step_on_paper(tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["--rows=2", "--length=32", "--steps=2", "--runs=1", "--remat=layer", "--engines", "jax"]
    assert main(["bench", "cpt", *TINY_WORDS, *words, "--profile", str(tmp_path / "profile"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    flops = {row["name"]: row["flops"] for row in result["profile"]["jax"]}
    weights = TINY.architecture.linear_parameters // TINY.layers
    once = 2 * 64 * TINY.layers * weights
    assert flops["weights, forward"] == flops["weights, backward"] == once
    assert flops["weights, recomputed"] == once - 2 * 64 * TINY.layers * TINY.width * TINY.mlp
    assert flops["head, forward"] > 0
    assert (tmp_path / "profile" / "jax" / "operations.tsv").read_text().count("\n") > 20
    said = capsys.readouterr().out
    assert "weights, backward" in said
    assert "of its matrix rate" in said


def test_a_trace_of_the_reference_comes_with_what_each_operator_took(tmp_path):
    torch = pytest.importorskip("torch")
    with importlib.import_module("torch_ref.bench").profiler(str(tmp_path / "torch")):
        torch.nn.functional.linear(torch.ones(8, 64), torch.ones(32, 64), torch.ones(32))
    shape = CptShape(TINY, rows=2, length=16, steps=2)
    tables, said = read_tables(tmp_path, shape, {"torch": figures_of(1.0, 1.0, None)})
    products = tables["torch"][0]
    assert products.flops == 2 * 8 * 64 * 32 / 2
    assert products.seconds > 0
    assert "mean of 2 steps" in said[1]


def test_where_no_operation_was_recorded_the_table_says_so(tmp_path):
    tables, said = read_tables(tmp_path, CptShape(TINY), {"jax": figures_of(1.0, 1.0, None)})
    assert "no operation was recorded" in said[-1]
    assert tables == {"jax": []}


@pytest.mark.parametrize("flag", ["--xla_cpu_enable_xprof_traceme=true", "--xla_that_nobody_knows=true"])
def test_a_flag_this_jaxlib_does_not_know_is_left_out(tmp_path, monkeypatch, flag):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(operations, "_FLAG", flag)
    seen = []
    assert operations.recorded(lambda **given: seen.append(os.environ["XLA_FLAGS"].split()) or given, profile=str(tmp_path))
    (flags,) = seen
    assert (flag in flags) == ("nobody" not in flag)
    assert flags[0] == "--xla_force_host_platform_device_count=1"
    assert any(one.startswith("--xla_dump_to=") for one in flags)


def test_nothing_is_asked_of_a_process_that_writes_no_trace(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert operations.recorded(lambda **given: {"flags": os.environ["XLA_FLAGS"], **given}, profile=None, rows=2) == {
        "flags": "",
        "profile": None,
        "rows": 2,
    }


def test_the_floor_is_the_slower_of_products_and_bytes():
    assert floor.Work(100, 10).floor(matrix_flops=10, copy_bytes=10) == 10
    assert floor.Work(10, 100).floor(matrix_flops=10, copy_bytes=5) == 20


def test_layers_are_counted_forward_as_their_products():
    tokens, visible = 32, 2 * 16 * 17 // 2
    shapes = [projection.shape for projection in TINY.architecture.projections.values()]
    weights = sum(out * width + TINY.rank * (out + width) for out, width in shapes)
    counted = floor.works(TINY, 2, 16)["2 layers: forward"].flops
    assert counted == 2 * (2 * tokens * weights + 4 * TINY.width * visible)


def test_only_what_stays_below_a_third_of_its_floor_is_named(monkeypatch):
    works = floor.works(TINY, 2, 16)
    slow, edge = "gate_proj LoRA: dB = gᵀ (x Aᵀ)", "attention: forward"
    seconds = {name: 1.1 * work.floor(1e9, 1e8) for name, work in works.items()}
    seconds |= {slow: 3.1 * works[slow].floor(1e9, 1e8), edge: 2.9 * works[edge].floor(1e9, 1e8)}
    found = {"matrix_flops": 1e9, "copy_bytes": 1e8, "seconds": seconds}
    monkeypatch.setattr(floor, "measure", lambda *_, **__: found)
    result = floor.bench_floor(TINY, 2, 16, seconds=0.5)
    assert result["slow"] == [slow]
    assert floor.table(result)[-1] == f"bench floor: below a third of its floor: {slow}"
    (line,) = [line for line in floor.table(result) if line.startswith(slow)]
    assert line.endswith("32%  <")
    seconds[slow] = works[slow].floor(1e9, 1e8)
    assert "all reach a third" in floor.table(floor.bench_floor(TINY, 2, 16, seconds=0.5))[-1]


def test_every_operation_of_the_floor_is_measured_by_the_products_own_modules(tmp_path, capsys):
    out = tmp_path / "floor.json"
    words = ["--rows=2", "--length=16", "--seconds=0.001", "--json", str(out)]
    assert main(["bench", "floor", *TINY_WORDS, *words]) == 0
    result = json.loads(out.read_text())
    assert [one["name"] for one in result["operations"]] == list(floor.works(TINY, 2, 16))
    assert all(one["seconds"] > 0 and one["share"] > 0 for one in result["operations"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("bench floor: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--rows=0"], "--rows is 0"), (["--seconds=0"], "--seconds is 0"), (["--model.heads=3"], "3 heads")],
)
def test_a_wrong_setting_is_one_line(capsys, words, expected):
    assert main(["bench", "floor", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
