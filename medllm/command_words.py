"""Words on the command line that jsonargparse does not know by itself.

Commands and options that are not there, and what was meant; names of presets; lists without brackets.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from medllm.command import Command, Group
from medllm.errors import UserError
from medllm.presets import preset_settings

# What other programs, and the field, call a command or a setting: the last part of its name here.
_COMMANDS_MEANT = {
    **dict.fromkeys(("pretrain", "pretraining", "finetune", "sft"), "cpt"),
    **dict.fromkeys(("dpo", "orpo", "preference", "align"), "rpo"),
    **dict.fromkeys(("train", "fit"), "cpt rpo"),
    **dict.fromkeys(("generate", "sample", "preferences"), "curate"),
    **dict.fromkeys(("eval", "exam", "test", "predict"), "evaluate"),
    **dict.fromkeys(("grade", "mark"), "score"),
    **dict.fromkeys(("merge", "quantize"), "convert"),
    **dict.fromkeys(("audit", "compare", "verify"), "parity"),
    **dict.fromkeys(("memory", "estimate"), "plan"),
    **dict.fromkeys(("speed", "profile"), "bench"),
    **dict.fromkeys(("demo", "study", "quickstart"), "mini"),
}
_SETTINGS_MEANT = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "r": "rank",
    **dict.fromkeys(("bs", "per_device_train_batch_size", "micro_batch_size"), "batch_size rows"),
    **dict.fromkeys(("steps", "iters", "iterations"), "max_steps steps"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps"), "accumulation"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip"), "clip_norm"),
    **dict.fromkeys(("seq_len", "seq_length", "max_seq_length", "context", "max_length"), "length max_length"),
    **dict.fromkeys(("gradient_checkpointing", "checkpointing"), "remat"),
    **dict.fromkeys(("target_modules", "modules"), "targets"),
    **dict.fromkeys(("name", "base", "base_model", "weights", "model_path", "model_name", "model_name_or_path"), "path model"),
    **dict.fromkeys(("data", "dataset", "corpus", "text", "texts"), "documents problems preferences text"),
    **dict.fromkeys(("questions", "exam", "test_file"), "problems"),
    **dict.fromkeys(("out", "output", "output_dir", "save_dir", "folder"), "run out"),
    **dict.fromkeys(("precision", "bf16", "fp16"), "dtype"),
    **dict.fromkeys(("quant", "bits", "load_in_4bit", "nf4"), "quantization"),
    **dict.fromkeys(("fewshot", "num_fewshot", "n_shot"), "shot_count"),
    **dict.fromkeys(("cot", "reasoning"), "explanation"),
    **dict.fromkeys(("temp",), "temperature"),
    **dict.fromkeys(("max_tokens", "new_tokens"), "max_new_tokens"),
    **dict.fromkeys(("n", "num_samples"), "samples limit"),
    **dict.fromkeys(("backend", "framework"), "engine"),
    **dict.fromkeys(("gpus", "devices", "sharding", "parallel"), "mesh target"),
    **dict.fromkeys(("log", "logging_steps"), "log_every"),
    **dict.fromkeys(("save_steps", "save_every"), "checkpoint_every checkpoint_minutes"),
    **dict.fromkeys(("save_total_limit", "max_to_keep"), "keep"),
    **dict.fromkeys(("report_to", "wandb", "mlflow", "tensorboard", "trackio"), "tracker"),
    **dict.fromkeys(("preset", "settings"), "config preset"),
}


def find_command(words: Sequence[str], commands: Mapping[str, Command | Group]) -> tuple[str, Command, list[str]]:
    """The command that a command line names, as it is called (``data leaks``), and the words after it.

    Raises:
        UserError: it names none; says which were meant, or which there are.
    """
    name, *rest = words
    chosen = _chosen(name, commands, "there is")
    if isinstance(chosen, Command):
        return name, chosen, rest
    actions = chosen.actions()
    if not rest:
        raise UserError(f"{name} is several commands: {', '.join(actions)} (see medllm {name} --help)")
    return f"{name} {rest[0]}", _chosen(rest[0], actions, f"{name} has"), rest[1:]


def _chosen(name: str, commands: Mapping[str, Any], there_is: str) -> Any:
    if name in commands:
        return commands[name]
    if name.startswith("-"):
        raise UserError(f"{name} comes after a command, one of {', '.join(commands)}")
    meant = near(name, commands, _COMMANDS_MEANT)
    said = f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(commands)}"
    raise UserError(f"{there_is} no command '{name}'; {said}")


def options_of(parser: ArgumentParser) -> dict[str, Any]:
    """Its options, ``--model.path``, with what jsonargparse knows of each; not those that stand for a whole config class."""
    options = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    return {option: action for option, action in options.items() if not any(one.startswith(f"{option}.") for one in options)}


def kind_of(action: Any) -> Any:
    """The type annotation of an option; None where it takes no value, or a file of settings."""
    return getattr(action, "_typehint", None) or action.type


def check_options(name: str, words: Sequence[str], parser: ArgumentParser) -> None:
    """Refuse options that the command called ``name`` does not have.

    Raises:
        UserError: says which were meant.
    """
    options = options_of(parser)
    tables = [one for one, action in options.items() if any(get_origin(part) is dict for part in parts(kind_of(action)))]
    open_ended = tuple(f"{table}." for table in tables)  # --lora.rank_pattern.q_proj 8
    for word in words:
        option = word.split("=")[0]
        known = option in options or option in parser._option_string_actions or option.startswith(open_ended)
        if option.startswith("--") and not known:
            meant = near(option, options, _SETTINGS_MEANT)
            said = f"; did you mean {' or '.join(meant)}?" if meant else ""
            raise UserError(f"{name} has no option {option}{said} (see medllm {name} --help all)")


def near(word: str, known: Iterable[str], meant: Mapping[str, str]) -> list[str]:
    """Which of ``known`` a word was meant to be, three at most: by meaning, then by a part of the name, then by spelling.

    Args:
        word: What was written.
        known: Names of commands, or options with dots.
        meant: The last parts of names that a word means.
    """
    asked = _plain(word)
    leaf = asked.rsplit(".", 1)[-1]
    names = {_plain(one): one for one in known}
    leaves = {name: name.rsplit(".", 1)[-1] for name in names}
    wanted = {leaf, *meant.get(leaf, "").split()}
    by_name = [name for name in names if name.replace(".", "_") == asked]
    by_meaning = [name for name, end in leaves.items() if end in wanted]
    by_part = [name for name, end in leaves.items() if len(leaf) > 2 and (_begins(leaf, end) or end in leaf.split("_"))]
    spelt = difflib.get_close_matches(asked, names, n=1, cutoff=0.75)
    close = difflib.get_close_matches(leaf, leaves.values(), n=1, cutoff=0.6)
    by_leaf = [name for name, end in leaves.items() if end in close]
    found = next(filter(None, (by_name, by_meaning, by_part, spelt, by_leaf)), [])
    return [names[name] for name in found[:3]]


def _plain(word: str) -> str:
    return word.strip("-").lower().replace("-", "_")


def _begins(leaf: str, end: str) -> bool:
    return any(part.startswith(leaf) for part in (end, *end.split("_")))


def name_presets(words: Sequence[str], pattern: str) -> list[str]:
    """``--config paper_cpt_72b`` → the preset's file, or its YAML, where its name fits ``pattern``.

    Raises:
        UserError: neither a file nor such a preset.
    """
    parted = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    return [
        preset_settings(before, word, pattern) if before == "--config" else word for before, word in pairwise(["", *parted])
    ]


def gather_lists(words: Sequence[str], parser: ArgumentParser) -> list[str]:
    """``--problems A B`` → ``--problems ["A", "B"]``, for the options of ``parser`` that hold several values."""
    lists = {option: kind for option, action in options_of(parser).items() if elements(kind := kind_of(action))}
    gathered: list[str] = []
    rest = list(words)
    while rest:
        option = rest.pop(0)
        gathered.append(option)
        if option not in lists:
            continue
        values = list(takewhile(lambda word: not word.startswith("--"), rest))
        del rest[: len(values)]
        # Where one is a plain string in a preset, it is one here.
        if len(values) == 1 and (values[0].startswith("[") or str in parts(lists[option])):
            gathered += values
        elif values:
            texts = str in elements(lists[option])
            gathered.append(json.dumps(values, ensure_ascii=False) if texts else f"[{', '.join(values)}]")
    return gathered


def elements(kind: Any) -> tuple[Any, ...]:
    """The types of a list's or tuple's elements, also where ``kind`` is a list or something else; none of other types."""
    return next((get_args(part) for part in parts(kind) if get_origin(part) in (tuple, list)), ())


def parts(kind: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: those of a union, else itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def check_sections(where: str, settings: Mapping[str, Any], parser: ArgumentParser) -> None:
    """Hold a file of settings against the options of ``parser``, as far as jsonargparse would take it for something else.

    It takes a text for the path of another file, where the settings of a section should be.

    Raises:
        UserError: a section is no mapping, a class is named, or a text holds a NUL.
    """

    names = [option.removeprefix("--").split(".") for option in options_of(parser)]
    sections = {".".join(name[:depth]) for name in names for depth in range(1, len(name))}

    def check(prefix: str, value: Any) -> None:
        if prefix.rsplit(".", 1)[-1] in ("class_path", "init_args"):
            raise UserError(f"{where}: {prefix} names a class; settings are values alone, and no code is run for them")
        if isinstance(value, dict):
            for name, one in value.items():
                check(f"{prefix}.{name}" if prefix else str(name), one)
        elif prefix in sections:
            raise UserError(f"{where}: {prefix} is {str(value)[:100]!r}; expected its settings by name")
        elif "\0" in str(value):
            raise UserError(f"{where}: {prefix} holds a NUL; no path or text has one")

    check("", dict(settings))


def refuse_unusable(values: Namespace, parser: ArgumentParser) -> None:
    """Refuse what fits an option's type and nothing it stands for.

    A text of no characters is as a path the working folder, and as a pattern matches anything or nothing.

    Raises:
        UserError: an option holds, alone or in a list, and not by default, such a text, no finite number, or a larger one than
            arrays have places.
    """
    defaults, options = dict(parser.get_defaults().items()), options_of(parser)
    for name, value in values.items():
        kinds = parts(kind_of(options[f"--{name}"])) if f"--{name}" in options else ()
        if value is None and defaults.get(name) is not None and type(None) not in kinds:
            raise UserError(f"--{name} is null; give it a value, or leave it out for {defaults[name]}")
        several = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if value == defaults.get(name):
            continue
        if "" in several or (isinstance(value, dict) and "" in value):
            raise UserError(f"--{name} holds an empty text; give it a value, or leave the option out")
        for number in several:
            if isinstance(number, int | float) and not abs(number) <= _LARGEST:
                raise UserError(f"--{name} is {str(number)[:40]}; expected a number of at most {_LARGEST}")


_LARGEST = 2**31 - 1
