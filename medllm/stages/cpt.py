"""Stage 1, continued pretraining: documents to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from medllm.corpus.documents import load_documents
from medllm.corpus.leaks.guard import refuse_leaks
from medllm.corpus.packing import check_rows, pack, tokenize_documents
from medllm.engines import TrainerName, open_trainer
from medllm.host.processes import is_primary_process
from medllm.host.progress import progress_bar
from medllm.model.adapter import check_trained
from medllm.model.tokenizer import control_tokens, encode
from medllm.run import Run
from medllm.serving.taught import Taught, taught_by_rows
from medllm.shortage import advising
from medllm.stage_config import CptConfig
from medllm.trackers import require_tracker
from medllm.training import TrainSummary


@dataclass(frozen=True)
class CptResult:
    """What stage 1 did.

    Attributes:
        engine: Which engine did the work.
        summary: Of the training.
        documents: Documents that were trained on.
        skipped: Those that were skipped, by reason.
        control_tokens: Special tokens that are written out in them.
        tokens: Tokens in the rows, padding not counted.
        rows: Rows they make.
        padding: Share of the rows' positions that hold padding.
        taught: What of a serving contract was trained on.
    """

    engine: str
    summary: TrainSummary
    documents: int
    skipped: Mapping[str, int]
    control_tokens: Mapping[str, int]
    tokens: int
    rows: int
    padding: float
    taught: Taught

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        plain = asdict(self)
        return {"stage": "cpt", "engine": plain.pop("engine"), **plain.pop("summary"), **plain, "taught": self.taught.to_json()}


def run_cpt(config: CptConfig, engine: TrainerName = "jax") -> CptResult:
    """Stage 1, continued pretraining: documents → packed rows → a PEFT adapter in the run folder.

    Raises:
        UserError: the model, tokenizer, documents or run folder cannot be used, or the documents hold what is held out.
    """
    require_tracker(config.tracker)
    model = open_trainer(engine, config.model, config)  # several processes meet here, before each reads the corpus
    corpus = load_documents(config.corpus)
    refuse_leaks(corpus.documents, (*config.corpus.documents, *config.corpus.problems), config.held_out)
    with progress_bar("tokens") as progress:
        tokens = tokenize_documents(model.tokenizer, corpus.documents, progress)
    nothing = len(encode(model.tokenizer, "")) + 1  # what begins a text, and its end
    kept = [(document, ids) for document, ids in zip(corpus.documents, tokens, strict=True) if len(ids) > nothing]
    without = len(tokens) - len(kept)
    ids = [ids for _, ids in kept]
    rows = pack(ids, config.corpus.length, model.tokenizer.pad_token_id, config.corpus.packing).with_targets()
    rows = replace(rows, sources=[document.source for document, _ in kept])
    check_rows(rows, model.context)
    with advising(config, engine), Run(config.run, config, engine=engine, resume=config.resume) as run:
        summary = model.train_cpt(rows, config, run)
        result = CptResult(
            engine=engine,
            summary=summary,
            documents=len(kept),
            skipped={**corpus.skipped, **({"text of no token": without} if without else {})},
            control_tokens=control_tokens(model.tokenizer, (document.text for document, _ in kept)),
            tokens=int((rows.segment_ids > 0).sum()),
            rows=len(rows.tokens),
            padding=rows.padding,
            taught=taught_by_rows(model.tokenizer, rows, (document.text for document, _ in kept)),
        )
        if is_primary_process():
            check_trained(summary.adapter)
        run.finish(result.to_json())
    return result
