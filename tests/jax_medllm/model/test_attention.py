"""Attention: XLA's and cuDNN's values and gradients against float64, what they cost, and which backend is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jax_medllm.model.attention import Visibility, attend, backend_for, cudnn, using, xla
from jax_medllm.plan.flops import matrix_flops
from medllm.errors import UserError
from tests.attention_on_devices import CASES
from tests.dense_attention import case, computed, expected, far_apart, in_pieces
from tests.forced_devices import found_on_eight

TILES = [
    pytest.param(96, xla.Tile(16, 16), id="whole tiles"),
    pytest.param(101, xla.Tile(16, 32), id="tiles that do not divide"),
    pytest.param(101, xla.Tile(32, 16), id="more queries than keys"),
    pytest.param(17, xla.Tile(16, 16), id="a token too many"),
    pytest.param(16, xla.Tile(16, 16), id="one tile"),
    pytest.param(101, xla.Tile(32, None), id="all keys at once"),
    pytest.param(300, None, id="the tile of a short row"),
]


@pytest.mark.parametrize("groups", [False, True], ids=["packed", "groups"])
@pytest.mark.parametrize(("length", "tile"), TILES)
def test_tiles_equal_the_dense_computation_in_float64(length, tile, groups):
    given = case(length, heads=6, kv_heads=2, width=16, groups=groups)
    with jax.enable_x64(True):
        found = computed(lambda *inputs: xla.attend(*inputs, tile=tile), given, "float64")
    assert max(far_apart(found, expected(given)).values()) < 1e-13


def test_fp32_is_fp32_and_bf16_accumulates_in_fp32():
    given = case(150, heads=4, kv_heads=2, width=16, groups=True)
    truth = expected(given)
    assert max(far_apart(computed(xla.attend, given, "float32"), truth).values()) < 2e-6
    assert max(far_apart(computed(xla.attend, given, "bfloat16"), truth).values()) < 2e-2


@pytest.mark.parametrize("groups", [False, True], ids=["packed", "groups"])
@pytest.mark.parametrize(("length", "pieces"), [(768, 2), (768, 12), (100, 4), (40, 40)])
def test_pieces_of_a_row_equal_the_dense_computation_in_float64(length, pieces, groups):
    given = case(length, heads=4, kv_heads=2, width=8, groups=groups)
    with jax.enable_x64(True):
        found = computed(
            in_pieces(lambda *inputs: xla.attend(*inputs, tile=xla.Tile(32, 32)), length, pieces), given, "float64"
        )
    assert max(far_apart(found, expected(given)).values()) < 1e-13


@pytest.fixture(scope="module")
def on_devices():
    """What :mod:`tests.attention_on_devices` found on eight devices."""
    return found_on_eight("tests.attention_on_devices")


@pytest.mark.parametrize("key", CASES, ids=lambda key: " ".join(map(str, key)))
def test_rows_over_several_devices_equal_the_dense_computation_in_float64(on_devices, key):
    mesh, rules, length = key
    assert on_devices[f"{mesh} {rules} {length}"] < 1e-13


@pytest.mark.parametrize("pieces", [2, 8, 16])
def test_a_piece_is_computed_with_hardly_more_keys_than_come_before_it(pieces):
    """Of ``n`` pieces that see 1, 2, … n pieces each, (n + 1) / 2n of the square; in eighths where there are more."""
    length = 2048

    def run(q, k, v, first):
        return xla.attend(q, k, v, Visibility(jnp.ones((1, length), jnp.int32), None, first))

    q, k = (jnp.zeros((1, size, 2, 8)) for size in (length // pieces, length))
    flops = matrix_flops(jax.make_jaxpr(run)(q, k, k, jnp.int32(0)))
    steps = min(pieces, 8)
    assert flops * pieces == 2 * 2 * 2 * 8 * length**2 * (steps + 1) // (2 * steps)


def compiled_gradient(length: int) -> jax.stages.Compiled:
    """A forward and backward pass of one row."""

    def loss(q, k, v, segments):
        return xla.attend(q, k, v, Visibility(segments)).sum()

    shapes = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (4, 2, 2)]
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()


def test_memory_grows_with_the_row_and_not_with_its_square_and_the_program_does_not_grow():
    short, long = compiled_gradient(2048), compiled_gradient(32768)
    assert long.memory_analysis().temp_size_in_bytes < 18 * short.memory_analysis().temp_size_in_bytes
    assert long.memory_analysis().temp_size_in_bytes < 4 * 32768**2 * 4 / 16, "a part of one array of all scores"
    assert len(long.as_text()) < 1.2 * len(short.as_text())


def queries(dtype: str = "bfloat16", width: int = 128) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, 64, 8, width), dtype)


class Device:
    """What is known of a device that a mesh names."""

    def __init__(self, platform: str, device_kind: str, **known: str):
        self.platform, self.device_kind = platform, device_kind
        for name, value in known.items():
            setattr(self, name, value)


H200 = Device("gpu", "NVIDIA H200", compute_capability="9.0")
TURING = Device("gpu", "NVIDIA GeForce RTX 2080 Ti", compute_capability="7.5")
TAKEN = [
    (Device("tpu", "TPU v6 lite"), queries(), "pallas"),
    (Device("tpu", "TPU v6 lite"), queries("float32"), "pallas"),
    (Device("tpu", "TPU v6 lite"), queries("float64"), "xla"),
    (H200, queries(), "cudnn"),
    (H200, queries("float16"), "cudnn"),
    (H200, queries("float32"), "xla"),
    (H200, queries(width=256), "xla"),
    (H200, queries(width=68), "xla"),
    (TURING, queries(), "xla"),
    (Device("gpu", "AMD Instinct MI300X"), queries(), "xla"),
    (Device("cpu", "cpu"), queries(), "xla"),
]


@pytest.mark.parametrize(("device", "q", "backend"), TAKEN, ids=lambda value: getattr(value, "device_kind", str(value)))
def test_the_backend_is_the_fastest_one_that_the_device_and_the_type_allow(monkeypatch, device, q, backend):
    with jax.enable_x64(True):
        q = queries(str(q.dtype), q.shape[-1])
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert backend_for(q) == backend


def test_a_mesh_decides_for_devices_that_are_not_there():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    assert backend_for(queries()) == "xla"
    with jax.sharding.use_abstract_mesh(mesh):
        assert backend_for(queries()) == "pallas"


def test_a_compiled_function_knows_the_backend_it_was_traced_with():
    taken = []

    @jax.jit
    def traced(q):
        taken.append(backend_for(q))
        return q

    for backend in ("xla", "cudnn", "pallas", "xla", "cudnn", "pallas"):
        with using(backend):
            traced(jnp.zeros((2, 64, 8, 128), jnp.bfloat16))
    assert taken == ["xla", "cudnn", "pallas"]


def test_a_backend_that_cannot_says_why_and_an_unknown_one_is_named():
    with using("cudnn"), pytest.raises(UserError, match=r"cudnn was asked for and cannot: .* not in float32"):
        backend_for(queries("float32"))
    with pytest.raises(UserError, match="no attention backend is called 'flash'; there are xla, cudnn, pallas"):
        using("flash")


@pytest.mark.parametrize("length", [64, 63], ids=["even rows", "odd rows"])
def test_cudnn_is_called_forward_and_backward_when_lowered_for_cuda(monkeypatch, length):
    """Without a GPU there is no cuDNN to ask for its version; what it computes is tested where there is one."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    rows = jax.ShapeDtypeStruct((2, length), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((2, length, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k, v, segments, parents):
        return attend(q, k, v, Visibility(segments, parents)).astype(jnp.float32).sum()

    with using("cudnn"):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, rows, rows).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert lowered.count("custom_call @__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert lowered.count("CAUSAL") == 2


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on an NVIDIA GPU alone; none is here")
@pytest.mark.parametrize("groups", [False, True], ids=["packed", "groups"])
@pytest.mark.parametrize("length", [256, 255])
def test_cudnn_is_no_further_from_float64_than_xla_in_bf16(length, groups):
    given = case(length, heads=8, kv_heads=2, width=64, groups=groups)
    truth = expected(given)
    found = far_apart(computed(cudnn.attend, given, "bfloat16"), truth)
    allowed = far_apart(computed(xla.attend, given, "bfloat16"), truth)
    assert all(found[name] < 1.5 * allowed[name] for name in found)
