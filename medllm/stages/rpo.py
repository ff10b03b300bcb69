"""Stage 2, preference training: pairs of responses to an adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from medllm.engines import EngineName, open_trainer
from medllm.host.progress import progress_bar
from medllm.preferences.records import read_preferences
from medllm.preferences.tokenization import check_preferences, tokenize_preferences
from medllm.run import Run
from medllm.serving.taught import taught_by_preferences
from medllm.stage_config import RpoConfig
from medllm.stages.handover import check_handover, merged_weights, merges, opened_as


def run_rpo(config: RpoConfig, engine: EngineName = "jax") -> dict[str, Any]:
    """Stage 2, preference training: pairs of the hierarchy → a PEFT adapter in the run folder.

    ``opened_as`` of the result says how the trained model is opened: under ``handover: merge`` on the merged weights in the run
    folder, else on the base, with its adapters in order.

    Raises:
        UserError: the model or the preference file cannot be used, its adapter cannot be handed over, or there is no pair to
            train on.
    """
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
            "taught": asdict(taught_by_preferences(model.tokenizer, preferences)),
            "opened_as": {"path": opened.path, "adapters": list(opened.adapters)},
        }
        run.finish(result)
    return result
