"""The published results of arXiv 2504.18080, so that a table of ours can stand beside them.

All scores are of 72B-class models on the real exams; a study on a small model shares their shape, never their height.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2504.18080, tables 1 and 2 (IgakuQA 2018-2022, 2,485 points)"


@dataclass(frozen=True)
class Published:
    """One row of the paper: points earned over points possible, without and with an explanation before the answer.

    Attributes:
        model: The paper's name.
        plain: 3-shot.
        explained: 3-shot with explanation; unpublished for the models of Kasai et al.
        labels: Further names under which a study of ours may run the same recipe.
    """

    model: str
    plain: float
    explained: float | None
    labels: tuple[str, ...] = ()

    @property
    def stability(self) -> float | None:
        """Score with explanation minus score without."""
        return None if self.explained is None else self.explained - self.plain


ABLATION = (
    Published("Qwen2.5-72B", 0.802, 0.710, ("base",)),
    Published("CPT", 0.867, 0.834, ("base + CPT", "Qwen2.5-72B + CPT")),
    Published("RPO without CPT", 0.838, 0.807, ("RPO", "base + RPO", "Qwen2.5-72B + RPO")),
    Published("CPT + DPO", 0.868, 0.848, ("base + CPT + DPO", "Qwen2.5-72B + CPT + DPO")),
    Published(
        "Preferred-MedLLM-Qwen-72B (CPT+RPO)", 0.868, 0.868, ("CPT + RPO", "base + CPT + RPO", "Preferred-MedLLM-Qwen-72B")
    ),
)

OTHERS = (
    Published("Qwen2.5-72B-Instruct", 0.802, 0.822),
    Published("GPT-4o", 0.866, 0.881),
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


def _plain(label: str) -> str:
    return "".join(character for character in label.lower() if character not in " _-+")
