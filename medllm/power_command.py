"""``medllm power``: how many problems and trainings show a difference of two models' scores, or that there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from medllm.command import Command, say
from medllm.errors import UserError

if TYPE_CHECKING:
    from medllm.report.power import Design


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--score", type=float, required=True, help="the score of the first model, between 0 and 1")
    parser.add_argument("--difference", type=float, required=True, help="how much better (or worse) the second one is")
    parser.add_argument("--problems", type=int, default=2000, help="that both answer")
    parser.add_argument("--trainings", type=list[int], default=[1, 3, 5, 10], help="of each model")
    parser.add_argument(
        "--discordance",
        type=float | None,
        default=None,
        help="share of problems on which they part (unset: as if independent)",
    )
    parser.add_argument("--chance", type=float, default=0.0, help="share on which two trainings of one model part")
    parser.add_argument(
        "--spread", type=float, default=0.0, help="standard deviation of a score over trainings, beyond that chance"
    )
    parser.add_argument("--paired", action="store_true", help="compared training by training, as medllm ablate does")
    parser.add_argument(
        "--margin", type=float | None, default=None, help="to be shown is that the difference, such as 0, is within this"
    )
    parser.add_argument("--power", type=float, default=0.8, help="how often the difference is to be found")
    parser.add_argument("--alpha", type=float, default=0.05, help="size of the test")


def _run(values: Any) -> dict[str, Any]:
    from medllm.report.power import (
        Design,
        independent_discordance,
        power,
        problems_needed,
        smallest_difference,
        smallest_margin,
    )

    if not values.alpha < values.power < 1:
        raise UserError(f"--power is {values.power}; expected a chance between --alpha and 1, such as 0.8")
    most = independent_discordance(values.score, values.difference)
    design = Design(
        values.difference,
        most if values.discordance is None else values.discordance,
        values.chance,
        values.spread,
        values.problems,
        alpha=values.alpha,
        paired=values.paired,
        margin=values.margin,
    )
    smallest = ("difference", smallest_difference) if values.margin is None else ("margin", smallest_margin)
    rows = []
    for trainings in values.trainings:
        planned = replace(design, trainings=trainings)
        rows.append(
            {
                "trainings": trainings,
                "power": power(planned),
                "problems_needed": problems_needed(planned, values.power),
                f"smallest_{smallest[0]}": smallest[1](planned, values.power),
            }
        )
        say(_words(rows[-1], design, values.power))
    say(f"power: models that part on {design.discordance:.3f} of the problems; of 1 training, of these two trainings alone")
    given = {name: value for name, value in asdict(design).items() if name != "trainings"}
    return given | {"score": values.score, "wanted": values.power, "rows": rows}


def _words(row: Mapping[str, Any], design: Design, wanted: float) -> str:
    """A row in a line."""
    many = "1 training" if row["trainings"] == 1 else f"{row['trainings']} trainings"
    needed = row["problems_needed"]
    if design.margin is None:
        kind, sought = "difference", f"for {design.difference:+.3f}"
    else:
        kind, sought = "margin", f"that {design.difference:+.3f} is within {design.margin:.3f}"
    smallest = row[f"smallest_{kind}"]
    least = f"no {kind}" if smallest is None else f"{'' if design.margin is None else 'a margin of '}{smallest:.3f} or more"
    takes = "no number of problems gives" if needed is None else f"{needed:,} problems give"
    now = f"{row['power']:.0%} {sought}, {wanted:.0%} for {least}"
    return f"power: {many}, {design.problems:,} problems: {now}; {takes} {wanted:.0%} {sought}"


POWER = Command("how many problems and trainings show a difference", _arguments, _run)
