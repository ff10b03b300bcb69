"""``medllm data``: preferences for TRL, a model to try a pipeline on, exam questions in training text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.config import OptionPrompt, PairConfig, ProblemLayout
from medllm.errors import UserError
from medllm.host.progress import progress_bar
from medllm.stage_config import CorpusConfig


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--preferences", type=str, required=True, help="preference file")
    parser.add_argument("--out", type=str, required=True, help="JSONL file to write")
    parser.add_class_arguments(PairConfig, "pairs")


def _export(values: Any) -> dict[str, Any]:
    from medllm.preferences.pairs import export_trl
    from medllm.preferences.records import read_preferences

    rows = export_trl(read_preferences(values.preferences), Path(values.out), values.pairs)
    say(f"data: {rows} rows; {values.out}")
    return {"rows": rows, "out": values.out}


def _model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=str, required=True, help="folder whose tokenizer the model gets")
    parser.add_argument("--out", type=str, required=True, help="model folder to write")
    parser.add_argument("--vocab_size", type=int, default=152064, help="rows of the embedding")
    parser.add_argument("--hidden_size", type=int, default=64, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")


def _model(values: Any) -> dict[str, Any]:
    from medllm.model.random import write_random_model

    write_random_model(
        values.out,
        tokenizer=values.tokenizer,
        vocab_size=values.vocab_size,
        hidden_size=values.hidden_size,
        layers=values.layers,
        seed=values.seed,
    )
    say(f"data: {values.out}")
    return {"model": values.out}


def _leaks_arguments(parser: ArgumentParser) -> None:
    from medllm.corpus.leaks.exact import THRESHOLD
    from medllm.corpus.leaks.near import THRESHOLD as NEAR

    parser.add_argument("--documents", type=list[str], required=True, help="training files or folders")
    parser.add_argument("--problems", type=str, required=True, help="problem file or folder")
    parser.add_class_arguments(ProblemLayout)
    parser.add_argument("--text_column", type=str, default="text", help="column that holds a document's text")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share of a problem, word for word")
    parser.add_argument("--near", type=float, default=NEAR, help="how like a problem a text is that counts as a copy (1: none)")


def _leaks(values: Any) -> dict[str, Any]:
    from medllm.corpus.documents import read_documents
    from medllm.corpus.leaks.derivations import derived, files_at
    from medllm.corpus.leaks.exact import WORD_FOR_WORD
    from medllm.corpus.leaks.search import search
    from medllm.exam.loaders import problems_at

    for name in ("threshold", "near"):
        if not 0 < getattr(values, name) <= 1:
            raise UserError(f"--{name} is {getattr(values, name)}; expected a share in (0, 1]")
    corpus = CorpusConfig(documents=tuple(values.documents), text_column=values.text_column)
    loaded = problems_at(values.problems, values)
    passed_over: Counter[str] = Counter()
    with progress_bar("documents", "bytes") as progress:
        total = sum(file.stat().st_size for path in values.documents for file in files_at(path))
        found = search(
            read_documents(corpus, passed_over),
            loaded.problems,
            values.threshold,
            values.near,
            lambda done: progress(min(done, total), total),
        )
    made_from = derived(values.documents, loaded.problems)
    for one in made_from:
        say(one.words())
    for leak in found:
        word_for_word = leak.kind == WORD_FOR_WORD
        say(
            f"{leak.problem_id}: {leak.overlap:.0%} stands in {leak.source}"
            if word_for_word
            else f"{leak.problem_id}: its {leak.kind}, changed ({leak.overlap:.2f}), in {leak.source}"
        )
    sets = f"; {len(made_from)} files of sets made from this exam" if made_from else ""
    say(f"data: {len(found)} leaks{sets}" + _left_out(loaded.skipped))
    return {
        "leaks": [asdict(leak) for leak in found],
        "derived": [asdict(one) for one in made_from],
        "problems": len(loaded.problems),
        "skipped": dict(loaded.skipped),
        "documents_skipped": dict(passed_over),
    }


def _read_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=str, help="JSONL: text, choices, answer_count, explanation, gold")


def _read(values: Any) -> list[dict[str, Any]]:
    from medllm.exam.answers import Readings
    from medllm.exam.texts import read_texts

    readings = read_texts(values.file)
    say(f"data: {len(readings)} texts; {Readings.count(readings).words()}")
    return [{"answer": list(one.answer), "rule": one.rule or None, "reason": one.reason or None} for one in readings]


def _problems_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=str, help="problem file or folder")
    parser.add_class_arguments(ProblemLayout)


def _problems(values: Any) -> dict[str, Any]:
    from medllm.exam.loaders import problems_at

    loaded = problems_at(values.path, values)
    years = Counter(str(problem.year or "unknown") for problem in loaded.problems)
    layouts = ", ".join(f"{name} {count}" for name, count in loaded.layouts.items())
    say(f"data: {len(loaded.problems)} problems ({layouts})" + _left_out(loaded.skipped))
    return {
        "problems": len(loaded.problems),
        "layouts": dict(loaded.layouts),
        "years": dict(sorted(years.items())),
        "skipped": dict(loaded.skipped),
        "ignored": list(loaded.ignored),
    }


def _left_out(skipped: Mapping[str, int]) -> str:
    return "; left out: " + ", ".join(f"{reason} {count}" for reason, count in skipped.items()) if skipped else ""


def _task_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=str, help="problem file or folder")
    parser.add_argument("--out", type=str, required=True, help="folder for its files, the harness's --include_path")
    parser.add_argument("--name", type=str | None, default=None, help="what the task is called; the file's name when unset")
    parser.add_argument("--prompt", type=OptionPrompt, default="mcqa_with_options_jp", help="the prompt, by JMedBench's names")
    parser.add_argument("--method", type=Literal["options", "letters"], default="options", help="what is compared")
    parser.add_class_arguments(ProblemLayout)


def _task(values: Any) -> dict[str, Any]:
    from medllm.exam.harness_tasks import write_task
    from medllm.exam.loaders import problems_at

    problems = problems_at(values.path, values).problems
    name = values.name or Path(values.path).stem
    task = write_task(problems, values.out, name, prompt=values.prompt, method=values.method)
    say(f"data: task {task.name}, {task.questions} questions{_left_out(task.left_out)}; {task.file}")
    return {"task": task.name, "file": str(task.file), "questions": task.questions, "left_out": dict(task.left_out)}


ACTIONS = {
    "export-trl": Command("preferences → TRL's prompt/chosen/rejected rows", _export_arguments, _export),
    "random-model": Command("a small Qwen2.5 with random weights, for trying out a pipeline", _model_arguments, _model),
    "read": Command("how the answer in a text is read, and by which rule", _read_arguments, _read),
    "problems": Command("what a problem file or folder holds, and in which layout", _problems_arguments, _problems),
    "task": Command("an exam as a task of lm-evaluation-harness", _task_arguments, _task),
    "leaks": Command("exam questions found in training text", _leaks_arguments, _leaks),
}
