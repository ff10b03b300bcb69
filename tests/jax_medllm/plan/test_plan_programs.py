"""The planner against programs that really run, on eight forced devices in one child process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.forced_devices import found_on_eight

GIB = 2**30


@pytest.fixture(scope="module")
def eight() -> dict[str, Any]:
    """What :mod:`tests.plan_on_eight_devices` found."""
    return found_on_eight("tests.plan_on_eight_devices")


ROUNDS = 5


@pytest.mark.parametrize(
    ("name", "kind", "devices", "times", "sent"),
    [
        ("all-gather", "all-gather", 4, 1, 3 * 16 * 32 * 4),
        ("two all-gathers", "all-gather", 4, 2, 2 * 3 * 16 * 32 * 4),
        ("reduce-scatter", "reduce-scatter", 4, 1, 3 / 4 * 8 * 6 * 4),
        ("all-reduce", "all-reduce", 2, 1, 2 * 1 / 2 * 24 * 4),
        ("all-to-all", "all-to-all", 4, 1, 3 / 4 * 8 * 8 * 4),
        ("collective-permute", "collective-permute", 2, 1, 10 * 4),
    ],
)
def test_what_a_device_sends_in_the_rounds_of_a_loop(eight, name, kind, devices, times, sent):
    """Over a ring: a gather passes on the pieces of the others, a scatter and an all-to-all keep their own, a reduction is a
    scatter and a gather."""
    expected = {"kind": kind, "dtype": "f32", "devices": devices, "times": ROUNDS * times, "bytes": ROUNDS * sent}
    assert eight[name] == [expected]


MESHES = ("", "data=2,fsdp=2,tensor=2")


def kinds(eight: dict[str, Any], mesh: str, program: str) -> dict[str, int]:
    """Bytes by kind, as planned."""
    (found,) = (one for one in eight["memory"][mesh]["planned"]["programs"] if one["name"] == program)
    return {kind: round(gib * GIB) for kind, gib in found["by_kind"].items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_arrays_take_the_memory_that_the_engines_own_take(eight, mesh):
    planned, ran = kinds(eight, mesh, "gradients"), eight["memory"][mesh]["ran"]
    assert planned["base"] == ran["base"] > 0
    assert planned["adapters"] == ran["adapters"] > 0  # once: the step takes the memory of the model's own
    assert planned["moments"] == ran["moments"] > 0
    assert planned["batch"] == ran["batch"] > 0


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_else_is_alive_when_a_step_begins(eight, mesh):
    planned, ran = kinds(eight, mesh, "gradients"), eight["memory"][mesh]["ran"]
    held = sum(planned[kind] for kind in ("base", "adapters", "moments", "batch"))
    assert 0 <= ran["alive"] - held < 128  # counters


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("program", ["gradients", "update"])
def test_the_step_that_ran_was_compiled_with_the_memory_that_was_planned(eight, mesh, program):
    arguments, temporaries, output = eight["memory"][mesh]["ran"][program]
    (planned,) = (one for one in eight["memory"][mesh]["planned"]["programs"] if one["name"] == program)
    assert round(planned["arguments_gib"] * GIB) == arguments
    assert round(planned["temporaries_gib"] * GIB) == temporaries
    if program == "gradients":
        assert round(planned["output_gib"] * GIB) == output
    else:  # adapters and moments are updated where they lie
        ran = eight["memory"][mesh]["ran"]
        assert round(planned["output_gib"] * GIB) == output - ran["adapters"] - ran["moments"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_plan_is_of_the_program_that_needs_most(eight, mesh):
    planned = eight["memory"][mesh]["planned"]
    assert sum(planned["by_kind"].values()) == max(sum(one["by_kind"].values()) for one in planned["programs"])
