"""common/dataloader.py: a batch follows from (seed, step); validation is a fixed set of windows.

test_properties.py shows for any sizes, batches and ranks which tokens a loader reads.
In most of these bins the token at position p is p itself, so that a batch shows where it was read.
"""

import contextlib
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.dataloader import Loader
from common.errors import UserError

ROOT = Path(__file__).parents[2]
BIG_VOCAB = 65536
CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path):
    """Return a function that makes a dataset of token ids; `about` is its meta.json."""

    def make(train=range(64), val=range(64), about=None):
        np.array(list(train), dtype="<u2").tofile(tmp_path / "train.bin")
        np.array(list(val), dtype="<u2").tofile(tmp_path / "val.bin")
        meta = about or {"tokenizer": "gpt2"}
        (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        return tmp_path

    return make


def starts(loader, first, count):
    """Return the positions where sequences begin."""
    inputs, _ = loader.train_batch(first, count)
    return inputs[:, 0].tolist()


def are_distinct(orders):
    return all(first != second for first, second in itertools.combinations(orders, 2))


# Training order -------------------------------------------------------------------------------


def test_a_batch_is_int64_inputs_and_targets_of_block_size(dataset):
    x, y = Loader(dataset(), block_size=5, vocab_size=BIG_VOCAB, seed=1).train_batch(0, 3)
    assert x.shape == y.shape == (3, 5)
    assert x.dtype == y.dtype == torch.int64


def test_other_seeds_give_another_order(dataset):
    folder = dataset(range(1000))
    orders = [starts(Loader(folder, 7, BIG_VOCAB, seed), 0, 50) for seed in range(4)]
    assert are_distinct(orders)


# (tokens, block_size): one window, two, many; dividing and not; the shortest that is allowed.
SIZES = [(2, 1), (9, 8), (16, 8), (17, 8), (24, 8), (25, 8), (71, 8), (101, 1), (997, 13)]


@pytest.mark.parametrize(("n", "block_size"), SIZES)
def test_an_epoch_leaves_out_less_than_two_windows(dataset, n, block_size):
    loader = Loader(dataset(range(n)), block_size, BIG_VOCAB, 1)
    for epoch in range(5):
        x, _ = loader.train_batch(epoch * loader.n_windows, loader.n_windows)
        assert n - x.numel() < 2 * block_size


def test_over_several_epochs_every_token_is_read(dataset):
    loader = Loader(dataset(range(71)), 8, BIG_VOCAB, 1)
    x, y = loader.train_batch(0, 60 * loader.n_windows)
    assert torch.cat([x, y], dim=1).unique().tolist() == list(range(71))


def test_epochs_differ_in_order(dataset):
    loader = Loader(dataset(range(1000)), 7, BIG_VOCAB, 1)
    orders = []
    for epoch in range(4):
        positions = starts(loader, epoch * loader.n_windows, loader.n_windows)
        orders.append([(position - min(positions)) // 7 for position in positions])
    assert are_distinct(orders)


def test_epochs_differ_in_the_edges_of_the_windows(dataset):
    loader = Loader(dataset(range(1000)), 7, BIG_VOCAB, 1)
    firsts = [starts(loader, epoch * loader.n_windows, 1)[0] for epoch in range(20)]
    assert len({position % 7 for position in firsts}) > 3


def test_the_order_within_an_epoch_is_shuffled(dataset):
    loader = Loader(dataset(range(1000)), 7, BIG_VOCAB, 1)
    order = starts(loader, 0, loader.n_windows)
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_ids_above_32767_are_read_as_they_are(dataset):
    x, _ = Loader(dataset([65535] * 20), 4, BIG_VOCAB, 1).train_batch(0, 1)
    assert x.tolist() == [[65535] * 4]


# Validation -----------------------------------------------------------------------------------


def test_ids_without_a_token_and_padding_have_no_bytes(dataset):
    meta = {"tokenizer": "byte", "vocab_size": 300}
    loader = Loader(dataset(range(300), about=meta), 8, 300, 1)
    assert loader.token_bytes[[65, 255, 256, 299, -1]].tolist() == [1, 1, 0, 0, 0]


def test_windows_of_the_training_split_are_spread_over_it(dataset):
    loader = Loader(dataset(range(1000)), 8, BIG_VOCAB, 1)
    [(x, y)] = loader.val_batches(32, 4, split="train")
    assert x[:, 0].tolist() == [0, 248, 496, 744]
    assert torch.equal(y, x + 1)


def test_an_evaluation_of_the_training_split_waits_for_the_thread_that_reads_it(
    dataset, monkeypatch
):
    loader = Loader(dataset(range(1000)), 8, BIG_VOCAB, 1)
    read, done = loader._read_batch, []

    def read_slowly(first, count):
        batch = read(first, count)
        time.sleep(0.2)
        done.append(first)
        return batch

    monkeypatch.setattr(loader, "_read_batch", read_slowly)
    loader.prefetch(0, 4, CPU)
    next(loader.val_batches(32, 4, split="train"))
    assert done == [0]


def test_an_evaluation_of_the_training_split_leaves_its_order_alone(dataset):
    folder = dataset(range(1000))
    loader, other = Loader(folder, 8, BIG_VOCAB, 1), Loader(folder, 8, BIG_VOCAB, 1)
    for first in (0, 4, 200):
        list(other.val_batches(10**6, 4, split="train"))
        assert torch.equal(loader.train_batch(first, 4)[0], other.train_batch(first, 4)[0])


def validation(loader, eval_tokens=10**9, batch_size=3):
    """Return all validation batches as one pair of inputs and targets."""
    batches = list(loader.val_batches(eval_tokens, batch_size))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# Lengths of val.bin: the shortest, shorter than block_size = 8, and a multiple of it with one token
# more or less.
LENGTHS = [2, 3, 8, 9, 10, 24, 25, 26, 100]


@pytest.mark.parametrize("n", LENGTHS)
def test_all_validation_batches_have_one_shape(dataset, n):
    loader = Loader(dataset(val=range(n)), 8, BIG_VOCAB, 1)
    for x, y in loader.val_batches(10**9, 3):
        assert x.shape == y.shape == (3, 8)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_validation_batch_of_one_rank_has_targets(dataset, n, batch_size):
    loader = Loader(dataset(val=range(n)), 8, BIG_VOCAB, 1)
    assert all((y != -1).any() for _, y in loader.val_batches(10**9, batch_size))


def test_validation_is_the_same_in_every_call(dataset):
    loader = Loader(dataset(val=range(100)), 8, BIG_VOCAB, 1)
    x, y = validation(loader, 40)
    loader.train_batch(0, 10)
    again_x, again_y = validation(loader, 40)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)


def test_validation_is_the_same_for_every_seed(dataset):
    folder = dataset(val=range(100))
    x, y = validation(Loader(folder, 8, BIG_VOCAB, seed=1), 40)
    other_x, other_y = validation(Loader(folder, 8, BIG_VOCAB, seed=2), 40)
    assert torch.equal(x, other_x)
    assert torch.equal(y, other_y)


@pytest.mark.parametrize("eval_tokens", [40, 10**9])
def test_validation_windows_do_not_depend_on_batch_size(dataset, eval_tokens):
    loader = Loader(dataset(val=range(100)), 8, BIG_VOCAB, 1)
    windows = []
    for batch_size in (1, 2, 5, 64):
        _, y = validation(loader, eval_tokens, batch_size)
        windows.append(y[(y != -1).any(dim=1)])
    assert all(torch.equal(windows[0], other) for other in windows[1:])


@pytest.mark.parametrize(
    ("eval_tokens", "windows"), [(1, 1), (8, 1), (9, 2), (40, 5), (96, 12), (97, 13), (10**9, 13)]
)
def test_eval_tokens_limits_the_windows(dataset, eval_tokens, windows):
    _, y = validation(Loader(dataset(val=range(100)), 8, BIG_VOCAB, 1), eval_tokens)
    assert (y != -1).any(dim=1).sum() == windows


@pytest.mark.parametrize("eval_tokens", [16, 40, 240, 792])
def test_limited_validation_windows_are_spread_evenly(dataset, eval_tokens):
    x, y = validation(Loader(dataset(val=range(801)), 8, BIG_VOCAB, 1), eval_tokens)  # 100 windows
    windows = (x[(y != -1).any(dim=1), 0] // 8).tolist()
    gaps = [after - before for before, after in itertools.pairwise([*windows, 100])]
    assert windows[0] == 0
    assert max(gaps) - min(gaps) <= 1


# Bad bins -------------------------------------------------------------------------------------


def at_most_99(n):
    """Return a meta.json that describes n training tokens: a larger id is found in a batch only."""
    return {"tokenizer": "byte", "train": {"tokens": n, "largest_id": 99, "sha256": "0"}}


def prefetch_and_request(loader):
    loader.prefetch(0, 10, CPU)
    loader.train_batch(0, 10)


def user_error(folder, block_size=8, vocab_size=100, use=lambda loader: None):
    """Return the UserError that opening, or using, a dataset raises; it is one line."""
    with pytest.raises(UserError) as error:
        use(Loader(folder, block_size, vocab_size, seed=1))
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message.replace(str(folder), "")


def numbers(message):
    """Return the numbers in a message, as text."""
    return re.findall(r"\d+", message)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bin_of_an_odd_number_of_bytes_is_refused_with_the_number(dataset, split):
    folder = dataset()
    os.truncate(folder / f"{split}.bin", 129)
    message = user_error(folder)
    assert f"{split}.bin" in message
    assert "129" in numbers(message)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bin_whose_length_contradicts_meta_json_is_refused_with_both(dataset, split):
    message = user_error(dataset(about={"tokenizer": "byte", split: {"tokens": 65}}))
    assert f"{split}.bin" in message
    assert {"64", "65"} <= set(numbers(message))


def test_too_few_training_tokens_for_a_window_are_refused_with_both_numbers(dataset):
    message = user_error(dataset(train=range(8)))
    assert "train.bin" in message
    assert "block_size=8" in message
    assert numbers(message).count("8") == 2
    assert "9" in numbers(message)


def test_as_many_training_tokens_as_a_window_needs_are_accepted(dataset):
    x, y = Loader(dataset(train=range(9)), 8, 100, 1).train_batch(0, 1)
    assert x[0].tolist() == list(range(8))
    assert y[0].tolist() == list(range(1, 9))


@pytest.mark.parametrize("n", [0, 1])
def test_validation_tokens_too_few_for_a_target_are_refused(dataset, n):
    message = user_error(dataset(val=range(n)))
    assert "val.bin" in message
    assert str(n) in numbers(message)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_of_meta_json_beyond_the_vocabulary_is_refused_with_both_numbers(dataset, split):
    message = user_error(dataset(about={"tokenizer": "byte", split: {"largest_id": 100}}))
    assert f"{split}.bin" in message
    assert {"100", "101"} <= set(numbers(message))


def test_a_bin_at_the_limits_of_meta_json_is_accepted(dataset):
    about = {"tokens": 64, "largest_id": 99}
    folder = dataset(about={"tokenizer": "byte", "train": about, "val": about})
    assert Loader(folder, 8, 100, 1).n_train == 64


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_of_a_batch_beyond_the_vocabulary_is_refused_with_both_numbers(dataset, split):
    use = {"train": lambda loader: loader.train_batch(0, 100), "val": validation}
    message = user_error(dataset(**{split: [*range(40), 100]}), use=use[split])
    assert f"{split}.bin" in message
    assert "vocab_size=100" in message
    assert numbers(message).count("100") == 2
    assert "101" in numbers(message)


def test_the_largest_id_of_uint16_beyond_the_vocabulary_is_refused_with_both_numbers(dataset):
    message = user_error(dataset([65535] * 64, about=at_most_99(64)), use=prefetch_and_request)
    assert {"65535", "65536"} <= set(numbers(message))


def test_the_last_id_of_the_vocabulary_is_accepted(dataset):
    x, _ = Loader(dataset(train=[99] * 64), 8, 100, 1).train_batch(0, 1)
    assert x.max() == 99


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_bin_is_refused_with_the_program_that_makes_it(dataset, split):
    folder = dataset()
    (folder / f"{split}.bin").unlink()
    message = user_error(folder)
    assert f"{split}.bin" in message
    assert "prepare_data.py" in message


def test_a_missing_meta_json_is_refused_with_the_content_that_is_enough(dataset):
    folder = dataset()
    (folder / "meta.json").unlink()
    message = user_error(folder)
    assert "meta.json" in message
    assert '{"tokenizer": "gpt2"}' in message


def test_bins_of_other_programs_need_only_the_name_of_the_tokenizer(dataset):
    loader = Loader(dataset(range(64), range(20), about={"tokenizer": "gpt2"}), 8, 50257, 1)
    assert (loader.n_train, loader.n_val) == (64, 20)
    assert loader.meta["vocab_size"] == 50257


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bin_that_is_shortened_while_it_is_in_use_is_refused_by_name(dataset, split):
    def shorten_and_read(loader):
        os.truncate(loader.folder / f"{split}.bin", 2 * 20)
        loader.train_batch(0, 6)
        validation(loader)

    message = user_error(dataset(), vocab_size=BIG_VOCAB, use=shorten_and_read)
    assert f"{split}.bin" in message


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not delete an open file")
def test_bins_that_are_deleted_while_they_are_in_use_are_read_as_before(dataset):
    loader = Loader(dataset(), 8, 100, 1)
    before = starts(loader, 0, 6), validation(loader)[1].tolist()
    for split in ("train", "val"):
        (loader.folder / f"{split}.bin").unlink()
    assert (starts(loader, 0, 6), validation(loader)[1].tolist()) == before


# Prefetching ----------------------------------------------------------------------------------


def test_prefetched_batches_equal_those_that_are_read_when_requested(dataset):
    folder = dataset(range(100))
    loader, other = Loader(folder, 10, BIG_VOCAB, 1), Loader(folder, 10, BIG_VOCAB, 1)
    for first in range(0, 200, 4):
        x, y = loader.train_batch(first, 4)
        loader.prefetch(first + 4, 4, CPU)
        other_x, other_y = other.train_batch(first, 4)
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_a_prefetched_batch_is_read_once_in_another_thread(dataset, monkeypatch):
    loader = Loader(dataset(), 8, BIG_VOCAB, 1)
    read_batch, threads = loader._read_batch, []

    def recording_read_batch(first, count):
        threads.append(threading.current_thread())
        return read_batch(first, count)

    monkeypatch.setattr(loader, "_read_batch", recording_read_batch)
    loader.prefetch(3, 2, CPU)
    loader.train_batch(3, 2)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize(("first", "count"), [(0, 4), (5, 4), (4, 3)])  # 4, 4 is prefetched
def test_a_request_other_than_the_prefetched_one_is_read(dataset, first, count):
    folder = dataset(range(100))
    expected = starts(Loader(folder, 10, BIG_VOCAB, 1), first, count)
    loader = Loader(folder, 10, BIG_VOCAB, 1)
    loader.prefetch(4, 4, CPU)
    assert starts(loader, first, count) == expected
    assert starts(loader, first, count) == expected


def test_a_request_other_than_the_prefetched_one_waits_until_that_is_read(dataset, monkeypatch):
    reading, order = threading.Event(), []
    read_batch = Loader._read_batch

    def slow_in_the_thread(loader, first, count):
        if first == 4:
            reading.set()
            time.sleep(0.2)
        order.append(first)
        return read_batch(loader, first, count)

    monkeypatch.setattr(Loader, "_read_batch", slow_in_the_thread)
    loader = Loader(dataset(), 8, BIG_VOCAB, 1)
    loader.prefetch(4, 4, CPU)
    assert reading.wait(10)
    loader.train_batch(0, 4)
    assert order == [4, 0]


def test_an_evaluation_does_not_disturb_the_prefetched_batch(dataset):
    folder = dataset(range(1000), range(500))
    expected = starts(Loader(folder, 8, BIG_VOCAB, 1), 4, 100)
    loader = Loader(folder, 8, BIG_VOCAB, 1)
    loader.prefetch(4, 100, CPU)
    _, y = validation(loader)
    assert sorted(y[y != -1].tolist()) == list(range(1, 500))
    assert starts(loader, 4, 100) == expected


def test_an_error_of_a_prefetched_batch_is_raised_when_it_is_requested(dataset):
    message = user_error(dataset([100] * 100, about=at_most_99(100)), use=prefetch_and_request)
    assert "vocab_size=100" in message


def test_an_error_of_a_prefetched_batch_does_not_end_later_ones(dataset):
    loader = Loader(dataset([100] * 100, about=at_most_99(100)), 8, 100, 1)
    with pytest.raises(UserError):
        prefetch_and_request(loader)
    np.full(100, 99, dtype="<u2").tofile(loader.folder / "train.bin")  # the same file, mended
    prefetch_and_request(loader)


def test_a_prefetched_batch_that_is_not_requested_raises_no_error(dataset):
    loader = Loader(dataset([100] * 100, about=at_most_99(100)), 8, 100, 1)
    loader.prefetch(0, 1, CPU)
    loader._thread.shutdown()  # waits until it is read
    np.full(100, 99, dtype="<u2").tofile(loader.folder / "train.bin")
    assert starts(loader, 1, 1) == [99]


# A child prefetches a batch and ends in one of three ways; the program prints the exit statuses.
ENDINGS = """
import os, sys, time, torch
from common.dataloader import Loader
Loader._start = lambda loader, i: time.sleep(0.01) or 0  # a slow disk
for end in (lambda: None, lambda: 1 / 0, lambda: sys.exit(3)):
    pid = os.fork()
    if pid == 0:
        Loader(sys.argv[1], 8, 100, 1).prefetch(0, 20, torch.device("cpu"))
        end()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # before the next fork
"""


def test_a_program_ends_while_a_batch_is_prefetched(dataset):
    output = subprocess.check_output(
        [sys.executable, "-c", ENDINGS, dataset()],
        cwd=ROOT,
        timeout=60,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert output.split() == ["0", "1", "3"]  # returned, raised an error, called sys.exit(3)


# Files ----------------------------------------------------------------------------------------


def test_each_bin_is_opened_once(dataset, monkeypatch):
    loader = Loader(dataset(), 8, BIG_VOCAB, 1)
    monkeypatch.setattr("builtins.open", None)
    for first in range(20):
        loader.train_batch(first, 2)
        loader.prefetch(first + 1, 2, CPU)
    validation(loader)


def open_files(folder):
    """Return the open files of this process that are in a folder."""
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, by a thread or by listdir
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in paths if path.startswith(os.path.realpath(folder))]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are listed in /proc")
def test_a_loader_that_is_dropped_closes_its_files(dataset):
    folder = dataset()
    loaders = [Loader(folder, 8, BIG_VOCAB, 1) for _ in range(3)]
    for loader in loaders:
        loader.prefetch(0, 2, CPU)
    assert len(open_files(folder)) == 6  # train.bin and val.bin
    del loader, loaders
    gc.collect()
    deadline = time.monotonic() + 10
    while open_files(folder) and time.monotonic() < deadline:
        time.sleep(0.01)  # the last batches are still being read
    assert open_files(folder) == []


# Memory ---------------------------------------------------------------------------------------


def resident_bytes():
    """Return the resident memory of this process."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_memory_does_not_grow_with_the_tokens_that_were_read(dataset):
    folder = dataset()
    os.truncate(folder / "train.bin", 100 * 2**20)
    loader = Loader(folder, 1024, BIG_VOCAB, 1)
    for step in range(50):
        loader.train_batch(8 * step, 8)
    before = resident_bytes()
    for step in range(2000):
        loader.train_batch(8 * step, 8)
    assert resident_bytes() - before < 4 * 2**20
