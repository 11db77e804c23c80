"""The calls of prepare_data.py and of the export that tests interrupt, and what they find.

Also the shards of FineWeb that a hub serves.
"""

import functools
import hashlib

import numpy as np
from conftest import TEXT
from faults import run_in
from huggingface_hub import constants
from nanogpt_files import write_their_data

import prepare_data
from common.tokenizer import byte_tokenizer
from tools import export

FINEWEB = f"datasets/{prepare_data.FINEWEB}"


def shard_file(token_ids, magic=20240520, version=1, count=None):
    """Return the bytes of a shard: 256 int32 numbers, then the tokens as uint16."""
    header = np.zeros(256, "<i4")
    header[0] = magic
    header[1] = version
    header[2] = len(token_ids) if count is None else count
    return header.tobytes() + np.array(token_ids, "<u2").tobytes()


def shard_name(shard):
    """Return the name of a shard on the hub; number 0 is the one for validation."""
    return "fineweb_val_000000.bin" if shard == 0 else f"fineweb_train_{shard:06d}.bin"


OTHER_TEXT = "Other text, of which no byte is where it was before. " * 100
SHARDS = [[shard + i for i in range(1000 + shard)] for shard in range(3)]  # token ids


def prepare_text():
    prepare_data.main(["mine", "--input=*.txt", "--tokenizer=byte"])


def prepare_chars():
    prepare_data.main(["mine", "--input=*.txt", "--tokenizer=char", "--overwrite=True"])


def prepare_stdlib():
    prepare_data.stdlib_files = lambda: ["a.txt", "b.txt"]
    prepare_data.main(["stdlib"])


def prepare_fineweb(shards=2):
    prepare_data.get_tokenizer = lambda meta: byte_tokenizer()  # GPT-2's takes time to load
    prepare_data.main(["fineweb", f"--shards={shards}"])


def prepare_shakespeare():
    prepare_data.SHAKESPEARE_URL = f"{constants.ENDPOINT}/shakespeare.txt"
    prepare_data.SHAKESPEARE_SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()
    prepare_data.main(["shakespeare_char"])


def import_nanogpt():
    prepare_data.main(["mine", "--import_nanogpt=theirs", "--overwrite=True"])


def import_in_place():
    prepare_data.main(["mine", "--import_nanogpt=data/mine"])


def export_run():
    export.main(["--init_from=out/tiny", "--out_dir=data/exported"])


def make_text(folder):
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[::-1])


def make_changed_text(folder):
    """Make the dataset `mine` of other text than there is in the end."""
    (folder / "a.txt").write_text(OTHER_TEXT)
    run_in(folder, prepare_text)
    make_text(folder)


def make_nanogpt_files(folder):
    """Make a data directory of nanoGPT, and the dataset `mine` of other text."""
    make_changed_text(folder)
    write_their_data(folder=folder / "theirs")


def make_nanogpt_files_in_place(folder):
    write_their_data(folder=folder / "data/mine")


def make_one_shard(folder):
    run_in(folder, functools.partial(prepare_fineweb, shards=1))


# command: (call, what it finds)
COMMANDS = {
    "text": (prepare_text, make_text),
    "changed": (prepare_text, make_changed_text),
    "tokenizer": (prepare_chars, make_changed_text),
    "stdlib": (prepare_stdlib, make_text),
    "shakespeare": (prepare_shakespeare, None),
    "fineweb": (prepare_fineweb, None),
    "more fineweb": (prepare_fineweb, make_one_shard),
    "import": (import_nanogpt, make_nanogpt_files),
    "import in place": (import_in_place, make_nanogpt_files_in_place),
}


def start_of(make, folder):
    """Make a working directory with a data directory and what a command finds; return it."""
    start = folder / "start"
    (start / "data").mkdir(parents=True)
    if make is not None:
        make(start)
    return start


def serve(hub):
    """Serve what the commands download."""
    for shard, ids in enumerate(SHARDS):
        hub.add(FINEWEB, shard_name(shard), shard_file(ids))
    hub.files["shakespeare.txt"] = TEXT.encode()


def dataset_in(folder):
    """Return the files of data/mine that train.py reads; None if it would not read them."""
    dataset = folder / "data/mine"
    if not prepare_data.has_dataset(dataset):
        return None
    return [(dataset / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")]
