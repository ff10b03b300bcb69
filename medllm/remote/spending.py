"""What a server is asked for and what that costs: before, by estimate, and after, by what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medllm.config import Sampling
from medllm.errors import UserError
from medllm.model.tokenizer import Prompt
from medllm.stage_config import ServerConfig

_BYTES_A_TOKEN = 3
"""A Japanese character has three bytes and is about a token; English has more bytes a token, so it is overestimated."""


def estimated_tokens(prompt: Prompt) -> float:
    """Tokens of a prompt, by its length."""
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / _BYTES_A_TOKEN


@dataclass(frozen=True)
class Estimate:
    """What asking a server takes.

    Attributes:
        stage: What asks.
        requests: One a prompt; a server that does not take several samples a request gets one a sample.
        prompt_tokens: By the length of the prompts.
        most_completion_tokens: If every text is as long as it may be.
        most_cost: Of both; None where no price is given.
    """

    stage: str
    requests: int
    prompt_tokens: int
    most_completion_tokens: int
    most_cost: float | None

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {"stage": self.stage, "dry_run": True, **{k: v for k, v in asdict(self).items() if k != "stage"}}

    def words(self) -> str:
        """For a line of text."""
        cost = "" if self.most_cost is None else f", at most {self.most_cost:.2f} in all"
        tokens = f"about {self.prompt_tokens} tokens of prompts, at most {self.most_completion_tokens} of answers"
        return f"{self.stage}: {self.requests} requests, {tokens}{cost}; nothing was asked"


def estimate(stage: str, engine: str, prompts: Iterable[Prompt], sampling: Sampling, settings: ServerConfig) -> Estimate:
    """What it takes to ask all prompts.

    Raises:
        UserError: an engine of this machine is to answer.
    """
    if engine != "openai":
        raise UserError(f"--dry_run estimates what a server would be asked; add --engine openai, not {engine}, or leave it out")
    lengths = [estimated_tokens(prompt) for prompt in prompts]
    read, written = round(sum(lengths)), len(lengths) * sampling.samples * sampling.max_new_tokens
    return Estimate(stage, len(lengths), read, written, _price(settings, read, written))


def account(url: str, facts: Sequence[Mapping[str, Any]], settings: ServerConfig) -> dict[str, Any]:
    """What all answered requests were: the server, ``models`` and ``fingerprints`` it named and how often, tokens, ``cost``.

    ``requests_without_usage`` are those for which it named no tokens; ``retries`` those sent again before an answer came.
    """
    total: dict[str, Any] = {
        "url": url,
        "models": dict(Counter(fact["model"] for fact in facts if "model" in fact)),
        "fingerprints": dict(Counter(fact["system_fingerprint"] for fact in facts if "system_fingerprint" in fact)),
        "requests": len(facts),
        **{name: sum(fact.get(name, 0) for fact in facts) for name in ("retries", "prompt_tokens", "completion_tokens")},
        "requests_without_usage": sum("prompt_tokens" not in fact for fact in facts),
    }
    return {**total, "cost": _price(settings, total["prompt_tokens"], total["completion_tokens"])}


def _price(settings: ServerConfig, read: int, written: int) -> float | None:
    if settings.input_price is None and settings.output_price is None:
        return None
    return round((read * (settings.input_price or 0) + written * (settings.output_price or 0)) / 1e6, 6)
