"""``medllm bench``: the same work for both engines, each in a process of its own, medians and ratios."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from medllm.bench import compare as comparing
from medllm.bench import compilation
from medllm.bench.compare import compare, table
from medllm.bench.shapes import CptShape, GenerateShape, ModelShape, RpoShape
from medllm.cli import main
from medllm.config import PairConfig
from medllm.model.directory import ModelDirectory
from medllm.model.tokenizer import encode_prompt, load_tokenizer
from medllm.preferences.tokenization import tokenize_preferences

TINY = ModelShape(layers=2, width=32, mlp=48, heads=2, kv_heads=1, vocabulary=128, rank=2)
TINY_WORDS = [f"--model.{name}={value}" for name, value in dataclasses.asdict(TINY).items() if isinstance(value, int)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(TINY.write(tmp_path_factory.mktemp("bench")).tokenizer)


def test_prompts_of_an_exam_share_their_header_and_have_the_lengths_asked_for(tokenizer):
    shape = GenerateShape(TINY, problems=5, header=20, question=10, answer=4)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in shape.data()]
    assert len({tuple(ids[:20]) for ids in prompts}) == 1
    assert sorted(len(ids) - 20 for ids in prompts) == [5, 6, 7, 8, 10]


def test_preferences_have_the_lengths_and_pairs_asked_for(tokenizer):
    shape = RpoShape(TINY, problems=2, prompt=12, response=6, chosen=2, rejected=3, steps=3)
    config = PairConfig(shape.chosen, shape.rejected, max_length=shape.prompt + shape.response)
    tokenized = tokenize_preferences(tokenizer, shape.data(), config)
    assert len(tokenized.groups) == 6
    assert not tokenized.truncated
    for group in tokenized.groups:
        assert len(group.prompt) == 12
        assert [len(response) for response in group.responses] == [6] * 6
        assert len(group.pairs) == shape.pairs == 11


def test_rows_are_full_and_hold_two_documents_each():
    rows = CptShape(TINY, rows=3, length=16, steps=2).data()
    assert rows.tokens.shape == (6, 16)
    assert rows.padding == 0
    assert rows.tokens.min() >= 1
    assert {tuple(sorted(set(row))) for row in rows.segment_ids.tolist()} == {(1, 2)}
    for positions, segments in zip(rows.positions.tolist(), rows.segment_ids.tolist(), strict=True):
        assert positions[segments.index(2)] == 0


def test_the_written_model_is_the_shape_asked_for(tmp_path):
    written = TINY.write(tmp_path)
    directory = ModelDirectory(written.path)
    assert directory.shape("model.layers.1.mlp.down_proj.weight") == (32, 48)
    assert directory.shape("model.layers.0.self_attn.k_proj.weight") == (16, 32)
    assert directory.shape("lm_head.weight") == (128, 32)


def test_the_result_is_medians_and_ratios_of_alternating_runs(monkeypatch):
    rates = {"jax": [8.0, 2.0, 4.0], "torch": [1.0, 5.0, 2.0]}
    asked = []

    def measured(engine, name, **settings):
        if name == "matmul":
            return {"gflops": 100.0}
        asked.append(engine)
        run = asked.count(engine) - 1
        return {"rate": rates[engine][run], "compile_s": 3.0, "peak_rss_bytes": (1 if engine == "jax" else 4) * 2**30}

    monkeypatch.setattr(comparing, "measure", measured)
    found = compare("cpt", CptShape(TINY), engines=("jax", "torch"), runs=3, torch_variant="kept")
    result = found.to_json()
    assert asked == ["jax", "torch"] * 3
    assert result["jax"]["rate"] == 4.0
    assert result["torch"]["rate"] == 2.0
    assert result["ratio"] == 2.0
    assert result["memory_ratio"] == 0.25
    assert result["jax"]["compile_s"] == 3.0
    assert len(result["runs"]["torch"]) == 3
    assert "2.00 times as fast" in table(found)[-1]
    asked.clear()
    alone = compare("cpt", CptShape(TINY), engines=("jax",), runs=1, torch_variant="kept")
    assert alone.ratio is None
    assert len(table(alone)) == 1


@pytest.fixture(scope="module")
def matrix_rate_once():
    """The product that each engine is held against is the same in all three: it is measured once."""
    real, known = comparing.measure, {}

    def measure(engine, name, **settings):
        if name != "matmul":
            return real(engine, name, **settings)
        key = engine, *settings.items()
        if key not in known:
            known[key] = real(engine, name, **settings)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "measure", measure)
        yield


@pytest.mark.usefixtures("matrix_rate_once")
@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("cpt", ["--rows=2", "--length=16", "--steps=2"]),
        ("rpo", ["--problems=1", "--prompt=12", "--response=6", "--steps=2"]),
        ("generate", ["--problems=3", "--header=32", "--question=8", "--answer=5", "--batch_size=2"]),
    ],
)
def test_both_engines_do_the_same_work(tmp_path, action, words):
    out = tmp_path / "result.json"
    variant = {"cpt": "kept", "rpo": "pair-precomputed", "generate": "batch-16"}[action]
    words = [*words, f"--torch_variant={variant}", "--runs=1", "--json", str(out)]
    assert main(["bench", action, *TINY_WORDS, *words]) == 0
    result = json.loads(out.read_text())
    for engine in ("jax", "torch"):
        figures = result[engine]
        assert figures["rate"] > 0
        assert 0.1 < figures["peak_rss_gib"] < 4
        assert figures["matmul_gflops"] > 0
    assert result["jax"]["compile_s"] > 0
    assert result["ratio"] == pytest.approx(result["jax"]["rate"] / result["torch"]["rate"])
    assert result["shape"]["model"]["width"] == 32
    (jax,), (torch,) = result["runs"]["jax"], result["runs"]["torch"]
    if action == "generate":
        assert jax["tokens"] == torch["tokens"] == 15  # neither meets an end-of-text token by accident
    else:
        assert jax["loss"] == pytest.approx(torch["loss"], rel=0.05)  # random words in another order


def test_a_profile_is_a_trace_one_can_open(tmp_path):
    words = ["--problems=1", "--header=0", "--question=8", "--answer=4", "--runs=1", "--engines", "jax"]
    assert main(["bench", "generate", *TINY_WORDS, *words, "--profile", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.rglob("*trace*.gz")]


def test_compiling_is_compared_over_depths(monkeypatch):
    seconds = {2: [4.0, 1.0, 2.0], 20: [2.5, 2.5, 9.0]}
    monkeypatch.setattr(compilation, "measure", lambda *_, model: {"seconds": seconds[model["layers"]].pop(0)})
    found = compilation.bench_compile(TINY, (2, 20), runs=3)
    assert found["ratio"] == 1.25
    assert "20 layers 2.50 s" in compilation.summary(found)


def test_a_training_step_compiles_from_shapes_alone(tmp_path):
    out = tmp_path / "result.json"
    assert main(["bench", "compile", *TINY_WORDS, "--depths", "1", "3", "--runs=1", "--json", str(out)]) == 0
    assert math.isfinite(json.loads(out.read_text())["ratio"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cpt", "--runs=0"], "--runs is 0"),
        (["cpt", "--engines", "jax", "jax"], "name each engine once"),
        (["cpt", "--steps=1"], "--steps is 1; at least 2"),
        (["rpo", "--model.heads=3"], "3 heads"),
        (
            ["cpt", "--torch_variant=fast"],
            "--torch_variant is 'fast'; expected all, or one of recomputed, kept, eager, flash, liger",
        ),
        (["rpo", "--torch_variant=batch", "--nll_reduction=sequence"], "only one pair a pass"),
        (["generate", "--problems=0"], "--problems is 0"),
        (["compile", "--depths", "8"], "two depths"),
    ],
)
def test_a_wrong_setting_is_one_line(capsys, words, expected):
    assert main(["bench", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
