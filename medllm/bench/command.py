"""``medllm bench``: its arguments, and what it prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.bench.variants import ALL, names
from medllm.config import RematPolicy

SHAPES = {"cpt": "CptShape", "rpo": "RpoShape", "generate": "GenerateShape"}
_HELP = {
    "cpt": "continued pretraining: tokens a second, memory and compile time of both engines",
    "rpo": "preference training: problems a second, memory and compile time of both engines",
    "generate": "evaluation with explanation: problems a second of both engines",
}


def add_actions(add: Callable[[str, str], ArgumentParser]) -> None:
    """Add the actions; ``add(name, help)`` makes the parser of one."""
    from medllm.bench import shapes

    for name, kind in SHAPES.items():
        parser = add(name, _HELP[name])
        parser.add_class_arguments(getattr(shapes, kind), as_group=True)
        parser.add_argument("--engines", type=list[Literal["jax", "torch"]], default=["jax", "torch"], help="who is measured")
        parser.add_argument("--runs", type=int, default=3, help="measurements of each engine, alternating")
        parser.add_argument("--torch_variant", type=str, default=ALL, metavar="NAME", help=_variants_help(name))
        parser.add_argument("--profile", type=str | None, default=None, metavar="DIR", help="also write a trace of each engine")
        if name != "generate":
            parser.add_argument("--remat", type=RematPolicy, default="layer", help="what JAX keeps for the backward pass")
        if name == "rpo":
            parser.add_argument(
                "--nll_reduction",
                type=Literal["micro_batch_tokens", "sequence"],
                default="micro_batch_tokens",
                help="the mean of the preferred likelihood; TRL takes 'sequence' only one pair at a time",
            )
    compile_ = add("compile", "how the time to compile a training step grows with depth (JAX)")
    compile_.add_class_arguments(shapes.ModelShape, "model")
    compile_.add_argument("--depths", type=list[int], default=[8, 80], help="decoder layers")
    compile_.add_argument("--runs", type=int, default=3, help="measurements of each depth, alternating")
    load = add("load", "open a generated checkpoint: seconds, and memory beyond the model itself")
    load.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint, bf16")
    load.add_argument("--engine", type=Literal["jax"], default="jax", help="which engine opens it")
    load.add_argument("--quantization", type=Literal["none", "nf4"], default="nf4", help="how its weights are held")


def _variants_help(name: str) -> str:
    return f"{ALL}: the fastest of what the reference can be set to is measured; or one of {', '.join(names(name))}"


def run(action: str, values: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, print, and return what was found."""
    if action == "load":
        from medllm.bench.load import bench_load, summary

        found = bench_load(values.gigabytes, values.engine, values.quantization, say)
        say(summary(found))
        return found
    if action == "compile":
        from medllm.bench.compilation import bench_compile, summary

        found = bench_compile(values.model, values.depths, values.runs, say)
        say(summary(found))
        return found
    from medllm.bench import shapes
    from medllm.bench.compare import compare, table

    kind = getattr(shapes, SHAPES[action])
    shape = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
    settings = {name: values[name] for name in ("remat", "nll_reduction") if name in values}
    result = compare(
        action,
        shape,
        engines=tuple(values.engines),
        runs=values.runs,
        torch_variant=values.torch_variant,
        profile=values.profile,
        say=say,
        **settings,
    )
    for line in table(action, result):
        say(line)
    return result
