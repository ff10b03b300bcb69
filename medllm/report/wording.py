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
            steadier = "steadier" if change.difference.value > 0 else "less steady"
            verdict = f"{row.model} is {steadier} under explanation than {row.previous}"
            if _spans_zero(change.difference):
                verdict = f"Whether {row.model} is {steadier} under explanation than {row.previous} these problems cannot tell"
            amount = f"{number(change.difference.value, True)} {interval(change.difference, True)}, {p_value(change.p_value)}"
            sentences.append(f"{verdict}: stability changes by {amount}.")
    return sentences


def method(table: StudyTable) -> str:
    """How intervals and p-values were computed."""
    draw = table.draw
    return (
        f"Scores are points earned over points possible. Intervals are {draw.confidence:.0%} {draw.method} bootstrap intervals "
        f"over problems ({draw.resamples} resamples, seed {draw.seed}); differences and stability are paired by problem, and "
        "their two-sided p-values come from the same draws. Where every problem has the same outcome, the interval is the "
        "exact binomial bound. McNemar's exact test counts problems instead of points. The p-values are not corrected for the "
        "number of comparisons. They say how far the result depends on which problems the exam happened to have; they say "
        "nothing about training again with another seed."
    )


def _stability(model: str, estimate: Estimate) -> str:
    bounds = interval(estimate, True)
    if _spans_zero(estimate):
        worst = f"a loss of up to {number(-estimate.low)} is not excluded" if estimate.low < 0 else "no loss was seen"
        value = number(estimate.value, True)
        return f"{model}: these problems show no difference between explaining first and not, {value} {bounds}; {worst}."
    direction = "loses" if estimate.value < 0 else "gains"
    amount = number(abs(estimate.value))
    return f"{model} {direction} {amount} by explaining first {bounds}: beyond chance."


def _against(row: Row, setting: str, comparison: Comparison) -> str:
    difference = comparison.difference
    direction = "above" if difference.value > 0 else "below"
    verdict = "not told apart from chance" if _spans_zero(difference) else "beyond chance"
    place = f"{number(abs(difference.value))} {direction}" if difference.value else "level with"
    tests = f"{p_value(comparison.p_value)}; McNemar {p_value(comparison.mcnemar_p)}"
    counts = f"{comparison.gained} problems gained, {comparison.lost} lost"
    return f"{setting}: {row.model} is {place} {row.previous} {interval(difference, True)}: {verdict} ({tests}; {counts})."


def _spans_zero(estimate: Estimate) -> bool:
    return estimate.low <= 0 <= estimate.high
