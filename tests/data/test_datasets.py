"""prepare_data.py: the datasets by name, and your own text under a known name."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, decode, refused

import prepare_data
from common.errors import UserError
from common.tokenizer import EOT, get_tokenizer
from prepare_data import DATASETS, PrepareConfig, prepare

ROOT = Path(prepare_data.__file__).parent


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name, **options):
    """Prepare data/NAME; return its training ids, its validation ids and its meta.json."""
    prepare(PrepareConfig(name, **options))
    folder = Path("data", name)
    train = np.fromfile(folder / "train.bin", "<u2").tolist()
    val = np.fromfile(folder / "val.bin", "<u2").tolist()
    return train, val, json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def files():
    """Return the paths of all files in data/."""
    return [path for path in Path("data").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def stdlib_paths():
    return prepare_data.stdlib_files()


def test_stdlib_is_the_text_of_python_files_as_bytes(stdlib_paths, monkeypatch):
    paths = stdlib_paths[:5]
    monkeypatch.setattr(prepare_data, "stdlib_files", lambda: paths)
    train, val, meta = make("stdlib")
    documents = [Path(path).read_bytes() for path in paths]
    assert bytes(token_id for token_id in train + val if token_id < 256) == b"".join(documents)
    assert meta["tokenizer"] == "byte"


def test_stdlib_files_are_distinct(stdlib_paths):
    assert len(set(stdlib_paths)) == len(stdlib_paths) > 300


def test_stdlib_files_do_not_include_tests_or_installed_packages(stdlib_paths):
    assert not [path for path in stdlib_paths if re.search(r"/(tests?|site-packages)/", path)]


def test_stdlib_files_are_in_the_same_order_every_time(stdlib_paths):
    assert prepare_data.stdlib_files() == stdlib_paths


@pytest.fixture
def shakespeare(hub, monkeypatch):
    """The text that the hub serves in the place of tinyshakespeare."""
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 10
    hub.files["input.txt"] = text
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", f"{hub.url}/input.txt")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    return text


def test_shakespeare_char_is_the_downloaded_text_by_characters(shakespeare):
    train, val, meta = make("shakespeare_char")
    assert "".join(meta["chars"][token_id] for token_id in train + val).encode() == shakespeare
    assert meta["chars"] == sorted(set(shakespeare.decode()))


def test_shakespeare_is_the_downloaded_text_in_gpt2_tokens(shakespeare, gpt2_tokenizer):
    train, val, _ = make("shakespeare")
    assert train + val == gpt2_tokenizer.encode_ordinary(shakespeare.decode())


def test_shakespeare_uses_a_tenth_for_validation(shakespeare):
    _, val, _ = make("shakespeare_char")
    assert len(val) == len(shakespeare) // 10


def test_shakespeare_is_downloaded_once(shakespeare, hub):
    make("shakespeare_char")
    make("shakespeare_char")
    assert hub.requests == [("GET", "input.txt")]


def test_another_text_in_the_place_of_shakespeare_is_refused_with_both_hashes(shakespeare, hub):
    hub.files["input.txt"] += b"."
    with pytest.raises(UserError) as error:
        make("shakespeare_char")
    assert hashlib.sha256(shakespeare).hexdigest() in str(error.value)
    assert hashlib.sha256(shakespeare + b".").hexdigest() in str(error.value)
    assert files() == []


@pytest.mark.parametrize(
    ("faults", "reason"),
    [({"status": 503}, "503"), ({"files": {}}, "404"), ({"cuts": [100]}, "ChunkedEncodingError")],
)
def test_shakespeare_that_cannot_be_downloaded_is_one_line_and_leaves_no_file(
    shakespeare, hub, capsys, faults, reason
):
    for fault, value in faults.items():
        setattr(hub, fault, value)
    line = refused(capsys, ["shakespeare_char"], prepare_data.main)
    assert f"{hub.url}/input.txt" in line
    assert reason in line
    assert files() == []


def test_shakespeare_without_a_network_is_one_line_and_leaves_no_file(monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    assert "http://127.0.0.1:9" in refused(capsys, ["shakespeare_char"], prepare_data.main)
    assert files() == []


STORIES = {"train": ["Once upon a time.\n\nThe end.", "A cat sat."] * 20, "val": ["A dog.", "Ran."]}


@pytest.fixture
def tinystories(hub):
    """Serve STORIES in the place of TinyStories, between the lines that separate its stories."""
    names = dict(zip(STORIES, prepare_data.TINYSTORIES_FILES, strict=True))
    for split, stories in STORIES.items():
        content = "".join(f"{story}\n<|endoftext|>\n" for story in stories)
        hub.add(f"datasets/{prepare_data.TINYSTORIES}", names[split], content.encode())


@pytest.mark.parametrize(
    "name", ["tinystories_byte", pytest.param("tinystories", marks=GPT2.marks)]
)
def test_tinystories_has_the_splits_of_the_hub(tinystories, name):
    *splits, meta = make(name)
    tokenizer = get_tokenizer(meta)
    for token_ids, stories in zip(splits, STORIES.values(), strict=True):
        assert decode(tokenizer, token_ids) == "<|endoftext|>".join(stories)
        assert token_ids.count(tokenizer.eot_token) == len(stories) - 1


def test_tinystories_can_have_another_tokenizer(tinystories):
    *_, meta = make("tinystories", tokenizer="char")
    assert meta["chars"] == [*sorted(set("".join(STORIES["train"] + STORIES["val"]))), EOT]


def test_tinystories_is_verified_as_any_other_dataset(tinystories):
    make("tinystories_byte")
    prepare_data.main(["tinystories_byte", "--verify=True"])


@pytest.mark.parametrize("option", ["val_fraction=0.5", "field=text", "separator=x"])
def test_an_option_that_does_not_apply_to_tinystories_is_refused(capsys, option):
    assert option[:5] in refused(capsys, ["tinystories", f"--{option}"], prepare_data.main)


def test_tinystories_that_cannot_be_downloaded_is_one_line_and_leaves_no_file(hub, capsys):
    line = refused(capsys, ["tinystories_byte"], prepare_data.main)
    assert prepare_data.TINYSTORIES in line
    assert files() == []


@pytest.mark.parametrize("name", ["tinystories", "tinystories_byte"])
def test_training_on_missing_tinystories_names_the_command(name):
    with pytest.raises(UserError, match=f"python prepare_data.py {name} makes it"):
        prepare_data.open_dataset(name)


def test_your_own_text_under_the_name_of_a_split_dataset_is_split_by_default():
    Path("text.txt").write_text("some text " * 100)
    _, val, _ = make("tinystories_byte", input="text.txt")
    assert len(val) == 10


def test_your_own_text_under_a_known_name_is_split_and_tokenized_as_that_dataset():
    Path("text.txt").write_text("some text " * 100)
    _, val, meta = make("shakespeare_char", input="text.txt")
    assert meta["tokenizer"] == "char"
    assert len(val) == 100


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


def test_an_unknown_name_is_refused_with_the_known_ones_and_input():
    with pytest.raises(UserError) as error:
        make("stdlip")
    names = ["stdlip", "stdlib", "shakespeare", "shakespeare_char", "fineweb", "--input"]
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("options", [{}, {"input": "text.txt"}])
@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_an_invalid_name_is_refused_with_the_known_ones(name, options):
    Path("text.txt").write_text("x" * 100)
    with pytest.raises(UserError, match="stdlib"):
        make(name, **options)
