"""common/pretrained.py and tools/export.py: GPT-2 and runs into variants, variants into
transformers' format. transformers is the oracle.
"""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log
from foreign import assert_equal_logits, logits, random_gpt2, train_vivid
from transformers import AutoModelForCausalLM

import sample
import train
from common.errors import UserError
from common.pretrained import load_model
from tools.export import FORMATS, export

VARIANTS = ["model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa"]
WINDOW = 8
HEAD_DIM = 8  # of the random GPT-2


@pytest.fixture
def gpt2(workdir):
    """A random GPT-2 of transformers with four heads, saved in the directory "released"."""
    theirs = random_gpt2(n_head=4, vocab_size=257)
    theirs.save_pretrained("released")
    (workdir / "released/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return theirs


def load_released(name, capsys, **options):
    """Return that GPT-2 in a model file, and what was printed to stderr."""
    model, _ = load_model("released", name, options)
    return model, capsys.readouterr().err


def assert_refused(expected, call, *args):
    """Assert that a call raises a UserError whose message contains these texts."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert [text for text in expected if text not in str(error.value)] == []


# Weights in -----------------------------------------------------------------------------------


def test_sliding_windows_take_the_weights_of_gpt2_unchanged(gpt2, capsys):
    model, _ = load_released("model_swa", capsys, window=WINDOW)
    plain = load_model("released")[0].state_dict()
    assert all(torch.equal(p, plain[name]) for name, p in model.state_dict().items())


def test_logits_equal_those_of_gpt2_within_the_window_and_differ_beyond(gpt2, capsys):
    model, _ = load_released("model_swa", capsys, window=WINDOW)
    assert model.config.window == WINDOW
    ids = torch.randint(257, (2, 3 * WINDOW))
    difference = (logits(model, ids) - logits(gpt2, ids)).abs().amax(dim=(0, 2))
    assert difference[:WINDOW].max() < 1e-4 < difference[WINDOW:].min()


def test_grouping_kv_heads_that_are_equal_leaves_the_logits_as_they_are(gpt2, capsys):
    for block in gpt2.transformer.h:
        c_attn = block.attn.c_attn  # (in, out): queries, keys and values, each of 4 heads
        for p in (c_attn.weight.data, c_attn.bias.data):
            heads = p.unflatten(-1, (3, 4, HEAD_DIM))
            heads[..., 1:, 1, :] = heads[..., 1:, 0, :]
            heads[..., 1:, 3, :] = heads[..., 1:, 2, :]
    gpt2.save_pretrained("released")
    model, _ = load_released("model_gqa", capsys, n_kv_head=2)
    assert_equal_logits(model, gpt2, length=37)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_the_keys_and_values_of_a_group_become_their_mean_as_reported(gpt2, capsys, n_kv_head):
    model, printed = load_released("model_gqa", capsys, n_kv_head=n_kv_head)
    assert re.search(rf"\b{n_kv_head} KV heads\b.*\b{4 // n_kv_head}\b", printed)
    ours = model.transformer.h[1].attn.c_attn.weight
    theirs = gpt2.transformer.h[1].attn.c_attn.weight.T
    C, D = 4 * HEAD_DIM, HEAD_DIM
    assert torch.equal(ours[:C], theirs[:C])  # queries
    group_size = 4 // n_kv_head
    for part in (1, 2):  # keys, values
        last_group = theirs[C * (part + 1) - D * group_size : C * (part + 1)]
        mean = sum(last_group[D * i : D * i + D] for i in range(group_size)) / group_size
        start = C + D * (n_kv_head * part - 1)
        torch.testing.assert_close(ours[start : start + D], mean)


def test_one_kv_head_per_query_head_leaves_the_logits_as_they_are(gpt2, capsys):
    model, printed = load_released("model_gqa", capsys, n_kv_head=4)
    assert printed == ""
    assert_equal_logits(model, gpt2, length=37)


def test_rotary_positions_drop_wpe_and_keep_all_other_weights(gpt2, capsys):
    model, _ = load_released("model_rope", capsys)
    plain = load_model("released")[0].state_dict()
    assert plain.keys() - model.state_dict().keys() == {"transformer.wpe.weight"}
    assert all(torch.equal(p, plain[name]) for name, p in model.state_dict().items())


def test_dropping_wpe_and_grouping_kv_heads_are_reported_in_one_line(gpt2, capsys):
    _, printed = load_released("model_rope_gqa_swa", capsys, n_kv_head=2)
    assert len(printed.splitlines()) == 1
    assert "wpe" in printed
    assert "2 KV heads" in printed


def test_rotary_positions_allow_a_larger_block_size(gpt2, capsys):
    model, _ = load_released("model_rope", capsys, block_size=1000)
    assert model.config.block_size == 1000


def test_learned_positions_allow_a_smaller_block_size(gpt2, capsys):
    model, _ = load_released("model_swa", capsys, block_size=10)
    assert model.config.block_size == 10


def test_learned_positions_refuse_a_larger_block_size(gpt2):
    options = {"block_size": 1000}
    assert_refused(["block_size=64", "1000"], load_model, "released", "model_swa", options)


def test_kv_heads_that_do_not_divide_the_query_heads_are_refused(gpt2):
    options = {"n_kv_head": 3}
    assert_refused(["n_head=4", "n_kv_head=3"], load_model, "released", "model_gqa", options)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_starts_from_gpt2_resumes_and_can_be_sampled(gpt2, capsys, name):
    options = {
        "model": name,
        "init_from": "released",
        "n_layer": None,
        "n_head": None,
        "n_embd": None,
        "batch_size": 1,
        "total_batch_size": 16,
        "eval_tokens": 64,
    }
    if "gqa" in name:
        options["n_kv_head"] = 2
    for max_steps in (1, 2):
        train.main(arguments(**options, max_steps=max_steps))
    assert [record["step"] for record in read_log(Path("out/tiny"))] == [0, 1, 2]
    sample.main(["--init_from=out/tiny", "--prompt=def ", "--max_new_tokens=40", "--num_samples=2"])
    assert capsys.readouterr().out.count("def ") >= 2


def test_a_run_can_continue_with_fewer_kv_heads_but_not_with_more(workdir, capsys):
    train.main(arguments(model="model_gqa", n_head=4, n_kv_head=2, max_steps=1))
    capsys.readouterr()
    model, _ = load_model("out/tiny", "model_gqa", {"n_kv_head": 1})
    assert model.config.n_kv_head == 1
    assert "1 KV heads" in capsys.readouterr().err
    expected = ["out/tiny", "2 KV heads", "n_kv_head=4"]
    assert_refused(expected, load_model, "out/tiny", "model_gqa", {"n_kv_head": 4})


@pytest.mark.parametrize(
    ("trained", "loaded"),
    [
        ({"model": "model_swa", "window": 5}, {"name": "model"}),
        ({"model": "model"}, {"name": "model_swa", "options": {"window": 5}}),
    ],
)
def test_loading_with_another_window_reports_the_windows(workdir, capsys, trained, loaded):
    train.main(arguments(**trained, max_steps=1))
    capsys.readouterr()
    load_model("out/tiny", **loaded)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "out/tiny" in printed
    assert re.search(r"\b5\b", printed)


@pytest.mark.parametrize(
    ("trained", "name"),
    [
        ({"model": "model_swa", "window": 16}, "model"),  # block_size is 16
        ({"model": "model"}, "model_swa"),  # the default window is longer
        ({"model": "model_swa", "window": 5}, "model_swa"),
    ],
)
def test_loading_with_the_same_receptive_field_reports_nothing(workdir, capsys, trained, name):
    train.main(arguments(**trained, max_steps=1))
    capsys.readouterr()
    load_model("out/tiny", name)
    assert capsys.readouterr().err == ""


def test_a_rotary_run_cannot_become_one_with_learned_positions(workdir):
    train.main(arguments(model="model_rope", max_steps=1))
    assert_refused(["out/tiny", "wpe", "--model"], load_model, "out/tiny", "model")


# Weights out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_modes_of_exported_files_follow_the_umask(tiny_run, workdir, umask):
    before = os.umask(umask)
    try:
        export("out/tiny", "exported")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (workdir / "exported").iterdir()}
    assert modes == {0o666 & ~umask}
    assert (workdir / "exported").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_export_that_fails_leaves_nothing(tiny_run, workdir, monkeypatch):
    before = sorted(workdir.iterdir())

    def fail(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("tools.export.write_json", fail)
    with pytest.raises(OSError):
        export("out/tiny", "exported")
    assert sorted(workdir.iterdir()) == before


@pytest.mark.parametrize(
    "options",
    [{"model": "model_rope"}, {"model": "model_rope_gqa_swa", "n_kv_head": 2, "window": 5}],
)
def test_transformers_writes_the_same_greedy_text_past_window_and_block_size(
    workdir, capsys, options
):
    prompt = "def f1(x):"
    train_vivid(**options)
    export("out/tiny", "exported")
    capsys.readouterr()
    sampling = ["--temperature=0", "--dtype=float32", "--max_new_tokens=40"]
    sample.main(["--init_from=out/tiny", f"--prompt={prompt}", *sampling])
    ids = torch.tensor([list(prompt.encode())])
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    token_ids = [token_id for token_id in expected[0].tolist() if token_id < 256]
    text = bytes(token_ids).decode(errors="replace")
    assert len(set(text)) > 5
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("n_kv_head", [1, 3, 6])
def test_grouped_queries_are_exported_as_gpt2_and_read_back_bit_for_bit(workdir, n_kv_head):
    train_vivid(model="model_gqa", n_kv_head=n_kv_head, n_head=6, n_embd=36)
    export("out/tiny", "exported")
    ours, _ = load_model("out/tiny")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert_equal_logits(ours, theirs)
    back, _ = load_model("exported", "model_gqa", {"n_kv_head": n_kv_head})
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in ours.state_dict().items())


def test_windows_with_biases_in_c_attn_are_not_exported_and_leave_no_file(workdir):
    train.main(arguments(model="model_swa", n_head=4, max_steps=1))
    before = sorted(workdir.iterdir())
    assert_refused(["out/tiny", "c_attn", "--bias=False"], export, "out/tiny", "exported")
    assert sorted(workdir.iterdir()) == before


def test_a_model_file_that_transformers_does_not_have_is_not_exported(tiny_run, monkeypatch):
    monkeypatch.delitem(FORMATS, "model")
    expected = ["out/tiny is a model,", "transformers", "model_rope"]
    assert_refused(expected, export, "out/tiny", "exported")
