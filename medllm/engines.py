"""Where the engines are: the one table by which the study finds code that it does not import.

A framework is imported when an engine is opened, and no sooner.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from medllm.config import Recipe, changed
from medllm.errors import UserError
from medllm.host.installation import install_command

if TYPE_CHECKING:
    from medllm.config import MeshConfig, ModelConfig
    from medllm.engine import Generates, Scores
    from medllm.training import Trains

TrainerName = Literal["jax", "torch"]
"""The engines that train."""
EngineName = Literal[TrainerName, "openai"]
"""All engines. Each generates, and says how likely a given text is."""

LAUNCH_TORCH = "torchrun --nproc_per_node N -m -- medllm COMMAND ..."
"""How the reference engine is started on several GPUs. Without ``--`` torchrun takes our ``--run`` for its ``--run-path``."""


@dataclass(frozen=True)
class Home:
    """Where an engine, or the audit, is.

    Attributes:
        modules: The module that each of its parts is in.
        package: The package that must be installed for an engine.
        extra: The extra of this project that installs it.
        engine: The class in its part ``engine``; none for the audit.
        settings: The settings of a stage that are this engine's.
    """

    modules: Mapping[str, str]
    package: str = ""
    extra: str = ""
    engine: str = ""
    settings: tuple[str, ...] = ()


HOMES = {
    "jax": Home(
        package="jax",
        extra="jax",
        modules={
            "engine": "jax_medllm.engine",
            "weights": "jax_medllm.weights.read",
            "handover": "jax_medllm.weights.handover",
            "plan": "jax_medllm.plan",
            "bench": "jax_medllm.bench.stages",
            "device bench": "jax_medllm.bench.device",
            "preflight": "jax_medllm.bench.preflight",
        },
        engine="JaxEngine",
        settings=("mesh", "rules"),
    ),
    "torch": Home(
        package="torch",
        extra="torch",
        modules={
            "engine": "torch_ref.engine",
            "bench": "torch_ref.bench",
            "device bench": "torch_ref.device_bench",
            "preflight": "torch_ref.preflight",
        },
        engine="TorchEngine",
        settings=("torch",),
    ),
    "openai": Home(
        package="openai",
        extra="eval",
        modules={"engine": "medllm.remote.engine"},
        engine="OpenAIEngine",
        settings=("server",),
    ),
    "parity": Home(
        modules={"audit": "medllm_parity.audit", "page": "medllm_parity.page", "steps": "medllm_parity.verified_steps"}
    ),
}


def open_engine(name: EngineName, model: ModelConfig, stage: MeshConfig | None = None) -> Generates:
    """Open ``model`` on the engine called ``name``, as ``stage`` has it set: its mesh, and the reference engine's switches.

    Weights are read when they are first needed.

    Raises:
        UserError: the engine's packages are not installed (the message has the install command), it has no meshes, the
            settings are another engine's or cannot be had here, or the model's folder cannot be used.
    """
    return _open(name, model, stage)


def open_scorer(name: EngineName, model: ModelConfig, stage: MeshConfig | None = None) -> Scores:
    """:func:`open_engine`, for the likelihood of given text.

    Raises:
        UserError: as there, or a server's model has no tokenizer here.
    """
    opened = _open(name, model, stage)
    if not hasattr(opened, "tokenizer"):
        raise UserError(
            f"engine '{name}' scores tokens that are made here: name the folder of the model's tokenizer (--server.tokenizer)"
        )
    return opened


def open_trainer(name: TrainerName, model: ModelConfig, stage: MeshConfig | None = None) -> Trains:
    """:func:`open_engine`, for training.

    Raises:
        UserError: as there, the engine is none of them, or the adapter to be trained names no layer of the model.
    """
    if name not in get_args(TrainerName):
        able = " or ".join(f"--engine {one}" for one in get_args(TrainerName))
        raise UserError(f"engine '{name}' cannot train; use {able}")
    opened = _open(name, model, stage)
    if isinstance(stage, Recipe):
        from medllm.model.adapter import check_lora  # with numpy, which a command line that opens nothing does without

        check_lora(stage.lora, model.path)
    return opened


def module_of(home: str, part: str) -> str:
    """The name of the module that a part of an engine, or of the audit, is in."""
    return HOMES[home].modules[part]


def load(home: str, part: str) -> Any:
    """That module, imported."""
    return importlib.import_module(module_of(home, part))


def require_engine(name: str, what: str = "") -> None:
    """Refuse an engine, or ``what`` needs one, where its package is not installed.

    Raises:
        UserError: as for :func:`require`.
    """
    require(what or f"engine '{name}'", HOMES[name].package, HOMES[name].extra)


def require(what: str, package: str, extra: str) -> None:
    """Refuse, with the install command, where ``package`` is not installed.

    Raises:
        UserError: it is not.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it is a part of is missing
        found = False
    if not found:
        raise UserError(f"{what} needs the package '{package}': {install_command(extra)}")


def _open(name: EngineName, model: ModelConfig, stage: MeshConfig | None) -> Any:
    home = HOMES[name]
    spread = stage is not None and (stage.mesh or stage.rules)
    if spread and "mesh" not in home.settings:
        hint = f"start it as {LAUNCH_TORCH}, one process a GPU" if name == "torch" else "leave them out"
        raise UserError(f"--mesh and --rules spread the JAX engine's arrays; for --engine {name} {hint}")
    for group, owner in (("torch", "torch"), ("server", "openai")):
        settings = getattr(stage, group, None)
        for setting, value in changed(settings).items() if settings is not None and group not in home.settings else ():
            given = f"--{group}.{setting} is {value!r}"
            raise UserError(
                f"{given}, a setting of the {owner} engine alone; add --engine {owner}, or leave it out for --engine {name}"
            )
    require_engine(name)
    engine = getattr(load(name, "engine"), home.engine)
    return engine(model, stage)
