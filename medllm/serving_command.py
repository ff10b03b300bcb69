"""``medllm publish`` and ``medllm check-serving``: what is served, and what is promised of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.host.progress import progress_bar
from medllm.stage_config import CheckServingConfig, PublishConfig

_COLUMNS = ("run_on", "cut_off", "unread", "score")


def _publish_arguments(parser: ArgumentParser) -> None:
    parser.add_class_arguments(PublishConfig, as_group=True)


def _publish(values: Any) -> dict[str, Any]:
    from medllm.stages.publish import run_publish

    config = PublishConfig(**{field.name: values[field.name] for field in fields(PublishConfig)})
    result = run_publish(config)
    say(f"publish: {config.weights} weights, {len(result['runs'])} runs; {config.out}")
    if config.weights == "adapter":
        say(f"{config.out} is no whole model: to serve it, copy config.json and *.safetensors of {config.model} into it")
    return result


def _check_arguments(parser: ArgumentParser) -> None:
    whose = "whose own answers are compared; without --url, who is asked"
    parser.add_argument("--engine", type=Literal["jax", "torch"], default="jax", help=whose)
    parser.add_class_arguments(CheckServingConfig, as_group=True)


def _check(values: Any) -> dict[str, Any]:
    from medllm.stages.check_serving import run_check_serving

    config = CheckServingConfig(**{field.name: values[field.name] for field in fields(CheckServingConfig)})
    with progress_bar("check-serving") as progress:
        result = run_check_serving(config, values.engine, progress)
    for line in check_lines(result):
        say(line)
    return result


def check_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A check as text: a table by way of asking, the differences from the engine's own in brackets, and the findings."""
    yield f"{'asked by':<16}" + "".join(f"{name.replace('_', ' '):>16}" for name in _COLUMNS) + f"{'other texts':>14}"
    for name, way in result["ways"].items():
        if "refused" in way:
            yield f"{name:<16}  refused: {way['refused']}"
            continue
        cells = []
        for column in _COLUMNS:
            change = f" ({way['difference'][column]:+.3f})" if "difference" in way else ""
            cells.append(f"{way[column]:.3f}{change}")
        others = f"{way['other_texts']} of {way['asked']}" if "other_texts" in way else "-"
        yield f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells) + f"{others:>14}"
    for name, seen in result["findings"].items():
        yield f"{name}: {seen}"
    verdict = "the contract is kept" if result["ok"] else f"NOT kept: {', '.join(result['findings'])}"
    yield f"check-serving: {result['model']} at {result['where']}, {result['problems']} problems: {verdict}"


PUBLISH = Command(
    "write a directory that is ready to be served, with a model card",
    _publish_arguments,
    _publish,
    ("--model", "--adapter", "--out", "--runs", "--weights", "--chat_template", "--end_tokens", "--name", "--license"),
)
CHECK_SERVING = Command(
    "ask a served model, and see whether its answers end",
    _check_arguments,
    _check,
    (
        *("--model", "--url", "--folder", "--problems", "--shots", "--shot_count", "--explanation", "--template", "--format"),
        *("--max_new_tokens", "--limit", "--engine"),
    ),
)
