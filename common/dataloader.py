"""Token bins -> batches, as a pure function of (seed, step).

Training goes through windows of block_size tokens, shuffled without replacement, epoch after epoch;
each epoch shifts the edges of the windows. Sequence i of this endless order follows from i alone,
so resuming needs only the step number, and the global batch of a step is the same for any world
size. Validation is a fixed set of non-overlapping windows. Files are read window by window, so
memory does not grow with them.
"""

from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.tokenizer import read_meta

CHUNK = 1 << 20  # tokens read at a time when a whole bin is scanned


class Loader:
    """Batches of a dataset, as int64 tensors on the CPU.

    Raises UserError if a bin is missing, damaged, too short for block_size, or holds token ids that
    vocab_size does not allow.
    """

    def __init__(self, folder, block_size, vocab_size, seed):
        self.folder = Path(folder)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.seed = seed
        self.meta = read_meta(folder)
        self.n_train = self._check_bin("train", min_tokens=block_size + 1)
        self.n_val = self._check_bin("val", min_tokens=2)
        # One window less than fits leaves room for the shift, if there are at least two.
        self.n_windows = max(1, self.n_train // block_size - 1)
        self.epoch = None  # the epoch of self.order and self.shift

    def _check_bin(self, split, min_tokens):
        """Return the number of tokens of a bin, after checking it against meta.json."""
        path = self.folder / f"{split}.bin"
        expected = self.meta.get(split, {})
        if not path.is_file():
            raise UserError(f"no {path}: prepare_data.py makes it")
        size = path.stat().st_size
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
        largest_id = expected["largest_id"] if "largest_id" in expected else find_largest_id(path)
        if largest_id >= self.vocab_size:
            self._refuse_id(path, largest_id)
        return tokens

    def _refuse_id(self, path, token_id):
        raise UserError(
            f"{path} holds the token id {token_id}: vocab_size={self.vocab_size} must be at least "
            f"{token_id + 1}"
        )

    def _read(self, split, start, count):
        path = self.folder / f"{split}.bin"
        tokens = np.fromfile(path, dtype="<u2", count=count, offset=2 * start).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            self._refuse_id(path, tokens.max())
        return torch.from_numpy(tokens)

    def train_batch(self, first, count):
        """Return sequences first .. first + count - 1 as inputs and targets, (count, T) each."""
        T = self.block_size
        windows = [self._read("train", self._start(i), T + 1) for i in range(first, first + count)]
        windows = torch.stack(windows)  # (count, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _start(self, i):
        """Return the position in train.bin where sequence i begins."""
        epoch, index = divmod(i, self.n_windows)
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.shift = random.integers(self.n_train - self.n_windows * self.block_size)
            self.order = random.permutation(self.n_windows)
            self.epoch = epoch
        return int(self.order[index]) * self.block_size + int(self.shift)

    def val_batches(self, eval_tokens, batch_size, rank=0, world_size=1):
        """Yield the validation batches of a rank: inputs and targets, (batch_size, T) each.

        The windows are spread evenly over val.bin, eval_tokens rounded up to whole windows. If
        eval_tokens covers the whole split, every token but the first is a target exactly once. All
        ranks get the same number of batches. Padding, in the last window and in the last batches,
        has the target -1.
        """
        T = self.block_size
        available = -(-(self.n_val - 1) // T)  # windows in val.bin, the last one perhaps not full
        count = min(available, -(-eval_tokens // T))
        for first in range(rank * batch_size, rank * batch_size + count, batch_size * world_size):
            x = torch.zeros(batch_size, T, dtype=torch.int64)
            y = torch.full((batch_size, T), -1)
            for row, window in enumerate(range(first, min(first + batch_size, count))):
                start = window * available // count * T
                tokens = self._read("val", start, T + 1)
                x[row, : len(tokens) - 1] = tokens[:-1]
                y[row, : len(tokens) - 1] = tokens[1:]
            yield x, y


def find_largest_id(path):
    """Return the largest token id in a bin."""
    largest_id = 0
    with open(path, "rb") as file:
        while (ids := np.fromfile(file, "<u2", CHUNK)).size:
            largest_id = max(largest_id, int(ids.max()))
    return largest_id
