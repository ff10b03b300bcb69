"""``medllm convert``: adapters into their base model, or a model into 4 bits."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.host.progress import progress_bar
from medllm.quantization import Quantization


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=str, required=True, help="base model folder (unquantized)")
    parser.add_argument("--adapter", type=tuple[str, ...], default=(), help="PEFT adapter folder to merge, or several in order")
    parser.add_argument("--out", type=str, required=True, help="folder of the model to write")
    parser.add_argument("--quantization", type=Quantization, default="none", help="how bitsandbytes stores it")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16"], default="bfloat16", help="where quantized: type of the dense weights"
    )
    parser.add_argument(
        "--held_text", type=str | None, default=None, help="also measure on this text what each hand-over of the adapter costs"
    )
    parser.add_argument("--text_column", type=str, default="text", help="column of held_text that holds a document's text")


def _convert(values: Any) -> dict[str, Any]:
    from medllm.stages.convert import convert_model
    from medllm.stages.handover import handover_table

    with progress_bar("convert") as progress:
        result = convert_model(
            values.model,
            values.out,
            values.adapter,
            quantization=values.quantization,
            dtype=values.dtype,
            held_text=values.held_text,
            text_column=values.text_column,
            progress=progress,
        )
    if result.costs:
        say(handover_table(result.costs))
    say(f"convert: {values.out}")
    return result.to_json()


CONVERT = Command("merge adapters into their base model, or store it in 4 bits", _arguments, _convert)
