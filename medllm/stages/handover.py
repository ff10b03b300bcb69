"""What becomes of stage 1's adapter in stage 2: ``merge``, ``stack`` or ``continue`` (:class:`medllm.stage_config.RpoConfig`).

With the base W, as Q(W) where it is quantized, the adapter's update U = s·BA and the new adapter N:

    ========  =====================  ================================  ===================
    handover  what is frozen         what is trained                   the reference
    ========  =====================  ================================  ===================
    merge     Q(W + U)               N, fresh                          Q(W + U)
    stack     Q(W) and U             N, fresh                          Q(W) + U
    continue  Q(W)                   U itself                          Q(W) + a copy of U
    ========  =====================  ================================  ===================

``W + U`` is computed in fp32 from the unquantized base and rounded once to its stored type.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm.config import LoraConfig, ModelConfig, PreferenceRecipe
from medllm.corpus.documents import load_documents
from medllm.corpus.packing import PackedRows, pack, tokenize_documents
from medllm.engines import load, require_engine
from medllm.errors import UserError
from medllm.forecast import check_room
from medllm.host.processes import is_primary_process
from medllm.host.progress import Progress
from medllm.model.adapter import Adapter, merge_adapter, open_adapters, read_adapter, refuse_packed
from medllm.model.directory import ModelDirectory
from medllm.model.tokenizer import load_tokenizer
from medllm.quantization import Quantization
from medllm.run import MERGED, Run
from medllm.stage_config import CorpusConfig, RpoConfig

_HELD_ROW = 512


@dataclass(frozen=True)
class HandoverCosts:
    """What each hand-over costs.

    Attributes:
        quantization: How stage 2 stores the frozen weights.
        held_tokens: Tokens of the text that was measured on.
        handovers: A row for each: ``handover``, ``weight_error`` over all adapted weights, ``worst_weight`` and
            ``worst_weight_error`` (all relative), and ``kl``, nats a token.
    """

    quantization: Quantization
    held_tokens: int
    handovers: Sequence[Mapping[str, Any]]


def check_handover(config: RpoConfig) -> None:
    """Refuse what cannot be handed over, before anything is written or gigabytes are read.

    Raises:
        UserError: an adapter does not fit the model, the model is stored in 4 bits and the adapter is to be merged, or the
            adapter that is trained further has other settings than are asked for.
    """
    base = ModelDirectory(config.model.path)
    if not open_adapters(config.model.adapters, base):
        return
    if config.handover == "merge":
        refuse_packed(base)
    else:
        continued_adapter(config.model, config)


def merges(model: ModelConfig, recipe: PreferenceRecipe) -> bool:
    """Whether training runs on merged weights rather than on ``model`` itself."""
    return bool(model.adapters) and recipe.handover == "merge"


def merged_weights(config: RpoConfig, run: Run) -> str:
    """The folder in ``run``'s with the weights of ``config.model`` and its adapters merged.

    One process of several writes them, the others wait for them. A resumed run finds them there.

    Raises:
        UserError: there is no room for them, or as for :func:`medllm.model.adapter.merge_adapter`.
    """
    folder = run.path / MERGED
    if is_primary_process() and not folder.exists():
        stored = sum(file.stat().st_size for file in Path(config.model.path).glob("*.safetensors"))
        check_room(run.path, stored, "the merged weights")
        merge_adapter(config.model.path, config.model.adapters, folder)
    while not folder.exists():  # it appears when it is complete; a launcher ends all processes where the writer fails
        time.sleep(1)
    return str(folder)


def continued_adapter(model: ModelConfig, recipe: PreferenceRecipe) -> Adapter | None:
    """The adapter of ``model`` that is trained further; None where a fresh one is.

    Raises:
        UserError: the adapter is to be merged (:func:`merged_weights` does that before training begins), or ``recipe.lora`` is
            neither left alone nor the adapter's own.
    """
    if not model.adapters:
        return None
    if merges(model, recipe):
        raise UserError(
            "handover merge: medllm.stages.rpo.run_rpo merges the adapter before it trains; call it, or set the handover to "
            "stack or continue"
        )
    if recipe.handover == "stack":
        return None
    adapter = read_adapter(model.adapters[-1])
    own = dataclasses.replace(adapter.lora, seed=recipe.lora.seed)
    for field in dataclasses.fields(LoraConfig):
        asked, default = getattr(recipe.lora, field.name), getattr(LoraConfig(seed=recipe.lora.seed), field.name)
        if asked not in (default, getattr(own, field.name)):
            raise UserError(
                f"lora.{field.name} is {asked}, but handover continue trains {adapter.path} further, which has "
                f"{getattr(own, field.name)}; leave --lora.{field.name} out, or use --handover stack"
            )
    return adapter


def opened_as(config: RpoConfig, run: Path, adapter: str) -> ModelConfig:
    """How the trained model is opened: its weights and its adapters, in order."""
    if merges(config.model, config):
        return dataclasses.replace(config.model, path=str(run / MERGED), adapter=adapter)
    earlier = config.model.adapters[:-1] if config.handover == "continue" else config.model.adapters
    return dataclasses.replace(config.model, adapter=(*earlier, adapter) if earlier else adapter)


def measure_handovers(
    model: str,
    adapters: Sequence[str],
    merged: str | Path,
    rows: PackedRows,
    quantization: Quantization,
    progress: Progress = lambda done, total, doing="": None,
) -> HandoverCosts:
    """What each hand-over of ``adapters`` costs: relative weight error, and KL on a text held out of training.

    Args:
        model: Folder of the unquantized weights, with a tokenizer.
        adapters: Adapter folders.
        merged: Folder the adapters were merged into.
        rows: The text (:func:`held_rows`).
        quantization: How stage 2 stores the frozen weights.
        progress: Called with (models measured, models in all).

    Raises:
        UserError: a folder cannot be used.
    """
    base = ModelDirectory(model)
    errors = load("jax", "handover").handover_errors(
        base, open_adapters(adapters, base), ModelDirectory(merged), rows, quantization, progress
    )
    return HandoverCosts(quantization, int((rows.segment_ids > 0).sum()), errors)


def held_rows(model: str, held_text: str, text_column: str = "text") -> PackedRows:
    """The held-out text in rows no longer than the model's context.

    Raises:
        UserError: JAX, which the measurement runs on, is not installed, or the text cannot be read or is empty.
    """
    require_engine("jax", "measuring hand-overs (--held_text)")
    tokenizer = load_tokenizer(model)
    documents = load_documents(CorpusConfig(documents=(held_text,), text_column=text_column)).documents
    length = min(_HELD_ROW, ModelDirectory(model).config.get("max_position_embeddings", _HELD_ROW))
    return pack(tokenize_documents(tokenizer, documents), length, tokenizer.pad_token_id)


def handover_table(measured: HandoverCosts) -> str:
    """The measurement as three lines of text under a heading, and what it was made on."""
    lines = [f"{'hand-over':<10} {'weight error':>12} {'worst weight':>12} {'KL, nats/token':>15}"]
    for row in measured.handovers:
        figures = f"{row['weight_error']:>12.3e} {row['worst_weight_error']:>12.3e} {row['kl']:>15.3e}"
        lines.append(f"{row['handover']:<10} {figures}   worst: {row['worst_weight']}")
    return "\n".join([*lines, f"measured on {measured.held_tokens:,} tokens"])
