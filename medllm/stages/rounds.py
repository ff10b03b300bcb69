"""Iterative preference training: curate, train, curate again with the trained model (Pang et al. 2024, arXiv 2404.19733).

    model ──curate──► preferences ──train──► model 1 ──curate──► preferences ──train──► model 2 ──curate──► …

Every stage has a run folder of its own below that of the rounds. A model's score is the share of right samples among those that
it was curated with, so no answer is sampled for the score alone. What is trained on is held against the problems that are
evaluated on in every round, for what a model writes is new in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from medllm.config import ModelConfig
from medllm.engines import TrainerName, open_trainer
from medllm.errors import UserError
from medllm.host.processes import process_count, unannounced
from medllm.host.progress import Say
from medllm.preferences.pairs import Rank, select_pairs
from medllm.preferences.records import Preference, read_preferences
from medllm.run import RESULT, Run
from medllm.stage_config import CurateConfig, RoundsConfig, RpoConfig
from medllm.stages.curate import PREFERENCES, read_curation, run_curate
from medllm.stages.handover import check_handover
from medllm.stages.rpo import run_rpo
from medllm.text_files import read_json_object
from medllm.trackers import require_tracker

Reason = Literal["all rounds are done", "no better", "too few pairs"]
_Stage = TypeVar("_Stage", CurateConfig, RpoConfig)


@dataclass(frozen=True)
class Measured:
    """A model, and what its answers to the problems came to.

    Attributes:
        trainings: Rounds that it was trained in; 0 is the model that was given.
        model: How it is opened.
        samples: Answers it wrote.
        right: Those that were right.
        pairs: Pairs to train on with a wrong answer on the losing side.
        loss: The last one logged of its training; None where there was none.
        steps: Optimizer steps of its training.
    """

    trainings: int
    model: ModelConfig
    samples: int
    right: int
    pairs: int
    loss: float | None = None
    steps: int = 0

    @property
    def share(self) -> float:
        """Of right samples."""
        return self.right / self.samples if self.samples else 0.0

    def words(self) -> str:
        """In a line."""
        trained = f"; trained: {self.steps} steps, loss {self.loss:.4f}" if self.loss is not None else ""
        right = f"{self.right} of {self.samples} samples right ({self.share:.3f})"
        return f"model {self.trainings}: {right}, {self.pairs} pairs{trained}"


@dataclass(frozen=True)
class RoundsResult:
    """What the rounds came to.

    Attributes:
        engine: Which engine did the work.
        models: The model that was given, and that of each round.
        stopped: Why no further round followed.
    """

    engine: str
    models: Sequence[Measured]
    stopped: Reason

    @property
    def best(self) -> Measured:
        """The model with the largest share of right samples, the earliest of several."""
        return max(self.models, key=lambda one: one.share)

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        rows = [
            {
                "trainings": one.trainings,
                "share_right": one.share,
                **{name: getattr(one, name) for name in ("right", "samples", "pairs", "loss", "steps")},
                "opened_as": _opened(one.model),
            }
            for one in self.models
        ]
        best = {"best": self.best.trainings, "opened_as": _opened(self.best.model)}
        return {"stage": "rounds", "engine": self.engine, "stopped": self.stopped, **best, "models": rows}


def run_rounds(config: RoundsConfig, engine: TrainerName = "jax", say: Say = print) -> RoundsResult:
    """Rounds of curation and preference training, until there are ``config.rounds`` of them or another would not pay.

    Called again with the same settings it goes on where it ended; with more ``rounds`` and ``resume`` true it adds some.

    Args:
        config: The settings.
        engine: ``jax`` or ``torch``.
        say: Told a line for each model that was measured.

    Raises:
        UserError: several processes were started, an input cannot be used, or what would be trained on holds a problem of
            ``config.held_out``.
    """
    _check(config, engine)
    with unannounced(), Run(config.run, config, engine=engine, resume=config.resume) as run:
        models: list[Measured] = []
        model = config.model
        trained: Mapping[str, Any] = {}
        while True:
            models.append(_measured(config, engine, len(models), model, trained))
            say(f"rounds: {models[-1].words()}")
            stopped = _reason_to_stop(models, config)
            if stopped is not None:
                break
            trained = _trained(config, engine, len(models), model)
            opened = trained["opened_as"]
            model = dataclasses.replace(model, path=opened["path"], adapter=tuple(opened["adapters"]))
        result = RoundsResult(engine, models, stopped)
        run.finish(result.to_json())
    return result


def _check(config: RoundsConfig, engine: TrainerName) -> None:
    """Refuse what a later round would refuse, before the first samples anything."""
    if process_count() > 1:
        raise UserError("medllm rounds runs in one process; with several, run medllm curate and medllm rpo in turn")
    require_tracker(config.tracker)
    training = _part(config, RpoConfig, model=config.model, run=config.run, preferences=PREFERENCES)
    check_handover(training)
    open_trainer(engine, config.model, training)
    read_curation(config)


def _measured(
    config: RoundsConfig, engine: TrainerName, number: int, model: ModelConfig, trained: Mapping[str, Any]
) -> Measured:
    """A model's answers as preferences: what it scores, and what there is to train on."""
    folder = _folder(config, number + 1, "curate")
    if not (folder / RESULT).exists():
        sampling = dataclasses.replace(config.sampling, seed=config.sampling.seed + number)
        run_curate(_part(config, CurateConfig, model=model, run=str(folder), sampling=sampling), engine)
    account = read_json_object(folder / RESULT, "a curation writes it")
    preferences = read_preferences(folder / PREFERENCES)
    pairs = sum(_lost_by_wrong_answers(one, config) for one in preferences)
    loss, steps = trained.get("loss"), trained.get("steps", 0)
    return Measured(number, model, account["samples"], account["right"], pairs, loss, steps)


def _trained(config: RoundsConfig, engine: TrainerName, number: int, model: ModelConfig) -> Mapping[str, Any]:
    """The result of a round's training."""
    folder = _folder(config, number, "rpo")
    if not (folder / RESULT).exists():
        preferences = str(_folder(config, number, "curate") / PREFERENCES)
        run_rpo(_part(config, RpoConfig, model=model, run=str(folder), preferences=preferences, resume="auto"), engine)
    return read_json_object(folder / RESULT, "a training writes it")


def _reason_to_stop(models: Sequence[Measured], config: RoundsConfig) -> Reason | None:
    if len(models) > 1 and models[-1].share - models[-2].share < config.improvement:
        return "no better"
    if len(models) > config.rounds:
        return "all rounds are done"
    return "too few pairs" if models[-1].pairs < config.fewest_pairs else None


def _lost_by_wrong_answers(preference: Preference, config: RoundsConfig) -> int:
    paired = select_pairs(preference, config.pairs)
    return sum(paired.ranks[low] == Rank.REJECTED for _, low in paired.pairs)


def _folder(config: RoundsConfig, number: int, stage: str) -> Path:
    return Path(config.run) / f"round-{number}" / stage


def _part(config: RoundsConfig, stage: type[_Stage], **own: Any) -> _Stage:
    """The settings of one of the stages among those of the rounds."""
    shared = {one.name: getattr(config, one.name) for one in dataclasses.fields(stage) if hasattr(config, one.name)}
    return stage(**{**shared, **own})


def _opened(model: ModelConfig) -> dict[str, Any]:
    return {"path": model.path, "adapters": list(model.adapters)}
