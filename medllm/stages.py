"""The stages of the study as functions: what each command does, for scripts and notebooks.

Every stage opens its model once, checks all of its input (``check_…``) before it makes its run folder, and returns what it
wrote as ``result.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medllm.config import ModelConfig, ProblemsFormat
from medllm.engine import Generates, Scores
from medllm.engines import EngineName, open_engine, open_scorer, open_trainer
from medllm.errors import UserError
from medllm.exam.problem import Problem
from medllm.progress import progress_bar
from medllm.run import Run, is_primary_process
from medllm.stage_config import CptConfig, CurateConfig, EvaluateConfig, RpoConfig

Progress = Callable[[int, int], None]

PREFERENCES = "preferences.jsonl"
PREDICTIONS = "predictions.jsonl"


def run_cpt(config: CptConfig, engine: EngineName = "jax") -> dict[str, Any]:
    """Stage 1, continued pretraining: documents → packed rows → a PEFT adapter in the run folder.

    Raises:
        UserError: the model, tokenizer, documents or run folder cannot be used.
    """
    from medllm.corpus.documents import load_documents
    from medllm.corpus.packing import check_rows, pack, tokenize_documents

    model = open_trainer(engine, config.model, config)  # several processes meet here, before each reads the corpus
    corpus = load_documents(config.corpus)
    with progress_bar("tokens") as progress:
        tokens = tokenize_documents(model.tokenizer, corpus.documents, progress)
    rows = pack(tokens, config.corpus.length, model.tokenizer.pad_token_id, config.corpus.packing)
    check_rows(rows, model.context)
    with Run(config.run, config, engine=engine, resume=config.resume) as run:
        summary = model.train_cpt(rows, config, run)
        result = {
            "stage": "cpt",
            "engine": engine,
            **asdict(summary),
            "documents": len(corpus.documents),
            "skipped": dict(corpus.skipped),
            "tokens": int((rows.segment_ids > 0).sum()),
            "rows": len(rows.tokens),
            "padding": rows.padding,
        }
        run.finish(result)
    return result


def run_curate(config: CurateConfig, engine: EngineName = "jax", progress: Progress | None = None) -> dict[str, Any]:
    """Preference data: the model's own sampled answers, graded and ranked into ``preferences.jsonl``.

    Raises:
        UserError: a problem is from a held-out year, or the model, problems or shots cannot be used.
    """
    from medllm.preferences.curation import check_problems

    problems, skipped = _load(config.problems, config.problems_format)
    shots = _load_shots(config.shots, config.shot_count) if config.shots else ()
    check_problems(problems, shots, config)
    return _curate(open_engine(engine, config.model, config), problems, shots, config, progress, skipped)


def build_preferences(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: CurateConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """:func:`run_curate` on a model that is already open, and problems that are already read."""
    from medllm.preferences.curation import check_problems

    check_problems(problems, shots, config)
    return _curate(model, problems, shots, config, progress, {})


def _curate(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: CurateConfig,
    progress: Progress | None,
    left_out: Mapping[str, int],
) -> dict[str, Any]:
    from medllm.preferences.curation import curate
    from medllm.preferences.records import write_preferences

    began = time.monotonic()
    with Run(config.run, config, engine=model.name) as run:
        curation = curate(model, problems, shots, config, progress)
        result = {
            "stage": "curate",
            "engine": model.name,
            "seconds": time.monotonic() - began,
            **asdict(curation.report),
            "left_out": dict(left_out),
        }
        if is_primary_process():
            write_preferences(run.path / PREFERENCES, curation.preferences)
        run.finish(result)
    return result


def run_rpo(config: RpoConfig, engine: EngineName = "jax") -> dict[str, Any]:
    """Stage 2, preference training: pairs of the hierarchy → a PEFT adapter in the run folder.

    ``opened_as`` of the result says how the trained model is opened: under ``handover: merge`` on the merged weights in the run
    folder, else on the base, with its adapters in order.

    Raises:
        UserError: the model or the preference file cannot be used, its adapter cannot be handed over, or there is no pair to
            train on.
    """
    from medllm.handover import check_handover, merged_weights, merges, opened_as
    from medllm.preferences.records import read_preferences
    from medllm.preferences.tokenization import check_preferences, tokenize_preferences

    read = read_preferences(config.preferences)
    check_handover(config)
    model = open_trainer(engine, config.model, config)
    with progress_bar("tokens") as progress:
        preferences = tokenize_preferences(model.tokenizer, read, config.pairs, progress)
    check_preferences(preferences, config.pairs.max_length, model.context, config.preferences)
    with Run(config.run, config, engine=engine, resume=config.resume) as run:
        if merges(config.model, config):
            model = model.with_weights(merged_weights(config, run))
        summary = model.train_preferences(preferences, config, run)
        opened = opened_as(config, run.path, summary.adapter)
        result = {
            "stage": "rpo",
            "engine": engine,
            **asdict(summary),
            "problems": len(read),
            "pairs": len(preferences.texts),
            **({"handover": config.handover} if config.model.adapters else {}),
            "opened_as": {"path": opened.path, "adapters": list(opened.adapters)},
        }
        run.finish(result)
    return result


def run_evaluate(config: EvaluateConfig, engine: EngineName = "jax", progress: Progress | None = None) -> dict[str, Any]:
    """Sit an exam: prompts → generations → predictions → the official score.

    Raises:
        UserError: the model, problems or shots cannot be used, or a prompt does not fit the context.
    """
    from medllm.exam.evaluation import check_exam
    from medllm.exam.problem import check_ids

    problems, skipped = _load(config.problems, config.problems_format)
    problems = problems[: config.limit] if config.limit else problems
    if config.method == "options":
        check_ids(problems)
        return _choose_options(open_scorer(engine, config.model, config), problems, config, skipped)
    shots = _load_shots(config.shots, config.shot_count)
    check_exam(problems, shots, config)
    return _sit(open_engine(engine, config.model, config), problems, shots, config, progress, skipped)


def sit_exam(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """:func:`run_evaluate` with a model that is already open, and problems that are already read."""
    from medllm.exam.evaluation import check_exam

    check_exam(problems, shots, config)
    return _sit(model, problems, shots, config, progress, {})


def _sit(
    model: Generates,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    config: EvaluateConfig,
    progress: Progress | None,
    left_out: Mapping[str, int],
) -> dict[str, Any]:
    from medllm.exam.evaluation import evaluate, write_predictions
    from medllm.exam.scoring import score
    from medllm.exam.setting import setting_name

    began = time.monotonic()
    with Run(config.run, config, engine=model.name) as run:
        predictions = evaluate(model, problems, shots, config, progress)
        if is_primary_process():
            write_predictions(run.path / PREDICTIONS, predictions)
        result = {
            "stage": "evaluate",
            "engine": model.name,
            "model": config.label or model_label(config.model),
            "setting": setting_name(config.shot_count, explanation=config.explanation),
            "seconds": time.monotonic() - began,
            "left_out": dict(left_out),
            "score": score(problems, predictions, lenient=config.lenient).to_json(),
        }
        run.finish(result)
    return result


def _choose_options(
    model: Scores, problems: Sequence[Problem], config: EvaluateConfig, left_out: Mapping[str, int]
) -> dict[str, Any]:
    from medllm.exam.evaluation import score_options

    began = time.monotonic()
    with Run(config.run, config, engine=model.name) as run:
        scores = score_options(model, model.tokenizer, problems, prompt=config.option_prompt, batch_size=config.batch_size)
        result = {
            "stage": "options",
            "engine": model.name,
            "model": config.label or model_label(config.model),
            "setting": "zero-shot options",
            "seconds": time.monotonic() - began,
            "left_out": {**left_out, **scores.left_out},
            "questions": len(scores.results),
            "accuracy": scores.accuracy,
            "normalized_accuracy": scores.normalized_accuracy,
            "results": [asdict(one) for one in scores.results],
        }
        run.finish(result)
    return result


def model_label(model: ModelConfig) -> str:
    """How a model is called in tables: its folder, and its adapters'."""
    return " + ".join((model.path, *model.adapters))


def _load(paths: Sequence[str], problems_format: ProblemsFormat) -> tuple[tuple[Problem, ...], dict[str, int]]:
    from medllm.exam.loaders import load_problems

    if not paths:
        raise UserError("no problems given: name a file or folder (--problems)")
    problems: list[Problem] = []
    skipped: dict[str, int] = {}
    for path in paths:
        loaded = load_problems(path, problems_format=problems_format)
        problems += loaded.problems
        for reason, count in loaded.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return tuple(problems), skipped


def _load_shots(path: str | None, count: int) -> tuple[Problem, ...]:
    from medllm.exam.loaders import load_problems

    if not count:
        return ()
    if path is None:
        raise UserError(f"{count} shots are asked for: name their problem file (--shots), or set --shot_count 0")
    shots = load_problems(path).problems
    if len(shots) < count:
        raise UserError(f"{path}: holds {len(shots)} problems, {count} shots are asked for (--shot_count)")
    return shots[:count]
