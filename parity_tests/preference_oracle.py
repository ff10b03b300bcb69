"""DPO and NLL of pairs in float64, written from the papers: each sequence alone, nothing shared, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medllm.config import PreferenceLoss
from medllm.preferences.tokenization import TokenizedGroup, tokenize_preferences
from parity_tests.preference_cases import PAIRS, letters, preferences

PairTokens = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def groups() -> list[TokenizedGroup]:
    """The problems of :func:`parity_tests.preference_cases.preferences`."""
    return list(tokenize_preferences(letters(), preferences(), PAIRS).groups)


def response_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token of the response."""
    logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
    targets = torch.tensor(list(response))
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def reference_sums(model: Any, pair: PairTokens) -> list[torch.Tensor]:
    """Summed log-probabilities of (chosen, rejected) with the adapter off."""
    with model.disable_adapter(), torch.no_grad():
        return [response_logprobs(model, pair[0], response).sum() for response in pair[1:]]


def preference_terms(
    model: Any, pairs: Sequence[PairTokens], references: Sequence[Sequence[torch.Tensor]], loss: PreferenceLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """(DPO term, NLL term) of one micro-batch: Rafailov et al. 2023, eq. 7; Pang et al. 2024, eq. 1, or TRL's token mean."""
    dpo, sequences = [], []
    for (prompt, *responses), reference in zip(pairs, references, strict=True):
        chosen, rejected = (response_logprobs(model, prompt, response) for response in responses)
        margin = (chosen.sum() - reference[0]) - (rejected.sum() - reference[1])
        dpo.append(torch.log1p(torch.exp(-loss.beta * margin)))
        sequences.append(-chosen)
    if loss.nll_reduction == "sequence":
        nll = torch.stack([sequence.mean() for sequence in sequences]).mean()
    else:
        nll = torch.cat(sequences).mean()
    return torch.stack(dpo).mean(), nll
