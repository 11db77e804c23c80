"""Read text files in pieces and tokenize them: memory does not grow with the text.

    for ids in tokenize(tokenizer, read_pieces(["a.txt", "b.jsonl.gz"], "text", "tokens")):
        file.write(ids)

A text file is a document, or several with a separator between them. Each line of a .jsonl or
.ndjson file is a document, and so is each row of a .parquet file. .gz of these is decompressed.
"""

import codecs
import contextlib
import gzip
import json
import os
import re
import shlex
import sys
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError, one_line
from common.file_kinds import GZIP, HEAD_BYTES, HTML, PARQUET, TEXT, identify_head
from common.files import check_regular
from common.tokenizer import EOT, encode, without_surrogates

PIECE_BYTES = 1 << 20  # read at a time
BATCH_CHARS = 1 << 20  # that one core tokenizes at a time
BATCH_ROWS = 1024  # of a Parquet file that are read at a time
# The longest run without white space that is kept in one piece; beyond, the tokens at a cut may
# differ from those of the whole text.
LONGEST_WORD = 8 << 20
# The format of a file by its suffix; all others are text
FORMATS = dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".ldjson"), "JSON lines")
FORMATS |= {".json": "JSON", ".parquet": "Parquet"}
# What a file of each format can be by its first bytes; None: what identify() does not know
KINDS = {"text": (TEXT, HTML, None), "JSON lines": (TEXT, None), "Parquet": (PARQUET,)}
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container on Linux: quota and period

# Check ----------------------------------------------------------------------------------------


def check_inputs(paths, field, separator):
    """Raise UserError for a file that is not what its name says, and for an option without use.

    field, separator   as given; None: not given
    """
    formats = set(map(_format, paths))
    if field is not None and formats == {"text"}:
        raise UserError(
            f"--field={field} names a field of JSON lines or a column of Parquet, but no file of "
            "the input is .jsonl, .ndjson or .parquet"
        )
    if separator is not None and "text" not in formats:
        raise UserError(f"--separator={separator} applies to text files, but the input has none")
    if separator == "":
        raise UserError("--separator must not be empty")
    if separator is not None and re.search(r"\\[nrt]", separator):
        raise UserError(
            f"--separator={separator} has a backslash: bash makes a line break of it in "
            f"--separator=$'{separator}'"
        )
    for path in paths:
        _check_kind(path)


def _format(path):
    """Return the format that a file's name stands for."""
    _, suffix = os.path.splitext(path.lower().removesuffix(".gz"))
    return FORMATS.get(suffix, "text")


def _check_kind(path):
    check_regular(path)
    wanted = _format(path)
    if wanted == "JSON":
        opened = "gzip.open(sys.argv[1])" if _is_gz(path) else "open(sys.argv[1], 'rb')"
        raise UserError(
            f"{path} is JSON by its name, not JSON lines: rename it to .jsonl if each line is "
            'an object; if it is an array of objects, python -c "import gzip, json, sys; '
            f'[print(json.dumps(d)) for d in json.load({opened})]" {shlex.quote(path)} > '
            "NAME.jsonl converts it"
        )
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head and _is_gz(path):
        raise UserError(f"{path} is empty, not a gzip file: download or copy it again")
    if _is_gz(path) and identify_head(head) == GZIP:
        with _explain_unreadable(path), gzip.open(path) as file:
            head = file.read(HEAD_BYTES)
    kind = identify_head(head)
    if kind not in KINDS[wanted]:
        advice = {GZIP: ", and its name must end in .gz", PARQUET: " without .parquet in its name"}
        kind = f"{kind or 'something else'}{advice.get(kind, '')}"
        raise UserError(f"{path} cannot be read as {wanted}: it is {kind}")
    if b"\0" in head and wanted != "Parquet":
        raise UserError(f"{path} is not text: it has NUL bytes, as binary files and UTF-16 have")
    if wanted == "text" and re.match(rb'\{"[^"]*": ?"', head):
        print(
            f"warning: {path} begins as JSON lines do, and is read as text: rename it to .jsonl if "
            "only the text in a field counts",
            file=sys.stderr,
        )


def _is_gz(path):
    return path.lower().endswith(".gz")


@contextlib.contextmanager
def _explain_unreadable(path):
    """Raise UserError, which names the file, for a truncated or damaged one."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end: {error}") from error


# Read -----------------------------------------------------------------------------------------


def read_pieces(paths, field, description, separator=None):
    """Yield the text of the files in pieces, and None between two documents.

    A document is cut only where no token reaches across, so tokenizing the pieces gives the tokens
    of the whole text. Shows a progress bar with this description.

    field       of a JSON line, or the column of a Parquet file, that holds the text
    separator   text between the documents of a text file; None: the file is one document
    """
    started = found = False  # whether there was text, and a separator, before this piece
    total = sum(map(os.path.getsize, paths))
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None) as bar:
        for path in paths:
            is_first = True  # whether the next text begins a document
            for piece in _read_file(path, field, separator, bar):
                if piece is None:
                    is_first = found = True
                elif piece:
                    if is_first and started:
                        yield None
                    started, is_first = True, False
                    yield piece
    if separator is not None and not found:
        print(f"warning: --separator={separator!r} is in none of the files", file=sys.stderr)


def _read_file(path, field, separator, bar):
    """Yield the text of a file in pieces, and None after a document."""
    check_regular(path)
    position = 0
    with _explain_unreadable(path), open(path, "rb") as raw:
        stream = gzip.open(raw) if _is_gz(path) else raw
        if _format(path) == "JSON lines":
            pieces = _jsonl_pieces(path, stream, field)
        elif _format(path) == "Parquet":
            pieces = _parquet_pieces(path, stream, field)
        else:
            pieces = _text_pieces(path, stream, separator)
        for piece in pieces:
            yield piece
            bar.update(raw.tell() - position)
            position = raw.tell()


def _text_pieces(path, stream, separator):
    """Yield the text of a file in pieces, and None in place of the separator.

    Line breaks around a separator belong to it.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # without a byte order mark
    text, read, block = "", 0, True
    strip = "\r\n" if separator else ""  # removed around a separator
    overlap = len(separator) - 1 if separator else 0  # held back: it may begin a separator
    begun = False  # whether a piece of the document was yielded

    def trim_start(part):
        return part if begun else part.lstrip(strip)

    while block:
        block = stream.read(PIECE_BYTES)
        read += len(block)
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = read - len(error.object) + error.start
            raise UserError(
                f"{path}: byte {offset} is not UTF-8 ({error.reason}): convert the file first"
            ) from error
        *documents, text = text.split(separator) if separator else [text]
        for document in documents:
            yield trim_start(document).rstrip(strip)
            yield None
            begun = False
        text = trim_start(text)
        end = _safe_cut(text[: max(0, len(text) - overlap)])
        begun = begun or end > 0
        yield text[:end]
        text = text[end:]
    yield trim_start(text).rstrip(strip)


def _safe_cut(text):
    """Return how much of the text can be tokenized alone; 0 if nothing yet.

    GPT-2's pattern for words starts a new one at the last white space before other text. No token
    reaches across that place, so cutting there gives the tokens of the whole text.
    """
    cut = re.match(r"(?s:.*)(?=[ \n]\S)", text)  # greedy: the last such place
    if cut:
        return cut.end()
    return len(text) if len(text) > LONGEST_WORD else 0


def _jsonl_pieces(path, stream, field):
    """Yield the text of each line, and None after it."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: byte {error.start} of it is not UTF-8 ({error.reason})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({one_line(error)}); each line must be an object"
            ) from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{path}, line {number} is a JSON {kind}, but must be an object")
        if field not in record:
            raise UserError(
                f'{path}, line {number}: no field "{field}": --field names one of '
                f"{', '.join(record)}"
            )
        text = record[field]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f'{path}, line {number}: the field "{field}" is {kind}, not a string')
        yield without_surrogates(text)
        yield None


def _parquet_pieces(path, stream, field):
    """Yield the text of each row, and None after it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet files need the package pyarrow: pip install pyarrow"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        columns = file.schema_arrow.names
        if columns.count(field) != 1:
            raise UserError(
                f'{path} has {columns.count(field)} columns "{field}": --field names one of '
                f"{', '.join(columns)}"
            )
        row = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise UserError(
                        f'{path}, row {row}: the column "{field}" is {kind}, not a string'
                    )
                yield text
                yield None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read to its end: {one_line(error)}") from error


# Tokenize -------------------------------------------------------------------------------------


def find_chars(paths, field, separator=None):
    """Return the sorted characters of the files; <|endoftext|> is last, if documents need it."""
    chars = set()
    for piece in read_pieces(paths, field, "characters", separator):
        chars |= {EOT} if piece is None else set(piece)
    if not chars:
        return [EOT]  # there is no text; prepare_data.py refuses it
    return sorted(chars, key=lambda char: (char == EOT, char))


def tokenize(tokenizer, pieces):
    """Yield the uint16 ids of the pieces in order, and <|endoftext|> for each None among them.

    All cores work, because tiktoken releases the interpreter lock. Memory is that of a few batches
    per core.
    """

    def batch_ids(batch):
        eot = [tokenizer.eot_token]
        ids = [eot if piece is None else encode(tokenizer, piece) for piece in batch]
        return np.concatenate(ids).astype("<u2")

    cores = count_cores()
    pending = deque()
    with ThreadPoolExecutor(cores) as pool:
        for batch in _batches(pieces):
            pending.append(pool.submit(batch_ids, batch))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _batches(pieces):
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece or "")
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_cores():
    """Return the number of cores that this process may use: affinity and limit of a container."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # there is no file, or its quota is "max"
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores
