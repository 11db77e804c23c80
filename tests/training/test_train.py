"""train.py: what a step computes, what the log contains, dtypes, compilation, initial weights.

Also training/optimizer.py: weight decay and the learning rate schedules.
"""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, arguments, read_log, refused, write_dataset
from runs import losses, result_of, same_weights, stop_in_step
from spoiled import spoiled

import train
from common import checkpoint, run_dir
from common.dataloader import Loader
from common.pretrained import load_model
from common.tokenizer import EOT
from training import report
from training.optimizer import make_optimizer
from training.parallel import checkpoint_activations
from training.start import default_out_dir


def val_loss_of(run):
    """Return the last validation loss of the log, as the console shows it."""
    return f"{read_log(run)[-1]['val_loss']:.4f}"


# What a step computes -------------------------------------------------------------------------


def test_gradient_accumulation_gives_the_loss_and_norm_of_one_large_batch(workdir):
    train.main(arguments(out_dir="out/1", batch_size=8, dropout=0.0))
    train.main(arguments(out_dir="out/4", batch_size=2, dropout=0.0))
    one_micro_step = read_log(Path("out/1"))[1:]
    four_micro_steps = read_log(Path("out/4"))[1:]
    for one, four in zip(one_micro_step, four_micro_steps, strict=True):
        assert one["train_loss"] == pytest.approx(four["train_loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


def adamw_step(p, grad, state, step, weight_decay):
    """Update a parameter in place: AdamW (Loshchilov & Hutter 2019, algorithm 2), in float64."""
    mean, square = state  # running means of the gradient and of its square
    mean.mul_(0.9).add_(0.1 * grad)
    square.mul_(0.95).add_(0.05 * grad * grad)
    mean_hat = mean / (1 - 0.9 ** (step + 1))
    square_hat = square / (1 - 0.95 ** (step + 1))
    decayed = p.double() * (1 - 0.01 * weight_decay)
    p.data = (decayed - 0.01 * mean_hat / (square_hat.sqrt() + 1e-8)).float()


def test_two_steps_are_those_of_adamw_with_clipping_computed_from_the_formulas(workdir):
    options = {
        "dropout": 0.0,
        "batch_size": 8,
        "max_steps": 2,
        "eval_interval": 1,
        "weight_decay": 0.3,
        "warmup_steps": 0,
        "lr_schedule": "wsd",
        "learning_rate": 0.01,
        "min_lr": 0.01,
    }
    train.main(arguments(**options))
    log = read_log(Path("out/tiny"))
    module = train.model_module("model")
    torch.manual_seed(1337)
    shape = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    model = module.GPT(module.GPTConfig(**shape, vocab_size=257))
    loader = Loader("data/tiny", 16, 257, 1337)
    states = {}
    for name, p in model.named_parameters():
        zeros = torch.zeros_like(p, dtype=torch.float64)
        states[name] = (zeros, zeros.clone())
    for step in range(2):
        model.zero_grad()
        model(*loader.train_batch(8 * step, 8)).backward()
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))
        assert log[step + 1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for name, p in model.named_parameters():
            clipped = p.grad.double() * min(1.0, 0.5 / norm)
            weight_decay = 0.3 if p.dim() == 2 else 0.0
            adamw_step(p, clipped, states[name], step, weight_decay)
    trained = load_model("out/tiny/step_00000002")[0].state_dict()
    for name, p in model.named_parameters():
        # The gradient of the key bias is zero except for rounding errors, which Adam scales up to
        # a full step. Compare the query bias only.
        rows = slice(0, 16) if name.endswith("c_attn.bias") else slice(None)
        torch.testing.assert_close(trained[name][rows], p.data[rows], rtol=1e-4, atol=1e-5)


def test_weight_decay_applies_to_matrices_only():
    module = train.model_module("model")
    model = module.GPT(module.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16))
    decayed, rest = make_optimizer(model, train.TrainConfig(weight_decay=0.2)).param_groups
    assert decayed["weight_decay"] == 0.2
    assert all(p.dim() == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0
    assert all(p.dim() == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_dropout_differs_from_step_to_step_and_from_rank_to_rank(workdir, monkeypatch):
    batch = torch.randint(257, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Loader, "train_batch", lambda self, first, count: tuple(batch))
    original = train.train_step
    options = {
        "max_steps": 2,
        "learning_rate": 0.0,
        "min_lr": 0.0,
        "dropout": 0.5,
        "eval_interval": 100,
        "total_batch_size": 64,
    }
    train_losses = []
    for rank in (0, 1):

        def step_as_rank(run, rank=rank):
            with monkeypatch.context() as patch:
                patch.setattr(run.group, "rank", rank)
                return original(run)

        monkeypatch.setattr(train, "train_step", step_as_rank)
        train.main(arguments(**options, out_dir=f"out/{rank}"))
        for record in read_log(Path(f"out/{rank}"))[1:]:
            train_losses.append(record["train_loss"])
    assert len(set(train_losses)) == len(train_losses) == 4


def test_the_model_learns_the_repetitive_text(workdir):
    train.main(arguments(max_steps=150, dropout=0.0, eval_interval=1000, checkpoint_interval=1000))
    records = read_log(Path("out/tiny"))
    assert records[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert records[-1]["val_loss"] < 1.8


def test_ranks_ask_each_other_for_a_signal_once_per_micro_step(workdir, monkeypatch):
    asked = []

    def count(group, flag):
        asked.append(flag)
        return flag

    monkeypatch.setattr(train.ProcessGroup, "any_rank", count)
    options = {"max_steps": 3, "eval_interval": 3, "eval_tokens": 64}  # one batch per evaluation
    train.main(arguments(total_batch_size=4 * 4 * 16, **options))  # 4 micro-steps
    at_the_end = 1  # before the program ends
    evaluations = 2  # before the first step and after the last
    assert len(asked) == 3 * 4 + at_the_end + evaluations


def test_the_batches_of_a_run_follow_each_other_without_gap(workdir, monkeypatch):
    """On a GPU train_step prefetches the batch that begins where this one ends."""
    train_batch, requests = Loader.train_batch, []

    def recording_train_batch(loader, first, count):
        requests.append((first, count))
        return train_batch(loader, first, count)

    monkeypatch.setattr(Loader, "train_batch", recording_train_batch)
    train.main(arguments(max_steps=3))
    assert requests == [(first, 4) for first in range(0, 24, 4)]


# Learning rate schedules ----------------------------------------------------------------------


def test_the_cosine_schedule_has_its_known_values():
    config = train.TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = {step: train.learning_rate(config, step) for step in (0, 4, 9, 10, 60, 110, 500)}
    assert rates == pytest.approx({0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1})


def test_wsd_is_constant_until_the_last_fifth_and_then_linear():
    config = train.TrainConfig(
        max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.0, lr_schedule="wsd"
    )
    rates = [train.learning_rate(config, step) for step in (10, 79, 80, 90, 100, 200)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])


# Log and evaluation ---------------------------------------------------------------------------


def test_the_log_has_one_line_per_step(tiny_run):
    records = read_log(tiny_run)
    assert [record["step"] for record in records] == list(range(13))


def test_the_log_has_the_validation_loss_of_every_evaluation(tiny_run):
    records = read_log(tiny_run)
    assert [record["step"] for record in records if "val_loss" in record] == [0, 5, 10, 12]


def test_every_line_of_the_log_has_all_fields(tiny_run):
    fields = {"train_loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "mfu"}
    for record in read_log(tiny_run)[1:]:
        assert record.keys() >= fields
        assert record["tokens"] == 128 * record["step"]
        assert record["memory_gb"] > 0.01


def test_the_seconds_in_the_log_increase(tiny_run):
    seconds = [record["seconds"] for record in read_log(tiny_run)]
    assert all(after > before for before, after in itertools.pairwise(seconds))


def test_the_validation_loss_is_the_mean_over_every_token_of_the_split(workdir):
    train.main(arguments(eval_tokens=10**6, max_steps=1))
    model = load_model("out/tiny")[0].eval()
    ids = torch.from_numpy(np.fromfile("data/tiny/val.bin", dtype="<u2").astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        with torch.no_grad():
            logits = model(window[None, :-1])
        total -= logits.log_softmax(-1)[0].gather(1, window[1:, None]).sum().item()
    val_loss = read_log(Path("out/tiny"))[-1]["val_loss"]
    assert val_loss == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_the_console_shows_the_validation_loss_and_the_perplexity(workdir, capsys):
    train.main(arguments(max_steps=1))
    val_loss = read_log(Path("out/tiny"))[-1]["val_loss"]
    printed = capsys.readouterr().out
    assert f"val loss {val_loss:.4f}" in printed
    assert f"perplexity {math.exp(val_loss):.2f}" in printed


# Windows of 16 tokens of one byte and of three bytes in turn, and a document's end in each
WIDE_CHARS = ["a", "b", "\u6c34", "\u6cb3", EOT]
WIDE_IDS = [i for _ in range(20) for i in (*(0, 1) * 7, 0, 4, *(2, 3) * 7, 2, 4)]


@pytest.fixture
def wide_chars(workdir):
    """Make data/wide, of a char tokenizer; return the bytes of each id."""
    meta = {"tokenizer": "char", "chars": WIDE_CHARS}
    write_dataset(workdir / "data/wide", WIDE_IDS, WIDE_IDS, meta)
    return torch.tensor([1, 1, 3, 3, 0])


@pytest.mark.parametrize("eval_tokens", [16, 48, 160, 10**6])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_bits_per_byte_is_the_loss_per_byte_of_the_targets_evaluated(
    wide_chars, capsys, eval_tokens, batch_size
):
    options = {"eval_tokens": eval_tokens, "batch_size": batch_size}
    train.main(arguments(dataset="wide", max_steps=1, **options))
    targets = [y for _, y in Loader("data/wide", 16, 5, 1).val_batches(eval_tokens, 8)]
    targets = torch.cat(targets)
    targets = targets[targets != -1]
    record = read_log(Path("out/tiny"))[-1]
    bits = record["val_loss"] / math.log(2) * len(targets) / wide_chars[targets].sum().item()
    assert record["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert f"| {bits:.3f} bits per byte" in capsys.readouterr().out


def test_an_evaluation_alone_prints_the_bits_per_byte_of_the_run(wide_chars, capsys):
    train.main(arguments(dataset="wide", max_steps=1, eval_tokens=48))
    bits = read_log(Path("out/tiny"))[-1]["val_bits_per_byte"]
    capsys.readouterr()
    train.main(arguments(dataset="wide", max_steps=1, eval_tokens=48, eval_only=True))
    assert f"| {bits:.3f} bits per byte" in capsys.readouterr().out


def test_bits_per_byte_do_not_depend_on_what_meta_json_counted(workdir):
    meta = {"tokenizer": "byte", "val": {"tokens": 600, "bytes": 1200}}
    (workdir / "data/tiny/meta.json").write_text(json.dumps(meta))
    train.main(arguments(max_steps=1))
    record = read_log(Path("out/tiny"))[-1]
    assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / math.log(2))


def test_without_gpt2s_tokenizer_there_are_no_bits_per_byte_and_no_download(
    workdir, capsys, monkeypatch
):
    downloads = []
    monkeypatch.setattr("requests.get", downloads.append)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(workdir / "none"))
    meta = {"tokenizer": "gpt2", "val": {"tokens": 600, "bytes": 1200}}
    (workdir / "data/tiny/meta.json").write_text(json.dumps(meta))
    train.main(arguments(max_steps=1))
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert "bits per byte" not in captured.out + captured.err
    assert "val_bits_per_byte" not in read_log(Path("out/tiny"))[-1]
    assert downloads == []


# --eval_train


def mean_loss(model, split, starts):
    """Return the mean loss on the windows of 16 tokens at these positions of data/tiny."""
    ids = torch.from_numpy(np.fromfile(f"data/tiny/{split}.bin", dtype="<u2").astype(np.int64))
    windows = torch.stack([ids[start : start + 17] for start in starts])
    with torch.no_grad():
        log_p = model(windows[:, :-1]).log_softmax(-1)
    return -log_p.gather(2, windows[:, 1:, None]).mean().item()


def test_eval_train_logs_the_loss_on_windows_spread_over_the_training_split(workdir):
    train.main(arguments(eval_train=True, eval_tokens=80, max_steps=1))
    n_windows = -(-(Path("data/tiny/train.bin").stat().st_size // 2 - 1) // 16)
    starts = [i * n_windows // 5 * 16 for i in range(5)]
    expected = mean_loss(load_model("out/tiny")[0].eval(), "train", starts)
    record = read_log(Path("out/tiny"))[-1]
    assert record["train_eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_eval_train_is_logged_and_printed_at_each_evaluation(workdir, capsys):
    train.main(arguments(eval_train=True))
    records = [record for record in read_log(Path("out/tiny")) if "train_eval_loss" in record]
    assert [record["step"] for record in records] == [0, 5, 10, 12]
    printed = re.findall(r"val loss .* train loss ([\d.]+)$", capsys.readouterr().out, re.M)
    assert printed == [f"{record['train_eval_loss']:.4f}" for record in records]


def test_without_eval_train_the_training_split_is_not_evaluated(tiny_run):
    assert not any("train_eval_loss" in record for record in read_log(tiny_run))


@pytest.mark.parametrize("eval_tokens", [80, 10**6])
def test_eval_train_evaluates_as_many_windows_of_both_splits(workdir, monkeypatch, eval_tokens):
    windows = {"train": 0, "val": 0}
    val_batches = Loader.val_batches

    def count(self, *args):
        for x, y in val_batches(self, *args):
            windows[args[-1]] += int((y != -1).any(dim=1).sum())
            yield x, y

    monkeypatch.setattr(Loader, "val_batches", count)
    train.main(arguments(eval_train=True, eval_tokens=eval_tokens, eval_only=True))
    assert windows["train"] == windows["val"] == (5 if eval_tokens == 80 else 38)


def test_eval_train_changes_nothing_else(tiny_run, workdir):
    train.main(arguments(eval_train=True, out_dir="out/both"))
    assert losses(workdir / "out/both") == losses(tiny_run)
    assert same_weights(workdir / "out/both", tiny_run)


def test_a_resumed_run_with_eval_train_has_the_same_bits(workdir):
    stop_in_step(7, arguments(eval_train=True))
    train.main(arguments(eval_train=True))
    train.main(arguments(eval_train=True, out_dir="out/other"))
    runs = [result_of(workdir / "out" / name) for name in ("tiny", "other")]
    assert [run["log"] for run in runs] == [runs[0]["log"]] * 2
    assert [run["tensors"] for run in runs] == [runs[0]["tensors"]] * 2


def test_eval_train_may_change_when_a_run_is_resumed(workdir):
    train.main(arguments(max_steps=5))
    train.main(arguments(max_steps=10, eval_train=True))
    records = read_log(workdir / "out/tiny")
    assert [r["step"] for r in records if "train_eval_loss" in r] == [10]


def test_a_stop_while_the_training_split_is_evaluated_repeats_the_evaluation(workdir, monkeypatch):
    mean_loss = train.mean_loss

    def stop(run, split):
        run.stop.received = run.stop.received or (split == "train" and run.step == 5)
        return mean_loss(run, split)

    monkeypatch.setattr(train, "mean_loss", stop)
    train.main(arguments(eval_train=True))
    assert read_log(workdir / "out/tiny")[-1].keys().isdisjoint({"val_loss", "train_eval_loss"})
    monkeypatch.setattr(train, "mean_loss", mean_loss)
    train.main(arguments(eval_train=True))
    assert read_log(workdir / "out/tiny")[5].keys() >= {"val_loss", "train_eval_loss"}


def test_an_evaluation_alone_prints_the_loss_on_the_training_split(tiny_run, capsys):
    train.main(arguments(eval_only=True, eval_train=True))
    assert re.search(r"val loss .* train loss \d", capsys.readouterr().out)


# MFU and times


def test_the_log_has_the_mfu_if_the_peak_is_known(workdir, monkeypatch):
    monkeypatch.setattr(report, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(report, "mfu_flops_per_token", lambda model, T: 1e6)
    train.main(arguments(max_steps=1))
    record = read_log(Path("out/tiny"))[-1]
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] / 1000)


def test_the_console_shows_the_mfu_if_the_peak_is_known_and_the_time_left(
    workdir, monkeypatch, capsys
):
    monkeypatch.setattr(report, "peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(report, "describe_duration", lambda seconds: f"{seconds * 1e6:.0f} us")
    train.main(arguments(max_steps=10, log_interval=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    microseconds = []
    for line in lines:
        match = re.search(r"\| MFU \d+\.\d% \| (\d+) us left$", line)
        microseconds.append(int(match[1]))
    assert len(lines) == 10
    assert microseconds[0] > 0 and microseconds[-1] == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 days")],
)
def test_a_duration_is_in_the_largest_unit_of_which_it_has_two(seconds, text):
    assert report.describe_duration(seconds) == text


# Dtypes, failures, compilation ----------------------------------------------------------------


def test_bfloat16_follows_float32(tiny_run, workdir):
    train.main(arguments(out_dir="out/bf16", dtype="bfloat16"))
    float32_log = read_log(tiny_run)[1:]
    bfloat16_log = read_log(workdir / "out/bf16")[1:]
    for float32, bfloat16 in zip(float32_log, bfloat16_log, strict=True):
        assert float32["train_loss"] == pytest.approx(bfloat16["train_loss"], rel=0.01)


def test_a_float16_run_scales_its_loss_and_resumes_with_the_scale(workdir):
    train.main(arguments(dtype="float16", max_steps=6))
    stored = checkpoint.verify_checkpoint(run_dir.list_checkpoints(workdir / "out/tiny")[-1])
    assert stored["scaler"]["scale"] > 1
    train.main(arguments(dtype="float16", max_steps=8))
    assert read_log(workdir / "out/tiny")[-1]["step"] == 8


def test_a_float16_overflow_skips_the_step_and_halves_the_scale(workdir, monkeypatch):
    scales = []
    train_step = train.train_step

    def watched_step(run):
        result = train_step(run)
        scales.append(run.scaler.get_scale())
        return result

    monkeypatch.setattr(train, "train_step", watched_step)
    with spoiled("gradient", "inf", 2) as digests:
        train.main(arguments(dtype="float16", max_steps=4))
    assert digests[0] == digests[1]
    assert scales[2] == scales[1] / 2
    assert read_log(workdir / "out/tiny")[3]["grad_norm"] is None


def test_repeated_float16_overflows_end_the_run_after_20_steps(workdir, capsys):
    with spoiled("gradient", "inf", step=None):
        line = refused(capsys, arguments(dtype="float16", max_steps=30))
    assert re.search(r"\bstep 20\b", line)


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_best_checkpoint(workdir, capsys):
    with spoiled("gradient", "nan", 6):
        line = refused(capsys, arguments(checkpoint_interval=1))
    assert re.search(r"\bstep 7\b", line)
    named = re.search(r"--init_from=(\S+)", line)[1]
    assert run_dir.load_best(named, lambda path, record: path.name) == "step_00000005"
    assert run_dir.list_checkpoints(workdir / "out/tiny")[-1].name == "step_00000006"


def test_a_gradient_that_is_not_finite_in_the_first_step_names_no_checkpoint(workdir, capsys):
    with spoiled("gradient", "nan", 0):
        line = refused(capsys, arguments())
    assert re.search(r"\bstep 1\b", line)
    assert "--init_from" not in line


def test_a_failed_compilation_warns_and_trains_uncompiled(tiny_run, workdir, monkeypatch, capsys):
    def broken_backend(graph, inputs):
        raise RuntimeError("no compiler")

    torch_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: torch_compile(model, backend=broken_backend)
    )
    train.main(arguments(out_dir="out/uncompiled", compile=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert "no compiler" in lines[0]
    assert losses(workdir / "out/uncompiled") == losses(tiny_run)


def test_out_of_memory_is_one_line_with_a_smaller_batch_size(workdir, monkeypatch, capsys):
    def no_memory(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train_step", no_memory)
    line = refused(capsys, arguments(batch_size=4))
    assert re.search(r"--batch_size=2\b", line)
    assert "total_batch_size=128" in line
    assert "--activation_checkpointing=True" in line


def test_activation_checkpointing_changes_no_loss(tiny_run, workdir):
    train.main(arguments(out_dir="out/recomputed", activation_checkpointing=True))
    assert losses(workdir / "out/recomputed") == losses(tiny_run)


def test_a_block_with_activation_checkpointing_compiles_to_one_graph():
    module = train.model_module("model_rope")
    torch._dynamo.reset()
    config = module.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=16)
    model = module.GPT(config)
    x = torch.arange(8)[None]
    expected = model(x)
    graphs = []

    def recording_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    checkpoint_activations(model.transformer.h[0])
    model.transformer.h[0].compile(backend=recording_backend)
    torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1


# --init_from and --eval_only ------------------------------------------------------------------


def test_a_run_can_start_from_the_best_weights_of_another(tiny_run, workdir):
    train.main(arguments(out_dir="out/next", init_from="out/tiny", max_steps=1))
    _, best_loss = run_dir.best_checkpoint(tiny_run)
    assert read_log(workdir / "out/next")[0]["val_loss"] == best_loss


def test_eval_only_makes_no_optimizer(tiny_run, monkeypatch):
    def no_optimizer(*args):
        raise AssertionError("not needed")

    monkeypatch.setattr(train, "make_optimizer", no_optimizer)
    train.main(arguments(eval_only=True))


def test_eval_only_prints_the_loss_of_the_run_and_writes_nothing(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    train.main(arguments(eval_only=True))
    assert val_loss_of(tiny_run) in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_eval_only_of_a_new_run_makes_no_directory(workdir, capsys):
    train.main(arguments(eval_only=True))
    assert "val loss 5.5" in capsys.readouterr().out
    assert not (workdir / "out").exists()


def test_eval_only_with_init_from_evaluates_that_run_and_not_the_one_in_out_dir(
    tiny_run, workdir, capsys
):
    train.main(arguments(out_dir="out/other", seed=7, max_steps=1, eval_interval=1))
    capsys.readouterr()
    train.main(arguments(init_from="out/other", eval_only=True))
    assert val_loss_of(workdir / "out/other") in capsys.readouterr().out


def test_eval_only_accepts_a_total_batch_size_that_is_not_a_multiple(tiny_run, capsys):
    options = {"init_from": "out/tiny/step_00000012", "block_size": 10, "batch_size": 3}
    train.main(arguments(**options, eval_only=True))
    output = capsys.readouterr().out
    assert "val loss" in output
    assert "micro-step" not in output


def test_eval_only_of_a_run_that_started_from_other_weights_evaluates_the_run(
    tiny_run, workdir, capsys
):
    options = {"out_dir": "out/next", "init_from": "out/tiny", "max_steps": 2}
    train.main(arguments(**options))
    capsys.readouterr()
    train.main(arguments(**options, eval_only=True))
    assert val_loss_of(workdir / "out/next") in capsys.readouterr().out


# The default out_dir --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "out_dir"),
    [
        (["config/quickstart.py", "--seed=1"], "out/quickstart"),
        (
            ["config/gpt2.py", "config/small_gpu.py", "--model=model_rope"],
            "out/gpt2-small_gpu-model_rope",
        ),
        ([], "out/default"),  # without a config file it is not that of gpt2
    ],
)
def test_the_default_out_dir_names_the_config_files_and_the_model(argv, out_dir):
    assert default_out_dir(argv) == out_dir
