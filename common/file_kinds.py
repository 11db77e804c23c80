"""Recognize a file that is not what its name or its place says, by its first bytes."""

import os
import re

import numpy as np

from common.errors import UserError
from common.files import check_regular

HEAD_BYTES = 512
LLM_C = "a shard of llm.c or modded-nanogpt, with 1024 bytes before the token ids"
NUMPY = "a NumPy file"
HTML = "an HTML page, perhaps of a login or an error: download the file again"
PARQUET = "a Parquet file"
GZIP = "a gzip file"

# What a file is, as the end of a sentence, and how it begins. Each beginning is long enough that
# token ids do not start with it by chance.
BEGINNINGS = {
    "a Git LFS pointer: `git lfs pull` gets the file that it stands for": rb"version https://git-lfs",
    HTML: rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html)[\s>])",
    NUMPY: rb"\x93NUMPY",
    LLM_C: rb"\x88\xd8\x34\x01\x01\0\0\0",  # int32: magic number 20240520, version 1
    # 20240801, version 7
    "a shard of llm.c with Llama 3's ids, too large for uint16": rb"\xa1\xd9\x34\x01\x07\0\0\0",
    "a safetensors file": rb"[\s\S]{4}\0{4}\{\"",
    "a GGUF file": rb"GGUF",
    PARQUET: rb"PAR1",
    "an Arrow file": rb"ARROW1",
    "an HDF5 file": rb"\x89HDF\r\n",
    "a PDF file": rb"%PDF-",
    "a SQLite file": rb"SQLite format 3\0",
    "a ZIP archive": rb"PK\x03\x04",
    GZIP: rb"\x1f\x8b\x08[\0-\x1f]",
    "a bzip2 file": rb"BZh[1-9]1AY",
    "an xz file": rb"\xfd7zXZ\0",
    "a Zstandard file": rb"\x28\xb5\x2f\xfd",
    "a Python pickle": rb"\x80[\x04\x05]\x95[\s\S]{4}\0{4}",
    "UTF-16 text": rb"\xff\xfe([\t-~]\0){4}|\xfe\xff(\0[\t-~]){4}",
    "a tar archive": rb"[\s\S]{257}ustar",
}
TEXT = "text"
SHORTEST_TEXT = 64  # bytes; fewer can be token ids
SHORTEST_ASCII = 12
# What reads the ids of such a file p
EXPRESSIONS = {NUMPY: "np.load(p, mmap_mode='r')", LLM_C: "np.memmap(p, '<u2', 'r', 1024)"}
# Where check_bin looks at a bin
SAMPLE_PLACES = 16
SAMPLE_BYTES = 4096  # at each place, a multiple of 8
FEWEST_IDS = 32  # of a wider type; fewer can be uint16 ids by chance


def identify(path):
    """Return what a file is by its first bytes, such as "a NumPy file"; None if that is not known.

    Raises UserError for a folder or a pipe, and OSError if the file cannot be read.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return identify_head(file.read(HEAD_BYTES))


def identify_head(head):
    """Return what begins with these bytes, up to HEAD_BYTES of them, as identify() does."""
    for kind, beginning in BEGINNINGS.items():
        if re.match(beginning, head):
            return kind
    return TEXT if _is_text(head) else None


def _is_text(head):
    """Return whether bytes are UTF-8 without control characters; the last one may be cut."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    has_controls = re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)
    shortest = SHORTEST_ASCII if head.isascii() else SHORTEST_TEXT
    return len(head) >= shortest and not has_controls


# Bins -----------------------------------------------------------------------------------------


def check_bin(path):
    """Return the largest token id in a sample of a bin.

    Raises UserError if the file is of a known other kind, or if its token ids are of a wider type.
    """
    kind = identify(path)
    if kind:
        advice = _conversion(path, EXPRESSIONS[kind]) if kind in EXPRESSIONS else ""
        raise UserError(
            f"{path} must hold uint16 token ids and nothing else, but is {kind}{advice}"
        )
    sample = _read_sample(path)
    for wide_type in ("<i8", ">i8", "<u4", ">u4"):
        ids = sample.view(wide_type)
        if not _are_token_ids(ids):
            continue
        problem = f"{path} must hold uint16 token ids, but has {ids.itemsize} bytes for each"
        if ids.max() < 1 << 16:
            raise UserError(problem + _conversion(path, f"np.memmap(p, '{wide_type}', 'r')"))
        raise UserError(
            f"{problem}, up to {ids.max()}, which do not fit in uint16: tokenize its text by "
            "prepare_data.py"
        )
    return int(sample.max(initial=0))


def _are_token_ids(ids):
    """Return whether integers of 4 or 8 bytes are token ids, and not several uint16 ids each.

    The largest vocabularies have 2**18 ids. Several ids of a small alphabet, such as the letters of
    DNA, can be as small, but then the upper half is as large as the lower one.
    """
    if len(ids) < FEWEST_IDS or ids.min() < 0 or ids.max() >= 1 << 18:
        return False
    return (ids & 0xFFFF).max() > (ids >> 16).max()


def _read_sample(path):
    """Return the uint16 numbers at some places of a file, a multiple of 8 bytes."""
    size = os.path.getsize(path) // 8 * 8
    parts = []
    with open(path, "rb") as file:
        for i in range(SAMPLE_PLACES):
            start = size * i // SAMPLE_PLACES // 8 * 8
            file.seek(start)
            parts.append(file.read(min(SAMPLE_BYTES, size - start)))
    return np.frombuffer(b"".join(parts), dtype="<u2")


def _conversion(path, expression):
    """Return the end of an error: the command that converts a file, which `expression` reads."""
    return (
        f'; this converts it: python -c "import numpy as np, os; p = {str(path)!r}; '
        f"t = {expression}; assert t.max() < 2**16; t.astype('<u2').tofile(p + '.u2'); "
        "os.replace(p + '.u2', p)\""
    )
