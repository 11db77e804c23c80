"""Recognize a file that is not what its name or its place says, by its first bytes."""

import re

from common.files import check_regular

HEAD_BYTES = 512

# What a file is, as the end of a sentence, and how it begins. Each beginning is long enough that
# token ids do not start with it by chance.
BEGINNINGS = {
    "a Git LFS pointer: `git lfs pull` gets the file that it stands for": rb"version https://git-lfs",
    "an HTML page, perhaps of a login or an error: download the file again": (
        rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html)[\s>])"
    ),
    "a NumPy file": rb"\x93NUMPY",
    "a safetensors file": rb"[\s\S]{4}\0{4}\{\"",
    "a GGUF file": rb"GGUF",
    "a Parquet file": rb"PAR1",
    "an Arrow file": rb"ARROW1",
    "an HDF5 file": rb"\x89HDF\r\n",
    "a PDF file": rb"%PDF-",
    "a SQLite file": rb"SQLite format 3\0",
    "a ZIP archive": rb"PK\x03\x04",
    "a gzip file": rb"\x1f\x8b\x08[\0-\x1f]",
    "a bzip2 file": rb"BZh[1-9]1AY",
    "an xz file": rb"\xfd7zXZ\0",
    "a Zstandard file": rb"\x28\xb5\x2f\xfd",
    "a tar archive": rb"[\s\S]{257}ustar",
}
TEXT = "text"
SHORTEST_TEXT = 64  # bytes; fewer can be token ids


def identify(path):
    """Return what a file is by its first bytes, such as "a NumPy file"; None if that is not known.

    Raises UserError for a folder or a pipe, and OSError if the file cannot be read.
    """
    check_regular(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
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
    return len(head) >= SHORTEST_TEXT and not has_controls
