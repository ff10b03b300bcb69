"""The files that a run was made from, and those it left: are they what it recorded?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from medllm.errors import UserError
from medllm.model.adapter import WEIGHTS, read_adapter
from medllm.model.files import ADAPTER
from medllm.provenance import PROVENANCE, code_digest, input_digests, output_digests, read_provenance
from medllm.verify.findings import Finding, held
from medllm.verify.record import Record

INPUTS = "the files it was made from"
OUTPUTS = "the files it left"
_SAMPLED = "sampled:"


def check_files(record: Record) -> list[Finding]:
    """Digests of inputs and outputs, of one session against the other, and where what it was made from came from."""
    if not record.sessions:
        missing = f"there is no {PROVENANCE}: the run is of a version that recorded none"
        return [Finding(INPUTS, "not checked", said=missing), Finding(OUTPUTS, "not checked", said=missing)]
    return [*_inputs(record), *_origins(record), *_outputs(record), *_code(record)]


def _inputs(record: Record) -> Iterator[Finding]:
    before = record.sessions[0].get("inputs", {})
    now = input_digests(record.plain)
    for setting in sorted(before.keys() | now.keys()):
        changed = [f"{name} {why}" for name, why in _changes(before.get(setting, {}), now.get(setting, {}))]
        sampled = sum(digest.startswith(_SAMPLED) for digest in before.get(setting, {}).values())
        said = f"{len(before.get(setting, {}))} files" + (f", {sampled} of them sampled, not read in full" if sampled else "")
        yield from held(INPUTS, setting, changed, said)
    for number, session in enumerate(record.sessions[1:], 2):
        inputs = session.get("inputs", {})
        for setting in sorted(before.keys() | inputs.keys()):
            for name, why in _changes(before.get(setting, {}), inputs.get(setting, {})):
                yield Finding(INPUTS, "refuted", setting, f"session {number} went on with another {name} ({why})")


def _origins(record: Record) -> Iterator[Finding]:
    """Inputs that another run left: the same as that run recorded."""
    for setting, paths in (("model.adapter", record.config.model.adapters), ("preferences", [record.plain.get("preferences")])):
        for path in (Path(one) for one in paths if one):
            _, left = read_provenance(path.parent)
            if left:
                own = {name: digest for name, digest in left.items() if name == path.name or name.startswith(f"{path.name}/")}
                now = {name: digest for name, digest in output_digests(path.parent).items() if name in own}
                changed = [f"{name} {why} in {path.parent.name}, which it is from" for name, why in _changes(own, now)]
                yield from held("what another run left", setting, changed, f"as {path.parent.name} recorded it")


def _outputs(record: Record) -> Iterator[Finding]:
    if record.result is None:
        yield Finding(OUTPUTS, "not checked", said="the run has not finished")
        return
    if not record.outputs:
        yield Finding(OUTPUTS, "refuted", PROVENANCE, "has no outputs, and the run has finished")
    now = output_digests(record.path)
    for name, why in _changes(record.outputs, now):
        yield Finding(OUTPUTS, "refuted", name, why)
    if record.outputs == now and now:
        yield Finding(OUTPUTS, "proved", said=f"{len(now)} files")


def _code(record: Record) -> Iterator[Finding]:
    codes = list(dict.fromkeys(str(session.get("code")) for session in record.sessions))
    if len(codes) > 1:
        yield Finding("the code", "noted", said=f"its {len(record.sessions)} sessions ran {len(codes)} versions of the code")
    same = codes == [code_digest()]
    said = "the run was made by the code that verifies it" if same else "the run was made by other code than verifies it"
    yield Finding("the code", "proved" if same else "noted", said=said)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield name, "is gone"
        elif name not in before:
            yield name, "was not there"
        elif before[name] != now[name]:
            yield name, "is not what it was"


def check_adapter_settings(record: Record) -> list[Finding]:
    """The adapter that a training left says of itself what the run's settings say."""
    what, folder = "the adapter's settings", record.path / "adapter"
    if not folder.exists():
        return [Finding(what, "not checked", said="the run has left no adapter")]
    try:
        lora = read_adapter(folder).lora
    except UserError as error:
        return [Finding(what, "refuted", f"adapter/{ADAPTER}", str(error))]
    wanted = record.config.lora
    if record.stage == "rpo" and record.config.model.adapters and record.config.handover == "continue":
        wanted = read_adapter(record.config.model.adapters[-1]).lora
    names = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")
    differences = [
        f"{name} is {getattr(lora, name)}, in config.yaml {getattr(wanted, name)}"
        for name in names
        if getattr(lora, name) != getattr(wanted, name)
    ]
    if set(lora.targets) != set(wanted.targets):
        differences.append(f"its targets are {', '.join(lora.targets)}, in config.yaml {', '.join(wanted.targets)}")
    return held(what, f"adapter/{ADAPTER}", differences)


def check_adapter_weights(record: Record, last: Mapping[str, np.ndarray], source: str) -> list[Finding]:
    """The adapter is that of the last checkpoint, number for number.

    Args:
        record: The run.
        last: The adapter in the checkpoint.
        source: What the checkpoint is called.
    """
    what, where = "the adapter's weights", f"adapter/{WEIGHTS}"
    try:
        tensors = read_adapter(record.path / "adapter").tensors
    except UserError as error:
        return [Finding(what, "refuted", where, str(error))]
    differences = [f"{name} is in one of adapter and {source} alone" for name in sorted(tensors.keys() ^ last.keys())]
    for name in sorted(tensors.keys() & last.keys()):
        found, expected = np.asarray(tensors[name], np.float64), np.asarray(last[name], np.float64)
        count = int((found != expected).sum()) if found.shape == expected.shape else found.size
        if count:
            differences.append(f"{name}: {count} of {found.size} numbers are not those of {source}")
    return held(what, where, differences, f"number for number those of {source}")
