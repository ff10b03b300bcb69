"""Batches shared out among the processes of a launch, one a GPU; what each made of its own is given to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from medllm.host.processes import process_count, process_index

Batch = TypeVar("Batch")
Made = TypeVar("Made")

_LONGEST = timedelta(days=2)
"""That one process may be busy while the others wait for it."""


def made_of(
    batches: Sequence[Batch], make: Callable[[Batch], Made], done: Callable[[int], None] = lambda _: None
) -> list[Made]:
    """What ``make`` makes of each batch, in order, in every process.

    Every ``n``-th batch is this process's, of ``n`` in the launch (torchrun, accelerate). What a batch holds does not depend on
    how many there are, so neither does what is made of it. Processes exchange Python objects, and trust each other.

    Args:
        batches: The same in all processes.
        make: Runs the model.
        done: Told how many batches are done in all, as far as this process can tell.
    """
    count, rank = process_count(), process_index()
    mine: dict[int, Made] = {}
    for number in range(rank, len(batches), count):
        mine[number] = make(batches[number])
        done(min(len(batches), len(mine) * count))
    parts: list[Any] = [mine]
    if count > 1:
        parts = [None] * count
        torch.distributed.all_gather_object(parts, mine, group=_group())
    whole = {number: made for part in parts for number, made in part.items()}
    return [whole[number] for number in range(len(batches))]


@cache
def _group() -> Any:
    """All processes, over their CPUs: GPUs have better to do, and their library's patience is short."""
    PartialState()  # joins the launch, where training has not yet
    return torch.distributed.new_group(backend="gloo", timeout=_LONGEST)
