"""Stage 2, preference training: pairs of responses to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medllm.config import ModelConfig
from medllm.corpus.leaks.guard import refuse_leaks
from medllm.engines import TrainerName, open_trainer
from medllm.host.processes import is_primary_process
from medllm.host.progress import progress_bar
from medllm.model.adapter import check_trained
from medllm.preferences.records import preference_texts, read_preferences
from medllm.preferences.tokenization import check_preferences, tokenize_preferences
from medllm.run import Run
from medllm.serving.taught import Taught, taught_by_preferences
from medllm.shortage import advising
from medllm.stage_config import RpoConfig
from medllm.stages.handover import check_handover, merged_weights, merges, opened_as
from medllm.trackers import require_tracker
from medllm.training import TrainSummary


@dataclass(frozen=True)
class RpoResult:
    """What stage 2 did.

    Attributes:
        engine: Which engine did the work.
        summary: Of the training.
        problems: Problems in the preference file.
        pairs: Pairs trained on.
        dropped_pairs: Pairs that were not, by reason.
        truncated_responses: Responses cut at ``pairs.max_length``.
        control_tokens: Special tokens that are written out in what was trained on.
        handover: What became of stage 1's adapter; None where there was none.
        opened_as: How the trained model is opened: under ``handover: merge`` on the merged weights in the run folder, else on
            the base, with its adapters in order.
        taught: What of a serving contract was trained on.
    """

    engine: str
    summary: TrainSummary
    problems: int
    pairs: int
    dropped_pairs: Mapping[str, int]
    truncated_responses: int
    control_tokens: Mapping[str, int]
    handover: str | None
    opened_as: ModelConfig
    taught: Taught

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return {
            "stage": "rpo",
            "engine": self.engine,
            **asdict(self.summary),
            "problems": self.problems,
            "pairs": self.pairs,
            "dropped_pairs": dict(self.dropped_pairs),
            "truncated_responses": self.truncated_responses,
            "control_tokens": dict(self.control_tokens),
            **({"handover": self.handover} if self.handover else {}),
            "opened_as": {"path": self.opened_as.path, "adapters": list(self.opened_as.adapters)},
            "taught": self.taught.to_json(),
        }


def run_rpo(config: RpoConfig, engine: TrainerName = "jax") -> RpoResult:
    """Stage 2, preference training: pairs of the hierarchy → a PEFT adapter in the run folder.

    Raises:
        UserError: the model or the preference file cannot be used, the file holds what is held out, the adapter cannot be
            handed over, or there is no pair to train on.
    """
    require_tracker(config.tracker)
    read = read_preferences(config.preferences)
    refuse_leaks(preference_texts(read, config.preferences), (config.preferences,), config.held_out)
    check_handover(config)
    model = open_trainer(engine, config.model, config)
    with progress_bar("tokens") as progress:
        preferences = tokenize_preferences(model.tokenizer, read, config.pairs, progress)
    check_preferences(preferences, config.pairs.max_length, model.context, config.preferences)
    with advising(config, engine), Run(config.run, config, engine=engine, resume=config.resume) as run:
        if merges(config.model, config):
            model = model.with_weights(merged_weights(config, run))
        summary = model.train_preferences(preferences, config, run)
        result = RpoResult(
            engine=engine,
            summary=summary,
            problems=len(read),
            pairs=preferences.pairs,
            dropped_pairs=preferences.dropped,
            truncated_responses=preferences.truncated,
            control_tokens=preferences.control_tokens,
            handover=config.handover if config.model.adapters else None,
            opened_as=opened_as(config, run.path, summary.adapter),
            taught=taught_by_preferences(model.tokenizer, preferences),
        )
        if is_primary_process():
            check_trained(summary.adapter)
        run.finish(result.to_json())
    return result
