#!/usr/bin/env python
"""Write the reference part of ``docs/api.md`` from the docstrings of what ``medllm`` and ``jax_medllm`` list.

    python scripts/api_page.py

Sources are parsed and never imported: neither a framework nor an installation is needed. What stands above the heading
"Reference" is written by hand and kept.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
HEADING = "## Reference\n"
PACKAGES = ("medllm", "jax_medllm")
_WIDTH = 100

Function = ast.FunctionDef | ast.AsyncFunctionDef


def write(page: Path = PAGE) -> str:
    """The page with its reference written anew."""
    by_hand = page.read_text(encoding="utf-8").partition(HEADING)[0]
    return by_hand + HEADING + "\n" + "\n\n".join(_reference()) + "\n"


def homes(package: str) -> dict[str, str]:
    """Public name → module, of a package, as its ``__init__.py`` declares them in ``_HOME``."""
    for node in _parsed(ROOT / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOME":
            return {name: f"{package}.{module}" for name, module in ast.literal_eval(node.value).items()}
    raise SystemExit(f"{package}/__init__.py: has no table _HOME of public names")


def _reference() -> Iterator[str]:
    for package in PACKAGES:
        modules: dict[str, list[str]] = {}
        for name, module in homes(package).items():
            modules.setdefault(module, []).append(name)
        for module, names in modules.items():
            tree = _parsed(_file(module))
            about = (ast.get_docstring(tree) or "").split("\n\n")[0]
            yield f"### {module}\n\n{_inline(' '.join(about.split()))}"
            for name in names:
                yield _entry(name, module, tree)


def _entry(name: str, module: str, tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, Function)) and node.name == name:
            signature = _class(node) if isinstance(node, ast.ClassDef) else _call(node)
            parts = [f"#### `{name}`", f"```python\n{signature}\n```", markdown(_docstring(node, module))]
            if isinstance(node, ast.ClassDef) and (methods := list(_methods(node))):
                parts.append("Methods and properties:\n\n" + "\n".join(methods))
            return "\n\n".join(parts)
    raise SystemExit(f"{module}: {name} is listed as public but not defined there; name its own module")


def _class(node: ast.ClassDef) -> str:
    """``class Name(Base)`` and its fields, or the arguments of its ``__init__``."""
    bases = f"({', '.join(map(_source, node.bases))})" if node.bases else ""
    made = next((one for one in node.body if isinstance(one, Function) and one.name == "__init__"), None)
    if made is not None:
        return _wrapped(f"class {node.name}", _arguments(made.args, bound=True), "")
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
    return "\n    ".join([f"class {node.name}{bases}:" if fields else f"class {node.name}{bases}", *map(_field, fields)])


def _field(node: ast.AnnAssign) -> str:
    declared, value = f"{_source(node.target)}: {_source(node.annotation)}", node.value
    if isinstance(value, ast.Call) and _source(value.func) == "field":
        factory = next(one.value for one in value.keywords if one.arg == "default_factory")
        default = _source(factory.body) if isinstance(factory, ast.Lambda) else f"{_source(factory)}()"
    else:
        default = _source(value) if value is not None else ""
    return f"{declared} = {default}" if default else declared


def _methods(node: ast.ClassDef) -> Iterator[str]:
    """A line for each public method and property: how it is called, and the first sentences of its docstring."""
    for one in node.body:
        if isinstance(one, Function) and not one.name.startswith("_"):
            kinds = [_source(decorator) for decorator in one.decorator_list]
            known = "property" in kinds or "cached_property" in kinds
            call = one.name if known else _call(one, bound="staticmethod" not in kinds, width=10**6)
            about = (ast.get_docstring(one) or "").split("\n\n")[0]
            yield f"- `{call}`: {_inline(' '.join(about.split()))}"


def _call(node: Function, *, bound: bool = False, width: int = _WIDTH) -> str:
    returns = f" -> {_source(node.returns)}" if node.returns is not None else ""
    return _wrapped(node.name, _arguments(node.args, bound=bound), returns, width)


def _wrapped(head: str, arguments: list[str], returns: str, width: int = _WIDTH) -> str:
    line = f"{head}({', '.join(arguments)}){returns}"
    if len(line) <= width or not arguments:
        return line
    return "\n".join([f"{head}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _arguments(declared: ast.arguments, *, bound: bool) -> list[str]:
    positional = [*declared.posonlyargs, *declared.args]
    defaults = [None] * (len(positional) - len(declared.defaults)) + declared.defaults
    found = [_argument(*both) for both in zip(positional, defaults, strict=True)][1 if bound else 0 :]
    if declared.vararg is not None:
        found.append(f"*{_source(declared.vararg)}")
    elif declared.kwonlyargs:
        found.append("*")
    found += [_argument(*both) for both in zip(declared.kwonlyargs, declared.kw_defaults, strict=True)]
    return found + ([f"**{_source(declared.kwarg)}"] if declared.kwarg is not None else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return _source(argument) + (f" = {_source(default)}" if default is not None else "")


def _source(node: ast.AST) -> str:
    return ast.unparse(node).replace("'", '"')  # as this project writes its strings


def markdown(docstring: str) -> str:
    """A docstring in Google's style as Markdown: its sections become lists; examples, and what stands below ``::``, code."""
    return "\n\n".join(map(_part, docstring.split("\n\n")))


def _part(part: str) -> str:
    head, _, rest = part.partition("\n")
    rest = dedent(rest)
    if head == "Example:":
        return f"```python\n{rest}\n```"
    if head == "Returns:":
        return f"Returns {_inline(rest)}"
    if head in ("Args:", "Attributes:", "Raises:"):
        raises = "raises " if head == "Raises:" else ""
        return re.sub(r"^(\w[\w, *.]*): ", rf"- {raises}`\1`: ", _inline(rest), flags=re.M).replace("\n    ", "\n  ")
    if part.startswith("    "):
        return f"```\n{dedent(part)}\n```"
    return _inline(part.removesuffix(":") if part.endswith("::") else part)


def _inline(text: str) -> str:
    text = re.sub(r"^\.\. math:: (.*)", r"$$\1$$", text, flags=re.M)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text)


def _docstring(node: ast.ClassDef | Function, module: str) -> str:
    found = ast.get_docstring(node)
    if found is None and isinstance(node, ast.ClassDef):
        made = next((one for one in node.body if isinstance(one, Function) and one.name == "__init__"), None)
        found = ast.get_docstring(made) if made is not None else None
    if found is None:
        raise SystemExit(f"{module}: {node.name} is public and has no docstring")
    return found


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
