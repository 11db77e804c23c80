"""Tokenizers: text to ids and back, one interface, found again from a dataset's meta.json.

    gpt2   GPT-2's byte-pair encoding, 50257 ids (tiktoken, which downloads it once)
    byte   the 256 bytes and <|endoftext|>: any text, no download
    char   the characters that occur in a text; meta.json lists them

The interface is the part of tiktoken.Encoding that this project uses, and `char` follows it: n_vocab, eot_token (the
id of <|endoftext|>, None where there is none), encode_to_numpy(text), decode_single_token_bytes(id).
"""

import json
from pathlib import Path

import numpy as np
import tiktoken

from common.errors import UserError

EOT = "<|endoftext|>"
NAMES = ("gpt2", "byte", "char")
VOCAB_SIZES = {"gpt2": 50257, "byte": 257}  # char: as many as "chars" lists


class CharTokenizer:
    """One id for each character of a list; the last may be <|endoftext|>, which no text encodes to."""

    def __init__(self, chars):
        self.chars = list(chars)
        self.n_vocab = len(self.chars)
        self.eot_token = self.n_vocab - 1 if EOT in self.chars else None
        singles = [c for c in self.chars if c != EOT]
        self.codes = np.array([ord(c) for c in singles], dtype=np.uint32)  # Unicode code points
        self.order = np.argsort(self.codes)

    def encode_to_numpy(self, text, disallowed_special=()):
        """Ids of the text's characters; UserError for one that is not in the vocabulary."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        places = np.searchsorted(self.codes, codes, sorter=self.order)
        ids = self.order[np.minimum(places, len(self.codes) - 1)]
        unknown = self.codes[ids] != codes
        if unknown.any():
            char = chr(codes[unknown.argmax()])
            raise UserError(
                f"character {char!r} is not among the {len(self.codes)} of the char vocabulary"
            )
        return ids.astype(np.uint32)

    def decode_single_token_bytes(self, id):
        return self.chars[id].encode("utf-8")


def byte_tokenizer():
    # Pieces of at most 64 bytes: with nothing to merge, longer ones only cost time.
    pieces = r"(?s:.{1,64})"
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(
        "byte", pat_str=pieces, mergeable_ranks=ranks, special_tokens={EOT: 256}
    )


def get_tokenizer(meta):
    """The tokenizer that a meta.json speaks of: {"tokenizer": "gpt2"}, or with "chars" for char. UserError if it cannot
    be had."""
    name = meta.get("tokenizer")
    if name == "byte":
        return byte_tokenizer()
    if name == "char":
        if not meta.get("chars"):
            raise UserError(
                'meta.json says {"tokenizer": "char"} without "chars", the list of its characters'
            )
        return CharTokenizer(meta["chars"])
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is unknown; there are {', '.join(NAMES)}")
    try:
        return tiktoken.get_encoding("gpt2")
    except (
        Exception
    ) as error:  # tiktoken lets through whatever the network, the disk or its hash check raise
        raise UserError(
            f"the GPT-2 tokenizer could not be had ({type(error).__name__}): tiktoken downloads it once; without a "
            "network, copy the cache of a machine that has it and set TIKTOKEN_CACHE_DIR, or use --tokenizer=byte"
        ) from error


def without_surrogates(text):
    """The text with each half of a surrogate pair, as JSON's escapes can write, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(tokenizer, text):
    """Ids of the text, (T,) uint32. The letters "<|endoftext|>" in it are letters."""
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        return tokenizer.encode_to_numpy(without_surrogates(text), disallowed_special=())


def token_bytes(tokenizer):
    """The UTF-8 length of each token in bytes, (n_vocab,) int64; <|endoftext|> counts as 0."""
    lengths = [
        0 if id == tokenizer.eot_token else len(tokenizer.decode_single_token_bytes(id))
        for id in range(tokenizer.n_vocab)
    ]
    return np.array(lengths, dtype=np.int64)


def read_meta(directory):
    """The meta.json of a dataset or a model, with vocab_size filled in; UserError where it is missing or damaged."""
    path = Path(directory) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f'no {path}: for bins of GPT-2 tokens, a file with {{"tokenizer": "gpt2"}} is enough'
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("tokenizer") not in NAMES:
        raise UserError(
            f'{path} names no tokenizer: {{"tokenizer": NAME}} with one of {", ".join(NAMES)} is enough'
        )
    if meta["tokenizer"] == "char" and not meta.get("chars"):
        raise UserError(
            f'{path} says {{"tokenizer": "char"}} without "chars", the list of its characters'
        )
    for split in ("train", "val"):
        if not isinstance(meta.get(split, {}), dict):
            raise UserError(f"{path} is damaged: {split} is {meta[split]!r}")
    meta = {"vocab_size": VOCAB_SIZES.get(meta["tokenizer"]) or len(meta["chars"])} | meta
    if type(meta["vocab_size"]) is not int or meta["vocab_size"] < 1:
        raise UserError(f"{path} is damaged: vocab_size is {meta['vocab_size']!r}")
    return meta
