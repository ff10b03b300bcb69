"""Budgets of the steps at the width of Qwen2.5-72B, two layers deep, for accelerators that are not there.

A change that makes a step need more memory than its budget, or that moves dense weights between devices, fails here.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from medllm.errors import UserError
from medllm.plan.planning import check_installed, make_plan
from medllm.plan.request import Request, Stage
from medllm.plan.search import least_gib
from medllm.plan.targets import Target
from medllm.published import PUBLISHED

LAYERS = 2
SHALLOW = replace(PUBLISHED["qwen2.5-72b"], num_layers=LAYERS)


class Passes(NamedTuple):
    """What a stage does with each of its tokens.

    Attributes:
        gathers: How often the weights of a layer are gathered.
        adapters: How often its adapters are.
        linear: Passes through the layers, each two operations for a weight.
        head: Products with the output matrix.
        rows: How often the tokens that are predicted come together at the head.
        predicted: Of a row.
    """

    gathers: int
    adapters: int
    linear: int
    head: int
    rows: int
    predicted: int


PASSES: dict[Stage, Passes] = {
    # Forward and back; with what is computed anew three times through the layers. The head: logits, and their direction.
    "cpt": Passes(gathers=2, adapters=2, linear=3, head=2, rows=1, predicted=2047),
    # The reference goes forward besides, without adapters.
    "rpo": Passes(gathers=3, adapters=2, linear=4, head=3, rows=2, predicted=3 * 512),
}
QUICK: tuple[str, Stage] = ("v5e:4x4", "rpo")
"""Compiled without the passes that order a TPU's program anew, to send behind its products: they are most of the time,
and what is sent early lies in memory longer. The other stage is compiled for the same chips as for a user."""
BUDGETS: dict[tuple[str, Stage], float] = {
    ("v5e:4x4", "cpt"): 2.25,
    ("a100-80g:4", "cpt"): 2.90,
    ("a100-80g:2", "rpo"): 4.80,
    QUICK: 2.20,
}
"""GiB of a device: what was measured, rounded up to the next 0.05."""


@pytest.fixture(scope="session")
def plans(tmp_path_factory) -> dict[tuple[str, Stage], dict[str, Any]]:
    """All of them, each compiled in a process of its own."""
    for target, _ in BUDGETS:
        try:
            check_installed(Target.parse(target))
        except UserError as missing:
            pytest.skip(str(missing).replace("[plan]", "[test]"))
    folder = tmp_path_factory.mktemp("wide")
    (folder / "config.json").write_text(json.dumps(SHALLOW.to_hf()))

    def plan(key: tuple[str, Stage]) -> dict[str, Any]:
        return make_plan(Request(str(folder), key[1], key[0])).to_json()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.delenv("XLA_FLAGS", raising=False)  # as for a user, and not as the tests compile what they run
        as_for_a_user = [key for key in BUDGETS if key != QUICK]
        found = dict(zip(as_for_a_user, pool.map(plan, as_for_a_user), strict=True))
        patch.setenv("JAX_OPTIMIZATION_LEVEL", "O1")
        return found | {QUICK: plan(QUICK)}


KEYS = pytest.mark.parametrize("key", BUDGETS, ids=" ".join)


@pytest.mark.slow
@KEYS
def test_a_step_keeps_to_its_memory(plans, key):
    assert plans[key]["fits"]
    assert BUDGETS[key] - 0.05 < plans[key]["gib_per_device"] <= BUDGETS[key]


def gathered(plan: dict[str, Any], *dtypes: str) -> int:
    """Bytes of these types that a device sends in gathers."""
    return sum(one["bytes"] for one in plan["collectives"] if one["kind"] == "all-gather" and one["dtype"] in dtypes)


@KEYS
def test_weights_travel_packed_and_once_a_pass(plans, key):
    """Half a byte a weight, and a byte for each block of 64: the scales of the blocks."""
    plan = plans[key]
    packed = plan["model"]["linear_parameters"] * (1 / 2 + 1 / 64)
    assert gathered(plan, "u8") == PASSES[key[1]].gathers * packed * (plan["devices"] - 1) / plan["devices"]


@KEYS
def test_no_dense_weight_travels(plans, key):
    """Of floats, all in bf16, each device has its part of the adapters sent round, and of the rows that meet at the head."""
    plan, passes = plans[key], PASSES[key[1]]
    width, kv, mlp = 8192, 1024, 29568
    adapters = LAYERS * passes.adapters * 16 * (6 * width + 2 * kv + 3 * (width + mlp))
    rows = plan["devices"] * passes.rows * -(-passes.predicted // 64) * 64 * width  # in chunks
    expected = 2 * (adapters + rows) * (plan["devices"] - 1) / plan["devices"]
    assert gathered(plan, "f64", "f32", "bf16", "f16") == pytest.approx(expected, rel=1e-3)


@KEYS
def test_operations_are_those_of_the_products_with_the_weights(plans, key):
    """Two for each weight and token in each pass. Attention and the adapters are a few per cent more; the last product of a
    layer, which is not computed anew, as much less."""
    plan, passes = plans[key], PASSES[key[1]]
    row = plan["tokens_per_step"] / plan["devices"]
    head = plan["model"]["vocabulary"] * plan["model"]["width"]
    expected = 2 * (passes.linear * plan["model"]["linear_parameters"] * row + passes.head * head * passes.predicted)
    assert plan["flops"] == pytest.approx(expected, rel=0.05)


@KEYS
def test_a_search_would_have_compiled_it(plans, key):
    plan, (target, stage) = plans[key], key
    assert least_gib(Request("qwen2.5-72b", stage, target), plan["mesh"], 1, "layer", SHALLOW) < plan["gib_per_device"]


def test_one_device_attends_as_each_of_two_that_share_the_rows_does():
    """A layout of one device is not in use; attention is still that of the device planned for, not of the one that plans."""
    try:
        check_installed(Target.parse("h100:1"))
    except UserError as missing:
        pytest.skip(str(missing).replace("[plan]", "[test]"))
    work = {"quantization": "bf16", "length": 1024}
    alone, both = (
        make_plan(Request("qwen2.5-0.5b", target=target, mesh=mesh, **work)).to_json()
        for target, mesh in (("h100:1", ""), ("h100:2", "data=2"))
    )
    assert alone["flops"] == both["flops"]
