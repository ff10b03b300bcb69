"""What the reference can be set to in ``medllm bench``: the ways a good user of transformers and TRL would try.

A variant is a row of :data:`VARIANTS`. Each that can run here is tried once, shortly; the fastest is what JAX is held against.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medllm.bench.engines import measure
from medllm.bench.shapes import CptShape, GenerateShape, RpoShape
from medllm.errors import UserError
from medllm.host.progress import Say
from medllm.run import environment

ALL = "all"
GPU = "an NVIDIA GPU"
_TRIAL_STEPS = 2
"""Optimizer steps of a trial: one that does not count, and one."""


@dataclass(frozen=True)
class Variant:
    """A way to set the reference.

    Attributes:
        name: What ``--torch_variant`` calls it.
        what: In words.
        settings: Arguments of the measurement (:mod:`medllm.bench.work`) that it decides.
        needs: :data:`GPU`, or modules that must be installed.
    """

    name: str
    what: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()


def _training(remat: str, **torch: Any) -> dict[str, Any]:
    return {"remat": remat, "torch": torch}


_ONE_PAIR = {"nll_reduction": "sequence"}
"""By which the engine puts one pair into a pass; over pairs of one length, as here, both reductions are the same mean."""

VARIANTS: dict[str, tuple[Variant, ...]] = {
    "cpt": (
        Variant("recomputed", "SDPA, layers recomputed", _training("layer")),
        Variant("kept", "SDPA, nothing recomputed", _training("none")),
        Variant("eager", "eager attention, nothing recomputed", _training("none", attention="eager")),
        Variant(
            "flash",
            "FlashAttention 2, nothing recomputed",
            _training("none", attention="flash_attention_2"),
            (GPU, "flash_attn"),
        ),
        Variant("liger", "SDPA and Liger's kernels, nothing recomputed", _training("none", liger=True), (GPU, "liger_kernel")),
    ),
    "rpo": (
        Variant("batch", "all pairs a pass, layers recomputed", _training("layer")),
        Variant(
            "batch-precomputed",
            "all pairs a pass, layers recomputed, reference ahead",
            _training("layer", precompute_reference=True),
        ),
        Variant("pair", "one pair a pass, layers recomputed", _training("layer") | _ONE_PAIR),
        Variant(
            "pair-precomputed",
            "one pair a pass, layers recomputed, reference ahead",
            _training("layer", precompute_reference=True) | _ONE_PAIR,
        ),
        Variant("pair-kept", "one pair a pass, nothing recomputed", _training("none") | _ONE_PAIR),
        Variant(
            "pair-kept-precomputed",
            "one pair a pass, nothing recomputed, reference ahead",
            _training("none", precompute_reference=True) | _ONE_PAIR,
        ),
        Variant(
            "flash",
            "all pairs a pass, layers recomputed, FlashAttention 2",
            _training("layer", attention="flash_attention_2"),
            (GPU, "flash_attn"),
        ),
        Variant(
            "liger",
            "all pairs a pass, layers recomputed, Liger's kernels",
            _training("layer", liger=True),
            (GPU, "liger_kernel"),
        ),
    ),
    "generate": tuple(Variant(f"batch-{size}", f"{size} answers at a time", {"batch_size": size}) for size in (16, 32, 64)),
}
"""Of each measurement, the plainest first."""


@dataclass(frozen=True)
class Trial:
    """How a variant did: its rate and peak, or why it did not run."""

    variant: Variant
    rate: float | None = None
    peak_rss_bytes: int | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the result of the bench."""
        peak = None if self.peak_rss_bytes is None else self.peak_rss_bytes / 2**30
        figures = {"rate": self.rate, "peak_rss_gib": peak} if self.reason is None else {"not_run": self.reason}
        return {"name": self.variant.name, "what": self.variant.what, **figures}


@dataclass(frozen=True)
class Choice:
    """The variant that is measured, and the trials that led to it; nothing where the reference is not measured."""

    variant: Variant | None = None
    trials: tuple[Trial, ...] = field(default=())

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the measurement."""
        return dict(self.variant.settings) if self.variant is not None else {}

    def to_json(self) -> dict[str, Any]:
        """For the result of the bench."""
        if self.variant is None:
            return {}
        return {"torch_variant": self.variant.name, "torch_variants": [trial.to_json() for trial in self.trials]}


def names(action: str) -> list[str]:
    """The variants of a measurement."""
    return [variant.name for variant in VARIANTS[action]]


def choose(asked: str, action: str, shape: CptShape | RpoShape | GenerateShape, given: Mapping[str, Any], say: Say) -> Choice:
    """The variant called ``asked``, or of all that do the same work as JAX the fastest in one short run each.

    Args:
        asked: Its name, or :data:`ALL`.
        action: What is measured.
        shape: Its sizes; a trial takes fewer steps, and one batch of answers.
        given: The other arguments of the measurement.
        say: Told what was tried, as it comes.

    Raises:
        UserError: there is no such variant, it lacks something here, or none of them ran.
    """
    if asked != ALL:
        return Choice(_named(asked, action, given))
    trials = []
    for variant in _different(action, shape):
        lacking = _lacking(variant, given)
        trial = Trial(variant, reason=lacking) if lacking else _try(variant, action, shape, given)
        trials.append(trial)
        say(f"bench {action}: torch as '{variant.name}': {_outcome(trial)}")
    ran = [trial for trial in trials if trial.rate is not None]
    if not ran:
        raise UserError(f"bench {action}: the reference ran in no variant; the first: {trials[0].reason}")
    return Choice(max(ran, key=lambda trial: trial.rate or 0.0).variant, tuple(trials))


def variant_lines(choice: Choice) -> list[str]:
    """What the table of a comparison says about the variants: the trials, the measured one and the leanest marked."""
    chosen = choice.variant
    if chosen is None:
        return []
    if not choice.trials:
        return [f"        torch ran as '{chosen.name}': {chosen.what}"]
    leanest = min(
        (trial for trial in choice.trials if trial.peak_rss_bytes), key=lambda trial: trial.peak_rss_bytes or 0
    ).variant
    lines = ["        torch ran as the fastest of these, one short run each:"]
    for trial in choice.trials:
        one = trial.to_json()
        marks = [mark for mark, marked in (("fastest", chosen), ("leanest", leanest)) if marked.name == trial.variant.name]
        figures = (
            f"{one['rate']:>10.4g}   peak {one['peak_rss_gib']:.2f} GiB" if "rate" in one else f"not run: {one['not_run']}"
        )
        lines.append("   ".join([f"        {one['name']:<22}{figures}", one["what"], ", ".join(marks)]).rstrip())
    return lines


def _named(asked: str, action: str, given: Mapping[str, Any]) -> Variant:
    for variant in VARIANTS[action]:
        if variant.name == asked:
            if lacking := _lacking(variant, given):
                raise UserError(f"--torch_variant {asked}: {lacking}; give another, or {ALL}")
            return variant
    raise UserError(f"--torch_variant is '{asked}'; expected {ALL}, or one of {', '.join(names(action))}")


def _lacking(variant: Variant, given: Mapping[str, Any]) -> str | None:
    """Why it cannot run here, or would do other work than JAX."""
    reductions = given.get("nll_reduction"), variant.settings.get("nll_reduction", "micro_batch_tokens")
    if reductions == ("sequence", "micro_batch_tokens"):
        return "TRL takes --nll_reduction sequence only one pair a pass"
    modules = [need for need in variant.needs if need != GPU]
    for module in modules:
        if not _installed(module):
            return f"the package '{module}' is not installed"
    if GPU in variant.needs and "devices" not in environment():
        return f"it needs {GPU}"
    return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _different(action: str, shape: CptShape | RpoShape | GenerateShape) -> Sequence[Variant]:
    """The variants, without batches of answers that are larger than the number of prompts makes them."""
    if not isinstance(shape, GenerateShape):
        return VARIANTS[action]
    sizes = [variant.settings["batch_size"] for variant in VARIANTS[action]]
    smaller = [0, *sizes[:-1]]
    return [variant for variant, below in zip(VARIANTS[action], smaller, strict=True) if below < shape.problems]


def _try(variant: Variant, action: str, shape: CptShape | RpoShape | GenerateShape, given: Mapping[str, Any]) -> Trial:
    if isinstance(shape, GenerateShape):
        short: Any = dataclasses.replace(shape, problems=min(shape.problems, variant.settings["batch_size"]))
    else:
        short = dataclasses.replace(shape, steps=_TRIAL_STEPS)
    arguments = {**given, **variant.settings, "shape": dataclasses.asdict(short), "profile": None}
    try:
        found = measure("torch", action, **arguments)
    except (UserError, RuntimeError) as error:  # too large for this machine, or refused by the engine
        return Trial(variant, reason=str(error))
    return Trial(variant, found["rate"], found["peak_rss_bytes"])


def _outcome(trial: Trial) -> str:
    return f"not run: {trial.reason}" if trial.rate is None else f"{trial.rate:.4g} in a short run"
