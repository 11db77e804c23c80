"""prepare_data.py fineweb: shards from the hub are appended one by one; failures on the way."""

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data_commands import FINEWEB, shard_file, shard_name

import prepare_data
from common.dataloader import Loader
from common.errors import UserError
from prepare_data import PrepareConfig, prepare, verify

FOLDER = Path("data/fineweb")


@pytest.fixture
def shards(hub, tmp_path, monkeypatch):
    """The token ids of the hub's shards, of different lengths; number 0 is for validation."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    shards = []
    for i in range(5):
        shards.append([rng.randrange(50257) for _ in range(1000 + i)])
        hub.add(FINEWEB, shard_name(i), shard_file(shards[i]))
    return shards


def fineweb(shards, name="fineweb", **options):
    return prepare(PrepareConfig(name=name, shards=shards, **options))


def user_error(shards=1, **options):
    """Return the message of the UserError that these options raise; it is one line."""
    with pytest.raises(UserError) as error:
        fineweb(shards, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def ids(split):
    return np.fromfile(FOLDER / f"{split}.bin", "<u2").tolist()


def meta():
    return json.loads((FOLDER / "meta.json").read_text())


def contents():
    return {path.name: path.read_bytes() for path in FOLDER.iterdir()}


def make_from_text():
    """Make a dataset of that name from text."""
    Path("text.txt").write_text("some text")
    fineweb(1, input="text.txt", tokenizer="byte", val_fraction=0.5)


# Shards to bins -------------------------------------------------------------------------------


def test_the_bins_are_the_shards_without_headers_in_order(shards):
    fineweb(3)
    assert ids("train") == shards[1] + shards[2] + shards[3]
    assert ids("val") == shards[0]


def test_val_bin_ends_with_the_target_of_the_last_leaderboard_token(shards, monkeypatch):
    monkeypatch.setattr(prepare_data, "FINEWEB_VAL_TOKENS", 640)
    fineweb(1)
    assert ids("val") == shards[0][:641]
    verify(FOLDER)


def test_validation_evaluates_each_token_of_the_leaderboards_once(shards, monkeypatch):
    monkeypatch.setattr(prepare_data, "FINEWEB_VAL_TOKENS", 640)
    fineweb(1)
    loader = Loader(FOLDER, block_size=64, vocab_size=50257, seed=1)
    batches = list(loader.val_batches(eval_tokens=640, batch_size=2))
    assert torch.cat([x for x, _ in batches]).flatten().tolist() == shards[0][:640]
    assert torch.cat([y for _, y in batches]).flatten().tolist() == shards[0][1:641]


def test_the_downloaded_shards_are_deleted(shards):
    fineweb(2)
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]


def test_the_result_can_be_verified(shards):
    fineweb(2)
    verify(FOLDER)


def test_the_result_is_meta_json(shards):
    assert fineweb(2) == meta()


def test_meta_names_the_tokenizer_and_the_number_of_shards(shards):
    fineweb(2)
    assert meta()["tokenizer"] == "gpt2"
    assert meta()["vocab_size"] == 50257
    assert meta()["shards"] == 2


def test_meta_describes_the_bins(shards):
    fineweb(2)
    train = shards[1] + shards[2]
    content = (FOLDER / "train.bin").read_bytes()
    assert meta()["train"]["tokens"] == len(train)
    assert meta()["train"]["largest_id"] == max(train)
    assert meta()["train"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_meta_counts_the_bytes_of_text(shards, gpt2_tokenizer):
    fineweb(1)
    pieces = [gpt2_tokenizer.decode_single_token_bytes(token_id) for token_id in shards[0]]
    assert meta()["val"]["bytes"] == len(b"".join(pieces))


def test_without_the_gpt2_tokenizer_meta_has_no_bytes_of_text(shards, monkeypatch):
    def get_tokenizer(meta):
        raise UserError("not available")

    monkeypatch.setattr(prepare_data, "get_tokenizer", get_tokenizer)
    fineweb(1)
    assert "bytes" not in meta()["train"]


# A second call --------------------------------------------------------------------------------


def test_more_shards_download_only_the_new_ones(shards, hub):
    fineweb(2)
    hub.requests.clear()
    fineweb(4)
    assert hub.downloads() == [shard_name(3), shard_name(4)]
    assert ids("train") == shards[1] + shards[2] + shards[3] + shards[4]


def test_the_same_number_of_shards_downloads_and_changes_nothing(shards, hub):
    fineweb(2)
    before = contents()
    hub.requests.clear()
    fineweb(2)
    assert hub.requests == []
    assert contents() == before


def test_the_same_number_of_shards_does_not_hash_a_damaged_bin_again(shards):
    fineweb(1)
    (FOLDER / "train.bin").write_bytes(bytes(len(shards[1]) * 2))
    fineweb(1)
    with pytest.raises(UserError, match=r"train\.bin"):
        verify(FOLDER)


def test_overwrite_makes_the_dataset_again(shards):
    fineweb(2)
    (FOLDER / "train.bin").write_bytes(b"damaged")
    fineweb(1, overwrite=True)
    assert ids("train") == shards[1]
    assert meta()["shards"] == 1


def test_a_dataset_of_that_name_from_another_source_is_refused_with_the_source(shards):
    make_from_text()
    assert "text.txt" in user_error()


def test_overwrite_replaces_another_dataset(shards):
    make_from_text()
    fineweb(1, overwrite=True)
    assert ids("train") == shards[1]
    assert ids("val") == shards[0]


# Options --------------------------------------------------------------------------------------


def test_fewer_shards_than_before_are_refused_with_both_numbers(shards):
    fineweb(2)
    message = user_error(1)
    assert "shards=1" in message
    assert re.search(r"\b2\b", message)


@pytest.mark.parametrize("number", [0, -1, 104])
def test_shards_out_of_range_are_refused_with_the_range(shards, hub, number):
    message = user_error(number)
    assert f"shards={number}" in message
    assert "103" in message
    assert hub.requests == []


@pytest.mark.parametrize(("option", "value"), [("tokenizer", "byte"), ("val_fraction", 0.1)])
def test_options_that_do_not_apply_to_fineweb_are_refused(shards, hub, option, value):
    assert f"--{option}" in user_error(**{option: value})
    assert hub.requests == []


# Failures -------------------------------------------------------------------------------------


def test_a_first_shard_that_cannot_be_downloaded_leaves_no_file(shards, hub):
    hub.status = 503
    assert "503" in user_error()
    assert contents() == {}


def test_shards_before_a_failure_are_kept(shards, hub):
    del hub.files[f"{FINEWEB}/resolve/main/{shard_name(3)}"]
    assert "404" in user_error(4)
    assert ids("train") == shards[1] + shards[2]
    assert meta()["shards"] == 2
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]


def test_after_a_failure_the_same_call_downloads_only_the_missing_shards(shards, hub):
    hub.cuts = [None, None, None, *[0] * 20]
    assert shard_name(3) in user_error(4)
    hub.cuts = []
    hub.requests.clear()
    fineweb(4)
    assert hub.downloads() == [shard_name(3), shard_name(4)]
    assert ids("train") == shards[1] + shards[2] + shards[3] + shards[4]


def test_tokens_that_an_interrupted_call_appended_are_removed(shards):
    fineweb(1)
    with open(FOLDER / "train.bin", "ab") as file:
        file.write(bytes(501))
    fineweb(2)
    assert ids("train") == shards[1] + shards[2]


def test_a_bin_shorter_than_meta_says_is_refused_with_both_numbers(shards):
    fineweb(1)
    (FOLDER / "train.bin").write_bytes(bytes(10))
    message = user_error(2)
    assert re.search(r"\b5\b", message)
    assert str(len(shards[1])) in message
    assert "--overwrite=True" in message


BAD_SHARDS = {
    "magic": shard_file([1, 2, 3], magic=20240521),
    "version": shard_file([1, 2, 3], version=2),
    "count too large": shard_file([1, 2, 3], count=4),
    "count too small": shard_file([1, 2, 3], count=2),
    "odd size": shard_file([1, 2, 3]) + b"x",
    "no header": b"nothing",
    "empty": b"",
}


@pytest.mark.parametrize("bad", BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_a_bad_shard_is_refused_and_deleted(shards, hub, bad):
    fineweb(1)
    before = contents()
    hub.add(FINEWEB, shard_name(2), bad)
    assert "fineweb_train_000002.bin" in user_error(2)
    assert contents() == before
