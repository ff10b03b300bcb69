"""A text that its length ends inside a character ends before it; what is trained as other tokens than sampled is counted."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medllm.config import ModelConfig, Sampling
from medllm.engine import Generation, whole_characters
from medllm.engines import open_engine
from medllm.exam.problem import Problem
from medllm.mini.study import BASE
from medllm.model.tokenizer import decode, tokens_of
from medllm.preferences.curation import curate
from medllm.stage_config import CurateConfig

TEXT = "鬱🩺é。発熱"
BYTES = {index: f"<0x{index:02X}>" for index in range(256)}


def byte_level() -> PreTrainedTokenizerFast:
    """A token a byte, but the letter a with the first byte of 鬱 is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (first, *_), _ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("鬱")[0]
    core = Tokenizer(models.BPE({token: n for n, token in enumerate([*alphabet, f"a{first}"])}, merges=[("a", first)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece has it: letters, and bytes for what there is no letter for; spaces are ▁."""
    vocab = {"<unk>": 0, **{name: index + 1 for index, name in BYTES.items()}, "a": 257, "▁": 258, "。": 259}
    core = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte-level", "byte-fallback"])
def tokenizer(request):
    return request.param()


def cut(tokenizer, tokens, finish="length") -> Generation:
    return whole_characters(tokenizer, Generation(decode(tokenizer, tokens), tuple(tokens), finish))


def test_every_beginning_of_a_text_ends_with_a_whole_character(tokenizer):
    tokens = tokens_of(tokenizer, TEXT)
    assert len(tokens) > len(TEXT) + 9
    for length in range(len(tokens) + 1):
        found = cut(tokenizer, tokens[:length])
        sure = next(n for n in range(len(TEXT), -1, -1) if len(tokens_of(tokenizer, TEXT[:n])) <= length)
        assert found == Generation(TEXT[:sure], tuple(tokens_of(tokenizer, TEXT[:sure])), "length")


def test_a_token_that_ends_inside_a_character_goes_whole():
    tokenizer = byte_level()
    assert cut(tokenizer, tokens_of(tokenizer, "発a鬱")[:4]) == Generation("発", tuple(tokens_of(tokenizer, "発")), "length")


def test_what_the_model_wrote_itself_stays(tokenizer):
    for text in ("発\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}" * 2):
        tokens = tokens_of(tokenizer, text)
        assert cut(tokenizer, tokens) == Generation(text, tuple(tokens), "length")
    ended = tokens_of(tokenizer, TEXT)[:-1]
    assert cut(tokenizer, ended, "stop").tokens == tuple(ended), "it was over there"


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_no_engine_ends_a_text_inside_a_character(engine):
    model = open_engine(engine, ModelConfig(str(BASE), dtype="float32"))
    sampling = Sampling(max_new_tokens=4, temperature=4.0, samples=48)
    found = [one for one in model.generate(["問題"], sampling, batch_size=48)[0] if one.finish == "length"]
    assert any(len(one.tokens) < 4 for one in found), "some are cut inside a character"
    assert not [one.text for one in found if one.text.endswith("\N{REPLACEMENT CHARACTER}")]
    assert [decode(model.tokenizer, one.tokens) for one in found] == [one.text for one in found]


class Sampled:
    """Gives the same answers to every prompt, as an engine with a tokenizer does."""

    name = "sampled"

    def __init__(self, tokenizer, *answers):
        self.tokenizer, self.answers = tokenizer, [Generation(*answer) for answer in answers]

    def generate(self, prompts, sampling, batch_size=32, progress=None):
        return [self.answers for _ in prompts]


def test_samples_that_are_trained_as_other_tokens_are_counted():
    tokenizer = byte_level()
    answer, other = tokens_of(tokenizer, " 甲である。"), tokens_of(tokenizer, "a")
    split = tokens_of(tokenizer, "a鬱")
    engine = Sampled(
        tokenizer,
        (" 甲である。", tuple(answer), "stop"),
        (" 甲である。 乙", (*answer, *tokens_of(tokenizer, " 乙\nQuestion:")), "stop", "\nQuestion:"),
        ("a", tuple(split[:1]), "stop", "鬱"),  # the stop string begins inside the token
        ("鬱", (*tokens_of(tokenizer, "鬱"), tokenizer.eos_token_id, *other), "length"),
        ("xa鬱", (*tokens_of(tokenizer, "x"), *other, *tokens_of(tokenizer, "鬱")), "stop"),  # a token that was two
    )
    problem = Problem("1", "どれか。", ("甲", "乙"), ("a",), explanation="甲である。")
    settings = {"shot_count": 0, "sampling": Sampling(samples=5, temperature=1.0)}
    report = curate(engine, [problem], (), CurateConfig(ModelConfig("m"), "run", ("p",), **settings)).report
    assert (report.samples, report.retokenized) == (5, 2)
