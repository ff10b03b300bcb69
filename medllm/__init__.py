"""The study both engines share: corpus, preferences, exam and report. Imports neither jax nor torch.

What scripts and notebooks use is listed in ``__all__`` and described in ``docs/api.md``; each name is imported from its module
when it is first asked for, so that ``import medllm`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "run_cpt": "stages.cpt",
    "run_curate": "stages.curate",
    "run_rpo": "stages.rpo",
    "run_evaluate": "stages.evaluate",
    "CptResult": "stages.cpt",
    "CurateResult": "stages.curate",
    "RpoResult": "stages.rpo",
    "ExamResult": "stages.evaluate",
    "OptionsResult": "stages.evaluate",
    "CptConfig": "stage_config",
    "CurateConfig": "stage_config",
    "RpoConfig": "stage_config",
    "EvaluateConfig": "stage_config",
    "ModelConfig": "config",
    "Recipe": "config",
    "PreferenceRecipe": "config",
    "CorpusConfig": "stage_config",
    "LoraConfig": "config",
    "OptimizerConfig": "config",
    "TrainingConfig": "config",
    "PreferenceLoss": "config",
    "PairConfig": "config",
    "Sampling": "config",
    "MeshConfig": "config",
    "open_engine": "engines",
    "open_trainer": "engines",
    "tokenize_preferences": "preferences.tokenization",
    "load_problems": "exam.loaders",
    "write_problems": "exam.loaders",
    "Problem": "exam.problem",
    "read_predictions": "exam.predictions",
    "score": "exam.scoring",
    "read_preferences": "preferences.records",
    "load_documents": "corpus.documents",
    "tokenize_documents": "corpus.packing",
    "pack": "corpus.packing",
    "load_tokenizer": "model.tokenizer",
    "UserError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medllm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
