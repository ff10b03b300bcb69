"""The embedded base as a folder that is served, and a check of who serves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from medllm.cli import main
from medllm.config import LoraConfig
from medllm.exam.loaders import write_problems
from medllm.mini.problems import exam_problems, shot_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.model.adapter import module_name, tensor_name, write_adapter
from medllm.model.directory import copy_companions
from medllm.serving.contract import plain_replies

END = "<|endoftext|>"
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
THINKS = PLAIN + "{% if enable_thinking is not defined or enable_thinking %}考える:{% endif %}"
OFF = "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}"
STOP = "したがって"


def published(
    folder: Path, *, template: str = PLAIN, stop: str | None = STOP, end: int = 0, bos: bool = False, called: str = END
) -> str:
    """The embedded base under a contract; ``called`` is what its end token is called."""
    shutil.copytree(BASE, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text("utf-8").replace(END, called), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    rewrite(folder / "tokenizer_config.json", response_template=plain_replies([called]))
    contract = {"eos_token_id": end, "pad_token_id": 0, **({"stop_strings": [stop]} if stop else {})}
    (folder / "generation_config.json").write_text(json.dumps(contract))
    if end:
        rewrite(folder / "config.json", eos_token_id=end)
    if bos:
        begin = {"SpecialToken": {"id": called, "type_id": 0}}
        known = {called: {"id": called, "ids": [0], "tokens": [called]}}
        old = json.loads((folder / "tokenizer.json").read_text("utf-8"))["post_processor"]
        processor = {**old, "single": [begin, *old["single"]], "special_tokens": known}
        rewrite(folder / "tokenizer.json", post_processor=processor)
    return str(folder)


def adapter_on(base: str, folder: Path, contract: str) -> str:
    """A published adapter that changes what its base says, under the contract of another folder."""
    rng, module = np.random.default_rng(0), module_name(1, "down_proj")
    shapes = {"A": (4, 576), "B": (192, 4)}
    tensors = {tensor_name(module, one): rng.normal(0, 0.2, shape).astype(np.float32) for one, shape in shapes.items()}
    write_adapter(folder, LoraConfig(rank=4, alpha=8.0, targets=("layers.1.mlp.down_proj",)), tensors, base)
    copy_companions(Path(contract), folder)
    return str(folder)


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), encoding="utf-8")


def write_exam(folder: Path) -> Path:
    """Two problems, and the shots of their trained prompt."""
    world = make_world()
    write_problems(folder / "exam.jsonl", exam_problems(world, 2)[:2])
    write_problems(folder / "shots.jsonl", shot_problems(world, 3))
    return folder


def beside(adapter: str, base: str, folder: Path) -> str:
    """An adapter's folder with its base's config and weights in it."""
    shutil.copytree(adapter, folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{base}/{name}", folder)
    return str(folder)


def check(exam: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a check."""
    settings = "--explanation true --template curation --answer_as text --max_new_tokens 40 --dtype float32".split()
    files = ["--problems", str(exam / "exam.jsonl"), "--shots", str(exam / "shots.jsonl"), "--json", str(exam / "out.json")]
    code = main(["check-serving", *more, *settings, *files])
    return code, json.loads((exam / "out.json").read_text("utf-8"))


def sit(exam: Path, run: Path, *more: str) -> bytes:
    """The predictions of an evaluation under the trained prompt."""
    shown = ["--shots", str(exam / "shots.jsonl"), *"--explanation true --template curation --answer_as text".split()]
    files = ["--problems", str(exam / "exam.jsonl"), "--sampling.max_new_tokens", "24", "--run", str(run)]
    assert main(["evaluate", *files, *shown, *more]) == 0
    return (run / "predictions.jsonl").read_bytes()
