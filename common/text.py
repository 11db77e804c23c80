"""Read text files in pieces and tokenize them: memory does not grow with the text.

    for ids in tokenize(tokenizer, read_pieces(["a.txt", "b.jsonl.gz"], "text", "tokens")):
        file.write(ids)

A text file is a document, and so is a line of a .jsonl file; .gz of either is decompressed.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import check_regular
from common.tokenizer import EOT, encode, without_surrogates

PIECE_BYTES = 1 << 20  # read at a time
BATCH_CHARS = 1 << 20  # that one core tokenizes at a time
# The longest run without white space that is kept in one piece; beyond, the tokens at a cut may
# differ from those of the whole text.
LONGEST_WORD = 8 << 20

# Read -----------------------------------------------------------------------------------------


def read_pieces(paths, field, description):
    """Yield the text of the files in pieces, and None between two documents.

    A document is cut only where no token reaches across, so tokenizing the pieces gives the tokens
    of the whole text. Shows a progress bar with this description.
    """
    started = False
    total = sum(map(os.path.getsize, paths))
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None) as bar:
        for path in paths:
            for is_first, piece in _read_file(path, field, bar):
                if is_first and started:
                    yield None
                started = True
                yield piece


def _read_file(path, field, bar):
    """Yield (whether a document begins here, piece) for each piece of a file."""
    check_regular(path)
    position = 0
    try:
        with open(path, "rb") as raw:
            stream = gzip.open(raw) if path.endswith(".gz") else raw
            if path.removesuffix(".gz").endswith(".jsonl"):
                documents = _jsonl_documents(path, stream, field)
            else:
                documents = [_text_pieces(path, stream)]
            for document in documents:
                is_first = True
                for piece in filter(None, document):
                    yield is_first, piece
                    is_first = False
                    bar.update(raw.tell() - position)
                    position = raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end: {error}") from error


def _text_pieces(path, stream):
    """Yield the text of a file in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # without a byte order mark
    text, read, block = "", 0, True
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
        end = _safe_cut(text)
        yield text[:end]
        text = text[end:]
    yield text


def _safe_cut(text):
    """Return how much of the text can be tokenized alone; 0 if nothing yet.

    GPT-2's pattern for words starts a new one at the last white space before other text. No token
    reaches across that place, so cutting there gives the tokens of the whole text.
    """
    cut = re.match(r"(?s:.*)(?=[ \n]\S)", text)  # greedy: the last such place
    if cut:
        return cut.end()
    return len(text) if len(text) > LONGEST_WORD else 0


def _jsonl_documents(path, stream, field):
    """Yield the document of each line, a list with one piece."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8-sig"))[field]
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: byte {error.start} of it is not UTF-8 ({error.reason})"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number}: no JSON object with the field "{field}" '
                f"({type(error).__name__}); --field names another"
            ) from error
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f'{path}, line {number}: the field "{field}" is {kind}, not a string')
        yield [without_surrogates(text)]


# Tokenize -------------------------------------------------------------------------------------


def find_chars(paths, field):
    """Return the sorted characters of the files; <|endoftext|> is last, if documents need it."""
    chars = set()
    for piece in read_pieces(paths, field, "characters"):
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

    cores = os.cpu_count()
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
