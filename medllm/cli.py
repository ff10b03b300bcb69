"""The ``medllm`` command: a thin shell over :mod:`medllm.stages` and its neighbours, one function a subcommand.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input. A user error is one line on standard error; ``--debug`` shows the
traceback. Nothing heavier than the configuration is imported before a command is known.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jsonargparse import ArgumentError, ArgumentParser

from medllm import __version__
from medllm.ablate_command import ABLATE
from medllm.command import Command, Group, say
from medllm.command_help import command_page, group_page, overview
from medllm.command_words import check_options, check_sections, find_command, gather_lists, name_presets, refuse_unusable
from medllm.convert_command import CONVERT
from medllm.engines import EngineName, TrainerName, load, require_engine
from medllm.errors import Stopped, UserError
from medllm.host.faults import explained
from medllm.host.processes import ended, is_primary_process, tell
from medllm.host.progress import progress_bar
from medllm.power_command import POWER
from medllm.presets import TABLE_ROWS
from medllm.replay_command import REPLAY
from medllm.report_command import report_arguments, write_and_say
from medllm.rounds_command import ROUNDS
from medllm.score_command import score_arguments, score_predictions
from medllm.serving_command import CHECK_SERVING, PUBLISH
from medllm.stage_config import AuditConfig, CptConfig, CurateConfig, EvaluateConfig, RpoConfig
from medllm.text_files import first_line, read_yaml
from medllm.verify_command import VERIFY
from medllm.verify_mesh_command import VERIFY_MESH

if TYPE_CHECKING:
    from medllm.training import TrainSummary


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (``sys.argv`` when None) and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    _quiet_libraries()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except (UserError, ArgumentError, UnicodeDecodeError) as error:
        if debug:
            raise
        if isinstance(error, UnicodeDecodeError):
            error = UserError("a file named on the command line is not UTF-8 text")
        print(f"medllm: {_one_line(error)}", file=sys.stderr)
        return ended(2)
    except Stopped as stopped:
        tell(f"{stopped}; go on with: {_same_again(argv)}")
        return 0
    except KeyboardInterrupt:
        print("medllm: interrupted", file=sys.stderr)
        return ended(1)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            return 141  # as a shell has it of what SIGPIPE ended
        if debug:
            raise
        if (known := explained(error)) is not None:
            print(f"medllm: {known}", file=sys.stderr)
            return ended(2)
        print(f"medllm: failed: {type(error).__name__}: {first_line(error)} (--debug shows the traceback)", file=sys.stderr)
        return ended(1)


def _has_no_reader(output: TextIO) -> bool:
    """Whether what read the output, such as ``head``, has gone; what is left of it is then dropped."""
    try:
        print(file=output, flush=True)  # what failed before is no longer in its buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        return True
    return False


def _run(argv: list[str]) -> int:
    if not argv:
        print(overview(COMMANDS), file=sys.stderr)
        return 2
    page = _page(argv)
    if page is not None:
        print(page, flush=True)
        sys.exit(0)
    name, command, words = find_command(argv, COMMANDS)
    values = parse(name, command, words)
    target = values.json
    if target is not None and (Path(target).is_dir() or not Path(target).absolute().parent.is_dir()):
        raise UserError(f"--json {target}: no file can be written there; name a file in a folder that exists")
    result = command.run(values)
    if result is not None and target is not None and is_primary_process():
        from medllm.run import write_json

        write_json(Path(target), result)
    return 1 if isinstance(result, dict) and result.get("ok") is False else 0


def parse(name: str, command: Command, words: list[str]) -> Any:
    """The values that ``words`` give the options of the command called ``name``.

    Raises:
        UserError, ArgumentError: an option that the command does not have, a value that does not fit, one that is missing.
    """
    parser = command.parser()
    check_options(name, words, parser)
    named = name_presets(words, command.presets)
    for before, file in pairwise(named):
        if before == "--config" and "\n" not in file:  # a row of the paper's tables is YAML itself, and ours
            check_sections(file, read_yaml(Path(file)), parser)
    values = parser.parse_args(gather_lists(named, parser))
    refuse_unusable(values, parser)
    return parser.instantiate(values)


def _page(argv: list[str]) -> str | None:
    """What a command line asks to be told, where it does not ask for a command to run."""
    asked = {"--help", "-h", "--help=all"} & set(argv)
    if argv[:1] == ["--version"]:
        return f"medllm {__version__}"
    if argv[:1] == ["--completion"]:
        from medllm.completion import completion_script

        return completion_script(" ".join(argv[1:]), COMMANDS)
    if argv[0] in asked:
        return overview(COMMANDS)
    if not asked:
        return None
    group = COMMANDS.get(argv[0])
    if isinstance(group, Group) and (len(argv) < 2 or argv[1] in asked):
        return group_page(argv[0], group)
    name, command, words = find_command(argv, COMMANDS)
    return command_page(name, command, everything="--help=all" in words or words[-2:] in (["--help", "all"], ["-h", "all"]))


# --- the commands ---------------------------------------------------------------------------------------------------------


def _stage_arguments(config_class: type, engines: Any) -> Callable[[ArgumentParser], None]:
    def fill(parser: ArgumentParser) -> None:
        parser.add_argument("--config", action="config", help="YAML file, or the name of a preset")
        parser.add_argument("--engine", type=engines, default="jax", help="which engine does the work")
        parser.add_class_arguments(config_class, as_group=True)

    return fill


def _config(values: Any, config_class: type) -> Any:
    return config_class(**{field.name: values[field.name] for field in fields(config_class)})


def _cpt(values: Any) -> dict[str, Any]:
    from medllm.stages.cpt import run_cpt

    result = run_cpt(_config(values, CptConfig), values.engine)
    say(f"cpt: {_trained(result.summary, f'{result.summary.rate:.0f} tokens/s')}{_control_tokens(result)}")
    return result.to_json()


def _trained(summary: TrainSummary, rate: str) -> str:
    """A training in a line, with what was kept for the backward pass where the engine chose."""
    remat = f", remat {summary.remat}" if summary.remat else ""
    return f"{summary.steps} steps, loss {summary.loss:.4f}, {rate}{remat}; {summary.adapter}"


def _control_tokens(result: Any) -> str:
    found = ", ".join(f"{token} {count}" for token, count in result.control_tokens.items())
    return f"; control tokens written out in the texts: {found}" if found else ""


def _curate(values: Any) -> dict[str, Any]:
    from medllm.remote.spending import Estimate
    from medllm.stages.curate import PREFERENCES, run_curate

    config = _config(values, CurateConfig)
    with progress_bar("curate", "problems") as progress:
        result = run_curate(config, values.engine, progress)
    if isinstance(result, Estimate):
        say(result.words())
        return result.to_json()
    counts = ", ".join(f"{name} {value}" for name, value in vars(result.report).items() if isinstance(value, int))
    say(f"curate: {counts}; {Path(config.run) / PREFERENCES}{_control_tokens(result)}")
    return result.to_json()


def _rpo(values: Any) -> dict[str, Any]:
    from medllm.stages.rpo import run_rpo

    result = run_rpo(_config(values, RpoConfig), values.engine)
    dropped = "".join(f"; {count} pairs dropped: {reason}" for reason, count in result.dropped_pairs.items())
    say(f"rpo: {_trained(result.summary, f'{result.summary.rate:.2f} pairs/s')}{dropped}{_control_tokens(result)}")
    return result.to_json()


def _evaluate(values: Any) -> dict[str, Any]:
    from medllm.remote.spending import Estimate
    from medllm.report.paper import published_value
    from medllm.stages.evaluate import OptionsResult, run_evaluate

    config = _config(values, EvaluateConfig)
    with progress_bar("evaluate", "problems") as progress:
        result = run_evaluate(config, values.engine, progress)
    if isinstance(result, Estimate):
        say(result.words())
        return result.to_json()
    if isinstance(result, OptionsResult):
        scores, share = result.scores, result.share
        shares = f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}] right, {scores.normalized_accuracy:.3f} per token"
        line = f"{shares}, {len(scores.results)} questions"
    else:
        ended = f"{result.endings.words()}; {result.readings.words()}"
        line = f"{result.score.words()}; {ended}"
    published = published_value(result.model, result.setting, result.problem_set)
    line += "" if published is None else f"; published {published:.3f}"
    say(f"evaluate: {result.setting}: {line}; {config.run}{_control_tokens(result)}")
    return result.to_json()


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
    require_engine("jax", "medllm parity")
    require_engine("torch", "medllm parity")
    audits, pages = load("parity", "audit"), load("parity", "page")
    with progress_bar("parity") as progress:
        audit = audits.run_audit(_config(values, AuditConfig), progress)
    result = pages.write_audit(out, audit)
    for line in pages.summary(audit):
        say(line)
    say(f"parity: {out / pages.PAGE}")
    return result


def _mini_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--engine", type=TrainerName, default="jax", help="which engine does the work")
    parser.add_argument("--preset", type=str, default="mini", help="name of a preset, or a YAML file")
    parser.add_argument("--out", type=str, default="runs/mini", help="folder of the study")


def _mini(values: Any) -> dict[str, Any]:
    from medllm.mini.report import run_and_report

    return run_and_report(values.engine, Path(values.out), values.preset, say)


def _plan_arguments(parser: ArgumentParser) -> None:
    from medllm.plan.command import add_arguments

    add_arguments(parser)


def _plan(values: Any) -> dict[str, Any]:
    from medllm.plan.command import run

    return run(values, say)


def _bench_actions() -> Mapping[str, Command]:
    from medllm.bench.command import ACTIONS

    return ACTIONS


def _data_actions() -> Mapping[str, Command]:
    from medllm.data_command import ACTIONS

    return ACTIONS


def _stage(
    name: str,
    help: str,
    config_class: type,
    run: Callable[[Any], dict[str, Any]],
    first: str,
    engines: Any = EngineName,
    more: str = "",
) -> Command:
    options = tuple(f"--{option}" for option in first.split())
    return Command(help, _stage_arguments(config_class, engines), run, options, presets=f"paper_{name}_* {more}".strip())


COMMANDS: dict[str, Command | Group] = {
    "mini": Command("run the embedded study from end to end", _mini_arguments, _mini, presets="mini*"),
    "ablate": ABLATE,
    "cpt": _stage(
        "cpt",
        "stage 1: continued pretraining",
        CptConfig,
        _cpt,
        "model.path run corpus.documents corpus.problems corpus.length model.quantization lora.rank optimizer.learning_rate "
        "training.epochs training.batch_size training.accumulation engine mesh",
        TrainerName,
    ),
    "curate": _stage(
        "curate",
        "build preference data from the model's own answers",
        CurateConfig,
        _curate,
        "model.path model.adapter run problems shots shot_count sampling.samples sampling.temperature sampling.max_new_tokens "
        "batch_size limit engine mesh",
    ),
    "rpo": _stage(
        "rpo",
        "stage 2: reasoning preference optimization, or another preference loss (--loss.name)",
        RpoConfig,
        _rpo,
        "model.path model.adapter handover run preferences loss.name loss.alpha model.quantization lora.rank "
        "optimizer.learning_rate training.epochs training.batch_size training.accumulation engine mesh",
        TrainerName,
    ),
    "rounds": ROUNDS,
    "evaluate": _stage(
        "evaluate",
        "sit an exam",
        EvaluateConfig,
        _evaluate,
        "model.path model.adapter run problems shots shot_count explanation method format sampling.max_new_tokens batch_size "
        "limit engine mesh",
        more=TABLE_ROWS,
    ),
    "score": Command("score predictions officially", score_arguments, score_predictions),
    "report": Command("tables and one HTML page from run folders", report_arguments, write_and_say),
    "power": POWER,
    "convert": CONVERT,
    "publish": PUBLISH,
    "check-serving": CHECK_SERVING,
    "replay": REPLAY,
    "verify": VERIFY,
    "verify-mesh": VERIFY_MESH,
    "parity": Command("audit a checkpoint in both stacks, layer by layer", _parity_arguments, _parity),
    "plan": Command(
        "what a stage takes on devices you do not have: memory, communication, time",
        _plan_arguments,
        _plan,
        ("--model", "--stage", "--target", "--mesh", "--rows", "--length", "--quantization", "--remat", "--search", "--html"),
    ),
    "bench": Group("what training, evaluation and opening a checkpoint cost on this machine", _bench_actions),
    "data": Group("export preferences, find leaks, make a random model", _data_actions),
}


# --- words ----------------------------------------------------------------------------------------------------------------


def _same_again(argv: list[str]) -> str:
    """The command that goes on where this one was stopped: itself, but for a ``--resume`` that would keep it from that."""
    return re.sub(r" --resume[ =]\S+", "", shlex.join(["medllm", *argv]))


def _one_line(error: Exception) -> str:
    text = re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1.", " ".join(str(error).split()))
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]\.", lambda words: f"expected one of {words[1]}.", text)
    missing = text.removeprefix("the following arguments are required: ")
    return text if missing == text else f"required: {', '.join(f'--{name}' for name in missing.split(', '))}"


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
