"""What a format of users' files is, to those that damage it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Format:
    """A format of users' files.

    Attributes:
        example: Makes a folder with a good example of it, and of what it is read with.
        file: The file in that folder which is damaged.
        read: Reads it as a command does.
        damages: Ways to damage it besides its bytes.
        whole: Reads it and does all else that the command does, where that takes longer than a suite of tests has for it.
        refused: The good example is refused in a line too.
    """

    example: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]
    damages: tuple[Damage, ...] = ()
    whole: Callable[[Path], object] | None = None
    refused: bool = False
