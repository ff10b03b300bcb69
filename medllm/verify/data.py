"""The data of a training, made anew from the files that its settings name, and what must not be in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medllm.config import ProblemLayout
from medllm.corpus.documents import Document, load_documents
from medllm.corpus.leaks.exact import WORD_FOR_WORD, Leak
from medllm.corpus.leaks.search import search
from medllm.corpus.packing import PackedRows, pack, tokenize_documents
from medllm.model.tokenizer import encode, load_tokenizer
from medllm.preferences.records import read_preferences
from medllm.preferences.tokenization import TokenizedPreferences, tokenize_preferences
from medllm.run import RESULT
from medllm.stages.problems import read_problems
from medllm.verify.findings import Finding, held
from medllm.verify.record import Record

DATA = "the data"
LEAKS = "no exam in the data"


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on: packed rows or preferences, and the texts they are made of."""

    rows: PackedRows | None
    preferences: TokenizedPreferences | None
    texts: Sequence[Document]
    counts: Mapping[str, int]


def training_data(record: Record) -> TrainingData:
    """The data anew, by the stage's own rules.

    Raises:
        UserError: it cannot be read, or holds what the stage refuses.
    """
    config = record.config
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    return _cpt_data(config, tokenizer) if record.stage == "cpt" else _rpo_data(config, tokenizer)


def _cpt_data(config: Any, tokenizer: Any) -> TrainingData:
    documents = load_documents(config.corpus).documents
    nothing = len(encode(tokenizer, "")) + 1
    tokens = tokenize_documents(tokenizer, documents)
    kept = [(document, ids) for document, ids in zip(documents, tokens, strict=True) if len(ids) > nothing]
    rows = pack([ids for _, ids in kept], config.corpus.length, tokenizer.pad_token_id, config.corpus.packing).with_targets()
    rows = replace(rows, sources=[document.source for document, _ in kept])
    counts = {"documents": len(kept), "rows": len(rows.tokens), "tokens": int((rows.segment_ids > 0).sum())}
    return TrainingData(rows, None, [document for document, _ in kept], counts)


def _rpo_data(config: Any, tokenizer: Any) -> TrainingData:
    read = read_preferences(config.preferences)
    preferences = tokenize_preferences(tokenizer, read, config.pairs)
    texts = [
        Document(f"{one.prompt}{sample.text}", f"problem {one.problem_id}")
        for one in read
        for sample in (one.ground_truth, *one.chosen, *one.rejected)
    ]
    counts = {"problems": len(read), "pairs": preferences.pairs, "truncated_responses": preferences.truncated}
    return TrainingData(None, preferences, texts, counts)


def check_data(record: Record, data: TrainingData) -> list[Finding]:
    """What the result counts is what the files give."""
    result = record.result
    if result is None:
        return [Finding(DATA, "not checked", RESULT, "the run has not finished")]
    differences = [
        f"{name}: {result.get(name)} were trained on, the files give {count}"
        for name, count in data.counts.items()
        if result.get(name) != count
    ]
    return held(DATA, RESULT, differences, ", ".join(f"{count} {name}" for name, count in data.counts.items()))


def check_leaks(data: TrainingData, exam: Sequence[str]) -> list[Finding]:
    """No document, and no prompt with an answer, holds a problem of ``exam``: word for word, or changed as far as
    :mod:`medllm.corpus.leaks.near` tells it still. A finding says which.

    Raises:
        UserError: a file of the exam cannot be read.
    """
    if not exam:
        return [Finding(LEAKS, "not checked", said="no --exam was given to look for")]
    problems, _ = read_problems(exam, ProblemLayout())
    looked = f"{len(problems)} problems looked for in {len(data.texts)} texts, word for word and changed"
    found = [Finding(LEAKS, "refuted", leak.source, _words(leak)) for leak in search(data.texts, problems)]
    return found or [Finding(LEAKS, "proved", said=looked)]


def _words(leak: Leak) -> str:
    changed = f"a changed copy, its {leak.kind} {leak.overlap:.2f} alike"
    return f"problem {leak.problem_id} of the exam: {f'{leak.overlap:.0%} of it' if leak.kind == WORD_FOR_WORD else changed}"
