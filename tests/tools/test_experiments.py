"""experiments/: each runs in full at a tiny size, resumes, and measures what it says."""

import importlib
import itertools
import json
import re
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, refused, write_tiny
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from common.dataloader import Loader
from common.errors import UserError
from common.pretrained import load_model
from experiments import (
    associative,
    convergence,
    costs,
    curves,
    extension,
    full_layers,
    heads,
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
from tools.results import plot, result_file
from tools.results.turns import run_in_new_process

ROOT = Path(__file__).parents[2]
EXPERIMENTS = (
    "quality costs convergence uptraining samples recall long_sequences look curves "
    "optimizers associative full_layers heads extension"
).split()
WITHOUT_PLOT = ("samples", "look", "costs")  # their results are texts or a table
SHAPE = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 32}
OTHER_SHAPE = SHAPE | {"n_head": 8}  # for size and speed, with another number of heads
RUN = {
    **TINY,
    "n_layer": 1,
    "n_head": 4,
    "n_embd": 32,
    "max_steps": 10,
    "eval_interval": 5,
    "checkpoint_interval": 10,
    "total_batch_size": 64,
    "optimizer": "muon",
    "muon_learning_rate": 0.01,
}
del RUN["out_dir"]
DOCUMENTS = [path.relative_to(ROOT) for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
each_experiment = pytest.mark.parametrize("name", EXPERIMENTS)


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
    rounds = 0.1  # one, also where the experiments take ten times as many
    run_config = runs.Config("tiny", run=RUN, seeds=(1, 2), shape=OTHER_SHAPE, rounds=rounds)
    training = steps.TRAINING | {"max_steps": 2}
    recall_config = recall.Config(
        shape=SHAPE, windows=(4, 8), training=training, tested=256, seeds=(1, 2)
    )
    associative_config = associative.Config(
        shape=SHAPE,
        keys=8,
        pairs=(1, 2, 4),
        windows=(4,),
        tested=256,
        distances=(16, 32),
        seeds=(1, 2),
        training=training,
    )
    local_run = {"dataset": "tiny", "batch_size": 2, **SHAPE, "n_layer": 4, "n_kv_head": 4}
    local_config = full_layers.Config(local_run, training, eval_tokens=128, seeds=(1, 2))
    long_config = long_sequences.Config(n_embd=32, window=16, lengths=(32, 64), rounds=rounds)
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
    monkeypatch.setattr(samples, "variants", lambda run: {"base": {}, "all three": {}})
    monkeypatch.setattr(study, "save_lines", lambda *arguments: None)  # tested below
    for module in (costs, long_sequences):  # a new process takes seconds; one test below starts one
        monkeypatch.setattr(module, "run_in_new_process", call_in_this_process)
    monkeypatch.setattr(costs, "measure_step_memory", lambda shape, B, device, dtype: 0.5)
    monkeypatch.setattr(costs, "DECODING", ("base", "all three"))
    return folder


def call_in_this_process(function, *arguments):
    return 0.001 + function(*arguments)  # the peak of this process may not grow; a plot needs > 0


def run_experiment(name, *argv):
    importlib.import_module(f"experiments.{name}").main(["--preset=cpu", *argv])


def published(name):
    return result_file.read_result(f"docs/experiments/{name}_cpu.json")


# Every experiment -----------------------------------------------------------------------------


@each_experiment
def test_an_experiment_writes_a_result_file_with_points(tiny, name):
    run_experiment(name)
    text = (tiny / "docs" / "experiments" / f"{name}_cpu.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert result["values"]
    assert result["command"] == f"python -m experiments.{name} --preset=cpu"
    assert "NaN" not in text


def test_a_result_file_says_how_it_was_made(tiny):
    run_experiment("look")
    result = published("look")
    assert result["name"] == "look"
    assert result["config"]
    assert result["machine"]["device"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["commit"]


@each_experiment
def test_an_experiment_prints_its_tables_at_the_end(tiny, capsys, name):
    run_experiment(name)
    capsys.readouterr()
    run_experiment(name)  # nothing is left to measure
    table, path = capsys.readouterr().out.rstrip().rsplit("\n\n", 1)
    assert path == f"docs/experiments/{name}_cpu.json"
    assert "| --- |" in table or "```" in table


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in WITHOUT_PLOT])
def test_an_experiment_plots_lines_in_each_panel(tiny, name, monkeypatch):
    panels = []

    def draw_without_file(draw, count, size, path):
        panels[:] = Figure(size).subplots(1, count, squeeze=False)[0]
        draw(*panels)

    monkeypatch.setattr(study, "save_lines", plot.save_lines)
    monkeypatch.setattr(plot, "save_figure", draw_without_file)  # rendering takes longest
    run_experiment(name)
    assert panels and all(panel.lines for panel in panels)


def test_the_plot_of_an_experiment_is_beside_its_result_file(tiny, monkeypatch):
    monkeypatch.setattr(study, "save_lines", plot.save_lines)
    run_experiment("curves")
    assert (tiny / "docs/experiments/curves_cpu.png").stat().st_size > 10_000


@each_experiment
def test_an_unknown_preset_is_an_error_of_one_line(tiny, capsys, name):
    main = importlib.import_module(f"experiments.{name}").main
    assert "preset=tpu" in refused(capsys, ["--preset=tpu"], main)


# The plots of quality -------------------------------------------------------------------------

QUALITY = sorted((ROOT / "docs/experiments").glob("quality_*.json"))


@pytest.fixture(params=QUALITY, ids=lambda path: path.stem)
def drawn_quality(request, monkeypatch):
    """A published result of experiments/quality.py, and the figure that is saved for it."""
    result = result_file.read_result(request.param)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    plot.save_lines(result, quality.draw, "quality.png")
    [figure] = figures
    figure.draw_without_rendering()
    return result, figure


def texts_of(panel):
    """Return the texts of a panel: the labels of its axes and ticks, and those at its points."""
    low, high = panel.get_xlim()
    ticks = [label for label in panel.get_xticklabels() if low <= label.get_position()[0] <= high]
    texts = [*ticks, *panel.get_yticklabels(), panel.xaxis.label, panel.yaxis.label, *panel.texts]
    return [text for text in texts if text.get_text()]


def points_of(panel):
    """Return the points of a panel: matplotlib's lines of one point, from the top to the bottom."""
    points = [line for line in panel.lines if line.get_marker() in "oDPs^"]
    return sorted(points, key=lambda point: point.get_ydata()[0])


def test_no_text_of_the_plot_of_quality_overlaps_a_text_or_a_point(drawn_quality):
    result, figure = drawn_quality
    texts = [text for panel in figure.axes for text in texts_of(panel)]
    assert len(texts) > 2 * len(quality.final_losses(result))
    boxes = [text.get_window_extent() for text in texts]
    for panel in figure.axes:
        boxes += [point.get_window_extent() for point in points_of(panel)]
    for box, other in itertools.combinations(boxes, 2):
        assert not box.overlaps(other)


def test_the_plot_of_quality_has_a_row_for_each_model_the_lowest_loss_at_the_top(drawn_quality):
    result, figure = drawn_quality
    final = {name: mean(losses) for name, losses in quality.final_losses(result).items()}
    labels = [quality.LOOKS[name][0] for name in sorted(final, key=final.get)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == labels
    for panel in figure.axes:
        bottom, top = panel.get_ylim()
        assert bottom > top  # row 0 is the upper one


def test_a_model_has_the_same_color_and_marker_in_both_halves_and_no_two_are_equal(drawn_quality):
    result, figure = drawn_quality
    left, right = (
        [(point.get_color(), point.get_marker()) for point in points_of(panel)]
        for panel in figure.axes
    )
    assert left == right
    assert len(left) == len(quality.final_losses(result))
    assert len({color for color, _ in left}) == len(left)
    assert quality.LOOKS.keys() == runs.variants(runs.PRESETS["cpu"].run).keys()


def lightness(color):
    """Return about how light a color looks (CIE L*): 0 is black and 100 white."""
    red, green, blue = (channel**2.2 for channel in to_rgb(color))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * luminance ** (1 / 3) - 16


def test_models_with_the_same_marker_differ_in_lightness():
    pairs = itertools.combinations(quality.LOOKS.values(), 2)
    for (_, color, marker), (_, other, other_marker) in pairs:
        if marker == other_marker:
            assert abs(lightness(color) - lightness(other)) > 12


# Studies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_study_has_the_dtype_of_its_preset_and_its_file_says_so(tiny, dtype):
    presets = {"cpu": recall.Config(dtype=dtype)}
    some_study = study.Study("some", study.StudyConfig(), presets)
    assert some_study.dtype == getattr(torch, dtype)
    assert some_study.result["machine"]["dtype"] == dtype


def test_the_same_command_again_measures_no_point(tiny, monkeypatch):
    run_experiment("costs")
    for name in ("compute_size", "measure_speed", "measure_step_memory"):
        monkeypatch.setattr(costs, name, lambda *arguments: pytest.fail("measured again"))
    run_experiment("costs")


def measured_keys(keys, **options):
    """Run a study of these rows; return the keys for which a function was called."""
    config = runs.Config("tiny", run={}, seeds=(1, 2))
    some_study = study.Study("some", study.StudyConfig(**options), {"cpu": config})
    calls = []

    def measure(config, row, seed):
        calls.append(f"{row}{seed}")
        return seed

    some_study.add_seeds(keys, measure)
    some_study.run(list_rows)
    return calls


def list_rows(result):
    """Return the rows that the tables of a study would have."""
    return f"rows: {study.complete_rows(result, 'abcdefghxy')}"


def test_an_interrupted_study_resumes_with_the_next_point(tiny):
    assert measured_keys("ab") == ["a1", "a2", "b1", "b2"]
    assert measured_keys("abc") == ["c1", "c2"]


def test_a_study_says_what_it_measures_and_how_many_points_remain(tiny, capsys):
    measured_keys("d", overwrite=True)
    lines = capsys.readouterr().out.splitlines()
    assert "0 of 2 points are stored" in lines
    assert "measuring d, seed 1; after it 1 remain" in lines
    assert "measuring d, seed 2; after it 0 remain" in lines


def test_only_and_seeds_choose_points_and_leave_docs_alone(tiny, capsys):
    assert measured_keys("ef", only="f", seeds="2", overwrite=True) == ["f2"]
    assert "rows: {'f': [2]}" in capsys.readouterr().out
    assert "f, seed 2" not in published("some")["values"]
    assert measured_keys("ef") == ["e1", "e2", "f1"]  # f2 is stored
    assert "f, seed 2" in published("some")["values"]


def test_an_unfinished_study_does_not_replace_a_published_one_with_more_points(tiny):
    measured_keys("gh", overwrite=True)
    before = published("some")["values"]
    config = runs.Config("tiny", run={}, seeds=(1, 2))
    again = study.Study("some", study.StudyConfig(overwrite=True), {"cpu": config})
    again.add_seeds("g", lambda config, row, seed: "new")
    again.add("i", "i", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again.run()
    assert published("some")["values"] == before


def test_two_processes_with_other_seeds_store_their_points_in_one_file(tiny):
    measured_keys("j", overwrite=True, seeds="1")

    def measure_the_second_seed(config, row, seed):
        measured_keys("j", seeds="2")  # another process, while this one measures
        return "first"

    presets = {"cpu": runs.Config("tiny", run={}, seeds=(1, 2))}
    first = study.Study("some", study.StudyConfig(overwrite=True, seeds="1"), presets)
    first.add_seeds("j", measure_the_second_seed)
    first.run()
    values = result_file.read_result("out/experiments/some_cpu.json")["values"]
    assert values == {"j, seed 1": "first", "j, seed 2": 2}


@pytest.mark.parametrize("options, named", [({"only": "z"}, "only=z"), ({"seeds": "1,3"}, "1,3")])
def test_a_row_or_a_seed_that_the_study_lacks_is_refused(tiny, options, named):
    with pytest.raises(UserError, match=named):
        measured_keys("ab", **options)


def measure_number_of_seeds(seeds, **options):
    presets = {"cpu": runs.Config("tiny", run={}, seeds=seeds)}
    changed_study = study.Study("changed", study.StudyConfig(**options), presets)
    changed_study.add("a", "a", len, seeds)
    changed_study.run()
    return changed_study.result["values"]["a"]


def test_points_of_another_config_are_measured_again(tiny, capsys):
    assert measure_number_of_seeds((1,)) == 1
    assert measure_number_of_seeds((1, 2)) == 2
    assert "another config" in capsys.readouterr().out


def test_points_of_another_commit_are_kept_and_reported(tiny, capsys, monkeypatch):
    assert measured_keys("x", overwrite=True) == ["x1", "x2"]
    monkeypatch.setattr(result_file, "current_commit", lambda: "another")
    assert measured_keys("xy") == ["y1", "y2"]
    commits = published("some")["commits"]
    assert commits["y, seed 1"] == "another"
    assert commits["x, seed 1"] != "another"
    assert commits["x, seed 1"][:10] in capsys.readouterr().out


def test_another_dataset_gets_a_result_file_of_its_own(tiny, monkeypatch):
    monkeypatch.setattr(quality, "variants", lambda shape: {"base": {"model": "model"}})
    (tiny / "data" / "other").symlink_to(tiny / "data" / "tiny")
    quality.main(["--preset=cpu", "--dataset=other"])
    result = result_file.read_result("docs/experiments/quality_cpu_other.json")
    assert result["config"]["run"]["dataset"] == "other"
    assert result["command"].endswith("--dataset=other")


def test_the_comparisons_are_paired_differences_of_the_final_losses(tiny):
    run_experiment("quality")
    result = published("quality")
    rows = quality.comparisons(result).splitlines()[2:]
    assert len(rows) == len(quality.COMPARISONS)
    values = [result["values"][f"MQA, seed {s}"]["val_loss"] for s in (1, 2)]
    others = [result["values"][f"GQA 1/4, seed {s}"]["val_loss"] for s in (1, 2)]
    difference = (values[0] - others[0] + values[1] - others[1]) / 2
    (row,) = [row for row in rows if row.startswith("| MQA | GQA 1/4 |")]
    assert f"{difference:+.4f}" in row


def test_the_last_difference_over_the_steps_is_that_of_the_final_losses(tiny):
    run_experiment("quality")
    result = published("quality")
    rows = quality.differences_over_steps(result).splitlines()[2:]
    final = quality.losses(result).splitlines()[3:]  # after the base
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

    run_experiment("quality")
    complete = Path("out/experiments/quality_cpu.json").read_bytes()
    measure_quality = quality.measure_quality
    monkeypatch.setattr(quality, "measure_quality", stop_at_the_third_run)
    Path("docs/experiments/quality_cpu.json").unlink()
    with pytest.raises(UserError):
        quality.main(["--preset=cpu", "--overwrite=True"])
    result = published("quality")
    assert list(quality.measured_variants(result)) == ["base"]
    assert "RoPE" not in quality.losses(result)
    Path("out/experiments/quality_cpu.json").write_bytes(complete)  # for the other tests


# Measurements ---------------------------------------------------------------------------------


def test_loss_by_position_is_the_loss_of_the_windows(tiny):
    config = runs.PRESETS["cpu"]
    T = config.run["block_size"]
    cpu = torch.device("cpu")
    out_dir = runs.train_variant(config, "RoPE", 1)
    parts = extension.loss_by_position(config, out_dir, cpu)
    model, _ = load_model(out_dir)
    loader = Loader(Path("data/tiny"), 4 * T, vocab_size=257, seed=0)
    x, y = next(loader.val_batches(config.run["eval_tokens"], 100))
    logits = model.eval()(x)[:, -2:]  # the last part is two positions
    loss = F.cross_entropy(logits.flatten(0, 1), y[:, -2:].flatten(), ignore_index=-1)
    assert len(parts) == 4 * extension.PARTS
    assert parts[-1] == pytest.approx(loss.item(), abs=1e-5)


def test_a_remedy_changes_the_loss_of_the_rope_model_beyond_T_without_training(tiny):
    run_experiment("extension", "--seeds=1")
    values = result_file.read_result("out/experiments/extension_cpu.json")["values"]
    plain = values["RoPE, seed 1"]["before"]
    cpu = torch.device("cpu")
    config = runs.PRESETS["cpu"]
    assert plain == extension.loss_by_position(config, runs.train_variant(config, "RoPE", 1), cpu)
    for name in extension.REMEDIES:
        assert values[f"{name}, seed 1"]["before"] != plain


def test_further_training_is_on_longer_sequences_with_the_angles_of_the_remedy(tiny):
    run_experiment("extension", "--seeds=1")
    values = result_file.read_result("out/experiments/extension_cpu.json")["values"]
    after = {name: values[f"{name}, seed 1"]["after"] for name in extension.NAMES}
    assert after.pop("base") is None
    assert len({tuple(parts) for parts in after.values()}) == len(after)  # no two are equal
    for name in extension.REMEDIES:
        out_dir = extension.train_to_4T(runs.PRESETS["cpu"], name, 1)
        model, _ = load_model(out_dir)
        assert model.config.block_size == 4 * RUN["block_size"]


def test_a_span_is_the_mean_of_its_parts():
    parts = [1.0] * 8 + [2.0] * 8 + [3.0] * 8 + [5.0] * 8
    values = [{"before": parts, "after": None}, {"before": parts[:8], "after": None}]
    assert extension.spans_of(values[:1], "before") == {
        "up to T": [1.0],
        "T to 2T": [2.0],
        "2T to 4T": [4.0],
    }
    assert extension.spans_of(values[1:], "before") == {"up to T": [1.0]}
    assert extension.spans_of(values, "after") == {}


def test_heads_compares_each_rope_model_with_the_base_of_as_many_heads(tiny):
    run_experiment("heads")
    result = published("heads")
    rows = heads.rope_rows(result)
    assert list(rows) == [
        "RoPE, 4 heads of 8",
        "RoPE, 1 heads of 32",
        "RoPE, 2 heads of 16",
        "RoPE, 1/2 of the channels",
        "RoPE, 1/4 of the channels",
    ]
    base = {key: value for key, value in result["values"].items() if key.startswith("base")}
    assert rows["RoPE, 1 heads of 32"][1][0] == base["base, 1 heads of 32, seed 1"]
    assert rows["RoPE, 1/4 of the channels"][1][1] == base["base, 4 heads of 8, seed 2"]
    finals = [curves[0][-1][1] for curves, _ in rows.values()]
    assert len(set(finals)) == len(finals)  # each is another model


def test_an_effect_of_heads_is_a_difference_of_differences_from_the_base():
    run = runs.PRESETS["cpu_long"].run
    last = {"base, 8 heads of 16": (5, 6), "RoPE, 8 heads of 16": (4, 6)}
    last |= {"base, 2 heads of 64": (3, 4), "RoPE, 2 heads of 64": (2.5, 2.5)}
    values = {
        f"{name}, seed {seed}": [[0, 9.0], [100, losses[seed - 1]]]
        for name, losses in last.items()
        for seed in (1, 2)
    }
    result = {"config": {"run": run, "seeds": [1, 2]}, "values": values}
    [row] = heads.effects(result).splitlines()[2:]
    assert row.startswith("| RoPE, 2 heads of 64 | -0.5000 ±")  # (-0.5 + 1 + -1.5 - 0) / 2
    [plain, large] = heads.losses(result).splitlines()[2:]
    assert "| -0.5000 ±" in plain and "| -1.0000 ±" in large


def test_the_only_token_to_recall_is_the_target_from_its_position_on():
    config = recall.Config()
    x, y, distance = recall.make_batch(config, 64, torch.Generator().manual_seed(0))
    is_recalled = x >= config.vocab_size // 2
    assert is_recalled.sum(1).tolist() == [1] * 64
    for row, position in enumerate(is_recalled.int().argmax(1).tolist()):
        token = x[row, position].item()
        after = x.size(1) - position
        assert y[row].tolist() == [-1] * position + [token] * after
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


def test_a_variant_without_the_base_has_no_difference_from_it(tiny):
    run_experiment("quality", "--only=RoPE")
    values = result_file.read_result("out/experiments/quality_cpu.json")["values"]
    alone = {key: value for key, value in values.items() if key.startswith("RoPE, seed")}
    result = {"config": {"run": RUN, "seeds": [1, 2]}, "values": alone}
    [row] = quality.losses(result).splitlines()[2:]
    assert row.startswith("| RoPE | ") and row.endswith(" |  |  |")


def local_model(**options):
    shape = {"model": "model_rope_gqa_swa", **SHAPE, "n_kv_head": 4, "vocab_size": 9, **options}
    return steps.build_model(shape)


def test_every_fourth_layer_of_the_local_model_is_full():
    model = local_model(n_layer=8, window=8)
    full_layers.widen_every_fourth_layer(model)
    windows = [block.attn.window for block in model.transformer.h]
    assert windows == 2 * [8, 8, 8, SHAPE["block_size"]]


def test_a_full_layer_lets_the_last_token_depend_on_the_first():
    torch.manual_seed(0)
    x = torch.randint(9, (1, 32))
    changed = x.clone()
    changed[0, 0] = (x[0, 0] + 1) % 9
    model = local_model(n_layer=4, window=2)
    assert torch.equal(model(x)[:, -1], model(changed)[:, -1])
    full_layers.widen_every_fourth_layer(model)
    assert not torch.allclose(model(x)[:, -1], model(changed)[:, -1], atol=1e-7)


def test_a_run_on_batches_made_on_the_spot_trains_as_train_py_on_a_dataset(tiny):
    training = steps.TRAINING | {"max_steps": 16, "seed": 5, "warmup_steps": 3}
    options = runs.PRESETS["cpu"].run | training | {"grad_clip": 1.0, "dropout": 0.0}
    expected, _ = load_model(runs.train_run("on-the-spot", options))
    shape = {name: options.pop(name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    shape |= {"model": "model", "vocab_size": 257}
    loader = Loader(Path("data/tiny"), shape["block_size"], 257, seed=5)
    B = options["total_batch_size"] // shape["block_size"]
    cpu = torch.device("cpu")
    with steps.open_run(shape, B, cpu, torch.float32, **training) as run:
        run.loader = steps.Task(shape["block_size"], lambda step: loader.train_batch(step * B, B))
        steps.train_to_end(run)
    for p, q in zip(run.model.parameters(), expected.parameters(), strict=True):
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
    shape = {"model": "model", "n_layer": 1, "n_head": 2, "block_size": 64, "vocab_size": 257}
    arguments = (1, torch.device("cpu"), torch.float32)
    small = steps.measure_step_memory({**shape, "n_embd": 64}, *arguments)
    large = run_in_new_process(steps.measure_step_memory, {**shape, "n_embd": 512}, *arguments)
    weights = 12 * 512 * 512
    gigabytes = 4 * 4 * weights / 1e9  # float32 weights, gradients and two moments of AdamW
    assert large - small > 0.9 * gigabytes


def test_the_step_of_a_loss_is_interpolated_between_evaluations():
    assert convergence.step_of_loss([[0, 5.0], [10, 4.0], [20, 2.0]], 3.0) == 15
    assert convergence.step_of_loss([[0, 5.0], [10, 4.0]], 3.0) is None  # it is never reached


def test_in_equal_time_a_slower_model_takes_fewer_steps_with_a_schedule_of_their_own(tiny):
    config = runs.PRESETS["cpu"]
    values = {"step_seconds": {"base": 1.0, "RoPE": 2.0, "MQA": 0.8}}
    slow = convergence.measure_in_equal_time(config, "RoPE in the base's time", 1, values)
    fast = convergence.measure_in_equal_time(config, "MQA in the base's time", 1, values)
    assert (slow["steps"], fast["steps"]) == (5, 12)  # of 10
    curve = convergence.measure_curve(config, "RoPE", 1)
    assert curve[1][0] == 5
    assert slow["val_loss"] != curve[1][1]  # there the rate has not decayed


def test_equal_time_compares_a_seed_with_the_same_seed_of_the_base():
    run = runs.PRESETS["cpu"].run
    values = {
        f"{name}, seed {seed}": [[0, 9.0], [500, loss + seed]]
        for name, loss in {"base": 1.0, "RoPE": 0.5}.items()
        for seed in (1, 2)
    }
    for seed, lead in ((1, 0.2), (2, 0.4)):
        key = f"RoPE in the base's time, seed {seed}"
        values[key] = {"steps": 450, "val_loss": 1.0 + seed - lead}
    result = {"config": {"run": run, "seeds": [1, 2]}, "values": values}
    [row] = convergence.equal_time(result).splitlines()[2:]
    assert row.startswith("| RoPE | -0.5000 ± 0.0000 | 450 | 2.2000 ± ")
    assert "| -0.3000 ± " in row and "2 of 2 lower" in row


# The report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_the_tables_are_those_of_the_result_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    assert report.fill(text) == text


def test_a_table_without_its_result_file_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"experiments\.quality --preset=gpu"):
        report.fill("<!-- begin quality.losses gpu -->\n<!-- end -->")


def times_of_quality(**changes):
    """Return the row of quality in the table of times, after changing its seconds."""
    run_experiment("quality")
    result = published("quality")
    assert result["seconds"].keys() == result["values"].keys()
    result["seconds"] = dict.fromkeys(result["values"], 3.0) | changes
    result["seconds"] = {key: value for key, value in result["seconds"].items() if value}
    result_file.write_result(Path("docs/experiments/quality_cpu.json"), result)
    [row] = [line for line in report.times("cpu").splitlines() if "quality" in line]
    return row, len(result["values"])


def test_the_table_of_times_sums_the_seconds_of_all_points(tiny):
    row, count = times_of_quality()
    assert row.split("|")[-2].strip() == f"{count * 3 / 60:.1f}"


def test_the_table_of_times_has_the_longest_point(tiny):
    row, _ = times_of_quality(**{"MQA, seed 2": 90.0})
    assert row.split("|")[-3].strip() == "1.5"


def test_the_table_of_times_says_which_times_are_unknown(tiny):
    row, _ = times_of_quality(**{"base, seed 1": None})
    assert "not recorded" in row


def test_a_document_has_plot_tables_notes_and_source_of_each_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for device in ("cpu", "NVIDIA A10"):
        result = {
            "name": "train",
            "command": "python -m tools.bench train",
            "commit": "0123456789abcdef",
            "machine": {"device": device, "cpu": "a CPU", "threads": 2},
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
            "values": [{"contestant": "ours", "ms": {"median": 2.0, "min": 1.5, "max": 2.5}}],
            "notes": ["nanoGPT is skipped"],
        }
        result_file.write_result(Path(f"docs/bench/train-{device[:3]}.json".lower()), result)
    Path("docs/bench/train-cpu.png").touch()
    text = report.fill("<!-- begin bench train -->\n<!-- end -->")
    assert "![train](bench/train-cpu.png)" in text
    assert text.count("| ours | 2 (1.5 to 2.5) |") == 2
    assert text.count("nanoGPT is skipped.") == 2
    assert "NVIDIA A10, 2 threads" in text


@pytest.mark.parametrize("folder", ["experiments", "bench"])
def test_every_result_file_is_of_one_commit_without_changes(folder):
    files = sorted((ROOT / "docs" / folder).glob("*.json"))
    assert files
    for file in files:
        result = result_file.read_result(file)
        assert re.fullmatch("[0-9a-f]{40}", result["commit"]), file
