"""sample.py as a program: prompts, streams, limits."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import arguments
from test_variants import WINDOW, make_vivid, tokens

import sample
import train
from common.models import model_module
from common.pretrained import load_model


def run(capsys, *argv):
    sample.main(["--init_from=out/tiny", "--dtype=float32", "--device=cpu", *argv])
    return capsys.readouterr()


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def greedy_by_full_forwards(model, ids, count):
    """The likeliest continuation, every token by a forward over the whole text: no cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_text_is_that_of_full_forwards(tiny_run, capsys):
    text = run(capsys, "--prompt=def ", "--temperature=0", "--max_new_tokens=12").out
    model = load_model("out/tiny")[0].eval()
    ids = greedy_by_full_forwards(model, torch.tensor([list(b"def ")]), 12)
    assert text == bytes(ids[0].tolist()).decode(errors="replace") + "\n"


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_run, capsys):
    texts = [run(capsys, f"--seed={seed}", "--max_new_tokens=40").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_samples_are_separated_and_all_begin_with_the_prompt(tiny_run, capsys):
    out = run(capsys, "--num_samples=3", "--prompt=def ", "--max_new_tokens=5").out
    samples = out.removesuffix("\n").split("\n---------------\n")
    assert len(samples) == 3 and all(text.startswith("def ") for text in samples)


def test_a_text_past_block_size_goes_on_and_says_so_once(tiny_run, capsys):
    result = run(capsys, "--prompt=def ", "--max_new_tokens=60", "--temperature=0")
    assert (
        result.err.count("block_size=16")
        == 1
    )
    assert re.search(r"\[\d+ tokens in .* tokens/s\]", result.err)


def test_a_stop_string_ends_the_text_and_is_not_printed(tiny_run, capsys):
    whole = run(capsys, "--prompt=def ", "--temperature=0", "--max_new_tokens=40").out
    stop = whole[10:12]
    cut = run(
        capsys, "--prompt=def ", "--temperature=0", "--max_new_tokens=40", f"--stop={stop}"
    ).out
    assert cut == whole[: whole.index(stop, 4)] + "\n"


def test_an_empty_prompt_begins_a_document(tiny_run, capsys):
    model = load_model("out/tiny")[0].eval()
    ids = greedy_by_full_forwards(model, torch.tensor([[256]]), 8)[0, 1:].tolist()
    assert (
        run(capsys, "--temperature=0", "--max_new_tokens=8").out
        == bytes(ids).decode(errors="replace") + "\n"
    )


def test_a_single_sample_streams_while_it_is_made(tiny_run, workdir):
    command = [
        sys.executable,
        Path(train.__file__).parent / "sample.py",
        "--init_from=out/tiny",
        "--prompt=def ",
    ]
    process = subprocess.Popen(
        [*command, "--temperature=0", "--max_new_tokens=100000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert len(process.stdout.read(200)) == 200  # of a text that takes days
    finally:
        process.kill()
        process.communicate()


def test_padding_ids_are_never_sampled(workdir, capsys):
    train.main(arguments(vocab_size=320, max_steps=1))
    capsys.readouterr()
    run(
        capsys, "--num_samples=8", "--temperature=50", "--top_k=None", "--max_new_tokens=200"
    )  # no id without bytes


def test_a_prompt_longer_than_the_context_is_refused(tiny_run, capsys):
    line = refused(capsys, "--prompt=" + 17 * "x")
    assert "17 tokens" in line and "block_size=16" in line


def test_a_prompt_as_long_as_the_context_is_not(tiny_run, capsys):
    assert run(capsys, "--prompt=" + 16 * "x", "--max_new_tokens=3").out.startswith(16 * "x")


@pytest.mark.parametrize(
    "option, message",
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
def test_bad_options_are_one_line(tiny_run, capsys, option, message):
    assert message in refused(capsys, option)


def test_a_character_outside_the_vocabulary_is_refused_by_name(workdir, capsys):
    from conftest import write_dataset

    write_dataset(
        workdir / "data/char",
        [0, 1] * 300,
        [0, 1] * 300,
        {"tokenizer": "char", "chars": ["a", "b"]},
    )
    train.main(arguments(dataset="char", max_steps=1))
    capsys.readouterr()
    assert run(capsys, "--prompt=ab", "--max_new_tokens=4").out.startswith("ab")
    assert "character 'z' is not among the 2" in refused(capsys, "--prompt=abz")


def test_an_interruption_loses_no_text(tiny_run, capsys, monkeypatch):
    original = sample.generate

    def interrupted(*args, **how):
        yield from itertools.islice(original(*args, **how), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "--prompt=def ", "--num_samples=2", "--seed=3")
    said = capsys.readouterr()
    assert stopped.value.code == 130 and "[10 tokens" in said.err
    assert all(
        len(text.rstrip("\n").removeprefix("def ")) >= 1
        for text in said.out.split("---------------\n")
    )


# Past the context -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_rope", "model_rope_gqa_swa"])
def test_with_rotary_positions_a_text_goes_on_past_block_size(name):
    model, text = make_vivid(model_module(name)), tokens(1, 4)
    made = list(sample.generate(model, text, 60, temperature=0))
    for token in made:  # block_size is 16
        assert model(text)[:, -1].argmax(dim=1) == token
        text = torch.cat([text, token[:, None]], dim=1)


def test_with_sliding_windows_too_it_goes_on_without_end_in_constant_memory(monkeypatch):
    model = make_vivid(model_module("model_rope_gqa_swa"))
    caches, make_cache = [], model.make_cache
    monkeypatch.setattr(
        model, "make_cache", lambda *how: caches.append(make_cache(*how)) or caches[-1]
    )
    made = sample.generate(model, tokens(1, 4), 10**15, temperature=0)
    for _ in range(100):
        next(made)
    tensors = [value for value in made.gi_frame.f_locals.values() if torch.is_tensor(value)]
    assert len(caches) == 1 and caches[0].nbytes == make_cache(1, WINDOW).nbytes
    assert caches[0].pos == 103 and max(tensor.numel() for tensor in tensors) < 100
