"""The reference's log-probabilities on disk: computed once, read by every epoch and by every later run over the same data.

The reference is the opened model with its own adapters and without the one that is trained, so its log-probabilities never
change. With them at hand a step computes the policy alone, two thirds of the work (one forward pass less of three). They are a
number for each response of each pair; a file of them is small.

A file is found by what its numbers depend on: the contents of the weights and adapters, how the weights are held and computed
with, and the tokens of the groups. Contents means every byte. Names, sizes and times do not tell a model from the one
that was merged anew into the same folder, and neither do samples of a file: an adapter over a few modules, merged and rounded
to bf16, changes few of its bytes. Reading the files once more takes as long as loading them, seconds for each of the forward
passes' minutes.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_medllm.mesh.layout import constrain, place_rows
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.train.batches import PreferenceData, digest
from jax_medllm.train.loop import AHEAD, reference_logprobs
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.host.progress import tracked
from medllm.preferences.tokenization import TokenizedGroup
from medllm.run import atomic_path

_NAME = "logprobs"
_CHECKSUM = "checksum"

Sums = list[Float[np.ndarray, "_ 2"]]


@dataclass(frozen=True)
class ReferenceFile:
    """Summed log-probabilities of both responses of every pair under a reference, in a folder.

    Attributes:
        folder: Where the file is kept; made when the first is written.
        model: The reference: weights, and the adapters that belong to them.
        groups: The data.
    """

    folder: Path
    model: ModelConfig
    groups: Sequence[TokenizedGroup]

    @cached_property
    def path(self) -> Path:
        """The file, named by what its numbers depend on; every byte of weights and adapters is read for it."""
        folders = [Path(self.model.path), *map(Path, self.model.adapters)]
        tokens = [(group.prompt, group.responses, group.pairs, group.pair_starts) for group in self.groups]
        facts = {
            "weights": [_contents(folder) for folder in folders],
            "data": digest(repr(tokens).encode()),
            "held": [self.model.quantization, self.model.dtype, jax.default_backend(), bool(jax.config.jax_enable_x64)],
        }
        return self.folder / f"reference-{digest(json.dumps(facts).encode())}.safetensors"

    def read(self) -> Sums | None:
        """The numbers of each group; None where the file is not there.

        Raises:
            UserError: it is not what was written.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(str(self.path), framework="numpy") as stream:
                values, checksum = stream.get_tensor(_NAME), (stream.metadata() or {}).get(_CHECKSUM)
        except (SafetensorError, OSError) as error:
            raise self._damaged(str(error).splitlines()[0]) from error
        ends = np.cumsum([len(group.pairs) for group in self.groups])
        if checksum != digest(values.tobytes()) or values.shape != (ends[-1], 2):
            raise self._damaged("its numbers are not those its checksum was taken of")
        return np.split(values, ends[:-1])

    def write(self, sums: Sums) -> None:
        """Keep the numbers of each group; all of the file or nothing."""
        values = np.ascontiguousarray(np.concatenate(sums))
        with atomic_path(self.path) as scratch:
            save_file({_NAME: values}, scratch, metadata={_CHECKSUM: digest(values.tobytes())})

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path}: the reference's log-probabilities cannot be read ({reason}); remove the file")


def compute_reference(model: DenseDecoder, data: PreferenceData) -> Sums:
    """The reference's numbers for each group: one forward pass over the data, in the batches of its first epoch."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, batch: constrain(reference_logprobs(nnx.merge(graph, state), batch), None, None, None))
    found: dict[int, np.ndarray] = {}
    under_way: deque[tuple[tuple[int, ...], jax.Array]] = deque()

    def collect() -> None:
        units, sums = under_way.popleft()
        for unit, values in zip(units, np.asarray(sums)[: len(units)], strict=True):
            found[unit] = values[: len(data.groups[unit].pairs)]

    steps = [step for step in data.steps if step.epoch == 0]
    for step in tracked(steps, "log-probabilities of the reference"):
        for units, batch in zip(step.micro_batches, data.batches(step), strict=True):
            under_way.append((units, forward(state, place_rows(batch))))
            if len(under_way) > AHEAD:
                collect()
    while under_way:
        collect()
    return [found[unit] for unit in range(len(data.groups))]


def _contents(folder: Path) -> list[str]:
    """Digests of the weights in a model's or an adapter's folder and of the config that says how they are used."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("adapter_config.json")])
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_file_digest, files))


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
