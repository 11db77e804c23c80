"""A bin that is something else is refused by training, evaluation and import, with what it is.

The command that an error names is run: it must make the bin that was meant.
"""

import io
import json
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import TEXT, arguments, write_dataset
from data_commands import shard_file
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import train
from common.bins import check_bin
from common.dataloader import Loader
from common.errors import UserError

IDS = np.random.default_rng(0).integers(0, 50257, 3000)


def numpy_file(ids):
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def llama_shard():
    header = np.zeros(256, "<i4")
    header[:3] = [20240801, 7, len(IDS)]
    return header.tobytes() + IDS.astype("<u4").tobytes()


# The content of a bin, and what the error must name.
OTHER_FILES = {
    "uint32": (IDS.astype("<u4").tobytes(), "4 bytes"),
    "int32": (IDS.astype("<i4").tobytes(), "4 bytes"),
    "big-endian uint32": (IDS.astype(">u4").tobytes(), "4 bytes"),
    "int64": (IDS.astype("<i8").tobytes(), "8 bytes"),
    "uint64": (IDS.astype("<u8").tobytes(), "8 bytes"),
    "uint32 of a larger vocabulary": ((IDS * 4).astype("<u4").tobytes(), "4 bytes"),
    "int64 of a larger vocabulary": ((IDS * 4).astype("<i8").tobytes(), "8 bytes"),
    "uint32 of bytes": (np.frombuffer(TEXT.encode(), "u1").astype("<u4").tobytes(), "4 bytes"),
    "NumPy": (numpy_file(IDS.astype("<u2")), "NumPy"),
    "NumPy of int64": (numpy_file(IDS), "NumPy"),
    "shard": (shard_file(IDS), "llm.c"),
    "shard of Llama 3": (llama_shard(), "llm.c"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:5f\nsize 9\n", "Git LFS"),
    "page": (b"<!DOCTYPE html><html><body>Please log in.</body></html>\n", "HTML"),
    "text": (TEXT.encode(), "text"),
    "JSON": (b'{"error": "Repository not found"}\n', "text"),
    "LitGPT": (b"LITPKDS" + bytes(17) + IDS.astype("<u2").tobytes(), "LitGPT"),
    "one byte for each id": (bytes(random.randrange(65) for _ in range(999)) + b"a", "byte"),
    "text with a control character": (b"\x1b[31mError: 403 Forbidden\x1b[0m" * 9 + b"\n", "text"),
    "a short answer": (b"404: Not Found", "text"),
    "pickle": (pickle.dumps(IDS.tolist()), "pickle"),
}


HEADED = ["NumPy", "NumPy of int64", "shard", "LitGPT"]  # ids behind a header


@pytest.fixture(params=OTHER_FILES)
def other_file(request):
    return OTHER_FILES[request.param]


@pytest.fixture(autouse=True)
def dataset(tmp_path, monkeypatch):
    """Write the bins data/d, which no meta.json describes, and change to their folder's."""
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/d"), IDS, IDS, {"tokenizer": "gpt2"})


@pytest.fixture
def refused(capsys):
    """Return a function that runs a program, which must refuse, and returns its one line."""
    return lambda *argv, main: conftest.refused(capsys, list(argv), main)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("eval_only", [False, True])
def test_another_file_in_the_place_of_a_bin_is_not_trained_on(
    refused, other_file, split, eval_only
):
    content, name = other_file
    Path(f"data/d/{split}.bin").write_bytes(content)
    argv = arguments(dataset="d", out_dir="out/d", eval_only=eval_only)
    line = refused(*argv, main=train.main)
    assert f"data/d/{split}.bin" in line
    assert name in line
    assert not list(Path("out").glob("d/step*"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_file_in_the_place_of_a_bin_is_not_imported(refused, other_file, split):
    content, name = other_file
    Path(f"data/d/{split}.bin").write_bytes(content)
    Path("data/d/meta.json").unlink()
    line = refused("i", "--import_nanogpt=data/d", main=prepare_data.main)
    assert f"data/d/{split}.bin" in line
    assert name in line
    assert not Path("data/i").exists()


def test_a_pointer_in_the_place_of_a_described_bin_is_named():
    prepare_data.main(["i", "--import_nanogpt=data/d"])
    content, name = OTHER_FILES["pointer"]
    Path("data/i/val.bin").write_bytes(content)
    with pytest.raises(UserError, match=name):
        Loader("data/i", 8, 50257, seed=0)


@pytest.mark.skipif(sys.platform == "win32", reason="the command is quoted for a POSIX shell")
@pytest.mark.parametrize(
    "kind", ["uint32", "int32", "big-endian uint32", "int64", "uint64", *HEADED]
)
def test_the_command_of_the_error_makes_the_bin(kind):
    path = Path("data/d/it's a $HOME `folder`/train.bin")
    path.parent.mkdir()
    path.write_bytes(OTHER_FILES[kind][0])
    with pytest.raises(UserError) as error:
        check_bin(path, 50257)
    _, _, command = str(error.value).partition("converts it: python ")
    python = shutil.which(sys.executable)
    subprocess.run(f"'{python}' {command}", shell=True, check=True)
    assert np.fromfile(path, "<u2").tolist() == IDS.tolist()
    assert path.with_name("train.bin.old").read_bytes() == OTHER_FILES[kind][0]


@pytest.mark.parametrize("kind", ["uint32", "int64"])
def test_ids_that_do_not_fit_get_no_command_that_cuts_them(kind):
    with pytest.raises(UserError) as error:
        Path("a.bin").write_bytes(OTHER_FILES[f"{kind} of a larger vocabulary"][0])
        check_bin("a.bin", 50257)
    assert "python -c" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    wide_type=st.sampled_from(["<i4", "<u4", ">u4", "<i8", ">i8", "<u8"]),
    vocab_size=st.sampled_from([6, 65, 257, 50257, 65536, 128256, 151936, 262144]),
    count=st.integers(64, 20000),
    seed=st.integers(0, 99),
)
def test_ids_of_any_wider_type_are_refused(wide_type, vocab_size, count, seed):
    ids = np.random.default_rng(seed).integers(0, vocab_size, count)
    ids.astype(wide_type).tofile("a.bin")
    with pytest.raises(UserError, match=f"{np.dtype(wide_type).itemsize} bytes"):
        check_bin("a.bin", 50257)


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.sampled_from([1, 2, 3, 4, 5, 26, 65, 257, 50257, 65536]),
    count=st.integers(1, 20000),
    seed=st.integers(0, 99),
)
def test_uint16_ids_of_any_vocabulary_are_accepted(vocab_size, count, seed):
    ids = np.random.default_rng(seed).integers(0, vocab_size, count)
    ids.astype("<u2").tofile("a.bin")
    assert check_bin("a.bin", 50257) <= ids.max()


@pytest.mark.parametrize("ids", [IDS, np.frombuffer(TEXT.encode(), "u1")])
def test_a_bin_whose_beginning_looks_wider_is_accepted(ids):
    np.concatenate([np.array([5, 0] * 5000), ids]).astype("<u2").tofile("a.bin")
    check_bin("a.bin", 50257)


@pytest.mark.parametrize("pattern", [[0, 1], [1, 0], [0, 1, 0, 0], [1, 2, 3, 4], [5, 0, 0, 0]])
def test_a_pattern_that_repeats_is_accepted(pattern):
    np.array(pattern * 300).astype("<u2").tofile("a.bin")
    check_bin("a.bin", 50257)


@pytest.mark.parametrize("space", [" ", "\n"])
def test_characters_with_a_space_between_are_imported(space):
    text = space.join("ACGT"[i % 4] for i in range(999))
    chars = sorted(set(text))
    ids = np.array([chars.index(char) for char in text])
    write_dataset(Path("spaced"), ids, ids, {"tokenizer": "char", "chars": chars})
    with open("spaced/meta.pkl", "wb") as file:
        pickle.dump({"itos": dict(enumerate(chars))}, file)
    Path("spaced/meta.json").unlink()
    prepare_data.main(["m", "--import_nanogpt=spaced"])
    np.array(ids).astype("<u4").tofile("spaced/train.bin")  # the same ids in the wider type
    with pytest.raises(UserError, match="4 bytes"):
        prepare_data.main(["n", "--import_nanogpt=spaced"])


def test_bytes_with_endoftext_are_a_bin():
    ids = [*b"some text", 256] * 99
    np.array(ids).astype("<u2").tofile("a.bin")
    check_bin("a.bin", 257)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("line", ["{}\n", "{} ", "{}!"])
def test_every_second_character_equal_is_text_as_any_other(tokenizer, line):
    text = "".join(line.format(c) for c in "some letters, each in a line" * 30)
    Path("text.txt").write_text(text)
    prepare_data.main(["m", "--input=text.txt", f"--tokenizer={tokenizer}", "--val_fraction=0.2"])
    meta = json.loads(Path("data/m/meta.json").read_text())
    assert Loader("data/m", 8, meta["vocab_size"], seed=0).n_train == meta["train"]["tokens"]


def test_a_large_bin_is_not_read_as_a_whole(monkeypatch):
    with open("data/d/train.bin", "ab") as file:
        file.truncate(1 << 30)  # a gigabyte, all but the beginning 0
    sizes = []
    frombuffer = np.frombuffer

    def recording_frombuffer(content, dtype):
        sizes.append(len(content))
        return frombuffer(content, dtype)

    monkeypatch.setattr(np, "frombuffer", recording_frombuffer)
    monkeypatch.setattr(np, "fromfile", lambda *args: pytest.fail("the whole file is read"))
    Loader("data/d", 8, 50257, seed=0)
    assert sum(sizes) < 1 << 18
