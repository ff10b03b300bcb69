"""Preferences → tokens, exactly as TRL's DPOTrainer (1.16) makes them.

Prompt and prompt + response are tokenized whole, so tokens may merge across the boundary; the response starts at the first
token in which they part. The end-of-text token is appended where the response does not end with it, and prompt + response
is cut at ``max_length`` (``keep_start``). A pair whose prompt fills ``max_length`` is dropped.

Two more are dropped here, which TRL would train on. A pair of responses that are the same tokens has nothing to prefer (texts
may differ and tokens not: in what is cut off, in how a character is composed, in an end token that is written out). And a
prompt may be empty, or its last character compose with the first of a response, so that no token of it is left to predict from.

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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medllm.config import PairConfig
from medllm.errors import UserError
from medllm.host.progress import Progress
from medllm.model.tokenizer import common_prefix, control_tokens, encode, encode_texts
from medllm.preferences.pairs import Pair, PairedResponses, Rank, select_pairs, text_of
from medllm.preferences.records import Preference

FULL = "the prompt fills pairs.max_length"
EQUAL = "both responses are the same tokens"
NO_PROMPT = "no token of the prompt is left"


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
        texts: The pairs of all groups, in their order: what an engine reads that makes its own tokens.
        groups: One for each problem that has a pair left.
        dropped: Pairs that were dropped, by reason.
        unpaired: Problems without a pair to begin with (a ground truth alone).
        truncated: Responses cut at ``max_length``.
        control_tokens: Special tokens written out in prompts and responses, an end token behind a response apart.
    """

    texts: tuple[Pair, ...]
    groups: tuple[TokenizedGroup, ...]
    dropped: Mapping[str, int]
    unpaired: int
    truncated: int
    control_tokens: Mapping[str, int]

    @property
    def pairs(self) -> int:
        """Pairs in all groups."""
        return len(self.texts)

    @property
    def dropped_pairs(self) -> int:
        """Pairs that were dropped, for whatever reason."""
        return sum(self.dropped.values())

    @property
    def tokens(self) -> int:
        """Of all groups, each response counted once."""
        return sum(len(group.prompt) + sum(map(len, group.responses)) for group in self.groups)

    def words(self) -> str:
        """How many there are."""
        return f"{self.pairs:,} pairs of {len(self.groups):,} problems"


def tokenize_preferences(
    tokenizer: Any,
    preferences: Sequence[Preference],
    config: PairConfig,
    progress: Progress | None = None,
) -> TokenizedPreferences:
    """Tokenize every problem's group and count what had to go; ``progress`` gets (problems done, problems in all)."""
    groups: list[TokenizedGroup] = []
    texts: list[Pair] = []
    dropped: Counter[str] = Counter()
    written: list[str] = []
    unpaired = truncated = 0
    begins = len(encode(tokenizer, ""))
    for done, preference in enumerate(preferences, start=1):
        paired = select_pairs(preference, config)
        unpaired += not paired.pairs
        prompt_ids, sequences = _encode(tokenizer, preference.prompt, [response.text for response in paired.responses])
        kept = _kept(paired, prompt_ids, sequences, range(begins + 1, config.max_length), dropped)
        if kept:
            used = sorted({index for pair in kept for index in pair})
            groups.append(_group(preference.problem_id, paired, sequences, kept, used, config.max_length))
            texts += [text_of(preference, paired, pair) for pair in kept]
            written += [preference.prompt, *(paired.responses[index].text.removesuffix(tokenizer.eos_token) for index in used)]
            truncated += sum(len(sequences[index]) > config.max_length for index in used)
        if progress:
            progress(done, len(preferences))
    controls = control_tokens(tokenizer, written)
    return TokenizedPreferences(tuple(texts), tuple(groups), dict(dropped), unpaired, truncated, controls)


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
            f"{where}: no pair to train on: {data.unpaired} problems have none, and in {data.dropped.get(FULL, 0)} pairs the "
            f"prompt alone fills pairs.max_length {max_length}"
            + "".join(f"; {count} × {reason}" for reason, count in data.dropped.items() if reason != FULL)
        )
    for group in data.groups:
        length = len(group.prompt) + max(len(response) for response in group.responses)
        if length > context:
            raise UserError(
                f"{where}: problem {group.problem_id}: prompt and response have {length} tokens, the model's context is "
                f"{context}; set --pairs.max_length {context}"
            )


def _kept(
    paired: PairedResponses, prompt: Sequence[int], sequences: Sequence[Sequence[int]], room: range, dropped: Counter[str]
) -> dict[tuple[int, int], int]:
    """The pairs that can be trained on, and how many tokens of each are its prompt, one of ``room``; the others are counted."""
    shared = [common_prefix(prompt, sequence) for sequence in sequences]
    kept = {}
    for high, low in paired.pairs:
        start = min(shared[high], shared[low])
        if start >= room.stop:
            dropped[FULL] += 1
        elif start < room.start:
            dropped[NO_PROMPT] += 1
        elif sequences[high][: room.stop] == sequences[low][: room.stop]:
            dropped[EQUAL] += 1
        else:
            kept[high, low] = start
    return kept


def _group(
    problem_id: str,
    paired: PairedResponses,
    sequences: Sequence[Sequence[int]],
    kept: Mapping[tuple[int, int], int],
    used: Sequence[int],
    most: int,
) -> TokenizedGroup:
    """The ``kept`` pairs behind one prompt; ``used`` are the responses in them."""
    prompt_length = min(kept.values())
    return TokenizedGroup(
        problem_id=problem_id,
        prompt=tuple(sequences[used[0]][:prompt_length]),
        responses=tuple(tuple(sequences[index][prompt_length:most]) for index in used),
        ranks=tuple(paired.ranks[index] for index in used),
        pairs=tuple((used.index(high), used.index(low)) for high, low in kept),
        pair_starts=tuple(start - prompt_length for start in kept.values()),
    )


def _encode(tokenizer: Any, prompt: str, responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt alone and of prompt + response for each response."""
    end = tokenizer.eos_token
    texts = [prompt + (response if response.endswith(end) else response + end) for response in responses]
    prompt_ids, *sequences = encode_texts(tokenizer, [prompt, *texts])
    return prompt_ids, sequences
