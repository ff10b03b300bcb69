"""``medllm publish``: a directory that is ready to be served, and says what it is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medllm.config import ModelConfig, Sampling
from medllm.errors import UserError
from medllm.exam.endings import EndingCounts
from medllm.model.adapter import WEIGHTS, open_adapters, refuse_packed
from medllm.model.directory import ModelDirectory, copy_companions, write_model
from medllm.model.endings import GENERATION
from medllm.model.files import ADAPTER
from medllm.model.tokenizer import load_tokenizer
from medllm.quantization import PACKINGS
from medllm.report.runs import read_cell, read_run
from medllm.report.study import RunSummary
from medllm.run import atomic_path, write_json
from medllm.serving.card import Published, model_card
from medllm.serving.contract import Contract, check_contract, contract_of, plain_replies
from medllm.serving.taught import Taught
from medllm.stage_config import PublishConfig
from medllm.stages.convert import convert_model
from medllm.text_files import read_json_object

_TRAINING = ("cpt", "rpo")
_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def run_publish(config: PublishConfig) -> dict[str, Any]:
    """Write ``config.out``: weights, tokenizer, chat template, generation config and model card; all of it or nothing.

    Raises:
        UserError: ``out`` exists, a folder cannot be used, no training run is among ``config.runs``, or the training
            contradicts the contract (:func:`medllm.serving.contract.check_contract`).
    """
    out, model = Path(config.out), ModelConfig(config.model, config.adapter or None)
    if out.exists():
        raise UserError(f"{out}: already exists; give another --out, or remove it")
    base = ModelDirectory(config.model)
    open_adapters(model.adapters, base)
    if config.weights == "adapter" and len(model.adapters) != 1:
        raise UserError(f"--weights adapter publishes one adapter beside its base, {len(model.adapters)} are given (--adapter)")
    if config.weights != "adapter" and model.adapters:
        refuse_packed(base)
    runs = {path: read_run(path) for path in _runs(config)}
    training = {path: run for path, run in runs.items() if run.stage in _TRAINING}
    taught = {path: Taught.from_json(run.result.get("taught"), Path(path) / "result.json") for path, run in training.items()}
    if not training:
        raise UserError("what the model was taught is read from its training runs: give their folders (--runs)")
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    own = {path: run for path, run in runs.items() if run.stage == "evaluate" and _same_model(run, model)}
    contract = contract_of(tokenizer, base.path, list(taught.values()), config.chat_template, config.end_tokens)
    check_contract(
        contract,
        tokenizer,
        base,
        taught,
        kept_template=config.chat_template == "keep" and contract.chat_template is not None,
        sat_chats=any(run.config["format"] == "chat" and _ends_itself(run) for run in own.values()),
    )
    sampling = next((run.config["sampling"] for run in reversed(own.values())), asdict(Sampling()))
    with atomic_path(out) as scratch:
        _write_weights(config, base, model.adapters, scratch)
        _write_tokenizer(config, tokenizer, contract, scratch)
        write_json(scratch / GENERATION, contract.generation_config(sampling))
        card = model_card(_published(config, contract, tokenizer, runs, training, own))
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return {
        "out": config.out,
        "weights": config.weights,
        "contract": asdict(contract),
        "runs": {path: run.stage for path, run in runs.items()},
    }


def _runs(config: PublishConfig) -> Sequence[str]:
    """The run folders given, and first those that the adapters lie in."""
    beside = [str(Path(adapter).parent) for adapter in config.adapter if (Path(adapter).parent / "result.json").exists()]
    return list({str(Path(path).resolve()): path for path in (*beside, *config.runs)}.values())


def _same_model(run: RunSummary, model: ModelConfig) -> bool:
    """Whether an evaluation was of ``model``."""
    opened = ModelConfig(**run.config["model"])
    return _places((opened.path, *opened.adapters)) == _places((model.path, *model.adapters))


def _places(paths: Sequence[str]) -> list[Path]:
    return [Path(path).resolve() for path in paths]


def _ends_itself(run: RunSummary) -> bool:
    endings = EndingCounts.from_json(run.result.get("endings"))
    return endings is not None and endings.run_on == endings.cut_off == 0


def _write_weights(config: PublishConfig, base: ModelDirectory, adapters: Sequence[str], folder: Path) -> None:
    if config.weights == "adapter":
        folder.mkdir()
        shutil.copyfile(Path(adapters[0]) / WEIGHTS, folder / WEIGHTS)
        settings = read_json_object(Path(adapters[0]) / ADAPTER, "a PEFT folder has one")
        write_json(folder / ADAPTER, settings | {"base_model_name_or_path": config.model})
    elif adapters or config.weights in PACKINGS:
        convert_model(config.model, str(folder), adapters, quantization="none" if config.weights == "dense" else config.weights)
    else:
        write_model(folder, base.config, ((name, base.read(name)) for name in base.names()))


def _write_tokenizer(config: PublishConfig, tokenizer: Any, contract: Contract, folder: Path) -> None:
    """The tokenizer's files as they are, but for the contract's template and tokens; and these in the model's config."""
    copy_companions(Path(config.tokenizer or config.model), folder)
    settings = read_json_object(folder / _SETTINGS, "a tokenizer has one") if (folder / _SETTINGS).exists() else {}
    settings.pop("chat_template", None)
    if config.chat_template == "plain":
        settings["response_template"] = plain_replies(tokenizer.convert_ids_to_tokens(list(contract.ends)))
    (folder / _TEMPLATE).unlink(missing_ok=True)
    if contract.chat_template is not None:
        (folder / _TEMPLATE).write_text(contract.chat_template, encoding="utf-8")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in contract.ends else contract.ends[0]
    end_token, pad_token = tokenizer.convert_ids_to_tokens([end, contract.pad])
    write_json(folder / _SETTINGS, {**settings, "eos_token": end_token, "pad_token": pad_token})
    if config.weights != "adapter":
        described = read_json_object(folder / "config.json", "it was just written")
        ends = contract.generation_config(asdict(Sampling()))["eos_token_id"]
        write_json(folder / "config.json", {**described, "eos_token_id": ends, "pad_token_id": contract.pad})


def _published(
    config: PublishConfig,
    contract: Contract,
    tokenizer: Any,
    runs: Mapping[str, RunSummary],
    training: Mapping[str, RunSummary],
    own: Mapping[str, RunSummary],
) -> Published:
    name = config.name or Path(config.out).name
    cells = {path: read_cell(run, path) for path, run in runs.items() if run.stage == "evaluate"}
    ids = (*contract.ends, *contract.begins)
    return Published(
        name=name,
        base=Path(next(iter(training.values())).config["model"]["path"]).name,
        license=config.license,
        weights=config.weights,
        contract=contract,
        tokens=dict(zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)),
        training=training,
        cells={path: dataclasses.replace(cell, model=name) if path in own else cell for path, cell in cells.items()},
    )
