"""prepare_data.py: your own text becomes two bins and meta.json, all or nothing; --verify."""

import gzip
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import GPT2, decode

import prepare_data
from common.tokenizer import get_tokenizer, read_meta
from prepare_data import PrepareConfig, prepare

EOT = 256  # the byte tokenizer's <|endoftext|>
OWN_TEXT = ("mine", "--input=text.txt", "--tokenizer=byte")


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def make(name="mine", tokenizer="byte", val_fraction=0.5, **options):
    """Prepare data/NAME, by default by bytes and half of it for validation; return the folder."""
    prepare(PrepareConfig(name, tokenizer=tokenizer, val_fraction=val_fraction, **options))
    return Path("data", name)


def ids(folder, *splits):
    """Return the token ids of these splits, by default of both."""
    bins = [np.fromfile(folder / f"{split}.bin", "<u2") for split in splits or ("train", "val")]
    return np.concatenate(bins).tolist()


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def contents(folder):
    """Return the bytes of every file of a folder, by name; {} if there is no folder."""
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refused(capsys):
    """Return a function that runs the program, which must refuse, and returns its one line."""
    return lambda *argv: conftest.refused(capsys, list(argv), prepare_data.main)


# Text in --------------------------------------------------------------------------------------


def test_the_files_of_a_pattern_are_documents_in_sorted_order():
    for name in "bca":
        write(f"{name}.txt", name * 3)
    assert ids(make(input="*.txt")) == [*b"aaa", EOT, *b"bbb", EOT, *b"ccc"]


def test_a_pattern_with_two_stars_finds_files_in_folders():
    Path("deep/er").mkdir(parents=True)
    write("deep/a.txt", "aa")
    write("deep/er/b.txt", "bb")
    assert ids(make(input="deep/**/*.txt")) == [*b"aa", EOT, *b"bb"]


@pytest.mark.parametrize(
    "name", ["text [1].txt", "fineweb"], ids=["like a pattern", "like a dataset"]
)
def test_a_file_whose_name_looks_like_something_else_is_found(name):
    write(name, "some text")
    assert ids(make(input=name)) == list(b"some text")


@pytest.mark.parametrize(
    ("name", "expected"), [("byte", [*b"ab", EOT, *b"ba"]), ("char", [0, 1, 2, 1, 0])]
)
def test_field_names_the_text_of_jsonl(name, expected):
    write("lines.jsonl", '{"text": "no", "body": "ab"}\n{"text": "no", "body": "ba"}\n')
    assert ids(make(input="lines.jsonl", field="body", tokenizer=name)) == expected


def test_each_file_counts_once_however_many_links_lead_to_it():
    Path("folder").mkdir()
    write("a.txt", "aa")
    write("folder/b.txt", "bb")
    os.symlink("a.txt", "c.txt")
    os.link("a.txt", "folder/hard.txt")
    os.symlink("folder", "again")
    assert ids(make(input="**/*.txt")) == [*b"aa", EOT, *b"bb"]


def test_a_link_to_the_folder_above_it_adds_no_file():
    Path("folder").mkdir()
    write("folder/a.txt", "abab")
    os.symlink("..", "folder/up")
    assert ids(make(input="**/*.txt")) == list(b"abab")


def test_equal_files_that_are_not_links_count_each():
    write("a.txt", "same")
    write("b.txt", "same")
    assert ids(make(input="?.txt")) == [*b"same", EOT, *b"same"]


def test_a_separator_becomes_the_end_of_text_token():
    write("text.txt", "ab\n<|endoftext|>\ncd\n<|endoftext|>\n")
    assert ids(make(input="text.txt", separator="<|endoftext|>")) == [*b"ab", EOT, *b"cd"]


@pytest.mark.parametrize("name", ["byte", "char"])
def test_empty_files_among_others_are_no_documents(name):
    write("a.txt", "")
    write("b.txt", "xyxy")
    write("c.jsonl", "\n")
    write("d.txt.gz", gzip.compress(b""))
    folder = make(input="*", tokenizer=name)
    assert decode(get_tokenizer(read_meta(folder)), ids(folder)) == "xyxy"


def test_html_is_text_as_any_other():
    write("page.html", "<!DOCTYPE html><html><body>Some text.</body></html>")
    assert bytes(ids(make(input="*.html"))).startswith(b"<!DOCTYPE html>")


def test_your_own_text_is_tokenized_for_gpt2_by_default(gpt2_tokenizer):
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
    assert ids(folder, "train") == list(content[:n_train])
    assert ids(folder, "val") == list(content[n_train:])


def test_a_hundredth_of_your_own_text_is_for_validation_by_default():
    write("text.txt", "x" * 1000)
    assert len(ids(make(input="text.txt", val_fraction=None), "val")) == 10


def test_the_vocabulary_of_char_is_the_characters_of_all_files_in_order():
    write("a.txt", "bé\n")
    write("b.txt", "aab👍")
    meta = meta_of(make(input="*.txt", tokenizer="char"))
    assert meta["chars"] == ["\n", "a", "b", "é", "👍", "<|endoftext|>"]
    assert meta["vocab_size"] == 6


def test_char_has_no_end_of_text_token_if_there_is_one_document():
    write("text.txt", "abab")
    assert meta_of(make(input="text.txt", tokenizer="char"))["chars"] == ["a", "b"]


NON_ASCII = "naïve 日本語 text 👍 " * 9


@pytest.fixture(params=[GPT2, "byte", "char"])
def two_documents(request):
    """A dataset of two documents of NON_ASCII, for each tokenizer."""
    write("a.txt", NON_ASCII)
    write("b.txt", NON_ASCII)
    return make(input="*.txt", tokenizer=request.param)


def test_meta_names_a_tokenizer_that_decodes_the_bins(two_documents):
    meta = read_meta(two_documents)
    text = decode(get_tokenizer(meta), ids(two_documents))
    assert text == f"{NON_ASCII}<|endoftext|>{NON_ASCII}"


def test_meta_counts_the_bytes_of_text(two_documents):
    meta = read_meta(two_documents)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 2 * len(NON_ASCII.encode())


@pytest.fixture
def described():
    """The folder of a dataset of three documents, and its meta.json."""
    texts = ("naïve", "日本語 👍", "the end")
    write("lines.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = make(input="lines.jsonl", val_fraction=0.4)
    return folder, meta_of(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_meta_has_the_tokens_the_largest_id_and_the_sha256_of_each_bin(described, split):
    folder, meta = described
    token_ids = ids(folder, split)
    content = (folder / f"{split}.bin").read_bytes()
    assert meta[split]["tokens"] == len(token_ids)
    assert meta[split]["largest_id"] == max(token_ids)
    assert meta[split]["sha256"] == hashlib.sha256(content).hexdigest()


def test_meta_has_the_tokenizer_the_vocabulary_size_the_source_and_the_fraction(described):
    _, meta = described
    assert meta["tokenizer"] == "byte"
    assert meta["vocab_size"] == 257
    assert meta["source"] == "lines.jsonl"
    assert meta["val_fraction"] == 0.4


def test_prepare_returns_the_meta_that_it_writes(described):
    folder, meta = described
    config = PrepareConfig("mine", "lines.jsonl", tokenizer="byte", val_fraction=0.4)
    assert prepare(config) == meta == meta_of(folder)


def test_a_dataset_is_two_bins_and_meta_json(described):
    folder, _ = described
    assert sorted(contents(folder)) == ["meta.json", "train.bin", "val.bin"]


# All or nothing -------------------------------------------------------------------------------


@pytest.fixture
def existing():
    """The folder of a dataset that an earlier call made, and the bytes of its files."""
    write("text.txt", "the former text " * 10)
    folder = make(input="text.txt")
    return folder, contents(folder)


@pytest.fixture
def undecodable(monkeypatch):
    """A text.txt of which only the last byte, number 1200, is not UTF-8."""
    monkeypatch.setattr("common.text.PIECE_BYTES", 50)
    write("text.txt", b"other words " * 100 + b"\xff")


def test_an_error_in_the_text_leaves_the_existing_dataset_as_it_was(existing, undecodable, refused):
    folder, before = existing
    assert re.search(r"\b1200\b", refused(*OWN_TEXT))
    assert contents(folder) == before


def test_an_error_in_the_text_of_a_new_dataset_leaves_no_file(undecodable, refused):
    refused(*OWN_TEXT)
    assert list(Path("data/mine").iterdir()) == []


def test_an_interrupt_while_meta_json_is_written_keeps_the_old_dataset(existing, monkeypatch):
    folder, before = existing

    def interrupt(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(input="text.txt")
    assert contents(folder) == before


def test_a_small_dataset_without_train_bin_is_prepared_when_it_is_opened(monkeypatch):
    write("module.py", 100 * "x = 1\n")
    monkeypatch.setattr(prepare_data, "stdlib_files", lambda: ["module.py"])
    folder, meta = prepare_data.open_dataset("stdlib")
    os.remove(folder / "train.bin")  # as after a kill while it was written
    assert prepare_data.open_dataset("stdlib") == (folder, meta)
    assert (folder / "train.bin").stat().st_size == 2 * meta["train"]["tokens"]


def test_a_dataset_without_train_bin_is_prepared_again(existing):
    expected = Path("data/mine/train.bin").read_bytes()
    os.remove("data/mine/train.bin")  # as after a kill while it was written
    make(input="text.txt")
    assert Path("data/mine/train.bin").read_bytes() == expected


def test_the_same_call_again_reads_a_changed_text(existing):
    write("text.txt", "the new text")
    assert ids(make(input="text.txt")) == list(b"the new text")


def test_a_dataset_from_another_source_is_refused_with_the_source_and_kept(existing, refused):
    folder, before = existing
    write("other.txt", "other text")
    line = refused("mine", "--input=other.txt", "--tokenizer=byte")
    assert "text.txt" in line
    assert "--overwrite=True" in line
    assert contents(folder) == before


def test_bins_of_another_program_are_refused_and_kept(existing, refused):
    folder, before = existing
    (folder / "meta.json").unlink()
    del before["meta.json"]
    assert "--overwrite=True" in refused(*OWN_TEXT)
    assert contents(folder) == before


def test_overwrite_replaces_a_dataset_from_another_source(existing):
    write("other.txt", "other text")
    assert ids(make(input="other.txt", overwrite=True)) == list(b"other text")


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "char"])
def test_empty_text_is_refused_with_its_zero_tokens(refused, name):
    write("text.txt", "")
    line = refused("mine", "--input=text.txt", f"--tokenizer={name}")
    assert "text.txt" in line
    assert re.search(r"\b0\b", line)
    assert list(Path("data/mine").iterdir()) == []


def test_text_too_short_to_split_is_refused_with_the_numbers(refused):
    write("text.txt", "x" * 100)
    line = refused(*OWN_TEXT, "--val_fraction=0.01")
    assert "val_fraction=0.01" in line
    assert {"100", "99", "1"} <= set(re.findall(r"\b\d+\b", line.replace("0.01", "")))


@pytest.mark.parametrize("pattern", ["none/*.txt", ""])
def test_missing_files_are_refused_with_the_pattern(refused, pattern):
    assert f"--input={pattern}" in refused("mine", f"--input={pattern}", "--tokenizer=byte")


def test_a_folder_is_refused_with_the_pattern_to_write(refused):
    Path("corpus").mkdir()
    assert "corpus/**/*.txt" in refused("mine", "--input=corpus", "--tokenizer=byte")


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "nan"])
def test_a_val_fraction_out_of_range_is_refused_with_its_value(refused, value):
    write("text.txt", "x" * 100)
    line = refused(*OWN_TEXT, f"--val_fraction={value}")
    assert f"val_fraction={float(value)}" in line


def test_an_unknown_tokenizer_is_refused_with_the_known_ones(refused):
    line = refused("mine", "--input=text.txt", "--tokenizer=llama")
    assert all(name in line for name in ("llama", "gpt2", "byte", "char"))


def test_more_characters_than_uint16_holds_are_refused_with_their_number(refused):
    write("text.txt", "".join(map(chr, range(0x10000, 0x20001))))
    assert "65537" in refused("mine", "--input=text.txt", "--tokenizer=char")


def test_as_many_characters_as_uint16_holds_are_accepted():
    write("text.txt", "".join(map(chr, range(0x10000, 0x20000))))
    assert ids(make(input="text.txt", tokenizer="char")) == list(range(65536))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5f\nsize 577\n"
LINES = b'{"text": "some"}\n{"text": "text"}\n'
# name: the content of a file, and what the error must name besides the file
NOT_TEXT = {
    "pointer.txt": (POINTER, "Git LFS"),
    "pointer.jsonl": (POINTER, "Git LFS"),
    "pointer.txt.gz": (POINTER, "Git LFS"),
    "pointer.parquet": (POINTER, "Git LFS"),
    "page.jsonl": (b"<!DOCTYPE html><html><body>Log in.</body></html>", "HTML"),
    "book.pdf": (b"%PDF-1.7\n", "PDF"),
    "book.epub": (b"PK\x03\x04 and more", "ZIP"),
    "rows.txt": (b"PAR1\x15 and more", ".parquet"),
    "text.txt": (gzip.compress(b"some text"), ".gz"),
    "lines.jsonl": (gzip.compress(LINES), ".gz"),
    "twice.txt.gz": (gzip.compress(gzip.compress(b"some text")), "gzip"),
    "packed.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar"), "tar"),
    "model.gz": (gzip.compress(b"\x93NUMPY\x01\0"), "NumPy"),
    "windows.txt": ("some text".encode("utf-16"), "UTF-16"),
    "windows.csv": ("some text".encode("utf-16-le"), "UTF-16"),
    "tokens.bin": (np.arange(99, dtype="<u2").tobytes(), "NUL"),
    "rows.parquet": (b"no such file", "Parquet"),
    "empty.parquet": (b"", "Parquet"),
    "list.json": (b'[{"text": "some"}]', "json"),
    "lines.json": (LINES, "json"),
    "lines.JSON.gz": (gzip.compress(LINES), "json"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_what_it_is(refused, name):
    content, expected = NOT_TEXT[name]
    write(name, content)
    write("a.txt", "some text " * 100)
    line = refused("mine", "--input=*", "--tokenizer=byte")
    assert name in line
    assert expected in line
    assert not Path("data/mine/train.bin").exists()


def test_the_command_for_an_array_makes_json_lines(refused):
    write("list.json", '[{"text": "first"}, {"text": "s\u00ebcond"}]')
    line = refused("mine", "--input=list.json")
    command = re.search(r'python (-c ".*" list.json) > NAME.jsonl', line)[1]
    lines = subprocess.run(f"'{sys.executable}' {command}", shell=True, capture_output=True).stdout
    write("lines.jsonl", lines)
    assert ids(make(input="lines.jsonl")) == [*b"first", EOT, *"sëcond".encode()]


@pytest.mark.parametrize(
    ("name", "option"), [("text.txt", "--field=text"), ("lines.jsonl", "--separator=x")]
)
def test_an_option_that_no_file_of_the_input_uses_is_refused(refused, name, option):
    write(name, LINES)
    assert option in refused("mine", f"--input={name}", option)


def test_an_empty_separator_is_refused(refused):
    write("text.txt", "text")
    assert "--separator" in refused(*OWN_TEXT, "--separator=")


def test_a_link_to_nothing_among_the_files_is_refused_with_its_name(refused):
    write("a.txt", "some text")
    os.symlink("missing", "b.txt")
    assert "b.txt" in refused("mine", "--input=*.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_among_the_files_is_refused_with_its_name(refused):
    write("a.txt", "some text")
    os.mkfifo("b.txt")
    assert "b.txt" in refused("mine", "--input=*.txt")


# --verify -------------------------------------------------------------------------------------


def test_verify_accepts_what_was_prepared(described):
    prepare_data.main(["mine", "--verify=True"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_verify_refuses_one_flipped_bit_with_both_hashes(described, refused, split):
    folder, meta = described
    content = bytearray((folder / f"{split}.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / f"{split}.bin").write_bytes(content)
    line = refused("mine", "--verify=True")
    assert f"{split}.bin" in line
    assert hashlib.sha256(content).hexdigest() in line
    assert meta[split]["sha256"] in line


def test_verify_refuses_a_missing_bin(described, refused):
    folder, _ = described
    (folder / "val.bin").unlink()
    assert "val.bin" in refused("mine", "--verify=True")


def test_verify_refuses_a_bin_that_is_one_byte_too_long(described, refused):
    folder, _ = described
    with open(folder / "val.bin", "ab") as file:
        file.write(b"x")
    assert "val.bin" in refused("mine", "--verify=True")


def test_verify_refuses_a_meta_without_hashes(described, refused):
    folder, _ = described
    (folder / "meta.json").write_text('{"tokenizer": "byte"}')
    assert "SHA-256" in refused("mine", "--verify=True")


def test_verify_refuses_a_missing_dataset(refused):
    assert "meta.json" in refused("mine", "--verify=True")


@pytest.mark.parametrize(("content", "is_named"), [('{"text": "a"}\n', True), ("{a}\n", False)])
def test_json_lines_that_are_read_as_text_are_named(content, is_named, capsys):
    write("lines.txt", content * 9)
    make(input="lines.txt")
    assert ("lines.txt" in capsys.readouterr().err) == is_named


@pytest.mark.parametrize("word", ["GGUF", "PAR1", "ARROW1", "%PDF-1.7", "BZh91AY", "LITP"])
def test_text_that_begins_with_the_name_of_a_format_is_text(word):
    write("text.txt", f"{word} is how such a file begins. " * 9)
    make(input="text.txt")


def test_an_import_takes_the_tokenizer_of_a_meta_json_beside_the_bins():
    write("text.txt", "some text " * 9)
    for tokenizer in ("byte", "char"):
        folder = make(tokenizer, tokenizer, input="text.txt")
        prepare_data.main(["again", f"--import_nanogpt={folder}", "--overwrite=True"])
        assert get_tokenizer(read_meta("data/again")).n_vocab == read_meta(folder)["vocab_size"]


def test_a_separator_with_an_escape_of_another_language_is_refused(refused):
    write("text.txt", "one\n\ntwo")
    assert "separator" in refused("mine", "--input=text.txt", r"--separator=\n\n")


def test_a_separator_that_no_file_has_is_named(capsys):
    write("text.txt", "one, two")
    make(input="text.txt", separator="---")
    assert "'---'" in capsys.readouterr().err


def test_an_empty_file_that_should_be_compressed_is_refused(refused):
    write("good.txt", "some text")
    write("empty.txt.gz", "")
    assert "empty.txt.gz" in refused("mine", "--input=*.*")


def test_the_advice_for_a_folder_is_a_pattern_of_bash(refused):
    folder = Path("it's [1]")
    folder.mkdir()
    write(folder / "a.txt", "some text")
    line = refused(*OWN_TEXT[::2], f"--input={folder}")
    [argument] = shlex.split(re.search(r"write (--input=.*) for", line)[1])
    prepare_data.main([OWN_TEXT[0], argument, "--tokenizer=byte", "--val_fraction=0.5"])
