"""Preferences → tokens, exactly as TRL's DPOTrainer (1.16) makes them.

Prompt and prompt + response are tokenized whole, so tokens may merge across the boundary; the response starts at the first
token in which they part. The end-of-text token is appended where the response does not end with it, and prompt + response
is cut at ``max_length`` (``keep_start``). A pair whose prompt fills ``max_length`` is dropped.

TRL starts *both* responses of a pair where the *earlier* of the two parts from the prompt. A group shares one prompt among
all responses of a problem: the shortest of its pairs' prompts. Where merges differ between responses, a pair's own prompt
is longer by ``pair_starts`` tokens, which stand at the head of both its responses::

    prompt ``ab`` + ``c`` → a b c      + ``d`` → a bd (b and d merge)      + ``e`` → a b e
    group:  prompt a | responses b c, bd, b e
    pairs:  (c, d): prompt a, start 0      (c, e): prompt a b, start 1     (d, e): prompt a, start 0

Those tokens have the same context in both responses, so they cancel in DPO's difference; only the likelihood of the
preferred response has to leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medllm.config import PairConfig
from medllm.errors import UserError
from medllm.model.tokenizer import encode_texts
from medllm.preferences.pairs import Pair, Rank, select_pairs, training_pairs
from medllm.preferences.records import Preference


@dataclass(frozen=True)
class TokenizedGroup:
    """The responses of one problem behind one shared prompt.

    Attributes:
        problem_id: The problem.
        prompt: Token ids that all responses share and no pair is trained on.
        responses: Token ids of each response, end-of-text token included unless it was cut off.
        ranks: The :class:`medllm.preferences.pairs.Rank` of each response.
        pairs: (preferred, dispreferred) indices into ``responses``.
        pair_starts: For each pair, how many leading tokens of its two responses belong to its prompt; 0 unless tokens
            merge across the boundary in one response and not in another.
    """

    problem_id: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    ranks: tuple[Rank, ...]
    pairs: tuple[tuple[int, int], ...]
    pair_starts: tuple[int, ...]

    def pair_tokens(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """(prompt, preferred, dispreferred) token ids of each pair: TRL's prompt_ids, chosen_ids and rejected_ids."""
        for (high, low), start in zip(self.pairs, self.pair_starts, strict=True):
            yield self.prompt + self.responses[high][:start], self.responses[high][start:], self.responses[low][start:]


@dataclass(frozen=True)
class TokenizedPreferences:
    """Preferences as they are trained on.

    Attributes:
        texts: All pairs of all problems, in the order of the file: what an engine reads that makes its own tokens.
        groups: One for each problem that has a pair left.
        pairs: Pairs in all groups.
        dropped_pairs: Pairs dropped because their prompt fills ``max_length``.
        unpaired: Problems without a pair to begin with (a ground truth alone).
        truncated: Responses cut at ``max_length``.
    """

    texts: tuple[Pair, ...]
    groups: tuple[TokenizedGroup, ...]
    pairs: int
    dropped_pairs: int
    unpaired: int
    truncated: int


def tokenize_preferences(
    tokenizer: Any,
    preferences: Sequence[Preference],
    config: PairConfig,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedPreferences:
    """Tokenize every problem's group and count what had to go; ``progress`` gets (problems done, problems in all)."""
    groups: list[TokenizedGroup] = []
    dropped = unpaired = truncated = 0
    for done, preference in enumerate(preferences, start=1):
        group, lost, cut = _tokenize_group(tokenizer, preference, config)
        dropped += lost
        truncated += cut
        unpaired += group is None and lost == 0
        if group is not None:
            groups.append(group)
        if progress:
            progress(done, len(preferences))
    texts, pairs = training_pairs(preferences, config), sum(len(group.pairs) for group in groups)
    return TokenizedPreferences(tuple(texts), tuple(groups), pairs, dropped, unpaired, truncated)


def check_preferences(data: TokenizedPreferences, max_length: int, context: int, where: str) -> None:
    """Refuse preferences that cannot be trained on.

    Args:
        data: The preferences, tokenized.
        max_length: ``pairs.max_length``, which they were cut at.
        context: The longest row the model takes.
        where: Their file.

    Raises:
        UserError: there is no pair, or a prompt and response beyond the context.
    """
    if not data.groups:
        raise UserError(
            f"{where}: no pair to train on: {data.unpaired} problems have none, and in {data.dropped_pairs} pairs the prompt "
            f"alone fills pairs.max_length {max_length}"
        )
    for group in data.groups:
        length = len(group.prompt) + max(len(response) for response in group.responses)
        if length > context:
            raise UserError(
                f"{where}: problem {group.problem_id}: prompt and response have {length} tokens, the model's context is "
                f"{context}; set --pairs.max_length {context}"
            )


def _tokenize_group(tokenizer: Any, preference: Preference, config: PairConfig) -> tuple[TokenizedGroup | None, int, int]:
    """The group, the number of pairs dropped, and the number of its responses that were cut."""
    paired = select_pairs(preference, config)
    prompt_ids, sequences = _encode(tokenizer, preference.prompt, [response.text for response in paired.responses])
    shared = [_common_prefix(prompt_ids, sequence) for sequence in sequences]
    starts = {(high, low): min(shared[high], shared[low]) for high, low in paired.pairs}
    kept = {pair: start for pair, start in starts.items() if start < config.max_length}
    dropped = len(starts) - len(kept)
    if not kept:
        return None, dropped, 0
    used = sorted({index for pair in kept for index in pair})
    prompt_length = min(kept.values())
    group = TokenizedGroup(
        problem_id=preference.problem_id,
        prompt=tuple(prompt_ids[:prompt_length]),
        responses=tuple(tuple(sequences[index][prompt_length : config.max_length]) for index in used),
        ranks=tuple(paired.ranks[index] for index in used),
        pairs=tuple((used.index(high), used.index(low)) for high, low in kept),
        pair_starts=tuple(start - prompt_length for start in kept.values()),
    )
    return group, dropped, sum(len(sequences[index]) > config.max_length for index in used)


def _encode(tokenizer: Any, prompt: str, responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt alone and of prompt + response for each response."""
    end = tokenizer.eos_token
    texts = [prompt + (response if response.endswith(end) else response + end) for response in responses]
    prompt_ids, *sequences = encode_texts(tokenizer, [prompt, *texts])
    return prompt_ids, sequences


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of leading tokens the two have in common."""
    length = 0
    for token, other in zip(ids, others, strict=False):
        if token != other:
            break
        length += 1
    return length
