"""What a child process of ``medllm bench`` does: one stage on one engine, through the same calls as the commands.

Rates are those the engine itself reports, alike on both: from the end of the first optimizer step to that of the last, without
opening the model and without compilation. A reference that is computed ahead counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from medllm.bench.shapes import CptShape, GenerateShape, ModelShape, RpoShape
from medllm.config import (
    LoraConfig,
    ModelConfig,
    PairConfig,
    PreferenceLoss,
    RematPolicy,
    Sampling,
    TorchConfig,
    TrainingConfig,
)
from medllm.engines import TrainerName, open_engine, open_trainer
from medllm.host.memory import peak_resident_bytes
from medllm.preferences.tokenization import tokenize_preferences
from medllm.run import Run
from medllm.stage_config import CptConfig, RpoConfig
from medllm.training import TrainSummary

Profiler = Callable[[str], AbstractContextManager[Any]]
"""Makes a context that writes a trace of what runs in it into a folder."""


def measurements(
    engine: TrainerName, profiler: Profiler, compile_seconds: Callable[[], float] | None = None
) -> dict[str, Callable[..., dict[str, Any]]]:
    """``cpt``, ``rpo`` and ``generate`` on ``engine``, for :func:`medllm.host.child.serve`.

    Args:
        engine: Which engine does the work.
        profiler: Its profiler.
        compile_seconds: Seconds this process has compiled so far. With it, generation runs twice and the second pass, which
            compiles nothing, is timed; without it a short pass warms up.
    """
    return {
        "cpt": partial(_cpt, engine, profiler),
        "rpo": partial(_rpo, engine, profiler),
        "generate": partial(_generate, engine, profiler, compile_seconds),
    }


def _cpt(
    engine: TrainerName,
    profiler: Profiler,
    *,
    model: dict,
    shape: dict,
    remat: RematPolicy,
    torch: dict | None = None,
    profile: str | None,
) -> dict:
    work = _shaped(CptShape, shape)
    training = TrainingConfig(epochs=1, batch_size=work.rows, accumulation=1, remat=remat)
    switches = TorchConfig(**(torch or {}))
    rows = work.data()

    def train(run: str) -> TrainSummary:
        config = CptConfig(ModelConfig(**model), run, lora=LoraConfig(rank=work.model.rank), training=training, torch=switches)
        with Run(run, config) as folder:
            return open_trainer(engine, config.model, config).train_cpt(rows, config, folder)

    return _trained(train, profiler, profile, 1)


def _rpo(
    engine: TrainerName,
    profiler: Profiler,
    *,
    model: dict,
    shape: dict,
    remat: RematPolicy,
    nll_reduction: Any,
    torch: dict | None = None,
    profile: str | None,
) -> dict:
    work = _shaped(RpoShape, shape)
    training = TrainingConfig(epochs=1, batch_size=work.problems, accumulation=1, remat=remat)
    preferences = work.data()

    def train(run: str) -> TrainSummary:
        config = RpoConfig(
            ModelConfig(**model),
            run,
            preferences="generated",
            loss=PreferenceLoss(nll_reduction=nll_reduction),
            pairs=PairConfig(work.chosen, work.rejected, max_length=work.prompt + work.response),
            lora=LoraConfig(rank=work.model.rank),
            training=training,
            torch=TorchConfig(**(torch or {})),
        )
        with Run(run, config) as folder:
            opened = open_trainer(engine, config.model, config)
            data = tokenize_preferences(opened.tokenizer, preferences, config.pairs)
            return opened.train_preferences(data, config, folder)

    return _trained(train, profiler, profile, work.pairs)


def _trained(train: Callable[[str], TrainSummary], profiler: Profiler, profile: str | None, parts: int) -> dict[str, Any]:
    """A run's figures; ``parts`` of the engine's units make one of ours."""
    with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
        summary = train(f"{scratch}/run")
        peak = peak_resident_bytes()
        if profile is not None:  # once more, its programs compiled already
            with profiler(profile):
                train(f"{scratch}/profiled")
    return {"rate": summary.rate / parts, "compile_s": summary.compile_seconds, "peak_rss_bytes": peak, "loss": summary.loss}


def _generate(
    engine: TrainerName,
    profiler: Profiler,
    compile_seconds: Callable[[], float] | None,
    *,
    model: dict,
    shape: dict,
    batch_size: int | None = None,
    profile: str | None,
) -> dict[str, Any]:
    work = _shaped(GenerateShape, shape)
    opened = open_engine(engine, ModelConfig(**model))
    prompts = work.data()
    at_a_time = batch_size or work.batch_size

    def answer(prompts: list[str], tokens: int = work.answer) -> tuple[float, int]:
        start = time.perf_counter()
        answers = opened.generate(prompts, Sampling(max_new_tokens=tokens), at_a_time)
        return time.perf_counter() - start, sum(len(generation.tokens) for samples in answers for generation in samples)

    if compile_seconds is None:
        answer(prompts[:1], 2)
    else:
        answer(prompts)
    compiled = compile_seconds() if compile_seconds else 0.0
    seconds, tokens = answer(prompts)
    peak = peak_resident_bytes()
    if profile is not None:
        with profiler(profile):
            answer(prompts)
    return {
        "rate": work.problems / seconds,
        "compile_s": compiled,
        "peak_rss_bytes": peak,
        "tokens": tokens,
    }


def _shaped(kind: Any, shape: dict[str, Any]) -> Any:
    return kind(**{**shape, "model": ModelShape(**shape["model"])})
