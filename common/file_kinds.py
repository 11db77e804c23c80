"""Recognize a file that is not what its name or its place says, by its first bytes."""

import re

HEAD_BYTES = 512
LIT_GPT = "a PackedDataset of LitGPT, with 24 bytes before the token ids"
LLM_C = "a shard of llm.c or modded-nanogpt, with 1024 bytes before the token ids"
NUMPY = "a NumPy file"
HTML = "an HTML page, perhaps of a login or an error: download the file again"
PARQUET = "a Parquet file"
GZIP = "a gzip file"

# What a file is, as the end of a sentence, and how it begins. Each beginning is long enough that
# token ids do not start with it by chance.
BEGINNINGS = {
    "a Git LFS pointer: `git lfs pull` gets the file itself": rb"version https://git-lfs\S+\n",
    "a git-annex pointer: `git annex get` gets the file itself": rb"/annex/objects/\S+\n",
    HTML: rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html)[\s>])",
    NUMPY: rb"\x93NUMPY",
    LLM_C: rb"\x88\xd8\x34\x01[\s\S]\0\0\0",  # int32: the magic number 20240520, a version
    # The magic number 20240801
    "a shard of llm.c with Llama 3's ids, too large for uint16": rb"\xa1\xd9\x34\x01[\s\S]\0\0\0",
    LIT_GPT: rb"LITPKDS",
    "a safetensors file": rb"[\s\S]{4}\0{4}\{\"",
    "a GGUF file": rb"GGUF[\1-\x0f]\0\0\0",
    PARQUET: rb"PAR1[\0-\x1f]",
    "an Arrow file": rb"ARROW1\0\0",
    "an HDF5 file": rb"\x89HDF\r\n",
    "a PDF file": rb"%PDF-\d\.\d\s*[\r\n]",
    "a SQLite file": rb"SQLite format 3\0",
    "a ZIP archive": rb"PK\x03\x04",
    GZIP: rb"\x1f\x8b\x08[\0-\x1f]",
    "a bzip2 file": rb"BZh[1-9]1AY&SY",
    "an xz file": rb"\xfd7zXZ\0",
    "a Zstandard file": rb"\x28\xb5\x2f\xfd",
    "in torch.save's old format: load and save it again": rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P",
    "a Python pickle": rb"\x80[\x04\x05]\x95[\s\S]{4}\0{4}",
    "UTF-16 text": rb"\xff\xfe([\t-~]\0){4}|\xfe\xff(\0[\t-~]){4}",
    "a tar archive": rb"[\s\S]{257}ustar",
}
TEXT = "text"
SHORTEST_TEXT = 64  # bytes; fewer can be token ids
SHORTEST_ASCII = 12


def identify(path):
    """Return what a file is by its first bytes, such as "a NumPy file"; None if that is not known.

    Raises OSError if it cannot be read. A pipe would block.
    """
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
