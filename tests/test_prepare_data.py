"""prepare_data.py: text, named datasets and shards to bins and meta.json, and every way in which they can be wrong."""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import decode

import corpus
import prepare_data
import tokenizer
from corpus import read_pieces
from prepare_data import PrepareConfig, prepare

ROOT = Path(prepare_data.__file__).parent
EOT = 256  # the byte tokenizer's <|endoftext|>
SHARDS = "datasets/kjj0/fineweb10B-gpt2/resolve/main"


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody; tests that download use the fixture hub


def write(name, content):
    """A file of text or bytes; compressed where its name ends in .gz."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def make(**options):
    """Prepare data/mine by bytes, half of it for validation; returns the folder."""
    prepare(PrepareConfig(**({"name": "mine", "tokenizer": "byte", "val_fraction": 0.5} | options)))
    return Path("data", options.get("name", "mine"))


def ids(folder, split=None):
    """The ids of a split, or of both."""
    splits = [split] if split else ["train", "val"]
    return np.concatenate([np.fromfile(folder / f"{split}.bin", "<u2") for split in splits]).tolist()


def text_of(folder):
    return bytes(id for id in ids(folder) if id < EOT).decode("utf-8")


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


# Text in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text", "text.md"])
def test_text_comes_out_as_its_bytes(name):
    write(name, "naïve 日本語\r\n👍")
    assert ids(make(input=name)) == list("naïve 日本語\r\n👍".encode())


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_the_lines_of_jsonl_are_documents(name):
    write(name, '{"text": "first"}\n\n{"text": "sec\\u00f6nd", "id": 7}')
    assert ids(make(input=name)) == [*b"first", EOT, *"secönd".encode()]


def test_field_names_the_text_of_jsonl():
    write("lines.jsonl", '{"text": "no", "body": "body"}\n')
    assert text_of(make(input="lines.jsonl", field="body")) == "body"


def test_a_byte_order_mark_before_jsonl_is_skipped():
    write("lines.jsonl", '\ufeff{"text": "first"}\n')
    assert ids(make(input="lines.jsonl")) == list(b"first")


def test_the_files_of_a_pattern_are_documents_in_sorted_order():
    for name in "bca":
        write(f"{name}.txt", name * 3)
    assert ids(make(input="*.txt")) == [*b"aaa", EOT, *b"bbb", EOT, *b"ccc"]


def test_a_pattern_may_mix_kinds_of_files():
    write("a.txt", "aa")
    write("b.jsonl.gz", '{"text": "bb"}\n{"text": "cc"}\n')
    write("c.txt.gz", "dd")
    assert ids(make(input="*.*")) == [*b"aa", EOT, *b"bb", EOT, *b"cc", EOT, *b"dd"]


def test_a_pattern_reaches_into_folders():
    Path("deep/er").mkdir(parents=True)
    write("deep/a.txt", "aa")
    write("deep/er/b.txt", "bb")
    assert ids(make(input="deep/**/*.txt")) == [*b"aa", EOT, *b"bb"]


def test_a_file_whose_name_looks_like_a_pattern_is_found():
    write("text [1].txt", "brackets")
    assert text_of(make(input="text [1].txt")) == "brackets"


def test_empty_documents_get_no_separator():
    write("a.txt", "")
    write("b.txt", "text")
    write("c.jsonl", '{"text": ""}\n{"text": "more"}\n{"text": ""}\n')
    assert ids(make(input="*.*")) == [*b"text", EOT, *b"more"]


def test_the_letters_of_endoftext_are_letters():
    write("text.txt", "a<|endoftext|>b")
    assert ids(make(input="text.txt")) == list(b"a<|endoftext|>b")


def test_half_a_surrogate_pair_in_jsonl_becomes_the_replacement_character():
    write("lines.jsonl", '{"text": "a\\ud83db"}\n')
    assert text_of(make(input="lines.jsonl")) == "a\ufffdb"


def test_char_can_hold_the_replacement_character_of_half_a_surrogate_pair():
    write("lines.jsonl", '{"text": "ab\\ud83dab"}\n')
    assert meta_of(make(input="lines.jsonl", tokenizer="char"))["chars"] == ["a", "b", "\ufffd"]


def test_a_document_read_in_many_pieces_stays_whole(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 5)
    write("a.txt", "one two  three\n\nfour " * 20)
    write("b.txt", "日本語 👍" * 20)
    assert ids(make(input="*.txt")) == [*b"one two  three\n\nfour " * 20, EOT, *("日本語 👍" * 20).encode()]


FRAGMENTS = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\u200b",
]
FRAGMENTS += [
    "a",
    "word",
    "Don't",
    "'s",
    "'ll",
    "'",
    "é",
    "e\u0301",
    "ß",
    "日本",
    "👍🏽",
    "7",
    "1234",
    "...",
    "!?",
    "_",
]
FRAGMENTS += ["<|endoftext|>", "<|", "\ufeff", "\x00"]


@pytest.mark.parametrize("seed", range(10))
def test_pieces_give_the_gpt2_tokens_of_the_whole_text(gpt2_tokenizer, monkeypatch, seed):
    for trial in range(20):
        rng = random.Random(100 * seed + trial)
        monkeypatch.setattr(corpus, "PIECE", rng.randint(1, 30))
        monkeypatch.setattr(corpus, "BATCH", rng.randint(1, 100))
        spaced = rng.choice([0, 0.5])
        fragments = [rng.choice(FRAGMENTS[:12] if rng.random() < spaced else FRAGMENTS) for _ in range(120)]
        write("text.txt", "".join(fragments))
        got = np.concatenate(list(corpus.tokenize(gpt2_tokenizer, read_pieces(["text.txt"], "text", ""))))
        assert got.tolist() == gpt2_tokenizer.encode_ordinary("".join(fragments))


def test_your_own_text_under_a_known_name_is_split_and_tokenized_as_that_dataset():
    write("text.txt", "some text " * 100)
    folder = make(name="shakespeare_char", input="text.txt", tokenizer=None, val_fraction=None)
    assert meta_of(folder)["tokenizer"] == "char" and len(ids(folder, "val")) == 100


def test_the_training_command_of_a_known_name_is_its_config(capsys):
    write("text.txt", "some text " * 100)
    prepare_data.main(["shakespeare_char", "--input=text.txt"])
    assert capsys.readouterr().out.splitlines()[-1] == "python train.py config/shakespeare_char.py"


# Bins and meta.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5])
def test_the_last_val_fraction_of_the_tokens_is_val(val_fraction):
    content = bytes(random.Random(0).choices(range(32, 127), k=1000))
    write("text.txt", content)
    folder = make(input="text.txt", val_fraction=val_fraction)
    n_train = round(1000 * (1 - val_fraction))
    assert (ids(folder, "train"), ids(folder, "val")) == (list(content[:n_train]), list(content[n_train:]))


def test_your_own_text_has_a_hundredth_for_validation():
    write("text.txt", "x" * 1000)
    assert len(ids(make(input="text.txt", val_fraction=None), "val")) == 10


def test_your_own_text_is_tokenized_for_gpt2(gpt2_tokenizer):
    write("text.txt", "Hello world, hello again. " * 20)
    folder = make(input="text.txt", tokenizer=None)
    assert ids(folder) == gpt2_tokenizer.encode_ordinary("Hello world, hello again. " * 20)


def test_the_vocabulary_of_char_is_the_characters_of_all_files_in_order():
    write("a.txt", "bé\n")
    write("b.txt", "aab👍")
    meta = meta_of(make(input="*.txt", tokenizer="char"))
    assert meta["chars"] == ["\n", "a", "b", "é", "👍", "<|endoftext|>"] and meta["vocab_size"] == 6


def test_char_has_no_end_of_text_for_one_document():
    write("text.txt", "abab")
    assert meta_of(make(input="text.txt", tokenizer="char"))["chars"] == ["a", "b"]


def test_char_separates_documents_by_its_last_id():
    write("a.txt", "ab")
    write("b.txt", "ba")
    assert ids(make(input="*.txt", tokenizer="char")) == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("name", ["gpt2", "byte", "char"])
def test_meta_names_a_tokenizer_that_decodes_the_bins(request, name):
    if name == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    write("text.txt", "naïve 日本語 text 👍 " * 9)
    folder = make(input="text.txt", tokenizer=name)
    found = tokenizer.get_tokenizer(tokenizer.read_meta(folder))
    assert decode(found, ids(folder)) == "naïve 日本語 text 👍 " * 9


@pytest.fixture
def described():
    """A dataset of three documents and what its meta.json says."""
    write("lines.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ("naïve", "日本語 👍", "the end")))
    folder = make(input="lines.jsonl", val_fraction=0.4)
    return folder, meta_of(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_meta_counts_the_tokens(described, split):
    folder, meta = described
    assert meta[split]["tokens"] == (folder / f"{split}.bin").stat().st_size / 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_meta_knows_the_largest_id(described, split):
    folder, meta = described
    assert meta[split]["largest_id"] == max(ids(folder, split))


@pytest.mark.parametrize("split", ["train", "val"])
def test_meta_has_the_sha256_of_the_bins(described, split):
    folder, meta = described
    assert meta[split]["sha256"] == hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()


def test_meta_counts_the_bytes_of_text_without_separators(described):
    _, meta = described
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len("naïve日本語 👍the end".encode())


def test_meta_counts_the_bytes_of_text_under_gpt2(gpt2_tokenizer):
    write("a.txt", "naïve 日本語 👍 text\n" * 50)
    write("b.txt", "the end " * 50)
    meta = meta_of(make(input="*.txt", tokenizer="gpt2"))
    size = Path("a.txt").stat().st_size + Path("b.txt").stat().st_size
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == size


def test_meta_tells_tokenizer_vocabulary_source_and_fraction(described):
    _, meta = described
    told = {name: meta[name] for name in ("tokenizer", "vocab_size", "source", "val_fraction")}
    assert told == {"tokenizer": "byte", "vocab_size": 257, "source": "lines.jsonl", "val_fraction": 0.4}


def test_prepare_returns_what_it_wrote(described):
    folder, meta = described
    assert prepare(PrepareConfig("mine", "lines.jsonl", tokenizer="byte", val_fraction=0.4)) == meta == meta_of(folder)


def test_a_dataset_is_two_bins_and_meta(described):
    folder, _ = described
    assert sorted(contents(folder)) == ["meta.json", "train.bin", "val.bin"]


def test_the_last_line_is_the_training_command(capsys):
    write("text.txt", "some text")
    prepare_data.main(["mine", "--input=text.txt", "--tokenizer=byte", "--val_fraction=0.5"])
    assert capsys.readouterr().out.splitlines()[-1] == "python train.py config/quickstart.py --dataset=mine"


def test_every_dataset_has_a_training_config():
    assert all((ROOT / config).is_file() for *_, config in prepare_data.DATASETS.values())


PEAK = """
import os, sys
import corpus, prepare_data

os.cpu_count, corpus.PIECE, corpus.BATCH = lambda: 2, 1 << 17, 1 << 17  # the least that is held is small
prepare_data.prepare(prepare_data.PrepareConfig("mine", sys.argv[1], tokenizer="byte", overwrite=True))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_corpus():
    peaks = []
    for lines in (100_000, 1_000_000):  # 4 and 38 MB
        write("text.txt", b"Some words of text, and a line's end.\n" * lines)
        command = [sys.executable, "-c", PEAK, "text.txt"]
        peaks.append(int(subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(ROOT)})))
    assert peaks[1] - peaks[0] < 15_000  # kB; the larger text alone is 34 MB more, its ids 68 MB


# All or nothing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def former():
    """data/mine as an earlier call left it."""
    write("text.txt", "the former text " * 10)
    folder = make(input="text.txt")
    return folder, contents(folder)


def test_an_error_in_the_middle_leaves_the_former_dataset(former, refused, monkeypatch):
    folder, before = former
    monkeypatch.setattr(corpus, "PIECE", 50)
    write("text.txt", b"other words " * 100 + b"\xff")
    refused("mine", "--input=text.txt", "--tokenizer=byte")
    assert contents(folder) == before


def test_an_error_in_the_middle_leaves_no_parts_of_a_new_dataset(refused, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 50)
    write("text.txt", b"other words " * 100 + b"\xff")
    refused("mine", "--input=text.txt", "--tokenizer=byte")
    assert contents(Path("data/mine")) == {}


def test_a_kill_while_the_bins_change_places_leaves_no_meta(former, monkeypatch):
    def killed(folder, meta):
        raise KeyboardInterrupt

    folder, _ = former
    monkeypatch.setattr(prepare_data, "write_json", killed)
    write("text.txt", "the new text " * 10)
    with pytest.raises(KeyboardInterrupt):
        make(input="text.txt")
    assert "meta.json" not in contents(folder)


def test_the_same_call_again_takes_up_a_changed_text(former):
    folder, _ = former
    write("text.txt", "the new text")
    assert text_of(make(input="text.txt")) == "the new text"
    assert sorted(contents(folder)) == ["meta.json", "train.bin", "val.bin"]


def test_a_folder_made_from_something_else_is_refused_naming_it(former, refused):
    write("other.txt", "other text")
    line = refused("mine", "--input=other.txt", "--tokenizer=byte")
    assert "text.txt" in line and "--overwrite=True" in line


def test_a_folder_made_from_something_else_stays_as_it_was(former, refused):
    folder, before = former
    write("other.txt", "other text")
    refused("mine", "--input=other.txt", "--tokenizer=byte")
    assert contents(folder) == before


def test_overwrite_replaces_a_folder_made_from_something_else(former):
    write("other.txt", "other text")
    assert text_of(make(input="other.txt", overwrite=True)) == "other text"


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
@pytest.mark.parametrize("piece", [7, 64, 1 << 20])
def test_an_undecodable_byte_is_refused_with_file_and_offset(refused, monkeypatch, name, piece):
    monkeypatch.setattr(corpus, "PIECE", piece)
    write(name, "é and words ".encode() * 30 + b"\xff and more")
    line = refused("mine", f"--input={name}", "--tokenizer=byte")
    assert name in line and "byte 390 " in line


def test_a_character_cut_off_at_the_end_is_refused_with_its_offset(refused):
    write("text.txt", b"some text" + "日".encode()[:2])
    assert "byte 9 " in refused("mine", "--input=text.txt", "--tokenizer=byte")


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_empty_text_is_refused(refused, tokenizer):
    write("text.txt", "")
    assert "text.txt has 0 tokens" in refused("mine", "--input=text.txt", f"--tokenizer={tokenizer}")


def test_text_too_short_to_split_is_refused_with_the_numbers(refused):
    write("text.txt", "x" * 100)
    line = refused("mine", "--input=text.txt", "--tokenizer=byte", "--val_fraction=0.01")
    assert all(number in line for number in ("100 tokens", "val_fraction=0.01", " 99 ", " 1 "))


def test_missing_files_are_refused_naming_the_pattern(refused):
    assert "--input=none/*.txt" in refused("mine", "--input=none/*.txt", "--tokenizer=byte")


def test_a_folder_is_refused_with_the_pattern_to_write(refused):
    Path("corpus").mkdir()
    assert "corpus/**/*.txt" in refused("mine", "--input=corpus", "--tokenizer=byte")


BAD_LINES = {"not json": "{'text'", "no object": '["text"]', "a string": '"text"', "another field": '{"body": "x"}'}
BAD_LINES |= {"not a string": '{"text": 3}', "null": '{"text": null}'}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_of_jsonl_is_refused_with_file_line_and_field(refused, bad):
    write("lines.jsonl", '{"text": "good"}\n\n' + bad + "\n")
    line = refused("mine", "--input=lines.jsonl", "--tokenizer=byte")
    assert "lines.jsonl, line 3:" in line and '"text"' in line


def test_an_undecodable_line_of_jsonl_is_refused_as_such(refused):
    write("lines.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n')
    line = refused("mine", "--input=lines.jsonl", "--tokenizer=byte")
    assert "lines.jsonl, line 2:" in line and "UTF-8" in line


def test_a_truncated_gz_is_refused_naming_the_file(refused):
    Path("text.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(1000).hex().encode())[:-200])
    assert "text.txt.gz" in refused("mine", "--input=text.txt.gz", "--tokenizer=byte")


def test_a_gz_with_altered_bytes_is_refused_naming_the_file(refused):
    content = bytearray(gzip.compress(random.Random(0).randbytes(1000).hex().encode()))
    content[300] ^= 255
    Path("text.txt.gz").write_bytes(content)
    assert "text.txt.gz" in refused("mine", "--input=text.txt.gz", "--tokenizer=byte")


def test_a_gz_that_is_none_is_refused_naming_the_file(refused):
    Path("text.txt.gz").write_text("plain text")
    assert "text.txt.gz" in refused("mine", "--input=text.txt.gz", "--tokenizer=byte")


@pytest.mark.parametrize("val_fraction", ["0", "1", "-0.1", "1.5", "nan"])
def test_a_bad_val_fraction_is_refused_with_its_value(refused, val_fraction):
    write("text.txt", "x" * 100)
    line = refused("mine", "--input=text.txt", "--tokenizer=byte", f"--val_fraction={val_fraction}")
    assert f"val_fraction={float(val_fraction)} must be above 0 and below 1" in line


def test_an_unknown_tokenizer_is_refused_naming_the_known_ones(refused):
    write("text.txt", "x" * 100)
    assert "gpt2, byte, char" in refused("mine", "--input=text.txt", "--tokenizer=llama")


def test_an_unknown_name_is_refused_naming_the_known_ones_and_input(refused):
    line = refused("stdlip")
    assert "stdlib, shakespeare, shakespeare_char, fineweb" in line and "--input" in line


def test_an_empty_input_is_none(refused):
    assert "--input" in refused("mine", "--input=", "--tokenizer=byte")


def test_a_file_named_fineweb_is_text():
    write("fineweb", "some text")
    assert text_of(make(input="fineweb")) == "some text"


@pytest.mark.parametrize("argv", [[], ["--input=text.txt"], ["..", "--input=text.txt"], ["a/b", "--input=text.txt"]])
def test_a_name_that_is_no_name_is_refused(refused, argv):
    write("text.txt", "x" * 100)
    assert "name a dataset" in refused(*argv, "--tokenizer=byte")


def test_more_characters_than_uint16_holds_are_refused_with_their_number(refused):
    write("text.txt", "".join(map(chr, range(0x10000, 0x20001))))
    assert "65537 different characters" in refused("mine", "--input=text.txt", "--tokenizer=char")


def test_as_many_characters_as_uint16_holds_are_fine():
    write("text.txt", "".join(map(chr, range(0x10000, 0x20000))))
    assert ids(make(input="text.txt", tokenizer="char")) == list(range(65536))


# --verify -----------------------------------------------------------------------------------------------------------


def test_verify_passes_what_was_prepared(described):
    prepare_data.main(["mine", "--verify=True"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_verify_finds_one_flipped_bit(described, refused, split):
    bin_path = described[0] / f"{split}.bin"
    content = bytearray(bin_path.read_bytes())
    content[len(content) // 2] ^= 1
    bin_path.write_bytes(content)
    line = refused("mine", "--verify=True")
    assert f"{split}.bin" in line and hashlib.sha256(content).hexdigest() in line


def test_verify_finds_one_byte_too_many(described, refused):
    with open(described[0] / "val.bin", "ab") as file:
        file.write(b"x")
    assert "val.bin" in refused("mine", "--verify=True")


def test_verify_refuses_a_missing_bin(described, refused):
    (described[0] / "val.bin").unlink()
    assert "val.bin" in refused("mine", "--verify=True")


def test_verify_refuses_a_meta_without_hashes(described, refused):
    (described[0] / "meta.json").write_text('{"tokenizer": "byte"}')
    assert "SHA-256" in refused("mine", "--verify=True")


def test_verify_refuses_a_dataset_that_is_not_there(refused):
    assert "meta.json" in refused("mine", "--verify=True")


# Named datasets -----------------------------------------------------------------------------------------------------


def test_stdlib_is_python_text_by_bytes(monkeypatch):
    files = prepare_data.stdlib_files()[:5]
    monkeypatch.setattr(prepare_data, "stdlib_files", lambda: files)
    folder = make(name="stdlib", tokenizer=None, val_fraction=None)
    documents = [Path(path).read_bytes() for path in files]
    assert meta_of(folder)["tokenizer"] == "byte"
    assert text_of(folder).encode() == b"".join(documents)


def test_stdlib_files_are_distinct_and_not_tests_and_in_the_same_order_every_time():
    files = prepare_data.stdlib_files()
    assert len(set(files)) == len(files) > 300
    assert not [path for path in files if re.search(r"/(tests?|site-packages)/", path)]
    assert prepare_data.stdlib_files() == files


@pytest.fixture
def shakespeare(hub, monkeypatch):
    hub.files["input.txt"] = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 10
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", f"{hub.url}/input.txt")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(hub.files["input.txt"]).hexdigest())
    return hub.files["input.txt"]


def test_shakespeare_char_is_the_downloaded_text_by_characters(shakespeare):
    folder = make(name="shakespeare_char", tokenizer=None, val_fraction=None)
    chars = meta_of(folder)["chars"]
    assert "".join(chars[id] for id in ids(folder)).encode() == shakespeare
    assert chars == sorted(set(shakespeare.decode()))


def test_shakespeare_is_the_downloaded_text_for_gpt2(shakespeare, gpt2_tokenizer):
    folder = make(name="shakespeare", tokenizer=None, val_fraction=None)
    assert ids(folder) == gpt2_tokenizer.encode_ordinary(shakespeare.decode())


def test_shakespeare_keeps_a_tenth_for_validation(shakespeare):
    folder = make(name="shakespeare_char", tokenizer=None, val_fraction=None)
    assert len(ids(folder, "val")) == len(shakespeare) // 10


def test_shakespeare_is_downloaded_once(shakespeare, hub):
    for name in ("shakespeare_char", "shakespeare_char"):
        make(name=name, tokenizer=None)
    assert hub.requests == [("input.txt", None)]


def test_another_text_in_shakespeares_place_is_refused(shakespeare, hub, refused):
    hub.files["input.txt"] += b"."
    assert "altered" in refused("shakespeare_char")


# FineWeb ------------------------------------------------------------------------------------------------------------


def shard_file(shard_ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(shard_ids) if count is None else count
    return header.tobytes() + np.array(shard_ids, "<u2").tobytes()


def shard_name(shard):
    return f"{SHARDS}/fineweb_" + ("val_000000.bin" if shard == 0 else f"train_{shard:06d}.bin")


@pytest.fixture
def shards(hub):
    """The hub's shards, number 0 for validation: lists of ids below 50257 and of different lengths."""
    rng = random.Random(0)
    shards = [[rng.randrange(50257) for _ in range(1000 + i)] for i in range(5)]
    for i, shard in enumerate(shards):
        hub.files[shard_name(i)] = shard_file(shard)
    return shards


def fineweb(shards, **options):
    return make(name="fineweb", tokenizer=None, val_fraction=None, shards=shards, **options)


def test_fineweb_is_the_shards_without_headers_in_order(shards):
    folder = fineweb(3)
    assert ids(folder, "train") == shards[1] + shards[2] + shards[3]


def test_fineweb_validation_is_the_validation_shard(shards):
    assert ids(fineweb(1), "val") == shards[0]


def test_fineweb_leaves_no_shards(shards):
    assert sorted(contents(fineweb(2))) == ["meta.json", "train.bin", "val.bin"]


def test_fineweb_can_be_verified(shards):
    fineweb(2)
    prepare_data.main(["fineweb", "--verify=True"])


def test_fineweb_meta_describes_the_bins(shards):
    folder = fineweb(2)
    meta, train = meta_of(folder), shards[1] + shards[2]
    assert (meta["tokenizer"], meta["vocab_size"], meta["shards"]) == ("gpt2", 50257, 2)
    assert (meta["train"]["tokens"], meta["train"]["largest_id"]) == (len(train), max(train))
    assert meta["train"]["sha256"] == hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()


def test_fineweb_meta_counts_the_bytes_of_text(shards, gpt2_tokenizer):
    meta = meta_of(fineweb(1))
    assert meta["val"]["bytes"] == sum(len(gpt2_tokenizer.decode_single_token_bytes(id)) for id in shards[0])


def test_fineweb_needs_no_gpt2_tokenizer(shards, monkeypatch):
    def get_tokenizer(meta):
        raise prepare_data.UserError("not here")

    monkeypatch.setattr(prepare_data, "get_tokenizer", get_tokenizer)
    assert "bytes" not in meta_of(fineweb(1))["train"]


def test_more_fineweb_downloads_only_the_new_shards(shards, hub):
    fineweb(2)
    hub.requests.clear()
    folder = fineweb(4)
    assert hub.requests == [(shard_name(3), None), (shard_name(4), None)]
    assert ids(folder, "train") == shards[1] + shards[2] + shards[3] + shards[4]


def test_the_same_fineweb_again_downloads_nothing(shards, hub):
    folder = fineweb(2)
    before = contents(folder)
    hub.requests.clear()
    fineweb(2)
    assert hub.requests == [] and contents(folder) == before


def test_the_same_fineweb_again_does_not_vouch_for_a_damaged_bin(shards, refused):
    folder = fineweb(1)
    (folder / "train.bin").write_bytes(bytes(len(shards[1]) * 2))
    fineweb(1)
    assert "train.bin" in refused("fineweb", "--verify=True")


def test_overwrite_makes_fineweb_anew(shards):
    folder = fineweb(2)
    (folder / "train.bin").write_bytes(b"damaged")
    fineweb(1, overwrite=True)
    assert (ids(folder, "train"), meta_of(folder)["shards"]) == (shards[1], 1)


def test_fineweb_in_the_place_of_another_dataset_is_refused(shards, refused):
    write("text.txt", "some text")
    make(name="fineweb", input="text.txt")
    assert "text.txt" in refused("fineweb", "--shards=1")


def test_fineweb_can_overwrite_another_dataset(shards):
    write("text.txt", "some text")
    make(name="fineweb", input="text.txt")
    folder = fineweb(1, overwrite=True)
    assert (ids(folder, "train"), ids(folder, "val")) == (shards[1], shards[0])


def test_fewer_shards_than_there_are_is_refused_with_both_numbers(shards, refused):
    fineweb(2)
    line = refused("fineweb", "--shards=1")
    assert "2 shards" in line and "--shards=1" in line


@pytest.mark.parametrize("number", ["0", "-1", "104"])
def test_shards_that_do_not_exist_are_refused_with_the_range(refused, number):
    line = refused("fineweb", f"--shards={number}")
    assert f"shards={number}" in line and "103" in line


def test_a_broken_connection_resumes_in_the_shard(shards, hub):
    shards[0] = shards[0] * 200  # larger than what a broken connection loses
    hub.files[shard_name(0)] = shard_file(shards[0])
    hub.break_after = 300_000
    assert ids(fineweb(1), "val") == shards[0]
    assert [path for path, asked in hub.requests if asked] == [shard_name(0)]


def test_shards_before_a_failure_are_kept(shards, hub, refused):
    del hub.files[shard_name(3)]
    assert "404" in refused("fineweb", "--shards=4")
    assert ids(Path("data/fineweb"), "train") == shards[1] + shards[2]
    assert meta_of(Path("data/fineweb"))["shards"] == 2


def test_tokens_that_an_interrupted_call_appended_go(shards):
    folder = fineweb(1)
    with open(folder / "train.bin", "ab") as file:
        file.write(bytes(501))
    assert ids(fineweb(2), "train") == shards[1] + shards[2]


def test_a_bin_shorter_than_meta_says_is_not_appended_to(shards, refused):
    folder = fineweb(1)
    (folder / "train.bin").write_bytes(bytes(10))
    line = refused("fineweb", "--shards=2")
    assert "5 tokens" in line and f"{len(shards[1])}" in line and "--overwrite=True" in line


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
def test_a_bad_shard_is_refused_and_thrown_away(shards, hub, refused, bad):
    folder = fineweb(1)
    before = contents(folder)
    hub.files[shard_name(2)] = bad
    assert "fineweb_train_000002.bin" in refused("fineweb", "--shards=2")
    assert contents(folder) == before


@pytest.mark.parametrize("option", ["--tokenizer=byte", "--val_fraction=0.1"])
def test_options_that_cannot_change_fineweb_are_refused(shards, hub, refused, option):
    assert option.partition("=")[0] in refused("fineweb", option)
    assert hub.requests == []
