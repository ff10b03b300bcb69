"""llama.cpp's server on a GGUF of a small Qwen2: what it keeps of a contract, and what it does not."""

import importlib.util
import json
from pathlib import Path

import pytest

from medllm.cli import main
from tests.llama_server import BINARY, SLOTS, installed, serving
from tests.served_folder import OFF, PLAIN, STOP, THINKS, check, published, sit, write_exam

SERVERS = installed()
MISSING = [name for name in ("jax", "openai", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; pip install 'medllm[test]'"),
    pytest.mark.skipif(
        not SERVERS,
        reason=f"no llama.cpp here: pip install xllamacpp or 'llama-cpp-python[server]', or set {BINARY} to a llama-server",
    ),
]
GREEDY = ("llama.cpp",)  # llama-cpp-python's server holds back what was said before, at temperature 0 too
ASKED_OF = {"llama-cpp-python": ("--server.fields", '{"repeat_penalty": 1}')}
BEGUN = "{{ '<|endoftext|>' }}" + PLAIN


@pytest.fixture(scope="module", params=list(SERVERS) or ["llama.cpp"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    return write_exam(tmp_path_factory.mktemp("exam"))


def as_gguf(folder, said=None, **contract):
    """A published folder whose tokens llama.cpp knows, and its file, which says what it is ``said`` otherwise."""
    from tests.gguf_file import split_as_qwen2, write_gguf

    published(folder, **{"stop": None, **contract})
    split_as_qwen2(folder)
    return str(folder), write_gguf(folder.with_suffix(".gguf"), folder, **(said or {}))


@pytest.fixture(scope="module")
def right(kind, tmp_path_factory):
    """A folder, and the address of a server that has it."""
    folder, file = as_gguf(tmp_path_factory.mktemp("right") / "right")
    with serving(SERVERS[kind], file) as url:
        yield folder, url


def test_a_file_that_keeps_the_contract_answers_as_the_engine_does(right, kind, exam):
    folder, url = right
    code, result = check(exam, "--url", url, "--model", "right", "--folder", folder)
    assert (code, result["findings"]) == (0, {})
    assert [way["prompt_tokens"] for way in result["ways"].values()] == [[0]] * 5
    if kind in GREEDY:
        assert {way["other_texts"] for way in result["ways"].values()} == {0}
        assert {one for way in result["ways"].values() for one in way["difference"].values()} == {0.0}


# What is published, and what the file says otherwise. A file has no place for stop strings.
WRONG = {
    "end token": ({"called": "<|fin|>"}, {"end": 9}),
    "stop string": ({"stop": STOP}, {}),
    "BOS": ({}, {"bos": 0}),
    "chat template": ({}, {"template": "質問者:" + PLAIN + "\n回答者:"}),
    "thinking left on": ({"template": OFF + THINKS}, {"template": THINKS}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_contract_is_named(kind, exam, tmp_path, capsys, name):
    contract, said = WRONG[name]
    folder, file = as_gguf(tmp_path / "wrong", said, **contract)
    with serving(SERVERS[kind], file) as url:
        code, result = check(exam, "--url", url, "--model", "wrong", "--folder", folder)
    assert code == 1
    assert set(result["findings"]) - {"runs on"} == {name}
    assert f"NOT kept: {name}" in capsys.readouterr().out


def test_an_end_token_that_it_knows_by_name_ends_a_text_whatever_the_file_says(kind, exam, tmp_path):
    folder, file = as_gguf(tmp_path / "named", {"end": 9})
    with serving(SERVERS[kind], file) as url:
        code, result = check(exam, "--url", url, "--model", "named", "--folder", folder)
    assert (code, result["findings"]) == (0, {})


def test_thinking_that_a_template_leaves_off_is_on_in_llama_cpp(kind, exam, tmp_path):
    """Its server says ``enable_thinking`` itself, where the template would only ask whether anybody did."""
    folder, file = as_gguf(tmp_path / "off", template=OFF + THINKS)
    with serving(SERVERS[kind], file) as url:
        _, result = check(exam, "--url", url, "--model", "off", "--folder", folder)
    assert set(result["findings"]) - {"runs on"} == ({"thinking left on"} if kind == "llama.cpp" else set())


def test_texts_that_begin_with_a_token_of_their_own_are_served_so(kind, exam, tmp_path):
    """The template writes it too, as published ones do, and no conversation begins with two."""
    folder, file = as_gguf(tmp_path / "begun", {"bos": 0}, bos=True, template=BEGUN)
    with serving(SERVERS[kind], file) as url:
        code, result = check(exam, "--url", url, "--model", "begun", "--folder", folder)
    assert (code, result["findings"]) == (0, {})


@pytest.fixture
def asked(right, monkeypatch):
    folder, url = right
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return folder


def test_it_sits_the_exam_as_the_engine_does(asked, kind, exam, tmp_path):
    """Under the trained prompt's own stop strings, which are sent, and under others."""
    here = ["--engine", "jax", "--model.path", asked, "--model.dtype", "float32"]
    there = ["--engine", "openai", "--model.path", "right", *ASKED_OF.get(kind, ())]
    own = sit(exam, tmp_path / "jax", *here)
    assert sit(exam, tmp_path / "openai", *there) == own
    stop = ["--sampling.stop", "。"]
    cut = sit(exam, tmp_path / "cut", *there, *stop)
    assert cut == sit(exam, tmp_path / "cut-here", *here, *stop)
    assert cut != own


@pytest.mark.parametrize("samples", [SLOTS, SLOTS + 1])
def test_samples_are_one_request_where_it_takes_so_many(asked, kind, exam, tmp_path, samples):
    """llama.cpp takes as many as it has slots, and refuses more; llama-cpp-python answers with one."""
    run = tmp_path / "run"
    drawn = ["--shot_count", "1", "--problems_until", "2030", "--sampling.samples", str(samples), "--server.concurrency", "1"]
    files = ["--problems", str(exam / "exam.jsonl"), "--sampling.max_new_tokens", "16", "--run", str(run)]
    assert main(["curate", "--engine", "openai", "--model.path", "right", *files, *drawn]) == 0
    result = json.loads((run / "result.json").read_text("utf-8"))
    together = kind == "llama.cpp" and samples <= SLOTS
    assert (result["samples"], result["server"]["requests"]) == (2 * samples, 2 if together else 2 * samples)


def test_options_are_refused_in_one_line(asked, exam, tmp_path, capsys):
    """It gives no log-probabilities of its prompt."""
    how = ["--method", "options", "--server.tokenizer", asked, "--server.concurrency", "1"]
    files = ["--problems", str(exam / "exam.jsonl"), "--run", str(tmp_path / "run")]
    assert main(["evaluate", "--engine", "openai", "--model.path", "right", *files, *how]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medllm: ") and "model 'right'" in line]
    assert "it does not score what it is given" in line
    assert not Path(tmp_path / "run").exists()
