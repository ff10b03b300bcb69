"""``medllm mini``: the paper's experiment on the embedded world, from the base model to the table.

    base ──CPT──► CPT ──curate──► preferences ──RPO──► CPT+RPO          base ──curate──► preferences ──RPO──► RPO alone
                                              └─DPO──► CPT+DPO

Every stage leaves its own run folder; nothing is measured but what the engine's models answer to the exams of 2018–2022.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from medllm.ablation.design import Design, RowDesign, configured
from medllm.ablation.jobs import ONLY_EXAM, Plan, plan
from medllm.ablation.study import await_file, study_folder
from medllm.ablation.work import carry_out
from medllm.config import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PairConfig,
    PreferenceLoss,
    Sampling,
    TrainingConfig,
)
from medllm.engines import TrainerName
from medllm.exam.loaders import write_problems
from medllm.host.progress import Say
from medllm.mini.diet import ANSWER_AS, cpt_documents, explained_problems
from medllm.mini.problems import dev_problems, exam_problems, shot_problems, train_problems
from medllm.mini.world import make_world
from medllm.presets import preset_file
from medllm.quantization import Quantization
from medllm.run import RESULT, atomic_path
from medllm.text_files import read_json_object, read_yaml
from medllm.training import TrainSummary

BASE = Path(__file__).parent / "data" / "base"
SHOTS = 3
DEV_PER_KIND = 100
WORLD = "world"
SHOTS_FILE, TRAIN_FILE, DEV_FILE, EXAM_FILE, CORPUS_FILE = (
    "shots.jsonl",
    "train.jsonl",
    "dev.jsonl",
    "exam.jsonl",
    "corpus.jsonl",
)
ROWS = {
    "base": RowDesign(),
    "CPT": RowDesign(start="base", cpt={}),
    "CPT+DPO": RowDesign(start="CPT", rpo={"loss": {"alpha": 0.0}}, folder="dpo"),
    "CPT+RPO": RowDesign(start="CPT", rpo={}, against=("CPT+DPO",), folder="rpo"),
    "RPO alone": RowDesign(start="base", rpo={}),
}
"""The rows of the paper's table, in its order, and how each comes about."""

PREVIOUS = {name: row.start for name, row in ROWS.items() if row.start is not None}
"""The model each one is trained from."""

LEAKED = {"exact": 0.95, "near": 0.9}
"""How much of a problem of the exam is a leak. Its questions are templates that training texts fill with other diseases, so
that most of a problem stands there as it should."""


@dataclass(frozen=True)
class Stage:
    """How one training stage is run."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class StudyConfig:
    """Sizes and settings of the embedded study.

    Args:
        train_per_year: Problems in each exam of 2006–2017.
        exam_per_year: Problems in each exam of 2018–2022.
        documents_per_new: Documents of the CPT corpus about each disease that is new to the base.
        documents_per_known: The same about each disease the base knows, so that new facts do not displace old ones.
        explained_in_corpus: How many of the problems up to 2017 join the CPT corpus, with verified explanations.
        row_length: Tokens in a row of the CPT corpus.
        cpt: Continued pretraining.
        sampling: How the preference data is sampled.
        loss: RPO's loss; DPO is the same with alpha 0.
        pairs: Which pairs of the hierarchy are trained on.
        preference: RPO and DPO training.
        max_new_tokens: Longest answer in an exam.
        batch_size: Continuations generated at a time.
        quantization: Storage of the frozen weights.
        dtype: Type of the computation.
        problems_limit: Use only so many problems of the training exams and of the held-out ones (0: all).
        seeds: Trainings of each model.
        sit: What the models sit: the exams of 2018–2022, or ``dev``, problems of up to 2017 that none learns from, on which
            settings are chosen.
    """

    train_per_year: int
    exam_per_year: int
    documents_per_new: int
    documents_per_known: int
    explained_in_corpus: int
    row_length: int
    cpt: Stage
    sampling: Sampling
    loss: PreferenceLoss
    pairs: PairConfig
    preference: Stage
    max_new_tokens: int = 64
    batch_size: int = 32
    quantization: Quantization = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    problems_limit: int = 0
    seeds: int = 1
    sit: Literal["exam", "dev"] = "exam"


@dataclass(frozen=True)
class StudyResult:
    """What the study found.

    Attributes:
        plan: The stages, and where each model's answers are.
        training: Summary of each trained model's first training, by model.
        seconds: All of it.
    """

    plan: Plan
    training: Mapping[str, TrainSummary]
    seconds: float

    @property
    def runs(self) -> tuple[Path, ...]:
        """The run folders of the first training of each model, in the order of a report."""
        return self.plan.first_runs()

    def scores(self) -> dict[str, dict[str, float]]:
        """Points earned over points possible, by model and setting, of the first training."""
        table: dict[str, dict[str, float]] = {}
        for sat in self.plan.sat:
            result = read_json_object(sat.runs[0] / RESULT, "a stage of the study")
            table.setdefault(sat.row, {})[result["setting"]] = result["score"]["points"] / result["score"]["possible"]
        return table


def load_preset(preset: str) -> StudyConfig:
    """The settings in the preset of that name, or in a YAML file of one's own.

    Raises:
        UserError: no such preset or file, or a setting that does not fit.
    """
    file = preset_file("--preset", preset, "mini*")
    return configured(StudyConfig, read_yaml(file), str(file))


def run_study(engine: TrainerName, out_dir: str | Path, preset: str | StudyConfig, progress: Say = print) -> StudyResult:
    """Run all stages into folders below ``out_dir``; of a study that was begun there, those that are not finished.

    Args:
        engine: ``jax`` or ``torch``.
        out_dir: A folder that is not there yet, is empty, or holds an unfinished study with these settings.
        preset: Name of a preset, a YAML file, or the settings themselves.
        progress: Told one line as each stage begins and ends.

    Raises:
        UserError: the folder is in use, its study is finished or was begun with other settings, or the preset or an engine's
            input cannot be used.
    """
    config = load_preset(preset) if isinstance(preset, str) else preset
    out, began = Path(out_dir), time.monotonic()
    whole = study_of(config, engine, out, progress)[1]
    training = {row: _summary(runs[0]) for row, runs in whole.trainings.items()}
    return StudyResult(whole, training, time.monotonic() - began)


def study_of(config: StudyConfig, engine: TrainerName, out: Path, say: Say, *, join: bool = False) -> tuple[Design, Plan]:
    """Carry out the study of these settings in folders below ``out``: what it compares, and where the answers are.

    Raises:
        UserError: as for :func:`medllm.ablation.study.study_folder`, or an engine's input cannot be used.
    """
    design = study_design(config, out / WORLD)
    whole = plan(design, out)
    with study_folder(out, config, engine, seeds=config.seeds, join=join):
        if join:
            await_file(out / WORLD / CORPUS_FILE)  # the last that is written
        else:
            write_world(out / WORLD, config)
        carry_out(whole, engine, out, say)
    return design, whole


def write_world(folder: Path, config: StudyConfig) -> None:
    """The files that the stages read: examples, problems to train on, the exam, and the corpus of continued pretraining."""
    world = make_world()
    limit = config.problems_limit or None
    train = train_problems(world, config.train_per_year)[:limit]
    explained = random.Random(f"corpus/{world.config.seed}").sample(train, min(config.explained_in_corpus, len(train)))
    documents = cpt_documents(world, config.documents_per_new, config.documents_per_known)
    folder.mkdir(exist_ok=True)
    write_problems(folder / SHOTS_FILE, shot_problems(world, SHOTS))
    write_problems(folder / TRAIN_FILE, train)
    write_problems(folder / DEV_FILE, dev_problems(world, train, DEV_PER_KIND)[:limit])
    write_problems(folder / EXAM_FILE, exam_problems(world, config.exam_per_year)[:limit])
    with atomic_path(folder / CORPUS_FILE) as scratch:
        corpus = [*documents, *explained_problems(explained)]
        scratch.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in corpus), "utf-8")


def study_design(config: StudyConfig, world: Path) -> Design:
    """The paper's five rows, on the files of the world in this folder."""
    asked = {"shots": str(world / SHOTS_FILE), "shot_count": SHOTS, "answer_as": ANSWER_AS, "batch_size": config.batch_size}
    held_out = {"held_out": {"problems": [str(world / EXAM_FILE)], **LEAKED}}
    return Design(
        model=ModelConfig(str(BASE), quantization=config.quantization, dtype=config.dtype),
        seeds=config.seeds,
        cpt={
            "corpus": {"documents": [str(world / CORPUS_FILE)], "length": config.row_length},
            **asdict(config.cpt),
            **held_out,
        },
        curate={"problems": [str(world / TRAIN_FILE)], "sampling": asdict(config.sampling), **asked, **held_out},
        rpo={"loss": asdict(config.loss), "pairs": asdict(config.pairs), **asdict(config.preference), **held_out},
        evaluate={"template": "curation", "sampling": {"max_new_tokens": config.max_new_tokens}, **asked},
        exams={ONLY_EXAM: {"problems": [str(world / (EXAM_FILE if config.sit == "exam" else DEV_FILE))]}},
        rows=ROWS,
    )


def _summary(run: Path) -> TrainSummary:
    result = read_json_object(run / RESULT, "a stage of the study")
    return TrainSummary(**{item.name: result[item.name] for item in fields(TrainSummary)})
