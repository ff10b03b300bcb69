"""The stages of the study as functions: what each command does, for scripts and notebooks.

Every stage opens its model once, checks all of its input (``check_…``) before it makes its run folder, and returns what came of
it as data, whose ``to_json`` is what ``result.json`` holds.
"""
