"""A loss, a gradient or a weight that is not finite: in one process, under DDP and under FSDP.

The run ends with one line, and what it had before that step is kept. test_train.py has more about
one process: which checkpoint the line names, and float16, whose scaler skips steps.
"""

import re
from pathlib import Path

import pytest
from conftest import arguments, read_log, refused
from ranks import fork
from runs import losses, same_weights
from spoiled import spoiled

import train
from common import checkpoint, run_dir
from common.pretrained import load_model

STEP = 3  # counted from 0; the evaluation before it is that of step 3
OPTIONS = {"max_steps": 5, "eval_interval": 3, "checkpoint_interval": 2, "warmup_steps": 0}
KINDS = [
    ("loss", "nan"),
    ("loss", "inf"),
    ("gradient", "nan"),
    ("gradient", "inf"),
    ("weight", "nan"),
    ("weight", "inf"),
    ("validation", "nan"),
    ("validation", "inf"),
]
MODES = {"ddp2": {}, "fsdp2": {"fsdp": True}}
KINDS_OF_RANKS = [("gradient", "inf"), ("loss", "nan"), ("weight", "nan"), ("validation", "inf")]
each_kind = pytest.mark.parametrize(("what", "value"), KINDS)
each_mode = pytest.mark.parametrize("mode", MODES)
each_mode_and_kind = pytest.mark.parametrize(
    ("mode", "what", "value"), [(mode, *kind) for mode in MODES for kind in KINDS_OF_RANKS]
)


def assert_one_line_names_the_step(lines, what):
    assert len(lines) == 1
    assert re.search(rf"\bstep {STEP if what == 'validation' else STEP + 1}\b", lines[0])


def assert_checkpoints_are_good(out_dir, what):
    """Assert that the last checkpoint is the last one before the step, and finite."""
    path = run_dir.list_checkpoints(out_dir)[-1]
    assert checkpoint.verify_checkpoint(path)["step"] == (2 if what == "validation" else STEP)
    model, _ = load_model(path)
    assert all(p.isfinite().all() for p in model.parameters())


# One process ----------------------------------------------------------------------------------


@each_kind
def test_one_process_ends_and_keeps_what_it_had(workdir, capsys, what, value):
    with spoiled(what, value, STEP) as digests:
        line = refused(capsys, arguments(**OPTIONS))
    assert_one_line_names_the_step([line], what)
    assert len(set(digests)) <= 1
    assert_checkpoints_are_good(Path("out/tiny"), what)


def test_one_process_resumes_as_if_nothing_had_happened(workdir, capsys):
    with spoiled("gradient", "nan", STEP):
        refused(capsys, arguments(**OPTIONS))
    train.main(arguments(**OPTIONS))
    train.main(arguments(**OPTIONS, out_dir="out/other"))
    assert losses(Path("out/tiny")) == losses(Path("out/other"))
    assert same_weights(Path("out/tiny"), Path("out/other"))


# Two ranks ------------------------------------------------------------------------------------


def runs_of(mode):
    """Return {name: run}: one of each kind, the first of them resumed, and others to compare."""

    def argv(name, **options):
        options = OPTIONS | MODES[mode] | {"batch_size": 2, "out_dir": f"out/{name}"} | options
        return arguments(**options)

    def spoil(what, value):
        return {"what": what, "value": value, "step": STEP, "rank": 1}

    runs = {}
    for what, value in KINDS_OF_RANKS:
        name = f"{mode} {what} {value}"
        runs[name] = {"argv": argv(name), "spoil": spoil(what, value)}
    runs[f"{mode} resumed"] = {"argv": argv(f"{mode} gradient inf")}
    runs[f"{mode} without a fault"] = {"argv": argv(f"{mode} without a fault")}
    if mode == "ddp2":
        argv16 = argv("ddp2 float16", dtype="float16")
        runs["ddp2 float16"] = {"argv": argv16, "spoil": spoil("gradient", "inf")}
    return runs


def do_runs(tests):
    """Do all runs of two ranks.

    Returns {name: the record of each rank}, and the lines of stderr in the order of the runs.
    """
    runs = runs_of("ddp2") | runs_of("fsdp2")
    by_world_size, stderr = fork({2: list(runs.values())})
    records = dict(zip(runs, zip(*by_world_size[2], strict=True), strict=True))
    return records, stderr.splitlines()


BACKGROUND = {"ranks": do_runs}


@pytest.fixture(scope="module")
def ranks(background):
    """Return what do_runs() returned, in its working directory."""
    with background.result("ranks") as result:
        yield result


@each_mode_and_kind
def test_a_fault_of_one_rank_ends_both(ranks, mode, what, value):
    records, _ = ranks
    assert [record["status"] for record in records[f"{mode} {what} {value}"]] == [2, 2]


@each_mode_and_kind
def test_a_fault_of_one_rank_is_one_line_that_names_the_step(ranks, mode, what, value):
    _, lines = ranks
    errors = [line for line in lines if line.startswith("error: ")]
    names = [(m, *kind) for m in MODES for kind in KINDS_OF_RANKS]
    assert len(errors) == len(names)
    assert_one_line_names_the_step([errors[names.index((mode, what, value))]], what)
    assert not [line for line in lines if "Traceback" in line]


@each_mode_and_kind
def test_a_fault_of_one_rank_leaves_the_state_of_both_as_it_was(ranks, mode, what, value):
    records, _ = ranks
    for record in records[f"{mode} {what} {value}"]:
        assert len(record["digests"]) == (0 if what == "validation" else 2)
        assert len(set(record["digests"])) <= 1


@each_mode
@pytest.mark.parametrize(("what", "value"), KINDS_OF_RANKS[1:])  # the first one was resumed
def test_a_fault_of_one_rank_spoils_no_checkpoint(ranks, mode, what, value):
    assert_checkpoints_are_good(Path(f"out/{mode} {what} {value}"), what)


@each_mode
def test_two_ranks_resume_as_if_nothing_had_happened(ranks, mode):
    resumed, other = Path(f"out/{mode} gradient inf"), Path(f"out/{mode} without a fault")
    assert losses(resumed) == losses(other)
    assert same_weights(resumed, other)


def test_a_float16_overflow_of_one_rank_skips_the_step_on_both(ranks):
    records, _ = ranks
    for record in records["ddp2 float16"]:
        assert record["status"] == 0
        assert len(record["digests"]) == 2
        assert len(set(record["digests"])) == 1
    assert read_log(Path("out/ddp2 float16"))[STEP + 1]["grad_norm"] is None
