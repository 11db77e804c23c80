"""tools/bench and tools/results: each benchmark at a tiny size, peers, budgets, files, plots."""

import itertools
import math
import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, write_dataset
from torch.utils.flop_counter import FlopCounterMode

from common.dataloader import Loader
from common.errors import UserError
from common.flops import mfu_flops_per_token
from common.models import model_module
from tools.bench import __main__ as bench
from tools.bench import attention, ladder, limits, memory, overhead, sampling, training
from tools.bench.sizes import CUDA, TINY, TINY_MODEL, Bench
from tools.results import plot, result_file, table, turns

CPU = torch.device("cpu")
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
for i, ms in enumerate([900, 10, 30]):
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
    """A working directory with a dataset, in which benchmarks take two rounds and one process."""
    monkeypatch.chdir(tmp_path)
    chars = sorted(set(SHAKESPEARE))
    ids = [chars.index(char) for char in SHAKESPEARE]
    meta = {"tokenizer": "char", "chars": chars}
    write_dataset(tmp_path / "data" / "shakespeare_char", ids[:800], ids[800:], meta)
    monkeypatch.setattr(turns, "MOST_ROUNDS", 2)
    monkeypatch.setattr(training, "run_recipe", lambda *arguments: (10.0, 2, 1.8))  # seconds
    for module in (attention, ladder, memory, sampling):  # a new process takes seconds
        monkeypatch.setattr(module, "run_in_new_process", call_in_this_process)
    monkeypatch.setattr(ladder, "apply_process_settings", lambda *arguments: None)
    monkeypatch.setattr(bench, "save_bars", lambda *arguments: None)  # tested below
    return tmp_path


def run_bench(*argv):
    bench.main([*argv, "--device=cpu", "--budget_seconds=1", "--tiny=True"])


def result_of(name):
    return result_file.read_result(f"out/bench/{name}-cpu.json")


def rows_of(name):
    return result_of(name)["values"]


def tiny_bench():
    return Bench(CPU, deadline=0, sizes=TINY)


def error_of(capsys, *argv):
    """Run the program with arguments that it must refuse; return its one line on stderr."""
    return refused(capsys, list(argv), bench.main)


# Every benchmark ------------------------------------------------------------------------------


WITHOUT_A_GPU = [name for name, what in bench.BENCHMARKS.items() if "cpu" in what.seconds]


@pytest.mark.parametrize("name", [name for name in WITHOUT_A_GPU if name != "ladder"])
def test_a_benchmark_writes_rows_and_says_that_nanogpt_is_missing(tiny, name, capsys):
    run_bench(name)
    assert rows_of(name)
    assert not Path("docs/bench").exists()  # tiny results do not replace measured ones
    notes = [note for note in result_of(name)["notes"] if "nanogpt" in note]
    assert len(notes) == (name in ("train", "loss", "sample"))
    assert set(notes) <= set(capsys.readouterr().out.splitlines())


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
    head = result_of("train")
    assert head["name"] == "train"
    assert head["command"] == "python -m tools.bench train"
    assert head["machine"]["device"] == "cpu"
    assert head["machine"]["cores"] >= 1
    assert head["versions"]["torch"] == torch.__version__
    assert head["commit"] and head["date"]
    assert head["options"]["nanogpt"] is True
    text = (tiny / "out/bench/train-cpu.json").read_text()
    assert str(tiny) not in text
    assert platform.node() not in text


def seconds_of_all(monkeypatch, budget, *benchmarks):
    """Run `all` of benchmarks (own seconds, seconds that it takes); return those each is given."""
    now = 0.0
    given = {}

    def benchmark(name, own, takes):
        def measure(what):
            nonlocal now
            given[name] = what.deadline - now
            now += takes
            return []

        return bench.Benchmark(measure, {"cpu": own})

    made = {f"b{i}": benchmark(f"b{i}", *numbers) for i, numbers in enumerate(benchmarks)}
    monkeypatch.setattr(bench, "BENCHMARKS", made)
    with monkeypatch.context() as patch:
        patch.setattr(bench.time, "monotonic", lambda: now)
        bench.main(["all", "--device=cpu", *budget])
    return given


def test_all_divides_its_budget_and_passes_on_what_is_not_used(tiny, monkeypatch):
    given = seconds_of_all(monkeypatch, ["--budget_seconds=400"], (10, 40), (30, 60), (10, 0))
    assert given == {"b0": 80, "b1": 270, "b2": 300}
    assert seconds_of_all(monkeypatch, [], (10, 12), (30, 12)) == {"b0": 10, "b1": 28}


def test_all_skips_what_its_budget_is_too_short_for(tiny, monkeypatch, capsys):
    # Too little for half of 100 + 100 + 300 seconds, so that the third gets nothing from the start.
    budget = ["--budget_seconds=200"]
    given = seconds_of_all(monkeypatch, budget, (100, 100), (100, 90), (300, 0), (10, 0))
    assert given == {"b0": 100, "b1": 100, "b3": 10}
    assert "b2 is skipped: only 10 s are left" in capsys.readouterr().out


def test_a_note_is_part_of_the_result(tiny):
    run_bench("limits", "--note=the fan is broken")
    assert result_of("limits")["notes"] == ["the fan is broken"]


def test_all_goes_on_after_a_benchmark_that_failed(tiny, monkeypatch, capsys):
    def fail(what):
        raise UserError("no data")

    failing = bench.Benchmark(fail, {"cpu": 1})
    fake = bench.Benchmark(lambda what: [{"value": 1}], {"cpu": 1})
    monkeypatch.setattr(bench, "BENCHMARKS", {"limits": failing, "train": fake})
    bench.main(["all", "--device=cpu", "--budget_seconds=100", "--tiny=True"])
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


def test_a_step_of_nanogpt_takes_the_times_that_it_prints_after_the_first(tiny, peer):
    run_bench("train", f"--nanogpt={peer}")
    ours, *_, theirs = rows_of("train")
    assert theirs["contestant"] == "nanoGPT"
    assert theirs["step_ms"]["median"] == pytest.approx(20)
    assert ours["nanogpt_over_this"] == pytest.approx(20 / ours["step_ms"]["median"])
    options = (tiny / "log" / "train").read_text().splitlines()
    assert {"--batch_size=2", "--block_size=32", "--n_layer=1", "--n_embd=16"} <= set(options)
    assert "--bias=True" in options  # as ours


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
    [recipe] = training.TINY_RECIPES
    seconds, steps, loss = REAL_RUN_RECIPE(recipe, dataset, CPU)
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
    line = error_of(capsys, "train", "--device=cpu", "--tiny=True", f"--nanogpt={peer}")
    assert "no such luck" in line


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


def rounds_until(deadline, monkeypatch, start=0):
    """Return the number of rounds of a second each, if they begin at `start`."""
    now = start
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)
    budget = turns.Budget(deadline)
    rounds = 0
    while budget.allows(rounds):
        now += 1
        rounds += 1
    return rounds


def test_a_round_that_would_end_after_the_deadline_is_not_begun(monkeypatch):
    assert rounds_until(4.5, monkeypatch) == 4
    assert rounds_until(0, monkeypatch) == 2  # the fewest
    assert rounds_until(1000, monkeypatch) == turns.MOST_ROUNDS


def test_what_comes_before_the_rounds_is_part_of_the_time(monkeypatch):
    assert rounds_until(10.5, monkeypatch, start=6) == 4


def test_a_part_gets_its_fraction_of_what_is_left(monkeypatch):
    now = 0.0
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)
    deadlines = turns.split(100, [1, 1, 2])
    assert next(deadlines) == 25
    now = 10.0  # 15 s less than its part
    assert next(deadlines) == 10 + 30
    now = 60.0  # 20 s more
    assert list(deadlines) == [100]


def test_take_turns_returns_medians():
    seconds = turns.take_turns(3, CPU, {"sleep": lambda: time.sleep(0.02), "pass": lambda: None})
    assert seconds["pass"] < 0.02 <= seconds["sleep"]


def test_a_process_that_dies_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="_exit"):
        turns.run_in_new_process(os._exit, 1)


# What is measured -----------------------------------------------------------------------------


def test_the_products_of_a_step_are_those_of_the_model(tiny):
    model = model_module("model").GPT(TINY.config())
    idx = torch.zeros(2, 32, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model(idx, idx).backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert limits.products_flops(TINY) == linear
    counter = FlopCounterMode(display=False)
    with counter:
        limits.step_products(TINY, CPU, torch.float32)()
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
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_brute_force)
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

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counting)
    monkeypatch.setattr(attention, "STEP_MODEL", TINY_MODEL | {"block_size": 300})
    monkeypatch.setattr(attention, "STEP_BATCH", 2)
    row = attention.step_speed(CPU, deadline=0)
    assert set(calls) == {(row["window"] - 1, 0)}
    assert (row["batch"], row["T"]) == (2, 300)
    ratio = row["sliding_step_ms"]["median"] / row["flash_step_ms"]["median"]
    assert row["sliding_over_flash"] == pytest.approx(ratio)


def test_a_decode_step_reads_all_weights_but_the_positions(tiny):
    shape = model_module("model").GPTConfig(**TINY_MODEL)
    weights = model_module("model").GPT(shape).parameters()
    expected = sum(p.numel() for p in weights) - shape.block_size * shape.n_embd
    _, bytes_read = sampling.sampling_model(tiny_bench(), "model", torch.bfloat16, rows=1)
    assert bytes_read == 2 * expected


def test_the_time_to_the_first_token_is_measured_in_sampling(tiny, monkeypatch):
    made = set()

    def generate(model, prompt, streams, new_tokens):
        made.add((streams, new_tokens))

    monkeypatch.setattr(sampling, "our_contestant", generate)
    monkeypatch.setattr(sampling, "has_transformers", lambda bench: False)
    run_bench("sample")
    assert made == {(1, 3), (1, 1), (2, 2), (2, 1)}
    assert all(row["first_token_ms"]["median"] > 0 for row in rows_of("sample"))


def test_the_first_token_of_a_decoded_prompt_comes_after_its_prefill(tiny, monkeypatch):
    lengths = []
    fill_cache = sampling.fill_cache

    def recorded(model, cache, length):
        lengths.append(length - cache.pos)
        fill_cache(model, cache, length)

    monkeypatch.setattr(sampling, "fill_cache", recorded)
    decoding = sampling.make_decoding(tiny_bench(), torch.float32, "model_swa", 2, 20)
    lengths.clear()
    for _ in range(2):
        decoding.step()
        decoding.first_token()
    assert lengths == [20, 20]


def test_decoding_is_measured_for_several_numbers_of_samples(tiny):
    run_bench("decode")
    rows = [row for row in rows_of("decode") if "first_token_ms" in row]
    assert {(row["batch"], row["model"]) for row in rows} == {
        (batch, name) for batch in (1, 2) for name in ("model", "model_gqa", "model_swa")
    }
    assert all(row["of_read_limit"] > 0 for row in rows)


def test_a_step_on_a_gpu_has_an_mfu_with_its_device_and_no_products_of_attention(monkeypatch):
    monkeypatch.setattr(training, "peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(training, "device_name", lambda device: "a GPU")
    model = model_module("model").GPT(TINY.config())
    run = SimpleNamespace(device=CPU, model=model, loader=SimpleNamespace(block_size=32))
    times = {("step", torch.bfloat16): [2.0], ("linear", torch.bfloat16): [1.0]}
    row = training.step_row(TINY, run, torch.bfloat16, times)
    assert row["mfu_of"] == "a GPU"
    assert row["mfu"] == pytest.approx(64 * mfu_flops_per_token(model, 32) / 2 / 1e12)
    assert row["linear_over_step"] == 0.5
    assert not [column for column in row if "products" in column]


def test_overhead_on_a_gpu_has_the_steps_of_the_config():
    short = overhead.short_runs(tiny_bench())[1]
    config, _ = overhead.read_config(short, Bench(CPU, deadline=0, sizes=CUDA))
    assert (config.batch_size, config.total_batch_size) == (32, 524_288)
    config, _ = overhead.read_config(short, tiny_bench())
    assert config.total_batch_size == 2 * 32


def test_overhead_includes_the_time_of_the_loader(tiny, monkeypatch):
    train_batch = Loader.train_batch

    def slow_batch(*arguments):
        time.sleep(0.05)
        return train_batch(*arguments)

    monkeypatch.setattr(Loader, "train_batch", slow_batch)
    parts = overhead.measure_run(overhead.short_runs(tiny_bench())[1], tiny_bench())
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
    run = overhead.short_runs(tiny_bench())[1]
    config, _ = overhead.read_config(run, tiny_bench())
    batches_per_step = config.eval_tokens / (2 * 32) / config.eval_interval
    assert overhead.measure_run(run, tiny_bench())["evaluation"] < 0.05 * batches_per_step


def memory_rows(monkeypatch, deadline):
    """Return the rows and notes of memory, whose steps run out of memory with 64 sequences."""

    def step_memory(model_options, options, launched):
        if options["batch_size"] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 100 * options["batch_size"] + launched

    monkeypatch.setattr(memory, "step_memory", step_memory)
    what = Bench(CPU, deadline, TINY)
    return memory.measure_memory(what), what.notes


def test_memory_has_a_row_for_each_case_that_fits(tiny, monkeypatch):
    rows, notes = memory_rows(monkeypatch, deadline=math.inf)
    assert len(rows) + 2 == len(memory.memory_cases(TINY))
    assert notes == [
        "gpt2 large_gpu, one process, 64 x 32 tokens: out of memory",
        "gpt2 large_gpu, not compiled, 64 x 32 tokens: out of memory",
    ]
    assert rows[0] == {
        "config": "gpt2",
        "mode": "one process",
        "batch": 16,
        "T": 32,
        "peak_gb": 1600,
    }
    peaks = {(row["config"], row["mode"], row["T"]): row["peak_gb"] for row in rows[1:]}
    assert peaks["gpt2", "one process", 32] == peaks["gpt2_rope_gqa_swa", "one process", 32] == 200
    assert peaks["gpt2", "FSDP", 32] == 201
    assert peaks["gpt2_swa", "one process", 256] == 100
    assert peaks["gpt2_medium small_gpu", "one process", 32] == 200


def test_memory_says_which_cases_it_had_no_time_for(tiny, monkeypatch):
    rows, notes = memory_rows(monkeypatch, deadline=0)
    assert len(rows) == 1
    assert len(rows) + len(notes) == len(memory.memory_cases(TINY))


def test_memory_is_left_out_without_a_gpu(tiny, capsys):
    run_bench("memory")
    assert "memory is left out: it needs CUDA" in capsys.readouterr().out
    assert not Path("out/bench").exists()


def test_a_case_of_memory_trains_as_its_config_says(tiny):
    cases = {(case.configs, case.mode): case for case in memory.memory_cases(TINY)}
    model_options, options = memory.case_options(cases["gpt2_gqa", "one process"], tiny_bench())
    assert (options["model"], model_options["n_kv_head"]) == ("model_gqa", 4)
    assert options["compile"] and not options["fsdp"]
    _, options = memory.case_options(cases["gpt2 small_gpu", "one process"], tiny_bench())
    assert options["activation_checkpointing"] and options["total_batch_size"] == 2 * 2 * 32
    model_options, options = memory.case_options(cases["gpt2", "FSDP"], tiny_bench())
    assert options["fsdp"]
    options["compile"] = False  # which takes long
    assert turns.run_in_new_process(memory.step_memory, model_options, options, True) > 0.1


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
    model = module.GPT(module.GPTConfig(**TINY_MODEL))
    idx = torch.randint(model.config.vocab_size, (2, 16))
    expected = model(idx, idx.roll(-1, dims=1))
    model.loss = ladder.fused_loss(model)
    model.head = None  # its logits are not needed
    torch.testing.assert_close(model(idx, idx.roll(-1, dims=1)), expected)


# Results --------------------------------------------------------------------------------------


def made_up(name, rows):
    """Return a result as a result file has it."""
    return {
        "name": name,
        "command": f"python -m tools.bench {name}",
        "commit": "0123456789abcdef",
        "machine": {"device": "cpu", "cpu": "a CPU", "threads": 2, "instructions": ["avx2"]},
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "values": rows,
    }


def test_a_result_file_is_named_after_the_device():
    assert bench.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_source_of_a_result_names_command_commit_file_and_machine():
    text = result_file.describe_source(made_up("train", []), Path("docs/bench/x.json"))
    assert "`python -m tools.bench train`" in text
    assert "`0123456789`" in text
    assert "[x.json](bench/x.json)" in text
    assert "a CPU, 2 threads, avx2, torch 2.13.0, Python 3.11.7" in text


def test_a_measured_value_is_shown_with_its_range():
    assert table.cell({"median": 12.345, "min": 0.5, "max": 2000.4}) == "12.35 (0.5 to 2000)"
    assert table.cell(None) == ""


def test_rows_with_the_same_columns_share_a_table():
    rows = [{"a": 1, "two_words": 0.123456}, {"b": 3}, {"a": 2, "two_words": 5.0}]
    first, second = table.markdown_rows(rows).split("\n\n")
    assert first.splitlines() == [
        "| a | two words |",
        "| --- | ---: |",
        "| 1 | 0.1235 |",
        "| 2 | 5 |",
    ]
    assert second.splitlines()[2] == "| 3 |"


def test_plots_are_drawn_again_from_the_result_files(tmp_path):
    value = {"median": 2.0, "min": 1.5, "max": 2.5}
    rows = [{"contestant": "ours", "dtype": "float32", "tokens_per_second": value}, {"other": 1}]
    result_file.write_result(tmp_path / "train-cpu.json", made_up("train", rows))
    bench.main(["plots", f"--out_dir={tmp_path}"])
    assert (tmp_path / "train-cpu.png").stat().st_size > 5000


def test_a_bar_is_named_by_its_labels():
    row = {"contestant": "ours", "streams": 10, "T": 8}
    assert [plot.label(row, name) for name in row] == ["ours", "10 streams", "T 8"]
