"""Trainings of six steps on a model of two layers, to be verified: honest ones, and what is tampered with of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PairConfig, PreferenceLoss, TrainingConfig
from medllm.preferences.records import Preference, Sample, write_preferences
from medllm.provenance import PROVENANCE, input_digests, output_digests
from medllm.stage_config import CorpusConfig, CptConfig, RpoConfig
from medllm.stages.cpt import run_cpt
from medllm.stages.rpo import run_rpo
from medllm.verify.findings import Certificate, Finding
from medllm.verify.verifying import VerifyConfig, verify
from medllm_parity.tolerances import VERIFY
from parity_tests.preference_cases import letters

STEPS = 6
TEXTS = (
    "a fever and cold",
    "rest: it may help",
    "no cold! but walk",
    "a long way round",
    "so it goes! bed a",
    "bed rest all day",
)


def inputs(folder: Path, model: Path) -> Path:
    """A folder with a model and its tokenizer, documents, and preferences."""
    shutil.copytree(model, folder / "base")
    letters().save_pretrained(folder / "base")
    write_documents(folder / "documents.jsonl", TEXTS)
    problems = [
        Preference(f"p{number}", f"Q: {text}\nA", Sample(f": {text}", "a"), (), (Sample(": a b", "b"),))
        for number, text in enumerate(TEXTS)
    ]
    write_preferences(folder / "preferences.jsonl", problems)
    return folder


def write_documents(file: Path, texts: Any) -> None:
    """A document a line."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def settings(stage: str, given: Path, run: Path, **changes: Any) -> Any:
    """Those of a training of six steps over two epochs, with a checkpoint at each; the two newest are kept."""
    common: dict[str, Any] = {
        "model": ModelConfig(str(given / "base"), dtype="float32"),
        "run": str(run),
        "lora": LoraConfig(rank=4, alpha=8.0, seed=3),
        "optimizer": OptimizerConfig(learning_rate=2e-3, weight_decay=0.1, warmup_ratio=0.2, clip_norm=3.0),
        "training": TrainingConfig(epochs=2, batch_size=1, accumulation=2, seed=5, checkpoint_every=1, remat="none"),
    }
    if stage == "cpt":
        corpus = CorpusConfig(documents=(str(given / "documents.jsonl"),), length=20)
        return dataclasses.replace(CptConfig(**common, corpus=corpus), **changes)
    own = {"preferences": str(given / "preferences.jsonl"), "loss": PreferenceLoss(beta=0.5, alpha=0.3)}
    return dataclasses.replace(RpoConfig(**common, **own, pairs=PairConfig(max_length=64)), **changes)


def train(stage: str, engine: str, given: Path, run: Path, **changes: Any) -> Path:
    """Train, and give the run's folder."""
    config = settings(stage, given, run, **changes)
    (run_cpt if stage == "cpt" else run_rpo)(config, engine)  # type: ignore[operator]
    return run


def verified(run: Path, **asked: Any) -> Certificate:
    """The certificate of a run, every step within reach taken anew."""
    return verify(VerifyConfig(str(run), **{"steps": 99, **asked}))


def refuted(certificate: Certificate) -> list[str]:
    """What is refuted, as it is said."""
    assert certificate.verdict == "refuted", certificate.headline()
    return [one.words for one in certificate.of("refuted")]


def proved_steps(certificate: Certificate) -> list[Finding]:
    """The steps that were taken anew and agree."""
    return [one for one in certificate.of("proved") if one.where.startswith("step ") and "anew" in one.what]


def copy_of(run: Path, folder: Path) -> Path:
    """A run to tamper with."""
    return Path(shutil.copytree(run, folder / run.name))


def edit_settings(run: Path, change: Callable[[dict[str, Any]], None], *, hide: bool = False) -> None:
    """Change ``config.yaml``; with ``hide`` the digests are made to fit."""
    plain = yaml.safe_load((run / "config.yaml").read_text())
    change(plain)
    (run / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    if hide:
        hide_changes(run)


def hide_changes(run: Path) -> None:
    """Write the digests anew, as one who tampers would."""
    made = json.loads((run / PROVENANCE).read_text())
    for session in made["sessions"]:
        session["inputs"] = input_digests(yaml.safe_load((run / "config.yaml").read_text()))
    made["outputs"] = output_digests(run)
    (run / PROVENANCE).write_text(json.dumps(made))


def step_table() -> str:
    """:data:`medllm_parity.tolerances.VERIFY` as a Markdown table, the one in ``docs/verify.md``."""
    lines = ["| computed in | loss | gradient norm | moments | reference |", "|---|---|---|---|---|"]
    for name, bounds in VERIFY.items():
        parts = (bounds.loss, bounds.norm, bounds.moments, bounds.reference)
        cells = (f"{one.relative:g} ({one.seen:g})" if one else "not compared" for one in parts)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
