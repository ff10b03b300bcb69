"""Every setting of the study, declared once: the parts that the stages' own (:mod:`medllm.stage_config`) are made of.

Presets in ``medllm/presets`` carry the reason or the source of every number. The paper publishes almost none of its
hyper-parameters, so the defaults here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from medllm.architecture import PROJECTIONS
from medllm.errors import UserError
from medllm.patterns import MOST_PATTERNS, by_pattern, is_quick_pattern
from medllm.quantization import Quantization

RematPolicy = Literal["none", "projections", "attention", "layer"]
"""What the forward pass keeps of a layer for the backward pass, most first; the rest is computed anew there.

- ``none``: everything. Fastest, where it fits: short rows, small models.
- ``projections``: what the layer's matrices give (but ``down_proj``, which only the next layer reads). The matrices are not
  multiplied again, norms, rotation, attention weights and SiLU are: most of the memory for little time.
- ``attention``: only the results as wide as the model or narrower, those of q, k, v, o and of attention itself. The MLP's two
  wide ones, most of them in Qwen2.5, are computed again.
- ``layer``: each layer's input alone, one more forward pass. The least memory: 72B on long rows.
"""

ProblemsFormat = Literal["auto", "igakuqa", "jsonl", "jmmlu", "pharmacist"]
"""Formats of problem files, see :mod:`medllm.exam.loaders`."""

OptionPrompt = Literal["mcqa_minimal", "mcqa_with_options_jp", "mcqa_with_options", "4o_mcqa_instructed_jp", "mcqa", "mcqa_jp"]
"""Prompts that the likelihood of an option is taken after, see :mod:`medllm.exam.option_prompts`."""

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""What can show the lines of a run, see :mod:`medllm.trackers`."""

_NARROW = ("q_proj", "k_proj", "v_proj", "attention", "o_proj")
REMAT_KEEPS: Mapping[RematPolicy, tuple[str, ...] | None] = {
    "none": None,
    "projections": (*_NARROW, "gate_proj", "up_proj"),
    "attention": _NARROW,
    "layer": (),
}
"""Of the results inside a layer (:attr:`medllm.architecture.Architecture.results`): those a policy keeps; None: all of them."""

ALL_LINEAR = tuple(PROJECTIONS)


def expect(holds: bool, setting: str, value: object, expected: str) -> None:
    """Refuse a setting that does not hold.

    Raises:
        UserError: it does not; with the setting, its value, and what was ``expected``.
    """
    if not holds:
        raise UserError(f"{setting} is {value!r}; expected {expected}")


@dataclass(frozen=True)
class ModelConfig:
    """Which weights an engine opens.

    Args:
        path: A Hugging Face model directory (safetensors) of a family that docs/data.md lists.
        adapter: A PEFT LoRA directory applied on top of the weights, frozen; or several, one on top of the other.
        tokenizer: Directory of the tokenizer; the model directory itself when unset.
        quantization: How the weights of the seven linear kinds are stored: like the others, or in 4 bits, as bitsandbytes does.
        dtype: Type of the unquantized weights and of the computation; adapters, moments and losses stay fp32.
    """

    path: str
    adapter: tuple[str, ...] | str | None = None
    tokenizer: str | None = None
    quantization: Quantization = "none"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapter folders in the order they are applied."""
        return (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter or ())


@dataclass(frozen=True)
class LoraConfig:
    """An adapter in PEFT's terms. Scaling is ``alpha / rank`` (``alpha / sqrt(rank)`` with rslora, arXiv 2312.03732).

    Args:
        rank: Width r of the low-rank update.
        alpha: Numerator of the scaling.
        targets: Which of the seven linear kinds carry an adapter. The end of a module's name, from a dot on, names one
            module: ``layers.3.mlp.up_proj``.
        rslora: Scale by ``alpha / sqrt(rank)``.
        seed: Seed of A ~ U(±1/sqrt(in)); B starts at zero.
        rank_pattern: Other ranks, by a regular expression for the end of a module's name.
        alpha_pattern: The same for alpha.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    seed: int = 0
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        expect(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        expect(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "a positive number")
        fits = bool(self.targets) and {target.rsplit(".", 1)[-1] for target in self.targets} <= set(ALL_LINEAR)
        expect(fits, "lora.targets", list(self.targets), f"some of {', '.join(ALL_LINEAR)}")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            named = len(pattern) <= MOST_PATTERNS and all(key and is_quick_pattern(key) for key in pattern)
            expect(named, f"lora.{name}", pattern, "regular expressions for module names, no repetition within a repetition")
        positive = all(rank >= 1 for rank in self.rank_pattern.values())
        expect(positive, "lora.rank_pattern", self.rank_pattern, "ranks of at least 1")
        positive = all(0 < alpha < math.inf for alpha in self.alpha_pattern.values())
        expect(positive, "lora.alpha_pattern", self.alpha_pattern, "positive numbers")

    def covers(self, module: str) -> bool:
        """Whether ``module`` (``model.layers.0.self_attn.q_proj``) carries an adapter, by PEFT's rule for lists."""
        return any(module == target or module.endswith(f".{target}") for target in self.targets)

    def rank_of(self, module: str) -> int:
        """The rank at ``module``; 0 where it carries no adapter."""
        return by_pattern(self.rank_pattern, module, self.rank) if self.covers(module) else 0

    def scaling_of(self, module: str) -> float:
        """What the update of ``module`` is multiplied by; 0 where it carries no adapter."""
        rank = self.rank_of(module)
        alpha = by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank) if rank else 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup and cosine decay to zero, stepped as Hugging Face's Trainer steps it.

    Args:
        learning_rate: Peak learning rate.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, on every adapter matrix.
        warmup_ratio: Fraction of all steps spent in warmup (rounded up).
        clip_norm: Global gradient norm above which gradients are scaled down, after accumulation.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0

    @property
    def moments(self) -> int:
        """Numbers that are kept for each parameter: one for each decay rate."""
        return len(self.betas)

    def __post_init__(self) -> None:
        expect(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a positive number")
        expect(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", list(self.betas), "two numbers in [0, 1)")
        expect(self.eps > 0, "optimizer.eps", self.eps, "a positive number")
        expect(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 (off) or more")
        expect(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", self.warmup_ratio, "a fraction in [0, 1)")
        expect(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "a positive number")


@dataclass(frozen=True, kw_only=True)
class ProblemLayout:
    """How problem files are laid out, and what becomes of a row that cannot be used.

    Args:
        problems_format: What the files are; ``auto`` goes by fields and content.
        layout: YAML file of a layout of one's own, for the files that have its fields.
        on_bad_row: ``stop`` at a row that cannot be used, or ``skip`` it: leave it out and count it, by what is wrong with it.
    """

    problems_format: ProblemsFormat = "auto"
    layout: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class TrainingConfig:
    """The loop both training stages share.

    Args:
        epochs: Passes over the data.
        batch_size: Units (packed rows, or problems/pairs) in one forward and backward pass, over all devices.
        accumulation: Passes added up before one optimizer step.
        seed: Seed of the data order.
        log_every: Optimizer steps between two lines of metrics.
        checkpoint_every: Optimizer steps between two checkpoints (0: none but the last one).
        checkpoint_minutes: Minutes between two checkpoints (0: none but the last one); with both, what comes first.
        keep: Newest checkpoints that are kept. With 1 there is none to go back to where the newest is damaged.
        keep_every: Checkpoints of steps that are multiples of this are kept too, for good (0: none).
        max_steps: Stop after so many optimizer steps (0: run all epochs); the schedule still spans all epochs.
        on_nan: What a loss or gradient that is no finite number does: ``stop`` ends the run before that step, ``skip`` leaves
            the step out. Either names the step, the data it was of, and the layer, and keeps the batch (``medllm replay``).
        max_skipped: So many steps are left out one after the other; the run ends at the next.
        remat: What is computed anew in the backward pass: ``none`` of it, all but ``projections``, all but the narrow ones of
            ``attention``, or all of a ``layer``: less memory, more time. ``auto`` takes the first of these whose step fits the
            device, by its compiler. The reference engine knows ``none`` and ``layer``, transformers' gradient checkpointing.
    """

    epochs: int = 2
    batch_size: int = 1
    accumulation: int = 16
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    keep: int = 2
    keep_every: int = 0
    max_steps: int = 0
    on_nan: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    remat: RematPolicy | Literal["auto"] = "layer"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "log_every", "keep", "max_skipped"):
            expect(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        for name in ("checkpoint_every", "checkpoint_minutes", "keep_every", "max_steps"):
            expect(0 <= getattr(self, name) < math.inf, f"training.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Over which devices a stage runs, on the JAX engine.

    Args:
        mesh: ``fsdp=8,tensor=2``: the devices along each mesh axis, of data, fsdp, tensor and sequence; one of them may be -1,
            the devices that are left. All on one device when unset.
        rules: Which mesh axes an axis of the arrays is spread over, where not as usual: ``mlp=tensor,embed=fsdp+data``.
    """

    mesh: str = ""
    rules: str = ""


@dataclass(frozen=True)
class TorchConfig:
    """How the reference engine does its work: the same numbers but for rounding, at another speed. The JAX engine has none.

    Args:
        attention: transformers' attention. ``sdpa`` is PyTorch's scaled-dot-product attention, what transformers takes by
            itself; ``eager`` is written out in matrix products; ``flash_attention_2`` and ``flash_attention_3`` are packages of
            their own, for bf16 on an NVIDIA GPU.
        liger: Liger's fused Triton kernels for norms, rotation and MLP, and in continued pretraining for head and loss. Needs
            the package ``liger-kernel`` and a GPU.
        precompute_reference: Preference training computes the reference's log-probabilities of all pairs once, before the first
            step, instead of in every step (TRL's ``precompute_ref_log_probs``). Worth it from the second epoch on.
    """

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    liger: bool = False
    precompute_reference: bool = False


def changed(settings: Any) -> dict[str, Any]:
    """Those of a group of settings that are not at their default, by name."""
    return {one.name: value for one in fields(settings) if (value := getattr(settings, one.name)) != one.default}


@dataclass(frozen=True, kw_only=True)
class Recipe(MeshConfig):
    """How a model is trained, whichever it is: what an engine that is opened on one is given.

    Args:
        lora: The adapter.
        optimizer: AdamW and its schedule.
        training: The loop.
        resume: ``auto`` goes on from the last whole checkpoint of a run that is in the folder and not finished, and begins one
            where there is none; ``true`` goes on in any case, and refuses a folder without a run; ``false`` refuses one with.
        tracker: Where the logged lines are shown too: TensorBoard's events, or the tracker of a package of its own. Each writes
            into the run folder, and nothing leaves this machine, unless its own environment variables say so.
        torch: How the reference engine does its work.
    """

    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    resume: bool | Literal["auto"] = "auto"
    tracker: TrackerName = "tensorboard"
    torch: TorchConfig = field(default_factory=TorchConfig)


@dataclass(frozen=True)
class Sampling:
    """How text is generated. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch those filters off.

    Args:
        max_new_tokens: Longest continuation, end tokens not counted.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Smallest set of tokens whose probability reaches this.
        top_k: Only the k most likely tokens.
        samples: Continuations for each prompt.
        seed: The text of (prompt, sample) depends on this seed, not on what else is in the batch.
        stop: Strings that end a continuation; they are cut off. One that is a special token ends it by its id.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expect(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "at least 1")
        expect(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        expect(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a probability in (0, 1]")
        expect(self.top_k >= 0, "sampling.top_k", self.top_k, "0 (off) or more")
        expect(self.samples >= 1, "sampling.samples", self.samples, "at least 1")
        expect("" not in self.stop, "sampling.stop", list(self.stop), "strings of at least one character: any text holds ''")
        differ = self.samples == 1 or self.temperature > 0
        expect(differ, "sampling.temperature", self.temperature, f"above 0 to draw {self.samples} different samples")


@dataclass(frozen=True)
class PreferenceLoss:
    """RPO = DPO + alpha · NLL(preferred). alpha = 10 is the paper's figure; alpha = 0 is plain DPO.

    Args:
        name: The objective: ``rpo``, ``dpo``, ``cdpo``, ``robust``, ``hinge``, ``ipo``, ``dpo_norm`` (by length), ``kto_pair``,
            and without a reference ``simpo`` and ``orpo``. Engine torch has those that TRL's DPOTrainer has.
        beta: Inverse temperature; ipo's tau, orpo's lambda. dpo_norm and simpo compare by token: theirs is larger.
        alpha: Weight of the preferred response's negative log-likelihood (rpo).
        nll_reduction: ``sequence``: mean over each response's own tokens (Pang et al.); ``micro_batch_tokens``: mean over
            all preferred tokens of the micro-batch (TRL) (rpo, orpo).
        label_smoothing: Share of the labels that is taken to be wrong (cdpo, robust).
        gamma: The margin to be reached (simpo).
    """

    name: str = "rpo"
    beta: float = 0.1
    alpha: float = 10.0
    nll_reduction: Literal["sequence", "micro_batch_tokens"] = "sequence"
    label_smoothing: float = 0.1
    gamma: float = 0.5

    def __post_init__(self) -> None:
        expect(0 <= self.label_smoothing < 0.5, "loss.label_smoothing", self.label_smoothing, "a share in [0, 0.5)")
        expect(self.gamma >= 0, "loss.gamma", self.gamma, "0 or more")
        expect(self.beta > 0, "loss.beta", self.beta, "a positive number")
        expect(self.alpha >= 0, "loss.alpha", self.alpha, "0 (plain DPO) or more")


@dataclass(frozen=True)
class PairConfig:
    """Which pairs of the hierarchy ground truth > chosen > rejected are trained on.

    Args:
        max_chosen: Distinct chosen samples kept for each problem (0: all).
        max_rejected: Distinct rejected samples kept for each problem (0: all).
        unit: What one unit of ``training.batch_size`` is: a ``problem`` with all its pairs, or a single ``pair``.
            The reference engine always trains on single pairs, as TRL does.
        max_length: Longest prompt + response in tokens; a longer response is cut at the end (TRL's ``keep_start``).
    """

    max_chosen: int = 1
    max_rejected: int = 1
    unit: Literal["problem", "pair"] = "problem"
    max_length: int = 4096

    def __post_init__(self) -> None:
        expect(self.max_chosen >= 0, "pairs.max_chosen", self.max_chosen, "0 (all) or more")
        expect(self.max_rejected >= 0, "pairs.max_rejected", self.max_rejected, "0 (all) or more")
        expect(self.max_length >= 2, "pairs.max_length", self.max_length, "at least 2 tokens")


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(Recipe):
    """How a model is trained on preferences. One epoch over all pairs is the paper's figure.

    Args:
        loss: RPO or DPO.
        pairs: Which pairs.
        lora: The adapter; under ``continue`` it is stage 1's own.
        handover: What becomes of ``model.adapter``. ``merge`` (the paper's way) adds it to the unquantized weights, into
            ``<run>/merged``, and trains on those. ``stack`` leaves it as it is and trains a second one on top. ``continue``
            trains it further; the reference is a frozen copy of it.
        reference_cache: Folder for the reference's log-probabilities, which later runs over the same model and data then read.
            Unset, they are kept in the run folder where more than one epoch reads them, and computed in each step where not.
            The JAX engine's.
    """

    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    pairs: PairConfig = field(default_factory=PairConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=1))
    handover: Literal["merge", "stack", "continue"] = "merge"
    reference_cache: str | None = None
