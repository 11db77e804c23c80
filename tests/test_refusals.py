"""train.py: bad input is one clear line and exit status 2; nothing is written or lost."""

import os

import numpy as np
import pytest
from conftest import arguments, refused, write_dataset

from common import checkpoint

# Options that must be refused, and what the line must name: the option, the numbers, what helps.
BAD = {
    "an unknown option": (dict(lerning_rate=1), ["lerning_rate", "learning_rate"]),
    "a name of nanoGPT": (dict(max_iters=1), ["max_iters", "--max_steps"]),
    "a wrong type": (dict(max_steps="many"), ["max_steps=many", "int"]),
    "an unknown model": (dict(model="model_none"), ["model=model_none", "model_rope"]),
    "n_embd not divisible by n_head": (dict(n_embd=15), ["n_embd=15", "n_head=2"]),
    "a total_batch_size that does not divide": (
        dict(total_batch_size=100),
        ["total_batch_size=100", "batch_size x block_size = 4 x 16 = 64", "64 and 128"],
    ),
    "a missing dataset": (
        dict(dataset="none"),
        ["data/none", "python prepare_data.py none --input="],
    ),
    "missing fineweb": (
        dict(dataset="fineweb"),
        ["python prepare_data.py fineweb", "config/quickstart.py"],
    ),
    "a vocabulary smaller than the data's": (
        dict(vocab_size=100),
        ["vocab_size=100", "257", "data/tiny"],
    ),
    "a block_size longer than the text": (
        dict(block_size=65536, total_batch_size=262144),
        ["train.bin", "9080", "block_size=65536"],
    ),
    "no such device": (dict(device="cuda:77"), ["device=cuda:77"]),
    "no device for this": (dict(device="meta"), ["device=meta", "cuda:N"]),
    "an unknown dtype": (dict(dtype="float8"), ["dtype=float8", "bfloat16"]),
    "an unknown schedule": (dict(lr_schedule="linear"), ["lr_schedule=linear", "cosine", "wsd"]),
    "min_lr above learning_rate": (dict(min_lr=0.1), ["min_lr=0.1", "learning_rate=0.01"]),
    "a seed beyond 64 bits": (dict(seed=10**30), [f"seed={10**30}", "2**63"]),
    "no steps": (dict(max_steps=0), ["max_steps=0", "1"]),
    "init_from nothing": (dict(init_from="out/nothing"), ["out/nothing", "gpt2"]),
    "fsdp without torchrun": (dict(fsdp=True), ["fsdp=True", "torchrun"]),
    "shards without fsdp": (dict(shard_degree=2), ["shard_degree=2", "--fsdp=True"]),
}


@pytest.mark.parametrize("options, named", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_writes_nothing(workdir, capsys, options, named):
    line = refused(capsys, arguments(**options))
    assert [text for text in named if text not in line] == []
    assert not (workdir / "out").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(n_layer=3), ["n_layer", "2", "3"]),
        (dict(learning_rate=0.02), ["learning_rate", "0.01", "0.02"]),
        (dict(dataset="twin"), ["dataset", "tiny", "twin"]),
    ],
)
def test_an_out_dir_that_holds_another_run_is_refused_and_kept(
    tiny_run, workdir, capsys, options, named
):
    ids = list(b"other text " * 100)
    write_dataset(workdir / "data/twin", ids, ids, {"tokenizer": "byte"})
    before = (tiny_run / "log.jsonl").read_text()
    line = refused(capsys, arguments(**options, max_steps=20))
    assert all(text in line for text in (*named, "--out_dir", "--overwrite=True"))
    assert (tiny_run / "log.jsonl").read_text() == before and (tiny_run / "step_00000012").exists()


def test_data_that_changed_under_a_run_is_refused(tiny_run, workdir, capsys):
    with open(workdir / "data/tiny/train.bin", "ab") as file:
        file.write(b"\0\0")
    line = refused(capsys, arguments(max_steps=20))
    assert "[9080, 600]" in line and "[9081, 600]" in line


def test_an_id_beyond_vocab_size_is_found_before_anything_is_overwritten(tiny_run, capsys):
    ids = np.fromfile("data/tiny/train.bin", dtype="<u2")
    ids[len(ids) // 2 :] = 999
    ids.tofile("data/tiny/train.bin")
    line = refused(capsys, arguments(overwrite=True))
    assert all(text in line for text in ("999", "vocab_size=257", "1000"))
    assert (tiny_run / "step_00000012").exists()


def test_a_second_process_in_the_same_out_dir_is_refused(tiny_run, capsys):
    with checkpoint.lock_run(tiny_run):
        assert "out/tiny" in refused(capsys, arguments(max_steps=20))


def test_an_out_dir_that_is_a_file_is_one_line(workdir, capsys):
    (workdir / "out").write_text("mine")
    assert "out" in refused(capsys, arguments())


def test_a_truncated_checkpoint_is_refused_and_names_the_file_and_both_sizes(tiny_run, capsys):
    file = next((tiny_run / "step_00000012").glob("*.safetensors"))
    size = file.stat().st_size
    os.truncate(file, size - 10)
    line = refused(capsys, arguments(max_steps=20))
    assert all(text in line for text in (file.name, str(size - 10), str(size), "remove"))


def test_weights_of_another_tokenizer_are_refused(tiny_run, workdir, capsys):
    write_dataset(
        workdir / "data/char",
        [0, 1] * 300,
        [0, 1] * 300,
        {"tokenizer": "char", "chars": ["a", "b"]},
    )
    line = refused(capsys, arguments(dataset="char", init_from="out/tiny", out_dir="out/new"))
    assert all(text in line for text in ("out/tiny", "byte", "data/char", "char"))
