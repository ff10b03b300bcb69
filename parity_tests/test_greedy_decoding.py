"""Greedy generation and the log-probabilities of answer options, against transformers on each sequence alone."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from jax_medllm.engine import JaxEngine
from jax_medllm.generate.cached_decoder import Decoder
from jax_medllm.generate.queue import generate
from jax_medllm.generate.scorer import Scorer
from jax_medllm.weights.read import read_model
from medllm.config import ModelConfig, Sampling
from medllm.engine import Continuation
from medllm.model.adapter import read_adapter
from medllm.model.directory import ModelDirectory
from parity_tests import preference_oracle
from parity_tests.oracle import float64_model
from parity_tests.tiny_models import VOCAB
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT64_HANDED_OUT
from torch_ref.engine import TorchEngine

NEW = 21
RANDOM = np.random.default_rng(5)
SHOTS = RANDOM.integers(0, VOCAB, 40).tolist()
# Beginning with the same shots, which are computed once, and with nothing in common; of unequal length.
PROMPTS = {
    "shared": [SHOTS + RANDOM.integers(0, VOCAB, length).tolist() for length in (1, 12, 4, 31, 7, 20)],
    "apart": [RANDOM.integers(0, VOCAB, length).tolist() for length in (3, 33, 1, 18, 40)],
    "many": [SHOTS + RANDOM.integers(0, VOCAB, length).tolist() for length in (1, 2, 3, 4, 5, 6, 7, 8)],
}


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def stock(base):
    return Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def continuation(stock: Qwen2ForCausalLM, prompt: list[int], end: int) -> tuple[int, ...]:
    """What transformers generates, up to the end token."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    new = stock.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    return tuple(new[: new.index(end)] if end in new else new)


# Of the last, two of eight go on when the others have ended: in a smaller batch, at other places.
@pytest.mark.parametrize(("which", "end", "batch_size"), [("shared", 74, 2), ("apart", 2, 8), ("many", 89, 8)])
def test_greedy_text_is_transformers_token_for_token(base, stock, which, end, batch_size):
    prompts = PROMPTS[which]
    decoder = Decoder(read_model(ModelDirectory(base)), (end,))
    found = generate(decoder, prompts, Sampling(max_new_tokens=NEW), lambda tokens: str(list(tokens)), batch_size)
    expected = [continuation(stock, prompt, end) for prompt in prompts]
    assert [generation.tokens for (generation,) in found] == expected
    assert min(map(len, expected)) < NEW == max(map(len, expected)), "some end by themselves and some do not"
    assert max(len(set(tokens)) for tokens in expected) > 5, "texts that wander"


def test_option_logprobs_are_transformers_on_each_option_alone(base, stock):
    prompts = PROMPTS["apart"]
    options = [tuple(RANDOM.integers(0, VOCAB, length).tolist()) for length in (3, 1, 9, 5)]
    work = [Continuation(tuple(prompt), option) for option in options for prompt in prompts]
    found = Scorer(read_model(ModelDirectory(base))).logprobs(work, 8)
    for (prompt, completion), values in zip(((one.prompt, one.completion) for one in work), found, strict=True):
        with torch.no_grad():
            logits = stock(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        places = torch.arange(len(prompt) - 1, len(logits) - 1)
        FLOAT32_FORWARD.assert_close(values, logits.log_softmax(-1)[places, list(completion)], f"{len(completion)} tokens")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A letter for every id but the last, which ends a text; and its folder."""
    core = Tokenizer(BPE(vocab={chr(32 + index): index for index in range(VOCAB - 1)}, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    whole = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    folder = tmp_path_factory.mktemp("letters")
    whole.save_pretrained(folder)
    assert whole.eos_token_id == VOCAB - 1
    return whole, folder


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_engines_end_at_the_end_token_at_a_stop_string_and_at_the_length_as_transformers(
    nf4_model, tiny_adapter, tokenizer, quantization
):
    """Unequal prompts in one left-padded batch there, in refilled slots here; an adapter on the model."""
    whole, folder = tokenizer
    packed = nf4_model()
    path = packed.path if quantization == "nf4" else packed.dense
    config = ModelConfig(str(path), str(tiny_adapter(packed.dense)), str(folder), quantization, "float32")
    lengths = np.random.default_rng(1).integers(1, 40, 48)
    texts = ["".join(chr(32 + token) for token in np.random.default_rng(n).integers(0, VOCAB - 1, n)) for n in lengths]
    reference = TorchEngine(config)
    whole.padding_side = "left"
    batch = whole(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1}
    width = batch["input_ids"].shape[1]
    unstopped = reference.model.generate(**batch, **settings)[:, width:]
    stop = whole.decode(unstopped[0, 4:6])
    stopped = reference.model.generate(**batch, **settings, stop_strings=[stop], tokenizer=whole)[:, width:]

    engine = JaxEngine(config)
    finishes = set()
    for theirs, stops in ((unstopped, ()), (stopped, (stop,))):
        found = [row for (row,) in engine.generate(texts, Sampling(max_new_tokens=NEW, stop=stops), batch_size=5)]
        for text, row, given in zip(texts, found, theirs.tolist(), strict=True):
            ids = given[: given.index(VOCAB - 1)] if VOCAB - 1 in given else given
            assert list(row.tokens) == ids, f"after a prompt of {len(text)}"
            cut = [index for index in (whole.decode(ids).find(one) for one in stops) if index >= 0]
            assert row.text == whole.decode(ids)[: min(cut, default=None)]
            finishes.add("stop string" if cut else row.finish)
        assert found == [row for (row,) in reference.generate(texts, Sampling(max_new_tokens=NEW, stop=stops), batch_size=5)]
    assert finishes == {"stop string", "stop", "length"}


@pytest.fixture
def several_ends(tiny_model, tmp_path):
    """A model of three end tokens: its tokenizer's, two of generation_config, one of config; id 77 is another special token."""
    base = tmp_path / "model"
    shutil.copytree(tiny_model(), base)
    vocab = {chr(256 + index): index for index in range(VOCAB - 1)}
    del vocab[chr(256 + 77)]
    core = Tokenizer(BPE(vocab={**vocab, "<stop>": 77}, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<stop>", "<end>")])
    whole = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", padding_side="left")
    whole.save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCAB - 1, 34]}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 41}))
    return base, whole


def test_engines_end_at_each_of_several_end_tokens_as_transformers(several_ends):
    base, whole = several_ends
    texts = ["".join(chr(256 + token) for token in np.random.default_rng(n).integers(0, 77, 5)) for n in range(40)]
    stock = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    batch = whole(texts, return_tensors="pt", padding=True)
    config, ended = ModelConfig(str(base), dtype="float32"), set()
    engines = JaxEngine(config), TorchEngine(config)
    for stops, ends in (((), [VOCAB - 1, 34, 41]), (("<stop>",), [VOCAB - 1, 34, 41, 77])):
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends, "pad_token_id": VOCAB - 1}
        theirs = stock.generate(**batch, **settings)[:, 5:].tolist()
        lengths = [min([row.index(end) for end in ends if end in row], default=NEW) for row in theirs]
        ended |= {row[length] for row, length in zip(theirs, lengths, strict=True) if length < NEW}
        for engine in engines:
            found = [row for (row,) in engine.generate(texts, Sampling(max_new_tokens=NEW, stop=stops), batch_size=8)]
            for row, given, length in zip(found, theirs, lengths, strict=True):
                assert list(row.tokens) == given[:length], engine.name
                assert row.text == whole.decode(given[:length], skip_special_tokens=True)
                assert row.finish == "stop" or length == NEW
    assert ended >= {34, 41, 77}, "each of them ends a text"


def test_option_logprobs_are_those_of_torch_ref_and_of_the_formula_in_float64(tiny_model, tiny_adapter, tokenizer):
    base = tiny_model()
    adapter = tiny_adapter(base)
    config = ModelConfig(str(base), str(adapter), str(tokenizer[1]), dtype="float32")
    rng = np.random.default_rng(2)
    prompts = [tuple(rng.integers(0, VOCAB, length).tolist()) for length in (12, 3, 25)]
    work = [
        Continuation(prompt, tuple(rng.integers(0, VOCAB, length).tolist())) for prompt in prompts for length in (2, 7, 1, 4, 4)
    ]
    for ours, theirs in zip(JaxEngine(config).logprobs(work, 4), TorchEngine(config).logprobs(work, 4), strict=True):
        FLOAT32_FORWARD.assert_close(ours, theirs, "an option's log-probabilities")
    oracle = float64_model(base, adapter)
    with jax.enable_x64(True):
        model = read_model(ModelDirectory(base), adapter=read_adapter(adapter), dtype=jnp.float64)
        for option, values in zip(work, Scorer(model).logprobs(work, 4), strict=True):
            with torch.no_grad():
                expected = preference_oracle.response_logprobs(oracle, option.prompt, option.completion)
            FLOAT64_HANDED_OUT.assert_close(values, expected, "an option's log-probabilities")
