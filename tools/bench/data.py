"""Data: tokenizing a corpus with GPT-2's encoding, beside tiktoken on all cores."""

import os
import tempfile
from pathlib import Path

from common.errors import UserError
from common.tokenizer import get_tokenizer
from prepare_data import prepare_text, read_pieces, stdlib_files, tokenize
from tools.bench.turns import compare, ratio, spread, stopwatch

CORPUS_BYTES = 24 << 20


def read_corpus():
    """Return documents of CORPUS_BYTES in all: the sources of Python's library, repeated."""
    texts = []
    for path in stdlib_files():
        texts.append(Path(path).read_text(encoding="utf-8", errors="replace"))
    documents, size, copy = [], 0, 0
    while size < CORPUS_BYTES:
        for text in texts:
            documents.append(f"# copy {copy}\n{text}")
            size += len(documents[-1].encode())
            if size >= CORPUS_BYTES:
                break
        copy += 1
    return documents, size


def tokenize_files(tokenizer, paths):
    """Tokenize as prepare_data.py does: streaming, all cores, ids to a file."""
    with tempfile.TemporaryFile() as file:
        for ids in tokenize(tokenizer, read_pieces(paths, "text", "tokens")):
            file.write(ids)


def tokenize_with_tiktoken(tokenizer, documents):
    """Tokenize texts in memory with tiktoken's own threads; nothing is done with the ids."""
    tokenizer.encode_ordinary_batch(documents, num_threads=os.cpu_count())


def measure_data(bench):
    """Return rows with MB/s: tiktoken's batch call, our streaming, and the whole preparation.

    tiktoken gets the documents in memory and returns lists of ids. Ours reads them from files,
    piece by piece, and writes uint16 ids; the whole preparation also counts the tokens, hashes the
    bins and flushes them to disk.
    """
    try:
        tokenizer = get_tokenizer({"tokenizer": "gpt2"})
    except UserError as error:
        bench.note(f"data is skipped: {error}")
        return []
    documents, size = read_corpus()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, text in enumerate(documents):
            path = Path(folder) / f"{i:06d}.txt"
            path.write_text(text, encoding="utf-8", newline="")
            paths.append(str(path))
        arguments = (Path(folder), "gpt2", paths, "text", 0.01, "corpus")
        functions = {
            "tiktoken, encode_ordinary_batch": (tokenize_with_tiktoken, tokenizer, documents),
            "ours, tokenize": (tokenize_files, tokenizer, paths),
            "ours, whole preparation": (prepare_text, *arguments),
        }
        contestants = {name: stopwatch(bench.device, *call) for name, call in functions.items()}
        times = compare(bench.seconds, contestants)
    rows = []
    tiktoken_times = times["tiktoken, encode_ordinary_batch"]
    for name, seconds in times.items():
        row = {"contestant": name, "corpus_mb": size / 1e6, "cores": os.cpu_count()}
        row["mb_per_second"] = spread([size / 1e6 / t for t in seconds])
        row["tiktoken_over_this"] = ratio(tiktoken_times, seconds)
        rows.append(bench.show(row))
    return rows
