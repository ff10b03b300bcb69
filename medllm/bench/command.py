"""``medllm bench``: its arguments, and what it prints."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.bench.shapes import CptShape, GenerateShape, ModelShape, RpoShape
from medllm.bench.variants import ALL, names
from medllm.command import Command, say
from medllm.config import RematPolicy
from medllm.quantization import Quantization

_SHAPES = {"cpt": CptShape, "rpo": RpoShape, "generate": GenerateShape}


def _comparison(action: str, help: str) -> Command:
    return Command(help, partial(_comparison_arguments, action), partial(_compare, action))


def _comparison_arguments(action: str, parser: ArgumentParser) -> None:
    parser.add_class_arguments(_SHAPES[action], as_group=True)
    parser.add_argument("--engines", type=list[Literal["jax", "torch"]], default=["jax", "torch"], help="who is measured")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each engine, alternating")
    parser.add_argument("--torch_variant", type=str, default=ALL, metavar="NAME", help=_variants_help(action))
    parser.add_argument(
        "--profile",
        type=str | None,
        default=None,
        metavar="DIR",
        help="also write a trace of each engine, and print where its time went",
    )
    if action != "generate":
        parser.add_argument("--remat", type=RematPolicy, default="projections", help="what JAX keeps for the backward pass")
    if action == "rpo":
        parser.add_argument(
            "--nll_reduction",
            type=Literal["micro_batch_tokens", "sequence"],
            default="micro_batch_tokens",
            help="the mean of the preferred likelihood; TRL takes 'sequence' only one pair at a time",
        )


def _compile_arguments(parser: ArgumentParser) -> None:
    parser.add_class_arguments(ModelShape, "model")
    parser.add_argument("--depths", type=list[int], default=[8, 80], help="decoder layers")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each depth, alternating")


def _floor_arguments(parser: ArgumentParser) -> None:
    parser.add_class_arguments(ModelShape, "model")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, of one document each")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each operation, at least three runs")


def _load_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint, bf16")
    parser.add_argument("--engine", type=Literal["jax"], default="jax", help="which engine opens it")
    parser.add_argument("--quantization", type=Quantization, default="nf4", help="how its weights are held")


def _variants_help(name: str) -> str:
    return f"How the reference is set: the fastest way of those that there are ({ALL}), or one of {', '.join(names(name))}"


def _load(values: Any) -> dict[str, Any]:
    from medllm.bench.load import bench_load, summary

    found = bench_load(values.gigabytes, values.engine, values.quantization, say)
    say(summary(found))
    return found


def _floor(values: Any) -> dict[str, Any]:
    from medllm.bench import floor

    return floor.run(values, say)


def _compile(values: Any) -> dict[str, Any]:
    from medllm.bench.compilation import bench_compile, summary

    found = bench_compile(values.model, values.depths, values.runs, say)
    say(summary(found))
    return found


def _compare(action: str, values: Any) -> dict[str, Any]:
    from medllm.bench.compare import compare, table
    from medllm.bench.profile import read_tables
    from medllm.bench.share import share_lines, shares

    kind = _SHAPES[action]
    shape = kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
    settings = {name: values[name] for name in ("remat", "nll_reduction") if name in values}
    found = compare(
        action,
        shape,
        engines=tuple(values.engines),
        runs=values.runs,
        torch_variant=values.torch_variant,
        profile=values.profile,
        say=say,
        **settings,
    )
    said = table(found)
    if not isinstance(shape, GenerateShape):
        found = dataclasses.replace(found, shares=shares(shape, found.figures))
        said += share_lines(found.shares)
    if values.profile:
        tables, more = read_tables(Path(values.profile), shape, found.figures)
        found = dataclasses.replace(found, profile=tables)
        said += more
    for line in said:
        say(line)
    return found.to_json()


ACTIONS = {
    "cpt": _comparison("cpt", "continued pretraining: tokens a second, memory and compile time of both engines"),
    "rpo": _comparison("rpo", "preference training: problems a second, memory and compile time of both engines"),
    "generate": _comparison("generate", "evaluation with explanation: problems a second of both engines"),
    "compile": Command("how the time to compile a training step grows with depth (JAX)", _compile_arguments, _compile),
    "floor": Command(
        "the operations of a training step against this machine's matrix and copy rates (JAX)", _floor_arguments, _floor
    ),
    "load": Command("open a generated checkpoint: seconds, and memory beyond the model itself", _load_arguments, _load),
}
