"""Settings of a stage as a whole, one class a command: what a preset fills in.

Each is a frozen dataclass; presets in ``medllm/presets`` are YAML files of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from medllm.config import (
    MeshConfig,
    ModelConfig,
    OptionPrompt,
    PreferenceRecipe,
    ProblemLayout,
    Recipe,
    Sampling,
    expect,
)

_SENT = frozenset("model prompt messages max_tokens max_completion_tokens n stream stop temperature top_p".split())
"""Fields of a request to a server that the settings of sampling, or nobody, may say."""


def _require_counts(batch_size: int, shot_count: int, limit: int) -> None:
    expect(batch_size >= 1, "batch_size", batch_size, "at least 1")
    expect(shot_count >= 0, "shot_count", shot_count, "0 (zero-shot) or more")
    expect(limit >= 0, "limit", limit, "0 (all) or more")


@dataclass(frozen=True)
class HeldOutConfig(ProblemLayout):
    """What a study tests on: what a stage trains on must not hold it.

    Args:
        problems: Problem files or folders that are held out. What is read is searched for them, and refused by file and line.
        allow: What may be there all the same, by name: a problem's id, or a file that is read (``FILE:LINE``: a document).
        exact: Share of a problem that one document holds word for word, from which on it is refused.
        near: The same of what is like it, 0 to 1 (:mod:`medllm.corpus.leaks.near`).
    """

    problems: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    exact: float = 0.8
    near: float = 0.37

    def __post_init__(self) -> None:
        for name in ("exact", "near"):
            value = getattr(self, name)
            expect(0 < value <= 1, f"held_out.{name}", value, "a share in (0, 1]")


@dataclass(frozen=True)
class CorpusConfig(ProblemLayout):
    """What continued pretraining reads.

    Args:
        documents: Files or folders: JSONL, Parquet, plain text, or whatever ``datasets`` opens.
        text_column: Column that holds a document's text; a problem file is turned into question, explanation and answer.
        problems: Problem files whose verified explanations join the corpus (nothing after ``problems_until``).
        problems_until: Last exam year that may enter training; the evaluation exams begin the year after.
        length: Tokens in a row.
        packing: ``packed`` keeps documents apart (segment ids, positions restart); ``wrapped`` cuts one stream anywhere.
    """

    documents: tuple[str, ...] = ()
    text_column: str = "text"
    problems: tuple[str, ...] = ()
    problems_until: int = 2017
    length: int = 2048
    packing: Literal["packed", "wrapped"] = "packed"

    def __post_init__(self) -> None:
        expect(self.length >= 2, "corpus.length", self.length, "at least 2 tokens in a row")


@dataclass(frozen=True)
class CptConfig(Recipe):
    """Stage 1: continued pretraining. Two epochs is the paper's figure.

    Args:
        model: The model that is trained on.
        run: Run folder; the adapter is written into it.
        corpus: The texts, and how they become rows.
        held_out: What must not be in them.
    """

    model: ModelConfig
    run: str
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)

    def __post_init__(self) -> None:
        precomputed = self.torch.precompute_reference
        expect(not precomputed, "torch.precompute_reference", precomputed, "false: continued pretraining has no reference")


@dataclass(frozen=True)
class ServerConfig:
    """How a server is asked (``--engine openai``), and what it costs. Engines on this machine have none.

    Args:
        concurrency: Requests under way at a time.
        requests_per_minute: Limit on requests (0: none).
        tokens_per_minute: Limit on tokens, estimated: those of prompts, and ``max_new_tokens`` for each sample (0: none).
        timeout: Seconds after which a request counts as lost. A server that asks for a longer wait is not waited for.
        retries: Times that a request without an answer is sent again, and that a server which answers none is tried.
        input_price: Of a million prompt tokens, in whatever money.
        output_price: Of a million tokens of answers.
        tokenizer: Folder of the served model's tokenizer: options are scored as its tokens (``--method options``, ``letters``).
        fields: More fields of every request, for what a server does otherwise by itself: ``{"min_p": 0, "repeat_penalty": 1}``.
    """

    concurrency: int = 32
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    timeout: float = 600.0
    retries: int = 5
    input_price: float | None = None
    output_price: float | None = None
    tokenizer: str | None = None
    fields: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        ours = sorted(_SENT.intersection(self.fields or ()))
        expect(not ours, "server.fields", ours, "no field that is sent anyway (--sampling)")
        expect(self.concurrency >= 1, "server.concurrency", self.concurrency, "at least 1")
        expect(self.timeout > 0, "server.timeout", self.timeout, "a positive number of seconds")
        for name in ("requests_per_minute", "tokens_per_minute", "retries"):
            expect(getattr(self, name) >= 0, f"server.{name}", getattr(self, name), "0 or more")
        for name in ("input_price", "output_price"):
            expect((getattr(self, name) or 0) >= 0, f"server.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class CurateConfig(MeshConfig, ProblemLayout):
    """Preference data from the model's own answers.

    Args:
        model: The model that writes the responses (the CPT model in the paper).
        run: Run folder; ``preferences.jsonl`` is written into it.
        problems: Problem files or folders, with verified explanations.
        shots: Problem file whose first ``shot_count`` rows are the examples; the problems' own first ones when unset.
        shot_count: Examples before the question (three in the paper).
        problems_until: Problems of later years are refused: the exams held out for evaluation never enter training.
        sampling: Several samples a problem at a temperature that gives right and wrong answers.
        answer_as: Answers are written as option letters, or as the options' own text.
        batch_size: Continuations generated at a time.
        limit: Use only the first so many problems (0: all).
        server: How a server is asked.
        dry_run: Say what a server would be asked for and what it would cost; ask and write nothing.
        held_out: What must not be among problems and shots.
    """

    model: ModelConfig
    run: str
    problems: tuple[str, ...]
    shots: str | None = None
    shot_count: int = 3
    problems_until: int = 2017
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, top_p=0.95, samples=8))
    answer_as: Literal["letters", "text"] = "letters"
    batch_size: int = 32
    limit: int = 0
    server: ServerConfig = field(default_factory=ServerConfig)
    dry_run: bool = False
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)

    def __post_init__(self) -> None:
        _require_counts(self.batch_size, self.shot_count, self.limit)


@dataclass(frozen=True)
class RpoConfig(PreferenceRecipe):
    """Stage 2: preference training.

    Args:
        model: The model that is trained on. Its adapter, where it has one, is that of stage 1.
        run: Run folder.
        preferences: The preference file.
        held_out: What must not be in its prompts and responses.
    """

    model: ModelConfig
    run: str
    preferences: str
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)


@dataclass(frozen=True)
class RoundsConfig(CurateConfig, PreferenceRecipe):
    """Iterative preference training (Pang et al. 2024): curate, train, curate again with the trained model, and so on.

    A round's model is trained from the round before, which is also its reference.

    Args:
        rounds: Trainings at most. The answers of the last one's model are curated too, which is its score.
        improvement: The share of right samples that a round must add for another to follow.
        fewest_pairs: Another round follows only where so many pairs have a wrong answer on the losing side.
        held_out: What must not be in problems, examples and sampled answers, in any round.
        sampling: As of curation; each round samples with a seed of its own, the first with this one.
    """

    rounds: int = 3
    improvement: float = 0.01
    fewest_pairs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        expect(0 <= self.improvement < 1, "improvement", self.improvement, "a share in [0, 1)")
        expect(self.fewest_pairs >= 1, "fewest_pairs", self.fewest_pairs, "at least 1")


@dataclass(frozen=True)
class EvaluateConfig(MeshConfig, ProblemLayout):
    """An exam sat by a model, from prompts to the score.

    Args:
        model: The model that sits it.
        run: Run folder; ``predictions.jsonl`` and the score in ``result.json`` are written into it.
        problems: Problem files or folders (an IgakuQA checkout, JSONL, CSV).
        shots: Problem file with the examples, needed where there are any.
        shot_count: Examples before the question (three in the paper, 0: none).
        explanation: Ask for an explanation before the answer (the paper's second column).
        method: How it is sat: in words that are scored officially (``generate``), or by the likeliest of the ``options`` or of
            their ``letters``. These follow a zero-shot prompt, as in JMedBench: shots, template and sampling play no part then.
        option_prompt: That prompt, by JMedBench's names: its minimal, standard, English-centric and instructed one, or two more
            that list no options. A problem with a context (PubMedQA) is asked by the one that JMedBench pairs with it.
        problem_set: What the problems are called in a table of zero-shot sets (MMMLU, MedQA): the report has one of the runs
            that name theirs.
        subjects: Only the problems of these subjects (empty: all).
        template: The prompt: ``igakuqa`` is the benchmark's own, ``curation`` the paper's Question/Explanation/Answer.
        format: The prompt's form: ``completion`` for base models, ``chat`` for models with a chat template.
        answer_as: The shots answer with option letters, or with the options' own text.
        batch_size: Continuations generated at a time.
        lenient: Also forgive spaces in a prediction; the official scoring does not.
        limit: Only the first so many problems (0: all).
        label: What the model is called in tables; its folder when unset.
        server: How a server is asked.
        dry_run: Say what a server would be asked for and what it would cost; ask and write nothing.
    """

    model: ModelConfig
    run: str
    problems: tuple[str, ...]
    shots: str | None = None
    shot_count: int = 3
    explanation: bool = False
    method: Literal["generate", "options", "letters"] = "generate"
    template: Literal["igakuqa", "curation"] = "igakuqa"
    format: Literal["completion", "chat"] = "completion"
    answer_as: Literal["letters", "text"] = "letters"
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 32
    lenient: bool = False
    limit: int = 0
    label: str | None = None
    option_prompt: OptionPrompt = "mcqa_with_options_jp"
    problem_set: str | None = None
    subjects: tuple[str, ...] = ()
    server: ServerConfig = field(default_factory=ServerConfig)
    dry_run: bool = False

    def __post_init__(self) -> None:
        _require_counts(self.batch_size, self.shot_count, self.limit)


@dataclass(frozen=True)
class AuditConfig:
    """The parity audit: one checkpoint in both stacks and in float64.

    Args:
        model: The checkpoint, its adapters, its quantization, and the type both stacks compute in.
        reference: Model folder that the torch stack and the truth read in place of ``model.path``.
        reference_adapter: Adapter folder, or several, that they put on in place of ``model.adapter``.
        text: A UTF-8 text file to take the tokens from; random tokens without it.
        tokens: Length of a row.
        rows: How many rows: a whole, a packed, a padded one, and more whole ones.
        seed: Seed of the random tokens.
        bisect: Stop at the first divergence.
    """

    model: ModelConfig
    reference: str | None = None
    reference_adapter: tuple[str, ...] | str | None = None
    text: str | None = None
    tokens: int = 128
    rows: int = 4
    seed: int = 0
    bisect: bool = False

    def __post_init__(self) -> None:
        expect(self.tokens >= 8, "tokens", self.tokens, "at least 8")
        expect(self.rows >= 3, "rows", self.rows, "at least 3: a whole, a packed and a padded one")
        expect(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True)
class PublishConfig:
    """A directory that is ready to be served, with a model card.

    Args:
        model: Model folder.
        out: The folder to write.
        adapter: PEFT adapter folders to merge into it, in order; with ``weights: adapter`` the one that is published.
        runs: Run folders of the training, and of the model's evaluations; those that adapters lie in are found.
        weights: ``dense`` weights in their stored type, 4 bits as bitsandbytes stores them (``nf4``, ``nf4-single``), or the
            ``adapter`` alone, to be put on its base.
        tokenizer: Folder of the tokenizer; the model's when unset.
        chat_template: ``keep`` the tokenizer's (with thinking off where it knows of it); a ``plain`` one, which makes a
            conversation the text that is continued; or ``none``: conversations are refused.
        end_tokens: The tokens that end a text; those of tokenizer, config and generation config when empty.
        name: What the model is called; the folder's name when unset.
        license: Of the weights, by Hugging Face's identifiers: that of the base allows or forbids it.
    """

    model: str
    out: str
    adapter: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    weights: Literal["dense", "nf4", "nf4-single", "adapter"] = "dense"
    tokenizer: str | None = None
    chat_template: Literal["keep", "plain", "none"] = "keep"
    end_tokens: tuple[str, ...] = ()
    name: str | None = None
    license: str = "other"


@dataclass(frozen=True)
class CheckServingConfig(ProblemLayout):
    """A model as it is served, asked under its trained prompt and under foreign ones, beside an engine's own answers.

    Args:
        model: The model's name on the server; without ``url`` its folder, which an engine then answers from.
        problems: Problem files or folders.
        url: An OpenAI-compatible server: ``http://127.0.0.1:8000/v1``.
        folder: The published folder, whose own answers to the same tokens are compared. ``model`` where that is a folder;
            without one, endings and scores are all that is said.
        shots: Problem file with the examples of the trained prompt.
        shot_count: Examples before the question.
        explanation: The trained prompt asks for an explanation before the answer.
        template: The trained prompt: ``igakuqa``, the benchmark's, or ``curation``, the paper's Question/Explanation/Answer.
        format: Its form: a text to continue, or a chat.
        answer_as: Its shots answer with option letters, or with the options' own text.
        max_new_tokens: Longest answer.
        limit: So many problems (0: all).
        batch_size: Requests at a time.
        dtype: Type that the engine computes in.
    """

    model: str
    problems: tuple[str, ...]
    url: str | None = None
    folder: str | None = None
    shots: str | None = None
    shot_count: int = 3
    explanation: bool = False
    template: Literal["igakuqa", "curation"] = "igakuqa"
    format: Literal["completion", "chat"] = "completion"
    answer_as: Literal["letters", "text"] = "letters"
    max_new_tokens: int = 512
    limit: int = 36
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        _require_counts(self.batch_size, self.shot_count, self.limit)
        expect(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")


FREE_ON_RESUME = frozenset(
    {
        *("run", "resume", "mesh", "rules", "reference_cache", "tracker", "seeds"),
        *("rounds", "improvement", "fewest_pairs"),
        *(f"training.{name}" for name in ("max_steps", "log_every", "on_nan", "max_skipped", "remat")),
        *(f"training.{name}" for name in ("checkpoint_every", "checkpoint_minutes", "keep", "keep_every")),
        *(f"torch.{name}" for name in ("attention", "liger", "precompute_reference")),
        *(f"server.{one.name}" for one in fields(ServerConfig) if one.name != "fields"),
    }
)
"""What a resumed run may have otherwise than it was begun with: its length, its bookkeeping, how the same numbers are computed,
and how a server is asked."""
