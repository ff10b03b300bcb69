"""Bad input through the command line: one clear line with the place and the remedy, exit code 2, nothing left behind."""

import json

import pytest

from medllm.cli import main
from medllm.config import Sampling
from medllm.errors import UserError
from medllm.mini.study import BASE
from medllm.model.directory import ModelDirectory
from tests.refusal import refused

PROBLEM = {"problem_id": "1", "problem_text": "どれか。", "choices": ["甲", "乙"], "answer": ["a"], "explanation": "甲である。"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with one good input of each kind; ``config`` options that fit the embedded model."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "本文である。"}) + "\n", encoding="utf-8")
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cpt(*more: str, model: str = str(BASE), documents: str = "text.jsonl") -> list[str]:
    return ["cpt", "--model.path", model, "--model.dtype", "float32", "--run", "run", "--corpus.documents", documents, *more]


def evaluate(*more: str, problems: str = "problems.jsonl") -> list[str]:
    settings = ["--model.path", str(BASE), "--model.dtype", "float32", "--run", "run", "--shot_count", "0"]
    return ["evaluate", *settings, "--problems", problems, *more]


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_missing_model_folder(folder, capsys, engine):
    assert "nowhere" in refused(folder, capsys, *cpt("--engine", engine, model="nowhere"))


@pytest.mark.parametrize(("engine", "named"), [("jax", "mixtral"), ("torch", "mlp.experts")])
def test_a_model_of_another_architecture(folder, capsys, engine, named):
    other = folder / "other"
    other.mkdir()
    for file in BASE.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(ModelDirectory(BASE).config | {"model_type": "mixtral"}))
    assert named in refused(folder, capsys, *cpt("--engine", engine, "--corpus.length", "64", model="other"))


def test_a_malformed_line_is_named_by_file_and_number(folder, capsys):
    (folder / "text.jsonl").write_text('{"text": "一"}\n{"text": \n', encoding="utf-8")
    assert "text.jsonl:2" in refused(folder, capsys, *cpt())
    (folder / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\nnot json\n", encoding="utf-8")
    assert "problems.jsonl:2" in refused(folder, capsys, *evaluate())


def test_an_answer_that_is_not_among_the_choices(folder, capsys):
    (folder / "problems.jsonl").write_text(json.dumps(PROBLEM | {"answer": ["c"]}) + "\n", encoding="utf-8")
    line = refused(folder, capsys, *evaluate())
    assert "problems.jsonl:1" in line
    assert "problem 1" in line


def test_an_empty_corpus(folder, capsys):
    (folder / "text.jsonl").write_text("", encoding="utf-8")
    assert "text.jsonl" in refused(folder, capsys, *cpt())


def test_a_column_that_is_not_there(folder, capsys):
    assert "--corpus.text_column" in refused(folder, capsys, *cpt("--corpus.text_column", "body"))


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_tokenizer_that_does_not_fit_the_vocabulary(folder, capsys, engine):
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    settings = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    settings["model"]["vocab"]["thislongwordisnew"] = 1_000_000
    (tokenizer / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    (tokenizer / "tokenizer_config.json").write_bytes((BASE / "tokenizer_config.json").read_bytes())
    line = refused(folder, capsys, *cpt("--engine", engine, "--model.tokenizer", "tokenizer"))
    assert "vocabulary" in line


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_prompt_longer_than_the_context(folder, capsys, engine):
    (folder / "problems.jsonl").write_text(json.dumps(PROBLEM | {"problem_text": "長い" * 4000}) + "\n", encoding="utf-8")
    settings = ["--model.path", str(BASE), "--model.dtype", "float32", "--run", "run", "--shot_count", "0"]
    curate = ["curate", "--engine", engine, *settings, "--problems", "problems.jsonl"]
    for command in (evaluate("--engine", engine), curate):
        line = refused(folder, capsys, *command)
        assert "problems.jsonl:1: problem 1: " in line
        assert str(ModelDirectory(BASE).config["max_position_embeddings"]) in line


def test_a_held_out_year_never_enters_training(folder, capsys):
    (folder / "problems.jsonl").write_text(json.dumps(PROBLEM | {"year": 2018}) + "\n", encoding="utf-8")
    assert "2018" in refused(folder, capsys, *cpt("--corpus.problems", "problems.jsonl"))
    settings = ["--model.path", str(BASE), "--run", "run", "--problems", "problems.jsonl", "--shot_count", "0"]
    assert "2018" in refused(folder, capsys, "curate", *settings)


def test_shots_that_are_not_there(folder, capsys):
    assert "--shots" in refused(folder, capsys, *evaluate("--shot_count", "3"))
    assert "1 problems" in refused(folder, capsys, *evaluate("--shot_count", "3", "--shots", "problems.jsonl"))


def test_preferences_without_a_pair(folder, capsys):
    sample = {"text": "甲である。\n Answer:a", "answer": "a"}
    row = {"problem_id": "1", "prompt": "問", "ground_truth": sample, "chosen": [], "rejected": []}
    (folder / "preferences.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = ["--model.path", str(BASE), "--run", "run", "--preferences", "preferences.jsonl"]
    assert "no pair" in refused(folder, capsys, "rpo", *settings)


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_preferences_whose_prompts_are_empty(folder, capsys, engine):
    sample, other = ({"text": f"{text}である。", "answer": "a"} for text in "甲乙")
    row = {"problem_id": "1", "prompt": "", "ground_truth": sample, "chosen": [], "rejected": [other]}
    (folder / "preferences.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = ["--engine", engine, "--model.path", str(BASE), "--run", "run", "--preferences", "preferences.jsonl"]
    assert "1 × no token of the prompt is left" in refused(folder, capsys, "rpo", *settings)


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_an_adapter_that_is_not_there(folder, capsys, engine):
    arguments = cpt("--engine", engine, "--model.adapter", "nowhere", "--corpus.length", "64")
    assert "nowhere: no such adapter folder" in refused(folder, capsys, *arguments)


def test_a_csv_row_of_another_width(folder, capsys):
    (folder / "text.csv").write_text("text\n本文,続き\n", encoding="utf-8")
    line = refused(folder, capsys, *cpt(documents="text.csv"))
    assert "text.csv:2" in line
    assert "quote" in line


def test_a_format_that_does_not_fit_names_the_setting_that_does(folder, capsys):
    line = refused(folder, capsys, *evaluate("--problems_format", "igakuqa"))
    assert "problems.jsonl: an IgakuQA file is called NNN-S.jsonl" in line
    assert "--problems_format jsonl" in line
    predictions = folder / "predictions.jsonl"
    predictions.write_text(json.dumps({"problem_id": "1", "prediction": "a", "explanation": "a"}) + "\n")
    for chosen, code in (("jsonl", 0), ("jmmlu", 2)):
        score = ["score", "--problems", "problems.jsonl", "--predictions", str(predictions), "--problems_format", chosen]
        assert main(score) == code


@pytest.mark.parametrize(
    "command",
    [
        cpt("--corpus.problems", "problems.jsonl", "--corpus.problems_format", "jmmlu"),
        ["curate", "--model.path", str(BASE), "--run", "run", "--problems", "problems.jsonl", "--problems_format", "jmmlu"],
        ["data", "leaks", "--documents", "text.jsonl", "--problems", "problems.jsonl", "--problems_format", "jmmlu"],
    ],
    ids=lambda command: command[0],
)
def test_every_reader_of_problems_takes_their_format(command, folder, capsys):
    assert "not a file of the format 'jmmlu'" in refused(folder, capsys, *command)


LAYOUT = "known_by: [nr, stem]\nid: nr\nquestion: stem\noptions: options\nanswer: key\nexplanation: why\n"
OWN = [
    {"nr": 1, "stem": "どれか。", "options": ["甲", "乙"], "key": "a", "why": "甲である。"},
    {"nr": 2, "stem": "どれか。", "options": ["甲", "乙"], "key": "z", "why": "乙である。"},
    {"nr": 3, "stem": "何か。", "options": ["甲", "乙"], "key": "b", "why": "乙である。"},
]


@pytest.mark.parametrize(
    ("command", "prefix", "counted"),
    [
        (evaluate(problems="own.jsonl"), "", "left_out"),
        (evaluate("--method", "options", problems="own.jsonl"), "", "left_out"),
        (["curate", "--model.path", str(BASE), "--run", "run", "--problems", "own.jsonl", "--shot_count", "1"], "", "left_out"),
        (cpt("--corpus.problems", "own.jsonl", "--corpus.length", "64"), "corpus.", "skipped"),
        (["data", "leaks", "--documents", "text.jsonl", "--problems", "own.jsonl"], "", "skipped"),
        (["data", "problems", "own.jsonl"], "", "skipped"),
    ],
    ids=["evaluate", "options", "curate", "cpt", "leaks", "problems"],
)
def test_every_reader_of_problems_takes_a_layout_and_skips_bad_rows(command, prefix, counted, folder, capsys):
    (folder / "own.yaml").write_text(LAYOUT, encoding="utf-8")
    (folder / "own.jsonl").write_text("\n".join([*map(json.dumps, OWN), "not json"]), encoding="utf-8")
    few = [] if command[0] in ("cpt", "data") else ["--sampling.max_new_tokens", "2"]
    layout = [f"--{prefix}layout", "own.yaml", *few]
    assert "own.jsonl:4: not JSON" in refused(folder, capsys, *command, *layout)
    assert main([*command, *layout, f"--{prefix}on_bad_row", "skip", "--json", "result.json"]) == 0
    assert json.loads((folder / "result.json").read_text())[counted] == {
        "bad row: the problem: answer 'z' is not among the choices a to b": 1,
        "bad row: not JSON (Expecting value, column 1); expected a JSON object a line": 1,
    }


def test_shots_may_be_laid_out_as_the_problems_or_otherwise(folder):
    (folder / "own.yaml").write_text(LAYOUT, encoding="utf-8")
    (folder / "own.jsonl").write_text(json.dumps(OWN[2]), encoding="utf-8")
    (folder / "shots.jsonl").write_text(json.dumps(OWN[0]), encoding="utf-8")
    for number, shots in enumerate(("shots.jsonl", "problems.jsonl")):
        settings = ["--layout", "own.yaml", "--shot_count", "1", "--shots", shots, "--run", f"run{number}"]
        assert main(evaluate(*settings, "--sampling.max_new_tokens", "2", problems="own.jsonl")) == 0


def test_half_a_character(folder, capsys):
    (folder / "text.jsonl").write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    assert "text.jsonl:1" in refused(folder, capsys, *cpt())


def test_the_same_problem_in_two_files(folder, capsys):
    (folder / "again.jsonl").write_bytes((folder / "problems.jsonl").read_bytes())
    assert "problem 1" in refused(folder, capsys, *evaluate("again.jsonl"))


@pytest.mark.parametrize("setting", ["--limit", "--shot_count", "--batch_size"])
def test_counts_below_zero(folder, capsys, setting):
    assert setting.removeprefix("--") in refused(folder, capsys, *evaluate(setting, "-1"))


def test_an_output_that_cannot_be_written_is_said_before_the_work(folder, capsys):
    assert "--json" in refused(folder, capsys, *evaluate("--json", str(folder)))
    assert "--json" in refused(folder, capsys, *evaluate("--json", "nowhere/result.json"))


def test_an_adapter_config_without_rank(folder, capsys):
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    assert "has no r" in refused(folder, capsys, "convert", "--model", str(BASE), "--adapter", "adapter", "--out", "merged")


def test_a_preset_that_is_not_there_names_those_that_are(folder, capsys):
    line = refused(folder, capsys, "cpt", "--config", "paper_cpt_72x")
    assert line.endswith("--config paper_cpt_72x: neither a file nor a preset; there are paper_cpt_72b")
    assert line == refused(folder, capsys, "cpt", "--config=paper_cpt_72x")
    assert "there are mini, mini_smoke" in refused(folder, capsys, "mini", "--preset", "paper_cpt_72b", "--out", "study")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (cpt(), ("run", "model.path", "model.tokenizer", "corpus.documents", "corpus.problems", "corpus.text_column")),
        (evaluate(), ("sampling.stop", "shots", "label", "problems", "json")),
        (["rpo", "--model.path", str(BASE), "--run", "run", "--preferences", "p.jsonl"], ("preferences", "reference_cache")),
        (["convert", "--model", str(BASE), "--out", "merged"], ("adapter", "held_text", "out")),
        (["data", "leaks", "--documents", "text.jsonl", "--problems", "problems.jsonl"], ("documents", "problems")),
    ],
    ids=lambda value: value[0],
)
def test_an_empty_text_is_no_value(folder, capsys, command, options):
    for option in options:
        assert f"--{option} holds an empty text" in refused(folder, capsys, *command, f"--{option}", "")


def test_an_empty_text_in_a_list_or_a_file_is_no_value_either(folder, capsys):
    assert "--sampling.stop holds" in refused(folder, capsys, *evaluate("--sampling.stop", "終", ""))
    assert "--corpus.documents holds" in refused(folder, capsys, *cpt(documents='["text.jsonl", ""]'))
    (folder / "own.yaml").write_text("sampling:\n  stop: ['']\n", encoding="utf-8")
    assert "--sampling.stop holds" in refused(folder, capsys, *evaluate("--config", "own.yaml"))
    with pytest.raises(UserError, match=r"sampling\.stop is \['a', ''\]; expected"):
        Sampling(stop=("a", ""))


@pytest.mark.parametrize("engine", ["jax", "torch"])
@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("lora.targets", "layers.99.mlp.up_proj", "'layers.99.mlp.up_proj', which none of the"),
        ("lora.rank_pattern", '{"up": 4}', "'up', which matches no module"),
        ("lora.alpha_pattern", '{"layers.99.mlp.up_proj": 4.0}', "which matches no module"),
        ("lora.rank_pattern", '{"": 4}', "empty text"),
    ],
)
def test_a_name_of_no_layer_is_refused_before_training(folder, capsys, engine, setting, value, said):
    line = refused(folder, capsys, *cpt("--engine", engine, f"--{setting}", value))
    assert setting in line
    assert said in line
