"""A design as what there is to do: trainings and sittings, each once, however many rows need it.

Everything about a job is known before anything is done: its settings, its folder, and the jobs whose results it reads. Two
rows that need the same, such as the answers of one model with the same settings, need one job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medllm.ablation.design import Design, Stage, combined, configured, slug
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.run import MERGED, RESULT
from medllm.stage_config import CptConfig, CurateConfig, EvaluateConfig, RpoConfig
from medllm.stages.curate import PREFERENCES

ONLY_EXAM = "exam"
"""What an exam is called that needs no name of its own: it gives none to the folders of its sittings."""


_NO_FOLDER_YET = "-"


@dataclass(frozen=True)
class Training:
    """A training.

    Attributes:
        row: Whose it is.
        config: Of its stage, which it says.
        trained: How the trained model is opened, with its adapters.
        needs: The run folders that must be finished before.
        merges: Whether the adapters are then merged into the weights, for what is done with them.
    """

    row: str
    config: CptConfig | RpoConfig
    trained: ModelConfig
    needs: tuple[Path, ...]
    merges: bool = False

    @property
    def folder(self) -> Path:
        """Its run folder, by which it is told from others."""
        return Path(self.config.run)

    @property
    def runs(self) -> tuple[Path, ...]:
        """The same."""
        return (self.folder,)

    def done(self) -> bool:
        """Whether there is nothing left of it to do."""
        return finished(self.folder) and (not self.merges or (self.folder / MERGED).exists())


@dataclass(frozen=True)
class Sitting:
    """All that one model is asked: it is opened once.

    Attributes:
        row: Whose model it is.
        model: How it is opened.
        needs: The run folders that must be finished before.
        exams: The exams it sits, in each setting.
        curations: The preference data made of its answers.
    """

    row: str
    model: ModelConfig
    needs: tuple[Path, ...]
    exams: tuple[EvaluateConfig, ...] = ()
    curations: tuple[CurateConfig, ...] = ()

    @property
    def runs(self) -> tuple[Path, ...]:
        """Its run folders."""
        return tuple(Path(run) for run in (*(exam.run for exam in self.exams), *(data.run for data in self.curations)))

    @property
    def folder(self) -> Path:
        """The first of its run folders, by which it is told from others."""
        return self.runs[0]

    def done(self) -> bool:
        """Whether there is nothing left of it to do."""
        return all(map(finished, self.runs))


Job = Training | Sitting


@dataclass(frozen=True)
class Sat:
    """Where a row's answers to an exam in a setting are.

    Attributes:
        row: The row.
        exam: The exam.
        explained: Whether it was to explain itself before the answer.
        runs: The run folder of each training; one where the row's model depends on none.
    """

    row: str
    exam: str
    explained: bool
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class Plan:
    """What there is to do, and what the rows come to.

    Attributes:
        jobs: The trainings and sittings, each behind those that it needs.
        sat: By row, exam and setting, in the order of the table.
        trainings: The run folders of each trained row, one for each seed.
    """

    jobs: tuple[Job, ...]
    sat: tuple[Sat, ...]
    trainings: Mapping[str, tuple[Path, ...]]

    def ready(self, job: Job) -> bool:
        """Whether all that a job needs is there."""
        trainings = {one.folder: one for one in self.jobs if isinstance(one, Training)}
        return all(trainings[need].done() if need in trainings else finished(need) for need in job.needs)

    def first_runs(self, exam: str = ONLY_EXAM) -> tuple[Path, ...]:
        """The run folders of every row's first training and of its sitting of one exam, in the order of a report."""
        sat = {one.runs[0] for one in self.sat if one.exam == exam}
        trained = {runs[0] for runs in self.trainings.values()}
        data = {need for job in self.jobs if isinstance(job, Training) and job.folder in trained for need in job.needs}
        return tuple(run for job in self.jobs for run in job.runs if run in sat | trained | data)


def finished(run: Path) -> bool:
    """Whether a stage has ended in this folder."""
    return (run / RESULT).exists()


def plan(design: Design, out: Path) -> Plan:
    """Everything the design asks for, in folders below ``out``.

    Raises:
        UserError: a setting that its stage does not have, or one that does not fit, with the row it is of; or two runs that
            would be kept in the same folder.
    """
    planner = _Planner(design, out)
    seats: dict[tuple[str, str, bool], dict[Path, None]] = {}
    for seed in range(design.seeds):
        for row in design.rows:
            for exam in design.exams:
                for setting in design.settings:
                    explained = setting == "explained"
                    seats.setdefault((row, exam, explained), {})[planner.exam(row, seed, exam, explained)] = None
    sat = tuple(Sat(*key, tuple(runs)) for key, runs in seats.items())
    return Plan(planner.jobs(), sat, planner.trainings_by_row())


@dataclass(frozen=True)
class _Model:
    """A row's model of one seed: on the weights it was trained on, and with its adapter merged into them."""

    trained: ModelConfig
    merged: ModelConfig
    run: Path | None = None


class _Planner:
    """Goes through rows and seeds. What was planned before is found by its settings, the folder aside."""

    def __init__(self, design: Design, out: Path):
        self.design, self.out = design, out
        self.models: dict[tuple[str, int], _Model] = {}
        self.trainings: dict[Path, Training] = {}
        self.sittings: dict[ModelConfig, Sitting] = {}
        self.order: list[Path | ModelConfig] = []
        self.runs: dict[Any, Path] = {}

    def jobs(self) -> tuple[Job, ...]:
        """In the order of the rows, but each behind what it needs."""
        left: list[Job] = [self.trainings[key] if isinstance(key, Path) else self.sittings[key] for key in self.order]
        jobs: list[Job] = []
        ready: set[Path] = set()
        while left:
            job = next(job for job in left if ready.issuperset(job.needs))
            left.remove(job)
            jobs.append(job)
            ready.update(job.runs)
        return tuple(jobs)

    def trainings_by_row(self) -> dict[str, tuple[Path, ...]]:
        """The run folders of each trained row, one for each seed."""
        runs: dict[str, list[Path]] = {}
        for (row, _), model in self.models.items():
            runs.setdefault(row, []).extend([model.run] if model.run else [])
        return {row: tuple(runs[row]) for row in self.design.rows if runs[row]}

    def exam(self, row: str, seed: int, exam: str, explained: bool) -> Path:
        """The run folder in which the row's model sits an exam."""
        where = f"rows.{row}, exams.{exam}"
        named = "" if exam == ONLY_EXAM else f"-{slug(exam)}"
        settings = self.design.stage("evaluate", self.design.exams[exam], where)
        model, needs = self._opened(row, seed)
        given = {"model": asdict(model), "run": _NO_FOLDER_YET, "explanation": explained, "label": row}
        config = configured(EvaluateConfig, settings | given, where)
        if config.method != "generate":
            raise UserError(f"{where}: method is {config.method!r}; an ablation's exams are sat in words (generate)")
        if config.sampling.temperature:
            config = replace(config, sampling=replace(config.sampling, seed=config.sampling.seed + seed))
        run, new = self._run(config, f"evaluate-{slug(row)}{named}{'-explained' if explained else ''}", seed)
        if new:
            sitting = self._sitting(row, model, needs)
            self.sittings[model] = replace(sitting, exams=(*sitting.exams, replace(config, run=str(run))))
        return run

    def _model(self, row: str, seed: int) -> _Model:
        if (row, seed) not in self.models:
            self.models[row, seed] = self._trained(row, seed) if self.design.rows[row].start else self._base(row)
        return self.models[row, seed]

    def _base(self, row: str) -> _Model:
        settings = combined(asdict(self.design.model), self.design.rows[row].model)
        model = configured(ModelConfig, settings, f"rows.{row}.model")
        if model.adapters:
            raise UserError(f"rows.{row}.model: has an adapter; give the folder of weights that it is merged into")
        return _Model(model, model)

    def _trained(self, row: str, seed: int) -> _Model:
        """Plan the row's training of this seed, and the preference data it needs."""
        mine = self.design.rows[row]
        stage: Stage = "cpt" if mine.cpt is not None else "rpo"
        where = f"rows.{row}.{stage}"
        settings = self.design.stage(stage, getattr(mine, stage), where)
        handover = settings.get("handover", "merge") if stage == "rpo" else "merge"
        start = self._model(str(mine.start), seed)
        model, needs = self._merged(start) if handover == "merge" else (start.trained, (start.run,) if start.run else ())
        given: dict[str, Any] = {"model": asdict(model), "run": _NO_FOLDER_YET}
        if stage == "rpo":
            curation = self._curation(row, seed)
            needs = (*needs, curation)
            given["preferences"] = str(curation / PREFERENCES)
        config: CptConfig | RpoConfig
        if stage == "cpt":
            config = configured(CptConfig, settings | given, where)
        else:
            config = configured(RpoConfig, settings | given, where)
        training = replace(config.training, seed=config.training.seed + seed)
        config = replace(config, training=training, lora=replace(config.lora, seed=config.lora.seed + seed))
        run, new = self._run(config, self.design.folder_of(row), seed)
        earlier = model.adapters[:-1] if handover == "continue" else model.adapters
        trained = replace(model, adapter=(*earlier, str(run / "adapter")))
        if new:
            self.trainings[run] = Training(row, replace(config, run=str(run)), trained, needs)
            self.order.append(run)
        return _Model(trained, replace(model, path=str(run / MERGED), adapter=None), run)

    def _curation(self, row: str, seed: int) -> Path:
        """The run folder of a row's preference data."""
        mine, where = self.design.rows[row], f"rows.{row}.curate"
        author = mine.answers_of or str(mine.start)
        settings = self.design.stage("curate", mine.curate, where)
        model, needs = self._opened(author, seed)
        config = configured(CurateConfig, settings | {"model": asdict(model), "run": _NO_FOLDER_YET}, where)
        config = replace(config, sampling=replace(config.sampling, seed=config.sampling.seed + seed))
        run, new = self._run(config, f"curate-{slug(author if mine.curate is None else row)}", seed)
        if new:
            sitting = self._sitting(author, model, needs)
            self.sittings[model] = replace(sitting, curations=(*sitting.curations, replace(config, run=str(run))))
        return run

    def _opened(self, row: str, seed: int) -> tuple[ModelConfig, tuple[Path, ...]]:
        """How the row's model is asked, and what must be finished before."""
        model = self._model(row, seed)
        return self._merged(model) if self.design.opened == "merged" else (model.trained, (model.run,) if model.run else ())

    def _merged(self, model: _Model) -> tuple[ModelConfig, tuple[Path, ...]]:
        """Weights with all adapters merged, which the training then makes."""
        if model.run is None:
            return model.merged, ()
        self.trainings[model.run] = replace(self.trainings[model.run], merges=True)
        return model.merged, (model.run,)

    def _sitting(self, row: str, model: ModelConfig, needs: tuple[Path, ...]) -> Sitting:
        if model not in self.sittings:
            self.order.append(model)
        return self.sittings.setdefault(model, Sitting(row, model, needs))

    def _run(self, config: Any, name: str, seed: int) -> tuple[Path, bool]:
        """The folder of a run with these settings, and whether it is a new one."""
        if config in self.runs:
            return self.runs[config], False
        run = self.out / (f"{name}-seed{seed}" if seed else name)
        if run in self.runs.values():
            raise UserError(f"{run}: two runs with other settings would be kept here; call one of the rows otherwise")
        self.runs[config] = run
        return run, True
