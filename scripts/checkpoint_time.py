"""What checkpoints cost a training: the time of a step with and without them.

::

    python scripts/checkpoint_time.py --engine jax --every 10 --runs 5

runs ``medllm cpt`` on made-up documents in turn without checkpoints and with one every so many steps, each time as a process
of its own on an idle machine, and prints the median over the runs, their spread, and how the two compare. Seconds are those of
``metrics.jsonl`` between the fifth step and the last but one, without compilation: both kinds of run save at their end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from medllm.mini.study import BASE  # noqa: E402 - found by the line above
from medllm.run import this_machine  # noqa: E402

_FROM = 5
"""Steps before it pay for allocations."""
_WORDS = "the fever went down after rest and water while a cough and a cold stayed with them for days".split()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="time of a step with and without checkpoints")
    parser.add_argument("--engine", choices=["jax", "torch"], default="jax", help="which engine is measured")
    parser.add_argument("--model", default=str(BASE), help="model folder")
    parser.add_argument("--quantization", default="none", help="how its weights are held")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--steps", type=int, default=64, help="steps of a run")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--runs", type=int, default=5, help="of each kind, in turn")
    given = parser.parse_args()
    print(f"{this_machine()}, Python {platform.python_version()}, engine {given.engine}, load {os.getloadavg()[0]:.1f}")
    found: dict[int, list[float]] = {0: [], given.every: []}
    with tempfile.TemporaryDirectory() as folder:
        documents = make_documents(Path(folder), given.steps * given.rows, given.length)
        for _ in range(given.runs):
            for every, seconds in found.items():
                seconds.append(step_seconds(given, documents, every))
                print(f"checkpoints every {every or '–'} steps: {seconds[-1]:.4f} s a step", flush=True)
    without, with_them = (statistics.median(seconds) for seconds in found.values())
    print("| checkpoints | median s a step | least | most |")
    print("|---|---:|---:|---:|")
    for every, seconds in found.items():
        kind = f"every {every} steps" if every else "none"
        print(f"| {kind} | {statistics.median(seconds):.4f} | {min(seconds):.4f} | {max(seconds):.4f} |")
    print(f"with them {with_them / without:.3f} times the time of a step without")
    return 0


def make_documents(folder: Path, rows: int, length: int) -> Path:
    """A file of documents that make at least so many rows."""
    draw, file = random.Random(0), folder / "documents.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(rows):
            stream.write(json.dumps({"text": " ".join(draw.choices(_WORDS, k=2 * length))}) + "\n")
    return file


def step_seconds(given: argparse.Namespace, documents: Path, every: int) -> float:
    """Of a run of its own."""
    with tempfile.TemporaryDirectory(dir=documents.parent) as folder:
        run = Path(folder) / "run"
        words = f"cpt --engine {given.engine} --model.path {given.model} --model.quantization {given.quantization}"
        words += f" --corpus.documents {documents} --corpus.length {given.length} --lora.rank {given.rank} --run {run}"
        words += f" --training.batch_size {given.rows} --training.accumulation 1 --training.epochs 1"
        words += f" --training.max_steps {given.steps} --training.checkpoint_every {every} --training.keep 2"
        words += " --optimizer.learning_rate 1e-4"
        done = subprocess.run(
            [sys.executable, "-m", "medllm", *words.split()], capture_output=True, text=True, cwd=ROOT, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if _FROM <= line["step"] < given.steps]
    first, last = lines[0], lines[-1]
    worked = [line["seconds"] - line.get("compile_seconds", 0.0) for line in (first, last)]
    return (worked[1] - worked[0]) / (last["step"] - first["step"])


if __name__ == "__main__":
    sys.exit(main())
