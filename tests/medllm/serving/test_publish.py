"""What is published of a trained model: a directory that opens, and no promise that the training contradicts."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml

from medllm.cli import main
from medllm.config import LoraConfig, ModelConfig, Sampling
from medllm.corpus.packing import PackedRows, pack
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.exam.predictions import Prediction
from medllm.exam.scoring import score
from medllm.mini.problems import exam_problems
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.model.adapter import module_name, read_adapter, tensor_name, write_adapter
from medllm.model.directory import ModelDirectory
from medllm.model.endings import Endings, read_endings
from medllm.model.tokenizer import load_tokenizer
from medllm.run import Run
from medllm.serving.contract import learned
from medllm.serving.opened import published_model
from medllm.serving.taught import Taught, taught_by_rows
from medllm.stage_config import CorpusConfig, CptConfig, EvaluateConfig
from tests.refusal import refused

END, UNSEEN = "<|endoftext|>", 1275
TAUGHT = Taught(end=END, end_id=0, ends=36, pad_id=0, pad_targets=0, begins=(), conversations=0)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A training run and an evaluation of its model, as their stages leave them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, "base")
    (tmp_path / "corpus.jsonl").write_text('{"text": "空は青い。"}\n', encoding="utf-8")
    rng = np.random.default_rng(0)
    tensors = {
        tensor_name(module_name(0, "q_proj"), "A"): rng.standard_normal((4, 192)).astype(np.float32),
        tensor_name(module_name(0, "q_proj"), "B"): rng.standard_normal((192, 4)).astype(np.float32),
    }
    lora = LoraConfig(rank=4, alpha=8.0, targets=("layers.0.self_attn.q_proj",))
    model = ModelConfig("base", dtype="float32")
    with Run("cpt", CptConfig(model, "cpt", CorpusConfig(documents=("corpus.jsonl",)), lora=lora), engine="jax") as run:
        write_adapter("cpt/adapter", lora, tensors, "base")
        run.finish({"stage": "cpt", "engine": "jax", "steps": 2, "loss": 2.5, "taught": asdict(TAUGHT)})
    problems = exam_problems(make_world(), 2)[:6]
    write_problems("exam.jsonl", problems)
    opened = replace(model, adapter="cpt/adapter")
    config = EvaluateConfig(opened, "sat", ("exam.jsonl",), shot_count=0, sampling=Sampling(max_new_tokens=48))
    with Run("sat", config, engine="jax") as run:
        sheet = score(problems, [Prediction(one.problem_id, ",".join(one.accepted[0])) for one in problems]).to_json()
        endings = {"texts": 6, "run_on": 1, "stopped": 0, "cut_off": 0, "unread": 2}
        run.finish(
            {"stage": "evaluate", "engine": "jax", "model": "m", "setting": "zero-shot", "score": sheet, "endings": endings}
        )
    return tmp_path


def teach(**changes):
    """Change what the training run says that it taught."""
    with open("cpt/result.json", encoding="utf-8") as stream:
        result = json.load(stream)
    result["taught"] = asdict(replace(TAUGHT, **changes))
    with open("cpt/result.json", "w", encoding="utf-8") as stream:
        json.dump(result, stream)


def publish(*more):
    return main(["publish", "--model", "base", "--adapter", "cpt/adapter", "--runs", "sat", "--out", "out", *more])


def test_a_published_directory_is_the_merged_model_with_its_contract_and_card(study, capsys):
    teach(stop=("\nQuestion:",))
    assert publish("--name", "ours", "--license", "apache-2.0") == 0
    assert "publish: dense weights, 2 runs; out" in capsys.readouterr().out
    weights, base = ModelDirectory("out"), ModelDirectory("base")
    name = f"{module_name(0, 'q_proj')}.weight"
    adapter = read_adapter("cpt/adapter")
    (update,) = (adapter.update(module, pair) for module, pair in adapter.modules().items())
    np.testing.assert_array_equal(weights.read(name), base.read(name) + update)
    generation = json.loads((study / "out/generation_config.json").read_text())
    assert generation == {
        "eos_token_id": 0,
        "pad_token_id": 0,
        "stop_strings": ["\nQuestion:"],
        "max_new_tokens": 48,
        "do_sample": False,
    }
    assert load_tokenizer("out")("空は青い。")["input_ids"] == load_tokenizer("base")("空は青い。")["input_ids"]


def test_the_card_is_read_from_the_runs(study):
    assert publish("--name", "ours", "--license", "apache-2.0") == 0
    _, head, text = (study / "out/README.md").read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["base_model"], head["pipeline_tag"]) == ("apache-2.0", ["base"], "text-generation")
    (listed,) = head["model-index"]
    assert [one["metrics"][0]["value"] for one in listed["results"]] == [1.0]
    assert "no medical advice" in text
    assert "not clinical safety" in text
    assert f"| cpt | corpus.jsonl | – | {hashlib.sha256((study / 'corpus.jsonl').read_bytes()).hexdigest()} |" in text
    assert "| ours | zero-shot | 1.000 [" in text
    assert "6/6 | 6 | 1 run on, 0 cut off, 2 unread |" in text


def test_an_adapter_is_published_beside_its_base_and_says_so(study, capsys):
    teach(stop=("\nQuestion:",))
    assert publish("--weights", "adapter") == 0
    assert "out is no whole model: to serve it, copy config.json and *.safetensors of base into it" in capsys.readouterr().out
    assert "once the base model's `config.json` and its weights" in (study / "out/README.md").read_text(encoding="utf-8")
    assert read_adapter("out").lora == read_adapter("cpt/adapter").lora
    assert not (study / "out/model.safetensors").exists()
    with published_model("out", "float32") as model:
        assert read_endings(load_tokenizer(model.path), model.path) == Endings((0,), ("\nQuestion:",))
        assert model.adapters == ("out",)


def test_weights_are_published_in_4_bits(study):
    pytest.importorskip("jax")
    assert publish("--weights", "nf4") == 0
    assert ModelDirectory("out").config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_a_plain_template_makes_a_conversation_the_text_that_is_continued(study):
    assert publish("--chat_template", "plain") == 0
    tokenizer = load_tokenizer("out")
    turns = [{"role": "user", "content": "空は何色か。\n 答え:"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "空は何色か。\n 答え:"


def give_template():
    with open("base/chat_template.jinja", "w", encoding="utf-8") as stream:
        stream.write(TEMPLATE)


def test_thinking_is_off_in_a_template_that_knows_of_it(study):
    with open("base/chat_template.jinja", "w", encoding="utf-8") as stream:
        stream.write(TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}<no thoughts>{% endif %}")
    teach(conversations=3)
    assert publish() == 0
    turns = [{"role": "user", "content": "空"}]
    tokenizer = load_tokenizer("out")
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<user>空<assistant><no thoughts>"
    assert tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=True) == "<user>空<assistant>"


@pytest.mark.parametrize(
    ("planted", "more", "said"),
    [
        ({"ends": 0}, (), "no end token was ever a target"),
        ({"end": "が", "end_id": 9}, (), "training ended its texts with 'が', but published would be"),
        ({"pad_targets": 7}, (), "7 positions of padding were trained as targets"),
        ({"begins": (5,)}, (), r"its texts began with the tokens \[5\], .* begins a text with \[\] \(BOS\)"),
    ],
    ids=["an end token never trained on", "another end token", "pad = eos", "BOS"],
)
def test_a_contract_that_the_training_contradicts_is_refused(study, capsys, planted, more, said):
    teach(**planted)
    line = refused(study, capsys, "publish", "--model", "base", "--adapter", "cpt/adapter", "--out", "out", *more)
    assert re.search(said, line), line


def test_a_stop_token_that_the_adapter_cannot_learn_is_refused(study, capsys):
    token = load_tokenizer("base").convert_ids_to_tokens(_unlearned())
    arguments = ("--model", "base", "--adapter", "cpt/adapter", "--out", "out", "--end_tokens", END, token)
    line = refused(study, capsys, "publish", *arguments)
    assert f"{token!r} is to end a text, but no run trained on it" in line
    assert "the base never learned it" in line


def _unlearned() -> int:
    """A token of the embedded base whose row lies among those that no text reaches."""
    base = ModelDirectory(BASE)
    return next(token for token in range(1, 1276) if not learned(base, token, 1276))


def test_what_the_base_knows_is_told_from_what_it_never_saw():
    base, tokenizer = ModelDirectory(BASE), load_tokenizer(BASE)
    known = set(tokenizer("患者は病気である。問題の答えは薬である。")["input_ids"]) | {0}
    assert all(learned(base, token, 1276) for token in known)
    assert sum(not learned(base, token, 1276) for token in range(1276)) >= 1
    assert not learned(base, 1277, 1276)


def test_of_a_head_in_4_bits_nothing_can_be_told(monkeypatch):
    base = ModelDirectory(BASE)
    monkeypatch.setattr(base, "description", lambda name: {"shape": [1280, 192]})
    assert learned(base, _unlearned(), 1276)
    assert not learned(base, 1277, 1276)


def test_a_template_never_shown_is_refused_until_it_was(study, capsys):
    give_template()
    arguments = ("publish", "--model", "base", "--adapter", "cpt/adapter", "--out", "out")
    assert "chat template was never shown in training" in refused(study, capsys, *arguments)
    teach(conversations=3)
    assert main(list(arguments)) == 0


def test_nothing_is_published_without_a_training_run(study, capsys):
    line = refused(study, capsys, "publish", "--model", "base", "--out", "out", "--runs", "sat")
    assert "give their folders (--runs)" in line


def test_a_run_that_does_not_say_what_it_taught_is_refused(study, capsys):
    result = json.loads((study / "cpt/result.json").read_text())
    del result["taught"]
    (study / "cpt/result.json").write_text(json.dumps(result))
    assert "has no 'taught'" in refused(study, capsys, "publish", "--model", "base", "--out", "out", "--runs", "cpt")


def test_what_rows_teach_is_counted_in_their_targets():
    tokenizer = load_tokenizer(BASE)
    rows = pack([[5, 6, 0], [7, 8, 9, 0], [3, 4, 5, 6]], 8, pad_id=0)
    taught = taught_by_rows(tokenizer, rows, ["a"])
    assert (taught.end, taught.ends, taught.pad_targets, taught.begins) == (END, 2, 0, ())
    padding = int((rows.segment_ids == 0).sum())
    unmasked = Unmasked(rows.tokens, rows.segment_ids, rows.positions)
    assert taught_by_rows(tokenizer, unmasked, ["a"]).pad_targets == padding > 0


class Unmasked(PackedRows):
    """Rows whose padding is trained on."""

    @property
    def targets(self):
        return np.ones(self.tokens.shape, bool)


def test_a_record_that_is_none_is_refused():
    assert Taught.from_json(json.loads(json.dumps(asdict(TAUGHT))), "result.json") == TAUGHT
    with pytest.raises(UserError, match=r"result\.json: has no 'taught'"):
        Taught.from_json({"end": "x"}, "result.json")
