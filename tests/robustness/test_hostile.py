"""Files that someone made to do harm: pickles, paths out of the folder, lies about sizes.

`pytest -m slow -s tests/robustness/test_hostile.py` runs all cases; by default a few of each kind
run. A program may succeed or refuse the file in one line. It must not load a pickle, write outside
of its folder, take long, or need much memory.
"""

import io
import json
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import GIGABYTE, run_forked
from readers import PROGRAMS, SHARD, STEP, copy_template, make_templates

import prepare_data

RUN_READERS = ["resume", "eval_only", "sample", "export", "load_model"]
GPT_READERS = ["sample gpt", "export gpt", "fine-tune gpt"]


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    return make_templates(tmp_path_factory.mktemp("templates"))


def problem_of(program, folder, *names):
    """Run a program on hostile files; return what is wrong with what it did, or None."""
    main, argv, _ = PROGRAMS[program]
    outcome = run_forked(main, argv, folder)
    if outcome.memory > GIGABYTE:
        return f"{outcome.memory / GIGABYTE:.1f} GB of memory"
    if outcome.status != 0:
        return outcome.problem(*names)
    is_clean = all(not line.startswith(("Traceback", "  ")) for line in outcome.err.splitlines())
    return None if is_clean else outcome.err


def sample_of(cases, seed, count):
    return random.Random(seed).sample(cases, count)


# Pickles --------------------------------------------------------------------------------------


class Bomb:
    """An object whose pickle, when it is loaded, creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def plain_pickle(bomb):
    return pickle.dumps(bomb)


def torch_file(bomb):
    file = io.BytesIO()
    torch.save({"model": bomb}, file)
    return file.getvalue()


def numpy_file(bomb):
    file = io.BytesIO()
    np.save(file, np.array([bomb], dtype=object))
    return file.getvalue()


BOMBS = {"pickle": plain_pickle, "torch": torch_file, "numpy": numpy_file}
# (template, the file that a bomb replaces or that it is added as, the programs that may read it)
BOMB_PLACES = [
    *(
        ("run", f"{STEP}/{name}", RUN_READERS)
        for name in ("config.json", SHARD, ".metadata", "__0_0.distcp", "model.pt", "optimizer.pt")
    ),
    *(
        ("run", f"out/tiny/{name}", [*RUN_READERS, "plot_loss"])
        for name in (
            "log.jsonl",
            "config.json",
            "best.json",
            "ckpt.pt",
            ".metadata",
            "__0_0.distcp",
            ".lock",
            "log.part",
        )
    ),
    *(
        ("run", f"data/tiny/{name}", ["resume", "eval_only", "verify"])
        for name in ("meta.json", "meta.pkl", "train.bin", "val.bin", ".lock")
    ),
    *(
        ("foreign", f"gpt/{name}", GPT_READERS)
        for name in (
            "config.json",
            "model.safetensors",
            "meta.json",
            "pytorch_model.bin",
            "model.pt",
            "model-00001-of-00001.safetensors",
        )
    ),
    ("run", "tiny.py", ["config"]),
]
BOMB_CASES = [
    (template, path, program, kind)
    for template, path, programs in BOMB_PLACES
    for program in programs
    for kind in BOMBS
]


def bomb_problems(cases, templates, tmp_path):
    """Return a line for each bomb that exploded or that a program did not take well."""
    problems = []
    for number, (template, path, program, kind) in enumerate(cases):
        parent = tmp_path / str(number)
        folder = copy_template(templates, template, parent)
        marker = parent / "exploded"
        (folder / path).write_bytes(BOMBS[kind](Bomb(str(marker))))
        problem = "it exploded" if marker.exists() else None
        problem = problem or problem_of(program, folder, "")
        if problem or marker.exists():
            problems.append(f"{kind} in {path}, {program}: {problem or 'it exploded'}")
    print(*problems, sep="\n")  # pytest shortens a long list
    return problems


@pytest.mark.parametrize("kind", BOMBS)
def test_the_bombs_of_these_tests_do_explode_when_they_are_loaded(tmp_path, kind):
    marker = tmp_path / "exploded"
    content = io.BytesIO(BOMBS[kind](Bomb(str(marker))))
    loaders = {
        "pickle": pickle.load,
        "torch": lambda file: torch.load(file, weights_only=False),
        "numpy": lambda file: np.load(file, allow_pickle=True),
    }
    loaders[kind](content)
    assert marker.exists()


def test_a_few_pickles_in_the_place_of_files_are_not_loaded(templates, tmp_path):
    assert not bomb_problems(sample_of(BOMB_CASES, "bombs", 4), templates, tmp_path)


@pytest.mark.slow
def test_no_pickle_in_the_place_of_any_file_is_loaded(templates, tmp_path):
    print(f"\n{len(BOMB_CASES)} pickles")
    assert not bomb_problems(BOMB_CASES, templates, tmp_path)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.txt.gz"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_in_the_place_of_a_text_is_refused_by_name(tmp_path, name, kind):
    marker = tmp_path / "exploded"
    (tmp_path / name).write_bytes(BOMBS[kind](Bomb(str(marker))))
    argv = ["mine", f"--input={name}", "--tokenizer=byte"]
    outcome = run_forked(prepare_data.main, argv, tmp_path)
    assert outcome.problem(name) is None
    assert not marker.exists()


# Records of checkpoints with valid checksums --------------------------------------------------


def seal(path, record):
    """Write a checkpoint's config.json with the checksum that makes it valid."""
    record.pop("crc32", None)
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    crc32 = f"{zlib.crc32(text.encode()):08x}"
    (path / "config.json").write_text(json.dumps(record | {"crc32": crc32}))


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


ANY_VALUES = {
    "null": None,
    "an int": 7,
    "a negative int": -1,
    "a large int": 2**62,
    "a larger int": 10**30,
    "a float": 2.5,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "a bool": True,
    "a string": "x",
    "an empty string": "",
    "a path": "../../evil",
    "half a surrogate pair": "\ud800",
    "a list": [],
    "an object": {},
    "99 lists": nested(99),
    "900 lists": nested(900),
}
SIZES = [10**9, 10**8, 10**5, 10**4, 0, -1, 2.0, "2", None, [2], True, 10**30]


def places(value, path=()):
    """Yield the path of each value inside of a JSON value."""
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def set_value(record, path, value):
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


def char_meta(chars):
    return {"tokenizer": "char", "chars": chars}


HOSTILE_META = {
    "no chars": {"tokenizer": "char"},
    "chars that are numbers": char_meta([1, 2]),
    "chars that are empty": char_meta([""]),
    "a string of chars": char_meta("abc"),
    "half a surrogate pair": char_meta(["\ud800", "a"]),
    "the same char twice": char_meta(["a"] * 300),
    "long chars": char_meta(["abc"]),
    "only the end of text": char_meta(["<|endoftext|>"]),
    "70,000 chars": char_meta([chr(0x10000 + i) for i in range(70_000)]),
    "a tokenizer that is a path": {"tokenizer": "../evil"},
    "a vocabulary of 2**62": {"tokenizer": "byte", "vocab_size": 2**62},
    "a vocabulary of 10**9": {"tokenizer": "byte", "vocab_size": 10**9},
    "a vocabulary of 1": {"tokenizer": "byte", "vocab_size": 1},
    "no bytes": {"tokenizer": "byte", "val": {"tokens": 581, "bytes": 0}},
    "more bytes than a float holds": {
        "tokenizer": "byte",
        "val": {"tokens": 581, "bytes": 10**400},
    },
    "no text": {"tokenizer": "gpt2"},
}
SHARD_FACTS = {"size": 1, "crc32": "00000000"}
HOSTILE_NAMES = ["../../x", "/etc/passwd", "", ".", "..", "a/b", "\0", "\ud800", "config.json", "-"]


def record_cases(record):
    """Return [(description, path in the record, value)] of hostile records."""
    cases = [
        (f"{kind} at {path}", path, value)
        for path in places(record)
        for kind, value in ANY_VALUES.items()
    ]
    for name in record["model_config"]:
        cases += [(f"{name}={value!r}", ("model_config", name), value) for value in SIZES]
    for name in ("../evil", "os", "model.py", "", "model_rope", "model_rope_gqa_swa", "/etc/x"):
        cases.append((f"model={name}", ("options", "model"), name))
    cases += [(kind, ("meta",), meta) for kind, meta in HOSTILE_META.items()]
    cases += [(f"a file {name!r}", ("files", name), SHARD_FACTS) for name in HOSTILE_NAMES]
    cases.append(("a million tokens", ("data", "tokens"), [1] * 10**6))
    cases.append(("another model option", ("model_config", "evil"), 1))
    cases.append(("no model options", ("model_config",), {}))
    return cases


def record_problems(cases, record, templates, tmp_path):
    problems = []
    for number, (description, path, value) in enumerate(cases):
        folder = copy_template(templates, "run", tmp_path / str(number))
        changed = json.loads(json.dumps(record))
        set_value(changed, path, value)
        seal(folder / STEP, changed)
        program = RUN_READERS[number % len(RUN_READERS)]
        problem = problem_of(program, folder, "config.json", Path(STEP).name, "out/tiny")
        if problem:
            problems.append(f"{description}, {program}: {problem}")
    print(*problems, sep="\n")  # pytest shortens a long list
    return problems


@pytest.fixture
def record(templates):
    return json.loads((templates / "run" / STEP / "config.json").read_text())


def test_a_few_hostile_records_with_valid_checksums_do_no_harm(record, templates, tmp_path):
    chosen = sample_of(record_cases(record), "records", 6)
    assert not record_problems(chosen, record, templates, tmp_path)


@pytest.mark.slow
def test_no_hostile_record_with_a_valid_checksum_does_harm(record, templates, tmp_path):
    cases = record_cases(record)
    print(f"\n{len(cases)} records")
    assert not record_problems(cases, record, templates, tmp_path)


@pytest.mark.parametrize("kind", HOSTILE_META)
def test_a_hostile_meta_json_does_no_harm(templates, tmp_path, kind):
    folder = copy_template(templates, "run", tmp_path)
    (folder / "data/tiny/meta.json").write_text(json.dumps(HOSTILE_META[kind]))
    assert problem_of("eval_only", folder, "meta.json", "train.bin", "out/tiny") is None
    folder = copy_template(templates, "foreign", tmp_path)
    (folder / "gpt/meta.json").write_text(json.dumps(HOSTILE_META[kind]))
    names = ("meta.json", "char tokenizer")  # which may lack the characters of the prompt
    assert problem_of("sample gpt", folder, *names) is None


# Safetensors ----------------------------------------------------------------------------------


def safetensors(header, data=b"", length=None):
    """Return a safetensors file; `length` is what it claims as the length of its header."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WTE = "wte.weight"
DATA = bytes(4096)
HOSTILE_SAFETENSORS = {
    "a header of 2**62 bytes": safetensors({}, length=2**62),
    "a header of 2**40 bytes": safetensors({}, length=2**40),
    "a header of 2**63 + 5 bytes": safetensors({}, length=2**63 + 5),
    "a header of no bytes": safetensors({}, length=0),
    "a header that is not JSON": safetensors(b"\x80\x04.", DATA),
    "a header that is a list": safetensors([], DATA),
    "a header that is deeply nested": safetensors(b"[" * 100_000, DATA),
    "a tensor that is a number": safetensors({WTE: 7}, DATA),
    "a tensor without fields": safetensors({WTE: {}}, DATA),
    "offsets outside of the file": safetensors({WTE: tensor([1024], 4096, 8192)}, DATA),
    "offsets of 2**62": safetensors({WTE: tensor([2**60], 0, 2**62)}, DATA),
    "negative offsets": safetensors({WTE: tensor([1024], -4096, 0)}, DATA),
    "offsets backwards": safetensors({WTE: tensor([1024], 4096, 0)}, DATA),
    "overlapping tensors": safetensors(
        {WTE: tensor([1024], 0, 4096), "wpe.weight": tensor([1024], 0, 4096)}, DATA
    ),
    "a shape that does not fit": safetensors({WTE: tensor([7, 7], 0, 4096)}, DATA),
    "a shape of 2**80 elements": safetensors({WTE: tensor([2**40, 2**40], 0, 4096)}, DATA),
    "a negative shape": safetensors({WTE: tensor([-32, -32], 0, 4096)}, DATA),
    "a shape of strings": safetensors({WTE: tensor(["32", "32"], 0, 4096)}, DATA),
    "an unknown dtype": safetensors({WTE: tensor([1024], 0, 4096, "PICKLE")}, DATA),
    "a name that is a path": safetensors({"../../evil": tensor([32, 32], 0, 4096)}, DATA),
    "a name that is absolute": safetensors({"/tmp/evil": tensor([32, 32], 0, 4096)}, DATA),
    "a scalar": safetensors({WTE: tensor([], 0, 4), "wpe.weight": tensor([], 4, 8)}, bytes(8)),
    "no elements": safetensors({WTE: tensor([0, 16], 0, 0), "wpe.weight": tensor([0, 16], 0, 0)}),
    "a layer of 10**9": safetensors(
        {
            WTE: tensor([32, 16], 0, 2048),
            "wpe.weight": tensor([32, 16], 2048, 4096),
            "h.1000000000.ln_1.weight": tensor([16], 4096, 4160),
        },
        bytes(4160),
    ),
    "metadata that is a number": safetensors({"__metadata__": 7}, DATA),
}


@pytest.mark.parametrize("kind", HOSTILE_SAFETENSORS)
def test_a_hostile_safetensors_file_of_a_foreign_model_is_refused(templates, tmp_path, kind):
    folder = copy_template(templates, "foreign", tmp_path)
    (folder / "gpt/model.safetensors").write_bytes(HOSTILE_SAFETENSORS[kind])
    main, argv, _ = PROGRAMS["sample gpt"]
    outcome = run_forked(main, argv, folder)
    assert outcome.problem("gpt/model.safetensors", "gpt has", "gpt: ") is None
    assert outcome.memory < GIGABYTE


def sharding_changes(header):
    """Return {kind: header} with lies in the fields that torch's reader of shards uses."""
    cases = {}
    name = next(key for key in header if key != "__metadata__")
    metadata = header["__metadata__"]
    for kind, value in {
        "no sharding information": {},
        "sharding information that is not JSON": dict.fromkeys(metadata, "\x80"),
        "sharding information that is a list": dict.fromkeys(metadata, "[]"),
        "sharding information of no tensor": dict.fromkeys(metadata, "{}"),
    }.items():
        cases[kind] = header | {"__metadata__": value}
    for offsets in ([2**62, 0], [-1, 0], ["x"], None, [], [1, 0]):
        text = json.dumps({key: {"saved_offsets": offsets} for key in header})
        cases[f"saved_offsets {offsets}"] = header | {"__metadata__": dict.fromkeys(metadata, text)}
    for shape in ([2**40, 2**40], [1], [], [-1], ["x"], None):
        cases[f"shape {shape}"] = header | {name: header[name] | {"shape": shape}}
    for offsets in ([0, 2**62], [2**62, 2**62 + 4], [-4, 0], None, ["x", "y"], [8, 0]):
        cases[f"data_offsets {offsets}"] = header | {name: header[name] | {"data_offsets": offsets}}
    for dtype in ("I64", "PICKLE", 7):
        cases[f"dtype {dtype}"] = header | {name: header[name] | {"dtype": dtype}}
    cases["a tensor that is missing"] = {k: v for k, v in header.items() if k != name}
    cases["a name that is a path"] = header | {"../../evil": header[name]}
    return cases


def shard_cases(templates):
    """Return {kind: content} of hostile shards of a checkpoint."""
    content = (templates / "run" / STEP / SHARD).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    cases = {kind: safetensors(h, data) for kind, h in sharding_changes(header).items()}
    return cases | HOSTILE_SAFETENSORS


def shard_problems(kinds, contents, record, templates, tmp_path):
    problems = []
    for number, (kind, program) in enumerate(kinds):
        folder = copy_template(templates, "run", tmp_path / str(number))
        content = contents[kind]
        (folder / STEP / SHARD).write_bytes(content)
        facts = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        seal(folder / STEP, record | {"files": {SHARD: facts}})
        problem = problem_of(program, folder, Path(STEP).name)
        if problem:
            problems.append(f"{kind}, {program}: {problem}")
    print(*problems, sep="\n")  # pytest shortens a long list
    return problems


def test_a_few_hostile_shards_with_valid_checksums_do_no_harm(record, templates, tmp_path):
    contents = shard_cases(templates)
    kinds = [(kind, program) for kind in contents for program in RUN_READERS]
    chosen = sample_of(kinds, "shards", 4)
    assert not shard_problems(chosen, contents, record, templates, tmp_path)


@pytest.mark.slow
def test_no_hostile_shard_with_a_valid_checksum_does_harm(record, templates, tmp_path):
    contents = shard_cases(templates)
    kinds = [(kind, program) for kind in contents for program in RUN_READERS]
    print(f"\n{len(kinds)} shards")
    assert not shard_problems(kinds, contents, record, templates, tmp_path)
