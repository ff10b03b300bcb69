"""What an engine that trains is: it leaves a PEFT adapter in the run folder and never changes the model it was opened on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medllm.config import PreferenceLoss, PreferenceRecipe, Recipe, RematPolicy, TrainingConfig, changed
from medllm.corpus.packing import PackedRows
from medllm.errors import UserError
from medllm.host.processes import tell
from medllm.host.progress import Say, rate_words
from medllm.preferences.tokenization import TokenizedPreferences
from medllm.replay import Batch, Replay
from medllm.run import Run


@dataclass(frozen=True)
class TrainSummary:
    """Result of a training run.

    ``loss`` is the last logged one, ``rate`` units (tokens for CPT, pairs for RPO) a second after the first optimizer step,
    without compilation, which took ``compile_seconds`` of all ``seconds``; with a single step it is that step's. Opening the
    model is in neither. ``padding`` is the share of all positions computed that hold padding, where known, ``remat`` what was
    kept for the backward pass, where that was the engine's choice.
    """

    steps: int
    loss: float
    seconds: float
    rate: float
    adapter: str
    compile_seconds: float = 0.0
    padding: float | None = None
    remat: RematPolicy | None = None


class Skips:
    """What becomes of steps whose numbers are not finite: they are left out, and that is told, or the run ends.

    Args:
        training: ``on_nan`` and ``max_skipped``.
    """

    def __init__(self, training: TrainingConfig):
        self._training = training
        self._in_a_row = 0

    def taken(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def leave_out(self, said: str) -> None:
        """One is not.

        Args:
            said: Which step, what is not finite, and by which data.

        Raises:
            UserError: the run is to end.
        """
        self._in_a_row += 1
        remedy = "lower --optimizer.learning_rate, look at that data"
        if self._training.on_nan == "stop":
            raise UserError(f"{said}; {remedy}, or leave such steps out: --training.on_nan skip")
        if self._in_a_row > self._training.max_skipped:
            raise UserError(
                f"{said}; {self._training.max_skipped} before it were left out one after the other, and no more are "
                f"(--training.max_skipped); {remedy}"
            )
        tell(f"{said}; the step is left out")


def progress_words(loss: float, rate: float, unit: str) -> str:
    """How a training goes, beside the steps that are done: its last logged loss, and units (tokens, pairs) a second."""
    return f"loss {loss:.4f}, {rate_words(rate, unit)}"


def check_loss(loss: PreferenceLoss, engine: str, reads: Mapping[str, Collection[str]]) -> None:
    """Refuse a preference loss that an engine does not have, and settings that play no part in the one it has.

    Args:
        loss: What is asked for.
        engine: The engine's name.
        reads: By the name of each loss that it has, the settings that it reads.

    Raises:
        UserError: there is none of this name, or a setting that it does not read is not at its default.
    """
    if loss.name not in reads:
        known = ", ".join(map(repr, reads))
        raise UserError(f"loss.name is {loss.name!r}: engine {engine} knows {known}; give one of these")
    for name, value in changed(loss).items():
        if name not in ("name", *reads[loss.name]):
            readers = ", ".join(one for one, settings in reads.items() if name in settings)
            raise UserError(
                f"loss.{name} is {value!r}, which loss {loss.name!r} does not read; leave --loss.{name} out, or take a loss "
                f"that reads it (--loss.name: {readers})"
            )


class Trains(Protocol):
    """A model that can be trained.

    Attributes:
        name: The engine's.
        tokenizer: The model's (:mod:`medllm.model.tokenizer`).
        context: The longest row, in tokens, that the model takes.
    """

    name: str
    tokenizer: Any
    context: int

    def with_weights(self, folder: str) -> Trains:
        """The same, with the weights in ``folder`` in place of its own and its adapters': a model they were merged into."""
        ...

    def train_cpt(self, rows: PackedRows, recipe: Recipe, run: Run) -> TrainSummary:
        """Continued pretraining on rows that :func:`medllm.corpus.packing.check_rows` passed.

        The adapter is left in ``run.path/adapter``.
        """
        ...

    def train_preferences(self, preferences: TokenizedPreferences, recipe: PreferenceRecipe, run: Run) -> TrainSummary:
        """A preference loss over pairs that :func:`medllm.preferences.tokenization.check_preferences` passed.

        The adapter is left in ``run.path/adapter``.

        Raises:
            UserError: the model has an adapter that is to be merged (:func:`medllm.stages.handover.merged_weights` does that).
        """
        ...

    def replay(self, batch: Batch, recipe: Recipe, run: Path, say: Say) -> Iterator[Replay]:
        """Compute the micro-batches of a step that was not finite, each alone.

        Args:
            batch: The step, of this engine.
            recipe: Of the run that kept it.
            run: Its folder, in which nothing is written: the adapter is that of the newest whole checkpoint before the step,
                a fresh one where there is none.
            say: Told which of these it is.

        Raises:
            UserError: the checkpoint is of another adapter, or cannot be read.
        """
        ...
