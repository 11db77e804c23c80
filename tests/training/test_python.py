"""The programs called from Python, as in a notebook: they raise their errors and change nothing.

The streams are like those of a notebook: they have write() and flush() and nothing else. Also the
other side: started as a program, each main() ends with one line and status 2.
"""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import pytest
from conftest import arguments
from faults import Forked, needs_fork
from notebook import streams_of_a_notebook

import prepare_data
import sample
import train
from common import run_dir
from common.errors import OtherRankError, UserError
from common.pretrained import load_model
from tools import estimate_memory, export, plot_loss

ROOT = Path(train.__file__).parent
SAMPLE = ["--init_from=out/tiny", "--prompt=def ", "--max_new_tokens=5", "--device=cpu"]
PREPARE = ["mine", "--input=text.txt", "--tokenizer=byte"]
MAINS = {  # name: (main, argv)
    "train": (train.main, arguments(out_dir="out/new", max_steps=2)),
    "resume": (train.main, arguments(max_steps=13)),
    "eval_only": (train.main, arguments(eval_only=True)),
    "sample": (sample.main, SAMPLE),
    "samples": (sample.main, [*SAMPLE, "--num_samples=2"]),
    "prepare_data": (prepare_data.main, PREPARE),
    "export": (export.main, ["--init_from=out/tiny", "--out_dir=exported"]),
    "plot_loss": (plot_loss.main, ["out/tiny"]),
    "estimate_memory": (estimate_memory.main, ["--n_layer=1"]),
}
each_main = pytest.mark.parametrize("name", MAINS)
# A main() that fails late, with its signal handlers set or its files open.
FAILING = {
    "an unknown option": (sample.main, [*SAMPLE, "--temprature=1"]),
    "a bad option": (sample.main, [*SAMPLE, "--top_p=2"]),
    "a missing model": (sample.main, ["--init_from=out/none"]),
    "a bad training option": (train.main, arguments(n_embd=15)),
    "a loss that is not finite": (
        train.main,
        arguments(out_dir="out/new", learning_rate=1e30, warmup_steps=0, grad_clip=0.0),
    ),
    "a dataset that is not replaced": (prepare_data.main, ["tiny", "--input=text.txt"]),
    "an export without a directory": (export.main, ["--init_from=out/tiny"]),
    "a missing run": (plot_loss.main, ["out/none"]),
    "a missing model file": (estimate_memory.main, ["--model=mine"]),
}
each_failing = pytest.mark.parametrize("name", FAILING)


@pytest.fixture
def folder(tiny_run, workdir):
    """Return the working directory, with a run, out/tiny, and a text, text.txt."""
    (workdir / "text.txt").write_text(100 * "def f(x): return x\n")
    return workdir


@contextlib.contextmanager
def nothing_changes():
    """Check that streams, how they write text, and signal handlers stay the same; yield stderr."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="xmlcharrefreplace")
        for _ in range(2)
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        before = state()
        yield err
        assert (sys.stdout, sys.stderr) == (out, err)
        assert state() == before


def state():
    return {
        "text": [(stream.encoding, stream.errors) for stream in (sys.stdout, sys.stderr)],
        "descriptors": [os.fstat(descriptor).st_ino for descriptor in (1, 2)],
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@each_main
def test_a_main_prints_to_a_stream_without_reconfigure_or_fileno(folder, name):
    main, argv = MAINS[name]
    with streams_of_a_notebook() as (out, _):
        main(argv)
    assert out.text.endswith("\n")


@each_main
def test_a_main_leaves_streams_and_signal_handlers_as_they_were(folder, name):
    main, argv = MAINS[name]
    with nothing_changes():
        main(argv)


@each_failing
def test_a_main_that_fails_raises_user_error_and_changes_nothing(folder, name):
    main, argv = FAILING[name]
    with nothing_changes() as err, pytest.raises(UserError):
        main(argv)
    err.flush()
    assert b"error:" not in err.buffer.getvalue()


@pytest.mark.parametrize("error", [OSError("no space"), BrokenPipeError(), RuntimeError("a bug")])
def test_an_error_in_a_step_of_training_is_raised_and_handlers_are_restored(
    folder, monkeypatch, error
):
    def fail(run):
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    with nothing_changes(), pytest.raises(type(error)) as raised:
        train.main(arguments(out_dir="out/new"))
    assert raised.value is error


def test_a_stopped_training_returns_and_handlers_are_restored(folder, monkeypatch):
    def stop(run):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "train_step", stop)
    with nothing_changes():
        train.main(arguments(out_dir="out/new"))


def test_ctrl_c_while_sampling_is_raised(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(SAMPLE)


def test_training_works_in_a_thread_that_cannot_set_signal_handlers(folder):
    thread = threading.Thread(target=train.main, args=[arguments(out_dir="out/new", max_steps=2)])
    thread.start()
    thread.join()
    assert Path("out/new/step_00000002").is_dir()


def test_another_rank_raises_the_message_that_rank_0_prints(monkeypatch):
    monkeypatch.setattr(train.ProcessGroup, "all_gather", lambda group, value: ["no data"])
    group = train.ProcessGroup(timeout=1)
    group.rank = 1
    with pytest.raises(OtherRankError, match="no data"):
        with group.exit_together():
            pass


@pytest.mark.parametrize("main", [train.main, sample.main, plot_loss.main])
def test_help_prints_the_options_and_raises_system_exit_0(main):
    with streams_of_a_notebook() as (out, _), pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--" in out.text


def test_drawing_keeps_the_backend_that_a_notebook_shows_plots_with(folder, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    plot_loss.main(["out/tiny"])
    assert matplotlib.get_backend() == "svg"


@pytest.mark.parametrize("name", ["train", "resume", "sample", "export", "estimate_memory"])
def test_a_cache_of_the_compiler_that_cannot_be_made_is_named(folder, monkeypatch, name):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "text.txt/cache")
    main, argv = MAINS[name]
    with pytest.raises(OSError, match="TORCHINDUCTOR_CACHE_DIR"):
        main(argv)


@pytest.mark.parametrize("path", ["cache/of/mine", ""])
def test_a_cache_of_the_compiler_that_can_be_made_is_made(folder, monkeypatch, path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", path)
    load_model("out/tiny")
    assert Path(path).is_dir()


@pytest.mark.parametrize("program", [["train.py"], ["-m", "tools.bench"]])
def test_help_needs_no_cache_of_the_compiler(program):
    completed = subprocess.run(
        [sys.executable, *program, "--help"],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{__file__}/cache"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (completed.returncode, completed.stderr) == (0, "")


def test_a_missing_file_that_is_none_of_a_checkpoint_is_not_taken_for_damage(tiny_run):
    def load(path, record):
        Path("elsewhere").read_text()

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        run_dir.load_best(tiny_run, load)


def test_load_model_returns_a_model_in_eval_mode(tiny_run):
    model, _ = load_model("out/tiny")
    assert model.config.dropout > 0
    assert not any(module.training for module in model.modules())


def test_a_run_from_loaded_weights_trains_with_dropout(folder, monkeypatch):
    modes = []
    train_step = train.train_step

    def record_mode(run):
        modes.append(run.model.training)
        return train_step(run)

    monkeypatch.setattr(train, "train_step", record_mode)
    train.main(arguments(out_dir="out/new", init_from="out/tiny", max_steps=2))
    assert modes == [True, True]


# Started as programs --------------------------------------------------------------------------

EXPERIMENTS = sorted(
    f"experiments.{path.stem}"
    for path in (ROOT / "experiments").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
TOOLS = ["tools.bench.__main__", "tools.estimate_memory", "tools.export", "tools.plot_loss"]


@needs_fork
@pytest.mark.parametrize("name", ["train", "sample", "prepare_data", *EXPERIMENTS, *TOOLS])
def test_a_module_refuses_an_option_in_one_line_with_status_2(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["experiment", "--color=red"])

    def start():
        try:
            runpy.run_module(name, run_name="__main__")
        except UserError as error:  # Forked would report it in one line, too
            raise AssertionError("main() must be called by run_program") from error

    outcome = Forked(start, tmp_path).finish()
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert "color" in outcome.err


@needs_fork
def test_sample_as_a_program_writes_utf_8_whatever_the_locale(tiny_run, workdir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", *SAMPLE[:1], "--prompt=Ä", "--max_new_tokens=1"])

    def start():
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)
        runpy.run_module("sample", run_name="__main__")

    outcome = Forked(start, workdir).finish()
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("Ä")


def test_a_program_refuses_an_option_in_one_line_with_status_2(tmp_path):
    """In a process of its own, which no test has prepared."""
    completed = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", "--color=red"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr.startswith("error: ") and completed.stderr.count("\n") == 1
    assert "color" in completed.stderr


# One run after another in a process -----------------------------------------------------------

TWO_RUNS = """
import functools, gc, sys, weakref
import torch
import train

torch.compile = functools.partial(torch.compile, backend="eager")  # needs no C++ compiler
argv, models, frozen = sys.argv[1:], [], []
train_step = train.train_step

def watched_step(run):
    models.append(weakref.ref(run.model))
    frozen.append(gc.get_freeze_count())
    return train_step(run)

train.train_step = watched_step
for compiles in (False, True):
    for name in ("first", "second"):
        train.main([*argv, f"--out_dir=out/{name}{compiles}", f"--compile={compiles}"])
        assert gc.get_freeze_count() == 0
        print("alive:", sum(model() is not None for model in models))
assert len(models) == 8 and min(frozen) > 10_000, (len(models), frozen)
"""


def test_a_run_leaves_no_model_in_memory_and_no_object_frozen(workdir):
    argv = arguments(max_steps=2, eval_interval=2, out_dir=None)
    command = [sys.executable, "-c", TWO_RUNS, *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    alive = [line for line in result.stdout.splitlines() if line.startswith("alive")]
    assert alive == 4 * ["alive: 0"]
