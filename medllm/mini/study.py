"""``medllm mini``: the paper's experiment on the embedded world, from the base model to the table.

    base ──CPT──► CPT ──curate──► preferences ──RPO──► CPT+RPO          base ──curate──► preferences ──RPO──► RPO alone
                                              └─DPO──► CPT+DPO

Every stage leaves its own run folder; nothing is measured but what the engine's models answer to the exams of 2018–2022.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medllm.config import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PairConfig,
    PreferenceLoss,
    Sampling,
    TrainingConfig,
)
from medllm.engine import Generates
from medllm.engines import TrainerName, open_engine
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.exam.problem import Problem
from medllm.host.processes import unannounced
from medllm.mini.diet import ANSWER_AS, cpt_documents, explained_problems
from medllm.mini.problems import exam_problems, shot_problems, train_problems
from medllm.mini.world import make_world
from medllm.model.adapter import merge_adapter
from medllm.presets import preset_file
from medllm.quantization import Quantization
from medllm.run import RESULT, Run, atomic_path
from medllm.stage_config import CorpusConfig, CptConfig, CurateConfig, EvaluateConfig, RpoConfig
from medllm.stages.cpt import run_cpt
from medllm.stages.curate import PREFERENCES, build_preferences
from medllm.stages.evaluate import sit_exam
from medllm.stages.rpo import run_rpo
from medllm.text_files import read_json_object
from medllm.training import TrainSummary

BASE = Path(__file__).parent / "data" / "base"
SHOTS = 3
PREVIOUS = {"CPT": "base", "CPT+DPO": "CPT", "CPT+RPO": "CPT", "RPO alone": "base"}
"""The model each one is trained from, in the order of the paper's table (behind ``base``)."""

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class Sitting:
    """One model's exam in one setting."""

    model: str
    setting: str
    points: int
    possible: int
    run: Path


@dataclass(frozen=True)
class StudyResult:
    """What the study found.

    Attributes:
        sittings: Five models in two settings, in the order of the paper's table.
        runs: Every stage's run folder, in the order of a report.
        training: Summary of each trained model, by model.
        problems: The exams of 2018–2022.
        seconds: All of it.
    """

    sittings: tuple[Sitting, ...]
    runs: tuple[Path, ...]
    training: Mapping[str, TrainSummary]
    problems: tuple[Problem, ...]
    seconds: float

    def scores(self) -> dict[str, dict[str, float]]:
        """Points earned over points possible, by model and setting."""
        table: dict[str, dict[str, float]] = {}
        for sitting in self.sittings:
            table.setdefault(sitting.model, {})[sitting.setting] = sitting.points / sitting.possible
        return table


def load_preset(preset: str) -> StudyConfig:
    """The settings in the preset of that name, or in a YAML file of one's own.

    Raises:
        UserError: no such preset or file, or a setting that does not fit.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    file = preset_file("--preset", preset, "mini*")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyConfig)
    try:
        values = parser.instantiate(parser.parse_path(str(file)))
    except ArgumentError as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    return StudyConfig(**{item.name: values[item.name] for item in dataclasses.fields(StudyConfig)})


def run_study(engine_name: TrainerName, out_dir: str | Path, preset: str | StudyConfig, progress: Say = print) -> StudyResult:
    """Run all stages into folders below ``out_dir``; of a study that was begun there, those that are not finished.

    Args:
        engine_name: ``jax`` or ``torch``.
        out_dir: A folder that is not there yet, is empty, or holds an unfinished study with these settings.
        preset: Name of a preset, a YAML file, or the settings themselves.
        progress: Told one line as each stage begins and ends.

    Raises:
        UserError: the folder is in use, its study is finished or was begun with other settings, or the preset or an engine's
            input cannot be used.
    """
    config = load_preset(preset) if isinstance(preset, str) else preset
    out = Path(out_dir)
    if (out / RESULT).exists():
        raise UserError(f"{out}: holds a finished study; give another folder (--out), or remove it")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.yaml").exists())):
        raise UserError(f"{out}: is in use; give another folder for the study (--out), or remove it")
    with unannounced(), Run(out, config, engine=engine_name, resume="auto"):
        return _Study(engine_name, out, config, progress).run()


class _Study:
    """The stages, one method each; what they share are the files of the world."""

    def __init__(self, engine_name: TrainerName, out: Path, config: StudyConfig, progress: Say):
        self.engine_name = engine_name
        self.out = out
        self.config = config
        self.say = progress
        self.sittings: dict[str, list[Sitting]] = {}
        self.runs: list[Path] = []
        self.training: dict[str, TrainSummary] = {}
        world = make_world()
        limit = config.problems_limit or None
        self.shots = shot_problems(world, SHOTS)
        self.train = train_problems(world, config.train_per_year)[:limit]
        self.exam = exam_problems(world, config.exam_per_year)[:limit]
        count = min(config.explained_in_corpus, len(self.train))
        explained = random.Random(f"corpus/{world.config.seed}").sample(self.train, count)
        documents = cpt_documents(world, config.documents_per_new, config.documents_per_known)
        self.corpus = [*documents, *explained_problems(explained)]

    def run(self) -> StudyResult:
        began = time.monotonic()
        self._write_world()
        base = ModelConfig(str(BASE), quantization=self.config.quantization, dtype=self.config.dtype)
        base_preferences = self._measure("base", base, curate_as="curate-base")
        cpt = self._cpt(base)
        preferences = self._measure("CPT", cpt, curate_as="curate-cpt")
        for label, name, start, data, alpha in (
            ("CPT+DPO", "dpo", cpt, preferences, 0.0),
            ("CPT+RPO", "rpo", cpt, preferences, self.config.loss.alpha),
            ("RPO alone", "rpo-alone", base, base_preferences, self.config.loss.alpha),
        ):
            self._measure(label, self._preference(label, name, start, data, alpha))
        sittings = tuple(sitting for label in ("base", *PREVIOUS) for sitting in self.sittings[label])
        return StudyResult(sittings, tuple(self.runs), self.training, tuple(self.exam), time.monotonic() - began)

    def _write_world(self) -> None:
        (self.out / "world").mkdir(exist_ok=True)
        write_problems(self._shots_file, self.shots)
        write_problems(self._train_file, self.train)
        write_problems(self._exam_file, self.exam)
        with atomic_path(self._corpus_file) as scratch:
            scratch.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in self.corpus), "utf-8")

    @property
    def _shots_file(self) -> Path:
        return self.out / "world" / "shots.jsonl"

    @property
    def _train_file(self) -> Path:
        return self.out / "world" / "train.jsonl"

    @property
    def _exam_file(self) -> Path:
        return self.out / "world" / "exam.jsonl"

    @property
    def _corpus_file(self) -> Path:
        return self.out / "world" / "corpus.jsonl"

    def _cpt(self, base: ModelConfig) -> ModelConfig:
        folder, stage = self.out / "cpt", self.config.cpt
        if summary := _summary(folder):
            return self._trained("CPT", base, folder, summary)
        self.say(f"CPT: {len(self.corpus)} documents")
        corpus = CorpusConfig(documents=(str(self._corpus_file),), length=self.config.row_length)
        config = CptConfig(base, str(folder), corpus, lora=stage.lora, optimizer=stage.optimizer, training=stage.training)
        return self._trained("CPT", base, folder, run_cpt(config, self.engine_name).summary)

    def _preference(self, label: str, name: str, start: ModelConfig, preferences: Path, alpha: float) -> ModelConfig:
        folder, stage = self.out / name, self.config.preference
        if summary := _summary(folder):
            return self._trained(label, start, folder, summary)
        self.say(f"{label}: preference training, alpha {alpha:g}")
        loss = dataclasses.replace(self.config.loss, alpha=alpha)
        config = RpoConfig(
            start,
            str(folder),
            str(preferences),
            loss=loss,
            pairs=self.config.pairs,
            lora=stage.lora,
            optimizer=stage.optimizer,
            training=stage.training,
        )
        return self._trained(label, start, folder, run_rpo(config, self.engine_name).summary)

    def _trained(self, label: str, start: ModelConfig, folder: Path, summary: TrainSummary) -> ModelConfig:
        """The model after training: the adapter merged into the weights it was trained on."""
        self.training[label] = summary
        self.runs.append(folder)
        self.say(f"{label}: {summary.steps} steps in {summary.seconds:.0f} s, loss {summary.loss:.3f}")
        if not (folder / "merged").exists():  # it is there whole, or not at all
            merge_adapter(start.path, folder / "adapter", folder / "merged")
        return dataclasses.replace(start, path=str(folder / "merged"))

    def _measure(self, label: str, model: ModelConfig, curate_as: str | None = None) -> Path:
        """Both settings of the exam, and the preference data where asked for; the model is opened once."""
        engine = open_engine(self.engine_name, model)
        self.sittings[label] = [self._sit(label, engine, model, explanation) for explanation in (False, True)]
        return self._curate(engine, model, curate_as) if curate_as else Path()

    def _sit(self, label: str, engine: Generates, model: ModelConfig, explanation: bool) -> Sitting:
        slug = label.lower().replace("+", "-").replace(" ", "-")
        folder = self.out / f"evaluate-{slug}{'-explained' if explanation else ''}"
        config = EvaluateConfig(
            model,
            str(folder),
            (str(self._exam_file),),
            str(self._shots_file),
            SHOTS,
            explanation,
            template="curation",
            answer_as=ANSWER_AS,
            sampling=Sampling(max_new_tokens=self.config.max_new_tokens),
            batch_size=self.config.batch_size,
            label=label,
        )
        result = _finished(folder) or sit_exam(engine, self.exam, self.shots, config).to_json()
        self.runs.append(folder)
        setting, points, possible = result["setting"], result["score"]["points"], result["score"]["possible"]
        self.say(f"{label}, {setting}: {points} of {possible} points ({points / possible:.3f})")
        return Sitting(label, setting, points, possible, folder)

    def _curate(self, engine: Generates, model: ModelConfig, name: str) -> Path:
        folder = self.out / name
        config = CurateConfig(
            model,
            str(folder),
            (str(self._train_file),),
            str(self._shots_file),
            SHOTS,
            sampling=self.config.sampling,
            answer_as=ANSWER_AS,
            batch_size=self.config.batch_size,
        )
        if not _finished(folder):
            self.say(f"{name}: {len(self.train)} problems, {self.config.sampling.samples} samples each")
            build_preferences(engine, self.train, self.shots, config)
        self.runs.append(folder)
        return folder / PREFERENCES


def _finished(folder: Path) -> dict[str, Any] | None:
    """What a stage that is finished says; None of one that is not."""
    return read_json_object(folder / RESULT, "a stage of the study") if (folder / RESULT).exists() else None


def _summary(folder: Path) -> TrainSummary | None:
    """That of a training that is finished; None of one that is not."""
    if (result := _finished(folder)) is None:
        return None
    return TrainSummary(**{item.name: result[item.name] for item in dataclasses.fields(TrainSummary)})
