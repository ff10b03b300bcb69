"""The statistics of a table in sentences, and how they were come by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medllm.exam.answers import Reason, Rule
from medllm.report.nested import Equivalence
from medllm.report.results import Row, StudyTable
from medllm.report.statistics import Comparison, Estimate
from medllm.report.tables import holm, interval, number, p_value

READ_BY: Mapping[Rule, str] = {
    "json": "the value of a key that announces an answer",
    "label": "what stands behind the last label (Answer:, 答え:)",
    "only": "the whole text, which is nothing but an answer",
    "sentence": "a sentence that says what the answer is",
    "first_line": "the first line",
    "conclusion": "what the last line concludes",
}
"""Every rule of :mod:`medllm.exam.answers`, for somebody who looks at an answer."""
UNREAD: Mapping[Reason, str] = {
    "empty": "the text is empty",
    "filtered": "a server held it back",
    "cut_off": "it was cut off before it answered",
    "no_label": "nothing in it says which answer is meant",
    "ambiguous": "it names several answers, or words that could be several",
    "refused": "it says that it cannot answer",
    "too_many": "it names more options than are wanted",
}
"""Every reason why no answer is read."""


def verdict(table: StudyTable, kept: Mapping[str, Equivalence]) -> str:
    """The study's answer in one sentence: did the model that does best with an explanation keep its score when it gave one?

    Args:
        table: The study's.
        kept: For a model, whether its score stayed within the margin.
    """
    rows = [row for row in table.rows if row.stability is not None]
    if not rows or table.stability_settings is None:
        return ""
    explained = table.stability_settings[1]
    best = max(rows, key=lambda row: row.scores[explained].score.value)
    assert best.stability is not None
    said = f"{best.model} {kept_score(best.stability, kept.get(best.model))}"
    if len(rows) == 1:
        return f"{said}."
    ranked = f"does {'best of all' if len(rows) > 2 else 'better of the two'} ({number(best.scores[explained].score.value)})"
    return f"{said}; with an explanation it {ranked}, while {_contrast(rows, best)}."


def kept_score(estimate: Estimate, kept: Equivalence | None) -> str:
    """What explaining first did to a model's score, and how sure that is: ``kept its score within 0.020 …``.

    Args:
        estimate: Score with explanation minus score without.
        kept: Whether it stayed within the margin.
    """
    by = f"{number(estimate.value, True)} {interval(estimate, True)}"
    if kept and kept.holds:
        return f"kept its score within {number(kept.margin)} when it explained itself: {by} ({p_value(kept.p_value)})"
    if not _spans_zero(estimate):
        return f"{'lost' if estimate.value < 0 else 'gained'} score when it explained itself: {by}, beyond chance"
    doubt = _possible_loss(estimate)
    return f"was not seen to lose score when it explained itself: {by}{doubt and f', though {doubt}'}"


def _possible_loss(estimate: Estimate) -> str:
    """What is not excluded, where it is a loss that shows in three digits."""
    return f"a loss of up to {number(-estimate.low)} is not excluded" if round(estimate.low, 3) < 0 else ""


def _contrast(rows: Sequence[Row], best: Row) -> str:
    """The model that explaining cost most, beside the best."""
    other = min((row for row in rows if row is not best), key=lambda row: row.stability.value if row.stability else 0.0)
    assert other.stability is not None
    word = "lost" if other.stability.value < 0 else "gained"
    return f"{other.model} {word} {number(abs(other.stability.value))} {interval(other.stability, True)}"


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
            tests = f"{p_value(change.p_value)}{holm(change.adjusted_p)}"
            amount = f"{number(change.difference.value, True)} {interval(change.difference, True)}, {tests}"
            sentences.append(f"{verdict}: stability changes by {amount}.")
    return sentences


def method(table: StudyTable) -> str:
    """How intervals and p-values were computed."""
    draw = table.draw
    return (
        f"Scores are points earned over points possible. Intervals are {draw.confidence:.0%} {draw.method} bootstrap intervals "
        f"over problems ({draw.resamples} resamples, seed {draw.seed}); differences and stability are paired by problem, and "
        "their two-sided p-values come from the same draws. Where every problem has the same outcome, the interval is the "
        "exact binomial bound. McNemar's exact test counts problems instead of points. Beside each p stands Holm's, which is "
        "corrected for all comparisons of the table. A score counts as kept where two one-sided tests exclude a change "
        "beyond the margin. The p-values say how far the result depends on which problems the exam happened to have, and "
        "nothing about training again with another seed."
    )


def _stability(model: str, estimate: Estimate) -> str:
    bounds = interval(estimate, True)
    if _spans_zero(estimate):
        worst = _possible_loss(estimate) or "no loss was seen"
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
    tests = f"{p_value(comparison.p_value)}{holm(comparison.adjusted_p)}; McNemar {p_value(comparison.mcnemar_p)}"
    counts = f"{comparison.gained} problems gained, {comparison.lost} lost"
    return f"{setting}: {row.model} is {place} {row.previous} {interval(difference, True)}: {verdict} ({tests}; {counts})."


def _spans_zero(estimate: Estimate) -> bool:
    return estimate.low <= 0 <= estimate.high
