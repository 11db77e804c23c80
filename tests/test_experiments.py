"""experiments/: every one runs whole at tiny sizes, goes on where it stopped, and measures what it says."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_tiny

from common.dataloader import Loader
from common.pretrained import load_model
from experiments import (
    curves,
    length,
    long_sequences,
    look,
    recall,
    report,
    runs,
    samples,
    steps,
    study,
    table,
)

ROOT = Path(__file__).parent.parent
EXPERIMENTS = [
    "table",
    "convergence",
    "length",
    "uptraining",
    "samples",
    "recall",
    "long_sequences",
    "look",
    "curves",
]
RUN = {
    "n_layer": 1,
    "n_head": 4,
    "n_embd": 32,
    "max_steps": 16,
    "eval_interval": 4,
    "total_batch_size": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory that the experiments share, as a user's; trained models are found again."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture
def tiny(folder, monkeypatch):
    if not (folder / "data").exists():
        write_tiny(folder)
    monkeypatch.chdir(folder)
    run = {key: value for key, value in (TINY | RUN).items() if key != "out_dir"}
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 32}
    monkeypatch.setitem(
        runs.PRESETS, "cpu", runs.Config(run=run, seeds=(1,), shape=shape, rounds=1)
    )
    monkeypatch.setitem(
        recall.PRESETS, "cpu", recall.Config(shape=shape, windows=(4, 8), max_steps=2, tested=64)
    )
    monkeypatch.setitem(
        long_sequences.PRESETS,
        "cpu",
        long_sequences.Config(n_embd=32, lengths=(512, 1024), rounds=1),
    )
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "tiny.py").write_text(
        "".join(f"{key} = {value!r}\n" for key, value in run.items())
    )
    monkeypatch.setitem(curves.PRESETS, "cpu", curves.Config(("tiny",)))
    monkeypatch.setitem(samples.PROMPTS, "tiny", "def ")
    for module in (table, long_sequences):  # spawning takes seconds; one test below does it
        monkeypatch.setattr(
            module, "in_new_process", lambda function, *arguments: 0.001 + function(*arguments)
        )
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_writes_a_result_file_that_says_how_it_was_made_and_a_plot(tiny, name):
    importlib.import_module(f"experiments.{name}").main(["--preset=cpu"])
    state = json.loads((tiny / "docs" / "experiments" / f"{name}_cpu.json").read_text())
    assert state["experiment"] == name and state["preset"] == "cpu" and state["config"]
    assert (
        state["machine"]["device"]
        and state["versions"]["torch"] == torch.__version__
        and state["commit"]
    )
    assert state["points"] and "NaN" not in json.dumps(state)
    if name not in ("samples", "look"):
        assert (tiny / "docs" / "experiments" / f"{name}_cpu.png").stat().st_size > 10_000


def test_the_same_command_again_measures_nothing_anew(tiny, monkeypatch):
    table.main(["--preset=cpu"])
    for name in ("quality", "size", "speed", "step_memory"):
        monkeypatch.setattr(table, name, lambda *arguments: pytest.fail("measured again"))
    table.main(["--preset=cpu"])


def test_a_study_that_was_interrupted_goes_on_with_the_next_point(tiny):
    def measured(fail):
        one = study.Study("some", study.StudyConfig(), {"cpu": runs.Config(run={})})
        calls = []
        for key in "abc":
            if key == fail:
                return calls
            one.point(key, lambda key=key: calls.append(key))
        return calls

    assert measured("c") == ["a", "b"]
    assert measured(None) == ["c"]


def test_points_of_another_commit_or_configuration_are_measured_anew(tiny, capsys):
    for seeds in ((1,), (1, 2)):
        one = study.Study("changed", study.StudyConfig(), {"cpu": runs.Config(run={}, seeds=seeds)})
        assert one.point("a", lambda seeds=seeds: len(seeds)) == len(seeds)
    assert "measured with another config" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*EXPERIMENTS, "report"])
def test_what_it_does_not_know_is_one_line(tiny, capsys, name):
    main = importlib.import_module(f"experiments.{name}").main
    for argument in ("--presett=cpu", "--preset=tpu"):
        with pytest.raises(SystemExit) as stopped:
            main([argument])
        assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_loss_by_position_is_the_loss_of_the_windows(tiny):
    config = runs.PRESETS["cpu"]
    parts = length.loss_by_position(config, "RoPE", 1, torch.device("cpu"))
    model, T = load_model(runs.run_of(config, "RoPE", 1))[0].eval(), config.run["block_size"]
    x, y = next(
        Loader(Path("data/tiny"), 4 * T, 257, 0).val_batches(config.run["eval_tokens"], 100)
    )
    last = F.cross_entropy(model(x)[:, -2:].flatten(0, 1), y[:, -2:].flatten(), ignore_index=-1)
    assert len(parts) == 4 * length.PARTS
    assert parts[-1] == pytest.approx(last.item(), abs=1e-5)


def test_what_is_to_be_recalled_stands_at_the_distance():
    config = recall.Config()
    x, y, distance = recall.batch(config, 64, torch.Generator().manual_seed(0))
    for row in range(64):
        (place,) = (
            (x[row] >= config.vocab_size // 2).nonzero()[0].tolist()
        )  # the only token of the other kind
        assert distance[row].tolist() == [t - place for t in range(config.shape["block_size"])]
        assert y[row].tolist() == [
            x[row, place] if t >= place else -1 for t in range(config.shape["block_size"])
        ]


@pytest.mark.parametrize("layers, window", [(1, 1), (1, 4), (2, 3)])
def test_look_draws_the_receptive_field_of_stacked_windows(layers, window):
    shape = {
        "model": "model_swa",
        "n_layer": layers,
        "n_head": 2,
        "n_embd": 16,
        "window": window,
        "vocab_size": 50,
    }
    torch.manual_seed(0)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    assert torch.equal(
        look.sight(steps.build(shape), 12), (i >= j) & (i - j <= layers * (window - 1))
    )


def test_more_heads_and_layers_take_more_memory_in_a_new_process():
    shape = {
        "model": "model",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 64,
        "vocab_size": 257,
    }
    given = (1, 64, torch.device("cpu"), torch.float32)
    small = steps.step_memory(shape, *given)
    large = steps.in_new_process(steps.step_memory, shape | {"n_embd": 1024}, *given)
    weights = 1024 * 1024 * 12 * 4 * 4 / 1e9  # with gradients and the optimizer's two moments
    assert large - small > 0.9 * weights


def test_a_difference_within_the_seeds_spread_is_none():
    assert table.verdict([1.0, 1.2], [1.1, 1.15]) == "no difference shown"
    assert table.verdict([1.0, 1.01], [1.1, 1.15]) == "-0.1200"


# The report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=str)
def test_the_tables_are_those_of_the_result_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    assert report.fill(text) == text


def test_every_result_file_is_of_one_commit_without_changes():
    files = sorted((ROOT / "docs" / "experiments").glob("*.json"))
    assert files
    for file in files:
        assert re.fullmatch(
            "[0-9a-f]{40}", json.loads(file.read_text(encoding="utf-8"))["commit"]
        ), file
