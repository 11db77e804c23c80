"""prepare_data.py: your own text to bins and meta.json, all or nothing, --verify, and what is refused."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import decode

import prepare_data
from common import tokenizer
from prepare_data import PrepareConfig, prepare

EOT = 256  # the byte tokenizer's <|endoftext|>
OWN = ("mine", "--input=text.txt", "--tokenizer=byte")


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def make(name="mine", **options):
    """Prepare data/NAME; one's own by bytes, half of it for validation. Returns the folder."""
    own = {"tokenizer": "byte", "val_fraction": 0.5} if name == "mine" else {}
    prepare(PrepareConfig(name=name, **(own | options)))
    return Path("data", name)


def ids(folder, *splits):
    """The ids of these splits, of both by default."""
    bins = [np.fromfile(folder / f"{split}.bin", "<u2") for split in splits or ("train", "val")]
    return np.concatenate(bins).tolist()


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def refused(capsys):
    """Run the program; it must end with status 2 and one line, which is returned."""

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            prepare_data.main(list(argv))
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return run


# Text in --------------------------------------------------------------------------------------


def test_the_files_of_a_pattern_are_documents_in_sorted_order():
    for name in "bca":
        write(f"{name}.txt", name * 3)
    assert ids(make(input="*.txt")) == [*b"aaa", EOT, *b"bbb", EOT, *b"ccc"]


def test_a_pattern_reaches_into_folders():
    Path("deep/er").mkdir(parents=True)
    write("deep/a.txt", "aa")
    write("deep/er/b.txt", "bb")
    assert ids(make(input="deep/**/*.txt")) == [*b"aa", EOT, *b"bb"]


@pytest.mark.parametrize(
    "name", ["text [1].txt", "fineweb"], ids=["like a pattern", "like a dataset"]
)
def test_a_file_is_found_whatever_its_name_looks_like(name):
    write(name, "some text")
    assert ids(make(input=name)) == list(b"some text")


@pytest.mark.parametrize(
    ("name", "expected"), [("byte", [*b"ab", EOT, *b"ba"]), ("char", [0, 1, 2, 1, 0])]
)
def test_field_names_the_text_of_jsonl(name, expected):
    write("lines.jsonl", '{"text": "no", "body": "ab"}\n{"text": "no", "body": "ba"}\n')
    assert ids(make(input="lines.jsonl", field="body", tokenizer=name)) == expected


def test_your_own_text_is_tokenized_for_gpt2(gpt2_tokenizer):
    write("text.txt", "Hello world, hello again. " * 20)
    folder = make(input="text.txt", tokenizer=None)
    assert ids(folder) == gpt2_tokenizer.encode_ordinary("Hello world, hello again. " * 20)


# Bins and meta.json ---------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5])
def test_the_last_val_fraction_of_the_tokens_is_val(val_fraction):
    content = bytes(random.Random(0).choices(range(32, 127), k=1000))
    write("text.txt", content)
    folder = make(input="text.txt", val_fraction=val_fraction)
    n_train = round(1000 * (1 - val_fraction))
    assert (ids(folder, "train"), ids(folder, "val")) == (
        list(content[:n_train]),
        list(content[n_train:]),
    )


def test_your_own_text_has_a_hundredth_for_validation():
    write("text.txt", "x" * 1000)
    assert len(ids(make(input="text.txt", val_fraction=None), "val")) == 10


def test_the_vocabulary_of_char_is_the_characters_of_all_files_in_order():
    write("a.txt", "bé\n")
    write("b.txt", "aab👍")
    meta = meta_of(make(input="*.txt", tokenizer="char"))
    assert meta["chars"] == ["\n", "a", "b", "é", "👍", "<|endoftext|>"] and meta["vocab_size"] == 6


def test_char_has_no_end_of_text_for_one_document():
    write("text.txt", "abab")
    assert meta_of(make(input="text.txt", tokenizer="char"))["chars"] == ["a", "b"]


@pytest.mark.parametrize("name", ["gpt2", "byte", "char"])
def test_meta_names_a_tokenizer_that_decodes_the_bins_and_counts_the_bytes_of_text(request, name):
    if name == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    text = "naïve 日本語 text 👍 " * 9
    write("a.txt", text)
    write("b.txt", text)
    folder = make(input="*.txt", tokenizer=name)
    meta = tokenizer.read_meta(folder)
    assert decode(tokenizer.get_tokenizer(meta), ids(folder)) == f"{text}<|endoftext|>{text}"
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 2 * len(text.encode())


@pytest.fixture
def described():
    """A dataset of three documents and what its meta.json says."""
    write(
        "lines.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in ("naïve", "日本語 👍", "the end")),
    )
    folder = make(input="lines.jsonl", val_fraction=0.4)
    return folder, meta_of(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_meta_has_the_tokens_the_largest_id_and_the_sha256_of_the_bins(described, split):
    folder, meta = described
    there, sha256 = (
        ids(folder, split),
        hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest(),
    )
    expected = {"tokens": len(there), "largest_id": max(there), "sha256": sha256}
    assert {name: meta[split][name] for name in expected} == expected


def test_meta_tells_tokenizer_vocabulary_source_and_fraction(described):
    told = {
        name: described[1][name] for name in ("tokenizer", "vocab_size", "source", "val_fraction")
    }
    assert told == {
        "tokenizer": "byte",
        "vocab_size": 257,
        "source": "lines.jsonl",
        "val_fraction": 0.4,
    }


def test_prepare_returns_what_it_wrote(described):
    folder, meta = described
    assert (
        prepare(PrepareConfig("mine", "lines.jsonl", tokenizer="byte", val_fraction=0.4))
        == meta
        == meta_of(folder)
    )


def test_a_dataset_is_two_bins_and_meta(described):
    assert sorted(contents(described[0])) == ["meta.json", "train.bin", "val.bin"]


# All or nothing -------------------------------------------------------------------------------


@pytest.fixture
def former():
    """data/mine as an earlier call left it."""
    write("text.txt", "the former text " * 10)
    folder = make(input="text.txt")
    return folder, contents(folder)


@pytest.mark.parametrize("before", ["former", None])
def test_an_error_in_the_middle_leaves_what_was_there(request, refused, monkeypatch, before):
    before = request.getfixturevalue(before)[1] if before else {}
    monkeypatch.setattr(prepare_data, "PIECE_BYTES", 50)
    write("text.txt", b"other words " * 100 + b"\xff")
    assert "byte 1200 " in refused(*OWN)
    assert contents(Path("data/mine")) == before


def test_a_kill_during_the_renames_leaves_no_train_bin_that_meta_does_not_describe(
    former, monkeypatch
):
    def killed(folder, meta):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        make(input="text.txt")
    assert "train.bin" not in contents(former[0])


def test_the_same_call_again_takes_up_a_changed_text(former):
    write("text.txt", "the new text")
    assert ids(make(input="text.txt")) == list(b"the new text")


def test_a_folder_made_from_something_else_is_refused_naming_it_and_stays_as_it_was(
    former, refused
):
    folder, before = former
    write("other.txt", "other text")
    line = refused("mine", "--input=other.txt", "--tokenizer=byte")
    assert "text.txt" in line and "--overwrite=True" in line and contents(folder) == before


def test_bins_of_other_making_are_refused_and_stay_as_they_were(former, refused):
    folder, before = former
    (folder / "meta.json").unlink()
    assert "--overwrite=True" in refused(*OWN)
    assert contents(folder) == {
        name: content for name, content in before.items() if name != "meta.json"
    }


def test_overwrite_replaces_a_folder_made_from_something_else(former):
    write("other.txt", "other text")
    assert ids(make(input="other.txt", overwrite=True)) == list(b"other text")


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_empty_text_is_refused(refused, tokenizer):
    write("text.txt", "")
    assert "text.txt has 0 tokens" in refused(
        "mine", "--input=text.txt", f"--tokenizer={tokenizer}"
    )
    assert not Path("data/mine").exists()


def test_text_too_short_to_split_is_refused_with_the_numbers(refused):
    write("text.txt", "x" * 100)
    line = refused(*OWN, "--val_fraction=0.01")
    assert all(number in line for number in ("100 tokens", "val_fraction=0.01", " 99 ", " 1 "))


@pytest.mark.parametrize("pattern", ["none/*.txt", ""])
def test_missing_files_are_refused_naming_the_pattern(refused, pattern):
    assert f"--input={pattern}" in refused("mine", f"--input={pattern}", "--tokenizer=byte")


def test_a_folder_is_refused_with_the_pattern_to_write(refused):
    Path("corpus").mkdir()
    assert "corpus/**/*.txt" in refused("mine", "--input=corpus", "--tokenizer=byte")


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "nan"])
def test_a_val_fraction_that_is_none_is_refused_with_its_value(refused, value):
    write("text.txt", "x" * 100)
    assert f"val_fraction={float(value)} must be above 0 and below 1" in refused(
        *OWN, f"--val_fraction={value}"
    )


def test_an_unknown_tokenizer_is_refused_naming_the_known_ones(refused):
    assert "gpt2, byte, char" in refused(*OWN[:2], "--tokenizer=llama")


def test_more_characters_than_uint16_holds_are_refused_with_their_number(refused):
    write("text.txt", "".join(map(chr, range(0x10000, 0x20001))))
    assert "65537 different characters" in refused("mine", "--input=text.txt", "--tokenizer=char")


def test_as_many_characters_as_uint16_holds_are_fine():
    write("text.txt", "".join(map(chr, range(0x10000, 0x20000))))
    assert ids(make(input="text.txt", tokenizer="char")) == list(range(65536))


# --verify -------------------------------------------------------------------------------------


def test_verify_passes_what_was_prepared(described):
    prepare_data.main(["mine", "--verify=True"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_verify_finds_one_flipped_bit_and_tells_both_hashes(described, refused, split):
    folder, meta = described
    content = bytearray((folder / f"{split}.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / f"{split}.bin").write_bytes(content)
    line = refused("mine", "--verify=True")
    assert all(
        part in line
        for part in (f"{split}.bin", hashlib.sha256(content).hexdigest(), meta[split]["sha256"])
    )


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda bin: bin.open("ab").write(b"x")], ids=["gone", "too long"]
)
def test_verify_finds_a_bin_gone_or_one_byte_too_long(described, refused, damage):
    damage(described[0] / "val.bin")
    assert "val.bin" in refused("mine", "--verify=True")


def test_verify_refuses_a_meta_without_hashes(described, refused):
    (described[0] / "meta.json").write_text('{"tokenizer": "byte"}')
    assert "SHA-256" in refused("mine", "--verify=True")


def test_verify_refuses_a_dataset_that_is_not_there(refused):
    assert "meta.json" in refused("mine", "--verify=True")
