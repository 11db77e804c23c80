"""--tracker: the lines of log.jsonl go to Weights & Biases or TensorBoard, across interruptions.

Both are optional packages; the modules here take their place. What they do with an id, a step and
purge_step is as those packages document it.
"""

import sys
import types
from pathlib import Path

import pytest
from conftest import TINY, arguments, read_log, refused
from runs import stop_in_step
from spoiled import spoiled

import train


class Session:
    """Takes the place of wandb.Run; the history of an id survives its sessions."""

    histories = None  # {id: {step: metrics}}

    def __init__(self, id, resume, config, **options):
        self.id, self.config, self.options = id, config, options
        self.is_new = id not in self.histories
        assert self.is_new or resume == "allow"
        self.history = self.histories.setdefault(id, {})
        self.exit_code = None

    @property
    def step(self):
        return max(self.history, default=-1) + 1

    def log(self, metrics, step):
        assert step >= self.step, "W&B ignores it, with a warning"
        self.history[step] = metrics

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def sessions(monkeypatch):
    """Put a module in the place of wandb; return the list of the sessions that runs begin."""
    begun = []

    def init(**options):
        begun.append(Session(**options))
        return begun[-1]

    module = types.ModuleType("wandb")
    module.init, module.Error = init, type("Error", (Exception,), {})
    monkeypatch.setattr(Session, "histories", {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


class Writer:
    """Takes the place of torch's SummaryWriter; purge_step hides later events of its directory."""

    shown = None  # {directory: {(name, step): value}}
    closed = None  # directories

    def __init__(self, log_dir, purge_step, flush_secs):
        self.log_dir = Path(log_dir)
        before = self.shown.get(self.log_dir, {})
        self.events = {key: value for key, value in before.items() if key[1] < purge_step}
        self.shown[self.log_dir] = self.events
        self.texts = {}

    def add_text(self, name, text, step):
        self.texts[name] = text

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.events
        self.events[name, step] = value

    def close(self):
        self.closed.append(self.log_dir)


@pytest.fixture
def writers(monkeypatch):
    """Put a module in the place of torch.utils.tensorboard; return the class Writer."""
    monkeypatch.setattr(Writer, "shown", {})
    monkeypatch.setattr(Writer, "closed", [])
    module = types.ModuleType("tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return Writer


def logged(run="out/tiny"):
    """Return {step: metrics} of a run's log, without those that are not known."""
    records = {record.pop("step"): record for record in read_log(Path(run))}
    return {
        step: {name: value for name, value in record.items() if value is not None}
        for step, record in records.items()
    }


def wandb_arguments(**options):
    return arguments(tracker="wandb", **options)


def tensorboard_arguments(**options):
    return arguments(tracker="tensorboard", **options)


# Weights & Biases -----------------------------------------------------------------------------


def test_wandb_gets_every_line_of_the_log(workdir, sessions):
    train.main(wandb_arguments())
    assert sessions[0].history == logged()


def test_wandb_gets_the_options_of_the_run_and_of_its_model(workdir, sessions):
    train.main(wandb_arguments(max_steps=1))
    given = {name: TINY[name] for name in ("learning_rate", "n_layer", "block_size", "dataset")}
    assert sessions[0].config.items() >= (given | {"max_steps": 1, "bias": True}).items()


def test_wandb_gets_the_name_of_the_directory_and_writes_into_it(workdir, sessions):
    train.main(wandb_arguments(max_steps=1, out_dir="out/a/b"))
    assert sessions[0].options["name"] == "b"
    assert sessions[0].options["dir"] == Path("out/a/b")


def test_a_resumed_run_continues_its_curve_in_wandb(workdir, sessions):
    stop_in_step(7, wandb_arguments())
    train.main(wandb_arguments())
    assert len(Session.histories) == 1
    assert list(sessions[1].history) == list(range(13))


def test_wandb_keeps_its_curve_when_a_killed_run_repeats_steps(workdir, sessions, monkeypatch):
    original = train.train_step

    def die_in_step_7(run):
        if run.step == 6:
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(train, "train_step", die_in_step_7)
    with pytest.raises(KeyboardInterrupt):
        train.main(wandb_arguments())
    monkeypatch.setattr(train, "train_step", original)
    train.main(wandb_arguments())  # from step 5
    assert len(Session.histories) == 1
    assert list(sessions[1].history) == list(range(13))


def test_a_run_that_starts_over_is_a_new_one_in_wandb(workdir, sessions):
    train.main(wandb_arguments(max_steps=2))
    train.main(wandb_arguments(max_steps=2, overwrite=True))
    assert [list(history) for history in Session.histories.values()] == [[0, 1, 2]] * 2


def test_two_runs_have_two_ids_in_wandb(workdir, sessions):
    train.main(wandb_arguments(max_steps=1))
    train.main(wandb_arguments(max_steps=1, out_dir="out/other"))
    assert len(Session.histories) == 2


def test_wandb_is_closed_as_failed_after_an_error(workdir, sessions, capsys):
    with spoiled("loss", "nan", 3):
        refused(capsys, wandb_arguments())
    assert sessions[0].exit_code == 1


def test_wandb_is_closed_as_successful_after_a_stop_signal(workdir, sessions):
    stop_in_step(3, wandb_arguments())
    assert sessions[0].exit_code == 0


def test_training_goes_on_after_one_warning_when_the_tracker_fails(
    workdir, sessions, capsys, monkeypatch
):
    def fail(self, metrics, step):
        raise ConnectionError("its process has died")

    monkeypatch.setattr(Session, "log", fail)
    monkeypatch.setattr(Session, "finish", fail)
    train.main(wandb_arguments())
    assert capsys.readouterr().err.count("wandb") == 1
    assert list(logged()) == list(range(13))


def test_an_error_of_wandb_is_one_line_and_keeps_the_earlier_run(
    tiny_run, sessions, capsys, monkeypatch
):
    def init(**options):
        raise sys.modules["wandb"].Error("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    before = (tiny_run / "log.jsonl").read_text()
    line = refused(capsys, wandb_arguments(overwrite=True))
    assert "tracker=wandb" in line
    assert "no API key" in line
    assert (tiny_run / "log.jsonl").read_text() == before
    assert not (tiny_run / "wandb_id").exists()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AttributeError])
def test_any_error_of_a_tracker_that_does_not_start_is_one_line(
    workdir, sessions, capsys, monkeypatch, error
):
    def init(**options):
        raise error("first\nsecond")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    assert "tracker=wandb" in refused(capsys, wandb_arguments())


def test_a_folder_in_the_place_of_the_package_is_no_package(workdir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    assert "pip install wandb" in refused(capsys, wandb_arguments())


# TensorBoard ----------------------------------------------------------------------------------


def scalars(metrics_of_steps):
    return {
        (name, step): value
        for step, metrics in metrics_of_steps.items()
        for name, value in metrics.items()
    }


def test_tensorboard_gets_every_line_of_the_log(workdir, writers):
    train.main(tensorboard_arguments())
    assert writers.shown[Path("out/tiny")] == scalars(logged())


def test_tensorboard_shows_every_step_of_a_resumed_run_once(workdir, writers):
    stop_in_step(7, tensorboard_arguments())
    train.main(tensorboard_arguments())
    assert writers.shown[Path("out/tiny")] == scalars(logged())


def test_tensorboard_shows_no_step_of_a_run_that_was_overwritten(workdir, writers):
    train.main(tensorboard_arguments(max_steps=4))
    train.main(tensorboard_arguments(max_steps=2, overwrite=True))
    assert writers.shown[Path("out/tiny")] == scalars(logged())


def test_tensorboard_is_closed_after_an_error(workdir, writers, capsys):
    with spoiled("loss", "nan", 3):
        refused(capsys, tensorboard_arguments())
    assert writers.closed == [Path("out/tiny")]


def test_an_error_of_tensorboard_at_the_end_does_not_end_the_run(workdir, writers, monkeypatch):
    monkeypatch.setattr(writers, "close", lambda writer: 1 / 0)
    train.main(tensorboard_arguments())
    assert max(logged()) == 12


# Both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_one_line_with_the_command_of_pip(
    workdir, capsys, monkeypatch, tracker, module
):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    assert f"pip install {tracker}" in refused(capsys, arguments(tracker=tracker))


@pytest.mark.parametrize("tracker", ["mlflow", "", "WandB"])
def test_an_unknown_tracker_is_one_line_that_names_the_known_ones(workdir, capsys, tracker):
    line = refused(capsys, arguments(tracker=tracker))
    assert "tracker=" in line
    assert "wandb" in line
    assert "tensorboard" in line


def test_the_tracker_may_change_when_a_run_is_resumed(workdir, sessions, writers):
    train.main(wandb_arguments(max_steps=4))
    train.main(tensorboard_arguments(max_steps=8))
    train.main(arguments(max_steps=10))
    train.main(wandb_arguments(max_steps=12))
    assert list(sessions[0].history) == [*range(5), *range(10, 13)]
    assert {step for _, step in writers.shown[Path("out/tiny")]} == set(range(4, 9))


def test_an_evaluation_alone_sends_and_writes_nothing(tiny_run, sessions):
    before = sorted(tiny_run.iterdir())
    train.main(wandb_arguments(eval_only=True))
    assert sessions == []
    assert sorted(tiny_run.iterdir()) == before


# A number more --------------------------------------------------------------------------------


def test_a_number_that_train_step_returns_reaches_log_console_and_tracker(
    workdir, sessions, capsys, monkeypatch
):
    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run: train_step(run) | {"weight_norm": 1.25})
    train.main(wandb_arguments())
    assert read_log(Path("out/tiny"))[1]["weight_norm"] == 1.25
    assert sessions[0].history[12]["weight_norm"] == 1.25
    lines = [line for line in capsys.readouterr().out.splitlines() if "weight_norm 1.25" in line]
    assert len(lines) == 3  # steps 5, 10 and 12


def test_a_number_that_evaluate_returns_reaches_log_console_and_tracker(
    workdir, sessions, capsys, monkeypatch
):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: evaluate(run) | {"accuracy": 0.25})
    train.main(wandb_arguments())
    assert [step for step, metrics in logged().items() if "accuracy" in metrics] == [0, 5, 10, 12]
    assert sessions[0].history[12]["accuracy"] == 0.25
    assert capsys.readouterr().out.count("accuracy 0.25") == 4
