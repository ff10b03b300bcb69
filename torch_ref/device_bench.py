"""What ``scripts/gpu_bench.sh`` measures of the reference engine, each in a process of its own (:mod:`medllm.bench.device`).

The model is transformers' own on the meta device, its linear layers replaced by bitsandbytes' ``Linear4bit``: of each shape one
random weight is quantized on the device, by bitsandbytes, and every layer gets a copy. Steps are those of the Trainers as the
recipes set them up, on rows that are tokens already, in each of several ways: the fastest counts, the others are named.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.data import default_collate
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from medllm.bench.device_shapes import PAIRS, DeviceShape
from medllm.bench.shapes import ModelShape
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PreferenceLoss, TrainingConfig
from medllm.errors import UserError
from medllm.host.child import serve
from medllm.host.memory import peak_resident_bytes
from medllm.quantization import PACKINGS, Packing
from torch_ref.cpt import RowFeatures
from torch_ref.model import DTYPES, add_adapter, device, initialize_adapter, peft_config
from torch_ref.rpo import loss_arguments
from torch_ref.trainer import trainer_arguments

STEPS = 3
"""Steps that are timed, after one that is not; fewer where the time for them is up, at least one."""
_SPREAD = 0.02


@dataclass(frozen=True)
class Variant:
    """A way to set a trainer.

    Attributes:
        name: What the table calls it.
        keeps_all: Nothing is recomputed in the backward pass; else each layer keeps its input alone.
        pairs: Pairs of a problem that are computed together (RPO; 1 for CPT).
        reference_before: The reference's log-probabilities are computed before training, and not in the step's time.
        liger: Liger's fused kernels.
    """

    name: str
    keeps_all: bool = False
    pairs: int = 1
    reference_before: bool = False
    liger: bool = False


CPT_VARIANTS = (
    Variant("all kept, Liger", keeps_all=True, liger=True),
    Variant("all kept", keeps_all=True),
    Variant("recomputed"),
)
"""The fastest come first, so that where the time ends early it was not spent on the others."""
RPO_VARIANTS = (
    Variant("all pairs together, reference before", pairs=len(PAIRS), reference_before=True),
    Variant("all pairs together, reference before, Liger", pairs=len(PAIRS), reference_before=True, liger=True),
    Variant("a pair a pass, reference before, all kept", keeps_all=True, reference_before=True),
    Variant("all pairs together", pairs=len(PAIRS)),
    Variant("a pair a pass"),
)
_END = "</s>"


def rates(*, side: int, copied: int, smoke: bool) -> dict[str, Any]:
    """What the device can do: operations a second of a bf16 product ``side``³, bytes a second of a copy, read and written."""
    where = _device(smoke)
    left, right = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (copied,), device=where, dtype=torch.uint8)
    target = torch.empty_like(source)
    on_gpu = where.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(where) if on_gpu else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(where).total_memory if on_gpu else None,
        "matrix_flops": 2 * side**3 / _seconds(lambda: torch.matmul(left, right)),
        "copy_bytes": 2 * copied / _seconds(lambda: target.copy_(source)),
    }


def cpt(*, shape: dict[str, Any], seconds: float, smoke: bool) -> dict[str, Any]:
    """A continued-pretraining step of transformers' Trainer, set the fastest way that runs."""
    where, work = _device(smoke), DeviceShape.from_json(shape)

    def trainer(one: DeviceShape, variant: Variant, scratch: str) -> Trainer:
        model = add_adapter(random_model(one.model, where), _lora(one.model))
        model.config.use_cache = False
        arguments = TrainingArguments(**_arguments(one, scratch, one.rows, variant))
        rows = RowFeatures(one.cpt_rows(STEPS + 1))
        return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_collate)

    return {**_best(CPT_VARIANTS, work, trainer, seconds, where), "units": work.rows * work.length}


def rpo(*, shape: dict[str, Any], seconds: float, smoke: bool) -> dict[str, Any]:
    """A preference step of TRL's DPOTrainer over pairs of a problem, set the fastest way that runs."""
    where, work = _device(smoke), DeviceShape.from_json(shape)
    pairs = [
        {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
        for prompt, chosen, rejected in work.group().pair_tokens()
    ]

    def trainer(one: DeviceShape, variant: Variant, scratch: str) -> Trainer:
        arguments = DPOConfig(
            **_arguments(one, scratch, variant.pairs, variant),
            **loss_arguments(PreferenceLoss()),
            max_length=one.prompt + one.response,
            precompute_ref_log_probs=variant.reference_before,
        )
        made = _TokenTrainer(
            model=random_model(one.model, where),
            args=arguments,
            train_dataset=Dataset.from_list([pairs[row % len(pairs)] for row in range((STEPS + 1) * variant.pairs)]),
            processing_class=_one_word_tokenizer(),
            peft_config=peft_config(_lora(one.model)),
        )
        initialize_adapter(made.model, 0)
        return made

    found = _best(RPO_VARIANTS, work, trainer, seconds, where)
    return {**found, "units": found["pairs"] / len(PAIRS)}


def _best(
    variants: Sequence[Variant],
    work: DeviceShape,
    trainer: Callable[[DeviceShape, Variant, str], Trainer],
    seconds: float,
    where: torch.device,
) -> dict[str, Any]:
    """Measure each way to set the trainer, within the time for them; the fastest by the work done, and of all what they took.

    Raises:
        RuntimeError: none ran; says why the last did not.
    """
    begun, tried, best = time.perf_counter(), [], None
    for variant in variants:
        line: dict[str, Any] = {"variant": variant.name}
        if variant.liger and importlib.util.find_spec("liger_kernel") is None:
            tried.append({**line, "error": "liger_kernel is not installed"})
            continue
        if best is not None and time.perf_counter() - begun > 2 * seconds:
            tried.append({**line, "error": "not begun: the time for it is up"})
            continue
        try:
            found = _measured(variant, work, trainer, seconds / len(variants), where)
        except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError, AttributeError) as error:
            tried.append({**line, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"})
        else:
            tried.append({**line, "step_s": found["depths"][-1]["step_s"], "peak_bytes": found["peak_bytes"]})
            if best is None or _cost(found) < _cost(best):
                best = found
        _forget()
    if best is None:
        raise RuntimeError(f"no way to set the trainer ran; {tried[-1]['variant']}: {tried[-1]['error']}")
    return {**best, "tried": tried}


def _measured(
    variant: Variant,
    work: DeviceShape,
    trainer: Callable[[DeviceShape, Variant, str], Trainer],
    seconds: float,
    where: torch.device,
) -> dict[str, Any]:
    """Steps at each depth of the shape; the peak is the deepest's."""
    depths: list[dict[str, Any]] = []
    for layers in work.depths or (work.model.layers,):
        _forget()
        one = replace(work, model=replace(work.model, layers=layers))
        with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
            found = _trained(trainer(one, variant, scratch), seconds / max(1, len(work.depths)))
        depths.append({"layers": layers, "step_s": found["step_s"], "steps_s": found["steps_s"]})
    kept = {"loss": found["loss"], "variant": variant.name, "pairs": variant.pairs}
    kept["reference"] = not variant.reference_before
    return {"compile_s": 0.0, "depths": depths, "peak_bytes": _peak(where), **kept}


def _cost(found: dict[str, Any]) -> float:
    """Seconds a unit of work, at the deepest depth."""
    return found["depths"][-1]["step_s"] / found["pairs"]


def _forget() -> None:
    """Give back what the last trainer held, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class _TokenTrainer(DPOTrainer):
    """TRL's trainer on rows that are token ids already, in the columns its own preparation makes."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class _Stopwatch(TrainerCallback):
    """Seconds of each optimizer step; ends the run when the time for it is up and a step has been timed."""

    def __init__(self, seconds: float):
        self.times: list[float] = []
        self._seconds = seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _finish()
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _finish()
        self.times.append(time.perf_counter() - self._begun)
        if len(self.times) > 1 and sum(self.times[1:]) >= self._seconds:
            control.should_training_stop = True


def random_model(shape: ModelShape, where: torch.device) -> Qwen2ForCausalLM:
    """A frozen model of this shape on a device, linear layers in NF4 as bitsandbytes packs random weights or dense."""
    dtype = DTYPES[shape.dtype]
    config = Qwen2Config.from_dict(shape.architecture.to_hf())
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    packed: dict[torch.Size, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear) and shape.quantization in PACKINGS:
                    setattr(block, name, _packed(linear, packed, PACKINGS[shape.quantization], dtype, where))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            value = torch.empty(parameter.shape, dtype=dtype, device=where)
            value = value.fill_(1.0) if "norm" in name else value.normal_(0.0, _SPREAD)
            setattr(module, attribute, torch.nn.Parameter(value, requires_grad=False))
    # The frequencies are a buffer that the model computes when it is built, and on the meta device does not.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(where)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"transformers' Qwen2 has {left[0]}, which this measurement leaves without a value")
    model.config.dtype = dtype
    model.is_loaded_in_4bit = shape.quantization in PACKINGS  # what PEFT, TRL and accelerate go by
    return model.requires_grad_(False).eval()


def _packed(
    linear: torch.nn.Linear,
    packed: dict[torch.Size, tuple[torch.Tensor, dict[str, torch.Tensor]]],
    packing: Packing,
    dtype: torch.dtype,
    where: torch.device,
) -> Linear4bit:
    shape = linear.weight.shape
    if shape not in packed:
        dense = torch.empty(shape, dtype=dtype, device=where).normal_(0.0, _SPREAD)
        data, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=packing.double, quant_type="nf4")
        packed[shape] = data, state.as_dict(packed=True)
    with torch.device("meta"):
        layer = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
    data, parts = packed[shape]
    own = {f"weight.{name}": part.clone() for name, part in parts.items()}
    layer.weight = Params4bit.from_prequantized(data.clone(), own, requires_grad=False, device=where, module=layer)
    layer.compute_type_is_set = True
    layer.support_avx512bf16_for_cpu = False  # or a CPU repacks the weight for inference only
    return layer


def _arguments(work: DeviceShape, scratch: str, batch: int, variant: Variant) -> dict[str, Any]:
    """The recipes' own, but for what is written to disk."""
    model = ModelConfig("generated", quantization=work.model.quantization, dtype=work.model.dtype)
    training = TrainingConfig(epochs=1, accumulation=1, remat="none" if variant.keeps_all else "layer")
    run: Any = SimpleNamespace(path=Path(scratch))
    arguments = trainer_arguments(model, OptimizerConfig(), training, run, batch=batch, accumulation=1)
    return {**arguments, "save_strategy": "no", "disable_tqdm": True, "use_liger_kernel": variant.liger}


def _trained(trainer: Trainer, seconds: float) -> dict[str, Any]:
    stopwatch = _Stopwatch(seconds)
    trainer.add_callback(stopwatch)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    timed = stopwatch.times[1:]
    return {
        "step_s": statistics.median(timed),
        "steps_s": timed,
        "loss": losses[-1],
    }


def _lora(shape: ModelShape) -> LoraConfig:
    return LoraConfig(rank=shape.rank, alpha=2 * shape.rank)


def _one_word_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants a tokenizer, for the id of its padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({_END: 0}, unk_token=_END)), eos_token=_END, pad_token=_END
    )


def _seconds(function: Any, repeats: int = 7, calls: int = 5) -> float:
    """Of one call, median of ``repeats``; ``calls`` are sent off together so that sending them costs nothing."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        _finish()
        begun = time.perf_counter()
        for _ in range(calls):
            function()
        _finish()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device(smoke: bool) -> torch.device:
    if not smoke and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; install a torch with CUDA, and look at nvidia-smi")
    return device()


def _peak(where: torch.device) -> int:
    """Most bytes of device memory allocated at a time; of this process where the device is the host."""
    return torch.cuda.max_memory_allocated(where) if where.type == "cuda" else peak_resident_bytes()


if __name__ == "__main__":
    sys.exit(serve({"rates": rates, "cpt": cpt, "rpo": rpo}, sys.argv[1:]))
