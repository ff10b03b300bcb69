"""``medllm score``: predictions by the official rule, and beside it what their texts give when they are read here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from jsonargparse import ArgumentParser

from medllm.command import say
from medllm.config import ProblemsFormat


def score_arguments(parser: ArgumentParser) -> None:
    """The options of ``medllm score``."""
    parser.add_argument("--problems", type=str, required=True, help="problem file or folder")
    parser.add_argument("--problems_format", type=ProblemsFormat, default="auto", help="auto: by name and content")
    parser.add_argument("--layout", type=str | None, default=None, help="YAML file that says how the problems are laid out")
    parser.add_argument("--on_bad_row", type=Literal["stop", "skip"], default="stop", help="skip: leave it out and count it")
    parser.add_argument("--predictions", type=str, required=True, help="prediction file, folder or pattern")
    parser.add_argument("--lenient", type=bool, default=False, help="forgive spaces; the official score does not")
    parser.add_argument("--from_text", type=bool, default=False, help="beside it: the texts of the predictions, read anew")
    parser.add_argument("--explanation", type=bool, default=False, help="with --from_text: they explain before they answer")


def score_predictions(values: Any) -> dict[str, Any]:
    """Score them, and say it in a line."""
    from medllm.exam.loaders import load_problems
    from medllm.exam.predictions import in_letters, read_predictions
    from medllm.exam.scoring import read_anew, score

    loaded = load_problems(
        values.problems,
        problems_format=values.problems_format,
        layout=values.layout,
        skip_bad_rows=values.on_bad_row == "skip",
    )
    problems, given = loaded.problems, read_predictions(values.predictions)
    kept = [one for one in given if one.problem_id not in loaded.skipped_ids]
    predictions, alphabet = in_letters(kept, {problem.problem_id: len(problem.choices) for problem in problems})
    sheet = score(problems, predictions, lenient=values.lenient)
    counts = {"alphabet": alphabet, "skipped": dict(loaded.skipped), "predictions_left_out": len(given) - len(kept)}
    read = "" if alphabet == "letters" else f"; predictions in {alphabet}, read as letters"
    say(f"score: {sheet.words()}{read}" + (f"; {len(given) - len(kept)} for rows left out" if len(given) > len(kept) else ""))
    if not values.from_text:
        return sheet.to_json() | counts
    anew = read_anew(problems, predictions, explanation=values.explanation)
    say(f"score: {anew.read_points} points by the texts read anew; {anew.readings.words()}")
    return sheet.to_json() | counts | asdict(anew)
