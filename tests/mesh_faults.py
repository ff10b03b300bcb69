"""Child process of ``test_verify_mesh.py``: a step over eight forced devices with its reductions changed, one at a time.

``python -m tests.mesh_faults STAGE MESH COUNT`` prints what an unchanged step comes to, and, of so many changed ones, the
reduction that was left out or made twice and what came of it.
"""

from __future__ import annotations

import json
import re
import sys

from jax_medllm.mesh.layout import Layout
from jax_medllm.plan.mesh_check import cut_programs
from medllm.plan.mesh_check import narrowed
from medllm.plan.models import planned_model
from medllm.plan.request import Request

REDUCTION = re.compile(r"^(  (?:ROOT )?)%([\w.\-]+) = (\S+) all-reduce\(%([\w.\-]+)\), .*to_apply=%([\w.\-]+)", re.MULTILINE)


def reductions(text: str) -> list[re.Match[str]]:
    """The sums over devices of a program, of arrays and not of one number."""
    adds = set(re.findall(r"^%([\w.\-]+) \(.*\{\n(?:.*\n){2}  ROOT %[\w.\-]+ = f32\[\] add\(", text, re.MULTILINE))
    return [one for one in REDUCTION.finditer(text) if one[5] in adds and "[]" not in one[3]]


def without(text: str, one: re.Match[str]) -> str:
    """A program that leaves a reduction out: every device goes on with its own part."""
    return text.replace(one[0] + rest(text, one), f"{one[1]}%{one[2]} = {one[3]} copy(%{one[4]})")


def twice(text: str, one: re.Match[str]) -> str:
    """A program that makes a reduction of what is reduced already."""
    line = one[0] + rest(text, one)
    first = line.replace(f"%{one[2]} = ", f"%{one[2]}.once = ", 1).replace("ROOT ", "")
    return text.replace(line, f"{first}\n{line.replace(f'all-reduce(%{one[4]})', f'all-reduce(%{one[2]}.once)', 1)}")


def rest(text: str, one: re.Match[str]) -> str:
    """Of its line, what follows the match."""
    return text[one.end() : text.index("\n", one.end())]


def main(stage: str, mesh: str, count: int) -> None:
    """Compare them all."""
    rows = {"length": 16} if stage == "cpt" else {"prompt": 16, "response": 8}
    request = Request("qwen2.5-0.5b", stage, **rows)
    settings = {**request.settings(), "model": narrowed(planned_model(request.model)).to_hf(), "dtype": "float32"}
    gradients, update = cut_programs(Layout.of(mesh), "cpu", stage, settings)
    found = [{"planted": "nothing", "results": [*gradients.compared(), *update.compared()]}]
    all_sums = reductions(gradients.text)
    for number in range(count):
        one = all_sums[number * len(all_sums) // count]
        plant = (without, twice)[number % 2]
        planted = {"planted": f"{plant.__name__}: {one[2]}", "results": gradients.compared(plant(gradients.text, one))}
        found.append(planted)
    print(json.dumps({"reductions": len(all_sums), "found": found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
