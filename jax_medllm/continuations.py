"""Log-probabilities of given continuations: for scoring answer options, and for comparing models token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from jax_medllm.batches import ResponseBatch, buckets, pad_responses, round_up
from jax_medllm.logprobs import response_logprobs
from jax_medllm.model import Qwen2
from medllm.engine import Continuation
from medllm.errors import UserError

_MULTIPLE = 32


class Scorer:
    """Scores continuations under one model; options of the same prompt share its computation."""

    def __init__(self, model: Qwen2):
        self._context = model.config.max_positions
        graph, self._state = nnx.split(model)

        @jax.jit
        def score(state: nnx.State, batch: ResponseBatch):
            return response_logprobs(nnx.merge(graph, state), batch)

        self._score = score

    def logprobs(self, continuations: Sequence[Continuation], batch_size: int) -> list[np.ndarray]:
        """Per-token natural log-probabilities of each completion given its prompt, in the order given.

        Args:
            continuations: Prompts and completions.
            batch_size: Completions in one batch, roughly.

        Raises:
            UserError: an empty prompt, or one that does not fit the context with its completion.
        """
        groups = self._groups(continuations, batch_size)
        if not groups:
            return []
        prompts = buckets([len(continuations[group[0]].prompt) for group in groups], multiple=_MULTIPLE, at_most=3)
        counts = buckets([len(group) for group in groups], multiple=1, at_most=3)
        longest = [max(len(continuations[i].completion) for i in group) for group in groups]
        lengths = buckets(longest, multiple=_MULTIPLE // 2, at_most=3)

        by_shape = defaultdict(list)
        for group, completion in zip(groups, longest, strict=True):
            prompt = round_up(len(continuations[group[0]].prompt), prompts)
            by_shape[prompt, round_up(len(group), counts), round_up(completion, lengths)].append(group)
        results: dict[int, np.ndarray] = {}
        for shape, members in by_shape.items():
            rows = min(max(1, batch_size // shape[1]), len(members))
            for start in range(0, len(members), rows):
                part = members[start : start + rows]
                arrays = [(continuations[g[0]].prompt, [continuations[i].completion for i in g]) for g in part]
                scores = np.asarray(self._score(self._state, pad_responses(arrays, rows, *shape)))
                for row, group in enumerate(part):
                    for column, i in enumerate(group):
                        score = scores[row * shape[1] + column, : len(continuations[i].completion)]
                        results[i] = score.astype(np.float32)
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
