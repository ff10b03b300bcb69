"""A certificate on disk: ``certificate.json``, and one page that opens offline."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from medllm.report.templating import page_templates
from medllm.run import atomic_path, write_json
from medllm.verify.findings import Certificate

PAGE = "certificate.html"
CERTIFICATE = "certificate.json"
_FOLDERS = re.compile(r"(?<![\w.:])/(?:[^\s/:;,'\"]+/)+")
_SECTIONS = {"refuted": "Refuted", "proved": "Proved", "noted": "To be known", "not checked": "Not checked"}


def write_certificate(out: Path, certificate: Certificate) -> dict[str, Any]:
    """Write both into the folder ``out``; returns the contents of ``certificate.json``. Where folders are on this machine is in
    neither."""
    told = replace(
        certificate,
        findings=[replace(one, where=_nameless(one.where), said=_nameless(one.said)) for one in certificate.findings],
    )
    text = render(told)
    result = told.to_json()
    write_json(out / CERTIFICATE, result)
    with atomic_path(out / PAGE) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return result


def render(certificate: Certificate) -> str:
    """The page as text. Everything that comes from a file or a setting is escaped."""
    templates = page_templates("medllm.verify")
    templates.filters["short"] = _short
    facts = {name: value for name, value in certificate.facts.items() if not isinstance(value, dict)}
    named = {name: value for name, value in certificate.facts.items() if isinstance(value, dict)}
    facts |= {name: ", ".join(f"{key} {one}" for key, one in values.items()) for name, values in named.items()}
    sections = [(title, found) for status, title in _SECTIONS.items() if (found := certificate.of(status))]  # type: ignore[arg-type]
    return templates.get_template("certificate.html.j2").render(
        certificate=certificate, headline=certificate.headline(), sections=sections, facts=list(facts.items())
    )


def _nameless(text: str) -> str:
    """Without the folders of this machine."""
    return _FOLDERS.sub("…/", text)


def _short(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
