"""The published results of arXiv 2504.18080, so that a table of ours can stand beside them.

All scores are of 72B-class models on the real exams; a study on a small model shares their shape, never their height. How a row
is run is a preset (``medllm/presets/tables.yaml``).
"""

from __future__ import annotations

from dataclasses import dataclass

from medllm.exam.setting import explained, setting_name

SOURCE = "arXiv 2504.18080, tables 1 and 2 (IgakuQA 2018-2022, 2,485 points)"
SETS_SOURCE = "arXiv 2504.18080, table 3 (zero-shot accuracy on Japanese sets)"
SETS = ("MMMLU", "MedQA", "MedMCQA", "PubMedQA")
"""The sets of table 3, in its order; MMMLU is of five medical subjects."""
YEARS = (2018, 2019, 2020, 2021, 2022)
PLAIN = setting_name(3, explanation=False)
EXPLAINED = explained(PLAIN)


@dataclass(frozen=True)
class Published:
    """One row of the paper: points earned over points possible, without and with an explanation before the answer.

    Attributes:
        model: The paper's name.
        plain: 3-shot.
        explained: 3-shot with explanation; unpublished for the models of Kasai et al.
        labels: Further names under which a study of ours may run the same recipe.
        sets: Zero-shot accuracy on each of :data:`SETS`; empty where table 3 has no such row.
        years: Points of each of :data:`YEARS`, 3-shot; empty where they are not published.
    """

    model: str
    plain: float
    explained: float | None
    labels: tuple[str, ...] = ()
    sets: tuple[float, ...] = ()
    years: tuple[int, ...] = ()

    @property
    def stability(self) -> float | None:
        """Score with explanation minus score without."""
        return None if self.explained is None else self.explained - self.plain

    def points(self, year: str) -> int | None:
        """Points of one exam year, 3-shot; None where they are not published."""
        return dict(zip(map(str, YEARS), self.years, strict=False)).get(year)

    def value(self, setting: str, problem_set: str | None = None) -> float | None:
        """The figure that a run of ours stands beside: of a zero-shot set, or of the exam; None where the paper has none."""
        if problem_set is not None:
            zero_shot = setting.startswith(setting_name(0, explanation=False)) and problem_set in SETS and self.sets
            return self.sets[SETS.index(problem_set)] if zero_shot else None
        return {PLAIN: self.plain, EXPLAINED: self.explained}.get(setting)


ABLATION = (
    Published("Qwen2.5-72B", 0.802, 0.710, ("base",), (0.797, 0.652, 0.591, 0.779), (412, 394, 394, 393, 399)),
    Published("CPT", 0.867, 0.834, ("base + CPT", "Qwen2.5-72B + CPT"), (0.799, 0.669, 0.598, 0.775)),
    Published("RPO without CPT", 0.838, 0.807, ("RPO", "base + RPO", "Qwen2.5-72B + RPO")),
    Published("CPT + DPO", 0.868, 0.848, ("base + CPT + DPO", "Qwen2.5-72B + CPT + DPO")),
    Published(
        "Preferred-MedLLM-Qwen-72B (CPT+RPO)",
        0.868,
        0.868,
        ("CPT + RPO", "base + CPT + RPO", "Preferred-MedLLM-Qwen-72B"),
        (0.800, 0.684, 0.602, 0.779),
        (434, 420, 439, 430, 433),
    ),
)

OTHERS = (
    Published("Qwen2.5-72B-Instruct", 0.802, 0.822, (), (0.795, 0.626, 0.601, 0.714)),
    Published("GPT-4o", 0.866, 0.881, (), (), (427, 431, 433, 427, 434)),
    Published("GPT-4 Turbo", 0.812, 0.814),
    Published("GPT-4o mini", 0.751, 0.759),
    Published("Llama3-Preferred-MedSwallow-70B", 0.795, 0.744),
    Published("Llama-3.3-Swallow-70B-v0.4", 0.787, 0.755),
    Published("Llama-3-Swallow-70B-v0.1", 0.701, 0.637),
    Published("sarashina2-70b", 0.561, 0.549),
    Published("GPT-4", 0.782, None),
    Published("GPT-3.5", 0.550, None),
)

IGAKUQA = ABLATION + OTHERS


def published(label: str) -> Published | None:
    """The paper's row for a model of ours called ``label``; upper case, spaces and ``_ - +`` do not count."""
    wanted = _plain(label)
    return next((row for row in IGAKUQA if wanted in map(_plain, (row.model, *row.labels))), None)


def published_value(label: str, setting: str, problem_set: str | None = None) -> float | None:
    """The paper's figure beside a run of ours; None where it has none."""
    row = published(label)
    return row.value(setting, problem_set) if row else None


def _plain(label: str) -> str:
    return "".join(character for character in label.lower() if character not in " _-+")
