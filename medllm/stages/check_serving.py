"""``medllm check-serving``: a model asked where it is served, beside an engine's own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from medllm.config import ModelConfig, Sampling
from medllm.engine import Generates
from medllm.engines import EngineName, load, open_engine, require_engine
from medllm.errors import UserError
from medllm.exam.evaluation import check_apart
from medllm.exam.problem import Problem
from medllm.exam.prompts import naming_problems
from medllm.host.progress import Progress
from medllm.model.tokenizer import Prompt, encode_prompt, load_tokenizer
from medllm.serving.asking import ways
from medllm.serving.findings import Answer, Asked, findings, way_result
from medllm.serving.opened import published_model
from medllm.stage_config import CheckServingConfig
from medllm.stages.problems import read_problems, read_shots


def run_check_serving(
    config: CheckServingConfig, engine: EngineName = "jax", progress: Progress | None = None
) -> dict[str, Any]:
    """Ask the model in every way, and say what it, or its server, does not keep.

    Returns:
        ``ok``, the ``findings`` by name, and by way of asking: the shares of texts that run on, are cut off and unread, the
        score; the engine's own, the differences, and how many texts are others (:mod:`medllm.serving.findings`).

    Raises:
        UserError: problems, shots, server or folder cannot be used.
    """
    problems, _ = read_problems(config.problems, config)
    problems = problems[: config.limit] if config.limit else problems
    shots = read_shots(config.shots, config.shot_count, config)
    check_apart(problems, shots)
    folder = config.folder or (config.model if Path(config.model).is_dir() else None)
    if config.url is None and folder is None:
        raise UserError(f"--model {config.model}: no such folder; name the server that has a model of this name (--url)")
    with published_model(folder, config.dtype) if folder else nullcontext() as model:
        asked = _ask_every_way(config, problems, shots, engine, model, progress)
    results = {one.way.name: way_result(one, problems) for one in asked}
    found = findings(asked)
    return {
        "ok": not found,
        "model": config.model,
        "where": config.url or engine,
        "problems": len(problems),
        "findings": found,
        "ways": results,
    }


def _ask_every_way(
    config: CheckServingConfig,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    engine: EngineName,
    model: ModelConfig | None,
    progress: Progress | None,
) -> list[Asked]:
    """The server's answers, where there is one, and the engine's, where it has the model."""
    own = open_engine(engine, model) if model else None
    tokenizer = load_tokenizer(model.path) if model else None
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    serve = _server(config, sampling) if config.url else None
    asked = []
    chosen = ways(config, shots, chats=tokenizer is None or bool(tokenizer.chat_template))
    for done, way in enumerate(chosen):
        prompts = [way.ask(problem) for problem in problems]
        with naming_problems(problems):
            alone = _own_answers(own, tokenizer, prompts, sampling, config.batch_size) if own else []
        served, refused = serve(prompts) if serve else (alone, "")
        compared = alone if serve else []
        asked.append(Asked(way, prompts, served, compared, _thinking(tokenizer, prompts), refused))
        if progress:
            progress(done + 1, len(chosen))
    return asked


def _server(config: CheckServingConfig, sampling: Sampling) -> Callable[[Sequence[Prompt]], tuple[list[Answer], str]]:
    """A server's answers to prompts, or what it says where it refuses them: under its own stop strings, none is sent."""
    require_engine("openai", "asking a server")
    client = load("openai", "engine").OpenAIEngine(ModelConfig(config.model), url=config.url)

    def answers(prompts: Sequence[Prompt]) -> list[Answer]:
        replies = client.replies(prompts, sampling, config.batch_size)
        return [Answer(one.text, one.finish == "length", "", one.prompt_tokens, one.thought) for (one,) in replies]

    def ask(prompts: Sequence[Prompt]) -> tuple[list[Answer], str]:
        try:
            first = answers(prompts[:1])
        except UserError as error:
            if isinstance(prompts[0], str):
                raise
            return [], str(error)
        return [*first, *answers(prompts[1:])], ""

    return ask


def _own_answers(
    engine: Generates, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int
) -> list[Answer]:
    """The engine's, which stops where the folder says."""
    generated = engine.generate(prompts, sampling, batch_size)
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    return [Answer.own(one, length) for (one,), length in zip(generated, lengths, strict=True)]


def _thinking(tokenizer: Any, prompts: Sequence[Prompt]) -> list[int]:
    """How many tokens each conversation has where the template's thinking is on; empty where it knows of none."""
    if tokenizer is None or isinstance(prompts[0], str) or "enable_thinking" not in (tokenizer.chat_template or ""):
        return []
    turns = [[message.to_json() for message in prompt] for prompt in prompts if not isinstance(prompt, str)]
    written = [
        tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True, enable_thinking=True) for one in turns
    ]
    return [len(ids) for ids in tokenizer(written, add_special_tokens=False)["input_ids"]]
