"""train.py: bad input is one clear line and exit status 2; nothing is written or lost."""

import os

import numpy as np
import pytest
from conftest import arguments, refused, write_dataset

import checkpoint

BAD = {
    "an unknown option": (dict(lerning_rate=1), "unknown option lerning_rate: did you mean learning_rate?"),
    "a wrong type": (dict(max_steps="many"), "max_steps=many: expected int"),
    "an unknown model": (dict(model="model_none"), "no model model_none: there are model"),
    "n_embd not divisible by n_head": (dict(n_embd=15), "n_embd=15 is not divisible by n_head=2"),
    "a total_batch_size that does not divide": (
        dict(total_batch_size=100),
        "total_batch_size=100 is not a multiple of batch_size x block_size = 4 x 16 = 64: the nearest are 64 and 128",
    ),
    "a missing dataset": (dict(dataset="none"), "no data/none: python prepare_data.py none --input='FILES' makes it"),
    "missing fineweb": (dict(dataset="fineweb"), "python prepare_data.py fineweb downloads"),
    "a vocabulary smaller than the data's": (dict(vocab_size=100), "vocab_size=100 is below the 257 of data/tiny"),
    "a block_size longer than the text": (
        dict(block_size=65536, total_batch_size=262144),
        "too short: block_size=65536",
    ),
    "no such device": (dict(device="cuda:77"), "device=cuda:77 is not there"),
    "no device for this": (dict(device="meta"), "device=meta is none of auto, cuda, cuda:N, mps, cpu"),
    "an unknown dtype": (dict(dtype="float8"), "dtype=float8 is none of auto, float32, bfloat16, float16"),
    "an unknown schedule": (dict(lr_schedule="linear"), "lr_schedule=linear is neither cosine nor wsd"),
    "min_lr above learning_rate": (dict(min_lr=0.1), "min_lr=0.1 is above learning_rate=0.01"),
    "a seed beyond 64 bits": (dict(seed=10**30), f"seed={10**30} must be at least 0, and finite"),
    "no steps": (dict(max_steps=0), "max_steps=0 must be at least 1"),
    "init_from nothing": (dict(init_from="out/nothing"), "out/nothing is neither one of gpt2"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_writes_nothing(workdir, capsys, options, message):
    assert message in refused(capsys, arguments(**options))
    assert not (workdir / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_layer=3), "n_layer was 2, is 3"),
        (dict(learning_rate=0.02), "learning_rate was 0.01, is 0.02"),
        (dict(dataset="twin"), "dataset was tiny, is twin"),
    ],
)
def test_an_out_dir_that_holds_another_run_is_refused_and_kept(tiny_run, workdir, capsys, options, message):
    ids = list(b"other text " * 100)
    write_dataset(workdir / "data/twin", ids, ids, {"tokenizer": "byte"})
    before = (tiny_run / "log.jsonl").read_text()
    line = refused(capsys, arguments(**options, max_steps=20))
    assert message in line and "--out_dir" in line and "--overwrite=True" in line
    assert (tiny_run / "log.jsonl").read_text() == before and (tiny_run / "step_00000012").exists()


def test_data_that_changed_under_a_run_is_refused(tiny_run, workdir, capsys):
    with open(workdir / "data/tiny/train.bin", "ab") as file:
        file.write(b"\0\0")
    assert "the data had [9080, 600] tokens, has [9081, 600]" in refused(capsys, arguments(max_steps=20))


def test_an_id_beyond_vocab_size_in_bins_of_other_making_is_found_before_anything_is_overwritten(tiny_run, capsys):
    ids = np.fromfile("data/tiny/train.bin", dtype="<u2")
    ids[len(ids) // 2 :] = 999
    ids.tofile("data/tiny/train.bin")
    line = refused(capsys, arguments(overwrite=True))
    assert "holds the token id 999: vocab_size=257 must be at least 1000" in line
    assert (tiny_run / "step_00000012").exists()


def test_a_second_process_in_the_same_out_dir_is_refused(tiny_run, capsys):
    with checkpoint.alone_in(tiny_run):
        assert "another process trains in out/tiny" in refused(capsys, arguments(max_steps=20))


def test_an_out_dir_that_is_a_file_is_one_line(workdir, capsys):
    (workdir / "out").write_text("mine")
    assert "out" in refused(capsys, arguments())


def test_a_truncated_checkpoint_is_refused_and_names_the_file_and_both_sizes(tiny_run, capsys):
    file = next((tiny_run / "step_00000012").glob("*.distcp"))
    size = file.stat().st_size
    os.truncate(file, size - 10)
    line = refused(capsys, arguments(max_steps=20))
    assert f"{file.name} has {size - 10} bytes of {size}" in line and "remove" in line


def test_weights_of_another_tokenizer_are_refused(tiny_run, workdir, capsys):
    write_dataset(workdir / "data/char", [0, 1] * 300, [0, 1] * 300, {"tokenizer": "char", "chars": ["a", "b"]})
    line = refused(capsys, arguments(dataset="char", init_from="out/tiny", out_dir="out/new"))
    assert "trained with the tokenizer byte, data/char has char" in line
