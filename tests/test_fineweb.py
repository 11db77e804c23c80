"""prepare_data.py fineweb: shards from the hub, appended one by one, and whatever breaks on the way."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from common.errors import UserError
from prepare_data import PrepareConfig, prepare, verify

FOLDER = Path("data/fineweb")
SHARDS = "datasets/kjj0/fineweb10B-gpt2/resolve/main"


def shard_file(shard_ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(shard_ids) if count is None else count
    return header.tobytes() + np.array(shard_ids, "<u2").tobytes()


def shard_name(shard):
    return f"{SHARDS}/fineweb_" + ("val_000000.bin" if shard == 0 else f"train_{shard:06d}.bin")


@pytest.fixture
def shards(hub, tmp_path, monkeypatch):
    """The hub's shards, number 0 for validation: lists of ids below 50257 and of different lengths."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    shards = [[rng.randrange(50257) for _ in range(1000 + i)] for i in range(5)]
    for i, shard in enumerate(shards):
        hub.files[shard_name(i)] = shard_file(shard)
    return shards


def fineweb(shards, **options):
    return prepare(PrepareConfig(**({"name": "fineweb", "shards": shards} | options)))


def complaint(shards=1, **options):
    """The one line of the UserError that these options raise."""
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


def other_dataset():
    """A dataset of that name, made from text."""
    Path("text.txt").write_text("some text")
    fineweb(1, input="text.txt", tokenizer="byte", val_fraction=0.5)


# Shards to bins -------------------------------------------------------------------------------


def test_the_bins_are_the_shards_without_headers_in_order(shards):
    fineweb(3)
    assert (ids("train"), ids("val")) == (shards[1] + shards[2] + shards[3], shards[0])


def test_no_shards_are_left(shards):
    fineweb(2)
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]


def test_what_was_made_can_be_verified(shards):
    fineweb(2)
    verify(FOLDER)


def test_meta_describes_the_bins(shards):
    assert fineweb(2) == meta()
    train = shards[1] + shards[2]
    assert (meta()["tokenizer"], meta()["vocab_size"], meta()["shards"]) == ("gpt2", 50257, 2)
    assert (meta()["train"]["tokens"], meta()["train"]["largest_id"]) == (len(train), max(train))
    assert (
        meta()["train"]["sha256"] == hashlib.sha256((FOLDER / "train.bin").read_bytes()).hexdigest()
    )


def test_meta_counts_the_bytes_of_text(shards, gpt2_tokenizer):
    fineweb(1)
    assert meta()["val"]["bytes"] == sum(
        len(gpt2_tokenizer.decode_single_token_bytes(id)) for id in shards[0]
    )


def test_gpt2_s_tokenizer_is_not_needed(shards, monkeypatch):
    def get_tokenizer(meta):
        raise UserError("not here")

    monkeypatch.setattr(prepare_data, "get_tokenizer", get_tokenizer)
    fineweb(1)
    assert "bytes" not in meta()["train"]


# Again ----------------------------------------------------------------------------------------


def test_more_shards_download_only_the_new_ones(shards, hub):
    fineweb(2)
    hub.requests.clear()
    fineweb(4)
    assert hub.requests == [(shard_name(3), None), (shard_name(4), None)]
    assert ids("train") == shards[1] + shards[2] + shards[3] + shards[4]


def test_as_many_shards_again_download_and_change_nothing(shards, hub):
    fineweb(2)
    before = contents()
    hub.requests.clear()
    fineweb(2)
    assert hub.requests == [] and contents() == before


def test_as_many_shards_again_do_not_vouch_for_a_damaged_bin(shards):
    fineweb(1)
    (FOLDER / "train.bin").write_bytes(bytes(len(shards[1]) * 2))
    fineweb(1)
    with pytest.raises(UserError, match=r"train\.bin"):
        verify(FOLDER)


def test_overwrite_makes_it_anew(shards):
    fineweb(2)
    (FOLDER / "train.bin").write_bytes(b"damaged")
    fineweb(1, overwrite=True)
    assert (ids("train"), meta()["shards"]) == (shards[1], 1)


def test_another_dataset_in_its_place_is_refused_naming_its_source(shards):
    other_dataset()
    assert "text.txt" in complaint()


def test_overwrite_replaces_another_dataset(shards):
    other_dataset()
    fineweb(1, overwrite=True)
    assert (ids("train"), ids("val")) == (shards[1], shards[0])


# Options --------------------------------------------------------------------------------------


def test_fewer_shards_than_there_are_are_refused_with_both_numbers(shards):
    fineweb(2)
    message = complaint(1)
    assert "2 shards" in message and "--shards=1" in message


@pytest.mark.parametrize("number", [0, -1, 104])
def test_shards_that_do_not_exist_are_refused_with_the_range(shards, hub, number):
    message = complaint(number)
    assert f"shards={number}" in message and "103" in message and hub.requests == []


@pytest.mark.parametrize(("option", "value"), [("tokenizer", "byte"), ("val_fraction", 0.1)])
def test_options_that_cannot_change_it_are_refused(shards, hub, option, value):
    assert f"--{option}" in complaint(**{option: value}) and hub.requests == []


# Accidents ------------------------------------------------------------------------------------


def test_a_broken_connection_resumes_in_the_shard(shards, hub):
    shards[0] = shards[0] * 200  # larger than what a broken connection loses
    hub.files[shard_name(0)] = shard_file(shards[0])
    hub.break_after = 300_000
    fineweb(1)
    assert ids("val") == shards[0]
    assert [path for path, asked in hub.requests if asked] == [shard_name(0)]


def test_shards_before_a_failure_are_kept(shards, hub):
    del hub.files[shard_name(3)]
    assert "404" in complaint(4)
    assert (ids("train"), meta()["shards"]) == (shards[1] + shards[2], 2)


def test_tokens_that_an_interrupted_call_appended_go(shards):
    fineweb(1)
    with open(FOLDER / "train.bin", "ab") as file:
        file.write(bytes(501))
    fineweb(2)
    assert ids("train") == shards[1] + shards[2]


def test_a_bin_shorter_than_meta_says_is_not_appended_to(shards):
    fineweb(1)
    (FOLDER / "train.bin").write_bytes(bytes(10))
    message = complaint(2)
    assert (
        "5 tokens" in message and f"{len(shards[1])}" in message and "--overwrite=True" in message
    )


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
def test_a_bad_shard_is_refused_and_thrown_away(shards, hub, bad):
    fineweb(1)
    before = contents()
    hub.files[shard_name(2)] = bad
    assert "fineweb_train_000002.bin" in complaint(2)
    assert contents() == before
