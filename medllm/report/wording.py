"""The statistics of a table in sentences, and how they were come by."""

from __future__ import annotations

from medllm.report.results import Row, StudyTable
from medllm.report.statistics import Comparison, Estimate
from medllm.report.tables import interval, number, p_value


def findings(table: StudyTable) -> list[str]:
    """A sentence on each model's stability and on each difference from the stage before."""
    sentences = [_stability(row.model, row.stability) for row in table.rows if row.stability is not None]
    for row in table.rows:
        sentences += [_against(row, setting, comparison) for setting, comparison in row.against_previous.items()]
        if row.stability_change is not None:
            change = row.stability_change
            verdict = "steadier" if change.difference.value > 0 else "less steady"
            if _spans_zero(change.difference):
                verdict = "neither steadier nor less steady, as far as these problems can tell,"
            sentences.append(
                f"{row.model} is {verdict} under explanation than {row.previous}: stability changes by "
                f"{number(change.difference.value, True)} {interval(change.difference, True)}, {p_value(change.p_value)}."
            )
    return sentences


def method(table: StudyTable) -> str:
    """How intervals and p-values were computed."""
    draw = table.draw
    return (
        f"Scores are points earned over points possible. Intervals are {draw.confidence:.0%} {draw.method} bootstrap intervals over "
        f"problems ({draw.resamples} resamples, seed {draw.seed}); differences and stability are paired by problem, and their p-values "
        f"are two-sided. Where every problem has the same outcome, the interval is the exact binomial bound. McNemar's exact test "
        f"counts problems instead of points. The p-values are not corrected for the number of comparisons. They say how far the "
        f"result depends on which problems the exam happened to have; they say nothing about training again with another seed."
    )


def _stability(model: str, estimate: Estimate) -> str:
    bounds = interval(estimate, True)
    if _spans_zero(estimate):
        worst = f"a loss of up to {number(-estimate.low)} is not excluded" if estimate.low < 0 else "no loss was seen"
        return f"{model} scores the same with and without explanation as far as these problems can tell: {number(estimate.value, True)} {bounds}; {worst}."
    direction = "loses" if estimate.value < 0 else "gains"
    return f"{model} {direction} {number(abs(estimate.value))} by explaining first {bounds}: more than the choice of problems explains."


def _against(row: Row, setting: str, comparison: Comparison) -> str:
    difference = comparison.difference
    direction = "above" if difference.value > 0 else "below"
    verdict = "which chance alone can give" if _spans_zero(difference) else "more than chance gives"
    place = f"{number(abs(difference.value))} {direction}" if difference.value else "level with"
    return (
        f"{setting}: {row.model} is {place} {row.previous} {interval(difference, True)}, {verdict} ({p_value(comparison.p_value)}; "
        f"{comparison.gained} problems gained, {comparison.lost} lost, McNemar {p_value(comparison.mcnemar_p)})."
    )


def _spans_zero(estimate: Estimate) -> bool:
    return estimate.low <= 0 <= estimate.high
