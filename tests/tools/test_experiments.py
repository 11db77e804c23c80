"""experiments/: each runs in full at a tiny size, resumes, and measures what it says."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, refused, write_tiny

import train
from common import models
from common.dataloader import Loader
from common.errors import UserError
from common.pretrained import load_model
from experiments import (
    associative,
    convergence,
    costs,
    curves,
    full_layers,
    length,
    long_sequences,
    look,
    optimizers,
    quality,
    recall,
    report,
    runs,
    samples,
    steps,
    study,
)
from tools.bench.turns import run_in_new_process

ROOT = Path(__file__).parents[2]
EXPERIMENTS = [
    "quality",
    "costs",
    "convergence",
    "length",
    "uptraining",
    "samples",
    "recall",
    "long_sequences",
    "look",
    "curves",
    "optimizers",
    "associative",
    "full_layers",
]
REAL_SAVE_PLOT = study.save_plot
WITHOUT_PLOT = ("samples", "look", "costs")  # their results are texts or a table
SHAPE = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 32}
OTHER_SHAPE = SHAPE | {"n_head": 8}  # for size and speed, with another number of heads
RUN = {
    **TINY,
    "n_layer": 1,
    "n_head": 4,
    "n_embd": 32,
    "max_steps": 16,
    "eval_interval": 4,
    "total_batch_size": 64,
    "optimizer": "muon",
    "muon_learning_rate": 0.01,
}
del RUN["out_dir"]
each_experiment = pytest.mark.parametrize("name", EXPERIMENTS)
each_program = pytest.mark.parametrize("name", [*EXPERIMENTS, "report", "drawings"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a dataset, for all tests: a run or a point is made only once."""
    path = tmp_path_factory.mktemp("experiments")
    write_tiny(path)
    lines = [f"{key} = {value!r}\n" for key, value in RUN.items()]
    (path / "config").mkdir()
    (path / "config" / "tiny.py").write_text("".join(lines))
    return path


@pytest.fixture
def tiny(folder, monkeypatch):
    """The working directory of the experiments, whose cpu presets become tiny."""
    monkeypatch.chdir(folder)
    run_config = runs.Config("tiny", run=RUN, seeds=(1, 2), shape=OTHER_SHAPE, rounds=1)
    schedule = steps.Schedule(2)
    recall_config = recall.Config(shape=SHAPE, windows=(4, 8), schedule=schedule, tested=256)
    associative_config = associative.Config(
        shape=SHAPE,
        keys=8,
        pairs=(1, 2, 4),
        windows=(4,),
        tested=256,
        distances=(16, 32),
        seeds=(1, 2),
        schedule=schedule,
    )
    local_run = {"dataset": "tiny", "batch_size": 2, **SHAPE, "n_layer": 4, "n_kv_head": 4}
    local_config = full_layers.Config(local_run, schedule, eval_tokens=128, seeds=(1, 2))
    long_config = long_sequences.Config(n_embd=32, lengths=(512, 1024), rounds=1)
    monkeypatch.setitem(runs.PRESETS, "cpu", run_config)
    monkeypatch.setitem(recall.PRESETS, "cpu", recall_config)
    monkeypatch.setitem(associative.PRESETS, "cpu", associative_config)
    monkeypatch.setitem(full_layers.PRESETS, "cpu", local_config)
    monkeypatch.setitem(long_sequences.PRESETS, "cpu", long_config)
    monkeypatch.setitem(curves.PRESETS, "cpu", curves.Config(("tiny",)))
    rates = {"adamw_rates": (0.01,), "muon_rates": (0.01,)}
    optimizers_config = optimizers.Config(run=RUN, sizes={"tiny": {"max_steps": 4}}, **rates)
    monkeypatch.setitem(optimizers.PRESETS, "cpu", optimizers_config)
    monkeypatch.setitem(samples.PROMPTS, "tiny", "def ")
    monkeypatch.setattr(study, "save_plot", lambda *arguments: None)  # tested below
    for module in (costs, long_sequences):  # a new process takes seconds; one test below starts one
        monkeypatch.setattr(module, "run_in_new_process", call_in_this_process)
    return folder


def call_in_this_process(function, *arguments):
    return 0.001 + function(*arguments)  # the peak of this process may not grow; a plot needs > 0


def run_experiment(name):
    importlib.import_module(f"experiments.{name}").main(["--preset=cpu"])


# Every experiment -----------------------------------------------------------------------------


@each_experiment
def test_an_experiment_writes_a_result_file_with_points(tiny, name):
    run_experiment(name)
    text = (tiny / "docs" / "experiments" / f"{name}_cpu.json").read_text(encoding="utf-8")
    assert json.loads(text)["points"]
    assert "NaN" not in text


@each_experiment
def test_a_result_file_says_how_it_was_made(tiny, name):
    run_experiment(name)
    state = json.loads((tiny / "docs" / "experiments" / f"{name}_cpu.json").read_text())
    assert state["experiment"] == name
    assert state["preset"] == "cpu"
    assert state["config"]
    assert state["machine"]["device"]
    assert state["versions"]["torch"] == torch.__version__
    assert state["commit"]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in WITHOUT_PLOT])
def test_an_experiment_draws_a_plot(tiny, name, monkeypatch):
    monkeypatch.setattr(study, "save_plot", REAL_SAVE_PLOT)
    run_experiment(name)
    assert (tiny / "docs" / "experiments" / f"{name}_cpu.png").stat().st_size > 10_000


@each_program
@pytest.mark.parametrize(
    "argument, named", [("--presett=cpu", "presett"), ("--preset=tpu", "preset")]
)
def test_an_unknown_option_or_preset_is_an_error_of_one_line(tiny, capsys, name, argument, named):
    main = importlib.import_module(f"experiments.{name}").main
    assert named in refused(capsys, [argument], main)


# Studies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_study_has_the_dtype_of_its_preset_and_its_file_says_so(tiny, dtype):
    presets = {"cpu": recall.Config(dtype=dtype)}
    some_study = study.Study("some", study.StudyConfig(), presets)
    assert some_study.dtype == getattr(torch, dtype)
    assert some_study.state["machine"]["dtype"] == dtype


def test_the_same_command_again_measures_no_point(tiny, monkeypatch):
    run_experiment("costs")
    for name in ("compute_size", "measure_speed", "measure_step_memory"):
        monkeypatch.setattr(costs, name, lambda *arguments: pytest.fail("measured again"))
    run_experiment("costs")


def measured_keys(keys):
    """Take up a study, measure these points; return the keys for which a function was called."""
    some_study = study.Study("some", study.StudyConfig(), {"cpu": runs.Config("tiny", run={})})
    calls = []
    for key in keys:
        some_study.measure_once(key, calls.append, key)
    return calls


def test_an_interrupted_study_resumes_with_the_next_point(tiny):
    assert measured_keys("ab") == ["a", "b"]
    assert measured_keys("abc") == ["c"]


def measure_number_of_seeds(seeds, **options):
    presets = {"cpu": runs.Config("tiny", run={}, seeds=seeds)}
    changed_study = study.Study("changed", study.StudyConfig(**options), presets)
    return changed_study.measure_once("a", len, seeds)


def test_points_of_another_config_are_measured_again(tiny, capsys):
    assert measure_number_of_seeds((1,)) == 1
    assert measure_number_of_seeds((1, 2)) == 2
    assert "another config" in capsys.readouterr().out


def test_points_of_another_commit_are_kept_and_reported(tiny, capsys, monkeypatch):
    assert measured_keys("x") == ["x"]
    monkeypatch.setattr(study, "current_commit", lambda: "another")
    assert measured_keys("xy") == ["y"]
    state = json.loads((tiny / "out/experiments/some_cpu.json").read_text())
    assert state["commits"]["y"] == "another"
    assert state["commits"]["x"] != "another"
    assert state["commits"]["x"][:10] in capsys.readouterr().out


def test_a_file_with_one_commit_for_all_points_is_resumed(tiny):
    assert measured_keys("p") == ["p"]
    path = tiny / "out/experiments/some_cpu.json"
    state = json.loads(path.read_text())
    del state["commits"]
    path.write_text(json.dumps(state))
    assert measured_keys("pq") == ["q"]
    assert json.loads(path.read_text())["commits"]["p"] == state["commit"]


def test_another_dataset_gets_a_result_file_of_its_own(tiny, monkeypatch):
    monkeypatch.setattr(quality, "variants", lambda shape: {"base": {"model": "model"}})
    (tiny / "data" / "other").symlink_to(tiny / "data" / "tiny")
    quality.main(["--preset=cpu", "--dataset=other"])
    state = json.loads((tiny / "docs/experiments/quality_cpu_other.json").read_text())
    assert state["config"]["run"]["dataset"] == "other"


def test_the_comparisons_are_paired_differences_of_the_final_losses(tiny):
    run_experiment("quality")
    state = json.loads((tiny / "docs/experiments/quality_cpu.json").read_text())
    rows = quality.comparisons(state).splitlines()[2:]
    assert len(rows) == len(quality.COMPARISONS)
    points = state["points"]
    values = [points[f"MQA, seed {s}"]["val_loss"] for s in (1, 2)]
    others = [points[f"GQA 1/4, seed {s}"]["val_loss"] for s in (1, 2)]
    difference = (values[0] - others[0] + values[1] - others[1]) / 2
    (row,) = [row for row in rows if row.startswith("| MQA | GQA 1/4 |")]
    assert f"{difference:+.4f}" in row


def test_the_last_difference_over_the_steps_is_that_of_the_final_losses(tiny):
    run_experiment("quality")
    state = json.loads((tiny / "docs/experiments/quality_cpu.json").read_text())
    rows = quality.differences_over_steps(state).splitlines()[2:]
    final = quality.losses(state).splitlines()[3:]  # after the base
    assert len(rows) == len(final) == 9
    for row, final_row in zip(rows, final, strict=True):
        assert row.split(" | ")[-1].removesuffix(" |") == final_row.split(" | ")[3]


def test_an_experiment_without_a_corpus_refuses_a_dataset(tiny):
    with pytest.raises(UserError, match="dataset"):
        recall.main(["--dataset=tiny"])


def test_an_unfinished_study_is_published_without_the_models_that_lack_seeds(tiny, monkeypatch):
    trained = []

    def stop_at_the_third_run(config, name, seed):
        trained.append((name, seed))
        if len(trained) == 3:
            raise UserError("stopped")
        return measure_quality(config, name, seed)

    measure_quality = quality.measure_quality
    monkeypatch.setattr(quality, "measure_quality", stop_at_the_third_run)
    with pytest.raises(UserError):
        quality.main(["--preset=cpu", "--overwrite=True"])
    state = json.loads((tiny / "docs/experiments/quality_cpu.json").read_text())
    assert quality.measured_variants(state) == ["base"]
    assert "RoPE" not in quality.losses(state)
    (tiny / "out/experiments/quality_cpu.json").unlink()  # for the other tests


# Measurements ---------------------------------------------------------------------------------


def test_loss_by_position_is_the_loss_of_the_windows(tiny):
    config = runs.PRESETS["cpu"]
    T = config.run["block_size"]
    cpu = torch.device("cpu")
    parts = length.measure_loss_by_position(config, "RoPE", 1, cpu)
    model, _ = load_model(runs.train_variant(config, "RoPE", 1))
    loader = Loader(Path("data/tiny"), 4 * T, vocab_size=257, seed=0)
    x, y = next(loader.val_batches(config.run["eval_tokens"], 100))
    logits = model.eval()(x)[:, -2:]  # the last part is two positions
    loss = F.cross_entropy(logits.flatten(0, 1), y[:, -2:].flatten(), ignore_index=-1)
    assert len(parts) == 4 * length.PARTS
    assert parts[-1] == pytest.approx(loss.item(), abs=1e-5)


def recall_batch():
    """Return inputs, targets, distances and, for each row, where the token to recall is."""
    config = recall.Config()
    x, y, distance = recall.make_batch(config, 64, torch.Generator().manual_seed(0))
    is_recalled = x >= config.vocab_size // 2
    return x, y, distance, is_recalled


def test_a_sequence_holds_one_token_to_recall():
    *_, is_recalled = recall_batch()
    assert is_recalled.sum(1).tolist() == [1] * 64


def test_the_token_to_recall_is_the_target_from_its_position_on():
    x, y, _, is_recalled = recall_batch()
    for row, position in enumerate(is_recalled.int().argmax(1).tolist()):
        token = x[row, position].item()
        after = x.size(1) - position
        assert y[row].tolist() == [-1] * position + [token] * after


def test_the_distance_counts_from_the_token_to_recall():
    x, _, distance, is_recalled = recall_batch()
    for row, position in enumerate(is_recalled.int().argmax(1).tolist()):
        assert distance[row].tolist() == [t - position for t in range(x.size(1))]


PAIRS = torch.tensor([1, 2, 4, 4])


def associative_batch():
    config = associative.Config(shape=SHAPE, keys=8)
    generator = torch.Generator().manual_seed(0)
    x, y, distance = associative.make_batch(config, len(PAIRS), PAIRS, generator)
    return config.keys, x, y, distance


def test_a_sequence_has_one_target_for_each_pair():
    _, _, y, _ = associative_batch()
    assert (y != -1).sum(1).tolist() == PAIRS.tolist()


def test_a_target_is_the_value_after_the_first_occurrence_of_its_key():
    K, x, y, distance = associative_batch()
    for row, t in (y != -1).nonzero().tolist():
        key, first = x[row, t], t - distance[row, t]
        assert key < K
        assert (x[row] == key).nonzero()[:, 0].tolist() == [first, t]
        assert y[row, t] == x[row, first + 1] == x[row, t + 1]
        assert K <= y[row, t] < 2 * K


def test_all_other_tokens_of_a_sequence_are_noise():
    K, x, _, _ = associative_batch()
    assert (x < 2 * K).sum(1).tolist() == (4 * PAIRS).tolist()
    assert x.max() < 3 * K


def test_every_fourth_layer_of_the_local_model_is_full():
    shape = {**SHAPE, "n_layer": 8, "n_kv_head": 4, "window": 8, "vocab_size": 9}
    model = full_layers.LocalGlobalGPT(full_layers.MODEL.GPTConfig(**shape))
    windows = [block.attn.window for block in model.transformer.h]
    assert windows == 2 * [8, 8, 8, SHAPE["block_size"]]


def test_a_full_layer_lets_the_last_token_depend_on_the_first():
    shape = {**SHAPE, "n_layer": 4, "n_kv_head": 4, "window": 2, "vocab_size": 9}
    torch.manual_seed(0)
    x = torch.randint(9, (1, 32))
    changed = x.clone()
    changed[0, 0] = (x[0, 0] + 1) % 9
    local = full_layers.MODEL.GPT(full_layers.MODEL.GPTConfig(**shape))
    mixed = full_layers.LocalGlobalGPT(full_layers.MODEL.GPTConfig(**shape))
    assert torch.equal(local(x)[:, -1], local(changed)[:, -1])
    assert not torch.allclose(mixed(x)[:, -1], mixed(changed)[:, -1], atol=1e-7)


def test_train_on_equals_train_py(tiny):
    """The loop for data made on the spot takes the same steps as train.py on the same batches."""
    config = runs.PRESETS["cpu"]
    options = config.run | {"grad_clip": 1.0, "dropout": 0.0, "seed": 5}
    out_dir = runs.train_run("train-on", options)
    model, _ = load_model(out_dir)
    torch.manual_seed(5)
    start = models.model_module("model").GPT(model.config)
    fields = [field.name for field in dataclasses.fields(steps.Schedule)]
    defaults = train.TrainConfig
    schedule = steps.Schedule(
        **{name: options.get(name, getattr(defaults, name)) for name in fields}
    )
    loader = Loader(Path("data/tiny"), options["block_size"], 257, seed=5)
    B = options["total_batch_size"] // options["block_size"]
    steps.train_on(
        start,
        lambda step: loader.train_batch(step * B, B),
        schedule,
        torch.device("cpu"),
        torch.float32,
    )
    for p, q in zip(start.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


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
    field = look.receptive_field(steps.build_model(shape), 12)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    assert torch.equal(field, (i >= j) & (i - j <= layers * (window - 1)))


def test_step_memory_grows_by_weights_gradients_and_optimizer_state():
    shape = {
        "model": "model",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 64,
        "vocab_size": 257,
    }
    arguments = (1, 64, torch.device("cpu"), torch.float32)
    small = steps.measure_step_memory(shape, *arguments)
    wide = {**shape, "n_embd": 1024}
    large = run_in_new_process(steps.measure_step_memory, wide, *arguments)
    weights = 12 * 1024 * 1024
    gigabytes = 4 * 4 * weights / 1e9  # float32 weights, gradients and two moments of AdamW
    assert large - small > 0.9 * gigabytes


def test_the_step_of_a_loss_is_interpolated_between_evaluations():
    assert convergence.step_of_loss([[0, 5.0], [10, 4.0], [20, 2.0]], 3.0) == 15


def test_a_loss_that_a_curve_never_reaches_has_no_step():
    assert convergence.step_of_loss([[0, 5.0], [10, 4.0]], 3.0) is None


# The report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=str)
def test_the_tables_are_those_of_the_result_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    assert report.fill(text) == text


def test_a_table_without_its_result_file_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"experiments\.quality --preset=gpu"):
        report.fill("<!-- begin quality.losses gpu -->\n<!-- end -->")


def test_the_table_of_times_sums_the_seconds_of_all_points(tiny):
    run_experiment("quality")
    path = tiny / "docs/experiments/quality_cpu.json"
    state = json.loads(path.read_text())
    assert state["seconds"].keys() == state["points"].keys()
    state["seconds"] = dict.fromkeys(state["points"], 3.0)
    path.write_text(json.dumps(state))
    minutes = len(state["points"]) * 3 / 60
    [row] = [line for line in report.times("cpu").splitlines() if "quality" in line]
    assert row.split("|")[-2].strip() == f"{minutes:.1f}"


def test_the_table_of_times_says_which_times_are_unknown(tiny):
    run_experiment("quality")
    path = tiny / "docs/experiments/quality_cpu.json"
    state = json.loads(path.read_text())
    del state["seconds"]["base, seed 1"]
    path.write_text(json.dumps(state))
    [row] = [line for line in report.times("cpu").splitlines() if "quality" in line]
    assert "not recorded" in row


def test_every_result_file_is_of_one_commit_without_changes():
    files = sorted((ROOT / "docs" / "experiments").glob("*.json"))
    assert files
    for file in files:
        state = json.loads(file.read_text(encoding="utf-8"))
        assert re.fullmatch("[0-9a-f]{40}", state["commit"]), file
