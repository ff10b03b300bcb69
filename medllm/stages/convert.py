"""``medllm convert``: a model directory made of another one, its adapters merged, its weights stored in 4 bits, or both."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medllm.engines import load, require_engine
from medllm.errors import UserError
from medllm.host.progress import Progress
from medllm.host.scratch import remove_left, scratch_path
from medllm.model.adapter import merge_adapter
from medllm.quantization import PACKINGS, Quantization
from medllm.run import write_json
from medllm.stages.handover import HandoverCosts, held_rows, measure_handovers


@dataclass(frozen=True)
class ConvertResult:
    """The folder that was written, and what each hand-over costs where that was measured."""

    model: str
    costs: HandoverCosts | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``<out>.handover.json`` holds, where hand-overs were measured."""
        return {"model": self.model, **(asdict(self.costs) if self.costs else {})}


def convert_model(
    model: str,
    out: str,
    adapters: Sequence[str] = (),
    *,
    quantization: Quantization = "none",
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    held_text: str | None = None,
    text_column: str = "text",
    progress: Progress = lambda done, total, doing="": None,
) -> ConvertResult:
    """Write ``out`` and return its path, with what each hand-over costs where that was measured.

    Args:
        model: Folder of the unquantized weights.
        out: Folder to write; beside it ``<out>.handover.json``, where hand-overs were measured.
        adapters: PEFT folders to merge, in order.
        quantization: Other than ``none``, the linear kinds are stored as bitsandbytes does (needs JAX).
        dtype: With a quantization, the type of the weights that stay dense.
        held_text: Documents, held out of training, to measure the hand-overs on
            (:func:`medllm.stages.handover.measure_handovers`).
        text_column: Column that holds a document's text.
        progress: Called with (models measured, models in all).

    Raises:
        UserError: there is nothing to do, ``out`` exists, or a folder or the text cannot be used.
    """
    target, packed = Path(out), quantization in PACKINGS
    if target.exists():
        raise UserError(f"{out}: already exists; give another --out, or remove it")
    if not (adapters or packed):
        raise UserError("convert: there is nothing to do; give --adapter to merge one, --quantization to quantize, or both")
    if packed:
        require_engine("jax", f"convert --quantization {quantization}")
    if held_text is not None:
        if not adapters:
            raise UserError("--held_text measures what handing an adapter over costs; give the --adapter")
        rows = held_rows(model, held_text, text_column)  # a text that cannot be read is said before anything is written
    costs = None
    remove_left(target)
    merged = scratch_path(target, "merged") if packed else target
    try:
        if adapters:
            merge_adapter(model, adapters, merged)
        if held_text is not None:
            costs = measure_handovers(model, adapters, merged, rows, quantization, progress)
        if packed:
            load("jax", "weights").write_quantized(merged if adapters else model, target, quantization, dtype)
    finally:
        if packed:
            shutil.rmtree(merged, ignore_errors=True)
    result = ConvertResult(out, costs)
    if costs:
        write_json(Path(f"{out}.handover.json"), result.to_json())
    return result
