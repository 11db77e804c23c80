"""common/file_kinds.py: files are recognized as their own writers make them, tokens never."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from common.file_kinds import TEXT, identify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5f\nsize 577\n"


def numpy_file():
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


def zip_file():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    return file.getvalue()


def torch_file():
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file)
    return file.getvalue()


def tar_file():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def sqlite_file(tmp_path):
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("create table a (b)")
    connection.close()
    return (tmp_path / "a.db").read_bytes()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (POINTER, "Git LFS"),
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "HTML"),
        (b"\xef\xbb\xbf\n <HTML lang=en>", "HTML"),
        (numpy_file(), "NumPy"),
        (save({"a": torch.ones(2)}), "safetensors"),
        (zip_file(), "ZIP"),
        (torch_file(), "ZIP"),
        (tar_file(), "tar"),
        (gzip.compress(b"text"), "gzip"),
        (bz2.compress(b"text"), "bzip2"),
        (lzma.compress(b"text"), "xz"),
        (pickle.dumps(list(range(999))), "pickle"),
        ("Some text".encode("utf-16"), "UTF-16"),
        (b"\xfe\xff" + "Some text".encode("utf-16-be"), "UTF-16"),
        (b"404: Not Found", TEXT),
        (b'{"text": "JSON is text, too"}\n' * 9, TEXT),
        ("Ein Satz mit Umlauten: ä, ö und ü. ".encode() * 99, TEXT),
        (("字" * 999).encode(), TEXT),
    ],
)
def test_a_file_is_recognized_by_its_beginning(content, word, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert word in identify(tmp_path / "file")


def test_a_database_is_recognized(tmp_path):
    (tmp_path / "file").write_bytes(sqlite_file(tmp_path))
    assert "SQLite" in identify(tmp_path / "file")


@pytest.mark.parametrize("vocab_size", [2, 65, 257, 5000, 50257, 65536])
def test_token_ids_are_not_recognized(vocab_size, tmp_path):
    random = np.random.default_rng(vocab_size)
    for count in (2, 8, 32, 300):
        for _ in range(200):
            random.integers(0, vocab_size, count).astype("<u2").tofile(tmp_path / "file")
            assert identify(tmp_path / "file") is None


@pytest.mark.parametrize("content", [b"", b"\0", b"ab", bytes(range(256))])
def test_other_bytes_are_not_recognized(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert identify(tmp_path / "file") is None
