"""train.py: what a step computes, what the log says, dtypes, compilation, where weights come from."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, arguments, read_log, refused

import train
from common import checkpoint
from common.dataloader import Loader
from common.optimizer import make_optimizer
from common.pretrained import load_model
from train import checkpoint_activations, default_out_dir

ROOT = Path(train.__file__).parent


def losses(run):
    return [
        (r["step"], r.get("train_loss"), r.get("grad_norm"), r.get("val_loss"))
        for r in read_log(run)
    ]


# What a step computes


def test_gradient_accumulation_gives_the_loss_and_norm_of_one_large_batch(workdir):
    train.main(arguments(out_dir="out/1", batch_size=8, dropout=0.0))
    train.main(arguments(out_dir="out/4", batch_size=2, dropout=0.0))
    for one, four in zip(read_log(Path("out/1"))[1:], read_log(Path("out/4"))[1:], strict=True):
        assert one["train_loss"] == pytest.approx(four["train_loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


def test_activation_checkpointing_changes_no_loss(tiny_run, workdir):
    train.main(arguments(out_dir="out/recomputed", activation_checkpointing=True))
    assert losses(workdir / "out/recomputed") == losses(tiny_run)


def test_a_step_is_that_of_an_optimizer_written_out_by_hand(workdir):
    """Two steps of AdamW with clipping, from the formulas (Loshchilov & Hutter 2019, algorithm 2), in float64."""
    options = dict(
        dropout=0.0, batch_size=8, max_steps=2, eval_interval=1, weight_decay=0.3, warmup_steps=0
    )
    train.main(
        arguments(out_dir="out/hand", **options, lr_schedule="wsd", learning_rate=0.01, min_lr=0.01)
    )
    module = train.model_module("model")
    torch.manual_seed(1337)
    shape = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    model = module.GPT(module.GPTConfig(**shape, vocab_size=257))
    loader = Loader("data/tiny", 16, 257, 1337)
    state = {
        name: (torch.zeros_like(p).double(), torch.zeros_like(p).double())
        for name, p in model.named_parameters()
    }
    for step in range(2):
        model.zero_grad()
        model(*loader.train_batch(8 * step, 8)).backward()
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))
        assert read_log(Path("out/hand"))[step + 1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for name, p in model.named_parameters():
            g = p.grad.double() * min(1.0, 0.5 / norm)
            m, v = state[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
            decay = 0.3 if p.dim() == 2 else 0.0
            p.data = (
                p.double() * (1 - 0.01 * decay) - 0.01 * m_hat / (v_hat.sqrt() + 1e-8)
            ).float()
    trained = load_model("out/hand/step_00000002")[0].state_dict()
    for name, p in model.named_parameters():
        # The gradient of the key bias is zero but for rounding, which Adam scales up to a whole step.
        rows = slice(0, 16) if name.endswith("c_attn.bias") else slice(None)
        torch.testing.assert_close(trained[name][rows], p.data[rows], rtol=1e-4, atol=1e-5)


def test_the_log_has_a_line_for_every_step_with_all_its_fields(tiny_run):
    records = read_log(tiny_run)
    assert [r["step"] for r in records] == list(range(13))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 5, 10, 12]
    for record in records[1:]:
        assert record.keys() >= {
            "train_loss",
            "grad_norm",
            "lr",
            "tokens",
            "seconds",
            "tokens_per_second",
            "mfu",
        }
        assert record["tokens"] == 128 * record["step"] and record["memory_gb"] > 0.01
    assert all(b["seconds"] > a["seconds"] for a, b in itertools.pairwise(records))


def test_the_validation_loss_is_the_mean_over_every_token_of_the_split(workdir, capsys):
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
    assert (
        f"val loss {val_loss:.4f} | perplexity {math.exp(val_loss):.2f}" in capsys.readouterr().out
    )


def test_bits_per_byte_counts_the_bytes_of_meta_json(workdir, capsys):
    meta = {"tokenizer": "byte", "val": {"tokens": 600, "bytes": 1200}}
    (workdir / "data/tiny/meta.json").write_text(json.dumps(meta))
    train.main(arguments(eval_only=True))
    words = capsys.readouterr().out.split()
    loss, bits = float(words[words.index("loss") + 1]), float(words[words.index("bits") - 1])
    assert bits == pytest.approx(loss / math.log(2) / 2, abs=1e-3)


def test_the_cosine_schedule_meets_its_known_points():
    config = train.TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = {step: train.learning_rate(config, step) for step in (0, 4, 9, 10, 60, 110, 500)}
    assert rates == pytest.approx({0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1})


def test_wsd_is_constant_until_the_last_fifth_and_then_linear():
    config = train.TrainConfig(
        max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.0, lr_schedule="wsd"
    )
    rates = [train.learning_rate(config, step) for step in (10, 79, 80, 90, 100, 200)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])


def test_decay_is_on_matrices_only():
    module = train.model_module("model")
    model = module.GPT(module.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16))
    decayed, rest = make_optimizer(model, train.TrainConfig(weight_decay=0.2)).param_groups
    assert decayed["weight_decay"] == 0.2 and all(p.dim() == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0 and all(p.dim() == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_the_model_learns_the_repetitive_text(workdir):
    train.main(arguments(max_steps=150, dropout=0.0, eval_interval=1000, checkpoint_interval=1000))
    records = read_log(Path("out/tiny"))
    assert records[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert records[-1]["val_loss"] < 1.8


def test_mfu_counts_flops_as_palm_nanogpt_and_llm_c_do():
    with torch.device("meta"):
        gpt2 = train.model_module("model").GPT(train.model_module("model").GPTConfig())
        windows = train.model_module("model_swa").GPT(
            train.model_module("model_swa").GPTConfig(window=256)
        )
    weights = 124_439_808 - 1024 * 768  # without positions
    assert (
        train.mfu_flops_per_token(gpt2, 1024) == 6 * weights + 12 * 12 * 768 * 1024 == 855_166_464
    )
    assert train.mfu_flops_per_token(windows, 1024) == 6 * weights + 12 * 12 * 768 * 256


def test_the_log_has_the_mfu_where_the_peak_is_known(workdir, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(train, "mfu_flops_per_token", lambda model, T: 1e6)
    train.main(arguments(max_steps=1))
    record = read_log(Path("out/tiny"))[-1]
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] / 1000)


# dtypes and compilation


def test_bfloat16_follows_float32(tiny_run, workdir):
    train.main(arguments(out_dir="out/bf16", dtype="bfloat16"))
    for a, b in zip(read_log(tiny_run)[1:], read_log(workdir / "out/bf16")[1:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.01)


def test_a_float16_run_scales_its_loss_and_resumes_with_the_scale(workdir):
    train.main(arguments(dtype="float16", max_steps=6))
    stored = checkpoint.read_config(checkpoint.list_checkpoints(workdir / "out/tiny")[-1])
    assert stored["scaler"]["scale"] > 1
    train.main(arguments(dtype="float16", max_steps=8))
    assert read_log(workdir / "out/tiny")[-1]["step"] == 8


def test_a_float16_overflow_skips_the_step_and_halves_the_scale(workdir, monkeypatch):
    original = train.train_step
    seen = []

    def spoil_step_2(run):
        before = run.model.transformer.wte.weight.clone()
        hook = run.model.transformer.wte.weight.register_hook(
            lambda g: g * (torch.inf if run.step == 2 else 1)
        )
        result = original(run)
        hook.remove()
        seen.append((torch.equal(before, run.model.transformer.wte.weight), run.scaler.get_scale()))
        return result

    monkeypatch.setattr(train, "train_step", spoil_step_2)
    train.main(arguments(dtype="float16", max_steps=4))
    unchanged, scales = zip(*seen, strict=True)
    assert unchanged == (False, False, True, False)
    assert scales[2] == scales[1] / 2
    assert read_log(workdir / "out/tiny")[3]["grad_norm"] is None


def test_float16_overflows_without_end_stop_the_run(workdir, monkeypatch, capsys):
    original = train.train_step

    def spoil(run):
        hook = run.model.transformer.wte.weight.register_hook(lambda g: g * torch.inf)
        try:
            return original(run)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "train_step", spoil)
    assert "step 20: " in refused(capsys, arguments(dtype="float16", max_steps=30))


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_good_weights(
    workdir, monkeypatch, capsys
):
    original = train.train_step

    def spoil_step_6(run):
        if run.step == 6:
            run.model.transformer.wte.weight.register_hook(lambda g: g * torch.nan)
        return original(run)

    monkeypatch.setattr(train, "train_step", spoil_step_6)
    line = refused(capsys, arguments())
    assert "step 7:" in line and "--init_from=out/tiny/step_00000005" in line
    assert checkpoint.list_checkpoints(workdir / "out/tiny")[-1].name == "step_00000005"
    kept = load_model("out/tiny")[0]
    assert all(p.isfinite().all() for p in kept.parameters())


def test_a_loss_that_is_not_finite_in_the_first_step_names_no_checkpoint(
    workdir, monkeypatch, capsys
):
    original = train.train_step

    def spoil(run):
        run.model.transformer.wte.weight.register_hook(lambda g: g * torch.nan)
        return original(run)

    monkeypatch.setattr(train, "train_step", spoil)
    line = refused(capsys, arguments())
    assert "step 1:" in line and "--init_from" not in line


def test_a_failed_compilation_warns_and_trains_uncompiled(tiny_run, workdir, monkeypatch, capsys):
    def broken_backend(graph, inputs):
        raise RuntimeError("no compiler")

    compile_for_real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: compile_for_real(model, backend=broken_backend)
    )
    train.main(arguments(out_dir="out/uncompiled", compile=True))
    assert re.fullmatch("warning: .*no compiler.*\n", capsys.readouterr().err)
    assert losses(workdir / "out/uncompiled") == losses(tiny_run)


def test_out_of_memory_is_one_line_with_a_batch_size_that_keeps_the_total(
    workdir, monkeypatch, capsys
):
    def no_memory(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train_step", no_memory)
    line = refused(capsys, arguments(batch_size=4))
    assert (
        "--batch_size=2 keeps total_batch_size=128" in line
        and "--activation_checkpointing=True" in line
    )


# init_from


def test_a_run_can_begin_with_the_best_weights_of_another(tiny_run, workdir):
    train.main(arguments(out_dir="out/next", init_from="out/tiny", max_steps=1))
    assert (
        read_log(workdir / "out/next")[0]["val_loss"]
        == json.loads((tiny_run / "best.json").read_text())["val_loss"]
    )


def test_eval_only_prints_the_loss_of_the_run_and_writes_nothing(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    train.main(arguments(eval_only=True))
    assert f"val loss {read_log(tiny_run)[-1]['val_loss']:.4f}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_eval_only_of_a_new_run_makes_no_directory(workdir, capsys):
    train.main(arguments(eval_only=True))
    assert "val loss 5.5" in capsys.readouterr().out
    assert not (workdir / "out").exists()


def test_eval_only_of_another_run_evaluates_that_run_and_not_the_one_in_out_dir(
    tiny_run, workdir, capsys
):
    train.main(arguments(out_dir="out/other", seed=7, max_steps=1, eval_interval=1))
    capsys.readouterr()
    expected = read_log(workdir / "out/other")[-1]["val_loss"]
    train.main(arguments(init_from="out/other", eval_only=True))
    assert f"val loss {expected:.4f}" in capsys.readouterr().out


def test_eval_only_needs_no_total_batch_size_that_divides(tiny_run, capsys):
    train.main(
        arguments(init_from="out/tiny/step_00000012", eval_only=True, block_size=10, batch_size=3)
    )
    assert "val loss" in capsys.readouterr().out


def test_eval_only_of_a_run_that_began_with_other_weights_evaluates_the_run(
    tiny_run, workdir, capsys
):
    options = dict(out_dir="out/next", init_from="out/tiny", max_steps=2)
    train.main(arguments(**options))
    capsys.readouterr()
    train.main(arguments(**options, eval_only=True))
    assert (
        f"val loss {read_log(workdir / 'out/next')[-1]['val_loss']:.4f}" in capsys.readouterr().out
    )


def test_the_default_out_dir_names_the_configs_and_the_model_of_the_command_line():
    assert default_out_dir([]) == "out/default"  # not that of config/gpt2.py, which is another run
    assert default_out_dir(["config/quickstart.py", "--seed=1"]) == "out/quickstart"
    argv = ["config/gpt2.py", "config/small_gpu.py", "--model=model_rope"]
    assert default_out_dir(argv) == "out/gpt2-small_gpu-model_rope"


def test_a_block_that_recomputes_its_activations_still_compiles():
    module = train.model_module("model_rope")
    torch._dynamo.reset()
    model = module.GPT(
        module.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=16)
    )
    expected, x = model(torch.arange(8)[None]), torch.arange(8)[None]
    checkpoint_activations(model.transformer.h[0])
    graphs = []
    model.transformer.h[0].compile(
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1


def test_dropout_differs_from_step_to_step_and_from_rank_to_rank(workdir, monkeypatch):
    batch = torch.randint(257, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Loader, "train_batch", lambda self, first, count: tuple(batch))
    original, losses = train.train_step, []
    for rank in (0, 1):

        def as_rank(run, rank=rank):
            with monkeypatch.context() as patch:
                patch.setattr(run.group, "rank", rank)
                return original(run)

        monkeypatch.setattr(train, "train_step", as_rank)
        options = dict(
            out_dir=f"out/{rank}", max_steps=2, learning_rate=0.0, min_lr=0.0, dropout=0.5
        )
        train.main(arguments(**options, eval_interval=100, total_batch_size=64))
        losses += [record["train_loss"] for record in read_log(Path(f"out/{rank}"))[1:]]
    assert len(set(losses)) == len(losses) == 4
