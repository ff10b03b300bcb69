"""A step over a mesh as a compiler cuts it: the right one passes, and a reduction left out or made twice is named."""

import json
import re
import subprocess
import sys

import pytest

from jax_medllm.plan.partitioned import for_replicas
from medllm.cli import main
from medllm.plan.mesh_check import DUMPED, TOLERANCE, narrowed
from medllm.plan.planning import compiling_environment
from medllm.plan.targets import Target
from medllm.published import PUBLISHED
from tests.forced_devices import NOT_OPTIMIZED


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A CPT step over three axes, as it is and with four of its reductions changed."""
    folder = tmp_path_factory.mktemp("partitioned")
    variables = compiling_environment(Target.parse("cpu:8"), folder)
    variables |= {"XLA_FLAGS": f"{variables['XLA_FLAGS']} {NOT_OPTIMIZED}", DUMPED: str(folder)}
    command = [sys.executable, "-m", "tests.mesh_faults", "cpt", "data=2,fsdp=2,tensor=2", "4"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def off(results):
    return [one["name"] for one in results if max(one["error"], one["apart"]) > TOLERANCE]


def test_groups_are_written_out_in_their_order():
    mesh = "replica_groups=mesh['a'=2,'b'=4] "
    assert for_replicas(mesh + "{'b'}") == "replica_groups={{0,1,2,3},{4,5,6,7}}"
    assert for_replicas(mesh + "{'a'}") == "replica_groups={{0,4},{1,5},{2,6},{3,7}}"
    assert for_replicas(mesh + "{'b','a'}") == "replica_groups={{0,4,1,5,2,6,3,7}}"
    assert for_replicas(mesh + "{'b':(1)2}") == "replica_groups={{0,2},{1,3},{4,6},{5,7}}"
    assert for_replicas(mesh + "{'b':(2)2}") == "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    turned = "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}"
    assert for_replicas(turned) == "replica_groups={{0,2},{1,3}}"
    assert for_replicas("replica_groups=[2,4]<=[4,2]T(1,0)") == "replica_groups={{0,2,4,6},{1,3,5,7}}"


def test_a_program_of_partitions_becomes_one_of_replicas():
    groups = "replica_groups={{0,1}}"
    line = f"  %a = f32[2,3]{{1,0:T(8,128)}} all-reduce(%b), channel_id=3, {groups}, use_global_device_ids=true, to_apply=%add"
    assert for_replicas(line) == f"  %a = f32[2,3] all-reduce(%b), {groups}, to_apply=%add"
    assert for_replicas("%p = u32[] partition-id(), sharding={devices=[2,1]<=[2]}") == "%p = u32[] replica-id()"


@pytest.mark.slow
def test_every_gradient_moment_and_parameter_over_a_mesh_is_that_of_one_device(planted):
    honest = planted["found"][0]["results"]
    assert off(honest) == []
    names = {(one["program"], one["name"].split(".")[-4]) for one in honest if ".lora." in one["name"]}
    assert len(names) == 2 * 7, "of both programs, every projection"
    assert max(one["error"] for one in honest) < TOLERANCE / 20


@pytest.mark.slow
def test_a_reduction_left_out_or_made_twice_is_named(planted):
    assert planted["reductions"] > 20
    kinds = [one["planted"].partition(":")[0] for one in planted["found"]]
    assert kinds == ["nothing", "without", "twice", "without", "twice"]
    for one in planted["found"][1:]:
        assert off(one["results"]), one["planted"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_narrow_model_has_the_heads_and_the_factors_of_two_of_the_model(name):
    model, narrow = PUBLISHED[name], narrowed(PUBLISHED[name])
    assert (narrow.family, narrow.num_heads, narrow.num_kv_heads) == (model.family, model.num_heads, model.num_kv_heads)
    assert narrow.biased == model.biased
    for size in ("hidden_size", "intermediate_size", "vocab_size"):
        for devices in (2, 4, 8, 16, 32, 64, 128):
            assert (getattr(narrow, size) % devices == 0) == (getattr(model, size) % devices == 0), (size, devices)
    assert narrow.parameters < 5e7


def test_what_cannot_be_verified_is_refused_in_a_line(capsys):
    words = ["verify-mesh", "--model", "qwen2.5-72b", "--target", "cpu:4"]
    assert main([*words, "--mesh", "tensor=3"]) == 2
    assert "its sizes multiply to 3, and there are 4 devices" in capsys.readouterr().err
    assert main([*words[:3], "--target", "v7:8"]) == 2
    assert re.search(r"no device is called 'v7'", capsys.readouterr().err)
