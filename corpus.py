"""A corpus: text files -> pieces of text -> token ids, streamed, on all cores.

The files are .txt (a document each), .jsonl (a document a line) and .gz of either, in UTF-8. Memory does not grow with
them: a document goes through in pieces, cut where no token reaches across.
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

from configurator import UserError
from tokenizer import encode, without_surrogates

PIECE = 1 << 20  # bytes read at a time
LONGEST_WORD = 8 << 20  # characters without white space that are kept together; beyond, tokens may differ at a cut
BATCH = 1 << 20  # characters that one core tokenizes at a time


def read_pieces(paths, field, what):
    """Yield the text of the files in pieces, with None between documents, under a progress bar named `what`."""
    started = False
    with tqdm(total=sum(map(os.path.getsize, paths)), unit="B", unit_scale=True, desc=what, disable=None) as bar:
        for path in paths:
            is_jsonl, seen = path.removesuffix(".gz").endswith(".jsonl"), 0
            try:
                with open(path, "rb") as raw, gzip.open(raw) if path.endswith(".gz") else raw as stream:
                    for document in _jsonl_documents(path, stream, field) if is_jsonl else [_text(path, stream)]:
                        for i, piece in enumerate(filter(None, document)):
                            if i == 0 and started:
                                yield None
                            started = True
                            yield piece
                            bar.update(raw.tell() - seen)
                            seen = raw.tell()
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path} cannot be read to its end: {error}") from error


def _text(path, stream):
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, read, block = "", 0, True
    while block:
        block = stream.read(PIECE)
        read += len(block)
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = read - len(error.object) + error.start
            raise UserError(f"{path}: byte {offset} is not UTF-8 ({error.reason}): convert the file first") from error
        # GPT-2's pattern for words always begins a new one at the last white space before other text: no token reaches
        # across that place, so cutting there gives the tokens of the uncut text.
        cut = re.match(r"(?s:.*)(?=[ \n]\S)", text)
        end = cut.end() if cut else len(text) if len(text) > LONGEST_WORD else 0
        yield text[:end]
        text = text[end:]
    yield text


def _jsonl_documents(path, stream, field):
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8-sig"))[field]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: byte {error.start} of it is not UTF-8 ({error.reason})") from error
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}; --field names another"
            raise UserError(f'{path}, line {number}: no JSON object with the field "{field}" ({why})') from error
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: the field "{field}" is {type(text).__name__}, not a string')
        yield [without_surrogates(text)]


def tokenize(tokenizer, pieces):
    """Yield the uint16 ids of pieces of text in order, and <|endoftext|> for each None among them.

    All cores work (tiktoken releases the interpreter lock); memory is that of a few batches for each.
    """

    def ids(batch):
        parts = [[tokenizer.eot_token] if piece is None else encode(tokenizer, piece) for piece in batch]
        return np.concatenate(parts).astype("<u2")

    cores, waiting = os.cpu_count(), deque()
    with ThreadPoolExecutor(cores) as pool:
        for batch in _batches(pieces):
            waiting.append(pool.submit(ids, batch))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(pieces):
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece or "")
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
