"""The tokens of a document of continued pretraining, as TRL's SFTTrainer makes them of a text column."""

from __future__ import annotations

from types import SimpleNamespace

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from medllm.corpus.documents import Document
from medllm.corpus.packing import tokenize_documents
from parity_tests.preference_cases import letters

TEXTS = ["fever", "", "no cold! a", "two\nlines: Ab", "!"]


def test_documents_hold_trls_tokens_with_the_end_of_text_token_after_each(tmp_path):
    tokenizer = letters()
    settings = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    rows = Dataset.from_dict({"text": TEXTS})
    theirs = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, settings, False, None, "train")["input_ids"]
    ours = tokenize_documents(tokenizer, [Document(text, "memory") for text in TEXTS])
    assert [tokens.tolist() for tokens in ours] == list(theirs)
