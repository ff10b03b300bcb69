"""Generation against a loop without cache, and sampling against its distribution."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_medllm.generate import queue
from jax_medllm.generate.cached_decoder import CHUNK, Decoder, Fill
from jax_medllm.generate.queue import generate
from jax_medllm.generate.sampling import sample_tokens
from jax_medllm.generate.scorer import Scorer
from jax_medllm.model.decoder import DenseDecoder
from medllm.config import Sampling
from medllm.engine import Continuation
from medllm.errors import UserError
from tests.small_model import small_config

SMALL = small_config(vocab_size=31, tie_embeddings=False, max_positions=160)
END = 0


def text_of(tokens):
    return "".join(chr(ord("A") + token) for token in tokens)


@pytest.fixture(scope="module")
def model():
    model = DenseDecoder(SMALL, rngs=nnx.Rngs(1))
    # Wider weights than at initialization, so that texts wander instead of repeating one token.
    nnx.update(model, jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, (END,))


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(0)
    shared = random.integers(1, 31, 40).tolist()
    return [shared + random.integers(1, 31, 1 + 5 * i).tolist() for i in (2, 0, 4, 1, 3)]


@pytest.fixture(scope="module")
def scores(model):
    """Next-token scores of a text, computed whole: no cache, one compiled length."""

    @jax.jit
    def run(tokens, segment_ids):
        hidden = model.hidden(tokens, segment_ids=segment_ids, positions=jnp.arange(tokens.shape[1])[None])
        return model.logits(hidden)[0]

    def of(tokens):
        row, mask = np.zeros((1, 160), np.int32), np.zeros((1, 160), np.int32)
        row[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        return np.asarray(run(row, mask))[: len(tokens)]

    return of


def plain_greedy(scores, prompt, count):
    """Tokens up to the end token, ``count`` at most, and why they end."""
    tokens = list(prompt)
    while (token := int(scores(tokens)[-1].argmax())) != END and len(tokens) < len(prompt) + count:
        tokens.append(token)
    return tuple(tokens[len(prompt) :]), "stop" if token == END else "length"


@pytest.mark.parametrize(("batch_size", "piece"), [(2, 128), (32, 128), (32, 32)])
def test_greedy_text_is_that_of_a_loop_without_cache(monkeypatch, decoder, prompts, scores, batch_size, piece):
    """In pieces of 32 the rows' own tokens, first 6 to 26 and then as many as 45, are read up to 32 and later whole."""
    monkeypatch.setattr(queue, "_PIECE", piece)
    generations = generate(decoder, prompts, Sampling(max_new_tokens=19), text_of, batch_size)
    expected = [plain_greedy(scores, prompt, 19) for prompt in prompts]
    assert [(generation.tokens, generation.finish) for (generation,) in generations] == expected
    assert [generation.text for (generation,) in generations] == [text_of(tokens) for tokens, _ in expected]
    assert max(len(set(tokens)) for tokens, _ in expected) > 5
    assert {finish for _, finish in expected} == {"stop", "length"}


def test_a_text_that_ends_at_exactly_the_longest_length_has_ended(decoder, prompts, scores):
    texts = [plain_greedy(scores, prompt, 19) for prompt in prompts]
    ended = [(i, tokens) for i, (tokens, finish) in enumerate(texts) if finish == "stop" and len(tokens) > 1]
    assert ended
    for i, tokens in ended:
        for most, finish in ((len(tokens), "stop"), (len(tokens) - 1, "length")):
            (found,) = generate(decoder, prompts, Sampling(max_new_tokens=most), text_of, 4)[i]
            assert (found.tokens, found.finish) == (tokens[:most], finish)


def test_a_row_is_finished_on_the_device_at_any_end_token_and_filled_up_with_the_first(model, prompts, scores):
    tokens, _ = plain_greedy(scores, prompts[0], 19)
    place = next(i for i in range(2, 7) if tokens[i] not in tokens[:i])
    decoder = Decoder(model, (END, 31, tokens[place]))
    given = np.asarray([prompts[0]], np.int32)
    zero = np.zeros(1, np.int32)
    fill = Fill(given, np.array([given.shape[1]], np.int32), zero, zero, jax.random.split(jax.random.key(0), 1))
    slots, written = decoder.extend(decoder.fill(decoder.empty(1, 64), None, fill), None, Sampling(max_new_tokens=19))
    assert written[0].tolist() == [*tokens[: place + 1], *[END] * (CHUNK - place - 1)]
    assert slots.finished.all()
    assert slots.made[0] == place + 1


def test_prompts_without_a_common_beginning_are_continued_alike(decoder, scores):
    random = np.random.default_rng(3)
    prompts = [random.integers(1, 31, length).tolist() for length in (10, 17)]
    generations = generate(decoder, prompts, Sampling(max_new_tokens=10), text_of, 32)
    found = [(generation.tokens, generation.finish) for (generation,) in generations]
    assert found == [plain_greedy(scores, prompt, 10) for prompt in prompts]


def test_a_sampled_text_depends_on_seed_prompt_and_sample(decoder, prompts):
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, samples=3, seed=7)
    together = generate(decoder, prompts, sampling, text_of, 32)
    assert len({generation.text for row in together for generation in row}) > 10
    assert generate(decoder, prompts, replace(sampling, seed=8), text_of, 32) != together
    fewer = generate(decoder, prompts, replace(sampling, samples=2), text_of, 32)
    assert fewer == [row[:2] for row in together]


@pytest.fixture(scope="module")
def texts_alone(decoder, prompts):
    """The text of each prompt and sample with nothing else beside it."""

    def of(sampling):
        return [generate(decoder, [prompt], sampling, text_of, 1)[0] for prompt in prompts]

    greedy = Sampling(max_new_tokens=20)
    sampled = Sampling(max_new_tokens=20, temperature=1.0, top_k=20, top_p=0.95, samples=2, seed=7)
    return {settings: of(settings) for settings in (greedy, sampled)}


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_text_does_not_depend_on_the_slots_or_on_what_else_is_in_the_batch(decoder, prompts, texts_alone, data):
    """In fp32 no two of these scores are so close that another shape's rounding could swap them."""
    sampling = data.draw(st.sampled_from(list(texts_alone)))
    chosen = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=9))
    slots = data.draw(st.sampled_from([1, 2, 5, 32]))
    found = generate(decoder, [prompts[i] for i in chosen], sampling, text_of, slots)
    assert found == [texts_alone[sampling][i] for i in chosen]


def test_a_stop_string_ends_the_text_and_is_cut_off(decoder, prompts):
    whole = [row[0] for row in generate(decoder, prompts, Sampling(max_new_tokens=19), text_of, 32)]
    index = max(range(5), key=lambda i: len(set(whole[i].tokens)))
    stop = whole[index].text[5:7]
    cut = generate(decoder, prompts, Sampling(max_new_tokens=19, stop=("~", stop)), text_of, 32)[index][0]
    place = whole[index].text.index(stop)
    assert cut.text == whole[index].text[:place]
    assert cut.tokens == whole[index].tokens[: place + 2]
    assert (cut.finish, cut.stopped, whole[index].stopped) == ("stop", stop, "")


def test_a_prompt_that_does_not_fit_the_context_is_named(decoder, prompts):
    with pytest.raises(UserError, match="prompt 1: 150 tokens and 19 new ones do not fit the model's context of 160"):
        generate(decoder, [prompts[0], [1] * 150], Sampling(max_new_tokens=19), text_of, 32)


def test_no_prompts_give_no_generations(decoder):
    assert generate(decoder, [], Sampling(), text_of, 32) == []


def kept_by_warpers(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k and top-p, token by token."""
    probabilities = np.exp(logits / temperature - np.logaddexp.reduce(logits / temperature))
    order = np.argsort(-probabilities, kind="stable")
    if top_k:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    probabilities[order[count:]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(("vocab", "temperature", "top_k", "top_p"), [
    (12, 0.7, 0, 1.0), (12, 1.3, 4, 1.0), (12, 1.0, 0, 0.8), (12, 1.0, 6, 0.7), (300, 1.0, 0, 1.0), (300, 2.0, 0, 0.9),
])  # fmt: skip
def test_samples_have_the_probabilities_the_filters_leave(vocab, temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal(vocab) * 2
    count = 20_000
    uniform = (np.arange(count) + 0.5) / count  # a grid, so that frequencies are exact to 1/count
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, vocab))
    tokens = sample_tokens(rows, jnp.asarray(uniform, jnp.float32), temperature=temperature, top_k=top_k, top_p=top_p)
    frequencies = np.bincount(np.asarray(tokens), minlength=vocab) / count
    np.testing.assert_allclose(frequencies, kept_by_warpers(logits, temperature, top_k, top_p), atol=2e-4)


def test_of_several_likeliest_tokens_the_first_is_taken():
    logits = np.random.default_rng(0).integers(0, 3, (50, 40)).astype(np.float32)
    logits[:2] = [[-np.inf] * 40, [0.0] * 40]
    found = sample_tokens(jnp.asarray(logits), jnp.zeros(50), temperature=0)
    assert found.tolist() == logits.argmax(-1).tolist()


def test_logprobs_of_continuations_are_those_of_the_whole_text_in_the_order_given(model, prompts, scores):
    random = np.random.default_rng(2)
    asked = [
        Continuation(tuple(prompts[i]), tuple(random.integers(1, 31, length).tolist()))
        for i, length in ((0, 3), (1, 9), (0, 5), (4, 1), (0, 2))
    ]
    got = Scorer(model).logprobs(asked, batch_size=4)
    for continuation, logprobs in zip(asked, got, strict=True):
        text = [*continuation.prompt, *continuation.completion]
        before = len(continuation.prompt)
        rows = scores(text)[before - 1 : -1].astype(np.float64)
        expected = rows[np.arange(len(rows)), text[before:]] - np.logaddexp.reduce(rows, axis=-1)
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, expected, atol=2e-4)


def test_logprobs_refuse_an_empty_prompt_and_a_text_beyond_the_context(model):
    with pytest.raises(UserError, match="continuation 1: its prompt is empty"):
        Scorer(model).logprobs([Continuation((1,), (2,)), Continuation((), (2,))], 4)
    with pytest.raises(UserError, match="continuation 0: prompt of 159 and completion of 2 tokens"):
        Scorer(model).logprobs([Continuation((1,) * 159, (2, 3))], 4)
