"""Log-probabilities of given continuations: for scoring answer options, and for comparing models token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from jax_medllm.mesh.layout import constrain, place_rows
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.logprobs import response_logprobs
from jax_medllm.model.rows import ResponseBatch, buckets, response_rows, round_up, row_size
from medllm.engine import Continuation
from medllm.errors import UserError


class Scorer:
    """Scores continuations under one model; options of the same prompt share its computation."""

    def __init__(self, model: DenseDecoder):
        self._context = model.config.max_positions
        graph, self._state = nnx.split(model)

        @jax.jit
        def score(state: nnx.State, batch: ResponseBatch):
            return constrain(response_logprobs(nnx.merge(graph, state), batch), None, None)

        self._score = score

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int) -> list[np.ndarray]:
        """Per-token natural log-probabilities of each completion given its prompt, in the order given.

        Args:
            continuations: Prompts and completions.
            batch_size: Completions in one batch, roughly.

        Raises:
            UserError: an empty prompt, or one that does not fit the context with its completion.
        """
        groups = [
            (continuations[group[0]].prompt, [continuations[i].completion for i in group], group)
            for group in self._groups(continuations, batch_size)
        ]
        if not groups:
            return []
        sizes = [row_size(prompt, completions) for prompt, completions, _ in groups]
        menu = buckets(sizes, at_most=6, padding=0.1)
        by_length = defaultdict(list)
        for group, size in zip(groups, sizes, strict=True):
            by_length[round_up(size, menu)].append(group)
        results: dict[int, np.ndarray] = {}
        for length, members in by_length.items():
            most = max(len(completions) for _, completions, _ in members)
            rows = min(max(1, batch_size // most), len(members))
            for start in range(0, len(members), rows):
                part = members[start : start + rows]
                batch = response_rows([(prompt, completions) for prompt, completions, _ in part], rows, length)
                scores = np.asarray(self._score(self._state, place_rows(batch)))
                for row, (_, _, indices) in enumerate(part):
                    for number, i in enumerate(indices):
                        results[i] = scores[row][batch.responses[row] == number].astype(np.float32)
        return [results[i] for i in range(len(continuations))]

    def _groups(self, continuations: Sequence[Continuation], batch_size: int) -> list[list[int]]:
        """Indices of continuations of the same prompt, at most ``batch_size`` together."""
        by_prompt = defaultdict(list)
        for index, (prompt, completion) in enumerate((c.prompt, c.completion) for c in continuations):
            if not prompt:
                raise UserError(f"continuation {index}: its prompt is empty; the first token needs one to be predicted from")
            if len(prompt) + len(completion) > self._context:
                raise UserError(
                    f"continuation {index}: prompt of {len(prompt)} and completion of {len(completion)} tokens do not fit "
                    f"the model's context of {self._context}; shorten the prompt"
                )
            by_prompt[prompt].append(index)
        indices = by_prompt.values()
        return [same[start : start + batch_size] for same in indices for start in range(0, len(same), batch_size)]
