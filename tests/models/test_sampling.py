"""sample.py: how a token is sampled and a text is continued past block_size. Also TextStream."""

import itertools
import math
import re

import pytest
import torch
from variants import MODELS, make_vivid

import model as gpt2
from common.models import model_module
from common.tokenizer import TextStream, byte_tokenizer
from sample import generate, sample_next_token

EOT = 256  # <|endoftext|> of the byte tokenizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(logits, count=20_000, **sampling):
    """Return token ids sampled `count` times from one row of logits (V,)."""
    return sample_next_token(logits.expand(count, -1), generator=seeded(), **sampling)


def softmax(logits, temperature=1.0):
    """Return the probabilities, computed with Python floats."""
    powers = [math.exp(value / temperature) for value in logits.tolist()]
    return [power / sum(powers) for power in powers]


# sample_next_token ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0, "top_k": 3, "top_p": 0.5}, {"temperature": 5.0, "top_k": 1}]
)
def test_temperature_0_and_top_k_1_take_the_likeliest_token(sampling):
    logits = torch.randn(50, 31, generator=seeded())
    likeliest = [max(range(31), key=row.__getitem__) for row in logits.tolist()]
    assert sample_next_token(logits, **sampling).tolist() == likeliest


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_the_token_of_each_row_is_sampled_from_its_own_logits(sampling):
    logits = torch.full((4, 9), -torch.inf)
    logits[range(4), [3, 8, 0, 5]] = 0
    ids = sample_next_token(logits, **sampling)
    assert ids.tolist() == [3, 8, 0, 5]
    assert ids.dtype == torch.int64


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 8), (1.0, 8), (2.0, 8), (1.0, 3)])
def test_draws_follow_the_softmax_over_temperature_among_the_top_k(temperature, top_k):
    logits = torch.randn(8, generator=seeded(1))
    ids = draws(logits, temperature=temperature, top_k=top_k)
    frequencies = ids.bincount(minlength=8) / 20_000
    probabilities = softmax(logits, temperature)
    kept = sorted(probabilities)[-top_k:]
    expected = [value / sum(kept) if value in kept else 0 for value in probabilities]
    assert frequencies.tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("top_k", [1, 5, 11, 12, 100])
def test_top_k_draws_all_of_the_k_likeliest_and_no_others(top_k):
    for seed in range(5):
        logits = torch.randn(12, generator=seeded(seed)) / 2
        likeliest = sorted(range(12), key=logits.tolist().__getitem__)[-top_k:]
        assert set(draws(logits, top_k=top_k).tolist()) == set(likeliest)


def nucleus(probabilities, top_p):
    """Return the smallest set of the likeliest ids whose total probability reaches top_p."""
    kept = set()
    total = 0.0
    for token_id in sorted(range(len(probabilities)), key=probabilities.__getitem__, reverse=True):
        if total < top_p:
            kept.add(token_id)
        total += probabilities[token_id]
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_top_p_draws_the_smallest_set_that_reaches_p_and_no_others(top_p):
    for seed in range(10):
        logits = torch.randn(12, generator=seeded(seed))
        assert set(draws(logits, top_p=top_p).tolist()) == nucleus(softmax(logits), top_p)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3)])
def test_top_p_keeps_the_token_that_crosses_p_and_none_after_p_is_reached(top_p, kept):
    assert len(set(draws(torch.zeros(4), top_p=top_p).tolist())) == kept


# At temperature 0.5 the probabilities 4, 3, 2, 1 become 16, 9, 4, 1; the two likeliest alone have
# 4/7 and 3/7 of their total.
@pytest.mark.parametrize(
    ("sampling", "ids"),
    [({"temperature": 0.5, "top_p": 0.8}, {0, 1}), ({"top_k": 2, "top_p": 0.56}, {0})],
)
def test_top_p_applies_after_temperature_and_top_k(sampling, ids):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits, **sampling).tolist()) == ids


def test_top_p_applies_to_each_row_on_its_own():
    flat = torch.zeros(4)
    peaked = torch.tensor([9.0, 0, 0, 0])
    ids = sample_next_token(torch.stack([flat, peaked] * 500), top_p=0.9, generator=seeded())
    assert set(ids[::2].tolist()) == {0, 1, 2, 3}
    assert set(ids[1::2].tolist()) == {0}


def test_the_seed_of_the_generator_alone_determines_the_draws():
    logits = torch.randn(200, 31, generator=seeded())
    drawn = []
    for global_seed, seed in [(1, 3), (2, 3), (1, 4)]:
        torch.manual_seed(global_seed)
        drawn.append(sample_next_token(logits, generator=seeded(seed)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_sampling_leaves_the_logits_as_they_were():
    logits = torch.randn(3, 31, generator=seeded())
    before = logits.clone()
    sample_next_token(logits, temperature=0.5, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


# generate -------------------------------------------------------------------------------------


@pytest.fixture(params=[16, 15, 1], ids=lambda block_size: f"block_size={block_size}")
def model(request):
    return make_vivid(gpt2, block_size=request.param)


def prompt(length):
    return torch.randint(61, (1, length), generator=seeded(5))


def generated(model, idx, count, **options):
    """Return the new tokens (num_samples, count)."""
    return torch.stack(list(generate(model, idx, count, **options)), dim=1)


@torch.no_grad()
def greedy_by_full_forwards(model, idx, count):
    """Return greedy tokens, each by a forward pass without a cache.

    Where the context would exceed block_size, the last half of block_size becomes the context.
    """
    text = idx[0].tolist()
    context = list(text)
    new_tokens = []
    for _ in range(count):
        if len(context) > model.config.block_size:
            context = text[-max(1, model.config.block_size // 2) :]
        token = model(torch.tensor([context]))[0, -1].argmax().item()
        context.append(token)
        text.append(token)
        new_tokens.append(token)
    return new_tokens


@pytest.mark.parametrize("length", [1, 7, 16])
def test_past_block_size_the_last_half_becomes_the_prompt(model, length):
    length = min(length, model.config.block_size)
    new = generated(model, prompt(length), 50, temperature=0)
    assert new.tolist() == [greedy_by_full_forwards(model, prompt(length), 50)]


def test_past_block_size_every_row_continues_its_own_text(monkeypatch):
    model = make_vivid(gpt2)
    received = []

    def recording_sample(logits, **sampling):
        received.append(logits)
        return sample_next_token(logits, **sampling)

    monkeypatch.setattr("sample.sample_next_token", recording_sample)
    new = generated(model, prompt(4), 14, num_samples=3, generator=seeded())
    text = torch.cat([prompt(4).expand(3, -1), new], dim=1)
    with torch.no_grad():  # 13 new tokens make a text of 17
        expected = model(text[:, 9:17])[:, -1]
    torch.testing.assert_close(received[13], expected, atol=1e-5, rtol=1e-4)


def test_greedy_rows_are_equal_for_any_number_of_samples(model):
    one = generated(model, prompt(1), 40, temperature=0)
    four = generated(model, prompt(1), 40, num_samples=4, temperature=0)
    assert torch.equal(four, one.expand(4, -1))


def test_the_same_seed_gives_the_same_rows():
    first = generated(make_vivid(gpt2), prompt(4), 40, num_samples=5, generator=seeded(7))
    second = generated(make_vivid(gpt2), prompt(4), 40, num_samples=5, generator=seeded(7))
    assert torch.equal(first, second)


def test_sampled_rows_differ():
    rows = generated(make_vivid(gpt2), prompt(4), 40, num_samples=5, generator=seeded(7))
    assert len({tuple(row[:10]) for row in rows.tolist()}) == 5


@pytest.mark.parametrize("count", [1, 12, 13, 40])
def test_as_many_tokens_are_generated_as_the_caller_asks_for(count):
    assert generated(make_vivid(gpt2), prompt(4), count).shape == (1, count)


def overflows(count):
    """Return the sentences of on_overflow for this number of new tokens after a prompt of 4."""
    sentences = []
    generated(make_vivid(gpt2), prompt(4), count, on_overflow=sentences.append)
    return sentences


def test_a_text_that_just_fills_block_size_does_not_overflow():
    assert overflows(13) == []  # the last token is generated, but not processed


@pytest.mark.parametrize("count", [14, 100])
def test_passing_block_size_is_reported_once_with_block_size_and_its_half(count):
    sentences = overflows(count)
    assert len(sentences) == 1
    assert "block_size=16" in sentences[0]
    assert re.search(r"\b8\b", sentences[0])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_ids_are_never_sampled(temperature):
    model = make_vivid(gpt2)
    options = {"num_samples": 8, "temperature": temperature}
    unlimited = generated(model, prompt(4), 60, **options, generator=seeded())
    limited = generated(model, prompt(4), 60, **options, generator=seeded(), vocab_size=20)
    assert unlimited.max() >= 20 > limited.max()


@pytest.mark.parametrize("name", MODELS)
def test_by_default_no_model_samples_the_padding_that_load_model_knows(name):
    model = make_vivid(model_module(name))
    options = {"num_samples": 8, "temperature": 3.0, "generator": seeded()}
    assert generated(model, prompt(4), 60, **options).max() >= 20  # decoding passes the window
    model.n_vocab = 20
    assert generated(model, prompt(4), 60, **options).max() < 20


def test_an_empty_prompt_of_ids_begins_a_document_of_a_loaded_model():
    model = make_vivid(gpt2)
    model.start_token = 7
    begun = generated(model, torch.tensor([[7]]), 5, temperature=0)
    assert torch.equal(generated(model, prompt(0), 5, temperature=0), begun)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_an_empty_prompt_may_have_any_dtype(dtype):
    model = make_vivid(gpt2)
    model.start_token = 7
    begun = generated(model, torch.tensor([[7]]), 5, temperature=0)
    empty = torch.zeros(1, 0, dtype=dtype)
    assert torch.equal(generated(model, empty, 5, temperature=0), begun)


def test_a_prompt_of_several_rows_is_refused():
    with pytest.raises(ValueError, match="2 rows"):
        generated(make_vivid(gpt2), prompt(4).expand(2, -1), 5)


def test_an_empty_prompt_is_refused_by_a_model_without_a_start_token():
    with pytest.raises(ValueError, match="prompt"):
        generated(make_vivid(gpt2), prompt(0), 5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("num_samples", 0),
        ("max_new_tokens", 0),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option, value):
    options = {"max_new_tokens": 5, option: value}
    with pytest.raises(ValueError, match=option) as error:
        next(generate(make_vivid(gpt2), prompt(4), **options))
    assert f"{option}={value}" in str(error.value)
    assert ("None" in str(error.value)) == (option in ("top_k", "top_p"))


def test_an_id_beyond_the_vocabulary_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"\b61\b.*\b61\b"):
        generated(make_vivid(gpt2), torch.tensor([[3, 61]]), 5)


def test_a_prompt_longer_than_block_size_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"\b17\b.*\b16\b|\b16\b.*\b17\b"):
        generated(make_vivid(gpt2), prompt(17), 5)


# TextStream -----------------------------------------------------------------------------------


class Pieces(list):
    """A tokenizer of these tokens, without <|endoftext|>."""

    eot_token = None
    decode_single_token_bytes = list.__getitem__


def stream_of(ids, stop=None, tokenizer=None):
    """Return a stream that received these tokens (of bytes: their ids), and its text after each."""
    stream = TextStream(tokenizer or byte_tokenizer(), stop)
    pieces = [stream.add(token_id) for token_id in ids]
    return stream, list(itertools.accumulate(pieces))


def test_a_character_is_shown_as_soon_as_its_bytes_are_complete():
    _, texts = stream_of("aé€😀".encode())
    assert texts == ["a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀"]


def test_bytes_that_are_not_utf8_become_the_replacement_character():
    _, texts = stream_of(b"a\xffb")
    assert texts[-1] == "a\ufffdb"


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character():
    stream, texts = stream_of("a€".encode()[:-1])
    assert texts[-1] + stream.finish() == "a\ufffd"


def test_an_incomplete_character_before_endoftext_becomes_the_replacement_character():
    _, texts = stream_of([*"a€".encode()[:-1], EOT])
    assert texts[-1] == "a\ufffd"


@pytest.mark.parametrize(
    ("content", "stop", "text"), [("one END two", "END", "one "), ("für € und", "€", "für ")]
)
def test_a_stop_string_of_several_tokens_ends_the_sample(content, stop, text):
    stream, texts = stream_of(content.encode(), stop)
    assert stream.done
    assert texts[-1] == text


def test_a_stop_string_within_one_token_ends_the_sample():
    stream, texts = stream_of([0, 1], "D.", Pieces([b"one EN", b"D. two"]))
    assert stream.done
    assert texts[-1] == "one EN"


@pytest.mark.parametrize(
    ("content", "stop", "shown"),
    [
        (b"a EN ENDx", "END", ["a", "a ", "a ", "a ", "a EN ", "a EN ", "a EN ", "a EN ", "a EN "]),
        (b"xaab", "aab", ["x", "x", "x", "x"]),
        (b"aaa", "aab", ["", "", "a"]),
        (b"END", None, ["E", "EN", "END"]),
    ],
)
def test_the_longest_end_that_may_become_the_stop_string_is_held_back(content, stop, shown):
    _, texts = stream_of(content, stop)
    assert texts == shown


@pytest.mark.parametrize("stop", ["\n\n", "aab", "aba", "é", "abcabd"])
def test_a_text_ends_before_the_first_stop_string(stop):
    for seed in range(30):
        text = "".join("ab\né"[i] for i in torch.randint(4, (30,), generator=seeded(seed)))
        stream, texts = stream_of(text.encode(), stop)
        assert texts[-1] + stream.finish() == text.partition(stop)[0]


def test_held_back_text_is_shown_when_the_sample_ends_without_the_stop_string():
    stream, texts = stream_of(b"a EN", stop="END")
    assert texts[-1] + stream.finish() == "a EN"


@pytest.mark.parametrize("end", [[EOT], [*b"END"]], ids=["endoftext", "stop string"])
def test_the_end_is_not_shown_and_tokens_after_it_are_ignored(end):
    stream, texts = stream_of([*b"ab", *end, *b"cd"], stop="END")
    assert stream.done
    assert texts[-1] + stream.finish() == "ab"


def test_endoftext_ends_its_own_sample_only():
    ending, other = TextStream(byte_tokenizer()), TextStream(byte_tokenizer())
    ending_text = other_text = ""
    for ending_id, other_id in zip([*b"a", EOT, *b"bc"], b"wxyz", strict=True):
        ending_text += ending.add(ending_id)
        other_text += other.add(other_id)
    assert (ending_text, ending.done) == ("a", True)
    assert (other_text, other.done) == ("wxyz", False)


def test_a_tokenizer_without_endoftext_never_ends_a_sample():
    stream, texts = stream_of([0, 1, 0], tokenizer=Pieces([b"a", b"b"]))
    assert texts[-1] == "aba"
    assert not stream.done
