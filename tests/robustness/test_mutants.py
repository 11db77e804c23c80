"""Every file that the programs read, damaged in many ways: a right result, or one clear line.

`pytest -m slow -s tests/robustness/test_mutants.py` runs all mutants and prints the table of
their outcomes; the tests that run by default take one mutant of each file. An outcome is one of

    right       the result of the undamaged file
    warning     that, or the result of the checkpoint before, and a warning that names the file
    error       one line that names the file, and exit status 2
    unnoticed   another result; only where no checksum can exist: see Target.unnoticed
"""

import collections
import gzip
import json
import os
import random
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT
from faults import run_forked
from readers import PROGRAMS, SHARD, STEP, copy_template

import prepare_data

TRIES = 8  # of each kind of damage that depends on a random number
SAMPLE = 1  # mutants of each file that run by default

# Damage ---------------------------------------------------------------------------------------


def flip_bit(content, rng):
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zero_bytes(content, rng):
    start = rng.randrange(len(content))
    end = min(len(content), start + len(content) // 10 + 1)
    return content[:start] + bytes(end - start) + content[end:]


def truncate(content, rng):
    return content[: rng.randrange(len(content))]


def empty(content, rng):
    return b""


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


def remove_key(content, rng):
    value = json.loads(content)
    container, key = rng.choice([place for place in places(value) if isinstance(place[0], dict)])
    del container[key]
    return json.dumps(value).encode()


def change_type(content, rng):
    value = [json.loads(content)]
    container, key = rng.choice(list(places(value)))
    others = [7, 1.5, "x", None, [], {}, True]
    container[key] = rng.choice(
        [other for other in others if type(other) is not type(container[key])]
    )
    return json.dumps(value[0]).encode()


def in_a_line(damage):
    """Return a function that damages one line of .jsonl."""

    def damage_line(content, rng):
        lines = content.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = damage(lines[number], rng)
        return b"\n".join(lines) + b"\n"

    return damage_line


BYTES = {
    "bit flipped": flip_bit,
    "bytes zeroed": zero_bytes,
    "truncated": truncate,
    "emptied": empty,
}
JSON = BYTES | {"key removed": remove_key, "wrong type": change_type}
LINES = BYTES | {
    "key removed": in_a_line(remove_key),
    "wrong type": in_a_line(change_type),
}


def make_unreadable(path):
    path.write_text("x")
    path.chmod(0)


# What can take the place of a file.
REPLACEMENTS = {
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}
if os.geteuid() != 0:  # root reads everything
    REPLACEMENTS["not readable"] = make_unreadable

# Files, and the programs that read them ------------------------------------------------------


@dataclass
class Target:
    """A file to damage, and the programs that read it."""

    path: str
    programs: list[str]
    damages: dict
    unnoticed: str | None = None  # why another result can go unnoticed
    template: str = "run"
    names: tuple[str, ...] = ()  # what an error may name instead of the file


RUN_READERS = ["resume", "eval_only", "sample"]
GPT_READERS = ["sample gpt", "fine-tune gpt"]
HAND_WRITTEN = "meta.json may be written by hand"
NO_CHECKSUM = "foreign models come without checksums"
# An error about a tensor or a number names the model, not one of its files. A flipped bit can make
# a weight so large that the loss is not finite.
GPT = ("gpt has", "gpt: ", "not finite")
TARGETS = {
    "config.json of a checkpoint": Target(f"{STEP}/config.json", RUN_READERS, JSON),
    "shard of a checkpoint": Target(f"{STEP}/{SHARD}", RUN_READERS, BYTES),
    "log.jsonl, resumed": Target("out/tiny/log.jsonl", ["resume"], LINES),
    "log.jsonl, drawn": Target(
        "out/tiny/log.jsonl", ["plot_loss"], LINES, "a line of the log has no checksum"
    ),
    "meta.json of a dataset": Target(
        "data/tiny/meta.json", ["resume", "eval_only"], JSON, HAND_WRITTEN
    ),
    "meta.json, verified": Target("data/tiny/meta.json", ["verify"], JSON, HAND_WRITTEN),
    "train.bin": Target(
        "data/tiny/train.bin", ["resume"], BYTES, "bins are checked by --verify only"
    ),
    "val.bin": Target(
        "data/tiny/val.bin", ["eval_only"], BYTES, "bins are checked by --verify only"
    ),
    "train.bin, verified": Target("data/tiny/train.bin", ["verify"], BYTES),
    "val.bin, verified": Target("data/tiny/val.bin", ["verify"], BYTES),
    "config.json of a foreign model": Target(
        "gpt/config.json", GPT_READERS, JSON, NO_CHECKSUM, "foreign", GPT
    ),
    "model.safetensors of a foreign model": Target(
        "gpt/model.safetensors", GPT_READERS, BYTES, NO_CHECKSUM, "foreign", GPT
    ),
    "meta.json of a foreign model": Target(
        "gpt/meta.json", GPT_READERS, JSON, HAND_WRITTEN, "foreign", ("gpt was trained with",)
    ),
    "config file": Target("tiny.py", ["config"], BYTES, "a config file is a program", names=("",)),
}


@pytest.fixture(scope="module")
def bench(templates, tmp_path_factory):
    return Bench(templates, tmp_path_factory.mktemp("bench"))


# Mutants and their outcomes -------------------------------------------------------------------


@dataclass
class Mutant:
    target: str
    kind: str
    number: int
    program: str

    def damage(self, path):
        damage_file(path, TARGETS[self.target].damages, self.kind, f"{self.target} {self.number}")


def damage_file(path, damages, kind, seed):
    """Damage a file, or put something else in its place."""
    if kind in REPLACEMENTS:
        path.unlink()
        REPLACEMENTS[kind](path)
    else:
        path.write_bytes(damages[kind](path.read_bytes(), random.Random(f"{kind} {seed}")))


def kinds_and_numbers(damages):
    """Return [(kind of damage or replacement, number of the try)]."""
    tries = [(kind, i) for kind in damages for i in range(1 if kind == "emptied" else TRIES)]
    return tries + [(kind, 0) for kind in REPLACEMENTS]


def mutants(target):
    """Return the mutants of a target, for each program that reads it."""
    return [
        Mutant(target, kind, number, program)
        for kind, number in kinds_and_numbers(TARGETS[target].damages)
        for program in TARGETS[target].programs
    ]


@dataclass
class Bench:
    """Runs mutants in copies of the templates."""

    templates: Path
    folder: Path
    results: dict = field(default_factory=dict)  # of the undamaged templates

    def expected(self, template, program, without=None):
        """Return the result of a program in a template, without one of its folders."""
        key = (template, program, without)
        if key not in self.results:
            folder = copy_template(self.templates, template, self.folder / "undamaged")
            if without:
                shutil.rmtree(folder / without)
            main, argv, result = PROGRAMS[program]
            outcome = run_forked(main, argv, folder)
            assert outcome.status == 0, outcome.err
            self.results[key] = result(folder, outcome.out)
            shutil.rmtree(folder)
        return self.results[key]

    def outcome(self, mutant):
        """Return the name of a mutant's outcome and, if it is "wrong", why."""
        target = TARGETS[mutant.target]
        folder = copy_template(self.templates, target.template, self.folder)
        mutant.damage(folder / target.path)
        main, argv, result = PROGRAMS[mutant.program]
        outcome = run_forked(main, argv, folder)
        name = Path(target.path).name
        try:
            if outcome.status != 0:
                problem = outcome.problem(name, *target.names)
                return ("wrong", problem) if problem else ("error", None)
            warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
            if not all(name in line for line in warnings):
                return "wrong", f"{name} is not named: {warnings}"
            expected = [self.expected(target.template, mutant.program)]
            if warnings and target.path.startswith(STEP):
                expected.append(self.expected(target.template, mutant.program, without=STEP))
            if result(folder, outcome.out) not in expected:
                return "unnoticed", outcome.out[-200:] + outcome.err
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
def test_a_mutant_is_right_or_refused_by_name(bench, target):
    chosen = random.Random(target).sample(mutants(target), SAMPLE)
    _, problems = outcomes(bench, target, chosen)
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        # Without a meta.json, a foreign model is read with GPT-2's tokenizer.
        pytest.param(
            target, marks=pytest.mark.gpt2_bpe if "meta.json of a foreign" in target else ()
        )
        for target in TARGETS
    ],
)
def test_all_mutants_are_right_or_refused_by_name(bench, target):
    counts, problems = outcomes(bench, target, mutants(target))
    print(f"\n{target}: {dict(counts)}, {TARGETS[target].unnoticed or ''}", *problems, sep="\n")
    assert not problems


# Text: its tokens have to be those of the damaged text ----------------------------------------

TEXT_FILES = {"text.txt": BYTES, "text.jsonl": LINES, "text.txt.gz": BYTES, "text.jsonl.gz": BYTES}
END_OF_TEXT = 256  # of the byte tokenizer
# What Python raises for a text that is damaged.
UNREADABLE = (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error)


def text_content(name):
    """Return the undamaged content of a text file."""
    paragraph = TEXT[:200] + "ä, € and 😀 have two, three and four bytes\n"
    content = 5 * paragraph
    if ".jsonl" in name:
        content = "".join(json.dumps({"text": paragraph, "id": i}) + "\n" for i in range(5))
    encoded = content.encode()
    return gzip.compress(encoded, mtime=0) if name.endswith(".gz") else encoded


def text_ids(path):
    """Return the byte tokens of a text file, or None if it must be refused."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        if b"\0" in content[:512]:  # a binary file
            return None
        documents = [content.decode("utf-8-sig")]
        if ".jsonl" in path.name:
            lines = [line for line in content.split(b"\n") if line.strip()]
            documents = [json.loads(line.decode("utf-8-sig"))["text"] for line in lines]
        # JSON escapes can hold half a surrogate pair, which becomes U+FFFD.
        documents = [re.sub("[\ud800-\udfff]", "\ufffd", text).encode() for text in documents]
    except UNREADABLE:
        return None
    ids = []
    for document in filter(None, documents):
        ids += [END_OF_TEXT, *document] if ids else document
    return ids if len(ids) >= 4 else None


def text_problem(name, kind, number, folder):
    """Prepare a mutant of a text file; return what is wrong, or None."""
    path = folder / name
    path.write_bytes(text_content(name))
    damage_file(path, TEXT_FILES[name], kind, f"{name} {number}")
    expected = text_ids(path)
    argv = ["mine", f"--input={name}", "--tokenizer=byte", "--val_fraction=0.5"]
    outcome = run_forked(prepare_data.main, argv, folder)
    if expected is None:
        return outcome.problem(name)
    if outcome.status != 0 or outcome.err:
        return f"status {outcome.status}, {outcome.err!r}"
    bins = [(folder / f"data/mine/{split}.bin").read_bytes() for split in ("train", "val")]
    actual = np.frombuffer(b"".join(bins), dtype="<u2").tolist()
    return None if actual == expected else "other tokens than those of the text"


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
def test_a_mutant_of_a_text_gives_its_tokens_or_is_refused(tmp_path, name):
    chosen = random.Random(name).sample(kinds_and_numbers(TEXT_FILES[name]), SAMPLE)
    assert not text_problems(name, chosen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_FILES)
def test_all_mutants_of_text_give_its_tokens_or_are_refused(tmp_path, name):
    assert not text_problems(name, kinds_and_numbers(TEXT_FILES[name]), tmp_path)
