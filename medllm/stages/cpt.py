"""Stage 1, continued pretraining: documents to an adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from medllm.corpus.documents import load_documents
from medllm.corpus.packing import check_rows, pack, tokenize_documents
from medllm.engines import EngineName, open_trainer
from medllm.host.progress import progress_bar
from medllm.run import Run
from medllm.serving.taught import taught_by_rows
from medllm.stage_config import CptConfig


def run_cpt(config: CptConfig, engine: EngineName = "jax") -> dict[str, Any]:
    """Stage 1, continued pretraining: documents → packed rows → a PEFT adapter in the run folder.

    Raises:
        UserError: the model, tokenizer, documents or run folder cannot be used.
    """
    model = open_trainer(engine, config.model, config)  # several processes meet here, before each reads the corpus
    corpus = load_documents(config.corpus)
    with progress_bar("tokens") as progress:
        tokens = tokenize_documents(model.tokenizer, corpus.documents, progress)
    rows = pack(tokens, config.corpus.length, model.tokenizer.pad_token_id, config.corpus.packing)
    check_rows(rows, model.context)
    with Run(config.run, config, engine=engine, resume=config.resume) as run:
        summary = model.train_cpt(rows, config, run)
        result = {
            "stage": "cpt",
            "engine": engine,
            **asdict(summary),
            "documents": len(corpus.documents),
            "skipped": dict(corpus.skipped),
            "tokens": int((rows.segment_ids > 0).sum()),
            "rows": len(rows.tokens),
            "padding": rows.padding,
            "taught": asdict(taught_by_rows(model.tokenizer, rows, (document.text for document in corpus.documents))),
        }
        run.finish(result)
    return result
