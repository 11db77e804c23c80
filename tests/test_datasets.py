"""prepare_data.py's datasets by name: the small ones, your own text in their place, and names that are none."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from common.errors import UserError
from prepare_data import DATASETS, PrepareConfig, prepare

ROOT = Path(prepare_data.__file__).parent


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name, **options):
    """Prepare data/NAME; returns its ids for training and for validation, and its meta.json."""
    prepare(PrepareConfig(name, **options))
    folder = Path("data", name)
    train, val = (
        np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val")
    )
    return train, val, json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def test_stdlib_is_python_text_by_bytes(monkeypatch):
    files = prepare_data.stdlib_files()[:5]
    monkeypatch.setattr(prepare_data, "stdlib_files", lambda: files)
    train, val, meta = make("stdlib")
    documents = [Path(path).read_bytes() for path in files]
    assert (
        bytes(id for id in train + val if id < 256) == b"".join(documents)
        and meta["tokenizer"] == "byte"
    )


def test_stdlib_files_are_distinct_and_not_tests_and_in_the_same_order_every_time():
    files = prepare_data.stdlib_files()
    assert len(set(files)) == len(files) > 300
    assert not [path for path in files if re.search(r"/(tests?|site-packages)/", path)]
    assert prepare_data.stdlib_files() == files


@pytest.fixture
def shakespeare(hub, monkeypatch):
    hub.files["input.txt"] = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 10
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", f"{hub.url}/input.txt")
    monkeypatch.setattr(
        prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(hub.files["input.txt"]).hexdigest()
    )
    return hub.files["input.txt"]


def test_shakespeare_char_is_the_downloaded_text_by_characters(shakespeare):
    train, val, meta = make("shakespeare_char")
    assert "".join(meta["chars"][id] for id in train + val).encode() == shakespeare
    assert meta["chars"] == sorted(set(shakespeare.decode()))


def test_shakespeare_is_the_downloaded_text_for_gpt2(shakespeare, gpt2_tokenizer):
    train, val, _ = make("shakespeare")
    assert train + val == gpt2_tokenizer.encode_ordinary(shakespeare.decode())


def test_shakespeare_keeps_a_tenth_for_validation(shakespeare):
    assert len(make("shakespeare_char")[1]) == len(shakespeare) // 10


def test_shakespeare_is_downloaded_once(shakespeare, hub):
    make("shakespeare_char")
    make("shakespeare_char")
    assert hub.requests == [("input.txt", None)]


def test_another_text_in_shakespeares_place_is_refused(shakespeare, hub):
    hub.files["input.txt"] += b"."
    with pytest.raises(UserError, match="altered"):
        make("shakespeare_char")


def test_your_own_text_under_a_known_name_is_split_and_tokenized_as_that_dataset():
    Path("text.txt").write_text("some text " * 100)
    _, val, meta = make("shakespeare_char", input="text.txt")
    assert meta["tokenizer"] == "char" and len(val) == 100


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["mine", "--tokenizer=byte"],
            "python train.py config/quickstart.py --dataset=mine --out_dir=out/mine",
        ),
        (["shakespeare_char"], "python train.py config/shakespeare_char.py"),
    ],
)
def test_the_last_line_is_the_training_command(capsys, argv, command):
    Path("text.txt").write_text("some text " * 100)
    prepare_data.main([*argv, "--input=text.txt"])
    assert capsys.readouterr().out.splitlines()[-1] == command


def test_every_dataset_has_a_training_config():
    assert all((ROOT / config).is_file() for *_, config in DATASETS.values())


def test_an_unknown_name_is_refused_naming_the_known_ones_and_input():
    with pytest.raises(UserError, match=r"stdlib, shakespeare, shakespeare_char, fineweb.*--input"):
        make("stdlip")


@pytest.mark.parametrize("options", [{}, {"input": "text.txt"}])
@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_name_that_is_no_name_is_refused(name, options):
    Path("text.txt").write_text("x" * 100)
    with pytest.raises(UserError, match="name a dataset"):
        make(name, **options)
