"""What a run was made from and what it left, by digests: ``provenance.json`` of its folder.

::

    {"sessions": [{"started": "…", "processes": 1, "code": "…",
                   "inputs": {"model.path": {"model.safetensors": "blake2b:…"}, …}}],
     "outputs": {"adapter/adapter_model.safetensors": "blake2b:…", …}}

A session is one start of the command; a run that went on has several. Paths are those inside a file's own folder: where that is
stands in ``config.yaml``. A folder of more than 8 GiB is not read a second time: of its large files the size and 64 MiB,
spread evenly, are taken (``sampled:…``), which tells one model from another and does not see a few changed numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medllm.errors import UserError
from medllm.text_files import read_json_object

PROVENANCE = "provenance.json"
_SETTINGS = (
    *(
        "model.path",
        "model.adapter",
        "model.tokenizer",
        "server.tokenizer",
        "corpus.documents",
        "corpus.problems",
        "corpus.layout",
    ),
    *("problems", "shots", "layout", "preferences", "held_out.problems"),
)
"""The settings that name files which a run depends on."""
_OWN = ("adapter/*", "*.jsonl", "*.journal", "config.yaml", "reference-*.safetensors")
"""What a run leaves that others go on from, in its folder."""
_IN_FULL = 8 << 30
_PIECE, _PIECES = 1 << 18, 256
_MOST_FILES = 10_000


def read_provenance(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What a run recorded: its sessions, each with its ``inputs`` (:func:`input_digests`), and its outputs. Empty where it has
    recorded nothing.

    Raises:
        UserError: the file cannot be read, or is not what a run writes.
    """
    file = run / PROVENANCE
    made = read_json_object(file, "") if file.exists() else {}
    sessions, outputs = made.get("sessions", []), made.get("outputs", {})
    if not isinstance(sessions, list) or not all(isinstance(one, dict) for one in sessions) or not _are_digests(outputs):
        raise UserError(f"{file}: sessions and outputs are expected in it; restore the file")
    for number, inputs in enumerate((one.get("inputs", {}) for one in sessions), 1):
        if not isinstance(inputs, dict) or not all(map(_are_digests, inputs.values())):
            raise UserError(f"{file}: session {number}: digests of files are expected, by setting; restore the file")
    return sessions, outputs


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def input_digests(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Digests of the files that a run's settings name: by setting, by the file's path inside what the setting names.

    What is no file or folder of this machine, as a server's name of a model, has none.

    Raises:
        UserError: a file cannot be read.
    """
    found = {}
    for name in _SETTINGS:
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        files = dict(_files([value] if isinstance(value, str) else list(value or ())))
        if files:
            found[name] = digests(files)
    return found


def output_digests(run: Path) -> dict[str, str]:
    """Digests of what a run left, by path."""
    files = {file.relative_to(run).as_posix(): file for pattern in _OWN for file in sorted(run.glob(pattern)) if file.is_file()}
    return digests(files)


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """BLAKE2b of each file; of large files in more than 8 GiB a sample (see the module).

    Raises:
        UserError: a file cannot be read.
    """
    sizes = {name: file.stat().st_size for name, file in files.items()}
    in_full = sum(sizes.values()) <= _IN_FULL
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: _digest(files[name], sizes[name], in_full), files)
        return dict(zip(files, found, strict=True))


def code_digest() -> str:
    """Of the source of the study and of the engines that lie beside it."""
    root = Path(__file__).resolve().parent.parent
    state = hashlib.blake2b(digest_size=16)
    for package in ("medllm", "jax_medllm", "torch_ref"):
        for file in sorted((root / package).rglob("*.py")):
            state.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def _files(paths: list[str]) -> Iterator[tuple[str, Path]]:
    """The files that paths name; hidden ones are not data. Of two of one name the later is told apart by its number."""
    for number, path in enumerate(map(Path, paths)):
        label = f"{number}:" if len(paths) > 1 else ""
        if path.is_file():
            yield f"{label}{path.name}", path
        elif path.is_dir():
            for count, file in enumerate(sorted(_below(path))):
                if count == _MOST_FILES:
                    break
                yield f"{label}{file.relative_to(path).as_posix()}", file


def _below(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _digest(file: Path, size: int, in_full: bool) -> str:
    try:
        with file.open("rb") as stream:
            if in_full or size <= 2 * _PIECE * _PIECES:
                return f"blake2b:{hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()}"
            state = hashlib.blake2b(str(size).encode(), digest_size=16)
            for number in range(_PIECES):
                stream.seek(number * (size - _PIECE) // (_PIECES - 1))
                state.update(stream.read(_PIECE))
            return f"sampled:{state.hexdigest()}"
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a run records what it is made from") from error
