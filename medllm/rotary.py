"""How queries and keys turn with their position: RoFormer (arXiv 2104.09864), and the rules that stretch it to longer texts.

A rule is read from a ``config.json`` as transformers reads it and gives the frequencies transformers computes, operation by
operation, so that an angle at position 100,000 is the same one: a frequency's last bit is a hundredth of a radian there.
No framework is imported; the frequencies are numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from medllm.errors import UserError

_HUGE = 1e30  # nothing a model has comes near it, and its products stay numbers


@dataclass(frozen=True)
class Linear:
    """Every frequency divided by ``factor``: positions are read as if they stood closer together."""

    kind: ClassVar[str] = "linear"
    factor: float

    def scaled(self, rule: RotaryRule, periods: np.ndarray) -> np.ndarray:
        """The frequencies, from the unscaled periods."""
        return (1 / periods) / self.factor

    @property
    def attention_factor(self) -> float:
        """By which the rotated queries and keys are multiplied."""
        return 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's rule: long waves are divided by ``factor``, short ones stay, those between go over smoothly.

    Attributes:
        factor: By which frequencies are divided whose wave is longer than the original context over ``low_freq_factor``.
        low_freq_factor: See ``factor``.
        high_freq_factor: Waves shorter than the original context over this stay as they are.
        original_max_position_embeddings: Context before it was stretched.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, rule: RotaryRule, periods: np.ndarray) -> np.ndarray:
        """The frequencies, from the unscaled periods."""
        one, context = periods.dtype.type, self.original_max_position_embeddings
        frequencies = 1 / periods
        waves = one(2 * math.pi) / frequencies
        slow, fast = context / self.low_freq_factor, context / self.high_freq_factor
        divided = np.where(waves > one(slow), frequencies / one(self.factor), frequencies)
        smooth = (one(context) / waves - one(self.low_freq_factor)) / one(self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * divided / one(self.factor) + smooth * divided
        return np.where((waves < one(fast)) | (waves > one(slow)), divided, between)

    @property
    def attention_factor(self) -> float:
        """By which the rotated queries and keys are multiplied."""
        return 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): long waves are divided by ``factor``, short ones stay, between them a straight ramp.

    Attributes:
        factor: How much longer texts become.
        original_max_position_embeddings: Context before it was stretched.
        attention: By which the rotated queries and keys are multiplied; None for 0.1 · ln(factor) + 1, or what ``mscale`` says.
        beta_fast: Waves that turn more often than this within the original context stay.
        beta_slow: Waves that turn more rarely are divided.
        mscale: With ``mscale_all_dim``: the attention factor is the quotient of the two (DeepSeek's way).
        mscale_all_dim: See ``mscale``.
        truncate: The ramp's ends are whole dimensions.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scaled(self, rule: RotaryRule, periods: np.ndarray) -> np.ndarray:
        """The frequencies, from the unscaled periods."""
        one, width = periods.dtype.type, 2 * len(periods)
        low, high = (self._dimension(turns, width, rule.theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 * (low == high)
        ramp = np.clip((np.arange(len(periods), dtype=periods.dtype) - one(low)) / one(high - low), 0, 1)
        kept = 1 - ramp
        return 1 / (one(self.factor) * periods) * (1 - kept) + 1 / periods * kept

    def _dimension(self, turns: float, width: int, theta: float) -> float:
        """The dimension whose wave turns so often within the original context."""
        return width * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def attention_factor(self) -> float:
        """By which the rotated queries and keys are multiplied."""
        if self.attention is not None:
            return self.attention
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale(1.0)

    def _scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


Scaling = Linear | Llama3 | Yarn
SCALINGS: Mapping[str, type[Scaling]] = {one.kind: one for one in (Linear, Llama3, Yarn)}
"""The rules beside ``default``, by what ``rope_type`` calls them."""

_KEYS = {"attention": "attention_factor"}
"""Our name → that of a ``config.json``, where they differ."""


@dataclass(frozen=True)
class RotaryRule:
    """The rotation of heads by position, in Hugging Face's half-split layout.

    Attributes:
        theta: The base of the periods.
        scaling: What stretches it; None for RoFormer's own.
    """

    theta: float
    scaling: Scaling | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: object) -> RotaryRule:
        """Read from a ``config.json`` in transformers' order: ``rope_scaling``, where it says anything, before
        ``rope_parameters``; theta of that entry before a bare ``rope_theta``, and 10,000 where there is none.

        Raises:
            UserError: positions are scaled by a rule that is not in :data:`SCALINGS`, the rule lacks a number, only a part of
                a head turns, or layers have rules of their own.
        """
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise UserError(f"{where}: rope_scaling or rope_parameters is {rope!r}; an object is needed")
        if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
            raise UserError(f"{where}: rotary rules of single layers ({nested[0]}) are not supported; one for all is needed")
        for entry in (rope, config):
            if (part := entry.get("partial_rotary_factor")) not in (None, 1):
                raise UserError(f"{where}: partial_rotary_factor {part} is not supported; whole heads turn (1.0)")
        theta = _positive(rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta", where)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return cls(theta)
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise UserError(f"{where}: rope scaling {kind!r} is not supported; there are default, {', '.join(SCALINGS)}")
        return cls(theta, _scaling(SCALINGS[kind], dict(rope), config, where))

    def to_hf(self) -> dict[str, Any]:
        """Its entries of a ``config.json``, as every release of transformers reads them."""
        if self.scaling is None:
            return {"rope_theta": self.theta}
        given = {field.name: getattr(self.scaling, field.name) for field in fields(self.scaling)}
        scaling = {_KEYS.get(name, name): value for name, value in given.items() if value is not None}
        return {"rope_theta": self.theta, "rope_scaling": {"rope_type": self.scaling.kind, **scaling}}

    def frequencies(self, head_dim: int, dtype: Any = np.float64) -> np.ndarray:
        """Radians by which each of the ``head_dim / 2`` pairs of a head turns from a position to the next: theta^(-2i / x),
        scaled. In float32 it is rounded where transformers rounds it; float64 is the truth."""
        dtype = np.dtype(dtype).type
        exponents = np.arange(0, head_dim, 2, dtype=dtype) / dtype(head_dim)
        periods = (self.theta ** exponents.astype(np.float64)).astype(dtype)
        return 1 / periods if self.scaling is None else self.scaling.scaled(self, periods)

    @property
    def attention_factor(self) -> float:
        """By which the rotated queries and keys are multiplied."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor


def _scaling(kind: type[Scaling], rope: dict[str, Any], config: Mapping[str, Any], where: object) -> Scaling:
    """The numbers of a rule, completed as transformers completes them."""
    if (original := config.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind is Yarn and "factor" in rope and rope["factor"] is None:
        before, after = rope["original_max_position_embeddings"], config["max_position_embeddings"]
        rope["factor"] = _positive(after, "max_position_embeddings", where) / _positive(before, "original context", where)
    found: dict[str, Any] = {}
    for field in fields(kind):
        key = _KEYS.get(field.name, field.name)
        value = rope.get(key)
        if value is None and field.default is not MISSING:
            continue
        if field.name == "truncate" and not isinstance(value, bool):
            raise UserError(f"{where}: {key} of the rope scaling {kind.kind!r} is {value!r}; true or false is needed")
        if field.name != "truncate":
            _positive(value, f"{key} of the rope scaling {kind.kind!r}", where)
        found[field.name] = value
    return kind(**found)


def _positive(value: Any, name: str, where: object) -> float:
    """A number by which something is divided, or whose logarithm is taken."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
        raise UserError(f"{where}: {name} is {value!r}; a positive number is needed")
    return float(value)
