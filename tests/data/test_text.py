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
from hypothesis import given, settings
from hypothesis import strategies as st
from save_memory import memory

import prepare_data
from common import text
from common.errors import UserError
from common.text import count_cores, find_chars, read_pieces, tokenize
from common.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
EOT = 256  # the byte tokenizer's <|endoftext|>
EOT_TEXT = "<|endoftext|>"


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    """Write a file of text or bytes; compressed if its name ends in .gz."""
    if isinstance(content, str):
        content = content.encode()
    if name.lower().endswith(".gz"):
        content = gzip.compress(content)
    Path(name).write_bytes(content)


def documents(*names, field="text", separator=None):
    """Return the texts of the documents in these files: what lies between the separators."""
    texts = [""]
    for piece in read_pieces(names, field, "", separator):
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


@pytest.mark.parametrize("name", ["text.txt", "text.TXT.GZ", "text", "text.md"])
def test_a_file_of_text_is_a_document(name):
    write(name, "naïve 日本語\r\n👍")
    assert documents(name) == ["naïve 日本語\r\n👍"]


JSON_LINES = [
    "jsonl",
    "JSONL",
    "ndjson",
    "NDJSON",
    "jsonlines",
    "jsonl.gz",
    "Jsonl.GZ",
    "ndjson.gz",
]


@pytest.mark.parametrize("name", [f"lines.{suffix}" for suffix in JSON_LINES])
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


# Parquet --------------------------------------------------------------------------------------


def write_parquet(name, columns, **options):
    """Write {column: values} to a file; skip the test if pyarrow is not installed."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), name, **options)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.PARQUET"])
def test_the_rows_of_parquet_are_documents(name):
    write_parquet(name, {"id": [1, 2, 3], "text": ["first", "", "secönd"]})
    assert documents(name) == ["first", "secönd"]


def test_field_names_the_column_of_parquet():
    write_parquet("rows.parquet", {"text": ["no"], "body": ["body"]})
    assert documents("rows.parquet", field="body") == ["body"]


def test_parquet_of_several_row_groups_is_read_in_order(monkeypatch):
    monkeypatch.setattr("common.text.BATCH_ROWS", 7)
    texts = [f"row {i}" for i in range(100)]
    write_parquet("rows.parquet", {"text": texts}, row_group_size=30)
    assert documents("rows.parquet") == texts


def test_a_missing_column_of_parquet_is_refused_with_the_columns():
    write_parquet("rows.parquet", {"id": [1], "content": ["x"]})
    message = user_error("rows.parquet")
    assert all(name in message for name in ("rows.parquet", "--field", "id", "content"))


@pytest.mark.parametrize("values", [[1, 2], ["x", None]])
def test_a_value_of_parquet_that_is_no_text_is_refused_with_its_file(values):
    write_parquet("rows.parquet", {"text": values})
    assert "rows.parquet" in user_error("rows.parquet")


def test_truncated_parquet_is_refused_with_its_name():
    write_parquet("rows.parquet", {"text": ["x"] * 1000})
    os.truncate("rows.parquet", 100)
    assert "rows.parquet" in user_error("rows.parquet")


def test_parquet_without_pyarrow_is_refused_with_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    write("rows.parquet", b"PAR1\x15 and more")
    assert "pip install pyarrow" in user_error("rows.parquet")


# Separators -----------------------------------------------------------------------------------

SEPARATED = {
    "in lines": ("one\n<|endoftext|>\ntwo\n\nlines\n<|endoftext|>\n", "<|endoftext|>"),
    "with other line breaks": (
        "one\r\n<|endoftext|>\r\ntwo\n\nlines\n\n\n<|endoftext|>",
        "<|endoftext|>",
    ),
    "inside a line": ("one<|endoftext|>two\n\nlines", "<|endoftext|>"),
    "with spaces": ("one\n== THE END ==\ntwo\n\nlines\n", "== THE END =="),
    "of one character": ("one|two\n\nlines", "|"),
    "repeated": ("\n%%\none\n%%%%\n%%\n\ntwo\n\nlines%%", "%%"),
}


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 11, 1 << 20])
@pytest.mark.parametrize(("content", "separator"), SEPARATED.values(), ids=SEPARATED.keys())
def test_a_separator_ends_a_document_wherever_the_file_is_cut(
    monkeypatch, piece_bytes, content, separator
):
    monkeypatch.setattr("common.text.PIECE_BYTES", piece_bytes)
    write("text.txt", content)
    assert documents("text.txt", separator=separator) == ["one", "two\n\nlines"]


@settings(max_examples=300, deadline=None)
@given(
    content=st.text("ab \n\r|é", max_size=60),
    separator=st.sampled_from(["|", "||", "a\nb", "\n|\n", " | ", "\r\n", "ab a"]),
    piece_bytes=st.integers(1, 20),
)
def test_the_documents_are_those_of_the_whole_text(content, separator, piece_bytes):
    write("text.txt", content)
    expected = [document.strip("\r\n") for document in content.split(separator)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.text.PIECE_BYTES", piece_bytes)
        found = documents("text.txt", separator=separator)
    assert [text for text in found if text] == [text for text in expected if text]


@pytest.mark.parametrize("separator", [None, "<|end|>"])
def test_without_its_separator_a_text_is_one_document(separator):
    write("text.txt", "one\n<|endoftext|>\ntwo")
    assert documents("text.txt", separator=separator) == ["one\n<|endoftext|>\ntwo"]


def test_a_separator_is_none_of_the_characters_of_a_char_tokenizer():
    write("text.txt", "ab\n<|endoftext|>\nba")
    assert find_chars(["text.txt"], "text", EOT_TEXT) == ["a", "b", EOT_TEXT]


def test_a_separator_needs_no_memory_for_the_documents_before_it(monkeypatch):
    monkeypatch.setattr("common.text.PIECE_BYTES", 100)
    write("text.txt", "\n<|endoftext|>\n".join(["words and more words " * 100] * 20))
    pieces = read_pieces(["text.txt"], "text", "", EOT_TEXT)
    assert max(len(piece or "") for piece in pieces) <= 200


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
    monkeypatch.setattr("common.text.count_cores", lambda: cores)
    pieces = [f"{i} " for i in range(100)]
    assert bytes(ids_of(iter(pieces))).decode() == "".join(pieces)


def test_ids_are_little_endian_uint16():
    for ids in tokenize(byte_tokenizer(), ["a", None, "b"]):
        assert ids.dtype == np.dtype("<u2")


def test_none_between_pieces_becomes_the_end_of_text_token():
    assert ids_of(["a", None, "b"]) == [97, EOT, 98]


def test_endoftext_in_a_text_is_ordinary_text():
    assert ids_of(["a<|endoftext|>b"]) == list(b"a<|endoftext|>b")


# Cores ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has affinities")
@pytest.mark.parametrize("limit", ["max 100000", None])
def test_the_cores_are_those_that_the_process_may_use(monkeypatch, tmp_path, limit):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 6})
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    if limit:
        write("cpu.max", limit)
    monkeypatch.setattr("common.text.CPU_LIMIT", tmp_path / "cpu.max")
    assert count_cores() == 3


@pytest.mark.parametrize(("quota", "cores"), [(200_000, 2), (250_000, 2), (50_000, 1)])
def test_the_limit_of_a_container_bounds_the_cores(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    write("cpu.max", f"{quota} 100000\n")
    monkeypatch.setattr("common.text.CPU_LIMIT", tmp_path / "cpu.max")
    assert count_cores() == cores


# Memory ---------------------------------------------------------------------------------------


@needs_fork
def test_the_memory_of_preparing_does_not_grow_with_the_corpus(tmp_path):
    def prepare_and_measure():
        text.count_cores = lambda: 2
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
    "not json": ("{'text'", "JSON"),
    "pretty-printed": ("{", "JSON"),
    "no object": ('["text"]', "list"),
    "a string": ('"text"', "str"),
    "another field": ('{"body": "x"}', "body"),
    "not a string": ('{"text": 3}', '"text"'),
    "null": ('{"text": null}', '"text"'),
}


@pytest.mark.parametrize(("bad", "cause"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_of_jsonl_is_refused_with_file_line_and_cause(bad, cause):
    write("lines.jsonl", '{"text": "good"}\n\n' + bad + "\n")
    message = user_error("lines.jsonl")
    assert "lines.jsonl" in message
    assert re.search(r"\bline 3\b", message)
    assert cause in message


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
