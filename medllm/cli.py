"""The ``medllm`` command: a thin shell over :mod:`medllm.stages` and its neighbours, one function a subcommand.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input. A user error is one line on standard error; ``--debug`` shows the
traceback. Nothing heavier than the configuration is imported before a command is known.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from medllm import __version__
from medllm.command_words import gather_lists, name_presets
from medllm.config import AuditConfig, CptConfig, CurateConfig, EvaluateConfig, PairConfig, RpoConfig
from medllm.engine import EngineName, require
from medllm.errors import UserError
from medllm.processes import ended, is_primary_process
from medllm.quantization import Quantization


@dataclass(frozen=True)
class Command:
    """A subcommand: its help line, what fills its parser, and what it does with the parsed values."""

    help: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Any], dict[str, Any] | None]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (``sys.argv`` when None) and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    _quiet_libraries()
    try:
        return _run(argv)
    except (UserError, ArgumentError, UnicodeDecodeError) as error:
        if debug:
            raise
        if isinstance(error, UnicodeDecodeError):
            error = UserError("a file named on the command line is not UTF-8 text")
        print(f"medllm: {_one_line(error, argv)}", file=sys.stderr)
        return ended(2)
    except KeyboardInterrupt:
        print("medllm: interrupted", file=sys.stderr)
        return ended(1)
    except Exception as error:
        if debug:
            raise
        print(f"medllm: failed: {type(error).__name__}: {_first_line(error)} (--debug shows the traceback)", file=sys.stderr)
        return ended(1)


def _run(argv: list[str]) -> int:
    parser = build_parser()
    namespace = parser.parse_args(gather_lists(name_presets(argv), _WITH_ACTIONS))
    name = namespace.subcommand
    values = parser.instantiate(namespace)[name]
    target = values[values.action].json if name in _WITH_ACTIONS else values.json
    if target is not None and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
        raise UserError(f"--json {target}: no file can be written there; name a file in a folder that exists")
    result = COMMANDS[name].run(values)
    if result is not None and target is not None and is_primary_process():
        from medllm.run import write_json

        write_json(Path(target), result)
    return 1 if result is not None and result.get("ok") is False else 0


def _add_json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", type=str | None, default=None, metavar="FILE", help="also write the result as JSON")


def build_parser() -> ArgumentParser:
    """The parser of the whole command line."""
    parser = ArgumentParser(
        prog="medllm",
        description="Teach a language model a medical domain so that it stays right when it has to explain itself. "
        "Research software, not medical advice.",
        exit_on_error=False,
        allow_abbrev=False,
        version=__version__,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = ArgumentParser(description=command.help, exit_on_error=False, allow_abbrev=False)
        if name not in _WITH_ACTIONS:  # each of their actions has its own
            _add_json(sub)
        commands.add_subcommand(name, sub, help=command.help)
        command.arguments(sub)
    return parser


# --- the commands ---------------------------------------------------------------------------------------------------------


def _stage_arguments(config_class: type) -> Callable[[ArgumentParser], None]:
    def fill(parser: ArgumentParser) -> None:
        parser.add_argument("--config", action="config", help="YAML file, or the name of a preset")
        parser.add_argument("--engine", type=EngineName, default="jax", help="which engine does the work")
        parser.add_class_arguments(config_class, as_group=True)

    return fill


def _config(values: Any, config_class: type) -> Any:
    return config_class(**{field.name: values[field.name] for field in fields(config_class)})


def _cpt(values: Any) -> dict[str, Any]:
    from medllm.stages import run_cpt

    result = run_cpt(_config(values, CptConfig), values.engine)
    rate = f"{result['rate']:.0f} tokens/s{_remat(result)}"
    _say(f"cpt: {result['steps']} steps, loss {result['loss']:.4f}, {rate}; {result['adapter']}")
    return result


def _remat(result: dict[str, Any]) -> str:
    """What was kept for the backward pass, where the engine chose."""
    return f", remat {result['remat']}" if result["remat"] else ""


def _curate(values: Any) -> dict[str, Any]:
    from medllm.stages import PREFERENCES, run_curate

    config = _config(values, CurateConfig)
    with _progress("curate") as progress:
        result = run_curate(config, values.engine, progress)
    counts = ", ".join(f"{name} {value}" for name, value in result.items() if isinstance(value, int))
    _say(f"curate: {counts}; {Path(config.run) / PREFERENCES}")
    return result


def _rpo(values: Any) -> dict[str, Any]:
    from medllm.stages import run_rpo

    result = run_rpo(_config(values, RpoConfig), values.engine)
    rate = f"{result['rate']:.2f} pairs/s{_remat(result)}"
    _say(f"rpo: {result['steps']} steps, loss {result['loss']:.4f}, {rate}; {result['adapter']}")
    return result


def _evaluate(values: Any) -> dict[str, Any]:
    from medllm.stages import run_evaluate

    config = _config(values, EvaluateConfig)
    with _progress("evaluate") as progress:
        result = run_evaluate(config, values.engine, progress)
    if config.method == "options":
        shares = f"{result['accuracy']:.3f} right, {result['normalized_accuracy']:.3f} by likelihood per token"
        _say(f"evaluate: {result['setting']}: {shares}, {result['questions']} questions; {config.run}")
    else:
        _say(f"evaluate: {result['setting']}: {_points(result['score'])}; {config.run}")
    return result


def _score_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--problems", type=str, required=True, help="problem file or folder")
    parser.add_argument("--predictions", type=str, required=True, help="prediction file, folder or pattern (JSONL)")
    parser.add_argument("--lenient", type=bool, default=False, help="forgive spaces; the official score does not")


def _score(values: Any) -> dict[str, Any]:
    from medllm.exam.loaders import load_problems
    from medllm.exam.scoring import read_predictions, score

    problems = load_problems(values.problems).problems
    result = score(problems, read_predictions(values.predictions), lenient=values.lenient).to_json()
    _say(f"score: {_points(result)}")
    return result


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=str, nargs="+", help="run folders of any stage")
    parser.add_argument("--out", type=str, default="report.html", help="the page to write")
    parser.add_argument(
        "--previous", type=dict[str, str] | None, default=None, help="which model each is compared with, {B: A}"
    )


def _report(values: Any) -> dict[str, Any]:
    from medllm.report.page import report_from_runs, write_report

    write_report(Path(values.out), report_from_runs([Path(run) for run in values.runs], previous=values.previous))
    _say(f"report: {values.out}")
    return {"report": values.out}


def _convert_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=str, required=True, help="base model folder (unquantized)")
    parser.add_argument("--adapter", type=tuple[str, ...], default=(), help="PEFT adapter folder to merge, or several in order")
    parser.add_argument("--out", type=str, required=True, help="folder of the model to write")
    parser.add_argument("--quantization", type=Quantization, default="none", help="nf4, nf4-single: as bitsandbytes stores it")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16"], default="bfloat16", help="where quantized: type of the dense weights"
    )
    parser.add_argument(
        "--held_text", type=str | None, default=None, help="also measure on this text what each hand-over of the adapter costs"
    )
    parser.add_argument("--text_column", type=str, default="text", help="column of held_text that holds a document's text")


def _convert(values: Any) -> dict[str, Any]:
    from medllm.conversion import convert_model
    from medllm.handover import handover_table

    with _progress("convert") as progress:
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
    if "handovers" in result:
        _say(handover_table(result))
    _say(f"convert: {values.out}")
    return result


def _parity_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_class_arguments(AuditConfig, as_group=True, skip={"bisect"})
    parser.add_argument("--bisect", action="store_true", help="stop at the first module where the two part, and name it")
    parser.add_argument("--out", type=str, default="runs/parity", help="folder of result.json and audit.html")
    parser.set_defaults({"model.dtype": "float32"})  # the sharper eye


def _parity(values: Any) -> dict[str, Any]:
    out = Path(values.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    require("medllm parity", "jax", "jax")
    require("medllm parity", "torch", "torch")
    audits = importlib.import_module("medllm_parity.audit")
    pages = importlib.import_module("medllm_parity.page")
    with _progress("parity") as progress:
        audit = audits.run_audit(_config(values, AuditConfig), progress)
    result = pages.write_audit(out, audit)
    for line in pages.summary(audit):
        _say(line)
    _say(f"parity: {out / pages.PAGE}")
    return result


def _mini_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--engine", type=Literal["jax", "torch"], default="jax", help="which engine does the work")
    parser.add_argument("--preset", type=str, default="mini", help="name of a mini preset, or a YAML file")
    parser.add_argument("--out", type=str, default="runs/mini", help="folder of the study")


def _mini(values: Any) -> dict[str, Any]:
    from medllm.mini.study import run_and_report

    return run_and_report(values.engine, Path(values.out), values.preset, _say)


def _actions(parser: ArgumentParser) -> Callable[[str, str], ArgumentParser]:
    """How the actions of a command with several (``medllm data ACTION``) are added, with their help lines."""
    actions = parser.add_subcommands(required=True, dest="action", metavar="ACTION")

    def add(name: str, help: str) -> ArgumentParser:
        action = ArgumentParser(description=help, exit_on_error=False, allow_abbrev=False)
        _add_json(action)
        actions.add_subcommand(name, action, help=help)
        return action

    return add


def _plan_arguments(parser: ArgumentParser) -> None:
    from medllm.plan.command import add_arguments

    add_arguments(parser)


def _plan(values: Any) -> dict[str, Any]:
    from medllm.plan.command import run

    return run(values, _say)


def _bench_arguments(parser: ArgumentParser) -> None:
    importlib.import_module("medllm.bench.command").add_actions(_actions(parser))


def _bench(values: Any) -> dict[str, Any]:
    return importlib.import_module("medllm.bench.command").run(values.action, values[values.action], _say)


def _data_arguments(parser: ArgumentParser) -> None:
    add = _actions(parser)
    export = add("export-trl", "preferences → TRL's prompt/chosen/rejected rows")
    export.add_argument("--preferences", type=str, required=True, help="preference file")
    export.add_argument("--out", type=str, required=True, help="JSONL file to write")
    export.add_class_arguments(PairConfig, "pairs")
    random = add("random-model", "a small Qwen2.5 with random weights, for trying out a pipeline")
    random.add_argument("--tokenizer", type=str, required=True, help="folder whose tokenizer the model gets")
    random.add_argument("--out", type=str, required=True, help="model folder to write")
    random.add_argument("--vocab_size", type=int, default=152064, help="rows of the embedding")
    random.add_argument("--hidden_size", type=int, default=64, help="width, a multiple of 32")
    random.add_argument("--layers", type=int, default=2, help="decoder layers")
    random.add_argument("--seed", type=int, default=0, help="seed of the weights")
    leaks = add("leaks", "exam questions found in training text")
    leaks.add_argument("--documents", type=list[str], required=True, help="training files or folders")
    leaks.add_argument("--problems", type=str, required=True, help="problem file or folder")
    leaks.add_argument("--text_column", type=str, default="text", help="column that holds a document's text")
    leaks.add_argument("--threshold", type=float, default=0.8, help="share of a question's 13-character pieces")


def _data(values: Any) -> dict[str, Any]:
    action = values.action
    return _DATA_ACTIONS[action](values[action])


def _export_trl(values: Any) -> dict[str, Any]:
    from medllm.preferences.pairs import export_trl
    from medllm.preferences.records import read_preferences

    rows = export_trl(read_preferences(values.preferences), Path(values.out), values.pairs)
    _say(f"data: {rows} rows; {values.out}")
    return {"rows": rows, "out": values.out}


def _random_model(values: Any) -> dict[str, Any]:
    from medllm.random_model import write_random_model

    write_random_model(
        values.out,
        tokenizer=values.tokenizer,
        vocab_size=values.vocab_size,
        hidden_size=values.hidden_size,
        layers=values.layers,
        seed=values.seed,
    )
    _say(f"data: {values.out}")
    return {"model": values.out}


def _leaks(values: Any) -> dict[str, Any]:
    from medllm.config import CorpusConfig
    from medllm.corpus.contamination import find_leaks
    from medllm.corpus.documents import load_documents
    from medllm.exam.loaders import load_problems

    if not 0 < values.threshold <= 1:
        raise UserError(f"--threshold is {values.threshold}; expected a share in (0, 1]")
    corpus = load_documents(CorpusConfig(documents=tuple(values.documents), text_column=values.text_column))
    found = find_leaks(corpus.documents, load_problems(values.problems).problems, threshold=values.threshold)
    for leak in found:
        _say(f"{leak.problem_id}: {leak.overlap:.0%} stands in {leak.source}")
    _say(f"data: {len(found)} leaks")
    return {"leaks": [{"problem_id": leak.problem_id, "source": leak.source, "overlap": leak.overlap} for leak in found]}


_WITH_ACTIONS = ("data", "bench")
_DATA_ACTIONS = {"export-trl": _export_trl, "random-model": _random_model, "leaks": _leaks}

COMMANDS = {
    "mini": Command("run the embedded study from end to end", _mini_arguments, _mini),
    "cpt": Command("stage 1: continued pretraining", _stage_arguments(CptConfig), _cpt),
    "curate": Command("build preference data from the model's own answers", _stage_arguments(CurateConfig), _curate),
    "rpo": Command("stage 2: reasoning preference optimization (or DPO)", _stage_arguments(RpoConfig), _rpo),
    "evaluate": Command("sit an exam", _stage_arguments(EvaluateConfig), _evaluate),
    "score": Command("score predictions officially", _score_arguments, _score),
    "report": Command("one HTML page from run folders", _report_arguments, _report),
    "convert": Command("merge adapters into their base model, or store it in 4 bits", _convert_arguments, _convert),
    "parity": Command("audit a checkpoint in both stacks, layer by layer", _parity_arguments, _parity),
    "plan": Command("what a stage takes on devices you do not have: memory, communication, time", _plan_arguments, _plan),
    "bench": Command("what training, evaluation and opening a checkpoint cost on this machine", _bench_arguments, _bench),
    "data": Command("export preferences, find leaks, make a random model", _data_arguments, _data),
}


# --- words on the command line ----------------------------------------------------------------------------------------------


def _one_line(error: Exception, argv: list[str]) -> str:
    text = re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1.", " ".join(str(error).split()))
    if text.startswith("the following arguments are required:") and argv:
        text = text.replace(f" {argv[0]}.", " --")
    unknown = text.removeprefix("unrecognized arguments: ").split() if text.startswith("unrecognized arguments") else []
    word = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
    if word is None:
        return text
    near = difflib.get_close_matches(word, _known_options(argv), n=1, cutoff=0.75)
    return f"{text} (did you mean {near[0]}?)" if near else f"{text} (see medllm {argv[0]} --help)"


def _known_options(argv: list[str]) -> list[str]:
    if not argv or argv[0] not in COMMANDS:
        return []
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    COMMANDS[argv[0]].arguments(parser)
    return [option for action in parser._actions for option in action.option_strings]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _points(score: dict[str, Any]) -> str:
    share = score["points"] / score["possible"] if score["possible"] else 0.0
    return f"{score['points']} of {score['possible']} points ({share:.3f}), {score['correct']} of {score['questions']} right"


def _say(line: str) -> None:
    if is_primary_process():
        print(line, flush=True)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, of one process; silent where nobody watches."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def report(done: int, total: int) -> None:
            if is_primary_process():  # which is known once the engine is open
                bar.update(task, completed=done, total=total)
            else:
                bar.stop()

        yield report


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter off a user's screen; nothing here changes what is computed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is a folder; nothing is ever fetched
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    sys.exit(main())
