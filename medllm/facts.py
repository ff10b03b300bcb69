"""What is recorded of a request to a server, beside the answer that came with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {
    "model": str,
    "system_fingerprint": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "retries": int,
    "filtered": bool,
}
_MOST = 2**53  # counts that add up, and have a price


def known_facts(said: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the facts that are of their kind: a server may say anything."""
    return {name: value for name, value in said.items() if type(value) is _KINDS.get(name) and _can_be_kept(value)}


def read_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a kept line.

    Raises:
        TypeError: they are others than were written.
    """
    facts = row.get("facts", {})
    if not isinstance(facts, dict) or known_facts(facts) != facts:
        raise TypeError("'facts' are not those of a request")
    return facts


def _can_be_kept(value: object) -> bool:
    if isinstance(value, str):  # JSON can hold half of a character, and no file
        return not any("\ud800" <= one <= "\udfff" for one in value)
    return isinstance(value, int) and 0 <= value < _MOST
