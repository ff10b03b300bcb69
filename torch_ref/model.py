"""Opening a model the way the QLoRA papers and libraries document it: transformers + bitsandbytes + PEFT.

    base (NF4 or dense, frozen) ── earlier adapters (frozen) ── new adapter (fp32, trained)

The reference of preference training is the same weights with only the new adapter switched off; where an earlier adapter is
itself trained further, its frozen copy.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import peft
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from medllm.config import LoraConfig, ModelConfig, TorchConfig
from medllm.errors import UserError
from medllm.model.adapter import open_adapters
from medllm.model.directory import ModelDirectory
from medllm.model.tokenizer import check_vocabulary, load_tokenizer
from medllm.quantization import PACKINGS
from torch_ref.switches import check_switches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    """This process's accelerator: one GPU a process under ``accelerate launch`` or ``torchrun``, the CPU without one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def open_tokenizer(model: ModelConfig, vocab_size: int) -> Any:
    """The tokenizer of a model, checked against its vocabulary.

    Raises:
        UserError: no tokenizer there, or one that can produce ids the model does not have.
    """
    folder = model.tokenizer or model.path
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    return tokenizer


def check_model(model: ModelConfig) -> ModelDirectory:
    """Refuse, before gigabytes are read, a model or adapter folder that cannot be opened; the model's folder, checked.

    Raises:
        UserError: a folder or file is missing, incomplete or of a kind that is not read, or the weights are stored in another
            quantization than ``model`` says.
    """
    folder = ModelDirectory(model.path)
    folder.names()
    if "auto_map" in folder.config:
        raise UserError(f"{model.path}: config.json asks for code of its own (auto_map); code in model folders is never run")
    if "vocab_size" not in folder.config:
        raise UserError(f"{model.path}/config.json: no vocab_size; a causal language model was expected")
    folder.check_quantization(model.quantization)
    open_adapters(model.adapters, folder)
    return folder


def open_model(model: ModelConfig, switches: TorchConfig | None = None) -> PreTrainedModel | peft.PeftModel:
    """The weights of ``model``, frozen, in evaluation mode, on this process's device, with the attention of ``switches``.

    With ``model.adapter`` the result is a ``PeftModel`` whose adapters are frozen too, and all on.

    Raises:
        UserError: the folder cannot be opened as a causal language model, or a switch cannot be had here.
    """
    folder = check_model(model)
    switches = switches or TorchConfig()
    check_switches(switches, model)
    dtype = DTYPES[model.dtype]
    attention = {} if switches.attention == "sdpa" else {"attn_implementation": switches.attention}
    try:
        base, report = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            # Every data-parallel process holds the whole model on its own GPU: 72B in NF4 is about 41 GB.
            device_map={"": device()},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **attention,
            **_quantized_on_opening(folder, model, dtype),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model.path}: transformers cannot open this model: {str(error).splitlines()[0]}") from error
    # transformers puts random numbers in the place of such a tensor.
    for wrong in (*sorted(report["missing_keys"]), *sorted(str(key[0]) for key in report["mismatched_keys"])):
        raise UserError(
            f"{model.path}: {wrong} is missing or has another shape than config.json makes it; copy the whole model"
        )
    # … and leaves out, with no more than a warning, a tensor the architecture has no place for.
    for unused in sorted(report["unexpected_keys"]):
        raise UserError(
            f"{model.path}: {unused} has no place in a {base.config.model_type} model; config.json is another model's"
        )
    _check_rotation(folder, base.config)
    _settle_types(base, dtype)
    base.requires_grad_(False).eval()
    if not model.adapters:
        return base
    first, *others = model.adapters
    adapted = peft.PeftModel.from_pretrained(base, first, is_trainable=False)
    names = [f"adapter_{index}" for index in range(2, 2 + len(others))]
    for name, path in zip(names, others, strict=True):
        adapted.load_adapter(path, name, is_trainable=False)
    if names:
        adapted.base_model.set_adapter(["default", *names], inference_mode=True)
    return adapted.eval()


def _check_rotation(folder: ModelDirectory, config: Any) -> None:
    """Look at rotary frequencies in the checkpoint, which transformers drops."""
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is not None:
        folder.check_rotation(theta, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _quantized_on_opening(folder: ModelDirectory, model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers is told to quantize; nothing of a directory stored in 4 bits, which says so itself."""
    packing = PACKINGS.get(model.quantization)
    if packing is None or folder.config.get("quantization_config"):
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=packing.double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings}


def open_continued(model: ModelConfig, switches: TorchConfig | None = None) -> peft.PeftModel:
    """``model`` with its last adapter trainable; earlier ones stay on underneath, frozen.

    Raises:
        UserError: as for :func:`open_model`.
    """
    *earlier, last = model.adapters
    base = trainable_base(open_model(dataclasses.replace(model, adapter=tuple(earlier) or None), switches))
    return peft.PeftModel.from_pretrained(base, last, is_trainable=True)


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """Our declaration of an adapter, in PEFT's words."""
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it; a fraction is fine
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PreTrainedModel | peft.PeftModel, lora: LoraConfig) -> peft.PeftModel:
    """Wrap ``model`` with a fresh trainable adapter in fp32; an adapter it already carries stays on underneath, frozen."""
    wrapped = peft.get_peft_model(trainable_base(model), peft_config(lora))
    initialize_adapter(wrapped, lora.seed)
    return wrapped


def initialize_adapter(model: peft.PeftModel, seed: int) -> None:
    """Draw A from U(±1/sqrt(in)), PEFT's kaiming_uniform(a=sqrt(5)), and set B to zero, in the order of the layers."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                a = layer.lora_A[name].weight
                bound = 1 / math.sqrt(a.shape[1])
                a.data.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
                layer.lora_B[name].weight.data.zero_()


def trainable_base(model: PreTrainedModel | peft.PeftModel) -> PreTrainedModel:
    """What a new adapter is put on: ``model`` itself, with its loaded adapters turned into forward hooks.

    PEFT switches all adapters of a layer off together. As hooks of the linear below, the earlier adapters (CPT) stay on
    where the new one (RPO) is off, which is what the reference of preference training must be. Nothing is merged into
    quantized weights.
    """
    if not isinstance(model, peft.PeftModel):
        return model
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in (name for name in layer.active_adapters if name in layer.lora_A):
                layer.get_base_layer().register_forward_hook(_update(layer, name))
    return model.unload()


def _update(layer: LoraLayer, name: str) -> Any:
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]

    def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + (b(a(inputs[0].to(a.weight.dtype))) * scaling).to(output.dtype)

    return add


def _settle_types(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights and computation in ``dtype``.

    Of a folder in 4 bits transformers leaves what is dense in the type it is stored in, whatever it is asked for.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # On a CPU with AVX512-BF16 an evaluation-mode forward would repack the weight for inference only; biased layers
            # then raise, and layers without bias train on with gradients that are None.
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)
