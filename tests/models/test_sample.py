"""sample.py as a program: prompts, stop strings, streaming, limits, text past block_size."""

import itertools
import re
import time

import conftest
import pytest
import torch
from conftest import arguments, write_dataset
from faults import Forked, needs_fork
from variants import WINDOW, make_vivid, tokens

import sample
import train
from common.errors import run_program
from common.models import model_module
from common.pretrained import load_model
from common.tokenizer import TextStream, get_tokenizer

TINY_RUN = ["--init_from=out/tiny", "--dtype=float32", "--device=cpu"]


def run(capsys, *argv):
    """Run sample.py on the tiny run; return what it printed."""
    sample.main([*TINY_RUN, *argv])
    return capsys.readouterr()


def refused(capsys, *argv):
    """Run sample.py with arguments that it must refuse; return its one line on stderr."""
    return conftest.refused(capsys, [*TINY_RUN, *argv], sample.main)


def greedy_by_full_forwards(model, ids, count):
    """Append the likeliest tokens, each by a forward pass over the whole text: no cache."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def text_of(ids):
    return bytes(ids).decode(errors="replace")


@pytest.fixture
def char_run(workdir, capsys):
    """A run, out/tiny, of the characters a and b."""
    meta = {"tokenizer": "char", "chars": ["a", "b"]}
    write_dataset(workdir / "data/char", [0, 1] * 300, [0, 1] * 300, meta)
    train.main(arguments(dataset="char", max_steps=1))
    capsys.readouterr()


def test_greedy_text_is_that_of_full_forwards(tiny_run, capsys):
    text = run(capsys, "--prompt=def ", "--temperature=0", "--max_new_tokens=12").out
    model = load_model("out/tiny")[0].eval()
    ids = greedy_by_full_forwards(model, torch.tensor([list(b"def ")]), 12)
    assert text == text_of(ids[0].tolist()) + "\n"


def test_the_same_seed_gives_the_same_text(tiny_run, capsys):
    text = run(capsys, "--seed=1", "--max_new_tokens=40").out
    assert run(capsys, "--seed=1", "--max_new_tokens=40").out == text


def test_another_seed_gives_another_text(tiny_run, capsys):
    text = run(capsys, "--seed=1", "--max_new_tokens=40").out
    assert run(capsys, "--seed=2", "--max_new_tokens=40").out != text


def test_samples_are_separated_and_all_begin_with_the_prompt(tiny_run, capsys):
    out = run(capsys, "--num_samples=3", "--prompt=def ", "--max_new_tokens=5").out
    samples = out.removesuffix("\n").split("\n---------------\n")
    assert len(samples) == 3
    assert all(text.startswith("def ") for text in samples)


def test_a_text_past_block_size_continues_and_is_reported_once(tiny_run, capsys):
    printed = run(capsys, "--prompt=def ", "--max_new_tokens=60", "--temperature=0").err
    assert printed.count("block_size=16") == 1


def test_the_number_of_tokens_and_the_speed_are_printed_to_stderr(tiny_run, capsys):
    printed = run(capsys, "--prompt=def ", "--max_new_tokens=12", "--temperature=0").err
    assert re.search(r"\[12 tokens .* tokens/s\]", printed)


def test_a_stop_string_ends_the_text_and_is_not_printed(tiny_run, capsys):
    argv = ["--prompt=def ", "--temperature=0", "--max_new_tokens=40"]
    full = run(capsys, *argv).out
    stop = full[10:12]
    stopped = run(capsys, *argv, f"--stop={stop}").out
    assert stopped == full[: full.index(stop, 4)] + "\n"


def test_an_empty_prompt_begins_a_document(tiny_run, capsys):
    model = load_model("out/tiny")[0].eval()
    ids = greedy_by_full_forwards(model, torch.tensor([[256]]), 8)[0, 1:].tolist()
    assert run(capsys, "--temperature=0", "--max_new_tokens=8").out == text_of(ids) + "\n"


@pytest.mark.parametrize(
    ("meta", "first"),
    [
        ({"tokenizer": "byte"}, 256),
        ({"tokenizer": "char", "chars": ["a", "b", "<|endoftext|>"]}, 2),
        ({"tokenizer": "char", "chars": ["a", "b"]}, 0),
    ],
    ids=["byte", "char", "char of one document"],
)
def test_generate_text_begins_a_document_for_an_empty_prompt(meta, first):
    model, tokenizer = make_vivid(model_module("model"), vocab_size=257), get_tokenizer(meta)
    text = sample.generate_text(model, tokenizer, "", 8, temperature=0)
    with_end = sample.generate(
        model, torch.tensor([[first]]), 8, vocab_size=tokenizer.n_vocab, temperature=0
    )
    stream = TextStream(tokenizer)
    assert text == "".join(stream.add(token.item()) for token in with_end) + stream.finish()


@needs_fork
def test_a_single_sample_is_printed_while_it_is_generated(tiny_run, workdir):
    argv = [*TINY_RUN, "--prompt=def ", "--max_new_tokens=100000000"]  # a text that takes days
    process = Forked(lambda: sample.main(argv), workdir)
    deadline = time.monotonic() + 60
    while len(process.printed()) < 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.kill().out.startswith("def ")


def test_padding_ids_are_never_sampled(workdir, capsys):
    train.main(arguments(vocab_size=320, max_steps=1))
    capsys.readouterr()
    # An id of the padding has no bytes, so that sampling it would raise.
    argv = ["--num_samples=8", "--temperature=50", "--top_k=None", "--max_new_tokens=200"]
    run(capsys, *argv)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(tiny_run, capsys):
    line = refused(capsys, "--prompt=" + 17 * "x")
    assert re.search(r"\b17\b", line)
    assert "block_size=16" in line


def test_a_prompt_as_long_as_the_context_is_accepted(tiny_run, capsys):
    assert run(capsys, "--prompt=" + 16 * "x", "--max_new_tokens=3").out.startswith(16 * "x")


@pytest.mark.parametrize(
    "option, expected",
    [
        ("--temperature=-1", "temperature=-1.0"),
        ("--num_samples=0", "num_samples=0"),
        ("--top_k=0", "top_k=0"),
        ("--top_p=1.5", "top_p=1.5"),
        ("--stop=", "stop"),
        ("--init_from=out/none", "out/none"),
        ("--dtype=float8", "dtype=float8"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(tiny_run, capsys, option, expected):
    assert expected in refused(capsys, option)


def test_top_k_0_is_refused_with_what_turns_it_off(tiny_run, capsys):
    assert "None" in refused(capsys, "--top_k=0")


def test_a_prompt_of_known_characters_is_continued(char_run, capsys):
    assert run(capsys, "--prompt=ab", "--max_new_tokens=4").out.startswith("ab")


def test_a_character_outside_the_vocabulary_is_refused_with_the_character(char_run, capsys):
    line = refused(capsys, "--prompt=abz")
    assert "'z'" in line
    assert re.search(r"\b2\b", line)


def test_an_interrupt_prints_the_text_so_far(tiny_run, capsys, monkeypatch):
    original = sample.generate

    def interrupted(*args, **kwargs):
        yield from itertools.islice(original(*args, **kwargs), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_program(sample.main, [*TINY_RUN, "--prompt=def ", "--num_samples=2", "--seed=3"])
    printed = capsys.readouterr()
    assert stopped.value.code == 130
    assert "[10 tokens" in printed.err
    for text in printed.out.split("---------------\n"):
        assert len(text.rstrip("\n").removeprefix("def ")) >= 1


# Past block_size ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_rope", "model_rope_gqa_swa"])
def test_a_rotary_model_continues_a_text_past_block_size(name):
    model = make_vivid(model_module(name))
    text = tokens(1, 4)
    generated = list(sample.generate(model, text, 60, temperature=0))
    for token in generated:  # block_size is 16
        assert model(text)[:, -1].argmax(dim=1) == token
        text = torch.cat([text, token[:, None]], dim=1)


def test_a_rotary_model_with_a_window_generates_in_constant_memory(monkeypatch):
    model = make_vivid(model_module("model_rope_gqa_swa"))
    make_cache = model.make_cache
    caches = []

    def recording_make_cache(*args):
        caches.append(make_cache(*args))
        return caches[-1]

    monkeypatch.setattr(model, "make_cache", recording_make_cache)
    generated = sample.generate(model, tokens(1, 4), 10**15, temperature=0)
    for _ in range(100):
        next(generated)
    variables = generated.gi_frame.f_locals.values()
    sizes = [value.numel() for value in variables if torch.is_tensor(value)]
    assert len(caches) == 1
    assert caches[0].nbytes == make_cache(1, WINDOW).nbytes
    assert caches[0].pos == 103
    assert max(sizes) < 100
