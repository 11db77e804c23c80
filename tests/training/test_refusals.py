"""train.py: bad input is one line and exit status 2; nothing is written or lost."""

import dataclasses
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import arguments, refused, write_dataset
from runs import same_weights, stop_in_step, weights

import model
import train
from common import models, run_dir
from common.errors import UserError
from training.parallel import check_model

# case: (options that train.py must refuse, what the error must contain)
BAD = {
    "an unknown option": ({"lerning_rate": 1}, ["lerning_rate", "learning_rate"]),
    "an option name of nanoGPT": ({"max_iters": 1}, ["max_iters", "--max_steps"]),
    "a wrong type": ({"max_steps": "many"}, ["max_steps=many", "int"]),
    "an unknown model": ({"model": "model_none"}, ["model=model_none", "model_rope"]),
    "n_embd not divisible by n_head": ({"n_embd": 15}, ["n_embd=15", "n_head=2"]),
    "a total_batch_size that is not a multiple": (
        {"total_batch_size": 100},
        ["total_batch_size=100", "batch_size", "block_size", "4 x 16", "64", "128"],
    ),
    "a missing dataset": (
        {"dataset": "none"},
        ["data/none", "python prepare_data.py none --input="],
    ),
    "missing fineweb": (
        {"dataset": "fineweb"},
        ["python prepare_data.py fineweb", "config/quickstart.py"],
    ),
    "a vocabulary smaller than that of the data": (
        {"vocab_size": 100},
        ["vocab_size=100", "257", "data/tiny"],
    ),
    "a block_size longer than the text": (
        {"block_size": 65536, "total_batch_size": 262144},
        ["train.bin", "9080", "block_size=65536"],
    ),
    "a missing device": ({"device": "cuda:77"}, ["device=cuda:77"]),
    "an unsupported device": ({"device": "meta"}, ["device=meta", "cuda:N"]),
    "an unknown dtype": ({"dtype": "float8"}, ["dtype=float8", "bfloat16"]),
    "an unknown schedule": ({"lr_schedule": "linear"}, ["lr_schedule=linear", "cosine", "wsd"]),
    "min_lr above learning_rate": ({"min_lr": 0.1}, ["min_lr=0.1", "learning_rate=0.01"]),
    "a seed beyond 64 bits": ({"seed": 10**30}, [f"seed={10**30}", "2**63"]),
    "no steps": ({"max_steps": 0}, ["max_steps=0", "1"]),
    "a missing init_from": ({"init_from": "out/nothing"}, ["out/nothing", "gpt2"]),
    "fsdp without torchrun": ({"fsdp": True}, ["fsdp=True", "torchrun"]),
    "shard_degree without fsdp": ({"shard_degree": 2}, ["shard_degree=2", "--fsdp=True"]),
}


@pytest.mark.parametrize("options, expected", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_writes_no_file(workdir, capsys, options, expected):
    line = refused(capsys, arguments(**options))
    assert [text for text in expected if text not in line] == []
    assert [path for path in workdir.glob("out/**/*") if path.is_file()] == []


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"n_layer": 3}, ["n_layer", "2", "3"]),
        ({"learning_rate": 0.02}, ["learning_rate", "0.01", "0.02"]),
        ({"dataset": "twin"}, ["dataset", "tiny", "twin"]),
        ({"dataset": "twin", "allow_changes": True}, ["dataset", "tiny", "twin"]),
    ],
)
def test_an_out_dir_that_holds_another_run_is_refused_and_kept(
    tiny_run, workdir, capsys, options, expected
):
    ids = list(b"other text " * 100)
    write_dataset(workdir / "data/twin", ids, ids, {"tokenizer": "byte"})
    before = (tiny_run / "log.jsonl").read_text()
    line = refused(capsys, arguments(**options, max_steps=20))
    assert all(text in line for text in (*expected, "--out_dir", "--overwrite=True"))
    assert (tiny_run / "log.jsonl").read_text() == before
    assert (tiny_run / "step_00000012").exists()


def test_resuming_with_changed_data_is_refused_with_both_token_counts(tiny_run, workdir, capsys):
    with open(workdir / "data/tiny/train.bin", "ab") as file:
        file.write(b"\0\0")
    line = refused(capsys, arguments(max_steps=20))
    assert "9080" in line
    assert "9081" in line


CHAR = {
    "tokenizer": "char",
    "chars": list("abcd"),
    "train": {"sha256": "0a"},
    "val": {"sha256": "0b"},
}


@pytest.mark.parametrize(
    "meta, expected",
    [
        ({"chars": list("aBcd")}, ["token 1", "'b'", "'B'"]),
        ({"chars": list("abdc")}, ["token 2", "'c'", "'d'"]),
        ({"chars": list("abcde")}, ["vocab_size", "4", "5"]),
        ({"vocab_size": 9}, ["vocab_size", "4", "9"]),
        ({"tokenizer": "byte"}, ["tokenizer", "char", "byte"]),
        ({"train": {"sha256": "0c"}}, ["train.bin", "0a", "0c"]),
        ({"val": {"sha256": "0c"}}, ["val.bin", "0b", "0c"]),
        ({"val": {}}, ["val.bin", "0b"]),
    ],
)
@pytest.mark.parametrize("allow_changes", [False, True])
def test_resuming_is_refused_if_the_ids_stand_for_another_text(
    workdir, capsys, meta, expected, allow_changes
):
    path = workdir / "data/char/meta.json"
    write_dataset(path.parent, [0, 1, 2, 3] * 99, [0, 1] * 99, CHAR)
    options = {"dataset": "char", "vocab_size": 300, "eval_interval": 2, "n_layer": 1}
    train.main(arguments(max_steps=2, **options))
    path.write_text(json.dumps(CHAR | meta))
    line = refused(capsys, arguments(max_steps=3, **options, allow_changes=allow_changes))
    assert [text for text in (*expected, "data/char", "--out_dir") if text not in line] == []
    assert "--allow_changes" not in line


def test_a_dataset_that_was_made_again_with_the_same_content_is_the_same(workdir):
    folder = workdir / "data/char"
    write_dataset(folder, [0, 1, 2, 3] * 99, [0, 1] * 99, CHAR)
    train.main(arguments(dataset="char", max_steps=2))
    shutil.rmtree(folder)
    again = CHAR | {"source": "elsewhere", "vocab_size": 4}
    write_dataset(folder, [0, 1, 2, 3] * 99, [0, 1] * 99, again)
    train.main(arguments(dataset="char", max_steps=3))
    assert (workdir / "out/tiny/step_00000003").exists()


@pytest.mark.parametrize(
    "options, helps",
    [
        ({"learning_rate": 0.02}, True),
        ({"dropout": 0.3, "eval_tokens": 512}, True),
        ({"learning_rate": 0.02, "seed": 3}, False),
        ({"beta2": 0.9}, False),
        ({"optimizer": "muon"}, False),
        ({"total_batch_size": 64}, False),
        ({"bias": False}, False),
    ],
)
def test_allow_changes_is_named_only_where_it_helps(tiny_run, capsys, options, helps):
    line = refused(capsys, arguments(**options, max_steps=13))
    assert [name for name in options if name not in line] == []
    assert ("--allow_changes=True" in line) == helps


def test_an_id_beyond_vocab_size_is_refused_before_a_run_is_overwritten(tiny_run, capsys):
    ids = np.fromfile("data/tiny/train.bin", dtype="<u2")
    ids[len(ids) // 2 :] = 999
    ids.tofile("data/tiny/train.bin")
    line = refused(capsys, arguments(overwrite=True))
    assert all(text in line for text in ("999", "vocab_size=257", "1000"))
    assert (tiny_run / "step_00000012").exists()


def test_a_second_process_in_the_same_out_dir_is_refused(tiny_run, capsys):
    with run_dir.lock_run(tiny_run):
        assert "out/tiny" in refused(capsys, arguments(max_steps=20))


def test_an_out_dir_below_a_file_is_refused(workdir, capsys):
    (workdir / "out").write_text("mine")
    assert "out" in refused(capsys, arguments())
    assert (workdir / "out").read_text() == "mine"


def test_a_truncated_checkpoint_is_refused_by_its_path_with_the_file_and_both_sizes(
    tiny_run, capsys
):
    file = next((tiny_run / "step_00000012").glob("*.safetensors"))
    size = file.stat().st_size
    os.truncate(file, size - 10)
    options = arguments(init_from="out/tiny/step_00000012", out_dir="out/new")
    line = refused(capsys, options)
    assert "step_00000012" in line
    assert file.name in line
    assert {str(size - 10), str(size)} <= set(re.findall(r"\d+", line))


def test_weights_of_another_tokenizer_are_refused_with_both(tiny_run, workdir, capsys):
    meta = {"tokenizer": "char", "chars": ["a", "b"]}
    write_dataset(workdir / "data/char", [0, 1] * 300, [0, 1] * 300, meta)
    line = refused(capsys, arguments(dataset="char", init_from="out/tiny", out_dir="out/new"))
    assert all(text in line for text in ("out/tiny", "byte", "data/char", "char"))


def test_weights_of_other_characters_are_refused(workdir, capsys):
    write_dataset(workdir / "data/char", [0, 1, 2, 3] * 99, [0, 1] * 99, CHAR)
    train.main(arguments(dataset="char", max_steps=1))
    (workdir / "data/char/meta.json").write_text(json.dumps(CHAR | {"chars": list("abcD")}))
    line = refused(capsys, arguments(dataset="char", init_from="out/tiny", out_dir="out/new"))
    assert all(text in line for text in ("out/tiny", "char", "data/char"))


@pytest.mark.parametrize("value", [0, 10**14])
def test_a_dist_timeout_out_of_range_is_refused(workdir, capsys, value):
    assert f"dist_timeout={value}" in refused(capsys, arguments(dist_timeout=value))


# A model file of one's own -------------------------------------------------------------------


def change_blocks(monkeypatch, change):
    """Let `change` do something to each block of model.py that is made."""
    original = model.Block.__init__

    def init_and_change(block, config, layer):
        original(block, config, layer)
        change(block)

    monkeypatch.setattr(model.Block, "__init__", init_and_change)


def test_a_parameter_without_gradient_is_refused_before_the_first_step(
    workdir, capsys, monkeypatch
):
    def add_parameter(block):
        block.later = torch.nn.Parameter(torch.zeros(8, 8))

    change_blocks(monkeypatch, add_parameter)
    line = refused(capsys, arguments())
    assert "model.py" in line and "transformer.h.0.later" in line
    assert run_dir.list_checkpoints(workdir / "out/tiny") == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_parameter_keeps_its_values_and_resumes_with_the_same_bits(
    workdir, monkeypatch, optimizer
):
    def freeze(block):
        block.ln_1.requires_grad_(False)
        block.attn.c_proj.requires_grad_(False)

    change_blocks(monkeypatch, freeze)
    options = {"optimizer": optimizer, "checkpoint_interval": 2}
    train.main(arguments(max_steps=6, **options))
    stop_in_step(4, arguments(out_dir="out/stopped", max_steps=6, **options))
    train.main(arguments(out_dir="out/stopped", max_steps=6, **options))
    assert same_weights(workdir / "out/stopped", workdir / "out/tiny")
    assert (weights(workdir / "out/tiny")["transformer.h.1.ln_1.weight"] == 1).all()


def add_buffer(gpt):
    gpt.transformer.h[1].register_buffer("mask", torch.ones(3))


def add_tensor(gpt):
    gpt.transformer.h[1].scale = torch.ones(3)


def tie(gpt):
    gpt.lm_head = torch.nn.Linear(16, 257, bias=False)
    gpt.lm_head.weight = gpt.transformer.wte.weight


def share_blocks(gpt):
    gpt.transformer.h = torch.nn.ModuleList([gpt.transformer.h[0]] * 2)


def rename_blocks(gpt):
    gpt.blocks = gpt.transformer.h
    del gpt.transformer.h


def add_scalar(gpt):
    gpt.gain = torch.nn.Parameter(torch.ones(()))


def store_bf16(gpt):
    gpt.transformer.ln_f.bfloat16()


def remove_matrices(gpt):
    for block in gpt.transformer.h:
        block.attn = block.mlp = None


@pytest.mark.parametrize(
    "change, expected",
    [
        (add_buffer, "transformer.h.1.mask"),
        (add_tensor, "transformer.h.1.scale"),
        (tie, "lm_head.weight"),
        (share_blocks, "transformer.h.1"),
        (rename_blocks, "transformer.h"),
        (add_scalar, "gain"),
        (store_bf16, "transformer.ln_f.weight"),
        (remove_matrices, "--optimizer=adamw"),
    ],
)
def test_a_model_that_training_cannot_handle_is_refused_by_name(change, expected):
    gpt = model.GPT(model.GPTConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=257, block_size=8))
    config = train.TrainConfig(model="model_mine", optimizer="muon", fsdp=True)
    check_model(gpt, config)
    change(gpt)
    with pytest.raises(UserError, match=rf"model_mine\.py: .*{re.escape(expected)}"):
        check_model(gpt, config)


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: (loss, loss),  # nanoGPT returns logits and loss
        lambda loss: loss.view(1),
        lambda loss: loss.item(),
    ],
)
def test_a_model_that_does_not_return_the_loss_alone_is_refused(
    workdir, capsys, monkeypatch, change
):
    forward = model.GPT.forward
    monkeypatch.setattr(model.GPT, "forward", lambda *inputs: change(forward(*inputs)))
    line = refused(capsys, arguments())
    assert "model.py" in line and "loss" in line


def test_blocks_may_be_called_with_keywords(workdir, monkeypatch):
    def forward(gpt, idx, targets):
        x = gpt.transformer.wte(idx) + gpt.transformer.wpe(torch.arange(idx.size(1)))
        for block in gpt.transformer.h:
            x = block(x, cache=None)
        logits = gpt.head(gpt.transformer.ln_f(x)).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)

    monkeypatch.setattr(model.GPT, "forward", forward)
    train.main(arguments(max_steps=2, activation_checkpointing=True, dtype="bfloat16"))
    assert run_dir.list_checkpoints(workdir / "out/tiny")


def round_up(gpt_config):
    gpt_config.vocab_size = 320


@pytest.mark.parametrize(
    "field, value, change",
    [
        ("pattern", (1, 2), None),
        ("adtype", torch.float32, None),
        ("cap", float("nan"), None),
        ("vocab_size", 257, round_up),
    ],
)
def test_a_config_that_a_checkpoint_cannot_hold_is_refused_by_field(
    workdir, capsys, monkeypatch, field, value, change
):
    config = dataclasses.make_dataclass(
        "GPTConfig", [(field, type(value), value)], bases=(model.GPTConfig,)
    )
    original = model.GPT.__init__

    def init_and_change(gpt, config):
        original(gpt, config)
        if change:
            change(config)

    monkeypatch.setattr(model, "GPTConfig", config)
    monkeypatch.setattr(model.GPT, "__init__", init_and_change)
    line = refused(capsys, arguments())
    assert "model.py" in line and field in line
    assert run_dir.list_checkpoints(workdir / "out/tiny") == []


@pytest.mark.parametrize(
    "text, expected",
    [("def f(:\n", "model_mine.py, line 1"), ("x = 1\n", "GPTConfig")],
    ids=["a syntax error", "no model"],
)
def test_a_file_without_a_model_is_refused_and_does_not_disturb_others(
    workdir, capsys, monkeypatch, text, expected
):
    (workdir / "model_mine.py").write_text(text)
    monkeypatch.syspath_prepend(workdir)
    monkeypatch.setattr(models, "model_names", lambda: ["model", "model_gqa", "model_mine"])
    monkeypatch.delitem(sys.modules, "model_mine", raising=False)
    assert expected in refused(capsys, arguments(model="model_mine"))
    assert "model_gqa" in refused(capsys, arguments(n_kv_head=2))


def test_a_scalar_parameter_trains_and_resumes_without_fsdp(workdir, monkeypatch):
    change_blocks(monkeypatch, use_scalar)
    train.main(arguments(max_steps=2))
    train.main(arguments(max_steps=3))
    assert weights(workdir / "out/tiny")["transformer.h.0.gain"] != 1


def use_scalar(block):
    block.gain = torch.nn.Parameter(torch.ones(()))
    block.ln_2.register_forward_hook(lambda norm, inputs, output: output * block.gain)
