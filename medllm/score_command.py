"""``medllm score``: predictions by the official rule, and beside it what their texts give when they are read here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser

from medllm.command import say
from medllm.config import ProblemLayout


def score_arguments(parser: ArgumentParser) -> None:
    """The options of ``medllm score``."""
    parser.add_argument("--problems", type=str, required=True, help="problem file or folder")
    parser.add_class_arguments(ProblemLayout)
    parser.add_argument("--predictions", type=str, required=True, help="prediction file, folder or pattern")
    parser.add_argument("--lenient", type=bool, default=False, help="forgive spaces; the official score does not")
    parser.add_argument("--from_text", type=bool, default=False, help="beside it: the texts of the predictions, read anew")
    parser.add_argument("--explanation", type=bool, default=False, help="the predictions' texts explain before they answer")
    parser.add_argument("--shot_count", type=int, default=3, help="examples that were shown: the setting's name in tables")
    parser.add_argument("--label", type=str | None, default=None, help="what the model is called in tables; else --predictions")
    parser.add_argument(
        "--leaks", type=str | None, default=None, help="what `medllm data leaks --json` wrote: the score without them too"
    )


def score_predictions(values: Any) -> dict[str, Any]:
    """Score them, and say it in a line."""
    from medllm.exam.loaders import problems_at
    from medllm.exam.predictions import in_letters, in_no_letters, read_predictions
    from medllm.exam.scoring import read_anew, score
    from medllm.exam.setting import setting_name

    loaded = problems_at(values.problems, values)
    problems, given = loaded.problems, read_predictions(values.predictions)
    kept = [one for one in given if one.problem_id not in loaded.skipped_ids]
    choices, left_out = {problem.problem_id: len(problem.choices) for problem in problems}, len(given) - len(kept)
    predictions, alphabet = in_letters(kept, choices)
    unread = in_no_letters(predictions, choices)
    sheet = score(problems, predictions, lenient=values.lenient)
    named = {
        "stage": "score",
        "model": values.label or values.predictions,
        "setting": setting_name(values.shot_count, explanation=values.explanation),
    }
    counts: dict[str, Any] = {"alphabet": alphabet, "in_no_letters": unread}
    counts |= {"skipped": dict(loaded.skipped), "predictions_left_out": left_out}
    read = "" if alphabet == "letters" else f"; predictions in {alphabet}, read as letters"
    wrong = f"; {unread} predictions are in no letters, and count as wrong" if unread else ""
    say(f"score: {sheet.words()}{read}{wrong}" + (f"; {left_out} for rows left out" if left_out else ""))
    if values.leaks:
        from medllm.report.clean import clean_score, leaked_ids

        without = clean_score(sheet.results, leaked_ids(values.leaks, {one.problem_id for one in sheet.results}))
        say(f"score: {without.words()}")
        counts["clean"] = asdict(without)
    if not values.from_text:
        return named | sheet.to_json() | counts
    anew = read_anew(problems, predictions, explanation=values.explanation)
    say(f"score: {anew.read_points} points by the texts read anew; {anew.readings.words()}")
    return named | sheet.to_json() | counts | asdict(anew)
