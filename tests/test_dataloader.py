"""Batches are a pure function of (seed, step), and validation is one fixed set of windows.

In most of these bins the token at position p is p itself, so that a batch tells where it was read.
"""

import itertools
import json
import os
import sys

import numpy as np
import pytest
import torch

from common.dataloader import Loader
from common.errors import UserError

BIG_VOCAB = 65536


@pytest.fixture
def dataset(tmp_path):
    """Make a dataset folder of two lists of token ids; `about` goes into its meta.json."""

    def make(train=range(64), val=range(64), about=None):
        for split, tokens in (("train", train), ("val", val)):
            np.array(list(tokens), dtype="<u2").tofile(tmp_path / f"{split}.bin")
        (tmp_path / "meta.json").write_text(
            json.dumps(about or {"tokenizer": "gpt2"}), encoding="utf-8"
        )
        return tmp_path

    return make


def starts(loader, first, count):
    """The positions where sequences begin."""
    return loader.train_batch(first, count)[0][:, 0].tolist()


# Training order -------------------------------------------------------------------------------


def test_a_batch_is_int64_inputs_and_targets_of_block_size(dataset):
    x, y = Loader(dataset(), block_size=5, vocab_size=BIG_VOCAB, seed=1).train_batch(0, 3)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((3, 5), (3, 5), torch.int64, torch.int64)


def test_inputs_are_consecutive_tokens_and_targets_the_ones_after(dataset):
    x, y = Loader(dataset(range(100)), 7, BIG_VOCAB, 1).train_batch(0, 20)
    assert torch.equal(x, x[:, :1] + torch.arange(7)) and torch.equal(y, x + 1)


def test_the_same_seed_gives_the_same_batch(dataset):
    folder = dataset(range(100))
    a, b = (Loader(folder, 7, BIG_VOCAB, seed=3).train_batch(0, 30) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_other_seeds_give_another_order(dataset):
    folder = dataset(range(1000))
    orders = [starts(Loader(folder, 7, BIG_VOCAB, seed), 0, 50) for seed in range(4)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("first", [1, 8, 9, 40])  # an epoch has 9
def test_a_fresh_loader_at_sequence_i_equals_one_that_read_from_0(dataset, first):
    folder = dataset(range(100))
    everything = starts(Loader(folder, 10, BIG_VOCAB, 1), 0, 100)
    assert starts(Loader(folder, 10, BIG_VOCAB, 1), first, 5) == everything[first : first + 5]


def test_going_back_gives_the_same_sequences_again(dataset):
    loader = Loader(dataset(range(100)), 10, BIG_VOCAB, 1)
    before = starts(loader, 3, 4)
    loader.train_batch(50, 4)
    assert starts(loader, 3, 4) == before


@pytest.mark.parametrize("micro_batch", [1, 4, 12])
def test_micro_batches_split_a_global_batch_into_the_same_sequences(dataset, micro_batch):
    folder = dataset(range(100))
    step = 12 * 3
    whole = starts(Loader(folder, 10, BIG_VOCAB, 1), step, 12)
    loader = Loader(folder, 10, BIG_VOCAB, 1)
    parts = [starts(loader, step + i, micro_batch) for i in range(0, 12, micro_batch)]
    assert list(itertools.chain(*parts)) == whole


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_loaders_of_all_ranks_together_take_the_same_global_batch(dataset, ranks):
    folder, share = dataset(range(100)), 12 // ranks
    loaders = [Loader(folder, 10, BIG_VOCAB, 1) for _ in range(ranks)]
    whole = Loader(folder, 10, BIG_VOCAB, 1)
    for step in range(4):
        parts = [
            starts(loader, 12 * step + share * rank, share) for rank, loader in enumerate(loaders)
        ]
        assert list(itertools.chain(*parts)) == starts(whole, 12 * step, 12)


# (tokens, block_size): one window, two, many; dividing and not; the shortest that is allowed.
SIZES = [(2, 1), (9, 8), (16, 8), (17, 8), (24, 8), (25, 8), (71, 8), (101, 1), (997, 13)]


@pytest.mark.parametrize(("n", "block_size"), SIZES)
def test_an_epoch_is_windows_edge_to_edge_but_for_less_than_two_windows(dataset, n, block_size):
    loader = Loader(dataset(range(n)), block_size, BIG_VOCAB, 1)
    for epoch in range(5):
        x, _ = loader.train_batch(epoch * loader.n_windows, loader.n_windows)
        read = x[x[:, 0].argsort()].flatten().tolist()
        assert read == list(range(read[0], read[0] + len(read)))
        assert n - len(read) < 2 * block_size


def test_over_the_epochs_every_token_is_read(dataset):
    loader = Loader(dataset(range(71)), 8, BIG_VOCAB, 1)
    assert torch.cat(loader.train_batch(0, 60 * loader.n_windows), dim=1).unique().tolist() == list(
        range(71)
    )


def test_epochs_differ_in_order(dataset):
    loader = Loader(dataset(range(1000)), 7, BIG_VOCAB, 1)
    orders = [starts(loader, epoch * loader.n_windows, loader.n_windows) for epoch in range(4)]
    orders = [[(s - min(order)) // 7 for s in order] for order in orders]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_epochs_differ_in_the_windows_edges(dataset):
    loader = Loader(dataset(range(1000)), 7, BIG_VOCAB, 1)
    assert len({starts(loader, epoch * loader.n_windows, 1)[0] % 7 for epoch in range(20)}) > 3


def test_the_order_within_an_epoch_is_shuffled(dataset):
    loader = Loader(dataset(range(1000)), 7, BIG_VOCAB, 1)
    order = starts(loader, 0, loader.n_windows)
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_ids_above_32767_are_read_as_they_are(dataset):
    x, _ = Loader(dataset([65535] * 20), 4, BIG_VOCAB, 1).train_batch(0, 1)
    assert x.tolist() == [[65535] * 4]


# Validation -----------------------------------------------------------------------------------


def validation(loader, eval_tokens=10**9, batch_size=3):
    """All validation batches as one pair of inputs and targets."""
    batches = list(loader.val_batches(eval_tokens, batch_size))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# lengths of val.bin: a multiple of block_size and one token more or less, shorter than block_size, and the shortest
LENGTHS = [2, 3, 8, 9, 10, 24, 25, 26, 100]


@pytest.mark.parametrize("n", LENGTHS)
def test_every_validation_token_but_the_first_is_a_target_once(dataset, n):
    x, y = validation(Loader(dataset(val=range(n)), 8, BIG_VOCAB, 1))
    assert sorted(y[y != -1].tolist()) == list(range(1, n))
    assert torch.equal(x[y != -1], y[y != -1] - 1)


@pytest.mark.parametrize("n", LENGTHS)
def test_all_validation_batches_have_one_shape_and_targets(dataset, n):
    loader = Loader(dataset(val=range(n)), 8, BIG_VOCAB, 1)
    assert all(
        x.shape == y.shape == (3, 8) and (y != -1).any() for x, y in loader.val_batches(10**9, 3)
    )
    assert all((y != -1).any() for _, y in loader.val_batches(10**9, 1))


@pytest.mark.parametrize(("n", "size"), [(100, 2), (100, 3), (9, 4), (2, 3)])
def test_ranks_share_the_validation_windows_out_in_equally_many_batches(dataset, n, size):
    loader = Loader(dataset(val=range(n)), 8, BIG_VOCAB, 1)
    shares = [list(loader.val_batches(10**9, 2, rank, size)) for rank in range(size)]
    targets = torch.cat([y for share in shares for _, y in share])
    assert (
        sorted(targets[targets != -1].tolist()) == list(range(1, n))
        and len({len(share) for share in shares}) == 1
    )


def test_validation_is_the_same_in_every_call_and_for_every_seed(dataset):
    folder = dataset(val=range(100))
    loader, other = (Loader(folder, 8, BIG_VOCAB, seed) for seed in (1, 2))
    before = validation(loader, 40)
    loader.train_batch(0, 10)
    for again in (loader, other):
        assert all(torch.equal(a, b) for a, b in zip(before, validation(again, 40), strict=True))


@pytest.mark.parametrize("eval_tokens", [40, 10**9])
def test_validation_windows_do_not_depend_on_batch_size(dataset, eval_tokens):
    loader = Loader(dataset(val=range(100)), 8, BIG_VOCAB, 1)
    targets = [validation(loader, eval_tokens, batch_size)[1] for batch_size in (1, 2, 5, 64)]
    windows = [y[(y != -1).any(dim=1)] for y in targets]
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
    places = (x[(y != -1).any(dim=1), 0] // 8).tolist()
    gaps = [b - a for a, b in itertools.pairwise([*places, 100])]
    assert places[0] == 0 and max(gaps) - min(gaps) <= 1


# Bad bins -------------------------------------------------------------------------------------


def complaint(folder, block_size=8, vocab_size=100, use=lambda loader: None):
    """The one line of the UserError that opening, or using, a dataset raises."""
    with pytest.raises(UserError) as error:
        use(Loader(folder, block_size, vocab_size, seed=1))
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bin_of_an_odd_number_of_bytes_is_refused_with_the_number(dataset, split):
    folder = dataset()
    os.truncate(folder / f"{split}.bin", 129)
    message = complaint(folder)
    assert f"{split}.bin" in message and "129 bytes" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bin_that_is_not_as_long_as_meta_json_says_is_refused_with_both_numbers(dataset, split):
    message = complaint(dataset(about={"tokenizer": "byte", split: {"tokens": 65}}))
    assert f"{split}.bin" in message and "64" in message and "65" in message


def test_training_tokens_too_few_for_a_window_are_refused_with_both_numbers(dataset):
    message = complaint(dataset(train=range(8)))
    assert "train.bin has 8 tokens" in message and "block_size=8 needs 9" in message


def test_training_tokens_that_just_make_a_window_are_accepted(dataset):
    x, y = Loader(dataset(train=range(9)), 8, 100, 1).train_batch(0, 1)
    assert (x[0].tolist(), y[0].tolist()) == (list(range(8)), list(range(1, 9)))


@pytest.mark.parametrize("n", [0, 1])
def test_validation_tokens_too_few_for_a_target_are_refused(dataset, n):
    assert f"val.bin has {n} tokens" in complaint(dataset(val=range(n)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_is_found_from_meta_json_with_both_numbers(dataset, split):
    message = complaint(dataset(about={"tokenizer": "byte", split: {"largest_id": 100}}))
    assert f"{split}.bin" in message and "100" in message and "101" in message


def test_a_bin_at_the_limits_of_meta_json_is_accepted(dataset):
    about = {"tokens": 64, "largest_id": 99}
    assert (
        Loader(
            dataset(about={"tokenizer": "byte", "train": about, "val": about}), 8, 100, 1
        ).n_train
        == 64
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_is_found_in_a_batch_with_both_numbers(dataset, split):
    use = {"train": lambda loader: loader.train_batch(0, 100), "val": validation}
    message = complaint(dataset(**{split: [*range(40), 100]}), use=use[split])
    assert (
        f"{split}.bin" in message
        and "token id 100" in message
        and "vocab_size=100" in message
        and "101" in message
    )


def test_an_id_that_is_the_last_of_the_vocabulary_is_accepted(dataset):
    x, _ = Loader(dataset(train=[99] * 64), 8, 100, 1).train_batch(0, 1)
    assert x.max() == 99


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_bin_is_refused_and_the_command_that_makes_it_named(dataset, split):
    folder = dataset()
    (folder / f"{split}.bin").unlink()
    message = complaint(folder)
    assert f"{split}.bin" in message and "prepare_data.py" in message


def test_a_missing_meta_json_is_refused_with_the_line_that_is_enough(dataset):
    folder = dataset()
    (folder / "meta.json").unlink()
    message = complaint(folder)
    assert "meta.json" in message and '{"tokenizer": "gpt2"}' in message


def test_foreign_bins_need_no_more_than_the_tokenizer_s_name(dataset):
    loader = Loader(dataset(range(64), range(20), about={"tokenizer": "gpt2"}), 8, 50257, 1)
    assert (loader.n_train, loader.n_val, loader.meta["vocab_size"]) == (64, 20, 50257)


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_memory_does_not_grow_with_what_was_read(dataset):
    folder = dataset()
    os.truncate(folder / "train.bin", 100 * 2**20)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    loader = Loader(folder, 1024, BIG_VOCAB, 1)
    for i in range(50):
        loader.train_batch(8 * i, 8)
    before = resident()
    for i in range(2000):
        loader.train_batch(8 * i, 8)
    assert resident() - before < 4 * 2**20
