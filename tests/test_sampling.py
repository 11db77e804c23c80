"""How a token is chosen, how a text is continued past the context, and which part of it may be shown."""

import itertools
import math

import pytest
import torch

from model import GPT, GPTConfig
from sample import Sample, choose, generate
from tokenizer import byte_tokenizer

EOT = 256  # <|endoftext|> of the byte tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small lose most of the time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(logits, count=20_000, **how):
    """Token ids chosen `count` times from one row of logits (V,)."""
    return choose(logits.expand(count, -1), generator=seeded(), **how)


def softmax(logits, temperature=1.0):
    """By hand, in float64."""
    powers = [math.exp(v / temperature) for v in logits.tolist()]
    return [p / sum(powers) for p in powers]


# choose ---------------------------------------------------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(50, 31, generator=seeded())
    likeliest = [max(range(31), key=row.__getitem__) for row in logits.tolist()]
    assert choose(logits, temperature=0, top_k=3, top_p=0.5).tolist() == likeliest


def test_top_k_1_takes_the_likeliest():
    logits = torch.randn(50, 31, generator=seeded())
    assert torch.equal(choose(logits, temperature=5.0, top_k=1), logits.argmax(dim=1))


@pytest.mark.parametrize("how", [{}, {"top_k": 4}, {"top_p": 0.5}])
def test_a_token_is_chosen_for_each_row(how):
    ids = choose(torch.randn(5, 31, generator=seeded()), **how)
    assert (ids.shape, ids.dtype) == ((5,), torch.int64)


def test_each_row_is_chosen_from_its_own_logits():
    logits = torch.full((4, 9), -torch.inf)
    for row, id in enumerate([3, 8, 0, 5]):
        logits[row, id] = 0
    assert choose(logits, top_k=5, top_p=0.9).tolist() == [3, 8, 0, 5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_many_draws_are_distributed_as_softmax_of_logits_over_temperature(temperature):
    logits = torch.randn(8, generator=seeded(1))
    shares = draws(logits, temperature=temperature).bincount(minlength=8) / 20_000
    assert shares.tolist() == pytest.approx(softmax(logits, temperature), abs=0.02)


@pytest.mark.parametrize("top_k", [1, 2, 5, 11, 12, 100])
def test_top_k_draws_all_of_the_k_likeliest_and_no_others(top_k):
    for seed in range(5):
        logits = torch.randn(12, generator=seeded(seed)) / 2
        likeliest = sorted(range(12), key=lambda id: -logits[id])[:top_k]
        assert set(draws(logits, top_k=top_k).tolist()) == set(likeliest)


def test_top_k_keeps_the_proportions_of_the_k_likeliest():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    p = softmax(logits)
    kept = p[1] + p[4] + p[2]
    shares = draws(logits, top_k=3).bincount(minlength=5) / 20_000
    assert shares.tolist() == pytest.approx([0, p[1] / kept, p[2] / kept, 0, p[4] / kept], abs=0.02)


def nucleus(probabilities, top_p):
    """The fewest of the likeliest ids that together have top_p."""
    ids = sorted(range(len(probabilities)), key=lambda id: -probabilities[id])
    return next(set(ids[:n]) for n in range(1, len(ids) + 1) if n == len(ids) or total(probabilities, ids[:n]) >= top_p)


def total(probabilities, ids):
    return sum(probabilities[id] for id in ids)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_top_p_draws_the_smallest_set_that_reaches_p_and_no_others(top_p):
    for seed in range(10):
        logits = torch.randn(12, generator=seeded(seed))
        assert set(draws(logits, top_p=top_p).tolist()) == nucleus(softmax(logits), top_p)


def test_top_p_keeps_the_token_that_crosses_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits, top_p=0.5).tolist()) == {0, 1}


def test_top_p_applies_after_temperature():
    logits = torch.randn(12, generator=seeded(1))
    assert set(draws(logits, temperature=0.5, top_p=0.8).tolist()) == nucleus(softmax(logits, 0.5), 0.8)


def test_top_p_applies_among_the_top_k():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()  # the two likeliest have 4/7 and 3/7 of each other
    assert set(draws(logits, top_k=2, top_p=0.56).tolist()) == {0}


def test_top_p_of_each_row_is_its_own():
    flat, peaked = torch.zeros(4), torch.tensor([9.0, 0, 0, 0])
    ids = choose(torch.stack([flat, peaked] * 500), top_p=0.9, generator=seeded())
    assert set(ids[::2].tolist()) == {0, 1, 2, 3} and set(ids[1::2].tolist()) == {0}


def test_the_same_generator_seed_gives_the_same_draws():
    logits = torch.randn(200, 31, generator=seeded())
    assert torch.equal(choose(logits, generator=seeded(3)), choose(logits, generator=seeded(3)))


def test_another_generator_seed_gives_other_draws():
    logits = torch.randn(200, 31, generator=seeded())
    assert not torch.equal(choose(logits, generator=seeded(3)), choose(logits, generator=seeded(4)))


def test_a_generator_s_draws_do_not_depend_on_the_global_seed():
    logits = torch.randn(200, 31, generator=seeded())
    a, b = (torch.manual_seed(seed) and choose(logits, generator=seeded(3)) for seed in (1, 2))
    assert torch.equal(a, b)


def test_choosing_leaves_the_logits_as_they_were():
    logits = torch.randn(3, 31, generator=seeded())
    before = logits.clone()
    choose(logits, temperature=0.5, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


# generate -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[16, 15, 1], ids=lambda block_size: f"block_size={block_size}")
def model(request):
    """Random weights so large that each token depends on those before it."""
    return vivid(request.param)


def vivid(block_size, vocab_size=61):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16)).eval()
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
    monkeypatch.setattr("sample.choose", lambda logits, **how: seen.append(logits) or choose(logits, **how))
    new = generated(model, prompt(4), 14, num_samples=3, generator=seeded())
    text = torch.cat([prompt(4).expand(3, -1), new], dim=1)
    with torch.no_grad():  # 13 new tokens make a text of 17
        torch.testing.assert_close(seen[13], model(text[:, 9:17])[:, -1], atol=1e-5, rtol=1e-4)


def test_greedy_rows_are_equal_however_many(model):
    one = generated(model, prompt(1), 40, temperature=0)
    assert torch.equal(generated(model, prompt(1), 40, num_samples=4, temperature=0), one.expand(4, -1))


def test_sampled_rows_differ():
    rows = generated(vivid(16), prompt(4), 10, num_samples=5, generator=seeded())
    assert len({tuple(row) for row in rows.tolist()}) == 5


def test_the_same_seed_gives_the_same_text():
    a, b = (generated(vivid(16), prompt(4), 40, num_samples=3, generator=seeded(7)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 12, 13, 40])
def test_as_many_tokens_are_made_as_were_asked_for(count):
    assert generated(vivid(16), prompt(4), count).shape == (1, count)


def test_passing_block_size_is_told_once():
    told = []
    generated(vivid(16), prompt(4), 100, note=told.append)
    assert len(told) == 1 and "block_size=16" in told[0] and "8" in told[0]


def test_a_text_that_just_fills_the_context_is_not_told_of():
    told = []
    generated(vivid(16), prompt(4), 13, note=told.append)  # the last token is made, but not read
    assert told == []


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_ids_are_never_chosen(temperature):
    model = vivid(16)
    unlimited = generated(model, prompt(4), 60, num_samples=8, temperature=temperature, generator=seeded())
    limited = generated(model, prompt(4), 60, num_samples=8, temperature=temperature, generator=seeded(), vocab_size=20)
    assert unlimited.max() >= 20 > limited.max()


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError):
        generated(vivid(16), prompt(0), 5)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"17.*16"):
        generated(vivid(16), prompt(17), 5)


# Sample ---------------------------------------------------------------------------------------------------------------


def fed(content, stop=None):
    """A sample that took these bytes as tokens, one by one, and what it showed after each."""
    sample = Sample(byte_tokenizer(), stop)
    shown = []
    for id in content:
        sample.add(id)
        shown.append(sample.shown())
    return sample, shown


def test_text_is_shown_as_it_comes():
    assert fed(b"abc")[1] == ["a", "ab", "abc"]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    assert fed("aé€😀".encode())[1] == ["a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀"]


def test_bytes_that_are_no_text_become_the_replacement_character():
    assert fed(b"a\xffb")[0].text == "a\ufffdb"


def test_a_character_left_unfinished_at_the_end_becomes_the_replacement_character():
    sample, _ = fed("a€".encode()[:-1])
    sample.finish()
    assert sample.text == "a\ufffd"


def test_a_character_left_unfinished_at_endoftext_becomes_the_replacement_character():
    assert fed([*"a€".encode()[:-1], EOT])[0].text == "a\ufffd"


def test_a_stop_string_of_several_tokens_ends_the_sample():
    sample, _ = fed(b"one END two", stop="END")
    assert sample.done and sample.text == "one "


def test_a_stop_string_within_one_token_ends_the_sample():
    class Words:
        eot_token = None

        def decode_single_token_bytes(self, id):
            return [b"one EN", b"D. two"][id]

    sample = Sample(Words(), "D.")
    sample.add(0)
    sample.add(1)
    assert sample.done and sample.text == "one EN"


def test_what_may_become_the_stop_string_is_held_back():
    assert fed(b"a EN ENDx", stop="END")[1] == ["a", "a ", "a ", "a ", "a EN ", "a EN ", "a EN ", "a EN ", "a EN "]


def test_the_longest_end_that_may_become_the_stop_string_is_held_back():
    assert fed(b"xaab", stop="aab")[1] == ["x", "x", "x", "x"]


def test_an_end_that_no_longer_becomes_the_stop_string_is_shown_but_for_its_own_end():
    assert fed(b"aaa", stop="aab")[1] == ["", "", "a"]


@pytest.mark.parametrize("stop", ["\n\n", "aab", "aba", "é", "abcabd"])
def test_what_was_shown_is_never_taken_back(stop):
    ids = torch.randint(4, (300,), generator=seeded()).tolist()
    _, shown = fed("".join("ab\né"[i] for i in ids).encode(), stop)
    assert all(after.startswith(before) for before, after in itertools.pairwise(shown))


def test_what_was_held_back_is_text_when_the_sample_ends_otherwise():
    sample, _ = fed(b"a EN", stop="END")
    sample.finish()
    assert sample.shown() == "a EN"


def test_a_stop_string_of_characters_of_several_tokens_ends_the_sample():
    sample, _ = fed("für € und".encode(), stop="€")
    assert sample.done and sample.text == "für "


def test_without_a_stop_string_nothing_is_held_back():
    assert fed(b"END")[0].shown() == "END"


def test_endoftext_ends_the_sample_and_is_not_shown():
    sample, _ = fed([*b"ab", EOT])
    assert sample.done and sample.text == "ab"


@pytest.mark.parametrize("end", [[EOT], [*b"END"]], ids=["endoftext", "stop string"])
def test_tokens_after_the_end_are_ignored(end):
    assert fed([*b"ab", *end, *b"cd"], stop="END")[0].text == "ab"


def test_endoftext_ends_one_row_only():
    rows = [Sample(byte_tokenizer(), None) for _ in range(2)]
    for tokens in zip([*b"a", EOT, *b"bc"], b"wxyz", strict=True):
        for sample, id in zip(rows, tokens, strict=True):
            sample.add(id)
    assert [(sample.text, sample.done) for sample in rows] == [("a", True), ("wxyz", False)]


def test_a_tokenizer_without_endoftext_never_ends_a_sample():
    class Letters:
        eot_token = None

        def decode_single_token_bytes(self, id):
            return b"ab"[id : id + 1]

    sample = Sample(Letters(), None)
    for id in (0, 1, 0):
        sample.add(id)
    assert (sample.text, sample.done) == ("aba", False)
