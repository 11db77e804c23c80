"""How a token is chosen, how a text is continued past the context, and which part of it may be shown."""

import itertools
import math

import pytest
import torch

from common.tokenizer import byte_tokenizer
from model import GPT, GPTConfig
from sample import TextStream, generate, sample_next_token

EOT = 256  # <|endoftext|> of the byte tokenizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(logits, count=20_000, **how):
    """Token ids chosen `count` times from one row of logits (V,)."""
    return sample_next_token(logits.expand(count, -1), generator=seeded(), **how)


def softmax(logits, temperature=1.0):
    """By hand, in float64."""
    powers = [math.exp(v / temperature) for v in logits.tolist()]
    return [p / sum(powers) for p in powers]


# choose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{"temperature": 0, "top_k": 3, "top_p": 0.5}, {"temperature": 5.0, "top_k": 1}]
)
def test_temperature_0_and_top_k_1_take_the_likeliest(how):
    logits = torch.randn(50, 31, generator=seeded())
    likeliest = [max(range(31), key=row.__getitem__) for row in logits.tolist()]
    assert sample_next_token(logits, **how).tolist() == likeliest


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_token_is_chosen_for_each_row_from_its_own_logits(how):
    logits = torch.full((4, 9), -torch.inf)
    logits[range(4), [3, 8, 0, 5]] = 0
    ids = sample_next_token(logits, **how)
    assert ids.tolist() == [3, 8, 0, 5] and ids.dtype == torch.int64


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 8), (1.0, 8), (2.0, 8), (1.0, 3)])
def test_draws_follow_the_softmax_over_temperature_among_the_top_k(temperature, top_k):
    logits = torch.randn(8, generator=seeded(1))
    shares = draws(logits, temperature=temperature, top_k=top_k).bincount(minlength=8) / 20_000
    p = softmax(logits, temperature)
    kept = sorted(p)[-top_k:]
    assert shares.tolist() == pytest.approx(
        [v / sum(kept) if v in kept else 0 for v in p], abs=0.02
    )


@pytest.mark.parametrize("top_k", [1, 5, 11, 12, 100])
def test_top_k_draws_all_of_the_k_likeliest_and_no_others(top_k):
    for seed in range(5):
        logits = torch.randn(12, generator=seeded(seed)) / 2
        likeliest = sorted(range(12), key=lambda id: -logits[id])[:top_k]
        assert set(draws(logits, top_k=top_k).tolist()) == set(likeliest)


def nucleus(probabilities, top_p):
    """The fewest of the likeliest ids that together have top_p."""
    kept, together = set(), 0.0
    for id in sorted(range(len(probabilities)), key=lambda id: -probabilities[id]):
        if together < top_p:
            kept.add(id)
        together += probabilities[id]
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_top_p_draws_the_smallest_set_that_reaches_p_and_no_others(top_p):
    for seed in range(10):
        logits = torch.randn(12, generator=seeded(seed))
        assert set(draws(logits, top_p=top_p).tolist()) == nucleus(softmax(logits), top_p)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3)])
def test_top_p_keeps_the_token_that_crosses_p_and_none_after_p_is_reached(top_p, kept):
    assert len(set(draws(torch.zeros(4), top_p=top_p).tolist())) == kept


# The squares of 4, 3, 2, 1 are as 16, 9, 4, 1; the two likeliest have 4/7 and 3/7 of each other.
@pytest.mark.parametrize(
    ("how", "ids"),
    [({"temperature": 0.5, "top_p": 0.8}, {0, 1}), ({"top_k": 2, "top_p": 0.56}, {0})],
)
def test_top_p_applies_after_temperature_and_top_k(how, ids):
    assert set(draws(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), **how).tolist()) == ids


def test_top_p_of_each_row_is_its_own():
    flat, peaked = torch.zeros(4), torch.tensor([9.0, 0, 0, 0])
    ids = sample_next_token(torch.stack([flat, peaked] * 500), top_p=0.9, generator=seeded())
    assert set(ids[::2].tolist()) == {0, 1, 2, 3} and set(ids[1::2].tolist()) == {0}


def test_the_generator_alone_decides_the_draws():
    logits, drawn = torch.randn(200, 31, generator=seeded()), []
    for global_seed, seed in [(1, 3), (2, 3), (1, 4)]:
        torch.manual_seed(global_seed)
        drawn.append(sample_next_token(logits, generator=seeded(seed)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_choosing_leaves_the_logits_as_they_were():
    logits = torch.randn(3, 31, generator=seeded())
    before = logits.clone()
    sample_next_token(logits, temperature=0.5, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


# generate -------------------------------------------------------------------------------------


@pytest.fixture(params=[16, 15, 1], ids=lambda block_size: f"block_size={block_size}")
def model(request):
    """Random weights so large that each token depends on those before it."""
    return vivid(request.param)


def vivid(block_size, vocab_size=61):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def prompt(length):
    return torch.randint(61, (1, length), generator=seeded(5))


def generated(model, idx, count, **how):
    """The new tokens (num_samples, count)."""
    return torch.stack(list(generate(model, idx, count, **how)), dim=1)


@torch.no_grad()
def by_full_forwards(model, text, count):
    """Greedy, without cache: where the context would pass block_size, it becomes the last half of the text."""
    text = text[0].tolist()
    context, new = list(text), []
    for _ in range(count):
        if len(context) > model.config.block_size:
            context = text[-max(1, model.config.block_size // 2) :]
        new.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context.append(new[-1])
        text.append(new[-1])
    return new


@pytest.mark.parametrize("length", [1, 7, 16])
def test_past_block_size_the_last_half_becomes_the_prompt_anew(model, length):
    length = min(length, model.config.block_size)
    new = generated(model, prompt(length), 50, temperature=0)
    assert new.tolist() == [by_full_forwards(model, prompt(length), 50)]


def test_past_block_size_every_row_goes_on_with_its_own_text(monkeypatch):
    model, seen = vivid(16), []
    monkeypatch.setattr(
        "sample.sample_next_token", lambda logits, **how: seen.append(logits) or sample_next_token(logits, **how)
    )
    new = generated(model, prompt(4), 14, num_samples=3, generator=seeded())
    text = torch.cat([prompt(4).expand(3, -1), new], dim=1)
    with torch.no_grad():  # 13 new tokens make a text of 17
        torch.testing.assert_close(seen[13], model(text[:, 9:17])[:, -1], atol=1e-5, rtol=1e-4)


def test_greedy_rows_are_equal_however_many(model):
    one = generated(model, prompt(1), 40, temperature=0)
    assert torch.equal(
        generated(model, prompt(1), 40, num_samples=4, temperature=0), one.expand(4, -1)
    )


def test_sampled_rows_differ_and_the_seed_decides_them():
    a, b = (
        generated(vivid(16), prompt(4), 40, num_samples=5, generator=seeded(7)) for _ in range(2)
    )
    assert torch.equal(a, b) and len({tuple(row[:10]) for row in a.tolist()}) == 5


@pytest.mark.parametrize("count", [1, 12, 13, 40])
def test_as_many_tokens_are_made_as_were_asked_for(count):
    assert generated(vivid(16), prompt(4), count).shape == (1, count)


@pytest.mark.parametrize(
    ("count", "times"), [(13, 0), (14, 1), (100, 1)]
)  # the last token is made, but not read
def test_passing_block_size_is_told_once_and_just_filling_it_is_not(count, times):
    told = []
    generated(vivid(16), prompt(4), count, on_overflow=told.append)
    assert len(told) == times and all("block_size=16" in note and "8" in note for note in told)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_ids_are_never_chosen(temperature):
    model = vivid(16)
    unlimited = generated(
        model, prompt(4), 60, num_samples=8, temperature=temperature, generator=seeded()
    )
    limited = generated(
        model,
        prompt(4),
        60,
        num_samples=8,
        temperature=temperature,
        generator=seeded(),
        vocab_size=20,
    )
    assert unlimited.max() >= 20 > limited.max()


@pytest.mark.parametrize(("length", "message"), [(0, "no tokens"), (17, r"17.*16")])
def test_a_prompt_empty_or_longer_than_the_context_is_refused(length, message):
    with pytest.raises(ValueError, match=message):
        generated(vivid(16), prompt(length), 5)


# Sample ---------------------------------------------------------------------------------------


class Pieces(list):
    """A tokenizer of these tokens, without <|endoftext|>."""

    eot_token = None
    decode_single_token_bytes = list.__getitem__


def fed(ids, stop=None, tokenizer=None):
    """A sample that took these tokens, one by one (of bytes: their ids), and its text after each."""
    sample = TextStream(tokenizer or byte_tokenizer(), stop)
    return sample, list(itertools.accumulate(sample.add(id) for id in ids))


def test_text_is_shown_as_soon_as_its_characters_are_whole():
    assert fed("aé€😀".encode())[1] == [
        "a",
        "a",
        "aé",
        "aé",
        "aé",
        "aé€",
        "aé€",
        "aé€",
        "aé€",
        "aé€😀",
    ]


def test_bytes_that_are_no_text_become_the_replacement_character():
    assert fed(b"a\xffb")[1][-1] == "a\ufffdb"


def test_a_character_left_unfinished_at_the_end_becomes_the_replacement_character():
    sample, texts = fed("a€".encode()[:-1])
    assert texts[-1] + sample.finish() == "a\ufffd"


def test_a_character_left_unfinished_at_endoftext_becomes_the_replacement_character():
    assert fed([*"a€".encode()[:-1], EOT])[1][-1] == "a\ufffd"


@pytest.mark.parametrize(
    ("content", "stop", "text"), [("one END two", "END", "one "), ("für € und", "€", "für ")]
)
def test_a_stop_string_of_several_tokens_ends_the_sample(content, stop, text):
    sample, texts = fed(content.encode(), stop)
    assert sample.done and texts[-1] == text


def test_a_stop_string_within_one_token_ends_the_sample():
    sample, texts = fed([0, 1], "D.", Pieces([b"one EN", b"D. two"]))
    assert sample.done and texts[-1] == "one EN"


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
    assert fed(content, stop)[1] == shown


@pytest.mark.parametrize("stop", ["\n\n", "aab", "aba", "é", "abcabd"])
def test_however_it_is_cut_into_tokens_a_text_ends_before_the_first_stop_string(stop):
    for seed in range(30):
        text = "".join("ab\né"[i] for i in torch.randint(4, (30,), generator=seeded(seed)))
        sample, texts = fed(text.encode(), stop)
        assert texts[-1] + sample.finish() == text.partition(stop)[0]


def test_what_was_held_back_is_text_when_the_sample_ends_otherwise():
    sample, texts = fed(b"a EN", stop="END")
    assert texts[-1] + sample.finish() == "a EN"


@pytest.mark.parametrize("end", [[EOT], [*b"END"]], ids=["endoftext", "stop string"])
def test_the_end_is_not_shown_and_tokens_after_it_are_ignored(end):
    sample, texts = fed([*b"ab", *end, *b"cd"], stop="END")
    assert sample.done and texts[-1] + sample.finish() == "ab"


def test_endoftext_ends_one_row_only():
    rows, texts = [TextStream(byte_tokenizer(), None) for _ in range(2)], ["", ""]
    for tokens in zip([*b"a", EOT, *b"bc"], b"wxyz", strict=True):
        texts = [text + row.add(id) for text, row, id in zip(texts, rows, tokens, strict=True)]
    assert list(zip(texts, [row.done for row in rows], strict=True)) == [
        ("a", True),
        ("wxyz", False),
    ]


def test_a_tokenizer_without_endoftext_never_ends_a_sample():
    sample, texts = fed([0, 1, 0], tokenizer=Pieces([b"a", b"b"]))
    assert (texts[-1], sample.done) == ("aba", False)
