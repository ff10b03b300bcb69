"""LoRA adapters on disk: PEFT directories, read, checked against the model they are for, merged into it, written.

Which modules carry an adapter, at which rank and with which scaling is decided by PEFT's own rules, patterns included
(:class:`medllm.config.LoraConfig`). What PEFT can save and this project does not compute is refused when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from medllm.architecture import PROJECTIONS, layer_path
from medllm.config import ALL_LINEAR, LoraConfig
from medllm.errors import UserError
from medllm.host.processes import tell
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.files import ADAPTER, open_safetensors
from medllm.patterns import LONGEST_NAME, is_quick_pattern, names
from medllm.run import atomic_path, write_json
from medllm.text_files import read_json_object

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"base_model\.model\.(?P<module>.{{1,{LONGEST_NAME}}})\.lora_(?P<matrix>[AB])\.weight")
_LINEAR_WEIGHT = re.compile(rf"(?P<module>model\.layers\.\d+\..+\.({'|'.join(ALL_LINEAR)}))\.weight")
_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.")

# Settings that change what an adapter computes beyond W + scaling · B A on single linear layers; none of them is read.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "layers_pattern", "exclude_modules"),
    *("arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
# Initializations after which the base weights are those of the base model; the others (pissa, olora, …) subtract from them.
_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its settings, and its tensors under PEFT's keys; A is [rank, in], B is [out, rank]."""

    lora: LoraConfig
    tensors: Mapping[str, np.ndarray]
    path: str = ""

    def modules(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Base module name (``model.layers.0.self_attn.q_proj``) → (A, B).

        Raises:
            UserError: a tensor is missing, is none of LoRA's, or has another rank than the settings give it.
        """
        matrices: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in self.tensors.items():
            match = _TENSOR.fullmatch(key)
            if match is None:
                raise UserError(f"{self.path}: holds {key}, which is no matrix of a LoRA adapter; export a plain LoRA adapter")
            matrices.setdefault(match["module"], {})[match["matrix"]] = tensor
        if not matrices:
            raise UserError(f"{self.path}: the adapter holds no lora_A tensors (an empty save); train or export it again")
        return {module: self._pair(module, found) for module, found in matrices.items()}

    def update(self, module: str, pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """What is added to the weight of ``module``: scaling · B A, [out, in] in fp32."""
        a, b = (matrix.astype(np.float32) for matrix in pair)
        return np.float32(self.lora.scaling_of(module)) * (b @ a)

    def _pair(self, module: str, found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        for matrix in "AB":
            if matrix not in found:
                other = "A" if matrix == "B" else "B"
                raise UserError(
                    f"{self.path}: the lora_{other} of {module} has no matching lora_{matrix}; copy the whole adapter"
                )
        rank = self.lora.rank_of(module)
        if not rank:
            raise UserError(f"{self.path}: holds matrices of {module}, which target_modules in {ADAPTER} does not name")
        a, b = found["A"], found["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(f"{self.path}: {module} has A {a.shape} and B {b.shape}, but {ADAPTER} gives it rank {rank}")
        return a, b


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA directory.

    A regular expression in ``target_modules``, and ``layers_to_transform``, become the names of the modules they select.

    Raises:
        UserError: no adapter there, or one of a kind that is not supported (DoRA, biases, saved modules …).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; give a PEFT directory (with {ADAPTER})")
    config = read_json_object(folder / ADAPTER, "a PEFT folder has one")
    _refuse_unsupported(folder, config)
    file = folder / WEIGHTS
    if not file.exists():
        raise UserError(f"{folder}: no {WEIGHTS}; only safetensors adapters are read")
    with open_safetensors(file) as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    modules = {match["module"] for name in tensors if (match := _TENSOR.fullmatch(name))}
    try:
        lora = LoraConfig(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            targets=_targets(folder, config, modules),
            rslora=bool(config.get("use_rslora", False)),
            rank_pattern={key: int(rank) for key, rank in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={key: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / ADAPTER}: r, lora_alpha or a pattern is not what PEFT writes there ({error})") from error
    except UserError as error:
        raise UserError(f"{folder / ADAPTER}: {error}") from None
    return Adapter(lora, tensors, str(folder))


def check_adapter(adapter: Adapter, base: ModelDirectory) -> None:
    """Hold an adapter against the model it is to be put on, before anything is loaded or written.

    Raises:
        UserError: it adapts a module the model lacks, lacks matrices of one it targets, or has another shape.
    """
    modules = adapter.modules()
    for module, (a, b) in modules.items():
        name = f"{module}.weight"
        if name not in base:
            raise UserError(
                f"{adapter.path}: has an update for {name}, which {base.path} does not have; is it for another model?"
            )
        expected = (b.shape[0], a.shape[1])
        if base.logical_shape(name) != expected:
            raise UserError(
                f"{adapter.path}: the update of {name} is {expected}, the weight in {base.path} is {base.logical_shape(name)}; "
                "is it for another model?"
            )
    for name in base.names():
        match = _LINEAR_WEIGHT.fullmatch(name)
        if match and adapter.lora.covers(match["module"]) and match["module"] not in modules:
            raise UserError(f"{adapter.path}: has no matrices for {match['module']}, which it targets; copy the whole adapter")


def write_adapter(path: str | Path, lora: LoraConfig, tensors: Mapping[str, np.ndarray], base_model: str) -> None:
    """Write a directory that ``peft.PeftModel.from_pretrained`` loads. ``tensors`` has PEFT's keys.

    Raises:
        UserError: there is nothing to write.
    """
    if not tensors:
        raise UserError(f"{path}: no adapter tensors to write")
    with atomic_path(Path(path)) as scratch:
        scratch.mkdir()
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, scratch / WEIGHTS, {"format": "pt"})
        write_json(scratch / ADAPTER, _peft_config(lora, base_model))


def check_trained(path: str | Path) -> None:
    """Look at an adapter that a training left: all of it is there and finite. One that changes nothing is told of.

    Raises:
        UserError: it is not.
    """
    adapter = read_adapter(path)
    pairs = adapter.modules()
    broken = next((name for name, tensor in adapter.tensors.items() if not np.isfinite(tensor).all()), None)
    if broken is not None:
        raise UserError(f"{path}: {broken} is not finite; lower --optimizer.learning_rate and train again")
    if not any(b.any() for _, b in pairs.values()):
        tell(f"{path}: every B is still zero, so the adapter changes nothing; see the learning rate and the number of steps")


def merge_adapter(base: str | Path, adapter: str | Path | Collection[str], out: str | Path) -> None:
    """Write ``base`` with ``adapter`` added to its weights: W + scaling · B A, in fp32, rounded once to the stored type.

    This is the hand-over between the two training stages: the merged weights are quantized anew by whoever opens them,
    so nothing is ever added to an already quantized weight. One tensor is in memory at a time.

    Args:
        base: A model folder with unquantized weights.
        adapter: An adapter folder, or several that are added one after the other.
        out: The folder to write; tokenizer and generation config come with it.

    Raises:
        UserError: the base is stored in 4 bits, an adapter does not fit it, or a sum is not finite.
    """
    model = ModelDirectory(base)
    adapters = open_adapters([adapter] if isinstance(adapter, str | Path) else adapter, model)
    refuse_packed(model)
    updates = [(one, one.modules()) for one in adapters]

    def merged() -> Iterable[tuple[str, np.ndarray]]:
        for name in model.names():
            weight, module = model.read(name), name.removesuffix(".weight")
            found = [one.update(module, modules[module]) for one, modules in updates if name != module and module in modules]
            with np.errstate(over="ignore", invalid="ignore"):  # refused when it is written, by name
                yield name, (weight.astype(np.float32) + sum(found)).astype(weight.dtype) if found else weight

    write_model(out, model.settled_config, merged(), companions_from=base)


def open_adapters(paths: Iterable[str | Path], base: ModelDirectory) -> list[Adapter]:
    """Read adapters and hold each against ``base``.

    Raises:
        UserError: as for :func:`read_adapter` and :func:`check_adapter`.
    """
    adapters = [read_adapter(path) for path in paths]
    for adapter in adapters:
        check_adapter(adapter, base)
    return adapters


def check_lora(lora: LoraConfig, model: str | Path) -> None:
    """Hold an adapter that is to be trained against the model in a folder.

    Raises:
        UserError: a target or a pattern names none of its layers.
    """
    layers = range(ModelDirectory(model).config["num_hidden_layers"])
    modules = [module_name(layer, target) for layer in layers for target in ALL_LINEAR]
    for target in lora.targets:
        if not any(replace(lora, targets=(target,)).covers(module) for module in modules):
            raise UserError(f"lora.targets names {target!r}, which none of the {len(layers)} layers of {model} has")
    for setting, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key in pattern:
            if not any(names(key, module) for module in modules if lora.covers(module)):
                raise UserError(f"lora.{setting} names {key!r}, which matches no module that lora.targets gives an adapter")


def refuse_packed(base: ModelDirectory) -> None:
    """Refuse to merge into weights that are already rounded to 4 bits.

    Raises:
        UserError: ``base`` is stored in 4 bits.
    """
    if base.config.get("quantization_config") or base.packed:
        raise UserError(
            f"{base.path}: is stored in 4 bits, so there is no exact weight to merge into; give the unquantized model, or "
            "leave the adapter beside the weights (rpo --handover stack; elsewhere --model.adapter)"
        )


def module_name(layer: int, target: str) -> str:
    """Hugging Face's name of a linear layer: (3, ``up_proj``) → ``model.layers.3.mlp.up_proj``."""
    return f"{layer_path(layer)}.{PROJECTIONS[target]}"


def tensor_name(module: str, matrix: str) -> str:
    """PEFT's key of a module's matrix A or B."""
    return f"{_PREFIX}{module}.lora_{matrix}.weight"


def _refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    missing = [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise UserError(f"{folder / ADAPTER}: has no {missing[0]}; a PEFT LoRA adapter has it")
    if config["peft_type"] != "LORA":
        raise UserError(f"{folder}: a {config['peft_type']} adapter; only LORA adapters are read")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{folder}: the adapter uses {key}, which is not supported; export a plain LoRA adapter")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder}: the adapter trains biases ({config['bias']}); only bias 'none' is supported")
    initialization = config.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise UserError(
            f"{folder}: init_lora_weights is {initialization!r}, which also changes the base weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )


def _targets(folder: Path, config: Mapping[str, Any], modules: Collection[str]) -> tuple[str, ...]:
    """``target_modules`` as names; a selection by pattern or by layer as the full names it selects."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(ALL_LINEAR)
    if isinstance(targets, list):
        unknown = sorted({str(target) for target in targets if str(target).rsplit(".", 1)[-1] not in ALL_LINEAR})
        if unknown or not targets:
            what = f"targets {unknown[0]}" if unknown else "targets no module"
            raise UserError(f"{folder}: the adapter {what}; supported targets are {', '.join(ALL_LINEAR)}")
        if layers is None:
            return tuple(sorted(targets, key=lambda target: (ALL_LINEAR.index(target.rsplit(".", 1)[-1]), target)))
    elif not isinstance(targets, str):
        raise UserError(f"{folder}: target_modules is {targets!r}; a list of names, a pattern or 'all-linear' is read")
    if isinstance(targets, str) and not is_quick_pattern(targets):
        raise UserError(
            f"{folder}: target_modules {targets!r} is no regular expression for module names, or repeats within a repetition; "
            "list the names it selects"
        )
    chosen = layers if isinstance(layers, list | None) else [layers]
    if not all(type(layer) is int for layer in chosen or ()):
        raise UserError(
            f"{folder / ADAPTER}: layers_to_transform is {layers!r}; the number of a layer, or a list of them, is read"
        )

    def selects(module: str, layer: int) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return any(module.endswith(f".{target}") for target in targets) and (not chosen or layer in chosen)

    found = [(layer, target) for layer in range(_depth(modules)) for target in ALL_LINEAR]
    selected = tuple(name for one in found if selects(name := module_name(*one), one[0]))
    if not selected:
        raise UserError(f"{folder}: target_modules {targets!r} selects no linear layer the adapter holds matrices for")
    return selected


def _depth(modules: Iterable[str]) -> int:
    """Layers up to the last one an adapter reaches."""
    return 1 + max((int(match[1]) for module in modules if (match := _LAYER.match(module))), default=-1)


def _peft_config(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
