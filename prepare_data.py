"""Text or a named dataset -> data/NAME/{train,val}.bin and meta.json.

    python prepare_data.py stdlib                 the text of Python's own standard library, as bytes: no download
    python prepare_data.py shakespeare            tinyshakespeare (1 MB), GPT-2 BPE; shakespeare_char: by characters
    python prepare_data.py fineweb --shards=10    FineWeb, tokenized for GPT-2: 100M tokens (200 MB) a shard, 103 in all
    python prepare_data.py mine --input='corpus/*.txt'     your own: .txt, .jsonl (--field=text), .gz of either

The bins are raw little-endian uint16 token ids, nanoGPT's format. Documents (files; lines of .jsonl) are separated by
<|endoftext|>; the last val_fraction of all tokens is val.bin. Text streams through in pieces, so that memory does not
grow with it, on all cores, and a file appears under its name only when it is complete.
"""

import contextlib
import glob
import os
import random
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError, configure, program
from corpus import PIECE, read_pieces, tokenize
from download import download, file_sha256, hub_url
from tokenizer import EOT, NAMES, get_tokenizer, read_meta, token_bytes, write_json

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FINEWEB = "datasets/kjj0/fineweb10B-gpt2/resolve/main"
FINEWEB_SHARDS = 103
SHARD_HEADER = 256  # int32 numbers before a shard's tokens: magic, version, count of tokens, then zeros
SHARD_MAGIC, SHARD_VERSION = 20240520, 1

# name: tokenizer, val_fraction (a tenth for Shakespeare, as in nanoGPT), a config that trains on it; --input under such
# a name is other text in its place
DATASETS = {
    "stdlib": ("byte", 0.01, "config/quickstart.py"),
    "shakespeare": ("gpt2", 0.1, "config/finetune_shakespeare.py"),
    "shakespeare_char": ("char", 0.1, "config/shakespeare_char.py"),
    "fineweb": ("gpt2", 0.01, "config/gpt2.py"),
}
SMALL = ("stdlib", "shakespeare", "shakespeare_char")  # train.py prepares these on the spot
YOUR_OWN = ("gpt2", 0.01, "config/quickstart.py")


@dataclass
class PrepareConfig:
    # What
    name: str = ""  # the dataset, a folder of data/
    input: str | None = None  # your own text: a file or a quoted pattern
    field: str = "text"  # the field of a .jsonl line that holds its text
    shards: int = 10  # fineweb: training shards to have in all, 1 to 103
    # How
    tokenizer: str | None = None  # gpt2, byte or char; None: the dataset's, gpt2 for your own
    val_fraction: float | None = None  # share of the tokens for validation; None: the dataset's, 0.01 for your own
    overwrite: bool = False  # make it anew, and in the place of one that was made from something else
    verify: bool = False  # check the bins against the hashes in meta.json, and nothing else


def describe(path, tokenizer):
    """What meta.json says of a bin; the bytes of its text only where there is a tokenizer."""
    counts = np.zeros(1 << 16, dtype=np.int64)  # how often each id occurs
    with open(path, "rb") as file:
        while (ids := np.fromfile(file, "<u2", PIECE)).size:
            counts += np.bincount(ids, minlength=len(counts))
    about = {"tokens": int(counts.sum()), "largest_id": int(counts.nonzero()[0][-1]), "sha256": file_sha256(path)}
    if tokenizer is not None:
        about["bytes"] = int(counts[: tokenizer.n_vocab] @ token_bytes(tokenizer))
    return about


def prepare_text(folder, tokenizer_name, paths, field, val_fraction, source):
    """Tokenize text files into folder/train.bin, val.bin and meta.json."""
    meta = {"tokenizer": tokenizer_name}
    if tokenizer_name == "char":
        chars = set()
        for piece in read_pieces(paths, field, "characters"):
            chars |= {EOT} if piece is None else set(piece)
        meta["chars"] = sorted(chars, key=lambda char: (char == EOT, char)) or [EOT]  # without text: refused below
    tokenizer = get_tokenizer(meta)
    if tokenizer.n_vocab > 1 << 16:
        raise UserError(f"{tokenizer.n_vocab} different characters do not fit the bins' uint16: --tokenizer=byte does")
    folder.mkdir(parents=True, exist_ok=True)
    parts = {split: folder / f"{split}.bin.part" for split in ("train", "val")}
    try:
        with open(parts["train"], "w+b") as train, open(parts["val"], "wb") as val:
            for ids in tokenize(tokenizer, read_pieces(paths, field, "tokens")):
                train.write(ids)
            total = train.tell() // 2
            n_train = int(total * (1 - val_fraction))
            if min(n_train, total - n_train) < 2:
                raise UserError(
                    f"{source} has {total} tokens: with val_fraction={val_fraction} {n_train} are left for training "
                    f"and {total - n_train} for validation, and each needs 2 at least"
                )
            train.seek(2 * n_train)
            shutil.copyfileobj(train, val)
            train.truncate(2 * n_train)
        meta |= {"vocab_size": tokenizer.n_vocab, "source": source, "val_fraction": val_fraction}
        meta |= {split: describe(part, tokenizer) for split, part in parts.items()}
        (folder / "train.bin").unlink(missing_ok=True)  # the last to come back: without it the folder is no dataset
        parts["val"].replace(folder / "val.bin")
        write_json(folder / "meta.json", meta)
        parts["train"].replace(folder / "train.bin")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty, but where nothing came of it
            folder.rmdir()
    return meta


def prepare_fineweb(folder, shards, overwrite):
    """Download FineWeb's tokenized shards and append them to folder/train.bin, one by one: a later call adds more."""
    if not 1 <= shards <= FINEWEB_SHARDS:
        raise UserError(f"shards={shards}: fineweb has 1 to {FINEWEB_SHARDS}")
    if (folder / "meta.json").exists() and not overwrite:
        meta = read_meta(folder)
    else:
        (folder / "meta.json").unlink(missing_ok=True)
        meta = {"tokenizer": "gpt2", "vocab_size": 50257, "source": "fineweb", "shards": 0, "train": {"tokens": 0}}
        meta["val"] = {"tokens": append_shard("fineweb_val_000000.bin", folder / "val.bin", 0)}
    if meta["shards"] > shards:
        raise UserError(f"{folder} has {meta['shards']} shards already, more than --shards={shards}")
    if meta["shards"] == shards and "sha256" in meta["train"]:
        return meta  # as it is: hashes taken anew would vouch for what was damaged since
    for shard in range(meta["shards"] + 1, shards + 1):
        tokens = append_shard(f"fineweb_train_{shard:06d}.bin", folder / "train.bin", meta["train"]["tokens"])
        meta |= {"shards": shard, "train": {"tokens": tokens}}
        write_json(folder / "meta.json", meta)
    try:
        tokenizer = get_tokenizer(meta)
    except UserError as error:
        print(f"no bits per byte: {error}", file=sys.stderr)
        tokenizer = None
    meta |= {split: describe(folder / f"{split}.bin", tokenizer) for split in ("train", "val")}
    write_json(folder / "meta.json", meta)
    return meta


def append_shard(name, bin_path, tokens_before):
    """Download a shard and append its tokens to a bin of `tokens_before` tokens. Returns the tokens it then has."""
    shard = bin_path.with_name(name)
    if not shard.exists():
        download(hub_url(f"{FINEWEB}/{name}"), shard)
    expected = [SHARD_MAGIC, SHARD_VERSION, (shard.stat().st_size - 4 * SHARD_HEADER) / 2]
    told = np.fromfile(shard, "<i4", 3).tolist()
    if told != expected:
        shard.unlink()
        raise UserError(f"{name}: magic, version, tokens are {told}, not {expected} as its size asks: thrown away")
    with open(bin_path, "ab") as bin_file, open(shard, "rb") as file:
        had = bin_file.tell() // 2
        if had < tokens_before:
            raise UserError(
                f"{bin_path} has {had} tokens, meta.json says {tokens_before}: --overwrite=True makes it anew"
            )
        bin_file.truncate(2 * tokens_before)  # what an interrupted call added without writing meta.json
        file.seek(4 * SHARD_HEADER)
        shutil.copyfileobj(file, bin_file)
    shard.unlink()
    return tokens_before + told[2]


# The program --------------------------------------------------------------------------------------------------------


def stdlib_files():
    """The .py files of Python's own library, shuffled, without its tests (not all UTF-8) and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    random.Random(0).shuffle(files)  # the validation tokens are the last ones: a mixture then, not the letter z
    return [str(path) for path in files if path.is_file()]


def input_files(pattern):
    """The files that a path or pattern names, sorted; UserError where there are none."""
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if os.path.isfile(path)]
    if not files:
        folder = f" (a folder: write --input='{pattern.rstrip('/')}/**/*.txt')" if os.path.isdir(pattern) else ""
        raise UserError(f"--input={pattern}: no such file{folder}")
    return files


def prepare(config, root="data"):
    """Make the dataset that a PrepareConfig describes in root/NAME; returns its meta.json."""
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(f"name a dataset: {', '.join(DATASETS)}, or one of your own with --input (--help explains)")
    if not config.input and config.name not in DATASETS:
        raise UserError(f"{config.name} is none of {', '.join(DATASETS)}: --input='FILES' says where its text is")
    folder, source = Path(root, config.name), config.input or config.name
    if (folder / "meta.json").exists() and not config.overwrite:
        there = read_meta(folder).get("source")
        if there != source:
            raise UserError(f"{folder} was made from {there}: another name, or --overwrite=True to replace it")
    if config.name == "fineweb" and not config.input:
        if config.tokenizer not in (None, "gpt2") or config.val_fraction is not None:
            raise UserError("fineweb comes tokenized for gpt2 and split: --tokenizer and --val_fraction do not apply")
        return prepare_fineweb(folder, config.shards, config.overwrite)
    if (folder / "train.bin").exists() and not (folder / "meta.json").exists() and not config.overwrite:
        raise UserError(f"{folder} holds bins of other making: another name, or --overwrite=True to replace them")
    tokenizer, val_fraction, _ = DATASETS.get(config.name, YOUR_OWN)
    tokenizer = config.tokenizer or tokenizer
    val_fraction = val_fraction if config.val_fraction is None else config.val_fraction
    if tokenizer not in NAMES:
        raise UserError(f"tokenizer={tokenizer} is none of {', '.join(NAMES)}")
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must be above 0 and below 1")
    if config.input:
        paths = input_files(config.input)
    elif config.name == "stdlib":
        paths = stdlib_files()
    else:
        paths = [str(Path(root, "download", "tinyshakespeare.txt"))]
        if not os.path.exists(paths[0]):
            download(SHAKESPEARE_URL, paths[0], SHAKESPEARE_SHA256)
    return prepare_text(folder, tokenizer, paths, config.field, val_fraction, source)


def verify(folder):
    """UserError where a bin is not the one that meta.json describes."""
    meta = read_meta(folder)
    for path in (folder / "train.bin", folder / "val.bin"):
        expected = meta.get(path.stem, {}).get("sha256")
        if expected is None:
            raise UserError(f"{folder}/meta.json holds no SHA-256 of {path.name}")
        got = file_sha256(path) if path.exists() else "of no file"
        if got != expected:
            raise UserError(f"{path} has SHA-256 {got}, meta.json says {expected}: --overwrite=True makes it anew")
        print(f"{path}: SHA-256 as in meta.json")


@program
def main(argv):
    config = configure(PrepareConfig, argv, __doc__, positional="name")
    folder = Path("data", config.name)
    if config.verify:
        return verify(folder)
    meta = prepare(config)
    print(f"{folder}: {meta['train']['tokens']:,} tokens for training, {meta['val']['tokens']:,} for validation")
    print(f"tokenizer {meta['tokenizer']}, vocab_size {meta['vocab_size']}")
    *_, train_config = DATASETS.get(config.name, YOUR_OWN)
    print(
        f"python train.py {train_config}"
        + ("" if config.name in DATASETS else f" --dataset={config.name} --out_dir=out/{config.name}")
    )


if __name__ == "__main__":
    main(sys.argv[1:])
