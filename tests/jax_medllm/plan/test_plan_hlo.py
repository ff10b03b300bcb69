"""What the planner reads in a compiled program: communication and traffic, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent, indent
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_medllm.plan.hlo import Collective, Program

KIB = 1024


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def traffic(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> int:
    return Program(jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text()).traffic()


def program(body: str, others: str = "", while_trips: int = 1) -> Program:
    """A program whose entry has these lines, after computations as they are written."""
    entry = f"ENTRY %main (p: f32[]) -> f32[] {{\n{indent(dedent(body).strip(), '  ')}\n}}\n"
    return Program(f"HloModule m\n\n{dedent(others).strip()}\n\n{entry}", while_trips)


def only(found: list[Collective]) -> Collective:
    assert len(found) == 1, found
    return found[0]


# --- traffic of programs compiled here -------------------------------------------------------------------------------------


def test_a_copy_reads_and_writes_its_array():
    assert traffic(lambda x: x * 2, floats(1024)) == 2 * 4 * KIB


def test_a_product_reads_both_factors_and_writes_the_result():
    assert traffic(jnp.matmul, floats(256, 512), floats(512, 384)) == 4 * (256 * 512 + 512 * 384 + 256 * 384)


def test_a_scan_over_a_stack_reads_its_slices_and_not_the_stack_each_time():
    def run(x, stack):
        return jax.lax.scan(lambda x, each: (x * each + 1, None), x, stack)[0]

    expected = 64 * (4 + 4 + 4) * KIB  # reads the carry and a slice, writes the carry
    assert expected <= traffic(run, floats(1024), floats(64, 1024)) < 1.02 * expected  # counters, and the first carry's copy


def test_an_array_that_is_updated_in_place_moves_what_is_updated():
    def run(x):
        def one(i, x):
            return jax.lax.dynamic_update_slice(x, jnp.sin(jax.lax.dynamic_slice(x, (i, 0), (1, 1024))), (i, 0))

        return jax.lax.fori_loop(0, 64, one, x)

    expected = 64 * (4 + 4) * KIB
    assert expected <= traffic(run, floats(64, 1024), donate=(0,)) < 1.02 * expected


def test_an_update_alone_moves_what_is_updated():
    def run(x, row):
        return jax.lax.dynamic_update_slice(x, row, (3, 0))

    assert traffic(run, floats(64, 1024), floats(1, 1024), donate=(0,)) == 2 * 4 * KIB


# --- forms that a CPU's compiler does not write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=4,'axis_1'=1] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,2,2]T(2,1,0)) {'axis_1'}", 4),
    ],
)
def test_the_devices_of_a_group_are_read_in_every_form(groups, devices):
    found = only(
        program(f"""
            %p = f32[256]{{0}} parameter(0)
            ROOT %g = f32[1024]{{0}} all-gather(%p), channel_id=3, replica_groups={groups}, dimensions={{0}}
        """).collectives()
    )
    assert found == Collective("all-gather", "f32", devices, 1, (devices - 1) * KIB)


@pytest.mark.parametrize("groups", ["{}", "ring[8]", "mesh['x'=8], order=3 {'x'}"])
def test_groups_of_an_unknown_form_are_an_error_and_not_nothing(groups):
    wrong = program(f"""
        %p = f32[256]{{0}} parameter(0)
        ROOT %g = f32[256]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add
    """)
    with pytest.raises(ValueError, match="no known groups"):
        wrong.collectives()


def test_groups_of_one_device_send_nothing():
    alone = program("""
        %p = f32[256]{0} parameter(0)
        ROOT %g = f32[256]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
    """)
    assert alone.collectives() == []


def test_a_gather_of_several_arrays_counts_each_type():
    """As a GPU's compiler writes it: one start for all, whose result is a tuple of tuples."""
    several = program("""
        %a = u8[512,4]{1,0} parameter(0)
        %b = bf16[256]{0} parameter(1)
        %c = u8[1024]{0} parameter(2)
        %s = ((u8[512,4]{1,0}, bf16[256]{0}, /*index=2*/u8[1024]{0}), (u8[2048,4]{1,0}, bf16[1024]{0}, u8[4096]{0})) \
all-gather-start(%a, %b, %c), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
        %d = (u8[2048,4]{1,0}, bf16[1024]{0}, u8[4096]{0}) all-gather-done(%s)
        ROOT %r = u8[2048,4]{1,0} get-tuple-element(%d), index=0
    """)
    assert several.collectives() == [
        Collective("all-gather", "u8", 4, 1, 3 * 3 * KIB),
        Collective("all-gather", "bf16", 4, 1, 3 * KIB // 2),
    ]
    assert several.traffic() == (1 + 4) * (3 * KIB + KIB // 2)  # what is sent is read, and what comes is written


def test_two_collectives_that_share_a_channel_are_two():
    """JAX gives all collectives of shard_map the same."""
    two = program("""
        %p = f32[256]{0} parameter(0)
        %a = f32[256]{0} all-reduce(%p), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
        ROOT %b = f32[256]{0} all-reduce(%a), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
    """)
    assert only(two.collectives()) == Collective("all-reduce", "f32", 4, 2, 2 * 2 * 768)


TPU_GATHER = """
    %started (p.0: u8[64,1024], p.1: u8[256,1024]) -> (u8[256,1024], u8[64,1024], u8[256,1024]) {
      %p.0 = u8[64,1024]{1,0:T(8,128)(4,1)S(1)} parameter(0)
      %p.1 = u8[256,1024]{1,0:T(8,128)(4,1)} parameter(1)
      %g = u8[256,1024]{1,0:T(8,128)(4,1)} all-gather(%p.0), channel_id=9, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
      ROOT %c = (u8[256,1024]{1,0:T(8,128)(4,1)}, u8[64,1024]{1,0:T(8,128)(4,1)S(1)}, u8[256,1024]{1,0:T(8,128)(4,1)}) \
custom-call(%p.0, %p.1, %g), custom_call_target="AsyncCollectiveStart"
    }

    %beside (q.0: u8[64,1024], q.1: u8[256,1024], q.2: f32[16,128]) -> (f32[16,128], u8[64,1024], u8[256,1024]) {
      %q.0 = u8[64,1024]{1,0:T(8,128)(4,1)S(1)} parameter(0)
      %q.1 = u8[256,1024]{1,0:T(8,128)(4,1)} parameter(1)
      %q.2 = f32[16,128]{1,0:T(8,128)} parameter(2)
      %cos = f32[16,128]{1,0:T(8,128)} cosine(%q.2)
      %g = u8[256,1024]{1,0:T(8,128)(4,1)} all-gather(%q.0), channel_id=9, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
      ROOT %t = (f32[16,128]{1,0:T(8,128)}, u8[64,1024]{1,0:T(8,128)(4,1)S(1)}, u8[256,1024]{1,0:T(8,128)(4,1)}) \
tuple(%cos, %q.0, %g)
    }

    %done (r.0: u8[64,1024], r.1: u8[256,1024]) -> u8[256,1024] {
      %r.0 = u8[64,1024]{1,0:T(8,128)(4,1)S(1)} parameter(0)
      %r.1 = u8[256,1024]{1,0:T(8,128)(4,1)} parameter(1)
      %g = u8[256,1024]{1,0:T(8,128)(4,1)} all-gather(%r.0), channel_id=9, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
      ROOT %c = u8[256,1024]{1,0:T(8,128)(4,1)} custom-call(%r.0, %r.1, %g), custom_call_target="AsyncCollectiveDone"
    }
"""


def test_a_gather_that_goes_on_beside_a_product_is_one_gather():
    """A TPU's compiler writes it in the fusion that begins it, in each that goes on meanwhile, and in the one that ends it."""
    tuple_type = "(u8[256,1024]{1,0:T(8,128)(4,1)}, u8[64,1024]{1,0:T(8,128)(4,1)S(1)}, u8[256,1024]{1,0:T(8,128)(4,1)})"
    beside_type = "(f32[16,128]{1,0:T(8,128)}, u8[64,1024]{1,0:T(8,128)(4,1)S(1)}, u8[256,1024]{1,0:T(8,128)(4,1)})"
    tpu = program(
        f"""
        %w = u8[64,1024]{{1,0:T(8,128)(4,1)S(1)}} parameter(0)
        %buffer = u8[256,1024]{{1,0:T(8,128)(4,1)}} parameter(1)
        %x = f32[16,128]{{1,0:T(8,128)}} parameter(2)
        %start = {tuple_type} fusion(%w, %buffer), kind=kCustom, calls=%started
        %a = u8[64,1024]{{1,0:T(8,128)(4,1)S(1)}} get-tuple-element(%start), index=1
        %b = u8[256,1024]{{1,0:T(8,128)(4,1)}} get-tuple-element(%start), index=2
        %product = {beside_type} fusion(%a, %b, %x), kind=kOutput, calls=%beside
        %c = u8[64,1024]{{1,0:T(8,128)(4,1)S(1)}} get-tuple-element(%product), index=1
        %d = u8[256,1024]{{1,0:T(8,128)(4,1)}} get-tuple-element(%product), index=2
        ROOT %end = u8[256,1024]{{1,0:T(8,128)(4,1)}} fusion(%c, %d), kind=kCustom, calls=%done
        """,
        TPU_GATHER,
    )
    assert only(tpu.collectives()) == Collective("all-gather", "u8", 4, 1, 3 * 64 * KIB)
    assert tpu.traffic() == 2 * 8 * KIB + 256 * KIB  # the product's, and the gathered array once


def test_what_lies_in_vector_memory_is_not_in_the_main_memory():
    tpu = program("""
        %x = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
        %y = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
        ROOT %z = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(1)} add(%x, %y)
    """)
    assert tpu.traffic() == 8 * KIB


def test_a_slice_that_is_fetched_ahead_moves_the_slice():
    tpu = program("""
        %stack = f32[80,8,128]{2,1,0:T(8,128)} parameter(0)
        %start = ((f32[80,8,128]{2,1,0:T(8,128)}), f32[1,8,128]{2,1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
slice-start(%stack), slice={[3:4], [0:8], [0:128]}
        ROOT %done = f32[1,8,128]{2,1,0:T(8,128)S(1)} slice-done(%start)
    """)
    assert 4 * KIB <= tpu.traffic() <= 4 * KIB + 4


def test_a_slice_taken_by_a_fusion_within_a_fusion_counts_as_a_slice():
    nested = program(
        """
        %stack = f32[80,1024]{1,0} parameter(0)
        %i = s32[] parameter(1)
        ROOT %f = f32[1,1024]{1,0} fusion(%stack, %i), kind=kLoop, calls=%outer
        """,
        """
        %inner (a: f32[80,1024], b: s32[]) -> f32[1,1024] {
          %a = f32[80,1024]{1,0} parameter(0)
          %b = s32[] parameter(1)
          %zero = s32[] constant(0)
          ROOT %s = f32[1,1024]{1,0} dynamic-slice(%a, %b, %zero), dynamic_slice_sizes={1,1024}
        }

        %outer (c: f32[80,1024], d: s32[]) -> f32[1,1024] {
          %c = f32[80,1024]{1,0} parameter(0)
          %d = s32[] parameter(1)
          %n = f32[1,1024]{1,0} fusion(%c, %d), kind=kLoop, calls=%inner
          ROOT %e = f32[1,1024]{1,0} exponential(%n)
        }
        """,
    )
    assert nested.traffic() == 2 * 4 * KIB + 4


def test_what_runs_beside_the_rest_is_counted_once():
    beside = program(
        """
        %x = f32[1024]{0} parameter(0)
        %start = ((f32[1024]{0}), f32[1024]{0}, u32[]) async-start(%x), calls=%wrapped
        ROOT %done = f32[1024]{0} async-done(%start)
        """,
        """
        %wrapped (a: f32[1024]) -> f32[1024] {
          %a = f32[1024]{0} parameter(0)
          ROOT %e = f32[1024]{0} exponential(%a)
        }
        """,
    )
    assert beside.traffic() == 2 * 4 * KIB


def test_the_branches_of_a_choice_count_as_if_taken_equally_often():
    chosen = program(
        """
        %x = f32[1024]{0} parameter(0)
        %i = s32[] parameter(1)
        ROOT %c = f32[1024]{0} conditional(%i, %x, %x), branch_computations={%kept, %doubled}
        """,
        """
        %kept (k: f32[1024]) -> f32[1024] {
          ROOT %k = f32[1024]{0} parameter(0)
        }

        %doubled (d: f32[1024]) -> f32[1024] {
          %d = f32[1024]{0} parameter(0)
          ROOT %s = f32[1024]{0} add(%d, %d)
        }
        """,
    )
    assert chosen.traffic() == 3 * 4 * KIB / 2, "two operands and a result, every other time"


# --- rounds of a loop ------------------------------------------------------------------------------------------------------

LOOP = """
    %body (t: (s32[], f32[1024], s32[])) -> (s32[], f32[1024], s32[]) {
      %t = (s32[], f32[1024]{0}, s32[]) parameter(0)
      %i = s32[] get-tuple-element(%t), index=0
      %x = f32[1024]{0} get-tuple-element(%t), index=1
      %n = s32[] get-tuple-element(%t), index=2
      %y = f32[1024]{0} all-reduce(%x), channel_id=2, replica_groups=[1,2]<=[2], to_apply=%add
      ROOT %r = (s32[], f32[1024]{0}, s32[]) tuple(%i, %y, %n)
    }

    %condition (u: (s32[], f32[1024], s32[])) -> pred[] {
      %u = (s32[], f32[1024]{0}, s32[]) parameter(0)
      %k = s32[] get-tuple-element(%u), index=0
      CONDITION
    }

    %compared (k.0: s32[]) -> pred[] {
      %k.0 = s32[] parameter(0)
      %four = s32[] constant(4)
      ROOT %lt.0 = pred[] compare(%k.0, %four), direction=LT
    }
"""
TO_A_CONSTANT = "%end = s32[] constant(7)\n      ROOT %lt = pred[] compare(%k, %end), direction=LT"
TO_AN_ELEMENT = "%end = s32[] get-tuple-element(%u), index=2\n      ROOT %lt = pred[] compare(%k, %end), direction=LT"


def rounds(condition: str, initial: str = "tuple(%first, %x, %last)", attributes: str = "", while_trips: int = 1) -> int:
    """How often the loop's reduction runs."""
    loop = program(
        f"""
        %x = f32[1024]{{0}} parameter(0)
        %first = s32[] constant(2)
        %eleven = s32[] constant(11)
        %last = s32[] copy(%eleven)
        %t0 = (s32[], f32[1024]{{0}}, s32[]) {initial}
        %w = (s32[], f32[1024]{{0}}, s32[]) while(%t0), condition=%condition, body=%body{attributes}
        ROOT %o = f32[1024]{{0}} get-tuple-element(%w), index=1
        """,
        LOOP.replace("CONDITION", condition),
        while_trips,
    )
    return only(loop.collectives()).times


def test_a_loop_runs_as_often_as_the_compiler_says():
    said = ', backend_config={"known_trip_count":{"n":"80"},"dynamic_variable_tuple_indices":[]}'
    assert rounds(TO_A_CONSTANT, attributes=said) == 80


def test_a_loop_runs_up_to_a_constant_of_its_condition():
    assert rounds(TO_A_CONSTANT) == 7 - 2


def test_a_loop_runs_up_to_an_element_of_the_tuple_it_begins_with():
    assert rounds(TO_AN_ELEMENT) == 11 - 2


def test_a_loop_whose_end_is_computed_runs_as_often_as_the_caller_says():
    assert rounds(TO_AN_ELEMENT, "tuple(%first, %x, %p)", while_trips=32) == 32
    assert rounds(TO_AN_ELEMENT, "opt-barrier(%whole)", while_trips=32) == 32
    assert rounds("ROOT %f = pred[] fusion(%k), kind=kLoop, calls=%compared", while_trips=32) == 32


def test_a_comparison_with_what_is_no_integer_says_nothing_of_the_rounds():
    float_bound = "%end = f32[] constant(1.5)\n      ROOT %lt = pred[] compare(%k, %end), direction=LT"
    assert rounds(float_bound, while_trips=3) == 3


def test_loops_in_loops_multiply():
    inner = LOOP.replace("CONDITION", TO_A_CONSTANT)
    outer = """
    %outer_body (v: (s32[], f32[1024], s32[])) -> (s32[], f32[1024], s32[]) {
      %v = (s32[], f32[1024]{0}, s32[]) parameter(0)
      ROOT %w.1 = (s32[], f32[1024]{0}, s32[]) while(%v), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
    }
    """
    nested = program(
        """
        %t0 = (s32[], f32[1024]{0}, s32[]) parameter(0)
        ROOT %w.0 = (s32[], f32[1024]{0}, s32[]) while(%t0), condition=%condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
        """,
        dedent(inner) + dedent(outer),
    )
    assert only(nested.collectives()) == Collective("all-reduce", "f32", 2, 15, 15 * 4 * KIB)
