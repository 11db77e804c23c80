"""Prepare a dataset: text or a named dataset -> data/NAME/{train,val}.bin and meta.json.

    python prepare_data.py stdlib               Python's standard library as bytes; no download
    python prepare_data.py shakespeare          tinyshakespeare (1 MB), GPT-2 BPE
    python prepare_data.py shakespeare_char     the same, by characters
    python prepare_data.py tinystories          TinyStories (2.2 GB), GPT-2 BPE; tinystories_byte
    python prepare_data.py fineweb --shards=10  FineWeb, tokenized for GPT-2: 100 million tokens
                                                (200 MB) per shard, 103 shards in all
    python prepare_data.py mine --input='corpus/*.txt'
                                                your own text: .txt (--separator), .jsonl or
                                                .parquet (--field), .gz of these
    python prepare_data.py theirs --import_nanogpt=DIR
                                                the bins in a data directory of nanoGPT

The bins are raw little-endian uint16 token ids, nanoGPT's format. A .txt file is a document, and so
is a line of a .jsonl file; <|endoftext|> separates documents. The last val_fraction of all tokens
becomes val.bin, unless the dataset has a validation split of its own. Text is tokenized piece by
piece on all cores, so memory does not grow with it. A file appears under its final name only when
it is complete.
"""

import contextlib
import glob
import hashlib
import os
import random
import re
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import hub
from common.bins import check_bin
from common.errors import UserError, run_program
from common.files import (
    check_regular,
    fsync,
    lock,
    name_in_errors,
    remove_tree,
    write_json,
    write_text,
)
from common.nanogpt import read_dataset_meta
from common.text import check_inputs, find_chars, read_pieces, tokenize
from common.tokenizer import EOT, NAMES, get_tokenizer, read_meta, token_bytes
from configurator import configure

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB = "kjj0/fineweb10B-gpt2"  # a dataset on the Hugging Face hub
FINEWEB_SHARDS = 103
# modded-nanogpt, whose leaderboard is public, evaluates the first 10 * 2**20 tokens of the shard.
FINEWEB_VAL_TOKENS = 10_485_760
SHARD_HEADER = 256  # int32 numbers before a shard's tokens: magic, version, token count, zeros
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
CHUNK = 1 << 20  # bytes, or token ids, of a file that are read at a time

TINYSTORIES = "roneneldan/TinyStories"  # on the hub; V2 is all by GPT-4
TINYSTORIES_FILES = ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")

# name: (tokenizer, val_fraction, a config that trains on it). A tenth of Shakespeare is for
# validation, as in nanoGPT; None: the dataset has a validation split. With --input, other text
# takes the place of a named dataset.
DATASETS = {
    "stdlib": ("byte", 0.01, "config/quickstart.py"),
    "shakespeare": ("gpt2", 0.1, "config/finetune_shakespeare.py"),
    "shakespeare_char": ("char", 0.1, "config/shakespeare_char.py"),
    "tinystories": ("gpt2", None, "config/tinystories.py"),
    "tinystories_byte": ("byte", None, "config/tinystories_cpu.py"),
    "fineweb": ("gpt2", None, "config/gpt2.py"),
}
TEXT_OPTIONS = ("field", "separator", "val_fraction")
SMALL_DATASETS = ("stdlib", "shakespeare", "shakespeare_char")  # train.py prepares these itself
CUSTOM_TEXT_DEFAULTS = ("gpt2", 0.01, "config/quickstart.py")


@dataclass
class PrepareConfig:
    # What
    name: str = ""  # the dataset, a folder of data/
    input: str | None = None  # your own text: a file or a quoted pattern
    import_nanogpt: str | None = None  # a data directory of nanoGPT: train.bin, val.bin, meta.pkl
    field: str | None = None  # the field of a .jsonl line that holds its text; None: text
    separator: str | None = None  # what separates the documents of a .txt file; None: it is one
    shards: int = 10  # fineweb: training shards to have in all, 1 to 103
    # How
    tokenizer: str | None = None  # gpt2, byte or char; None: the dataset's, gpt2 for your own
    val_fraction: float | None = None  # of the tokens; None: the dataset's, 0.01 for your own
    overwrite: bool = False  # rebuild it, even from another source
    verify: bool = False  # only check the bins against the hashes in meta.json


# Text -----------------------------------------------------------------------------------------


def prepare_text(folder, origin, paths, val_paths, field="text", separator=None):
    """Tokenize text files into folder/train.bin, val.bin and meta.json; return the meta.json.

    origin      entries of meta.json: "tokenizer", "source" and "val_fraction"
    val_paths   the files for validation; None: the last val_fraction of all tokens
    """
    meta = {"tokenizer": origin["tokenizer"]}
    if origin["tokenizer"] == "char":
        meta["chars"] = find_chars([*paths, *(val_paths or [])], field, separator)
    tokenizer = get_tokenizer(meta)
    if tokenizer.n_vocab > 1 << 16:
        raise UserError(
            f"{tokenizer.n_vocab} different characters do not fit in uint16: use --tokenizer=byte"
        )

    def write_tokens(file, paths):
        for ids in tokenize(tokenizer, read_pieces(paths, field, "tokens", separator)):
            file.write(ids)

    with dataset_parts(folder) as parts:
        with open(parts["train.bin"], "w+b") as train, open(parts["val.bin"], "wb") as val:
            write_tokens(train, paths)
            if val_paths:
                write_tokens(val, val_paths)
            else:
                split_tokens(train, val, origin)
        meta |= {"vocab_size": tokenizer.n_vocab} | origin
        publish_parts(folder, parts, meta, tokenizer)
    return meta


def split_tokens(train, val, origin):
    """Move the last val_fraction of the tokens in the file `train` to the file `val`."""
    total, val_fraction = train.tell() // 2, origin["val_fraction"]
    n_train = int(total * (1 - val_fraction))
    n_val = total - n_train
    if min(n_train, n_val) < 2:
        raise UserError(
            f"{origin['source']} has {total} tokens: val_fraction={val_fraction} leaves {n_train} "
            f"for training and {n_val} for validation, and each needs at least 2"
        )
    train.seek(2 * n_train)
    shutil.copyfileobj(train, val)
    train.truncate(2 * n_train)


@contextlib.contextmanager
def dataset_parts(folder):
    """Yield {file name: path to write it to}; remove what is left there in the end."""
    parts = {name: folder / f"{name}.part" for name in ("train.bin", "val.bin", "meta.json")}
    for part in parts.values():
        check_regular(part)
    try:
        with name_in_errors(folder):
            yield parts
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def publish_parts(folder, parts, meta, tokenizer):
    """Replace the dataset in a folder by the bins in `parts`; add their descriptions to `meta`."""
    for split in ("train", "val"):
        part = parts[f"{split}.bin"]
        fsync(part)
        meta[split] = describe_bin(part, tokenizer)
    write_json(parts["meta.json"], meta)  # all that needs room, before the old dataset goes
    # Without train.bin the folder is no dataset: it is removed first and restored last.
    (folder / "train.bin").unlink(missing_ok=True)
    for name in ("val.bin", "meta.json", "train.bin"):
        parts[name].replace(folder / name)
    fsync(folder)


def describe_bin(path, tokenizer):
    """Return what meta.json says about a bin; without a tokenizer not the bytes of its text."""
    check_regular(path)
    counts = np.zeros(1 << 16, dtype=np.int64)  # how often each id occurs
    with open(path, "rb") as file:
        while (ids := np.fromfile(file, "<u2", CHUNK)).size:
            counts += np.bincount(ids, minlength=len(counts))
    description = {
        "tokens": int(counts.sum()),
        "largest_id": int(counts.nonzero()[0][-1]),
        "sha256": file_sha256(path),
    }
    if tokenizer is not None:
        description["bytes"] = int(counts[: tokenizer.n_vocab] @ token_bytes(tokenizer))
    return description


def file_sha256(path):
    """Return the SHA-256 of a file, as hex digits. Raises UserError for a folder or a pipe."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


# nanoGPT --------------------------------------------------------------------------------------


def prepare_nanogpt(config, folder):
    """Make a dataset of the bins in a data directory of nanoGPT; return the meta.json.

    The bins are copied, unless that directory is the folder of the dataset.
    """
    check_unused(config, "--import_nanogpt", "input", "tokenizer", *TEXT_OPTIONS)
    directory = Path(config.import_nanogpt)
    meta = read_dataset_meta(directory) | {"source": str(directory)}
    for name in ("train.bin", "val.bin"):
        check_foreign_bin(directory / name, meta)
    tokenizer = available_tokenizer(meta)
    with lock_dataset(folder):
        is_in_place = directory.resolve() == folder.resolve()
        is_without_meta = is_in_place and not (folder / "meta.json").exists()
        if has_dataset(folder) and not config.overwrite and not is_without_meta:
            check_replaceable(folder, meta["source"])
        if is_in_place:
            for split in ("train", "val"):
                meta[split] = describe_bin(folder / f"{split}.bin", tokenizer)
            write_json(folder / "meta.json", meta)
            return meta
        with dataset_parts(folder) as parts:
            for name in ("train.bin", "val.bin"):
                shutil.copyfile(directory / name, parts[name])
            publish_parts(folder, parts, meta, tokenizer)
    return meta


def check_foreign_bin(path, meta):
    """Raise UserError unless a file is a bin of token ids that the tokenizer of `meta` has."""
    if not path.is_file():
        raise UserError(f"no {path}: --import_nanogpt needs a directory with train.bin and val.bin")
    check_bin(path, meta["vocab_size"])
    size = path.stat().st_size
    if size % 2 or size < 4:
        raise UserError(f"{path} has {size} bytes: not two or more uint16 tokens, or cut off")
    largest_id = int(np.memmap(path, "<u2", "r").max())
    if largest_id >= meta["vocab_size"]:
        raise UserError(
            f"{path} holds the token id {largest_id}, but the tokenizer {meta['tokenizer']} has "
            f"{meta['vocab_size']} ids: {path.parent} needs the meta.pkl that was made with the bin"
        )


def available_tokenizer(meta):
    """Return the tokenizer of a meta.json; None, with a line on stderr, if it is not available."""
    try:
        return get_tokenizer(meta)
    except UserError as error:
        print(f"no bits per byte: {error}", file=sys.stderr)
        return None


# FineWeb --------------------------------------------------------------------------------------


def prepare_fineweb(folder, shards, overwrite):
    """Download FineWeb's tokenized shards and append them to train.bin; return the meta.json.

    val.bin has the first FINEWEB_VAL_TOKENS tokens of the validation shard, and one more, which is
    the last target. A later call with more shards adds only those that are missing.
    """
    if not 1 <= shards <= FINEWEB_SHARDS:
        raise UserError(f"shards={shards} must be from 1 to {FINEWEB_SHARDS}")
    meta = {}
    if (folder / "meta.json").exists() and not overwrite:
        meta = read_meta(folder)
    is_begun = has_dataset(folder) or meta.get("shards") == 0  # 0: val.bin is complete
    if meta.get("source") != "fineweb" or not is_begun:
        (folder / "train.bin").unlink(missing_ok=True)
        val_tokens = append_shard(
            "fineweb_val_000000.bin", folder / "val.bin", 0, max_tokens=FINEWEB_VAL_TOKENS + 1
        )
        meta = {
            "tokenizer": "gpt2",
            "vocab_size": 50257,
            "source": "fineweb",
            "shards": 0,
            "train": {"tokens": 0},
            "val": {"tokens": val_tokens},
        }
        write_json(folder / "meta.json", meta)
    if meta["shards"] > shards:
        raise UserError(
            f"{folder} has {meta['shards']} shards already, more than --shards={shards}"
        )
    if meta["shards"] == shards and "sha256" in meta["train"]:
        return meta  # new hashes could bless bins that were damaged since
    for shard in range(meta["shards"] + 1, shards + 1):
        name = f"fineweb_train_{shard:06d}.bin"
        tokens = append_shard(name, folder / "train.bin", meta["train"]["tokens"])
        meta |= {"shards": shard, "train": {"tokens": tokens}}
        write_json(folder / "meta.json", meta)
    tokenizer = available_tokenizer(meta)
    for split in ("train", "val"):
        meta[split] = describe_bin(folder / f"{split}.bin", tokenizer)
    write_json(folder / "meta.json", meta)
    return meta


def append_shard(name, bin_path, tokens_before, max_tokens=None):
    """Download a shard and append it to a bin of `tokens_before` tokens; return the new count.

    max_tokens   append the first tokens of the shard only, at most so many
    """
    check_regular(bin_path)
    directory = bin_path.with_name("download")
    try:
        shard = hub.download(FINEWEB, name, repo_type="dataset", local_dir=directory)
        shard_tokens = read_shard_header(shard)
        added = shard_tokens if max_tokens is None else min(shard_tokens, max_tokens)
        with name_in_errors(bin_path), open(bin_path, "ab") as bin_file, open(shard, "rb") as file:
            size = bin_file.tell() // 2
            if size < tokens_before:
                raise UserError(
                    f"{bin_path} has {size} tokens, meta.json says {tokens_before}: "
                    "--overwrite=True makes it again"
                )
            bin_file.truncate(2 * tokens_before)  # an interrupted call may have added more
            file.seek(4 * SHARD_HEADER)
            shutil.copyfileobj(file, bin_file)
            bin_file.truncate(2 * (tokens_before + added))
        fsync(bin_path)
    finally:
        if directory.exists():
            remove_tree(directory)
    return tokens_before + added


def read_shard_header(shard):
    """Return the number of tokens in a shard. Raises UserError if its size or kind is another."""
    tokens = (shard.stat().st_size - 4 * SHARD_HEADER) / 2
    header = np.fromfile(shard, "<i4", 3).tolist()
    if header != [SHARD_MAGIC, SHARD_VERSION, tokens]:
        raise UserError(
            f"{shard.name} has magic, version, tokens {header}, expected {SHARD_MAGIC}, "
            f"{SHARD_VERSION}, {tokens:g} by its size: deleted; run the same command again"
        )
    return header[2]


# Datasets -------------------------------------------------------------------------------------


def stdlib_files():
    """Return the .py files of Python's standard library, shuffled.

    Without its tests, of which some are not UTF-8, and without installed packages. Shuffled because
    the validation tokens are the last ones: they should be a mixture, not the modules with z.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts)
    ]
    random.Random(0).shuffle(files)
    return [str(path) for path in files if path.is_file()]


def input_files(pattern):
    """Return the files of a path or a pattern, sorted. Raises UserError if there are none."""
    if os.path.isfile(pattern):
        return [pattern]
    files = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        if not os.path.isdir(path):
            stat = os.stat(path)  # raises OSError for a link to nothing
            # A file counts once, however many links and paths lead to it.
            files.setdefault((stat.st_dev, stat.st_ino or os.path.realpath(path)), path)
    if files:
        return list(files.values())
    message = f"--input={pattern}: no such file"
    if os.path.isdir(pattern):
        every_text = glob.escape(pattern.rstrip("/")) + "/**/*.txt"
        message += f" (a folder: write --input={shlex.quote(every_text)} for its .txt files)"
    raise UserError(message)


def prepare(config, only_missing=False):
    """Make the dataset that a PrepareConfig describes in data/NAME; return its meta.json.

    only_missing   use a complete dataset of that name as it is

    Waits for another process that prepares the same dataset, and uses what it has made.
    """
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(
            f"name a dataset: {', '.join(DATASETS)}, or one of your own with --input (--help "
            "explains)"
        )
    if config.import_nanogpt:
        return prepare_nanogpt(config, Path("data", config.name))
    if not config.input and config.name not in DATASETS:
        raise UserError(
            f"{config.name} is not one of {', '.join(DATASETS)}: --input='FILES' names its text, "
            "and --import_nanogpt=DIR bins of nanoGPT, such as openwebtext"
        )
    tokenizer, val_fraction, _ = DATASETS.get(config.name, CUSTOM_TEXT_DEFAULTS)
    if config.input and val_fraction is None:
        _, val_fraction, _ = CUSTOM_TEXT_DEFAULTS
    is_fineweb = config.name == "fineweb" and not config.input
    if is_fineweb and config.tokenizer != "gpt2":
        check_unused(config, config.name, "tokenizer")
    if val_fraction is None:
        check_unused(config, config.name, *TEXT_OPTIONS)
    elif config.val_fraction is not None:
        val_fraction = config.val_fraction
    tokenizer = config.tokenizer or tokenizer
    if tokenizer not in NAMES:
        raise UserError(f"tokenizer={tokenizer} must be one of {', '.join(NAMES)}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must be above 0 and below 1")

    folder, source = Path("data", config.name), config.input or config.name
    origin = {"source": source, "tokenizer": tokenizer, "val_fraction": val_fraction}
    with lock_dataset(folder) as waited:
        if has_dataset(folder) and not config.overwrite:
            if not only_missing:
                check_replaceable(folder, source)
            meta = read_meta(folder)
            if only_missing or (waited and origin.items() <= meta.items()):
                return meta
        if is_fineweb:
            return prepare_fineweb(folder, config.shards, config.overwrite)
        if val_fraction is None:
            train, val = (hub.download(TINYSTORIES, name, "dataset") for name in TINYSTORIES_FILES)
            return prepare_text(folder, origin, [str(train)], [str(val)], separator=EOT)
        paths = source_files(config)
        check_inputs(paths, config.field, config.separator)
        field = "text" if config.field is None else config.field
        return prepare_text(folder, origin, paths, None, field, config.separator)


def check_unused(config, what, *names):
    """Raise UserError if an option was given that does not apply to `what`."""
    for name in names:
        if getattr(config, name) is not None:
            raise UserError(f"--{name} does not apply to {what}: its files decide that")


def lock_dataset(folder):
    """Return a context that holds the lock of a dataset, as common.files.lock does."""

    def report_wait():
        print(f"waiting for another process that prepares {folder}", file=sys.stderr, flush=True)

    return lock(folder / ".lock", on_busy=report_wait)


def has_dataset(folder):
    """Return whether a folder has a dataset. train.bin is its last file to be written."""
    return (folder / "train.bin").exists()


def check_replaceable(folder, source):
    """Raise UserError if the dataset in a folder was not made from `source` by this program."""
    if not (folder / "meta.json").exists():
        raise UserError(
            f"{folder} has bins that this program did not make: choose another name, or replace "
            "them with --overwrite=True"
        )
    before = read_meta(folder).get("source")
    if before != source:
        raise UserError(
            f"{folder} was made from {before}: choose another name, or replace it with "
            "--overwrite=True"
        )


def source_files(config):
    """Return the text files of a dataset; download tinyshakespeare unless it is there."""
    if config.input:
        return input_files(config.input)
    if config.name == "stdlib":
        return stdlib_files()
    path = Path("data", "download", "tinyshakespeare.txt")
    with lock_dataset(path.parent):  # shakespeare and shakespeare_char both download it
        if not path.exists():
            download_shakespeare(path)
    return [str(path)]


def download_shakespeare(path):
    """Download tinyshakespeare, which is not on the Hugging Face hub. Raises UserError."""
    import requests  # which takes long to import

    try:
        response = requests.get(SHAKESPEARE_URL, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        response = error.response
        reason = type(error).__name__ if response is None else f"status {response.status_code}"
        raise UserError(
            f"{SHAKESPEARE_URL} cannot be downloaded ({reason}): try again, or save it as {path}"
        ) from error
    sha256 = hashlib.sha256(response.content).hexdigest()
    if sha256 != SHAKESPEARE_SHA256:
        raise UserError(
            f"{SHAKESPEARE_URL}: received {len(response.content)} bytes with SHA-256 {sha256}, "
            f"not {SHAKESPEARE_SHA256}: try again"
        )
    write_text(path, response.content.decode())


def open_dataset(name):
    """Return the folder and the meta.json of a dataset; prepare a small one that is missing."""
    folder = Path("data", name)
    if has_dataset(folder):
        if (folder / "meta.pkl").exists() and not (folder / "meta.json").exists():
            raise UserError(
                f"{folder} has nanoGPT's meta.pkl and no meta.json: python prepare_data.py {name} "
                f"--import_nanogpt={folder} makes it"
            )
        return folder, read_meta(folder)
    if name == "fineweb":
        raise UserError(
            f"no {folder}/train.bin: python prepare_data.py fineweb downloads 1 of its 10 billion "
            "tokens, 2 GB (python train.py config/quickstart.py needs no download)"
        )
    if name not in SMALL_DATASETS:
        source = "" if name in DATASETS else "--input='FILES' "
        raise UserError(f"no {folder}/train.bin: python prepare_data.py {name} {source}makes it")
    print(f"preparing {folder}", flush=True)
    return folder, prepare(PrepareConfig(name=name), only_missing=True)


def verify(folder):
    """Check the bins against the hashes in meta.json. Raises UserError if one differs."""
    meta = read_meta(folder)
    for path in (folder / "train.bin", folder / "val.bin"):
        expected = meta.get(path.stem, {}).get("sha256")
        if expected is None:
            raise UserError(f"{folder}/meta.json has no SHA-256 of {path.name}")
        if not path.exists():
            raise UserError(f"{path} is missing: --overwrite=True makes it again")
        actual = file_sha256(path)
        if actual != expected:
            raise UserError(
                f"{path} has SHA-256 {actual}, meta.json says {expected}: --overwrite=True makes "
                "it again"
            )
        print(f"{path}: SHA-256 as in meta.json")


def main(argv):
    """Prepare or verify a dataset as the options in argv say. Raises UserError."""
    config = configure(PrepareConfig, argv, __doc__, positional="name")
    folder = Path("data", config.name)
    if config.verify:
        verify(folder)
        return
    meta = prepare(config)
    n_train, n_val = meta["train"]["tokens"], meta["val"]["tokens"]
    print(f"{folder}: {n_train:,} tokens for training, {n_val:,} for validation")
    print(f"tokenizer {meta['tokenizer']}, vocab_size {meta['vocab_size']}")
    *_, train_config = DATASETS.get(config.name, CUSTOM_TEXT_DEFAULTS)
    command = f"python train.py {train_config}"
    if config.name not in DATASETS:
        command += f" --dataset={config.name} --out_dir=out/{config.name}"
    print(command)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
