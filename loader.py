"""Bins to batches: a pure function of (seed, step), the same global batches whatever the number of processes.

Training goes through windows of block_size tokens, shuffled without replacement, epoch after epoch; each epoch shifts
the windows' edges. Sequence i of the endless order is found by i alone, so resuming needs only the step number.
Validation is a fixed set of non-overlapping windows. Files are read window by window: memory does not grow.
"""

from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from prepare_data import SMALL, PrepareConfig, prepare
from tokenizer import read_meta


def open_dataset(name, prepare_missing=True):
    """The folder of a dataset and its meta.json; a small one that is missing is made on the spot, if that is wanted."""
    folder = Path("data", name)
    if not (folder / "meta.json").exists() and not (folder / "train.bin").exists():
        if name == "fineweb":
            raise UserError(
                f"no {folder}: python prepare_data.py fineweb downloads 1 of its 10 billion tokens, 2 GB "
                "(python train.py config/quickstart.py needs no download)"
            )
        if name not in SMALL:
            raise UserError(f"no {folder}: python prepare_data.py {name} --input='FILES' makes it of your text")
        if not prepare_missing:
            raise UserError(f"no {folder}: python prepare_data.py {name} makes it, once for all processes")
        print(f"preparing {folder}", flush=True)
        prepare(PrepareConfig(name=name))
    return folder, read_meta(folder)


class Loader:
    """Batches of the dataset in a folder, as int64 tensors on the CPU.

    UserError where a bin is missing, damaged, too short for block_size, or has ids that vocab_size does not allow.
    """

    def __init__(self, folder, block_size, vocab_size, seed):
        self.folder, self.block_size, self.vocab_size, self.seed = Path(folder), block_size, vocab_size, seed
        self.meta = read_meta(folder)
        self.n_train, self.n_val = self._count("train", block_size + 1), self._count("val", 2)
        # One window less than would fit leaves room to shift them all, where there are two at least.
        self.n_windows = max(1, self.n_train // block_size - 1)
        self.epoch = None

    def _count(self, split, at_least):
        """Tokens of a bin, after checking all that its size and meta.json tell."""
        path, about = self.folder / f"{split}.bin", self.meta.get(split, {})
        if not path.is_file():
            raise UserError(f"no {path}: prepare_data.py makes it")
        size = path.stat().st_size
        if size % 2:
            raise UserError(f"{path} has {size} bytes, an odd number: not uint16 tokens, or cut off")
        if about.get("tokens", size // 2) != size // 2:
            raise UserError(f"{path} has {size // 2} tokens, its meta.json says {about['tokens']}: prepare it again")
        if size // 2 < at_least:
            raise UserError(f"{path} has {size // 2} tokens, too short: block_size={self.block_size} needs {at_least}")
        largest_id = about["largest_id"] if "largest_id" in about else self._largest_id(path)
        if largest_id >= self.vocab_size:
            self._refuse(path, largest_id)
        return size // 2

    def _largest_id(self, path):
        largest_id = 0
        with open(path, "rb") as file:
            while (ids := np.fromfile(file, "<u2", 1 << 20)).size:
                largest_id = max(largest_id, int(ids.max()))
        return largest_id

    def _refuse(self, path, id):
        raise UserError(f"{path} holds the token id {id}: vocab_size={self.vocab_size} must be at least {id + 1}")

    def _read(self, split, start, count):
        path = self.folder / f"{split}.bin"
        tokens = np.fromfile(path, dtype="<u2", count=count, offset=2 * start).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            self._refuse(path, tokens.max())
        return torch.from_numpy(tokens)

    def train_batch(self, first, count):
        """Sequences first .. first + count - 1 of the endless order: inputs and targets, (count, T) each."""
        T = self.block_size
        windows = [self._read("train", self._start(i), T + 1) for i in range(first, first + count)]
        windows = torch.stack(windows)  # (count, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _start(self, i):
        """The position in train.bin where sequence i begins."""
        epoch, place = divmod(i, self.n_windows)
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.shift = random.integers(self.n_train - self.n_windows * self.block_size)
            self.order = random.permutation(self.n_windows)
            self.epoch = epoch
        return int(self.order[place]) * self.block_size + int(self.shift)

    def val_batches(self, eval_tokens, batch_size, rank=0, size=1):
        """Yield inputs and targets (batch_size, T) of windows spread evenly over val.bin, eval_tokens rounded up: those
        of a rank, of which all `size` have equally many batches.

        Where eval_tokens reaches the whole split, every token but the first is a target exactly once. What fills the
        last window and the last batches has the target -1.
        """
        T = self.block_size
        there = -(-(self.n_val - 1) // T)  # windows, the last perhaps not full
        count = min(there, -(-eval_tokens // T))
        for first in range(rank * batch_size, rank * batch_size + count, batch_size * size):
            x = torch.zeros(batch_size, T, dtype=torch.int64)
            y = torch.full((batch_size, T), -1)
            for row, window in enumerate(range(first, min(first + batch_size, count))):
                start = window * there // count * T
                tokens = self._read("val", start, T + 1)
                x[row, : len(tokens) - 1] = tokens[:-1]
                y[row, : len(tokens) - 1] = tokens[1:]
            yield x, y
