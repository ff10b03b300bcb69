"""The same numbers over every mesh, from programs that move packed weights and nothing they need not."""

from __future__ import annotations

from collections import defaultdict

import jax
import numpy as np
import pytest

from jax_medllm.mesh.layout import Layout, entry
from medllm.axes import MESH_AXES, RULES, Axis
from medllm.errors import UserError
from tests.forced_devices import found_on_eight
from tests.sharded_traffic import Traffic
from tests.sharded_training import FEW, MESHES, STEPS


class FakeDevice:
    """Stands for a device in a mesh on which nothing runs."""

    platform = device_kind = "fake"
    process_index = 0

    def __init__(self, number: int):
        self.id = number


def layout(mesh: str, rules: str = "", devices: int = 8) -> Layout:
    return Layout.of(mesh, rules, devices=[FakeDevice(i) for i in range(devices)])


class FakeChip(FakeDevice):
    """Stands for a chip of a TPU, with its place."""

    platform, device_kind = "tpu", "TPU v5 lite"
    slice_index = core_on_chip = 0

    def __init__(self, number: int, coords: tuple[int, int]):
        super().__init__(number)
        self.coords = [*coords, 0]


@pytest.mark.parametrize("mesh", ["fsdp=16", "data=4,fsdp=4", "fsdp=4,tensor=4", "fsdp=8,tensor=2", "data=2,fsdp=4,tensor=2"])
def test_chips_of_a_tpu_are_neighbours_along_the_innermost_axis(mesh):
    chips = [FakeChip(i, (x, y)) for i, (y, x) in enumerate(np.ndindex(4, 4))]
    found = Layout.of(mesh, devices=chips).mesh.devices
    assert sorted(chip.id for chip in found.flat) == list(range(16))
    for group in found.reshape(-1, found.shape[-1]):
        places = np.array([chip.coords for chip in group])
        assert (np.abs(np.diff(places, axis=0)).sum(1) == 1).all()


@pytest.fixture(scope="module")
def trained():
    """Every step over its meshes, in one process of eight devices."""
    return found_on_eight("tests.sharded_training")


@pytest.fixture(scope="module")
def packed(trained):
    """A CPT step on NF4 weights over every mesh."""
    return trained["cpt nf4"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_cpt_step_on_packed_weights_equals_one_device(packed, mesh):
    assert packed[mesh]["loss"] < 1e-5
    assert packed[mesh]["gradient"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [step for step in STEPS if step != ("cpt", "nf4")])
def test_other_steps_equal_one_device(trained, stage, kind):
    found = trained[f"{stage} {kind}"]
    assert set(found) == set(FEW)
    for mesh in FEW:
        assert found[mesh]["loss"] < 1e-5, mesh
        assert found[mesh]["gradient"] < 1e-5, mesh


WEIGHTS = {(128, 128), (64, 128), (192, 128), (128, 192)}
"""Shapes of the dense weights: q and o, k and v, gate and up, down."""


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4", "sequence=8", "sequence=2,fsdp=4"])
def test_weights_travel_packed(packed, mesh):
    gathers = {(dtype, tuple(shape[-2:])) for kind, dtype, shape in packed[mesh]["collectives"] if kind == "all-gather"}
    halves = {(out, width // 2) for out, width in WEIGHTS}
    assert {("u8", half) for half in halves} <= gathers
    dense = {(dtype, shape) for dtype, shape in gathers if dtype != "u8" and shape in WEIGHTS | halves}
    assert not dense, "a dequantized weight is gathered"


MATRICES = {(4, 128), (4, 192), (64, 4), (128, 4), (192, 4)}
"""Shapes of the LoRA matrices."""


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ("data=8", {"all-reduce": set()}),
        ("fsdp=8", {"all-reduce": {(8, 1, 32), (8, 1, 32, 1), (8, 1, 32, 128)}, "all-gather": {(8, 1, 32), (8, 1, 32, 128)}}),
    ],
)
def test_nothing_else_moves_than_adapters_and_the_chunk_at_the_head(packed, mesh, expected):
    """Of floats: adapters' gradients are added up and their matrices gathered; rows meet at the head, which is spread."""
    found = {kind: set() for kind in expected}
    for kind, dtype, shape in packed[mesh]["collectives"]:
        if dtype == "f32" and kind in expected and shape and tuple(shape[-2:]) not in MATRICES:
            found[kind].add(tuple(shape))
    assert found == expected


SMALLEST = 4 * 64 * 128
"""Bytes of the smallest dense weight in fp32."""


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if "@" not in mesh])
def test_what_travels_is_what_has_to(packed, mesh):
    """Bytes that a device sends in a CPT step, by kind: a gather that slips in shows here."""
    found = defaultdict(int)
    for kind, dtype, _, size in packed[mesh]["sent"]:
        if dtype != "s32":  # tokens and places
            found[f"{kind} {dtype}"] += size
    expected = Traffic.over(mesh)
    assert found.pop("all-gather u8", 0) == expected.gathered_codes()
    assert found.pop("all-gather f32", 0) == expected.gathered_floats()
    assert found.pop("reduce-scatter f32", 0) == expected.scattered()
    assert found.pop("all-to-all f32", 0) == expected.exchanged()
    least, most = expected.reduced()
    assert least <= found.pop("all-reduce f32", 0) <= most
    # Where ``tensor`` cuts a block or an adapter otherwise than it is stored, a few of their numbers change places.
    reordered = found.pop("collective-permute f32", 0) - expected.permuted()
    assert 0 <= reordered < SMALLEST if "tensor" in mesh else reordered == 0
    assert not found


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(layout("fsdp=-1,tensor=2").mesh.shape) == {"fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "rules", "said"),
    [
        ("fsdp=8,model=2", "", r"no mesh axis is called 'model'; there are data, fsdp, tensor, sequence"),
        ("fsdp=4", "", r"multiply to 4, and there are 8 devices"),
        ("fsdp=3,tensor=-1", "", r"multiply to 3, and there are 8 devices"),
        ("fsdp=-1,data=-1", "", r"only one axis can be -1"),
        ("fsdp=4,fsdp=2", "", r"fsdp comes twice"),
        ("fsdp=lots", "", r"fsdp is 'lots'; a number of devices is needed"),
        ("fsdp=0", "", r"fsdp is '0'; a number of devices is needed"),
        ("fsdp=8", "width=fsdp", r"no logical axis is called 'width'; there are batch, sequence, heads"),
        ("fsdp=8", "mlp=model", r"mlp is spread over 'model'; name mesh axes"),
        ("fsdp=8", "mlp", r"mlp is spread over ''; name mesh axes"),
        ("fsdp=8", "mlp=fsdp+fsdp", r"mlp names a mesh axis twice"),
    ],
)
def test_a_layout_that_makes_no_sense_is_one_clear_line(mesh, rules, said):
    with pytest.raises(UserError, match=said) as raised:
        layout(mesh, rules)
    assert "\n" not in str(raised.value)


def test_two_axes_of_an_array_over_one_mesh_axis_are_an_error():
    asked = layout("fsdp=8", "embed_in=fsdp")
    with pytest.raises(UserError, match=r"mlp.up_proj.weight: its axes mlp and embed_in are both spread over the mesh axis"):
        asked.stored([Axis("mlp", 192), Axis("embed_in", 128)], "mlp.up_proj.weight")


def test_an_axis_that_does_not_divide_is_an_error_with_what_would():
    with pytest.raises(UserError, match=r"w: its axis mlp of 100 does not divide over fsdp=8; it would over 1, 2, 4, 5, 10;"):
        layout("fsdp=8").stored([Axis("mlp", 100)], "w")
    with pytest.raises(UserError, match=r"w: its axis kv_heads of 4 heads does not divide over tensor=8; it would over 1, 2"):
        layout("tensor=8").stored([Axis("kv_heads", 64, parts=4)], "w")


def test_heads_are_cut_where_they_are_stored_and_not_where_they_are_used():
    axes = [Axis("kv_heads", 64, parts=4), Axis("embed_in", 128)]
    asked = layout("fsdp=4,tensor=2")
    assert [entry(part) for part in asked.stored(axes)] == [("tensor", "fsdp"), ()]
    assert [entry(part) for part in asked.used(axes)] == [("tensor",), ()]


def test_an_axis_that_may_stay_whole_is_spread_as_far_as_it_divides():
    axis = Axis("adapter", 6, may_stay_whole=True)
    assert entry(layout("tensor=2,fsdp=4").stored([axis])[0]) == ("tensor",)
    assert entry(layout("fsdp=8").stored([axis])[0]) == ()


def test_rules_name_mesh_axes_that_exist():
    assert {axis for over in RULES.values() for axis in over} <= set(MESH_AXES)


def test_without_a_layout_nothing_is_laid_out():
    from jax_medllm.mesh.layout import constrain, gathered, place_rows

    x = np.zeros((2, 3))
    assert constrain(x, "batch", None) is x
    assert gathered(x, [Axis("mlp", 2), Axis("embed_in", 3)]) is x
    assert isinstance(place_rows({"a": x})["a"], jax.Array)
