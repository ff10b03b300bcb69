"""Accelerators that a plan can be made for, and what they are assumed to be capable of.

Rates are the makers' own figures for dense bf16; what a program reaches of them is another matter. Memory is what a program can
have: a GPU's driver and CUDA context, and a TPU's runtime, keep some of what is printed on the box. ``cpu`` is this machine,
cut into devices that share its memory: for trying out a mesh, and for holding a plan against a run.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from medllm.errors import UserError
from medllm.host.memory import physical_bytes


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler is told of a GPU that is not there (``GpuTargetConfigProto``), from CUDA's public device properties.

    Attributes:
        description: CUDA's name of it.
        capability: Compute capability, major version.
        multiprocessors: Of them, ``units`` fp32 units each.
        shared_kib: Shared memory of a multiprocessor; one KiB less is the most that a block can ask for.
        l2_mib: Second-level cache.
        clock_ghz: Boost clock.
        bytes: All of its memory.
    """

    description: str
    capability: int
    multiprocessors: int
    units: int
    shared_kib: int
    l2_mib: int
    clock_ghz: float
    bytes: int

    def textproto(self, memory_bytes: float) -> str:
        """The description, with its memory's rate in bytes a second."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_kib * 1024}
              shared_memory_per_block_optin: {(self.shared_kib - 1) * 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              core_count: {self.multiprocessors} fpus_per_core: {self.units} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {memory_bytes:.0f} l2_cache_size: {self.l2_mib << 20} device_memory_size: {self.bytes}
              cuda_compute_capability {{ major: {self.capability} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.description}"
        """


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: As on the command line.
        kind: Whose compiler.
        memory_gib: Memory a program can have, GiB.
        flops: bf16 matrix products, operations a second.
        memory_bytes: Of its memory, bytes a second.
        link_bytes: To the others of a slice or a node, bytes a second in one direction, all links together.
        source: Where the figures are from.
        dimensions: Of the names of its slices (TPU).
        gpu: What the compiler is told (GPU).
    """

    name: str
    kind: Literal["cuda", "tpu", "cpu"]
    memory_gib: float
    flops: float
    memory_bytes: float
    link_bytes: float
    source: str
    dimensions: int = 0
    gpu: Gpu | None = None


_NVIDIA = "NVIDIA's data sheet (SXM, dense)"
_GOOGLE = "Google Cloud's TPU documentation"
_HOPPER = partial(Gpu, capability=9, multiprocessors=132, units=128, shared_kib=228, l2_mib=50, clock_ghz=1.98)
_AMPERE = partial(Gpu, capability=8, multiprocessors=108, units=64, shared_kib=164, l2_mib=40, clock_ghz=1.41)
_A100_40, _A100_80 = _AMPERE("NVIDIA A100-SXM4-40GB", bytes=42331013120), _AMPERE("NVIDIA A100-SXM4-80GB", bytes=85097775104)
_H100, _H200 = _HOPPER("NVIDIA H100 80GB HBM3", bytes=84978434048), _HOPPER("NVIDIA H200", bytes=150121545728)

DEVICES = {
    device.name: device
    for device in (
        Device("a100-40g", "cuda", 38.5, 312e12, 1.555e12, 300e9, _NVIDIA, gpu=_A100_40),
        Device("a100-80g", "cuda", 78.5, 312e12, 2.039e12, 300e9, _NVIDIA, gpu=_A100_80),
        Device("h100", "cuda", 78.5, 989e12, 3.352e12, 450e9, _NVIDIA, gpu=_H100),
        Device("h200", "cuda", 139.0, 989e12, 4.8e12, 450e9, _NVIDIA, gpu=_H200),
        Device("v4", "tpu", 31.5, 275e12, 1.2e12, 300e9, _GOOGLE, dimensions=3),
        Device("v5e", "tpu", 15.75, 197e12, 0.819e12, 200e9, _GOOGLE, dimensions=2),
        Device("v5p", "tpu", 95.0, 459e12, 2.765e12, 600e9, _GOOGLE, dimensions=3),
        Device("v6e", "tpu", 31.25, 918e12, 1.64e12, 448e9, _GOOGLE, dimensions=2),
        Device("cpu", "cpu", physical_bytes() / 2**30, 1e11, 2e10, 2e10, "round figures for a core or two"),
    )
}


@dataclass(frozen=True)
class Target:
    """Devices of one kind: a node of GPUs, a slice of TPUs by its topology, or parts of this machine."""

    name: str
    device: Device
    topology: str
    count: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """``a100-80g:4`` is four GPUs, ``v5e:4x4`` a slice of sixteen chips; a device by itself is one.

        Raises:
            UserError: no such device, or its size is not written as its kind is.
        """
        name, _, size = text.partition(":")
        if name not in DEVICES:
            near = [known for known in DEVICES if name and known.startswith(name)] or difflib.get_close_matches(
                name, DEVICES, 1
            )
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise UserError(f"--target {text}: no device is called {name!r}{meant}; there are {', '.join(DEVICES)}")
        device = DEVICES[name]
        if device.kind != "tpu":
            if not re.fullmatch(r"[1-9]\d*", size or "1"):
                raise UserError(f"--target {text}: {size!r} is no number of devices; write {name}:4")
            return cls(text, device, f"1x1x{size or 1}", int(size or 1))
        shape = size or "x".join(["1"] * device.dimensions)
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != device.dimensions - 1:
            example = "x".join(["4"] * device.dimensions)
            raise UserError(
                f"--target {text}: {size!r} is no {name} topology; it has {device.dimensions} sizes, as {name}:{example}"
            )
        return cls(text, device, f"{name}:{shape}", math.prod(map(int, shape.split("x"))))

    @property
    def memory_gib(self) -> float:
        """Memory of one device; those a CPU is cut into share what there is."""
        return self.device.memory_gib / (self.count if self.device.kind == "cpu" else 1)

    def to_json(self) -> dict[str, Any]:
        """As the compiling process is told."""
        gpu = self.device.gpu
        description = " ".join(gpu.textproto(self.device.memory_bytes).split()) if gpu else ""
        return {
            "name": self.name,
            "kind": self.device.kind,
            "topology": self.topology,
            "count": self.count,
            "description": description,
        }
