"""What can go wrong on a device before anything is measured there: the reference engine's half of ``scripts/gpu_bench.sh``'s
pre-flight. A weight that bitsandbytes quantizes on the device is left in a file for the JAX engine to be held against."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import torch
from bitsandbytes import functional as bnb

from medllm.host.child import serve
from medllm.model.directory import write_model
from torch_ref.device_bench import cpt, device

_SHAPE = (128, 512)
_ROWS = 16


def check(*, shape: dict[str, Any], smoke: bool, nf4: str | None = None) -> dict[str, Any]:
    """One tiny training step, and a weight in NF4 with its product, in the folder ``nf4``."""
    found = cpt(shape=shape, seconds=0.0, smoke=smoke)
    if nf4 is not None:
        leave_nf4(nf4)
    versions = {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "peft", "trl")}
    return {"loss": found["loss"], "tried": found["tried"], "versions": versions}


def leave_nf4(folder: str) -> None:
    """Quantize a random bf16 weight on the device and write it as bitsandbytes does (``packed``), with the weight that was
    quantized, the one that it stands for, and a product with that."""
    where = device()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SHAPE, generator=generator).to(torch.bfloat16)
    x = torch.randn((_ROWS, _SHAPE[1]), generator=generator).to(torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight.to(where), blocksize=64, compress_statistics=True, quant_type="nf4")
    dense = bnb.dequantize_4bit(packed, state)
    tensors = {
        "packed": packed,
        **{f"packed.{name}": part for name, part in state.as_dict(packed=True).items()},
        "weight": weight.float(),
        "dequantized": dense.float(),
        "x": x.float(),
        "product": (x.to(where) @ dense.T).double(),
    }
    write_model(folder, {"device": where.type}, ((name, tensor.cpu().numpy()) for name, tensor in tensors.items()))


if __name__ == "__main__":
    sys.exit(serve({"check": check}, sys.argv[1:]))
