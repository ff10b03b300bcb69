"""A model card in Hugging Face's format: what a published model was trained on, how, what it scores, and what it is not.

Everything in it is read from run folders; what they do not say is not said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medllm.exam.endings import EndingCounts
from medllm.report.results import Cell, Score, build_table
from medllm.report.study import RunSummary
from medllm.report.tables import interval, number
from medllm.serving.contract import Contract
from medllm.text_files import read_yaml

NOTICE = (
    "This model is research software. It is not a medical device and gives no medical advice; it must not be used to diagnose "
    "or treat anybody. A score on an exam is not clinical safety."
)
_ADAPTER_ALONE = (
    "These are an adapter's weights. A server that opens a folder, as `transformers serve` does, opens this one once the base "
    "model's `config.json` and its weights (`*.safetensors`) are copied beside them. One that puts the adapter on the base "
    "model's folder reads where a text begins and ends from there, and not what is promised here."
)
_LIMITS = (
    "An answer can be right and the explanation before it wrong: explanations were not graded.",
    "Questions that need an image were asked without it.",
    "An exam that was public before the base model was trained may have been seen in that training.",
    "Under other prompts than the trained one it may go on behind its answer; `medllm check-serving` measures that.",
)


@dataclass(frozen=True)
class Published:
    """What a card is written from.

    Attributes:
        name: What the model is called.
        base: What its base model is called.
        license: By Hugging Face's identifiers.
        weights: ``dense``, ``nf4``, ``nf4-single`` or ``adapter``.
        contract: Where its texts begin and end.
        tokens: The texts of the contract's tokens, by id.
        training: The training runs, by their folder.
        cells: The evaluations, by their folder; those of the model itself are called ``name``.
    """

    name: str
    base: str
    license: str
    weights: str
    contract: Contract
    tokens: Mapping[int, str]
    training: Mapping[str, RunSummary]
    cells: Mapping[str, Cell]


def model_card(model: Published) -> str:
    """``README.md``: a YAML head and its sections."""
    table = build_table(list(model.cells.values()), previous={}) if model.cells else None
    scores = [(row.model, setting, score) for row in table.rows for setting, score in row.scores.items()] if table else []
    endings = {(cell.model, cell.setting): cell.endings for cell in model.cells.values()}
    head = yaml.safe_dump(_head(model, scores), sort_keys=False, allow_unicode=True)
    sections = {
        f"# {model.name}": [f"> {NOTICE}"],
        "## How it is asked": list(_asked(model)),
        "## Data": list(_data(model.training)),
        "## Method": list(_method(model)),
        "## Scores": list(_scores(scores, endings)) or ["It was not evaluated."],
        "## Limits": [f"- {limit}" for limit in _LIMITS],
    }
    return f"---\n{head}---\n\n" + "\n\n".join("\n".join([title, "", *lines]) for title, lines in sections.items()) + "\n"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files by name; empty where it is not there any more."""
    if not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append((file.relative_to(path).as_posix(), hashlib.file_digest(stream, "sha256").hexdigest()))
    return digests[0][1] if path.is_file() else hashlib.sha256(repr(digests).encode()).hexdigest()


def _head(model: Published, scores: Sequence[tuple[str, str, Score]]) -> dict[str, Any]:
    results = [
        {
            "task": {"type": "question-answering"},
            "dataset": {"type": "exam", "name": f"{score.problems} exam problems, {setting}"},
            "metrics": [{"type": "points", "name": "points earned / points possible", "value": round(score.score.value, 4)}],
        }
        for name, setting, score in scores
        if name == model.name
    ]
    return {
        "language": ["ja"],
        "license": model.license,
        "base_model": [model.base],
        "library_name": "peft" if model.weights == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["medical", "japanese", "medllm", *(["4-bit"] if model.weights.startswith("nf4") else [])],
        **({"model-index": [{"name": model.name, "results": results}]} if results else {}),
    }


def _asked(model: Published) -> Iterator[str]:
    contract = model.contract
    yield f"- A text ends with {_tokens(model, contract.ends)}" + (
        f", or where one of {', '.join(f'`{stop!r}`' for stop in contract.stop)} begins." if contract.stop else "."
    )
    yield f"- A text begins with {_tokens(model, contract.begins) if contract.begins else 'no token of its own'}."
    chats = "goes through the chat template" if contract.chat_template else "is refused: there is no chat template"
    yield f"- A conversation {chats}."
    if model.weights == "adapter":
        yield f"- {_ADAPTER_ALONE}"


def _tokens(model: Published, ids: Sequence[int]) -> str:
    return ", ".join(f"`{model.tokens[one]}` ({one})" for one in ids)


def _data(training: Mapping[str, RunSummary]) -> Iterator[str]:
    yield "| stage | data | years | SHA-256 |"
    yield "|---|---|---|---|"
    for run in training.values():
        corpus = run.config.get("corpus", {})
        known = {**dict.fromkeys(corpus.get("documents", ()), "–")}
        known |= dict.fromkeys(corpus.get("problems", ()), f"up to {corpus.get('problems_until')}")
        if run.stage == "rpo":
            known = {run.config["preferences"]: _preference_years(run.config["preferences"])}
        for path, years in known.items():
            yield f"| {run.stage} | {Path(path).name} | {years} | {file_hash(Path(path)) or 'no longer there'} |"


def _preference_years(path: str) -> str:
    """Up to when the problems were that preferences were sampled from, where the run that did it says so beside them."""
    config = Path(path).parent / "config.yaml"
    if not config.exists():
        return "–"
    until = read_yaml(config).get("problems_until")
    return f"up to {until}" if until else "–"


def _method(model: Published) -> Iterator[str]:
    yield f"From {model.base}, with LoRA on its linear layers; published as {model.weights} weights."
    yield ""
    yield "| stage | engine | steps | last loss | rank | learning rate | epochs | weights in training |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in model.training.values():
        config, result = run.config, run.result
        optimizer, epochs = config["optimizer"]["learning_rate"], config["training"]["epochs"]
        stored = f"{config['model']['quantization']}, {config['model']['dtype']}"
        loss = f"{result['loss']:.4f}"
        yield (
            f"| {run.stage} | {result['engine']} | {result['steps']} | {loss} | {config['lora']['rank']} | {optimizer:g} | "
            f"{epochs} | {stored} |"
        )


def _scores(scores: Sequence[tuple[str, str, Score]], endings: Mapping[tuple[str, str], EndingCounts | None]) -> Iterator[str]:
    if not scores:
        return
    yield "Points earned over points possible, with 95 % bootstrap intervals over problems; and how the texts ended."
    yield ""
    yield "| model | setting | score | points | problems | endings |"
    yield "|---|---|---|---|---|---|"
    for name, setting, score in scores:
        value = f"{number(score.score.value)} {interval(score.score)}"
        ended = endings[name, setting]
        words = ended.words() if ended else "not counted"
        yield f"| {name} | {setting} | {value} | {score.earned}/{score.possible} | {score.problems} | {words} |"
