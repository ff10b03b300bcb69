"""What an engine is: the one Protocol behind ``--engine jax``, ``--engine torch`` and ``--engine openai``.

An engine is opened on one model. Training writes a PEFT adapter into the run folder and never changes the opened model:
the next stage opens base + adapter anew. All texts pass through :mod:`medllm.tokenizer`, so that both engines see the same
tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from medllm.errors import UserError
from medllm.installation import install_command

if TYPE_CHECKING:
    from medllm.config import CptConfig, MeshConfig, ModelConfig, RematPolicy, RpoConfig, Sampling, TorchConfig
    from medllm.corpus.packing import PackedRows
    from medllm.preferences.records import Preference
    from medllm.run import Run

EngineName = Literal["jax", "torch", "openai"]

LAUNCH_TORCH = "torchrun --nproc_per_node N -m -- medllm COMMAND ..."
"""How the reference engine is started on several GPUs. Without ``--`` torchrun takes our ``--run`` for its ``--run-path``."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat prompt. ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Generation:
    """One continuation: its text without stop string and end token, its tokens, and why it ended."""

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Continuation:
    """Token ids of a prompt and of a given continuation, whose log-probabilities are asked for."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class TrainSummary:
    """Result of a training run.

    ``loss`` is the last logged one, ``rate`` units (tokens for CPT, pairs for RPO) a second after the first optimizer step,
    without compilation, which took ``compile_seconds`` of all ``seconds``; with a single step it is that step's. Opening the
    model is in neither. ``padding`` is the share of all positions computed that hold padding, where known, ``remat`` what was
    kept for the backward pass, where that was the engine's choice.
    """

    steps: int
    loss: float
    seconds: float
    rate: float
    adapter: str
    compile_seconds: float = 0.0
    padding: float | None = None
    remat: RematPolicy | None = None


class Engine(Protocol):
    """A language model opened from a :class:`medllm.config.ModelConfig`."""

    name: str

    def train_cpt(self, rows: PackedRows, config: CptConfig, run: Run) -> TrainSummary:
        """Continued pretraining on packed rows; leaves a PEFT adapter in ``run.path/adapter``."""
        ...

    def train_preferences(self, preferences: Sequence[Preference], config: RpoConfig, run: Run) -> TrainSummary:
        """DPO or RPO over the pairs of the hierarchy; leaves a PEFT adapter in ``run.path/adapter``."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Generation]]:
        """``sampling.samples`` continuations for each prompt, in the order of the prompts.

        ``progress`` is called with what is done, and what there is to do in all.

        Raises:
            UserError: a prompt and its continuation do not fit the model's context.
        """
        ...

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int = 32) -> list[np.ndarray]:
        """Per-token log-probabilities (fp32, natural log) of each completion given its prompt."""
        ...


_ENGINES = {
    "jax": ("jax_medllm.engine", "JaxEngine", "jax", "jax"),
    "torch": ("torch_ref.engine", "TorchEngine", "torch", "torch"),
    "openai": ("medllm.openai_engine", "OpenAIEngine", "openai", "eval"),
}


def open_engine(name: EngineName, model: ModelConfig, mesh: MeshConfig | None = None) -> Engine:
    """Open ``model`` on the engine called ``name``, spread over ``mesh``; the framework is imported only here.

    ``mesh`` is the config of the stage: one that trains has the reference engine's own settings too.

    Raises:
        UserError: the engine's packages are not installed (the message has the install command), it has no meshes, or the
            settings are another engine's or cannot be had here.
    """
    spread = mesh is not None and (mesh.mesh or mesh.rules)
    if spread and name != "jax":
        hint = f"start it as {LAUNCH_TORCH}, one process a GPU" if name == "torch" else "leave them out"
        raise UserError(f"--mesh and --rules spread the JAX engine's arrays; for --engine {name} {hint}")
    switches: TorchConfig | None = getattr(mesh, "torch", None)
    for setting, value in switches.changed().items() if switches is not None and name != "torch" else ():
        given = f"--torch.{setting} is {value!r}"
        raise UserError(
            f"{given}, a setting of the torch engine alone; add --engine torch, or leave it out for --engine {name}"
        )
    module, attribute, package, extra = _ENGINES[name]
    require(f"engine '{name}'", package, extra)
    engine = getattr(importlib.import_module(module), attribute)
    if name == "torch" and switches is not None:
        return engine(model, switches)
    return engine(model, mesh) if spread else engine(model)


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
