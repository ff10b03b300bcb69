"""Which of the engine's own settings (:class:`medllm.config.TorchConfig`) can be had on this machine, said before any work.

Left to themselves the libraries look for a missing kernel on the Hub, or fail in the middle of a traceback.
"""

from __future__ import annotations

import importlib.util

import torch

from medllm.config import ModelConfig, TorchConfig
from medllm.errors import UserError

_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn", 8),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3", 9),
}
"""The module, the package that has it, and the oldest generation of NVIDIA GPUs (8 Ampere, 9 Hopper)."""


def check_switches(switches: TorchConfig, model: ModelConfig) -> None:
    """Refuse what lacks its package, its GPU or its type.

    Raises:
        UserError: a switch cannot be had for ``model`` on this machine.
    """
    if switches.attention in _FLASH:
        module, package, generation = _FLASH[switches.attention]
        setting = f"--torch.attention is '{switches.attention}'"
        _require_gpu(setting, generation, "give 'sdpa'")
        _require_package(setting, module, package)
        if model.dtype != "bfloat16":
            raise UserError(f"{setting}, which computes in bf16 only, and --model.dtype is '{model.dtype}'; give 'bfloat16'")
    if switches.liger:
        _require_gpu("--torch.liger is true", 7, "leave it out")
        _require_package("--torch.liger is true", "liger_kernel", "liger-kernel")


def _require_gpu(setting: str, generation: int, otherwise: str) -> None:
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found[0] < generation:
        seen = "torch sees none here" if found is None else f"here it is {found[0]}.{found[1]}"
        raise UserError(f"{setting}: needs an NVIDIA GPU of compute capability {generation}.0 or later, {seen}; {otherwise}")


def _require_package(setting: str, module: str, package: str) -> None:
    if not _installed(module):
        raise UserError(f"{setting}: needs the package '{package}', which is not installed: pip install {package}")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
