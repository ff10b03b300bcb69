"""Requests of many threads: as many under way as may be, their answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from medllm.errors import UserError
from medllm.remote.pace import Pace

Asked = TypeVar("Asked")
Said = TypeVar("Said")


def as_they_come(
    following: Callable[[], Asked | None], ask: Callable[[Asked], Said | None], at_most: int, pace: Pace
) -> Iterator[list[tuple[Asked, Said]]]:
    """What was asked and what was said to it, those together that came together.

    Args:
        following: The next one to ask; None where there is none for now. It is called again after what came was looked at.
        ask: Asks it, in a thread; None where ``pace`` was closed before it went.
        at_most: How many are under way at a time.
        pace: The gate that they pass; closed at the end.

    Raises:
        UserError: of the first request that failed for good, when those under way have ended.
    """
    under_way: dict[Future[Said | None], Asked] = {}
    failed: UserError | None = None
    with ThreadPoolExecutor(at_most) as pool:
        try:
            while True:
                while failed is None and len(under_way) < at_most and (one := following()) is not None:
                    under_way[pool.submit(ask, one)] = one
                if not under_way:
                    break
                came: list[tuple[Asked, Said]] = []
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    asked = under_way.pop(future)
                    try:
                        said = future.result()
                    except UserError as error:
                        failed = failed or error
                    else:
                        came += [(asked, said)] if said is not None else []
                if came:
                    yield came
        finally:
            pace.close()
    if failed:
        raise failed
