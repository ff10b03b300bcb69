"""What a way of sitting an exam is called in tables: ``3-shot``, ``3-shot with explanation``, the paper's column names."""

from __future__ import annotations

_EXPLAINED = " with explanation"


def setting_name(shots: int, *, explanation: bool) -> str:
    """The name of an exam with so many examples, the answer alone or after an explanation."""
    plain = f"{shots}-shot" if shots else "zero-shot"
    return explained(plain) if explanation else plain


def explained(plain: str) -> str:
    """The name of the setting that differs from ``plain`` in its explanation alone."""
    return plain + _EXPLAINED


def explains(name: str) -> bool:
    """Whether it is the name of a setting with an explanation."""
    return name.endswith(_EXPLAINED)
