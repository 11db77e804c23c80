"""Check that a file is a bin: uint16 token ids, not a known other format, nor wider ids."""

import os
import shlex

import numpy as np

from common.errors import UserError
from common.file_kinds import LIT_GPT, LLM_C, NUMPY, identify
from common.files import check_regular

# The expression that reads the ids of a file p of another kind
EXPRESSIONS = {
    NUMPY: "np.load(p, mmap_mode='r')",
    LLM_C: "np.memmap(p, '<u2', 'r', 1024)",
    LIT_GPT: "np.memmap(p, '<u2', 'r', 24)",
}
# Where check_bin looks at a bin
SAMPLE_PLACES = 16
SAMPLE_BYTES = 4096  # at each place, a multiple of 8
FEWEST_IDS = 32  # of a wider type; fewer can be uint16 ids by chance
FEWEST_DIFFERENT = 3  # ids among these; fewer can be a pattern, such as 0 1 0 1


def check_bin(path, vocab_size):
    """Return the largest token id in a sample of a bin.

    vocab_size   number of ids of its tokenizer

    Raises UserError if the file is of a known other kind, or if its token ids are of a wider type.
    """
    check_regular(path)
    kind = identify(path)
    if kind:
        advice = _conversion(path, EXPRESSIONS[kind]) if kind in EXPRESSIONS else ""
        raise UserError(
            f"{path} must hold uint16 token ids and nothing else, but is {kind}{advice}"
        )
    sample = _read_sample(path)
    for wide_type in ("<i8", ">i8", "<u4", ">u4"):
        ids = sample.view(wide_type)
        if not _are_token_ids(ids, vocab_size):
            continue
        problem = f"{path} must hold uint16 token ids, but has {ids.itemsize} bytes for each"
        if ids.max() < 1 << 16:
            raise UserError(problem + _conversion(path, f"np.memmap(p, '{wide_type}', 'r')"))
        raise UserError(
            f"{problem}, up to {ids.max()}, which do not fit in uint16: tokenize its text by "
            "prepare_data.py"
        )
    low, high = sample & 0xFF, sample >> 8
    # <|endoftext|> of the byte tokenizer has a high byte, 1.
    if len(sample) >= FEWEST_IDS and low.max() < 128 and 3 < high.max() < 128:
        raise UserError(
            f"{path} must hold uint16 token ids, but is text, has one byte for each id, or has its "
            "two bytes in reverse order"
        )
    return int(sample.max(initial=0))


def _are_token_ids(ids, vocab_size):
    """Return whether integers of 4 or 8 bytes are token ids, and not several uint16 ids each."""
    if len(ids) < FEWEST_IDS or ids.min() < 0:
        return False
    low, high = ids & 0xFFFF, ids >> 16
    if high.max() > 0:  # ids from 2**16 to 2**18, the largest vocabularies: low takes all values
        return high.max() <= 3 and low.max() >= 1 << 12
    # uint16 ids of "A C G T" by characters: id 0, the space, is every second one and never another.
    is_spaced_text = vocab_size < 256 and low.min() > 0
    return not is_spaced_text and len(np.unique(low)) >= FEWEST_DIFFERENT


def _read_sample(path):
    """Return the uint16 numbers at some places of a file, a multiple of 8 bytes."""
    size = os.path.getsize(path) // 8 * 8
    step = max(SAMPLE_BYTES, size // SAMPLE_PLACES // 8 * 8)
    parts = []
    with open(path, "rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            parts.append(file.read(min(SAMPLE_BYTES, size - start)))
    return np.frombuffer(b"".join(parts), dtype="<u2")


def _conversion(path, expression):
    """Return the end of an error: the command that converts a file, which `expression` reads."""
    return (
        '; this converts it: python -c "import numpy as np, os, sys; p = sys.argv[1]; '
        f"t = {expression}; assert t.max() < 2**16; t.astype('<u2').tofile(p + '.u2'); "
        f"os.rename(p, p + '.old'); os.rename(p + '.u2', p)\" {shlex.quote(str(path))}"
    )
