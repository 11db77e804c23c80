"""common/text.py: files to documents to pieces to token ids, and what is wrong with a text."""

import gzip
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import needs_fork, run_in
from save_memory import memory

import prepare_data
from common import text
from common.errors import UserError
from common.text import read_pieces, tokenize
from common.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
EOT = 256  # the byte tokenizer's <|endoftext|>


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    """Write a file of text or bytes; compressed if its name ends in .gz."""
    if isinstance(content, str):
        content = content.encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    Path(name).write_bytes(content)


def documents(*names, field="text"):
    """Return the texts of the documents in these files: what lies between the separators."""
    texts = [""]
    for piece in read_pieces(names, field, ""):
        if piece is None:
            texts.append("")
        else:
            texts[-1] += piece
    return texts


def ids_of(pieces, tokenizer=None):
    return np.concatenate(list(tokenize(tokenizer or byte_tokenizer(), pieces))).tolist()


def user_error(*names):
    """Return the message of the UserError that reading these files raises; it is one line."""
    with pytest.raises(UserError) as error:
        documents(*names)
    assert "\n" not in str(error.value)
    return str(error.value)


# Documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text", "text.md"])
def test_a_file_of_text_is_a_document(name):
    write(name, "naïve 日本語\r\n👍")
    assert documents(name) == ["naïve 日本語\r\n👍"]


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.jsonl.gz"])
def test_the_lines_of_jsonl_are_documents(name):
    write(name, '{"text": "first"}\n\n{"text": "sec\\u00f6nd", "id": 7}')
    assert documents(name) == ["first", "secönd"]


def test_field_names_the_text_of_jsonl():
    write("lines.jsonl", '{"text": "no", "body": "body"}\n')
    assert documents("lines.jsonl", field="body") == ["body"]


def test_a_byte_order_mark_before_jsonl_is_skipped():
    write("lines.jsonl", '\ufeff{"text": "first"}\n')
    assert documents("lines.jsonl") == ["first"]


def test_half_a_surrogate_pair_in_jsonl_becomes_the_replacement_character():
    write("lines.jsonl", '{"text": "a\\ud83db"}\n')
    assert documents("lines.jsonl") == ["a\ufffdb"]


def test_files_of_all_kinds_come_in_the_order_given():
    write("b.txt", "bb")
    write("a.jsonl.gz", '{"text": "cc"}\n{"text": "dd"}\n')
    write("c.txt.gz", "ee")
    assert documents("b.txt", "a.jsonl.gz", "c.txt.gz") == ["bb", "cc", "dd", "ee"]


def test_empty_documents_get_no_separator():
    write("a.txt", "")
    write("b.txt", "text")
    write("c.jsonl", '{"text": ""}\n{"text": "more"}\n{"text": ""}\n')
    assert documents("a.txt", "b.txt", "c.jsonl", "a.txt") == ["text", "more"]


# Pieces ---------------------------------------------------------------------------------------


def test_a_document_in_many_pieces_stays_one_document(monkeypatch):
    monkeypatch.setattr("common.text.PIECE_BYTES", 5)
    write("a.txt", "one two  three\n\nfour " * 20)
    write("b.txt", "日本語 👍" * 20)
    assert documents("a.txt", "b.txt") == ["one two  three\n\nfour " * 20, "日本語 👍" * 20]


def test_a_piece_is_yielded_before_the_next_ones_are_read(monkeypatch):
    monkeypatch.setattr("common.text.PIECE_BYTES", 10)
    write("text.txt", "words and more words " * 100)
    assert max(map(len, read_pieces(["text.txt"], "text", ""))) <= 20


# Token ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "batch"), [(1, 1), (3, 1), (3, 10), (3, 1 << 20)])
def test_pieces_are_tokenized_in_order(monkeypatch, cores, batch):
    monkeypatch.setattr("common.text.BATCH_CHARS", batch)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    pieces = [f"{i} " for i in range(100)]
    assert bytes(ids_of(iter(pieces))).decode() == "".join(pieces)


def test_ids_are_little_endian_uint16():
    for ids in tokenize(byte_tokenizer(), ["a", None, "b"]):
        assert ids.dtype == np.dtype("<u2")


def test_none_between_pieces_becomes_the_end_of_text_token():
    assert ids_of(["a", None, "b"]) == [97, EOT, 98]


def test_endoftext_in_a_text_is_ordinary_text():
    assert ids_of(["a<|endoftext|>b"]) == list(b"a<|endoftext|>b")


# Memory ---------------------------------------------------------------------------------------


@needs_fork
def test_the_memory_of_preparing_does_not_grow_with_the_corpus(tmp_path):
    def prepare_and_measure():
        os.cpu_count = lambda: 2
        text.PIECE_BYTES = text.BATCH_CHARS = 1 << 17  # little memory for the fixed part
        before = memory("VmHWM")
        prepare_data.main(["mine", "--input=text.txt", "--tokenizer=byte", "--overwrite=True"])
        print(memory("VmHWM") - before, file=sys.stderr)

    grown = []
    for lines in (100_000, 1_000_000):  # 4 and 38 MB
        write("text.txt", b"Some words of text, and a line's end.\n" * lines)
        grown.append(int(run_in(tmp_path, prepare_and_measure).err))
    assert grown[1] - grown[0] < 15_000_000  # the larger text alone is 34 MB more, its ids 68 MB


# Bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
@pytest.mark.parametrize("piece_bytes", [7, 1 << 20])
def test_a_byte_that_is_not_utf8_is_refused_with_file_and_offset(monkeypatch, name, piece_bytes):
    monkeypatch.setattr("common.text.PIECE_BYTES", piece_bytes)
    write(name, "é and words ".encode() * 30 + b"\xff and more")
    message = user_error(name)
    assert name in message
    assert re.search(r"\b390\b", message)


def test_a_truncated_character_at_the_end_is_refused_with_its_offset():
    write("text.txt", b"some text" + "日".encode()[:2])
    assert re.search(r"\b9\b", user_error("text.txt"))


BAD_LINES = {
    "not json": "{'text'",
    "no object": '["text"]',
    "a string": '"text"',
    "another field": '{"body": "x"}',
    "not a string": '{"text": 3}',
    "null": '{"text": null}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_of_jsonl_is_refused_with_file_line_and_field(bad):
    write("lines.jsonl", '{"text": "good"}\n\n' + bad + "\n")
    message = user_error("lines.jsonl")
    assert "lines.jsonl" in message
    assert re.search(r"\bline 3\b", message)
    assert '"text"' in message


def test_a_line_of_jsonl_that_is_not_utf8_is_refused_with_file_and_line():
    write("lines.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n')
    message = user_error("lines.jsonl")
    assert "lines.jsonl" in message
    assert re.search(r"\bline 2\b", message)
    assert "UTF-8" in message


GOOD_GZ = gzip.compress(random.Random(0).randbytes(1000).hex().encode())
BAD_GZ = {
    "truncated": GOOD_GZ[:-200],
    "not gzip": b"plain text",
    "altered": GOOD_GZ[:300] + bytes([GOOD_GZ[300] ^ 255]) + GOOD_GZ[301:],
}


@pytest.mark.parametrize("content", BAD_GZ.values(), ids=BAD_GZ.keys())
def test_a_damaged_gz_file_is_refused_with_its_name(content):
    Path("text.txt.gz").write_bytes(content)
    assert "text.txt.gz" in user_error("text.txt.gz")
