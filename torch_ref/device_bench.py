"""What ``scripts/gpu_bench.sh`` measures of the reference engine, each in a process of its own (:mod:`medllm.bench.device`).

The model is transformers' own on the meta device, its linear layers replaced by bitsandbytes' ``Linear4bit``: of each shape one
random weight is quantized on the device, by bitsandbytes, and every layer gets a copy. Steps are those of the Trainers as the
recipes set them up, on rows that are tokens already.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
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
from medllm.child import serve
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PreferenceLoss, TrainingConfig
from medllm.errors import UserError
from medllm.process_memory import peak_resident_bytes
from torch_ref.cpt import RowFeatures
from torch_ref.model import DTYPES, add_adapter, device, initialize_adapter, peft_config
from torch_ref.trainer import trainer_arguments

STEPS = 3
"""Steps that are timed, after one that is not; fewer where the time for them is up, at least one."""
_SPREAD = 0.02
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
    """A continued-pretraining step of transformers' Trainer."""
    where, work = _device(smoke), DeviceShape.from_json(shape)
    rows = work.cpt_rows(STEPS + 1)
    model = add_adapter(random_model(work.model, where), _lora(work.model))
    model.config.use_cache = False
    with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
        arguments = TrainingArguments(**_arguments(work, scratch, work.rows))
        trainer = Trainer(model=model, args=arguments, train_dataset=RowFeatures(rows), data_collator=default_collate)
        found = _trained(trainer, seconds)
    return {**found, "peak_bytes": _peak(where), "units": work.rows * work.length}


def rpo(*, shape: dict[str, Any], seconds: float, smoke: bool) -> dict[str, Any]:
    """A preference step of TRL's DPOTrainer over one pair of a problem; a problem is as many steps as it has pairs."""
    where, work = _device(smoke), DeviceShape.from_json(shape)
    loss = PreferenceLoss()
    pairs = [
        {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
        for prompt, chosen, rejected in work.group().pair_tokens()
    ]
    with tempfile.TemporaryDirectory(prefix="medllm-bench-") as scratch:
        arguments = DPOConfig(
            **_arguments(work, scratch, 1),
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, loss.alpha],
            beta=loss.beta,
            max_length=work.prompt + work.response,
        )
        trainer = _TokenTrainer(
            model=random_model(work.model, where),
            args=arguments,
            train_dataset=Dataset.from_list([pairs[step % len(pairs)] for step in range(STEPS + 1)]),
            processing_class=_one_word_tokenizer(),
            peft_config=peft_config(_lora(work.model)),
        )
        initialize_adapter(trainer.model, 0)
        found = _trained(trainer, seconds)
    return {**found, "peak_bytes": _peak(where), "units": 1 / len(PAIRS)}


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
    """A frozen model of this shape on a device, linear layers in NF4 as bitsandbytes packs random weights."""
    dtype = DTYPES[shape.dtype]
    config = Qwen2Config.from_dict(shape.config())
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    packed: dict[torch.Size, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, _packed(linear, packed, dtype, where))
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
    model.is_loaded_in_4bit = True  # what PEFT, TRL and accelerate go by
    return model.requires_grad_(False).eval()


def _packed(
    linear: torch.nn.Linear,
    packed: dict[torch.Size, tuple[torch.Tensor, dict[str, torch.Tensor]]],
    dtype: torch.dtype,
    where: torch.device,
) -> Linear4bit:
    shape = linear.weight.shape
    if shape not in packed:
        dense = torch.empty(shape, dtype=dtype, device=where).normal_(0.0, _SPREAD)
        data, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
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


def _arguments(work: DeviceShape, scratch: str, batch: int) -> dict[str, Any]:
    """The recipes' own, but for what is written to disk."""
    model = ModelConfig("generated", quantization=work.model.quantization, dtype=work.model.dtype)
    training = TrainingConfig(epochs=1, accumulation=1, remat="layer")
    run: Any = SimpleNamespace(path=Path(scratch))
    arguments = trainer_arguments(model, OptimizerConfig(), training, run, batch=batch, accumulation=1)
    return {**arguments, "save_strategy": "no", "disable_tqdm": True}


def _trained(trainer: Trainer, seconds: float) -> dict[str, Any]:
    stopwatch = _Stopwatch(seconds)
    trainer.add_callback(stopwatch)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    timed = stopwatch.times[1:]
    return {
        "step_s": statistics.median(timed),
        "steps_s": timed,
        "compile_s": 0.0,
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
