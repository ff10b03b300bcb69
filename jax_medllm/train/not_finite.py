"""What becomes of a step whose numbers are not finite: its batch is kept, the layer named, and the step left out or the run
ended."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.train.batches import CptBatch, Step, TrainingData
from jax_medllm.train.replay import LossFn, arrays_of, replay
from medllm.config import TrainingConfig
from medllm.errors import UserError
from medllm.replay import Batch, Part
from medllm.run import Run
from medllm.training import Skips


class NotFinite:
    """Looks after the steps of a training that are not taken.

    Args:
        run: Where their batches are kept.
        data: What they are of.
        training: What is done about them.
        graph: The model's, of which ``trainable`` and ``frozen`` are the arrays.
        frozen: Its base.
        loss_fn: Of a micro-batch.

    Attributes:
        trainable: The adapter as it is now, set after each step. A step that is not taken leaves it as it was; those that were
            under way by then, and were finite, did not.
    """

    def __init__(
        self,
        run: Run,
        data: TrainingData,
        training: TrainingConfig,
        graph: nnx.GraphDef[DenseDecoder],
        frozen: nnx.State,
        loss_fn: LossFn,
    ):
        self._run, self._data, self._skips = run, data, Skips(training)
        self._graph, self._frozen, self._loss_fn = graph, frozen, loss_fn
        self.trainable: nnx.State | None = None

    def taken(self) -> None:
        """A step was taken."""
        self._skips.taken()

    def left(self, step: int, planned: Step, what: str, at_fault: list[int]) -> None:
        """One was not.

        Args:
            step: Its number, from 1.
            planned: Its data.
            what: What is not finite.
            at_fault: The micro-batches that are not, from 0; none where their sum, or what it makes of the adapter, is.

        Raises:
            UserError: the run is to end.
        """
        batches = self._data.batches(planned)
        parts = [
            Part(number, self._data.named(units), number - 1 not in at_fault)
            for number, units in enumerate(planned.micro_batches, 1)
        ]
        where = "; ".join(f"micro-batch {parts[number].number} ({parts[number].named})" for number in at_fault)
        said = f"step {step}: {what}, {f'by {where}' if where else 'and what it makes of the adapter is not finite'}"
        stage = "cpt" if isinstance(batches[0], CptBatch) else "rpo"
        file = Batch(stage, "jax", step, said, parts, [arrays_of(batch) for batch in batches]).keep(self._run.path)
        if file:
            said += f"{self._layer(batches, parts, at_fault)}; medllm replay {self._run.path} computes it alone"
        self._skips.leave_out(said)

    def _layer(self, batches: Any, parts: list[Part], at_fault: list[int]) -> str:
        """The first tensor of the first micro-batch at fault that is not finite. Of several processes none is looked for: all
        would have to compute it, also where one of them fails."""
        if not at_fault or self.trainable is None or jax.process_count() > 1:
            return ""
        model = nnx.merge(self._graph, self.trainable, self._frozen)
        number = at_fault[0]
        try:
            found = replay(model, self._loss_fn, batches[number], parts[number])
        except UserError:
            raise
        except Exception:  # it may lack the memory, and what is to be told is the step
            return ""
        return f", first in {found.first.words}" if found.first else ""
