"""Files that could run code or name a path outside of their folder: neither happens.

`pytest -m slow -s tests/robustness/test_hostile.py` puts a pickle in the place of each file that a
program reads; by default a few of them.
"""

import io
import json
import pickle
import random
import zlib

import numpy as np
import pytest
import torch
from bomb import Bomb
from faults import run_forked
from readers import PROGRAMS, SHARD, STEP, copy_template

import prepare_data

RUN_READERS = ["resume", "eval_only", "sample"]


@pytest.fixture
def run_folder(templates, tmp_path):
    """Return a folder with a dataset, data/tiny, and a run, out/tiny."""
    return copy_template(templates, "run", tmp_path)


def problem_of(program, folder, *names):
    """Run a program that may succeed or fail by one line; return what is wrong, or None."""
    main, argv, _ = PROGRAMS[program]
    outcome = run_forked(main, argv, folder)
    if outcome.status != 0:
        return outcome.problem(*names)
    return outcome.err if "Traceback" in outcome.err else None


# Pickles --------------------------------------------------------------------------------------


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
        for name in ("config.json", SHARD, ".metadata", "__0_0.distcp", "model.pt")
    ),
    *(
        ("run", f"out/tiny/{name}", [*RUN_READERS, "plot_loss"])
        for name in ("log.jsonl", "config.json", "ckpt.pt", ".metadata")
    ),
    *(
        ("run", f"data/tiny/{name}", ["resume", "eval_only", "verify"])
        for name in ("meta.json", "meta.pkl", "train.bin", "val.bin")
    ),
    *(
        ("foreign", f"gpt/{name}", ["sample gpt", "fine-tune gpt"])
        for name in ("config.json", "model.safetensors", "meta.json", "pytorch_model.bin")
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
        assert not marker.exists()
        problem = problem_of(program, folder, "")
        if marker.exists():
            problem = "it exploded"
        if problem:
            problems.append(f"{kind} in {path}, {program}: {problem}")
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
    chosen = random.Random("bombs").sample(BOMB_CASES, 4)
    assert not bomb_problems(chosen, templates, tmp_path)


@pytest.mark.slow
def test_no_pickle_in_the_place_of_any_file_is_loaded(templates, tmp_path):
    print(f"\n{len(BOMB_CASES)} pickles")
    assert not bomb_problems(BOMB_CASES, templates, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("text.txt", "pickle"), ("text.jsonl", "torch"), ("text.txt.gz", "numpy")]
)
def test_a_pickle_in_the_place_of_a_text_is_refused_by_name(tmp_path, name, kind):
    marker = tmp_path / "exploded"
    (tmp_path / name).write_bytes(BOMBS[kind](Bomb(str(marker))))
    argv = ["mine", f"--input={name}", "--tokenizer=byte"]
    outcome = run_forked(prepare_data.main, argv, tmp_path)
    assert outcome.problem(name) is None
    assert not marker.exists()


# Paths in the record of a checkpoint ----------------------------------------------------------


def change_record(folder, change):
    """Change a checkpoint's record, and write it with the checksum that makes it valid."""
    path = folder / STEP / "config.json"
    record = json.loads(path.read_text())
    del record["crc32"]
    change(record)
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    crc32 = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(record | {"crc32": crc32}))


def facts_of(path):
    """Return what a record says about a file."""
    content = path.read_bytes()
    return {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}


@pytest.mark.parametrize(
    ("program", "kind"), [("resume", "relative"), ("eval_only", "absolute"), ("sample", "nested")]
)
def test_a_record_cannot_name_a_file_outside_of_its_checkpoint(run_folder, program, kind):
    names = {
        "relative": "../../../text.txt",
        "absolute": str(run_folder / "text.txt"),
        "nested": f"../{(run_folder / STEP).name}/{SHARD}",
    }

    def add_file(record):
        record["files"][names[kind]] = facts_of(run_folder / STEP / names[kind])

    change_record(run_folder, add_file)
    main, argv, _ = PROGRAMS[program]
    outcome = run_forked(main, argv, run_folder)
    assert outcome.status == 0  # from the checkpoint before
    [warning] = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert names[kind] in warning


def test_a_record_cannot_name_a_model_file_outside_of_the_repository(run_folder, monkeypatch):
    marker = run_folder / "exploded"
    (run_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(run_folder)
    change_record(run_folder, lambda record: record["options"].update(model="evil"))
    assert problem_of("sample", run_folder, "model=evil") is None
    assert not marker.exists()
