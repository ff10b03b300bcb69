"""``medllm verify``: what can be proved of a run, on the terminal, as JSON and as a page."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.errors import UserError
from medllm.host.progress import progress_bar


def _arguments(parser: ArgumentParser) -> None:
    from medllm.verify.verifying import VerifyConfig

    parser.add_argument("run", type=str, help="run folder")
    parser.add_class_arguments(VerifyConfig, as_group=True, skip={"run"})
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of certificate.json and certificate.html; the run's own"
    )


def _verify(values: Any) -> dict[str, Any]:
    from medllm.verify.page import PAGE, write_certificate
    from medllm.verify.verifying import VerifyConfig, verify

    out = Path(values.out or values.run)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    config = VerifyConfig(**{field.name: values[field.name] for field in fields(VerifyConfig)})
    with progress_bar("verify") as progress:
        certificate = verify(config, progress)
    result = write_certificate(out, certificate)
    for one in certificate.findings:
        say(f"{one.status:11}  {one.words}")
    say(f"verify: {certificate.headline()}; {out / PAGE}")
    return result


VERIFY = Command(
    "prove a run: its files, data and answers, and optimizer steps taken anew in float64",
    _arguments,
    _verify,
    ("--steps", "--reach", "--seed", "--exam", "--out"),
)
