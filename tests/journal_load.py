"""What keeping answers costs: a curation whose model answers at once.

::

    python -m tests.journal_load 20000 8

prints samples a second, peak memory and the sizes of the files, of a run and of one that finds most answers in its journal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from medllm.config import ModelConfig, Sampling
from medllm.engine import Generation
from medllm.exam.problem import Problem
from medllm.host.memory import peak_resident_bytes
from medllm.journal import JOURNAL
from medllm.stage_config import CurateConfig
from medllm.stages.curate import PREFERENCES, build_preferences

EXPLANATION, ANSWER = 1500, 400
"""Characters."""


class AtOnce:
    """Another text for each sample; half of them right."""

    name = "at once"

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        return [[self._text(prompt, n) for n in range(sampling.samples)] for prompt in prompts]

    def _text(self, prompt: str, sample: int) -> Generation:
        text = f"{hash((prompt[-80:], sample))}{'病' * ANSWER}。\n Answer:{'ab'[sample % 2]}"
        return Generation(text, tuple(range(300)), "stop", "")


def measured(problems: int, samples: int, run: str) -> dict[str, Any]:
    """Curate so many problems in this process."""
    five, said = tuple("一二三四五"), "説" * EXPLANATION
    asked = [Problem(f"p{n}", f"{n}番はどれか。", five, ("a",), explanation=said, year=2010) for n in range(problems)]
    config = CurateConfig(ModelConfig("m"), run, ("p",), sampling=Sampling(temperature=1.0, samples=samples))
    began, spent = time.monotonic(), time.process_time()
    build_preferences(AtOnce(), asked, (), config)
    seconds, processor = time.monotonic() - began, time.process_time() - spent
    sizes = {name: (Path(run) / name).stat().st_size // 2**20 for name in (JOURNAL, PREFERENCES)}
    rate = round(problems * samples / seconds)
    took = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1), "samples_per_second": rate}
    return {**took, "peak_mib": peak_resident_bytes() // 2**20, "mib": sizes}


def main(problems: str, samples: str) -> None:
    """Each in a process of its own; the second goes on from a journal that lacks its last tenth."""
    with tempfile.TemporaryDirectory() as folder:
        run, written = Path(folder) / "run", []
        for name in ("new", "gone on"):
            words = [sys.executable, "-m", "tests.journal_load", problems, samples, str(run)]
            environment = {**os.environ, "PYTHONHASHSEED": "0"}
            done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            print(name, done.stdout.strip(), flush=True)
            written.append((run / PREFERENCES).read_bytes())
            (run / "result.json").unlink()
            os.truncate(run / JOURNAL, (run / JOURNAL).stat().st_size * 9 // 10)
    assert written[0] == written[1], "another outcome"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measured(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
    else:
        main(*sys.argv[1:])
