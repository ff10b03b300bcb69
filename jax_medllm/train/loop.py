"""The training loop of both stages, and the loss of one micro-batch of each.

``cpt_loss_fn`` and ``preference_loss_fn`` take a model and a batch and return the loss with what is logged; they are what a
parity test differentiates. ``train`` steps an optimizer over them. Only ``LoraParam`` arrays are trained: the base weights
enter the compiled step as an argument, are never copied and have no gradient.

The device never waits for the host: batches are laid out by threads ahead of time and put on the device a step early, and a
step's metrics are fetched when the next one is under way.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.mesh.host_memory import release_free_memory
from jax_medllm.mesh.layout import laid_out, on_all_devices, place_rows
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.logprobs import response_logprobs, token_logprobs
from jax_medllm.train.batches import CptBatch, PreferenceBatch, Step, TrainingData
from jax_medllm.train.checkpoint import Checkpoints
from jax_medllm.train.compilation import compile_seconds, working_seconds
from jax_medllm.train.losses import Pairs, cpt_loss, objective, pair_logprobs
from jax_medllm.train.optimizer import learning_rate, make_optimizer
from medllm.config import OptimizerConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.corpus.packing import target_mask
from medllm.errors import UserError
from medllm.host.progress import tracked
from medllm.run import Run

LossFn = Callable[[DenseDecoder, Any], tuple[Array, Any]]
"""``(model, batch) -> (loss, metrics)`` of a micro-batch; both add up over the micro-batches of a step. Metrics are a named
tuple of scalars with a field ``loss``, other tuples of the kind within it."""

AHEAD = 2
"""Programs given to the device whose results are not there yet: one at work and one waiting."""
_LAID_OUT = 4
"""Steps whose arrays are laid out ahead of time."""


class CptMetrics(NamedTuple):
    """What continued pretraining logs: the token mean of the negative log-likelihood."""

    loss: Float[Array, ""]


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step: those of the loss, the gradient norm before clipping, the learning rate it took."""

    loss: Any
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


@dataclass(frozen=True)
class Trained:
    """How a run went: steps done, last logged loss, seconds in all, units a second after the first step and without
    compilation, seconds of that."""

    steps: int
    loss: float
    seconds: float
    rate: float
    compile_seconds: float


def cpt_loss_fn(model: DenseDecoder, batch: CptBatch, *, remat: RematPolicy = "none") -> tuple[Float[Array, ""], CptMetrics]:
    """Negative log-likelihood of packed rows, as a share of the token mean of the whole optimizer step."""
    hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, remat=remat)
    # The row keeps its length, which devices may share out; its last position predicts nothing.
    mask = jnp.pad(target_mask(batch.segment_ids), ((0, 0), (0, 1)))
    logprobs = token_logprobs(hidden, model.head_weight(), jnp.roll(batch.tokens, -1, axis=1), mask)
    loss = cpt_loss(logprobs, mask.astype(logprobs.dtype), 1.0) * batch.share
    return loss, CptMetrics(loss)


def preference_loss_fn(
    model: DenseDecoder, batch: PreferenceBatch, loss_config: PreferenceLoss, *, remat: RematPolicy = "none"
) -> tuple[Float[Array, ""], Any]:
    """The objective of ``loss_config`` over a batch of problems, and what it logs.

    The reference, where the objective reads one, is the same model with its trained adapter off.

    Raises:
        UserError: there is no such objective.
    """
    chosen = objective(loss_config)
    policy, lengths = _sums(response_logprobs(model, batch.responses, remat=remat), batch)
    reference = None
    if chosen.reference:
        reference = reference_logprobs(model, batch) if batch.reference is None else batch.reference
        reference = reference.reshape(-1, 2)
    pairs = Pairs(policy.reshape(-1, 2), reference, lengths.reshape(-1, 2), batch.weights.reshape(-1))
    metrics = chosen.metrics(pairs, loss_config)
    return metrics.loss, metrics


def reference_logprobs(model: DenseDecoder, batch: PreferenceBatch) -> Float[Array, "n k 2"]:
    """Summed log-probabilities of both responses of each pair with the trained adapter off; no gradient flows."""
    return jax.lax.stop_gradient(_sums(response_logprobs(model, batch.responses, adapter=False), batch)[0])


def _sums(logprobs: Float[Array, "n s"], batch: PreferenceBatch) -> tuple[Float[Array, "n k 2"], Float[Array, "n k 2"]]:
    return pair_logprobs(logprobs, batch.responses.responses, batch.responses.offsets, batch.pairs, batch.starts)


@dataclass(frozen=True)
class TrainingStep:
    """The optimizer step, as jitted parts: micro-batches of different shapes compile ``gradients`` alone anew.

    Attributes:
        init: ``trainable -> optimizer state``.
        gradients: ``(trainable, frozen, batch) -> (gradients, metrics)`` of one micro-batch.
        add: ``(total, part) -> total``, into the memory of the first.
        update: ``(trainable, optimizer state, step, total) -> (trainable, state, metrics)``; the first two are donated.
        programs: What ran so far, compiled: by the part and the shapes of its last argument.
    """

    init: Callable[[nnx.State], Any]
    gradients: jax.stages.Wrapped
    add: jax.stages.Wrapped
    update: jax.stages.Wrapped
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __call__(
        self, trainable: nnx.State, optimizer_state: Any, index: Array, frozen: Any, batches: Sequence[Any]
    ) -> tuple[nnx.State, Any, StepMetrics]:
        """One optimizer step over the summed gradients of its micro-batches; the first two arguments are donated."""
        total = None
        for batch in batches:
            part = self._run(self.gradients, trainable, frozen, batch)
            total = part if total is None else self._run(self.add, total, part)
        return self._run(self.update, trainable, optimizer_state, index, total)

    def _run(self, part: jax.stages.Wrapped, *arguments: Any) -> Any:
        """A part, compiled once for each shape of its last argument. The device ends what it was given first: its time is not
        the compiler's."""
        program = (part, *(leaf.shape for leaf in jax.tree.leaves(arguments[-1])))
        if program not in self.programs:
            jax.block_until_ready(arguments)
            self.programs[program] = part.lower(*arguments).compile()
            release_free_memory()
        return self.programs[program](*arguments)

    def trace(
        self, trainable: nnx.State, optimizer_state: Any, index: Any, frozen: Any, batch: Any
    ) -> tuple[jax.stages.Traced, jax.stages.Traced]:
        """``gradients`` and ``update`` for one micro-batch, traced and ready to lower; of all arguments the shapes suffice."""
        _, metrics = jax.eval_shape(self.gradients, trainable, frozen, batch)
        total = (trainable, metrics)  # a gradient lies where its parameter does
        return self.gradients.trace(trainable, frozen, batch), self.update.trace(trainable, optimizer_state, index, total)


def make_gradients(graph: nnx.GraphDef[DenseDecoder], loss_fn: LossFn) -> jax.stages.Wrapped:
    """``(trainable, frozen, batch) -> (gradients, metrics)`` of one micro-batch."""

    @jax.jit
    def gradients(trainable, frozen, batch):
        def loss_of(trainable):
            return loss_fn(nnx.merge(graph, trainable, frozen), batch)

        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return laid_out(gradients), metrics

    return gradients


def make_step(graph: nnx.GraphDef[DenseDecoder], loss_fn: LossFn, config: OptimizerConfig, total_steps: int) -> TrainingStep:
    """The optimizer step ``(trainable, optimizer state, step, frozen, batches) -> (trainable, state, metrics)``.

    Args:
        graph: The model's, of which ``trainable`` and ``frozen`` are the arrays.
        loss_fn: Of a micro-batch.
        config: AdamW and its schedule.
        total_steps: Optimizer steps the schedule spans.
    """
    optimizer = make_optimizer(config, total_steps)

    @partial(jax.jit, donate_argnums=0)
    def add(total, part):
        return jax.tree.map(jnp.add, total, part)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable, optimizer_state, index, total):
        gradients, metrics = total
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, trainable)
        logged = StepMetrics(metrics, optax.global_norm(gradients), learning_rate(config, total_steps, index))
        return optax.apply_updates(trainable, updates), optimizer_state, logged

    return TrainingStep(optimizer.init, make_gradients(graph, loss_fn), add, update)


def train(
    model: DenseDecoder,
    loss_fn: LossFn,
    data: TrainingData,
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    run: Run,
    *,
    settings: Mapping[str, Any],
    resume: bool = False,
) -> Trained:
    """Train the adapter of ``model`` in place, logging to and checkpointing into ``run``.

    The step takes its arguments' memory: until the end, and where training fails, the model has no adapter to compute with.
    ``settings`` are what the trajectory depends on, for the check on resuming.

    Raises:
        UserError: there is nothing to train on, the loss is no longer finite, or the checkpoint is of another run.
    """
    total = len(data.steps)
    if not total:
        raise UserError(f"there are no {data.unit} to train on: the data gave no unit")
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    step = make_step(graph, loss_fn, optimizer, total)
    state = (trainable, on_all_devices(step.init(trainable)))
    checkpoints = Checkpoints(run.path / "checkpoints", {**settings, "steps": total})
    try:
        start = 0
        if resume:
            state, start = checkpoints.restore(state)
            run.forget_after(start)
        steps = data.steps[start : config.max_steps or total]
        log = TrainingLog(run, data.unit)
        batches = _on_device(data, steps)
        batch = next(batches, ())
        under_way: deque[StepMetrics] = deque()
        for done, planned in enumerate(tracked(steps, "training", start), start + 1):
            trainable, moments, metrics = step(*state, np.int32(done - 1), others[0], batch)
            state = (trainable, moments)
            batch = next(batches, ())
            log.write()  # the line that is due, with this step under way
            log.add(done, metrics, data.units(planned))
            saves = done == start + len(steps) or (config.checkpoint_every and done % config.checkpoint_every == 0)
            if saves or done % config.log_every == 0:
                log.end_line()
            if saves:
                log.write()
                checkpoints.save(state, done)
            under_way.append(metrics)
            if len(under_way) > AHEAD:
                jax.block_until_ready(under_way.popleft())
        trained = log.trained(start + len(steps))
    finally:
        checkpoints.close()
    nnx.update(model, state[0])
    return trained


def _on_device(data: TrainingData, steps: Sequence[Step]) -> Iterator[Sequence[Any]]:
    """Each step's micro-batches on the device, laid out by threads ahead of time, in the order of the plan."""
    waiting = iter(steps)
    with ThreadPoolExecutor(2) as threads:
        coming = deque(threads.submit(data.batches, step) for step in islice(waiting, _LAID_OUT))
        while coming:
            batches = coming.popleft().result()
            coming.extend(threads.submit(data.batches, step) for step in islice(waiting, 1))
            yield [place_rows(batch) for batch in batches]


class _Mark(NamedTuple):
    """A time, and the units that were done by then. ``seconds`` stand still while something is compiled."""

    seconds: float
    units: int

    def rate_since(self, earlier: _Mark) -> float:
        """Units a second."""
        return (self.units - earlier.units) / max(self.seconds - earlier.seconds, 1e-9)


class TrainingLog:
    """Lines of ``metrics.jsonl``: means over steps, fetched from the device when they are written. And how the run went.

    Time runs from when it is made.
    """

    def __init__(self, run: Run, unit: str):
        self._run = run
        self._unit = unit
        self._open: list[tuple[int, StepMetrics, int]] = []
        self._due: list[tuple[int, StepMetrics, int]] = []
        self._loss: float | None = None
        self._began, self._compiled = time.perf_counter(), compile_seconds()
        self._start = self._first = self._written = _Mark(working_seconds(), 0)

    def add(self, step: int, metrics: StepMetrics, units: int) -> None:
        """A step that was started. The host waits for the first: it pays for allocations, and rates count from its end."""
        if self._first is self._start:
            jax.block_until_ready(metrics)
            self._first = _Mark(working_seconds(), units)
        self._open.append((step, metrics, units))

    def end_line(self) -> None:
        """The steps added since the last line make the next."""
        if self._open:
            self._due, self._open = self._open, []

    def write(self) -> None:
        """Write the line that is due, where one is: waits until its steps are done.

        Raises:
            UserError: a loss or a gradient is not finite.
        """
        if not self._due:
            return
        due, self._due = self._due, []
        steps = [(step, jax.tree.map(float, jax.device_get(metrics))) for step, metrics, _ in due]
        before, units = self._written, sum(units for _, _, units in due)
        self._written = _Mark(working_seconds(), before.units + units)
        means = _means(steps)
        self._loss = means["loss"]
        self._run.log(steps[-1][0], **means, **{f"{self._unit}_per_second": self._written.rate_since(before)})

    @property
    def rate(self) -> float:
        """Units a second over all steps but the first, without compilation; of the first if it is the only one."""
        return self._written.rate_since(self._first if self._written.units > self._first.units else self._start)

    def trained(self, steps: int) -> Trained:
        """How the run went, all of its lines written; a run that was complete already has the loss of its last line."""
        logged = [line["loss"] for line in self._run.metrics() if "loss" in line] if self._loss is None else [self._loss]
        return Trained(
            steps=steps,
            loss=logged[-1] if logged else math.nan,
            seconds=time.perf_counter() - self._began,
            rate=self.rate,
            compile_seconds=compile_seconds() - self._compiled,
        )


def _means(steps: Sequence[tuple[int, StepMetrics]]) -> dict[str, float]:
    """Means over steps of the loss metrics and of the gradient norm, and the last learning rate."""
    for step, metrics in steps:
        if not (math.isfinite(metrics.loss.loss) and math.isfinite(metrics.grad_norm)):
            raise UserError(
                f"step {step}: the loss is {metrics.loss.loss} and its gradient's norm {metrics.grad_norm}; "
                "lower optimizer.learning_rate or look at the data of that step"
            )
    found = [metrics for _, metrics in steps]
    paths, _ = jax.tree_util.tree_flatten_with_path(found[0].loss)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    columns = zip(*(jax.tree.leaves(metrics.loss) for metrics in found), strict=True)
    means = {name: sum(values) / len(found) for name, values in zip(names, columns, strict=True)}
    norm = sum(metrics.grad_norm for metrics in found) / len(found)
    return {**means, "learning_rate": found[-1].learning_rate, "grad_norm": norm}
