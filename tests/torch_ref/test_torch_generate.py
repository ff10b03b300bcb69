"""The reference engine's generation and log-probabilities, against transformers and the model on each sequence alone."""

import dataclasses

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from medllm.config import Sampling
from medllm.engine import Continuation
from tests.small_torch_model import TEXTS
from torch_ref import TorchEngine

pytest_plugins = ["tests.small_torch_model"]


def test_greedy_text_is_what_transformers_generates_for_each_prompt_alone(dense):
    engine = TorchEngine(dense)
    model = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32)
    model.generation_config.repetition_penalty = 1.0
    prompts = [*TEXTS, "a", "the"]
    batched = engine.generate(prompts, Sampling(max_new_tokens=12), batch_size=4)
    for prompt, (generation,) in zip(prompts, batched, strict=True):
        ids = torch.tensor([engine.tokenizer.encode(prompt)])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=engine.tokenizer.eos_token_id, pad_token_id=engine.tokenizer.pad_token_id,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        end = engine.tokenizer.eos_token_id
        expected = expected[: expected.index(end)] if end in expected else expected
        # At its length a text ends with its last whole character.
        assert list(generation.tokens) == expected[: len(generation.tokens)]
        assert generation.text == engine.tokenizer.decode(expected).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_sample_depends_on_seed_prompt_and_number_not_on_its_batch(dense):
    engine = TorchEngine(dense)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, top_p=0.95, top_k=50, samples=3, seed=5)
    together = engine.generate(TEXTS, sampling, batch_size=5)
    alone = [engine.generate([text], sampling, batch_size=1)[0] for text in TEXTS]
    assert together == alone
    assert len({generation.text for row in together for generation in row}) == 12
    assert engine.generate(TEXTS[:1], dataclasses.replace(sampling, seed=6))[0] != alone[0]


def test_samples_follow_the_models_distribution(dense):
    """First tokens of 4,000 samples against softmax(logits / temperature) inside the top k: chi-square."""
    from scipy.stats import chisquare

    engine = TorchEngine(dense)
    count, temperature = 4000, 2.0
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=6, samples=count, seed=1)
    (generations,) = engine.generate(["the"], sampling, batch_size=1000)
    ids = torch.tensor([engine.tokenizer.encode("the")])
    scores, kept = (engine.model(ids).logits[0, -1].detach().double() / temperature).topk(6)
    end, kept = engine.tokenizer.eos_token_id, kept.tolist()
    # A token that is no whole character is cut off at the length, and counts with the end.
    tokens = [
        None if one == end or engine.tokenizer.decode([one]).endswith("\N{REPLACEMENT CHARACTER}") else one for one in kept
    ]
    drawn = [generation.tokens[0] if generation.tokens else None for generation in generations]
    assert set(drawn) <= set(tokens)
    observed = [drawn.count(token) for token in dict.fromkeys(tokens)]
    share = (scores.softmax(0) * count).tolist()
    expected = [sum(one for one, other in zip(share, tokens, strict=True) if other == token) for token in dict.fromkeys(tokens)]
    assert len(expected) > 2
    assert chisquare(observed, expected).pvalue > 1e-3


def test_generation_ends_at_a_stop_string_and_cuts_it_off(dense):
    engine = TorchEngine(dense)
    free = [row[0] for row in engine.generate(TEXTS, Sampling(max_new_tokens=20))]
    stops = tuple(generation.text[5:7] for generation in free[:2])
    cut = [row[0] for row in engine.generate(TEXTS, Sampling(max_new_tokens=20, stop=stops))]
    for before, after in zip(free, cut, strict=True):
        places = [before.text.index(stop) for stop in stops if stop in before.text]
        assert after.text == (before.text[: min(places)] if places else before.text)
        assert after.finish == ("stop" if places else before.finish)
        assert after.tokens == before.tokens[: len(after.tokens)]
    assert cut[0].finish == cut[1].finish == "stop"
    assert cut[0].stopped in stops
    assert {generation.stopped for generation in free} == {""}
    assert free[0].finish == "length"
    assert len(cut[0].tokens) < len(free[0].tokens)


def test_logprobs_are_those_of_the_model_on_each_sequence_alone(dense):
    engine = TorchEngine(dense)
    rng = np.random.default_rng(3)
    work = [
        Continuation(tuple(rng.integers(1, 280, p).tolist()), tuple(rng.integers(1, 280, c).tolist()))
        for p, c in ((5, 3), (1, 9), (12, 1), (4, 0))
    ]
    results = engine.logprobs(work, batch_size=3)
    for one, values in zip(work, results, strict=True):
        with torch.no_grad():
            logits = engine.model(torch.tensor([[*one.prompt, *one.completion]])).logits[0].double()
        expected = logits.log_softmax(-1)[torch.arange(len(one.prompt) - 1, len(logits) - 1), list(one.completion)]
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected.numpy(), atol=2e-5)
