"""``medllm bench``: its arguments, and what it prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.bench.variants import ALL, names
from medllm.config import RematPolicy
from medllm.quantization import Quantization

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
        parser.add_argument(
            "--profile",
            type=str | None,
            default=None,
            metavar="DIR",
            help="also write a trace of each engine, and print where its time went",
        )
        if name != "generate":
            parser.add_argument("--remat", type=RematPolicy, default="projections", help="what JAX keeps for the backward pass")
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
    _add_floor(add)
    load = add("load", "open a generated checkpoint: seconds, and memory beyond the model itself")
    load.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint, bf16")
    load.add_argument("--engine", type=Literal["jax"], default="jax", help="which engine opens it")
    load.add_argument("--quantization", type=Quantization, default="nf4", help="how its weights are held")


def _add_floor(add: Callable[[str, str], ArgumentParser]) -> None:
    from medllm.bench import shapes

    floor = add("floor", "the operations of a training step against this machine's matrix and copy rates (JAX)")
    floor.add_class_arguments(shapes.ModelShape, "model")
    floor.add_argument("--rows", type=int, default=8, help="rows of a step, of one document each")
    floor.add_argument("--length", type=int, default=256, help="tokens of a row")
    floor.add_argument("--seconds", type=float, default=0.5, help="spent on each operation, at least three runs")


def _variants_help(name: str) -> str:
    return f"{ALL}: the fastest of what the reference can be set to is measured; or one of {', '.join(names(name))}"


def run(action: str, values: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, print, and return what was found."""
    if action == "load":
        from medllm.bench.load import bench_load, summary

        found = bench_load(values.gigabytes, values.engine, values.quantization, say)
        say(summary(found))
        return found
    if action == "floor":
        from medllm.bench import floor

        return floor.run(values, say)
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
    for line in [*table(action, result), *_where_the_time_goes(action, shape, values.profile, result)]:
        say(line)
    return result


def _where_the_time_goes(action: str, shape: Any, profile: str | None, result: dict[str, Any]) -> list[str]:
    """Lines about it, and what they say into ``result``."""
    from medllm.bench.profile import add_tables
    from medllm.bench.share import add_shares

    said = [] if action == "generate" else add_shares(shape, result)
    return said + (add_tables(Path(profile), shape, result) if profile else [])
