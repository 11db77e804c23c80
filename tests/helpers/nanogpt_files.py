"""A dataset in nanoGPT's layout."""

import pickle
from pathlib import Path

import numpy as np

CHARS = ["\n", *map(chr, range(32, 127)), "é"]  # of a char tokenizer
CHAR_IDS = range(len(CHARS))


def meta_of_chars(chars):
    """Return what nanoGPT has in its meta.pkl."""
    itos = dict(enumerate(chars))
    return {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def write_their_data(chars=CHARS, ids=CHAR_IDS, folder="theirs"):
    """Write a data directory of nanoGPT; return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.array([*ids], dtype="<u2").tofile(folder / name)
    if chars is not None:
        write_pickle(folder / "meta.pkl", meta_of_chars(chars))
    return folder
