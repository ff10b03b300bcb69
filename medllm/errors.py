"""Errors a user can mend.

The command line prints a :class:`UserError` as one line and exits with code 2; anything else is a defect of ours and shows
its traceback. A message says what was wrong, where (file:line, problem_id, tensor), what was expected and what to do.
"""


class UserError(Exception):
    """What the user gave cannot be used: a missing file, a bad row, a setting that does not fit."""


class PromptError(UserError):
    """A prompt that cannot be continued. An engine knows only its ``index``; who made the prompts says whose it is."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"prompt {index}: {reason}")
        self.index = index
        self.reason = reason


class Stopped(Exception):
    """A training that was asked to end, and has saved what it did: nothing is wrong, and it goes on when it is called again."""
