"""tools/bench: each benchmark at a tiny size, peers, budgets, result files, goals, the document."""

import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, write_dataset
from torch.utils.flop_counter import FlopCounterMode

import prepare_data
from common.dataloader import Loader
from common.errors import UserError
from common.models import model_module
from common.tokenizer import byte_tokenizer
from tools.bench import __main__ as bench
from tools.bench import (
    attention,
    data,
    document,
    goals,
    ladder,
    limits,
    nanogpt,
    overhead,
    results,
    sampling,
    training,
    turns,
)

ROOT = Path(__file__).parents[2]
SHAPE = {"n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 32, "vocab_size": 64}
CPU = torch.device("cpu")
RECIPE = training.Recipe("ours, AdamW", ("--max_steps=2", "--n_layer=1", "--eval_tokens=64"))
SHAKESPEARE = "ROMEO: to be, or not?\n" * 40
REAL_RUN_RECIPE = training.run_recipe

# Programs that stand in for nanoGPT's: they print what it prints, and write down what they were
# given. The copy's own "torch" spares the second that importing the real one takes.
STAND_INS = {
    "train.py": """
import pathlib, sys
name = "loss" if "config/train_shakespeare_char.py" in sys.argv else "train"
pathlib.Path(LOG, name).write_text("\\n".join(sys.argv[1:]))
if name == "loss":
    assert pathlib.Path("data/shakespeare_char/meta.pkl").exists()
    print("step 0: train loss 4.1, val loss 4.2000")
    print("step 2000: train loss 1.7, val loss 1.8860")
for i, ms in enumerate([900, 20, 20, 20]):
    print(f"iter {i}: loss 4.0, time {ms:.2f}ms, mfu 1.00%")
""",
    "model.py": """
class GPTConfig:
    def __init__(self, **options):
        assert options["n_embd"] == 16
class GPT:
    def __init__(self, config): pass
    def to(self, device): return self
    def eval(self): return self
    def generate(self, prompt, new_tokens): return prompt
""",
    "torch.py": """
import contextlib
long = "long"
no_grad = contextlib.nullcontext
class Tensor:
    def tolist(self): pass
def zeros(*shape, dtype, device): return Tensor()
""",
    "configurator.py": "",
    "config/train_shakespeare_char.py": "",
    "data/shakespeare_char/prepare.py": """
import pathlib
folder = pathlib.Path(__file__).parent
pathlib.Path(LOG, "text").write_bytes((folder / "input.txt").read_bytes())
(folder / "meta.pkl").write_bytes(b"")
""",
}


@pytest.fixture
def peer(tmp_path):
    """A directory that stands in for nanoGPT's; its programs write into tmp_path / "log"."""
    (tmp_path / "log").mkdir()
    for name, text in STAND_INS.items():
        path = tmp_path / "peer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("LOG", repr(str(tmp_path / "log"))))
    return tmp_path / "peer"


def call_in_this_process(function, *arguments):
    result = function(*arguments)
    # The peak of this process's memory may not grow, and a ratio needs a number above 0.
    return result + 1e-6 if isinstance(result, float) else result


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working directory with data sets, in which the benchmarks have tiny sizes."""
    monkeypatch.chdir(tmp_path)
    chars = sorted(set(SHAKESPEARE))
    ids = [chars.index(char) for char in SHAKESPEARE]
    meta = {"tokenizer": "char", "chars": chars}
    write_dataset(tmp_path / "data" / "shakespeare_char", ids[:800], ids[800:], meta)
    (tmp_path / "source.py").write_text("print('hello, world')\n" * 100)

    monkeypatch.setitem(limits.WORKLOADS, "cpu", limits.Workload(2, SHAPE))
    monkeypatch.setattr(limits, "BANDWIDTH_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "SHORT_SECONDS", 0)
    monkeypatch.setattr(turns, "MOST_ROUNDS", 2)
    monkeypatch.setattr(attention, "WINDOW", 32)
    monkeypatch.setattr(attention, "CASES", [(1, 128, 32)])
    monkeypatch.setattr(attention, "SHORT", 128)
    monkeypatch.setattr(attention, "LONG", 192)
    monkeypatch.setattr(sampling, "MODEL", SHAPE)
    monkeypatch.setattr(sampling, "STREAMS", {1: 3, 2: 2})
    monkeypatch.setattr(sampling, "SAMPLES_POSITION", 20)
    monkeypatch.setattr(data, "CORPUS_BYTES", 10_000)
    monkeypatch.setattr(data, "stdlib_files", lambda: ["source.py"])
    for module in (data, prepare_data):
        monkeypatch.setattr(module, "get_tokenizer", lambda meta: byte_tokenizer())
    runs = [overhead.replace(run, steps=2) for run in overhead.SHORT_RUNS]
    monkeypatch.setattr(overhead, "SHORT_RUNS", runs)
    monkeypatch.setattr(training, "RECIPES", [RECIPE])
    monkeypatch.setattr(training, "run_recipe", lambda *arguments: (10.0, 2, 1.8))  # seconds
    for module in (attention, ladder, sampling):  # a new process takes seconds
        monkeypatch.setattr(module, "run_in_new_process", call_in_this_process)
    monkeypatch.setattr(ladder, "apply_process_settings", lambda *arguments: None)
    monkeypatch.setattr(document, "save_plot", lambda *arguments: False)  # tested below
    return tmp_path


def run_bench(*argv):
    bench.main([*argv, "--device=cpu", "--budget_seconds=1"])


def rows_of(name):
    return results.read_results(f"docs/bench/{name}-cpu.json")["rows"]


def error_of(capsys, *argv):
    """Run the program with arguments that it must refuse; return its one line on stderr."""
    return refused(capsys, list(argv), bench.main)


# Every benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in bench.BENCHMARKS if name != "ladder"])
def test_a_benchmark_writes_rows(tiny, name):
    run_bench(name)
    assert rows_of(name)


def test_the_ladder_has_a_row_for_each_rung(tiny, monkeypatch):
    rungs = [rung for rung in ladder.LADDERS["cpu"] if "compile" not in rung.changes]
    monkeypatch.setitem(ladder.LADDERS, "cpu", rungs)
    run_bench("ladder")
    rows = rows_of("ladder")
    assert [row["rung"] for row in rows] == [rung.name for rung in rungs]
    assert rows[0]["first_over_this"] == rows[0]["previous_over_this"] == 1
    kept = [row for row, rung in zip(rows, rungs, strict=True) if rung.kept]
    product = np.prod([row["previous_over_this"] for row in kept])
    assert kept[-1]["first_over_this"] == pytest.approx(product)


def test_a_result_file_says_how_it_was_made_and_names_no_place(tiny, peer):
    run_bench("train", f"--nanogpt={peer}")
    path = tiny / "docs" / "bench" / "train-cpu.json"
    head = results.read_results(path)
    assert head["benchmark"] == "train"
    assert head["machine"]["device"] == "cpu"
    assert head["machine"]["cores"] >= 1
    assert head["versions"]["torch"] == torch.__version__
    assert head["commit"] and head["date"]
    assert head["options"]["nanogpt"] is True
    assert set(head["goals"]) <= {goal.name for goal in goals.GOALS}
    text = path.read_text()
    assert str(tiny) not in text
    assert platform.node() not in text


def test_all_runs_every_benchmark_that_the_budget_allows(tiny, monkeypatch, capsys):
    called = []

    def measure(what):
        called.append(what.seconds)
        return [{"value": 1}]

    fake = bench.Benchmark(measure, {"cpu": 10})
    monkeypatch.setattr(bench, "BENCHMARKS", {"limits": fake, "train": fake})
    bench.main(["all", "--device=cpu", "--budget_seconds=3000"])
    assert called == pytest.approx([1500, 3000], abs=100)  # the first one left all of its time


def test_all_says_what_its_budget_leaves_out(tiny, monkeypatch, capsys):
    fake = bench.Benchmark(lambda what: time.sleep(1) or [], {"cpu": 1})
    monkeypatch.setattr(bench, "BENCHMARKS", {"limits": fake, "train": fake})
    run_bench("all")
    assert "train is skipped" in capsys.readouterr().out


def test_all_goes_on_after_a_benchmark_that_failed(tiny, monkeypatch, capsys):
    def fail(what):
        raise UserError("no data")

    failing = bench.Benchmark(fail, {"cpu": 1})
    fake = bench.Benchmark(lambda what: [{"value": 1}], {"cpu": 1})
    monkeypatch.setattr(bench, "BENCHMARKS", {"limits": failing, "train": fake})
    bench.main(["all", "--device=cpu", "--budget_seconds=100"])
    assert rows_of("train") == [{"value": 1}]
    assert "no data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument, named",
    [
        ("walk", "what=walk"),
        ("--budget_seconds=0", "budget_seconds"),
        ("--position=0", "position"),
        ("--device=abacus", "device"),
        ("--nanogpt=nowhere", "nanogpt=nowhere"),
        ("--out=file.json", "out_dir"),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(tiny, capsys, argument, named):
    assert named in error_of(capsys, argument)


# Peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "loss", "sample"])
def test_a_benchmark_without_nanogpt_says_so(tiny, name, capsys):
    run_bench(name)
    (note,) = [
        note
        for note in results.read_results(f"docs/bench/{name}-cpu.json")["notes"]
        if "nanogpt" in note
    ]
    assert note in capsys.readouterr().out.splitlines()


def test_sampling_without_transformers_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run_bench("sample")
    assert "transformers is skipped" in capsys.readouterr().out
    assert {row["contestant"] for row in rows_of("sample")} == {"ours"}


def test_sampling_compares_with_transformers(tiny):
    run_bench("sample")
    ours = [row for row in rows_of("sample") if row["contestant"] == "ours"]
    assert {row["streams"] for row in ours} == {1, 2}
    assert all(row["transformers_over_this"] > 0 for row in ours)


def test_a_step_of_nanogpt_takes_the_time_that_it_prints(tiny, peer):
    run_bench("train", f"--nanogpt={peer}")
    ours, *_, theirs = rows_of("train")
    assert theirs["contestant"] == "nanoGPT"
    assert theirs["step_ms"]["median"] == pytest.approx(20)
    assert ours["nanogpt_over_this"] == pytest.approx(20 / ours["step_ms"]["median"])
    options = (tiny / "log" / "train").read_text().splitlines()
    assert {"--batch_size=2", "--block_size=32", "--n_layer=1", "--n_embd=16"} <= set(options)


def test_nanogpt_prepares_its_data_from_the_text_that_ours_has(tiny, peer):
    run_bench("loss", f"--nanogpt={peer}")
    assert (tiny / "log" / "text").read_text() == SHAKESPEARE
    theirs, ours = rows_of("loss")
    assert (theirs["contestant"], theirs["steps"], theirs["val_loss"]) == ("nanoGPT", 2000, 1.886)
    assert (ours["contestant"], ours["steps"]) == ("ours, AdamW", 2)
    options = (tiny / "log" / "loss").read_text().splitlines()
    assert set(training.NANOGPT_RECIPE) <= set(options)


def test_a_recipe_is_a_whole_program_of_ours(tiny):
    dataset = tiny / "data" / "shakespeare_char"
    seconds, steps, loss = REAL_RUN_RECIPE(RECIPE, dataset, CPU)
    assert seconds > 0.5  # imports alone take longer
    assert steps == 2
    assert 1 < loss < 4


def test_a_recipe_that_misses_the_loss_has_no_ratio(tiny, peer, monkeypatch):
    monkeypatch.setattr(training, "run_recipe", lambda *arguments: (10.0, 2, 1.886))
    run_bench("loss", f"--nanogpt={peer}")
    assert "nanogpt_over_this" not in rows_of("loss")[1]


def test_sampling_compares_with_nanogpt(tiny, peer):
    run_bench("sample", f"--nanogpt={peer}")
    rows = [row for row in rows_of("sample") if row["contestant"] == "nanoGPT"]
    assert [(row["streams"], row["dtype"]) for row in rows] == [(1, "float32")]


def test_the_directory_of_nanogpt_is_left_as_it_was(tiny, peer):
    before = sorted(peer.rglob("*"))
    run_bench("train", f"--nanogpt={peer}")
    assert sorted(peer.rglob("*")) == before


def test_a_program_of_nanogpt_that_fails_is_an_error_of_one_line(tiny, peer, capsys):
    (peer / "train.py").write_text("raise SystemExit('no such luck')")
    line = error_of(capsys, "train", "--device=cpu", "--budget_seconds=1", f"--nanogpt={peer}")
    assert "no such luck" in line


def test_the_first_iteration_of_nanogpt_does_not_count():
    lines = [f"iter {i}: loss 4.0, time {ms}ms, mfu 1.0%" for i, ms in enumerate([900, 30.5])]
    assert nanogpt.iteration_seconds("\n".join(lines)) == pytest.approx(0.0305)


# Turns ----------------------------------------------------------------------------------------


def test_contestants_take_turns():
    order = []
    contestants = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert turns.compare(0, contestants, {"c": contestants["a"]}) == {
        "a": [1.0, 1.0],
        "b": [1.0, 1.0],
        "c": [1.0, 1.0],
    }
    assert order == ["a", "b", "a", "b", "a", "a", "b", "a"]  # the first two warm up


def test_a_round_that_would_exceed_the_budget_is_not_begun(monkeypatch):
    clock = iter([0, 2.0, 3.0, 3.9])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    budget = turns.Budget(4)
    assert budget.allows(0) and budget.allows(1)  # without looking at the clock
    assert budget.allows(2)  # 2 s for two rounds: three take 3 s
    assert budget.allows(3)  # 3 s for three: four take 4 s
    assert not budget.allows(4)


def test_take_turns_returns_medians():
    seconds = turns.take_turns(3, CPU, {"sleep": lambda: time.sleep(0.02), "pass": lambda: None})
    assert seconds["pass"] < 0.02 <= seconds["sleep"]


def test_a_process_that_dies_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="_exit"):
        turns.run_in_new_process(os._exit, 1)


# What is measured -----------------------------------------------------------------------------


def test_the_products_of_a_step_are_those_of_the_model(tiny):
    size = limits.workload(CPU)
    model = model_module("model").GPT(size.config())
    idx = torch.zeros(2, 32, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model(idx, idx).backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert limits.products_flops(size) == linear
    counter = FlopCounterMode(display=False)
    with counter:
        limits.step_products(size, CPU, torch.float32)()
    assert counter.get_total_flops() == linear


@pytest.mark.parametrize("T, window", [(5, 3), (5, 5), (5, 8), (5, 1)])
def test_attention_flops_count_the_attended_keys(T, window):
    distance = torch.arange(T)[:, None] - torch.arange(T)
    pairs = ((distance >= 0) & (distance < window)).sum().item()
    expected = 12 * attention.HEAD_DIM * attention.N_HEAD * 2 * pairs
    assert attention.attention_flops(2, T, window) == expected


def test_a_turn_of_several_calls_returns_the_mean_of_their_seconds(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    numbers = []
    assert turns.stopwatch(CPU, numbers.append, 1, calls=5)() == 2.0
    assert numbers == [1] * 5


def varlen_by_brute_force(q, k, v, ends_q, ends_k, max_q, max_k, window_size):
    """Compute what varlen_attn documents: sequences one after the other, (tokens, H, D)."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    left, right = window_size
    positions = torch.arange(max_q)
    distance = positions[:, None] - positions
    mask = (distance <= left) & (-distance <= right)
    parts = []
    for start, end in itertools.pairwise(ends_q.tolist()):
        assert end - start == max_q == max_k
        q_part, k_part, v_part = [t[start:end].transpose(0, 1) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=mask)
        parts.append(y.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [1, 3, 40])
def test_the_flash_kernel_is_given_the_windows_of_the_model(monkeypatch, window):
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_brute_force)
    q, k, v, gradient = attention.random_inputs(2, 20, CPU, torch.float32)
    results = []
    for attend in (attention.flash(window), attention.sliding(window)):
        gradients = attention.forward_backward(attend, q, k, v, gradient)
        results.append([attend(q, k, v), *gradients])
    for ours, models in zip(*results, strict=True):
        torch.testing.assert_close(ours, models, atol=1e-5, rtol=1e-5)


def test_a_step_with_the_flash_kernel_is_compared_with_the_models_own(tiny, monkeypatch):
    calls = []

    def counting(*arguments, **options):
        calls.append(options["window_size"])
        return varlen_by_brute_force(*arguments, **options)

    monkeypatch.setattr(attention, "varlen_attn", counting)
    monkeypatch.setattr(attention, "STEP_MODEL", SHAPE | {"block_size": 300})
    monkeypatch.setattr(attention, "STEP_BATCH", 2)
    row = attention.step_speed(CPU, seconds=0)
    assert set(calls) == {(row["window"] - 1, 0)}
    assert (row["batch"], row["T"]) == (2, 300)
    ratio = row["sliding_step_ms"]["median"] / row["flash_step_ms"]["median"]
    assert row["sliding_over_flash"] == pytest.approx(ratio)


def test_a_decode_step_reads_all_weights_but_the_positions(tiny):
    shape = model_module("model").GPTConfig(**SHAPE)
    weights = model_module("model").GPT(shape).parameters()
    expected = sum(p.numel() for p in weights) - shape.block_size * shape.n_embd
    _, bytes_read = sampling.default_model("model", CPU, torch.bfloat16, rows=1)
    assert bytes_read == 2 * expected


def test_overhead_includes_the_time_of_the_loader(tiny, monkeypatch):
    train_batch = Loader.train_batch

    def slow_batch(*arguments):
        time.sleep(0.05)
        return train_batch(*arguments)

    monkeypatch.setattr(Loader, "train_batch", slow_batch)
    parts = overhead.measure_run(overhead.SHORT_RUNS[1], CPU)
    assert 0.05 <= parts["loader"] < 0.2
    assert parts["fraction"] > 0.5
    assert parts["step"] > parts["loader"]


def test_overhead_leaves_out_the_forward_passes_of_an_evaluation(tiny, monkeypatch):
    GPT = model_module("model").GPT
    forward = GPT.forward

    def slow_in_evaluation(self, *arguments):
        if not self.training:
            time.sleep(0.1)
        return forward(self, *arguments)

    monkeypatch.setattr(GPT, "forward", slow_in_evaluation)
    run = overhead.SHORT_RUNS[1]
    config, _ = overhead.read_config(run, CPU)
    batches_per_step = config.eval_tokens / (2 * 32) / config.eval_interval
    assert overhead.measure_run(run, CPU)["evaluation"] < 0.05 * batches_per_step


def test_a_rung_keeps_the_changes_of_the_kept_rungs_before_it():
    rungs = [
        ladder.Rung("a", {}),
        ladder.Rung("b", {"compile": True}),
        ladder.Rung("tried", {"tf32": True}, kept=False),
        ladder.Rung("c", {"flash": True}),
    ]
    settings = ladder.settings_of_rungs(rungs)
    assert settings["a"] == ladder.Settings()
    assert settings["tried"] == ladder.Settings(compile=True, tf32=True)
    assert settings["c"] == ladder.Settings(compile=True, flash=True)


def test_the_fused_loss_of_the_ladder_is_the_loss_of_the_model():
    module = model_module("model")
    model = module.GPT(module.GPTConfig(**SHAPE))
    idx = torch.randint(model.config.vocab_size, (2, 16))
    expected = model(idx, idx.roll(-1, dims=1))
    torch.testing.assert_close(ladder.fused_loss(model)(idx, idx.roll(-1, dims=1)), expected)


# Result files and goals -----------------------------------------------------------------------


def made_up(name, rows, device="cpu", instructions=()):
    """Return results as a result file has them."""
    machine = {"device": device, "cpu": "a CPU", "threads": 2, "instructions": list(instructions)}
    return {
        "benchmark": name,
        "date": "2026-01-01",
        "commit": "0123456789abcdef",
        "machine": machine,
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "rows": rows,
        "notes": ["nanoGPT is skipped"],
    }


def test_a_result_file_is_named_after_benchmark_and_device(tmp_path):
    written = made_up("train", [{"ms": 1.5}], "NVIDIA H100 80GB HBM3")
    path = results.write_results(tmp_path, written)
    assert path == tmp_path / "train-nvidia-h100-80gb-hbm3.json"
    assert results.read_results(path) == written
    assert results.read_all(tmp_path) == [written]


def test_a_measured_value_is_shown_with_its_range():
    assert results.cell({"median": 12.345, "min": 0.5, "max": 2000.4}) == "12.35 (0.5 to 2000)"
    assert results.cell(None) == ""


SPEED = {"contestant": "ours", "dtype": "bfloat16", "nanogpt_over_this": 2.5}


@pytest.mark.parametrize(
    "instructions, verdict", [((), "reaches its floor"), (("amx_bf16",), "misses its floor")]
)
def test_a_goal_is_that_of_the_machine(instructions, verdict):
    measured = made_up("train", [SPEED], instructions=instructions)
    (goal,) = [
        goal for goal in goals.GOALS if goal.applies(measured) and goal.column == goals.NANOGPT
    ]
    assert goals.describe_goal(goal, goal.value(measured))[-1] == verdict


def test_a_goal_takes_the_best_row():
    rows = [{"contestant": "nanoGPT"}, {goals.NANOGPT: 2.0}, {goals.NANOGPT: {"median": 3.0}}]
    assert set(goals.goal_values(made_up("loss", rows)).values()) == {3.0}


def test_goals_below_the_floor_or_not_measured_fall_short():
    lines = goals.shortfalls(
        [
            made_up("overhead", [{"config": "quickstart", "fraction": 0.03}]),
            made_up("loss", [{goals.NANOGPT: 2.3}]),
        ]
    )
    assert len(lines) == 2
    assert "quickstart" in lines[0] and "misses its floor" in lines[0]
    assert "GPT-2 124M" in lines[1] and "not measured" in lines[1]


def test_a_low_overhead_reaches_its_aim():
    goal = goals.overhead_goal("quickstart")
    assert goals.describe_goal(goal, 0.005)[-1] == "reaches its aim"


# The document ---------------------------------------------------------------------------------


def test_the_document_has_a_plot_and_tables_for_each_result_file(tmp_path):
    value = {"median": 2.0, "min": 1.5, "max": 2.5}
    row = {"contestant": "ours", "dtype": "float32", "tokens_per_second": value, "tiny": 0.123456}
    for device in ("cpu", "NVIDIA A10"):
        results.write_results(tmp_path / "bench", made_up("train", [row], device))
    text = document.write_document(tmp_path / "bench").read_text(encoding="utf-8")
    assert text == (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8")
    for device in ("cpu", "nvidia-a10"):
        assert f"(bench/train-{device}.png)" in text
        assert (tmp_path / "bench" / f"train-{device}.png").stat().st_size > 5000
    assert "| ours | float32 | 2 (1.5 to 2.5) | 0.1235 |" in text
    assert "commit `0123456789`" in text
    assert "nanoGPT is skipped." in text
    assert "| 124M step: products / step | cpu |  | >= 0.78 | >= 0.88 | not measured |" in text


def test_the_document_describes_every_benchmark():
    assert {question.benchmark for question in document.QUESTIONS} == set(bench.BENCHMARKS)


def test_the_committed_document_is_that_of_the_result_files(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "save_plot", lambda *arguments: bool(arguments[2]))
    folder = tmp_path / "bench"
    folder.mkdir()
    for path in (ROOT / "docs" / "bench").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    text = document.write_document(folder).read_text(encoding="utf-8")
    assert text == (ROOT / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8")


def test_document_writes_nothing_but_the_document(tiny, capsys):
    results.write_results("docs/bench", made_up("data", [{"contestant": "ours"}]))
    bench.main(["document"])
    assert capsys.readouterr().out == "docs/BENCHMARKS.md\n"
    assert json.loads(Path("docs/bench/data-cpu.json").read_text())["rows"]
