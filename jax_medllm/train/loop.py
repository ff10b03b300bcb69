"""The training loop of both stages, and the loss of one micro-batch of each.

``cpt_loss_fn`` and ``preference_loss_fn`` take a model and a batch and return the loss with what is logged; they are what a
parity test differentiates. ``train`` steps an optimizer over them. Only ``LoraParam`` arrays are trained: the base weights
enter the compiled step as an argument, are never copied and have no gradient.

The device never waits for the host: batches are laid out by threads ahead of time and put on the device a step early, and a
step's metrics are fetched when the next one is under way.
"""

from __future__ import annotations

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
from jax_medllm.mesh.processes import everywhere
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.logprobs import response_logprobs, token_logprobs
from jax_medllm.train.batches import CptBatch, PreferenceBatch, Step, TrainingData
from jax_medllm.train.checkpoint import Checkpoints
from jax_medllm.train.device_memory import device_memory, program_bytes
from jax_medllm.train.log import StepMetrics, Trained, TrainingLog
from jax_medllm.train.losses import cpt_loss, pair_logprobs
from jax_medllm.train.not_finite import NotFinite
from jax_medllm.train.optimizer import learning_rate, make_optimizer
from jax_medllm.train.preference_losses import Pairs, objective
from jax_medllm.train.replay import LossFn
from medllm.checkpoints import Saving
from medllm.config import OptimizerConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.corpus.packing import target_mask
from medllm.errors import Stopped, UserError
from medllm.host.memory import size_words
from medllm.host.processes import preface
from medllm.host.progress import progress_bar
from medllm.host.stopping import StopRequest, stop_requests
from medllm.run import Run

AHEAD = 2
"""Programs given to the device whose results are not there yet: one at work and one waiting."""
_LAID_OUT = 4
"""Steps whose arrays are laid out ahead of time."""


class CptMetrics(NamedTuple):
    """What continued pretraining logs: the token mean of the negative log-likelihood."""

    loss: Float[Array, ""]


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
        sound: ``(gradients, metrics) -> whether all of a micro-batch is finite``.
        add: ``(total, part) -> total``, into the memory of the first.
        update: ``(trainable, optimizer state, step, total) -> (trainable, state, metrics)``; the first two are donated, and
            stay what they are where a number is not finite.
        programs: What ran so far, compiled: by the part and the shapes of its last argument.
    """

    init: Callable[[nnx.State], Any]
    gradients: jax.stages.Wrapped
    sound: jax.stages.Wrapped
    add: jax.stages.Wrapped
    update: jax.stages.Wrapped
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __call__(
        self, trainable: nnx.State, optimizer_state: Any, index: Array, frozen: Any, batches: Sequence[Any]
    ) -> tuple[nnx.State, Any, StepMetrics]:
        """One optimizer step over the summed gradients of its micro-batches; the first two arguments are donated."""
        total, sound = None, []
        for batch in batches:
            part = self._run(self.gradients, trainable, frozen, batch)
            sound.append(self._run(self.sound, part))
            total = part if total is None else self._run(self.add, total, part)
        trainable, optimizer_state, metrics = self._run(self.update, trainable, optimizer_state, index, total)
        return trainable, optimizer_state, metrics._replace(micro_batches=tuple(sound))

    def _run(self, part: jax.stages.Wrapped, *arguments: Any) -> Any:
        """A part, compiled once for each shape of its last argument. The device ends what it was given first: its time is not
        the compiler's."""
        program = (part, *(leaf.shape for leaf in jax.tree.leaves(arguments[-1])))
        if program not in self.programs:
            jax.block_until_ready(arguments)
            self.programs[program] = part.lower(*arguments).compile()
            release_free_memory()
            self._say_memory(self.programs[program], first=len(self.programs) == 1)
        return self.programs[program](*arguments)

    def _say_memory(self, compiled: Any, *, first: bool) -> None:
        """What the first program, the gradients' of a micro-batch, takes of a device."""
        if first and (needed := program_bytes(compiled)):
            preface(f"the step takes about {size_words(needed)} of a device's {size_words(device_memory())}, by its compiler")

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

    @jax.jit
    def sound(part):
        gradients, metrics = part
        return jnp.isfinite(optax.global_norm(gradients) + metrics.loss)

    @partial(jax.jit, donate_argnums=0)
    def add(total, part):
        return jax.tree.map(jnp.add, total, part)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable, optimizer_state, index, total):
        gradients, metrics = total
        norm = optax.global_norm(gradients)
        updates, moved_state = optimizer.update(gradients, optimizer_state, trainable)
        moved = optax.apply_updates(trainable, updates)
        # Decided here, so that the host need not wait for the numbers, and no state that is saved can have such in it.
        whole = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(moved)]
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm) & jnp.stack(whole).all()

        def unless_finite(new, old):
            return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new  # steps count on

        state = jax.tree.map(unless_finite, (moved, moved_state), (trainable, optimizer_state))
        return *state, StepMetrics(metrics, norm, learning_rate(config, total_steps, index), finite)

    return TrainingStep(optimizer.init, make_gradients(graph, loss_fn), sound, add, update)


def train(
    model: DenseDecoder,
    loss_fn: LossFn,
    data: TrainingData,
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    run: Run,
    *,
    settings: Mapping[str, Any],
) -> Trained:
    """Train the adapter of ``model`` in place, logging to and checkpointing into ``run``.

    The step takes its arguments' memory: until the end, and where training fails, the model has no adapter to compute with.
    It goes on from the checkpoint that ``run`` has. ``settings`` are what the trajectory depends on, for the check on that.

    Raises:
        UserError: there is nothing to train on, the loss is no longer finite, or the checkpoint is of another run.
        Stopped: a signal asked for it; what was done is saved.
    """
    total = len(data.steps)
    if not total:
        raise UserError(f"there are no {data.unit} to train on: the data gave no unit")
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    step = make_step(graph, loss_fn, optimizer, total)
    state = (trainable, on_all_devices(step.init(trainable)))
    checkpoints = Checkpoints(run.path / "checkpoints", {**settings, "steps": total}, config.keep, config.keep_every)
    try:
        state, start = checkpoints.restore(state)
        end = min(config.max_steps or total, total)
        run.go_on(start, end)
        not_finite = NotFinite(run, data, config, graph, others[0], loss_fn)
        log = TrainingLog(run, data, not_finite, start)
        with stop_requests() as request:
            state = _take_steps(step, state, others[0], data, range(start, end), config, log, checkpoints, request)
        trained = log.trained(max(start, end))
    finally:
        checkpoints.close()
    nnx.update(model, state[0])
    return trained


def _take_steps(
    step: TrainingStep,
    state: tuple[nnx.State, Any],
    frozen: Any,
    data: TrainingData,
    numbers: range,
    config: TrainingConfig,
    log: TrainingLog,
    checkpoints: Checkpoints,
    request: StopRequest,
) -> tuple[nnx.State, Any]:
    """The state after the steps of these ``numbers``, logged and saved."""
    steps = data.steps[numbers.start : numbers.stop]
    batches = _on_device(data, steps)
    batch = next(batches, ())
    under_way: deque[StepMetrics] = deque()
    saving = Saving(config)
    with progress_bar("training", "steps") as progress:
        for done, planned in enumerate(steps, numbers.start + 1):
            progress(done - 1, numbers.stop, log.said)
            trainable, moments, metrics = step(*state, np.int32(done - 1), frozen, batch)
            state = (trainable, moments)
            log.not_finite.trainable = trainable
            batch = next(batches, ())
            log.write()  # the line that is due, with this step under way
            log.add(done, metrics, planned)
            ends_line = done % config.log_every == 0
            stops = _anywhere(request.asked, ends_line)
            saves = stops or done == numbers.stop or saving.by_steps(done)
            saves = saves or (saving.timed and _anywhere(saving.by_time(), ends_line))
            if saves or ends_line:
                log.end_line()
            if saves:
                log.write()
                checkpoints.save(state, done)
                saving.saved()
            if stops and done < numbers.stop:
                raise Stopped(f"stopped after step {done:,} of {numbers.stop:,}, which is saved")
            under_way.append(metrics)
            if len(under_way) > AHEAD:
                jax.block_until_ready(under_way.popleft())
    return state


def _anywhere(flag: bool, ends_line: bool) -> bool:
    """Whether it holds in any process. Several have to decide alike at the same step; they ask one another where a line is
    logged."""
    if jax.process_count() == 1:
        return flag
    return ends_line and not everywhere(not flag)


def _on_device(data: TrainingData, steps: Sequence[Step]) -> Iterator[Sequence[Any]]:
    """Each step's micro-batches on the device, laid out by threads ahead of time, in the order of the plan."""
    waiting = iter(steps)
    with ThreadPoolExecutor(2) as threads:
        coming = deque(threads.submit(data.batches, step) for step in islice(waiting, _LAID_OUT))
        while coming:
            batches = coming.popleft().result()
            coming.extend(threads.submit(data.batches, step) for step in islice(waiting, 1))
            yield [place_rows(batch) for batch in batches]
