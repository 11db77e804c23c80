"""Every file that the programs read, damaged in many ways: a right result, or one clear line.

`pytest -m slow -s tests/robustness/test_mutants.py` runs all mutants and prints the table of
their outcomes; the tests that run by default take a few mutants of each file. An outcome is one of

    right       the result of the undamaged file
    warning     that, or the result of the checkpoint before, and a warning that names the file
    error       one line that names the file, and exit status 2
    unnoticed   another result; only where no checksum can exist: see Target.unnoticed
"""

import collections
import gzip
import json
import random
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT
from forked import run_forked
from readers import (
    PROGRAMS,
    REPLACEMENTS,
    SHARD,
    STEP,
    copy_template,
    make_templates,
)

import prepare_data

DEPTH = 100_000  # of nested JSON
SAMPLE = 2  # mutants of each file and program that run by default

# Mutations of bytes ---------------------------------------------------------------------------


def span(content, rng):
    """Return the start and the end of a random part of the content, at most a tenth of it."""
    start = rng.randrange(len(content))
    return start, start + rng.randint(1, max(1, len(content) // 10))


def flip_bit(content, rng):
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def insert_bytes(content, rng):
    start, _ = span(content, rng)
    return content[:start] + rng.randbytes(rng.randint(1, 100)) + content[start:]


def delete_bytes(content, rng):
    start, end = span(content, rng)
    return content[:start] + content[end:]


def duplicate_bytes(content, rng):
    start, end = span(content, rng)
    return content[:end] + content[start:]


def zero_bytes(content, rng):
    start, end = span(content, rng)
    return content[:start] + bytes(len(content[start:end])) + content[end:]


def truncation(tenths):
    return lambda content, rng: content[: len(content) * tenths // 10]


BYTE_MUTATIONS = {
    "bit flipped": (flip_bit, 12),
    "bytes inserted": (insert_bytes, 4),
    "bytes deleted": (delete_bytes, 4),
    "bytes duplicated": (duplicate_bytes, 4),
    "bytes zeroed": (zero_bytes, 4),
}
BYTE_MUTATIONS |= {f"truncated to {n} tenths": (truncation(n), 1) for n in range(10)}

# Mutations of JSON ----------------------------------------------------------------------------

DEEP = "[" * DEPTH + "]" * DEPTH
VALUES = {  # JSON texts to put in the place of a value
    "wrong type": ["7", '"x"', "[]", "{}", "true", "1.5", "-1", "[[]]", '[""]', '{"": 0}'],
    "null": ["null"],
    "huge number": ["1" + 40 * "0", "9223372036854775808", "1e308", "1e999", "1" + 5000 * "0"],
    "not finite": ["NaN", "Infinity", "-Infinity"],
    "deep nesting": [DEEP],
}


def places(value):
    """Yield (container, key or index) of each value inside of a JSON value."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    if isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield value, key
        yield from places(inner)


def replace_value(kind):
    def mutate(content, rng):
        value = [json.loads(content)]
        container, key = rng.choice(list(places(value)))
        container[key] = "MUTANT"
        return json.dumps(value[0]).replace('"MUTANT"', rng.choice(VALUES[kind])).encode()

    return mutate


def remove_key(content, rng):
    value = json.loads(content)
    container, key = rng.choice([place for place in places(value) if isinstance(place[0], dict)])
    del container[key]
    return json.dumps(value).encode()


def add_key(content, rng):
    value = [json.loads(content)]
    objects = [c[k] for c, k in places(value) if isinstance(c[k], dict)]
    rng.choice(objects)["extra"] = rng.choice([1, None, {}, "x"])
    return json.dumps(value[0]).encode()


def duplicate_key(content, rng):
    value = json.loads(content)
    key = rng.choice(list(value))
    pair = f"{json.dumps(key)}: {rng.choice([json.dumps(value[key]), '7', 'null'])}"
    text = json.dumps(value)
    return rng.choice([f"{{{pair}, {text[1:]}", f"{text[:-1]}, {pair}}}"]).encode()


def reverse_order(content, rng):
    value = [json.loads(content)]
    lists = [c[k] for c, k in places(value) if isinstance(c[k], list)]
    objects = [c[k] for c, k in places(value) if isinstance(c[k], dict)]
    if lists and rng.random() < 0.5:
        rng.choice(lists).reverse()
    else:
        chosen = rng.choice(objects)
        pairs = list(reversed(chosen.items()))
        chosen.clear()
        chosen.update(pairs)
    return json.dumps(value[0]).encode()


JSON_MUTATIONS = {f"JSON: {kind}": (replace_value(kind), 4) for kind in VALUES}
JSON_MUTATIONS |= {
    "JSON: key removed": (remove_key, 8),
    "JSON: key added": (add_key, 3),
    "JSON: key twice": (duplicate_key, 4),
    "JSON: other order": (reverse_order, 3),
}


def in_a_line(mutate):
    """Return a mutation of one line of .jsonl."""

    def mutate_line(content, rng):
        lines = content.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = mutate(lines[number], rng)
        return b"\n".join(lines) + b"\n"

    return mutate_line


LINE_MUTATIONS = {name: (in_a_line(mutate), 2) for name, (mutate, _) in JSON_MUTATIONS.items()}

# Files, and the programs that read them ------------------------------------------------------


@dataclass
class Target:
    """A file to damage, and the programs that read it."""

    path: str
    programs: list[str]
    mutations: dict
    unnoticed: str | None = None  # why another result can go unnoticed
    template: str = "run"
    names: tuple[str, ...] = ()  # what an error may name instead of the file


RUN_READERS = ["resume", "eval_only", "sample", "export", "load_model"]
HAND_WRITTEN = "meta.json may be written by hand"
NO_SHA256 = "foreign weights come without .sha256"
GPT_READERS = ["sample gpt", "export gpt", "fine-tune gpt"]
# An error about a missing file or tensor names the model, not one of its files.
WEIGHTS = ("gpt has no model*.safetensors", "gpt: transformer.")
JSON_FILE = BYTE_MUTATIONS | JSON_MUTATIONS
TARGETS = {
    "config.json of a checkpoint": Target(f"{STEP}/config.json", RUN_READERS, JSON_FILE),
    "shard of a checkpoint": Target(f"{STEP}/{SHARD}", RUN_READERS, BYTE_MUTATIONS),
    "log.jsonl, resumed": Target("out/tiny/log.jsonl", ["resume"], BYTE_MUTATIONS | LINE_MUTATIONS),
    "log.jsonl, drawn": Target(
        "out/tiny/log.jsonl",
        ["plot_loss"],
        BYTE_MUTATIONS | LINE_MUTATIONS,
        unnoticed="a line of the log has no checksum",
    ),
    "meta.json of a dataset": Target(
        "data/tiny/meta.json", ["resume", "eval_only"], JSON_FILE, HAND_WRITTEN
    ),
    "meta.json, verified": Target("data/tiny/meta.json", ["verify"], JSON_FILE, HAND_WRITTEN),
    "train.bin": Target(
        "data/tiny/train.bin", ["resume"], BYTE_MUTATIONS, "bins are checked by --verify only"
    ),
    "val.bin": Target(
        "data/tiny/val.bin", ["eval_only"], BYTE_MUTATIONS, "bins are checked by --verify only"
    ),
    "train.bin, verified": Target("data/tiny/train.bin", ["verify"], BYTE_MUTATIONS),
    "val.bin, verified": Target("data/tiny/val.bin", ["verify"], BYTE_MUTATIONS),
    "config.json of a foreign model": Target(
        "gpt/config.json", GPT_READERS, JSON_FILE, NO_SHA256, "foreign", ("gpt: model.py: n_head",)
    ),
    "model.safetensors of a foreign model": Target(
        "gpt/model.safetensors", GPT_READERS, BYTE_MUTATIONS, NO_SHA256, "foreign", WEIGHTS
    ),
    "meta.json of a foreign model": Target(
        "gpt/meta.json",
        GPT_READERS,
        JSON_FILE,
        HAND_WRITTEN,
        "foreign",
        ("gpt was trained with the tokenizer",),
    ),
    "first file of a foreign model": Target(
        "gpt/model-00001-of-00002.safetensors",
        GPT_READERS,
        BYTE_MUTATIONS,
        NO_SHA256,
        "sharded",
        WEIGHTS,
    ),
    "second file of a foreign model": Target(
        "gpt/model-00002-of-00002.safetensors",
        GPT_READERS,
        BYTE_MUTATIONS,
        NO_SHA256,
        "sharded",
        WEIGHTS,
    ),
    "config file": Target(
        "tiny.py", ["config"], BYTE_MUTATIONS, "a config file is a program", "run", names=("",)
    ),
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    return make_templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="module")
def results():
    """Return a dict for the results of the undamaged templates."""
    return {}


@pytest.fixture
def bench(templates, results, tmp_path):
    return Bench(templates, tmp_path, results)


# Mutants and their outcomes -------------------------------------------------------------------


@dataclass
class Mutant:
    target: str
    kind: str
    number: int
    program: str

    def damage(self, path):
        """Damage a file; return its new content, or None if it is no longer a file."""
        if self.kind in REPLACEMENTS:
            path.unlink()
            REPLACEMENTS[self.kind](path)
            return None
        mutate, _ = TARGETS[self.target].mutations[self.kind]
        rng = random.Random(f"{self.target} {self.kind} {self.number}")
        content = mutate(path.read_bytes(), rng)
        path.write_bytes(content)
        return content


def mutants(target):
    """Return the mutants of a target; the programs that read it take turns."""
    kinds = [
        (kind, number)
        for kind, (_, count) in TARGETS[target].mutations.items()
        for number in range(count)
    ]
    programs = TARGETS[target].programs
    result = [
        Mutant(target, kind, number, programs[i % len(programs)])
        for i, (kind, number) in enumerate(kinds)
    ]
    return result + [Mutant(target, kind, 0, name) for kind in REPLACEMENTS for name in programs]


@dataclass
class Bench:
    """Runs mutants in copies of the templates."""

    templates: Path
    folder: Path
    results: dict  # of the undamaged templates

    def expected(self, template, program, without=None):
        """Return the result of a program in a template, without one of its files."""
        key = (template, program, without)
        if key not in self.results:
            folder = self.copy(template)
            if without:
                shutil.rmtree(folder / without)
            main, argv, result = PROGRAMS[program]
            outcome = run_forked(main, argv, folder)
            assert outcome.status == 0, outcome.err
            self.results[key] = result(folder, outcome.out)
            shutil.rmtree(folder)
        return self.results[key]

    def copy(self, template):
        return copy_template(self.templates, template, self.folder)

    def outcome(self, mutant):
        """Return the name of a mutant's outcome and, if it is "wrong", why."""
        target = TARGETS[mutant.target]
        expected = [self.expected(target.template, mutant.program)]
        if target.path.startswith(STEP):
            expected.append(self.expected(target.template, mutant.program, without=STEP))
        folder = self.copy(target.template)
        mutant.damage(folder / target.path)
        main, argv, result = PROGRAMS[mutant.program]
        outcome = run_forked(main, argv, folder)
        names = (Path(target.path).name, *target.names)
        try:
            if outcome.status != 0:
                problem = outcome.problem(*names)
                return ("wrong", problem) if problem else ("error", None)
            warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
            if result(folder, outcome.out) not in expected[: 2 if warnings else 1]:
                return "unnoticed", outcome.out[-200:] + outcome.err
            if warnings and not all(names[0] in line for line in warnings):
                return "wrong", f"{names[0]} is not named: {warnings}"
            return ("warning" if warnings else "right"), None
        finally:
            shutil.rmtree(folder)


def outcomes(bench, target, chosen):
    """Return the Counter of the outcomes of some mutants, and a line for each that is not right."""
    counts, problems = collections.Counter(), []
    for mutant in chosen:
        outcome, reason = bench.outcome(mutant)
        counts[outcome] += 1
        if outcome == "wrong" or (outcome == "unnoticed" and not TARGETS[target].unnoticed):
            problems.append(f"{mutant}: {outcome}: {reason}")
    return counts, problems


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_mutants_are_right_or_refused_by_name(bench, target):
    chosen = random.Random(target).sample(mutants(target), SAMPLE)
    _, problems = outcomes(bench, target, chosen)
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_mutants_are_right_or_refused_by_name(bench, target):
    counts, problems = outcomes(bench, target, mutants(target))
    print(f"\n{target}: {dict(counts)}, {TARGETS[target].unnoticed or ''}", *problems, sep="\n")
    assert not problems


# Text: its tokens have to be those of the damaged text ----------------------------------------

TEXT_FILES = {  # name: mutations
    "text.txt": BYTE_MUTATIONS,
    "text.jsonl": BYTE_MUTATIONS | LINE_MUTATIONS,
    "text.txt.gz": BYTE_MUTATIONS,
    "text.jsonl.gz": BYTE_MUTATIONS,
}
END_OF_TEXT = 256  # of the byte tokenizer
# What Python raises for a text that is damaged.
UNREADABLE = (ValueError, KeyError, TypeError, RecursionError, OSError, EOFError, zlib.error)


def text_content(name):
    """Return the undamaged content of a text file."""
    paragraph = TEXT[:200] + "ä, € and 😀 have two, three and four bytes\n"
    content = 5 * paragraph
    if ".jsonl" in name:
        content = "".join(json.dumps({"text": paragraph, "id": i}) + "\n" for i in range(5))
    encoded = content.encode()
    return gzip.compress(encoded, mtime=0) if name.endswith(".gz") else encoded


def without_lone_surrogates(text):
    if not isinstance(text, str):
        raise TypeError(text)
    return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)


def text_ids(name, content):
    """Return the byte tokens of a text file, or None if it must be refused."""
    try:
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        if ".jsonl" in name:
            lines = [line for line in content.split(b"\n") if line.strip()]
            documents = [json.loads(line.decode("utf-8-sig"))["text"] for line in lines]
        else:
            documents = [content.decode("utf-8-sig")]
        encoded = [without_lone_surrogates(text).encode() for text in documents]
    except UNREADABLE:
        return None
    ids = []
    for document in filter(None, encoded):
        ids += [END_OF_TEXT, *document] if ids else document
    return ids if len(ids) >= 4 else None


def text_problem(name, kind, number, folder):
    """Prepare a mutant of a text file; return what is wrong, or None."""
    path = folder / name
    content = text_content(name)
    path.write_bytes(content)
    if kind in REPLACEMENTS:
        path.unlink()
        REPLACEMENTS[kind](path)
        expected = None
    else:
        mutate, _ = TEXT_FILES[name][kind]
        content = mutate(content, random.Random(f"{name} {kind} {number}"))
        path.write_bytes(content)
        expected = text_ids(name, content)
    argv = ["mine", f"--input={name}", "--tokenizer=byte", "--val_fraction=0.5"]
    outcome = run_forked(prepare_data.main, argv, folder)
    if expected is None:
        return outcome.problem(name)
    if outcome.status != 0 or outcome.err:
        return f"status {outcome.status}, {outcome.err!r}"
    bins = [(folder / f"data/mine/{split}.bin").read_bytes() for split in ("train", "val")]
    actual = np.frombuffer(b"".join(bins), dtype="<u2").tolist()
    return None if actual == expected else "other tokens than those of the text"


def text_mutants(name):
    kinds = [(kind, i) for kind, (_, count) in TEXT_FILES[name].items() for i in range(count)]
    return kinds + [(kind, 0) for kind in REPLACEMENTS]


def text_problems(name, chosen, tmp_path):
    """Return a line for each mutant whose tokens are wrong or which is not refused by its name."""
    problems = []
    for kind, number in chosen:
        folder = tmp_path / "work"
        folder.mkdir()
        problem = text_problem(name, kind, number, folder)
        if problem:
            problems.append(f"{kind} {number}: {problem}")
        shutil.rmtree(folder)
    return problems


@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_few_mutants_of_text_give_its_tokens_or_are_refused(tmp_path, name):
    chosen = random.Random(name).sample(text_mutants(name), SAMPLE)
    assert not text_problems(name, chosen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_FILES)
def test_all_mutants_of_text_give_its_tokens_or_are_refused(tmp_path, name):
    print(f"\n{name}: {len(text_mutants(name))} mutants")
    assert not text_problems(name, text_mutants(name), tmp_path)
