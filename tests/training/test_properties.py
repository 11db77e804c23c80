"""What must hold for any options, batches, caches and texts, over examples by hypothesis.

    pytest -m slow tests/training/test_properties.py   40 times as many examples, three minutes

Examples follow from the test alone, so that every run tries the same ones.
"""

import contextlib
import dataclasses
import importlib
import json
import re
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import GPT2
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from variants import MODELS, close, feed, make_vivid, tokens

from common.dataloader import Loader
from common.errors import DamagedError, UserError
from common.files import parse_json, read_json, write_json
from common.text import find_chars, read_pieces, tokenize
from common.tokenizer import get_tokenizer
from configurator import configure

few_and_many = pytest.mark.parametrize(
    "scale", [1, pytest.param(40, marks=pytest.mark.slow)], ids=["few", "many"]
)


def examples(count):
    """Return hypothesis's settings for so many examples, which are the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Options --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    integer: int = 0
    number: float = 0.0
    flag: bool = False
    text: str = ""
    optional_integer: int | None = 0
    optional_number: float | None = 0.0


# No NUL and no surrogates: configurator.py refuses both.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    "integer": st.integers(),
    "number": NUMBERS,
    "flag": st.booleans(),
    "text": TEXTS,
    "optional_integer": st.none() | st.integers(),
    "optional_number": st.none() | NUMBERS,
}


def assignments():
    """Return a strategy for (name, value) of an option."""
    return st.sampled_from(list(VALUES)).flatmap(
        lambda name: st.tuples(st.just(name), VALUES[name])
    )


def options_of(argv):
    return configure(Options, argv, "A program.")


@few_and_many
def test_any_value_on_the_command_line_comes_back(scale):
    @examples(100 * scale)
    @given(assignments())
    def check(assignment):
        name, value = assignment
        assert options_of([f"--{name}={value}"]) == Options(**{name: value})

    check()


@few_and_many
def test_any_value_in_a_config_file_comes_back(scale, tmp_path):
    path = tmp_path / "config.py"

    @examples(100 * scale)
    @given(assignments())
    def check(assignment):
        name, value = assignment
        path.write_text(f"{name} = {value!r}\n", encoding="utf-8")
        assert options_of([str(path)]) == Options(**{name: value})

    check()


@few_and_many
def test_of_any_sequence_of_files_and_options_the_last_wins(scale, tmp_path):
    @examples(50 * scale)
    @given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b"]), st.integers(0, 9))))
    def check(given_options):
        @dataclasses.dataclass
        class Pair:
            a: int = -1
            b: int = -1

        argv = []
        for i, (is_file, name, value) in enumerate(given_options):
            if is_file:
                path = tmp_path / f"{i}.py"
                path.write_text(f"{name} = {value}\n")
                argv.append(str(path))
            else:
                argv.append(f"--{name}={value}")
        last = {name: value for _, name, value in given_options}
        assert configure(Pair, argv, "A program.") == Pair(**last)

    check()


@few_and_many
def test_any_unknown_name_is_refused(scale):
    @examples(30 * scale)
    @given(st.text().filter(lambda name: "=" not in name and name not in VALUES))
    def check(name):
        with pytest.raises(UserError):
            options_of([f"--{name}=1"])

    check()


# Batches --------------------------------------------------------------------------------------


def write_bins(folder, n_train, n_val):
    """Write bins in which the token at position p is p itself."""
    np.arange(n_train, dtype="<u2").tofile(folder / "train.bin")
    np.arange(n_val, dtype="<u2").tofile(folder / "val.bin")
    write_json(folder / "meta.json", {"tokenizer": "gpt2"})


BLOCK_SIZES = st.integers(1, 20)
SEEDS = st.integers(0, 2**31)


@few_and_many
def test_any_epoch_reads_each_of_its_adjoining_windows_once(scale, tmp_path):
    @examples(50 * scale)
    @given(st.integers(2, 300), BLOCK_SIZES, SEEDS, st.integers(0, 10**6))
    def check(n, T, seed, epoch):
        assume(n > T)
        write_bins(tmp_path, n, 2)
        loader = Loader(tmp_path, T, 65536, seed)
        windows = max(1, n // T - 1)
        x, y = loader.train_batch(epoch * windows, windows)
        starts = sorted(x[:, 0].tolist())
        assert starts == list(range(starts[0], starts[0] + windows * T, T))
        assert torch.equal(x, x[:, :1] + torch.arange(T))
        assert torch.equal(y, x + 1)
        assert y.max() < n

    check()


@few_and_many
def test_any_division_into_batches_and_ranks_reads_the_same_sequences(scale, tmp_path):
    @examples(50 * scale)
    @given(
        st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 200), BLOCK_SIZES
    )
    def check(world_size, batch_size, micro_steps, step, T):
        write_bins(tmp_path, 200, 2)
        sequences = world_size * batch_size * micro_steps
        whole, _ = Loader(tmp_path, T, 65536, 1).train_batch(step * sequences, sequences)
        parts = [None] * (world_size * micro_steps)
        for rank in range(world_size):
            loader = Loader(tmp_path, T, 65536, 1)
            for micro_step in range(micro_steps):
                place = micro_step * world_size + rank
                first = step * sequences + place * batch_size
                parts[place], _ = loader.train_batch(first, batch_size)
        assert torch.equal(torch.cat(parts), whole)

    check()


@few_and_many
def test_any_sequence_follows_from_its_number_alone(scale, tmp_path):
    write_bins(tmp_path, 200, 2)

    @examples(50 * scale)
    @given(st.lists(st.integers(0, 500), min_size=1, max_size=10), BLOCK_SIZES, SEEDS)
    def check(numbers, T, seed):
        loader = Loader(tmp_path, T, 65536, seed)
        for number in numbers:
            x, _ = loader.train_batch(number, 1)
        resumed, _ = Loader(tmp_path, T, 65536, seed).train_batch(numbers[-1], 1)
        assert torch.equal(x, resumed)

    check()


@few_and_many
def test_validation_covers_each_target_once_for_any_ranks_and_batches(scale, tmp_path):
    @examples(100 * scale)
    @given(st.integers(2, 200), BLOCK_SIZES, st.integers(1, 5), st.integers(1, 5))
    def check(n, T, world_size, batch_size):
        write_bins(tmp_path, T + 1, n)
        loader = Loader(tmp_path, T, 65536, 1)
        targets, counts = [], set()
        for rank in range(world_size):
            batches = list(loader.val_batches(n, batch_size, rank, world_size))
            counts.add(len(batches))
            for x, y in batches:
                assert torch.equal(x[y != -1] + 1, y[y != -1])
                targets += y[y != -1].tolist()
        assert sorted(targets) == list(range(1, n))
        assert len(counts) == 1

    check()


# Caches ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def blocks(module, max_dense_queries):
    """Let attention in windows use its blocks from few queries on, where a model has them."""
    if not hasattr(module, "MAX_DENSE_QUERIES"):
        yield
        return
    small = {"MIN_BLOCK": 2, "MAX_BLOCK": 4, "MAX_DENSE_QUERIES": max_dense_queries}
    with mock.patch.multiple(module, **small):
        yield


@few_and_many
@pytest.mark.parametrize("name", MODELS)
def test_any_chunks_through_a_cache_give_the_logits_of_a_full_forward(scale, name):
    module = importlib.import_module(name)
    T = 24

    @examples(20 * scale)
    @given(
        st.lists(st.integers(1, 12), min_size=1, max_size=T),
        st.integers(1, 3),
        st.integers(1, T + 2),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([0, 3, 320]),
    )
    def check(chunks, B, window, n_kv_head, max_dense_queries):
        ends = np.cumsum(chunks)
        ends = ends[ends <= T].tolist()
        model = make_vivid(module, block_size=T, window=window, n_kv_head=n_kv_head)
        x = tokens(B, T)
        with torch.no_grad():
            full = model(x)[:, torch.tensor(ends) - 1]
        with blocks(module, max_dense_queries):
            cached = feed(
                model, model.make_cache(B), *x[:, : ends[-1]].split(chunks[: len(ends)], 1)
            )
        close(cached, full)

    check()


# Text -----------------------------------------------------------------------------------------

# fmt: off
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "\x1c", "\x85", "\u00a0", "\u2028"]
FRAGMENTS = [
    *SPACES, "\u3000", "\u200b",
    "a", "word", "Don't", "'s", "'ll", "'", "é", "e\u0301", "ß", "日本", "👍🏽",
    "7", "1234", "...", "!?", "_", "<|endoftext|>", "<|", "\ufeff", "\x00",
]
# fmt: on


def joined(fragments):
    """Return a strategy for texts of up to 50 fragments; st.text() makes mostly short ones."""
    lists = st.integers(0, 40).flatmap(lambda n: st.lists(fragments, min_size=n, max_size=n + 10))
    return lists.map("".join)


PLAIN_TEXTS = joined(st.sampled_from(SPACES + FRAGMENTS) | st.characters(exclude_categories=["Cs"]))
TEXTS_WITH_SURROGATES = joined(st.sampled_from("a \ud83d\udc4d\ud800\udfff👍") | st.characters())


def ids_of(name, path):
    """Return the ids of a file, as common/text.py computes them, and <|endoftext|>'s."""
    meta = {"tokenizer": name}
    if name == "char":
        meta["chars"] = find_chars([path], "text")
    tokenizer = get_tokenizer(meta)
    batches = list(tokenize(tokenizer, read_pieces([path], "text", "")))
    return np.concatenate(batches).tolist() if batches else [], tokenizer.eot_token


def expected_ids(name, documents, eot):
    """Return the ids of the whole documents, with <|endoftext|> between them."""
    documents = [document for document in documents if document]
    chars = sorted(set("".join(documents)))
    ids = []
    for document in documents:
        if ids:
            ids.append(eot)
        if name == "gpt2":
            ids += get_tokenizer({"tokenizer": "gpt2"}).encode_ordinary(document)
        elif name == "byte":
            ids += document.encode()
        else:
            ids += [chars.index(char) for char in document]
    return ids


def small_pieces(piece_bytes, batch_chars):
    return mock.patch.multiple("common.text", PIECE_BYTES=piece_bytes, BATCH_CHARS=batch_chars)


@few_and_many
@pytest.mark.parametrize("name", [GPT2, "byte", "char"])
def test_any_text_cut_anywhere_gives_the_tokens_of_the_whole(scale, name, tmp_path):
    path = tmp_path / "text.txt"

    @examples(60 * scale)
    @given(st.booleans(), PLAIN_TEXTS, st.integers(1, 30), st.integers(1, 50))
    def check(has_mark, text, piece_bytes, batch_chars):
        text = "\ufeff" + text if has_mark else text  # a byte order mark
        path.write_bytes(text.encode())
        with small_pieces(piece_bytes, batch_chars):
            ids, eot = ids_of(name, str(path))
        assert ids == expected_ids(name, [text.removeprefix("\ufeff")], eot)

    check()


@few_and_many
@pytest.mark.parametrize("name", [GPT2, "byte", "char"])
def test_any_documents_of_jsonl_give_their_tokens(scale, name, tmp_path):
    path = tmp_path / "lines.jsonl"

    @examples(20 * scale)
    @given(st.lists(PLAIN_TEXTS | TEXTS_WITH_SURROGATES, max_size=5), st.integers(1, 50))
    def check(texts, batch_chars):
        lines = [json.dumps({"text": text}) for text in texts]
        path.write_text("\n".join(lines), encoding="ascii")
        with small_pieces(1, batch_chars):
            ids, eot = ids_of(name, str(path))
        # JSON joins pairs of surrogates; each one that is left is alone.
        with_lone_surrogates = [json.loads(line)["text"] for line in lines]
        documents = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in with_lone_surrogates]
        assert ids == expected_ids(name, documents, eot)

    check()


# JSON -----------------------------------------------------------------------------------------

KEYS = st.sampled_from(["step", "files", "size", "crc32", "tokenizer", "chars", "metrics", "meta"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda values: st.lists(values) | st.dictionaries(KEYS | TEXTS, values),
    max_leaves=20,
)
JSON_FRAGMENTS = [*'{}[],:"\\-0 \n', '"a"', "1e999", "NaN", "null", "true", "\\u", "\\ud800"]


@few_and_many
def test_any_object_written_as_json_is_read_back(scale, tmp_path):
    path = tmp_path / "value.json"

    @examples(25 * scale)
    @given(st.dictionaries(TEXTS, JSON_VALUES))
    def check(value):
        write_json(path, value)
        assert read_json(path) == value

    check()


@few_and_many
def test_any_text_is_parsed_as_json_or_is_damaged(scale):
    @examples(100 * scale)
    @given(st.text() | joined(st.sampled_from(JSON_FRAGMENTS)) | JSON_VALUES.map(json.dumps))
    def check(text):
        with contextlib.suppress(DamagedError):
            parse_json(text, "a file")

    check()
