"""SIGKILL at any file operation of prepare_data.py or an export, as in test_kills.py.

pytest -m slow tests/robustness/test_data_kills.py    at each operation; unmarked is a seeded sample
"""

import functools
import hashlib

import pytest
from conftest import TEXT
from faults import EFFORTS, Forked, failed_cases, files_of, kill, needs_fork, run_in
from huggingface_hub import constants
from nanogpt_files import write_their_data
from test_fineweb import FINEWEB, shard_file, shard_name

import prepare_data
from common.dataloader import Loader
from common.errors import UserError
from common.tokenizer import byte_tokenizer
from tools import export

pytestmark = needs_fork

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


def make_nanogpt_data(folder):
    """Make a data directory of nanoGPT, and the dataset `mine` of other text."""
    make_changed_text(folder)
    write_their_data(folder=folder / "theirs")


def make_nanogpt_data_in_place(folder):
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
    "import": (import_nanogpt, make_nanogpt_data),
    "import in place": (import_in_place, make_nanogpt_data_in_place),
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


def kill_command(name, count, folder):
    call, make = COMMANDS[name]
    return kill(call, "data", start_of(make, folder), folder, count)


def ends_as_uninterrupted(killed):
    """Return a check of what a kill left: the same call again leaves the uninterrupted's files."""
    expected = files_of(killed.finished)

    def has_right_result(folder):
        run_in(folder, killed.call)
        return files_of(folder) == expected

    return has_right_result


@pytest.mark.parametrize("count", EFFORTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_the_uninterrupted_one(hub, tmp_path, name, count):
    serve(hub)
    killed = kill_command(name, count, tmp_path)
    assert failed_cases(killed, ends_as_uninterrupted(killed)) == []


@pytest.mark.parametrize("count", EFFORTS)
@pytest.mark.parametrize("name", ["text", "changed", "tokenizer", "import"])
def test_a_kill_leaves_the_old_dataset_the_new_one_or_none(tmp_path, name, count):
    killed = kill_command(name, count, tmp_path)
    datasets = [dataset_in(tmp_path / folder) for folder in ("start", "finished")]

    def has_right_result(folder):
        return dataset_in(folder) in (None, *datasets)

    assert failed_cases(killed, has_right_result) == []


def dataset_in(folder):
    """Return the files of data/mine that train.py reads; None if it would not read them."""
    dataset = folder / "data/mine"
    if not prepare_data.has_dataset(dataset):
        return None
    return [(dataset / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")]


@pytest.mark.parametrize("count", EFFORTS)
@pytest.mark.parametrize("name", ["fineweb", "more fineweb"])
def test_a_killed_fineweb_has_whole_shards_or_is_refused(hub, tmp_path, name, count):
    serve(hub)
    killed = kill_command(name, count, tmp_path)

    def has_right_result(folder):
        try:
            tokens = Loader(folder / "data/fineweb", block_size=8, vocab_size=50257, seed=0).n_train
        except UserError:
            return True
        return tokens in (len(SHARDS[1]), len(SHARDS[1]) + len(SHARDS[2]))

    assert failed_cases(killed, has_right_result) == []


@pytest.mark.parametrize("count", EFFORTS)
def test_a_killed_export_is_complete_or_can_be_repeated(tiny_run, workdir, tmp_path_factory, count):
    killed = kill(export_run, "data", workdir, tmp_path_factory.mktemp("killed"), count)
    expected = files_of(killed.finished)

    def has_right_result(folder):
        was_complete = (folder / "data/exported").exists()
        outcome = Forked(export_run, folder).finish()
        assert outcome.status == (2 if was_complete else 0), outcome.err
        return files_of(folder) == expected

    assert failed_cases(killed, has_right_result) == []
