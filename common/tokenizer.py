"""Tokenizers: text to token ids and back. A dataset's meta.json names its tokenizer.

    gpt2   GPT-2's byte-pair encoding, 50257 ids (tiktoken, which downloads it once)
    byte   the 256 bytes and <|endoftext|>: any text, no download
    char   the characters of one text; meta.json lists them

All have the part of tiktoken.Encoding's interface that this project uses: n_vocab, eot_token (the
id of <|endoftext|>, or None), encode_to_numpy(text) and decode_single_token_bytes(token_id); and,
for a notebook, encode(text) and decode(ids).
"""

import codecs
import contextlib
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import tiktoken

from common.errors import DamagedError, UserError, explain_malformed
from common.files import read_json

EOT = "<|endoftext|>"
NAMES = ("gpt2", "byte", "char")
VOCAB_SIZES = {"gpt2": 50257, "byte": 257}  # char: the number of its characters
# GPT-2's files in tiktoken's cache: the SHA-1 of the addresses of vocab.bpe and encoder.json
GPT2_CACHED = (
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)
MAX_VOCAB_SIZE = 1 << 16  # bins hold uint16
LONGEST_WHITE_SPACE = 500_000  # characters; tiktoken fails at a million in a row
LONG_WHITE_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_WHITE_SPACE},}}")


class CharTokenizer:
    """One id per character of a list. The last may be <|endoftext|>, which no text encodes to."""

    def __init__(self, chars):
        self.chars = list(chars)
        self.n_vocab = len(self.chars)
        self.eot_token = self.n_vocab - 1 if EOT in self.chars else None
        code_points = [ord(char) for char in self.chars if char != EOT]
        self.code_points = np.array(code_points, dtype=np.uint32)
        self.order = np.argsort(self.code_points)

    def encode_to_numpy(self, text, disallowed_special=()):
        """Return the ids of the text's characters. Raises UserError for an unknown character."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        places = np.searchsorted(self.code_points, codes, sorter=self.order)
        ids = self.order[np.minimum(places, len(self.code_points) - 1)]
        unknown = self.code_points[ids] != codes
        if unknown.any():
            char = chr(codes[unknown.argmax()])
            raise UserError(
                f"character {char!r} is not among the {len(self.code_points)} characters of the "
                "char tokenizer"
            )
        return ids.astype(np.uint32)

    def encode(self, text):
        """Return the ids of the text's characters, a list of int. Raises UserError as above."""
        return self.encode_to_numpy(text).tolist()

    def decode(self, ids):
        """Return the text of a list of token ids, with "<|endoftext|>" for its id."""
        return "".join(self.chars[token_id] for token_id in ids)

    def decode_single_token_bytes(self, token_id):
        return self.chars[token_id].encode("utf-8")


def byte_tokenizer():
    """Return a tiktoken.Encoding whose tokens are single bytes."""
    # With nothing to merge, long pieces would only cost time.
    pieces = r"(?s:.{1,64})"
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(
        "byte", pat_str=pieces, mergeable_ranks=ranks, special_tokens={EOT: 256}
    )


def get_tokenizer(meta):
    """Return the tokenizer that a meta.json names, such as {"tokenizer": "gpt2"}.

    Raises UserError if it is unknown or not available.
    """
    name = meta.get("tokenizer")
    if name == "byte":
        return byte_tokenizer()
    if name == "char":
        if not meta.get("chars"):
            raise UserError('meta.json has {"tokenizer": "char"} without "chars", its characters')
        return CharTokenizer(meta["chars"])
    if name != "gpt2":
        raise UserError(f"tokenizer={name!r} must be one of {', '.join(NAMES)}")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of the network, the disk or tiktoken's hash check
        raise UserError(
            f"the GPT-2 tokenizer is not available ({type(error).__name__}): tiktoken downloads it "
            "once; without a network, copy the cache of another machine and set "
            "TIKTOKEN_CACHE_DIR, or use --tokenizer=byte"
        ) from error


def without_surrogates(text):
    """Replace each lone surrogate, which JSON escapes can contain, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(tokenizer, text):
    """Return the token ids of a text, (T,) uint32. "<|endoftext|>" in it is ordinary text."""
    pieces = _cut_white_space(text)
    try:
        ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    except UnicodeEncodeError:
        return encode(tokenizer, without_surrogates(text))
    return np.concatenate(ids)


def _cut_white_space(text):
    """Cut a text inside of runs of white space at which tiktoken fails; return the pieces.

    At least two characters of a run are left for the next piece, because the last one belongs to
    the word after it.
    """
    cuts = []
    for run in LONG_WHITE_SPACE.finditer(text):
        cuts += range(run.start() + LONGEST_WHITE_SPACE, run.end() - 1, LONGEST_WHITE_SPACE)
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class TextStream:
    """Turns the token ids of one sample into text, up to a stop string or <|endoftext|>.

    Text is returned as soon as it is certain: incomplete UTF-8 characters and text that may be the
    beginning of the stop string are held back.
    """

    def __init__(self, tokenizer, stop=None):
        self.tokenizer = tokenizer
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # may be the beginning of the stop string
        self.done = False

    def add(self, token_id):
        """Take a token; return the text that is now certain. Tokens after the end are ignored."""
        if self.done or token_id == self.tokenizer.eot_token:
            return self.finish()
        new_bytes = self.tokenizer.decode_single_token_bytes(token_id)
        text = self.held + self.decoder.decode(new_bytes)
        if self.stop and self.stop in text:
            self.done = True
            return text[: text.index(self.stop)]
        self.held = self._possible_stop(text)
        return text.removesuffix(self.held)

    def _possible_stop(self, text):
        """Return the longest end of the text with which the stop string begins."""
        for start in range(len(text)):
            if self.stop and self.stop.startswith(text[start:]):
                return text[start:]
        return ""

    def finish(self):
        """Return what was held back. An incomplete character becomes U+FFFD."""
        if self.done:
            return ""
        self.done = True
        return self.held + self.decoder.decode(b"", final=True)


def token_bytes(tokenizer):
    """Return the length of each token in bytes, (n_vocab,) int64; <|endoftext|> counts as 0."""
    lengths = [
        0 if i == tokenizer.eot_token else len(tokenizer.decode_single_token_bytes(i))
        for i in range(tokenizer.n_vocab)
    ]
    return np.array(lengths, dtype=np.int64)


def cached_token_bytes(meta):
    """Return token_bytes of the tokenizer that a meta.json names; None if it is not available.

    GPT-2's is not downloaded for this: a machine that trains may have no network.
    """
    cache = Path(tempfile.gettempdir(), "data-gym-cache")
    for variable in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):  # the second has precedence
        cache = Path(os.environ.get(variable, cache))
    if meta["tokenizer"] != "gpt2" or all((cache / name).exists() for name in GPT2_CACHED):
        with contextlib.suppress(UserError):  # a damaged cache
            return token_bytes(get_tokenizer(meta))
    return None


def read_meta(directory):
    """Return the meta.json of a dataset or a model, with vocab_size filled in.

    Raises UserError if it is missing or damaged.
    """
    path = Path(directory) / "meta.json"
    try:
        meta = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f'no {path}: for bins of GPT-2 tokens, a file with {{"tokenizer": "gpt2"}} is enough'
        ) from None
    return check_meta(meta, path)


def check_meta(meta, path):
    """Return the content of a meta.json, with vocab_size filled in.

    Raises DamagedError, which names the file, if it makes no sense.
    """
    with explain_malformed(path):
        chars = meta.get("chars")
        default_vocab_size = VOCAB_SIZES.get(meta["tokenizer"], len(chars or []))
        meta = {"vocab_size": default_vocab_size} | meta
        problem = _find_problem(meta, chars)
    if problem:
        raise DamagedError(f"{path}: {problem}")
    return meta


def _find_problem(meta, chars):
    """Return what makes no sense in a meta.json, or None."""
    if meta["tokenizer"] not in NAMES:
        return f"tokenizer={meta['tokenizer']!r} must be one of {', '.join(NAMES)}"
    if meta["tokenizer"] == "char" and not chars:
        return '{"tokenizer": "char"} needs "chars", its characters'
    if chars and not all(isinstance(c, str) and (len(c) == 1 or c == EOT) for c in chars):
        return '"chars" must be single characters'
    if chars and (chars == [EOT] or len(set(chars)) < len(chars)):
        return '"chars" must be characters, each once'
    if chars and EOT in chars[:-1]:
        return f'"{EOT}" must be the last of "chars"'
    for split in ("train", "val"):
        for key in ("tokens", "largest_id", "bytes"):
            count = meta.get(split, {}).get(key, 0)
            if count < 0:
                return f"{key} of {split} is {count}, below 0"
    if not 1 <= meta["vocab_size"] <= MAX_VOCAB_SIZE:
        return f"vocab_size={meta['vocab_size']} must be from 1 to {MAX_VOCAB_SIZE}"
    return None
