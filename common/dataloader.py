"""Token bins -> batches, as a pure function of (seed, step).

Training goes through windows of block_size tokens, shuffled without replacement, epoch after epoch;
each epoch shifts the edges of the windows. Sequence i of this endless order follows from i alone,
so resuming needs only the step number, and the global batch of a step is the same for any world
size. Validation is a fixed set of non-overlapping windows. Each file is opened once and read window
by window, so memory does not grow with it.
"""

import concurrent.futures
import functools
import math
from pathlib import Path

import numpy as np
import torch

from common.bins import check_bin
from common.errors import UserError
from common.files import name_in_errors
from common.tokenizer import MAX_VOCAB_SIZE, cached_token_bytes, read_meta


class Loader:
    """Batches of a dataset, as int64 tensors on the CPU.

    Raises UserError if a bin is missing, damaged, too short for block_size, or holds token ids that
    vocab_size does not allow. Use a Loader in one thread only; its own thread serves prefetch().
    """

    def __init__(self, folder, block_size, vocab_size, seed):
        self.folder = Path(folder)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.seed = seed
        self.meta = read_meta(folder)
        self.n_train = self._check_bin("train", min_tokens=block_size + 1)
        self.n_val = self._check_bin("val", min_tokens=2)
        # Keep one window's worth of tokens for the shift, if there are at least two windows.
        self.n_windows = max(1, self.n_train // block_size - 1)
        self.epoch = None  # the epoch of self.order and self.shift
        self._files = {}
        for split in ("train", "val"):
            self._files[split] = open(self.folder / f"{split}.bin", "rb", buffering=0)
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)  # for prefetch()
        self._prefetched = None  # (first, count, Future of the batch)

    def _check_bin(self, split, min_tokens):
        """Return the number of tokens of a bin, after checking it against meta.json."""
        path = self.folder / f"{split}.bin"
        expected = self.meta.get(split, {})
        if not path.is_file():
            raise UserError(f"no {path}: prepare_data.py makes it")
        size = path.stat().st_size
        # A bin that prepare_data.py described needs no look at its content.
        is_described = {"tokens", "largest_id", "sha256"} <= expected.keys()
        if is_described and size == 2 * expected["tokens"]:
            largest_id = expected["largest_id"]
        else:
            largest_id = max(
                check_bin(path, self.meta["vocab_size"]), expected.get("largest_id", 0)
            )
        if size % 2:
            raise UserError(
                f"{path} has {size} bytes, an odd number: not uint16 tokens, or cut off"
            )
        tokens = size // 2
        if expected.get("tokens", tokens) != tokens:
            raise UserError(
                f"{path} has {tokens} tokens, its meta.json says {expected['tokens']}: prepare "
                "the dataset again"
            )
        if tokens < min_tokens:
            raise UserError(
                f"{path} has {tokens} tokens: block_size={self.block_size} needs {min_tokens}"
            )
        if largest_id >= self.vocab_size:
            self._refuse_id(path, largest_id)
        return tokens

    def _refuse_id(self, path, token_id):
        raise UserError(
            f"{path} holds the token id {token_id}: vocab_size={self.vocab_size} must be at least "
            f"{token_id + 1}, if the file holds uint16 token ids"
        )

    def _read(self, split, starts, length):
        """Return the windows that begin at the positions `starts`, (len(starts), length) uint16."""
        path = self.folder / f"{split}.bin"
        file = self._files[split]
        windows = np.empty((len(starts), length), dtype="<u2")
        with name_in_errors(path):
            for start, window in zip(starts, windows, strict=True):
                file.seek(2 * start)
                if file.readinto(window) < window.nbytes:
                    raise UserError(
                        f"{path} is shorter than when it was opened: prepare the dataset again"
                    )
        largest_id = int(windows.max())
        if largest_id >= self.vocab_size:
            self._refuse_id(path, largest_id)
        return windows

    def train_batch(self, first, count):
        """Return sequences first .. first + count - 1 as inputs and targets, (count, T) each."""
        if self._prefetched is None:
            return self._read_batch(first, count)
        *prefetched, future = self._prefetched
        self._prefetched = None
        if prefetched == [first, count]:
            return future.result()
        concurrent.futures.wait([future])  # the thread uses the same file and self.order
        return self._read_batch(first, count)

    def prefetch(self, first, count, device):
        """Let a thread read a batch that train_batch() will be asked for, pinned for a GPU.

        train_batch() raises the thread's error, if the batch is asked for.
        """
        future = self._thread.submit(self._read_pinned, first, count, device)
        self._prefetched = (first, count, future)

    def _read_pinned(self, first, count, device):
        x, y = self._read_batch(first, count)
        if device.type != "cuda":
            return x, y
        torch.cuda.set_device(device)  # a thread begins with GPU 0, and would use memory there
        return x.pin_memory(), y.pin_memory()

    def _read_batch(self, first, count):
        starts = [self._start(i) for i in range(first, first + count)]
        windows = self._read("train", starts, self.block_size + 1)
        return _int64(windows[:, :-1]), _int64(windows[:, 1:])

    def _start(self, i):
        """Return the position in train.bin where sequence i begins."""
        epoch, index = divmod(i, self.n_windows)
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.shift = random.integers(self.n_train - self.n_windows * self.block_size)
            self.order = random.permutation(self.n_windows)
            self.epoch = epoch
        return int(self.order[index]) * self.block_size + int(self.shift)

    def val_batches(self, eval_tokens, batch_size, rank=0, world_size=1, split="val"):
        """Yield the evaluation batches of a rank: inputs and targets, (batch_size, T) each.

        The windows are spread evenly over val.bin, eval_tokens rounded up to whole windows. If
        eval_tokens covers the whole split, every token but the first is a target exactly once. All
        ranks get the same number of batches. Padding, in the last window and in the last batches,
        has the target -1. With split="train" the windows are those of train.bin.
        """
        if self._prefetched is not None:  # the thread uses the same file
            concurrent.futures.wait([self._prefetched[-1]])
        T = self.block_size
        n_tokens = self.n_train if split == "train" else self.n_val
        available = -(-(n_tokens - 1) // T)  # windows in the bin, the last one perhaps not full
        count = min(available, -(-eval_tokens // T))
        for first in range(rank * batch_size, rank * batch_size + count, batch_size * world_size):
            x = torch.zeros(batch_size, T, dtype=torch.int64)
            y = torch.full((batch_size, T), -1)
            for row, i in enumerate(range(first, min(first + batch_size, count))):
                start = i * available // count * T
                n = min(T, n_tokens - 1 - start)  # targets: fewer than T in the last window
                [window] = self._read(split, [start], n + 1)
                x[row, :n] = _int64(window[:-1])
                y[row, :n] = _int64(window[1:])
            yield x, y

    @functools.cached_property
    def token_bytes(self):
        """The length of each token in bytes, (MAX_VOCAB_SIZE + 1,) float64; NaN if it is not known.

        Ids without a token have 0, and so has the last entry, which a target of -1 picks.
        """
        table = np.zeros(MAX_VOCAB_SIZE + 1)
        lengths = cached_token_bytes(self.meta)
        if lengths is None:
            return table + math.nan
        table[: len(lengths)] = lengths
        return table


def _int64(tokens):
    """Return a NumPy array of token ids as a contiguous int64 tensor."""
    return torch.from_numpy(tokens.astype(np.int64))
