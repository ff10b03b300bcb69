"""The templates of every page: one set of rules, and one style sheet that all pages may include."""

from __future__ import annotations

import jinja2

_SHARED = "medllm.report"


def page_templates(package: str = _SHARED) -> jinja2.Environment:
    """Templates of ``package``, then the report's: what is filled in is escaped, what is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in dict.fromkeys((package, _SHARED))]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
