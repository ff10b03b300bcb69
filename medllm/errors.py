"""Errors a user can mend.

The command line prints a :class:`UserError` as one line and exits with code 2; anything else is a defect of ours and shows
its traceback. A message says what was wrong, where (file:line, problem_id, tensor), what was expected and what to do.
"""


class UserError(Exception):
    """What the user gave cannot be used: a missing file, a bad row, a setting that does not fit."""
