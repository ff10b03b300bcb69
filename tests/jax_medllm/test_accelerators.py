"""Compilers for accelerators that are not here make no command noisy, and stay out of the way of those that are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from jax_medllm.accelerators import leave_out_absent

CUDA = ("jax_cuda12_plugin", "jax_plugins.xla_cuda12")
ASKED = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "JAX_FORCE_TPU_INIT")
AT_HOME = {
    name: value
    for name, value in os.environ.items()
    if name not in (*ASKED, "TF_CPP_MIN_LOG_LEVEL") and not name.startswith("TPU_")  # which libtpu sets for itself
}


@pytest.fixture(autouse=True)
def compilers():
    """Skips where there are none."""
    for name in ("jax_cuda12_plugin", "libtpu"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install -e '.[test]'")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Iterator[Path]:
    """The root of the file system of a machine with no accelerator, on which JAX has not been imported."""
    for name in ASKED:
        monkeypatch.delenv(name, raising=False)
    with patch.dict(sys.modules):
        for name in ("jax", "libtpu", *CUDA):
            sys.modules.pop(name, None)
        yield tmp_path


def add(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(text)


def left_out() -> set[str]:
    """Modules that something else stands for."""
    return {name for name in ("libtpu", *CUDA) if name in sys.modules}


def test_without_an_accelerator_no_plugin_is_loaded_and_all_can_be_found(machine):
    leave_out_absent(machine)
    assert left_out() == {"libtpu", *CUDA}
    assert all(importlib.util.find_spec(name).origin for name in ("libtpu", *CUDA))


@pytest.mark.parametrize("device", ["dev/nvidia0", "dev/nvidiactl", "dev/dxg"])
def test_with_a_gpu_its_plugin_is_left_alone(machine, device):
    add(machine, device)
    leave_out_absent(machine)
    assert left_out() == {"libtpu"}


def test_with_a_tpu_its_library_is_left_alone(machine):
    add(machine, "sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n")
    leave_out_absent(machine)
    assert left_out() == set(CUDA)


def test_another_card_is_no_tpu(machine):
    add(machine, "sys/bus/pci/devices/0000:00:05.0/vendor", "0x8086\n")
    leave_out_absent(machine)
    assert "libtpu" in left_out()


def test_a_plugin_that_comes_with_nvidias_libraries_says_what_it_misses(machine, monkeypatch):
    """It was installed for a GPU: that there is none is news."""
    (machine / "nvidia" / "cudnn").mkdir(parents=True)
    (machine / "nvidia" / "cudnn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(machine))
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        sys.modules.pop(name)
    leave_out_absent(machine)
    assert left_out() == {"libtpu"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("JAX_PLATFORMS", "cuda", set()),
        ("JAX_PLATFORMS", "gpu,cpu", set()),
        ("JAX_PLATFORMS", "tpu", set(CUDA)),
        ("JAX_PLATFORMS", "cpu", set(CUDA)),  # JAX does not ask libtpu then
        ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1", {"libtpu"}),
        ("JAX_FORCE_TPU_INIT", "1", set(CUDA)),
    ],
)
def test_what_a_user_asks_jax_for_is_left_alone(machine, monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    leave_out_absent(machine)
    assert left_out() == expected


def test_once_jax_is_imported_nothing_is_left_out(machine):
    sys.modules["jax"] = sys
    leave_out_absent(machine)
    assert left_out() == set()


@pytest.mark.skipif(
    any(Path(file).exists() for file in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")) or "TPU_NAME" in os.environ,
    reason="this machine has an accelerator",
)
@pytest.mark.parametrize("module", ["jax_medllm.engine", "medllm_parity.audit"])
def test_a_command_that_uses_jax_says_nothing_of_accelerators_that_are_not_here(module):
    code = f"import {module}, jax; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], env=AT_HOME, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize("arguments", [["--version"], ["score", "--problems", "absent", "--predictions", "absent"]])
def test_a_command_that_needs_no_jax_says_nothing_either(arguments):
    command = [sys.executable, "-m", "medllm", *arguments]
    done = subprocess.run(command, env=AT_HOME, capture_output=True, text=True, check=False)
    assert all(line.startswith("medllm: ") for line in done.stderr.splitlines()), done.stderr
