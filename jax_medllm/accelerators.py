"""Plugins of JAX for accelerators that this machine does not have, such as the compilers of ``medllm plan``.

JAX loads every plugin that is installed before it looks for devices, and a plugin that finds none says so in a page of errors.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_CUDA = ("jax_cuda12_plugin", "jax_plugins.xla_cuda12")
_GPU_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")
"""Where JAX sees that there is a NVIDIA GPU (``jax._src.hardware_utils``); it uses none without one of them."""
_GOOGLE = "0x1ae0"


def leave_out_absent(root: Path = Path("/")) -> None:
    """What belongs to an accelerator that is not here is not loaded. To be called before JAX is imported.

    A CUDA plugin that comes with NVIDIA's libraries was installed for a GPU, and what it says of the missing one is heard;
    likewise where a variable of JAX asks for it.

    Args:
        root: Of the machine's file system.
    """
    if "jax" in sys.modules:
        return
    asked = os.environ.get("JAX_PLATFORMS", "")
    wanted = "cuda" in asked or "gpu" in asked or "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" in os.environ
    if not (wanted or _spec("nvidia.cudnn") or any((root / file).exists() for file in _GPU_FILES)):
        for name in _CUDA:
            _leave_out(name, initialize=lambda: None)
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    if not (asked or "JAX_FORCE_TPU_INIT" in os.environ or any(file.read_text().strip() == _GOOGLE for file in vendors)):
        _leave_out("libtpu", get_library_path=lambda: None)


def _leave_out(name: str, **members: Any) -> None:
    """An empty module in place of ``name``; that it is installed can still be found out."""
    if (spec := _spec(name)) is not None:
        stub = ModuleType(name)
        stub.__spec__ = spec
        vars(stub).update(members)
        sys.modules[name] = stub


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # what it is a part of is missing
        return None
