"""GPT-2 and runs into the variants, and trained variants out; transformers is the oracle."""

import re
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log
from test_pretrained import logits, random_gpt2
from transformers import AutoModelForCausalLM

import sample
import train
from common.errors import UserError
from common.pretrained import load_model
from tools.export import export

VARIANTS = ["model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa"]
WINDOW = 8


@pytest.fixture
def gpt2(workdir):
    """A directory with a random GPT-2 of four heads in transformers' format, and the model that transformers has."""
    theirs = random_gpt2(n_head=4, vocab_size=257)
    theirs.save_pretrained("released")
    (workdir / "released/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return theirs


def loaded(name, capsys, **options):
    """The GPT-2 of that directory in a model file, and what was said about it."""
    model, _ = load_model("released", name, options)
    return model, capsys.readouterr().err


# In


def test_sliding_windows_take_gpt2_as_it_is(gpt2, capsys):
    model, said = loaded("model_swa", capsys, window=WINDOW)
    plain = load_model("released")[0].state_dict()
    assert len(said.splitlines()) == 1 and "model_swa" in said and "8" in said
    assert model.config.window == WINDOW
    assert all(torch.equal(p, plain[name]) for name, p in model.state_dict().items())


def test_within_the_window_the_logits_are_gpt2_s_and_beyond_they_are_not(gpt2, capsys):
    model, ids = loaded("model_swa", capsys, window=WINDOW)[0], torch.randint(257, (2, 3 * WINDOW))
    difference = (logits(model, ids) - logits(gpt2, ids)).abs().amax(dim=(0, 2))
    assert difference[:WINDOW].max() < 1e-4 < difference[WINDOW:].min()


def test_where_heads_of_a_group_are_equal_their_mean_leaves_gpt2_as_it_is(gpt2, capsys):
    for block in gpt2.transformer.h:  # (in, out): queries, keys, values, each of four heads of 32
        for p in (block.attn.c_attn.weight.data, block.attn.c_attn.bias.data):
            heads = p.unflatten(-1, (3, 4, 32))
            heads[..., 1:, 1, :], heads[..., 1:, 3, :] = heads[..., 1:, 0, :], heads[..., 1:, 2, :]
    gpt2.save_pretrained("released")
    model, ids = loaded("model_gqa", capsys, n_kv_head=2)[0], torch.randint(257, (2, 37))
    assert (logits(model, ids) - logits(gpt2, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_keys_and_values_of_a_group_become_their_mean(gpt2, capsys, n_kv_head):
    model, said = loaded("model_gqa", capsys, n_kv_head=n_kv_head)
    theirs = gpt2.transformer.h[1].attn.c_attn.weight.T
    assert torch.equal(model.transformer.h[1].attn.c_attn.weight[:128], theirs[:128])
    for part in (1, 2):  # of keys, of values
        group = 4 // n_kv_head
        last = theirs[128 * part + 128 - 32 * group : 128 * part + 128]
        mean = sum(last[32 * i : 32 * i + 32] for i in range(group)) / group
        ours = model.transformer.h[1].attn.c_attn.weight[128 + 32 * (n_kv_head * part - 1) :][:32]
        torch.testing.assert_close(ours, mean)
    assert re.search(rf"\b{n_kv_head} KV heads\b.*\b{group}\b", said)


def test_as_many_key_and_value_heads_leave_gpt2_as_it_is(gpt2, capsys):
    model, said = loaded("model_gqa", capsys, n_kv_head=4)
    ids = torch.randint(257, (2, 37))
    assert said == "" and (logits(model, ids) - logits(gpt2, ids)).abs().max() < 1e-4


def test_rotary_positions_drop_the_learned_ones_say_so_and_keep_the_rest(gpt2, capsys):
    model, said = loaded("model_rope", capsys)
    plain = load_model("released")[0].state_dict()
    assert plain.keys() - model.state_dict().keys() == {"transformer.wpe.weight"}
    assert all(torch.equal(p, plain[name]) for name, p in model.state_dict().items())
    assert len(said.splitlines()) == 1 and "wpe" in said


def test_the_combination_says_both(gpt2, capsys):
    said = loaded("model_rope_gqa_swa", capsys, n_kv_head=2)[1]
    assert "wpe" in said and "2 KV heads" in said


def test_rotary_positions_take_any_block_size_learned_ones_a_smaller(gpt2, capsys):
    assert loaded("model_rope", capsys, block_size=1000)[0].config.block_size == 1000
    assert loaded("model_swa", capsys, block_size=10)[0].config.block_size == 10
    with pytest.raises(UserError, match="block_size=64, not 1000"):
        load_model("released", "model_swa", {"block_size": 1000})


def test_groups_that_do_not_divide_the_heads_are_refused(gpt2):
    with pytest.raises(UserError, match=r"n_head=4.*n_kv_head=3"):
        load_model("released", "model_gqa", {"n_kv_head": 3})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_begins_with_gpt2_goes_on_and_can_be_sampled(gpt2, capsys, name):
    options = dict(
        model=name, init_from="released", n_layer=None, n_head=None, n_embd=None, batch_size=1
    )
    options |= {"n_kv_head": 2} if "gqa" in name else {}
    for max_steps in (1, 2):
        train.main(arguments(**options, total_batch_size=16, eval_tokens=64, max_steps=max_steps))
    assert [record["step"] for record in read_log(Path("out/tiny"))] == [0, 1, 2]
    sample.main(["--init_from=out/tiny", "--prompt=def ", "--max_new_tokens=40", "--num_samples=2"])
    assert capsys.readouterr().out.count("def ") >= 2


@pytest.mark.parametrize(("have", "want"), [(2, 1), (4, 2)])
def test_a_grouped_run_can_go_on_with_fewer_groups(workdir, capsys, have, want):
    train.main(arguments(model="model_gqa", n_head=4, n_kv_head=have, max_steps=1))
    capsys.readouterr()
    model, _ = load_model("out/tiny", "model_gqa", {"n_kv_head": want})
    assert model.config.n_kv_head == want and f"{want} KV heads" in capsys.readouterr().err


def test_a_grouped_run_cannot_have_more_groups(workdir):
    train.main(arguments(model="model_gqa", n_head=4, n_kv_head=2, max_steps=1))
    with pytest.raises(UserError, match=r"out/tiny.* 2 KV heads.*n_kv_head=4"):
        load_model("out/tiny", "model_gqa", {"n_kv_head": 4})


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (dict(model="model_swa", window=5), dict(name="model"), "all tokens instead of 5"),
        (
            dict(model="model"),
            dict(name="model_swa", options={"window": 5}),
            "5 tokens instead of all",
        ),
        (dict(model="model_swa", window=16), dict(name="model"), ""),  # block_size is 16
        (dict(model="model"), dict(name="model_swa"), ""),
        (dict(model="model_swa", window=5), dict(name="model_swa"), ""),
    ],
)
def test_another_window_is_told_where_it_matters(workdir, capsys, before, now, said):
    train.main(arguments(**before, max_steps=1))
    capsys.readouterr()
    load_model("out/tiny", **now)
    assert said in capsys.readouterr().err if said else capsys.readouterr().err == ""


def test_a_rotary_run_cannot_become_one_with_learned_positions(workdir):
    train.main(arguments(model="model_rope", max_steps=1))
    with pytest.raises(UserError, match=r"out/tiny.*wpe.*--model"):
        load_model("out/tiny", "model")


# Out


def vivid_run(**options):
    """A run whose weights are large enough for its text to vary."""
    train.main(
        arguments(
            **options,
            block_size=16,
            n_head=4,
            n_embd=32,
            max_steps=8,
            learning_rate=0.03,
            dropout=0.0,
        )
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"model": "model_rope"},
        {"model": "model_rope", "rope_theta": 500.0},
        {"model": "model_rope_gqa_swa", "n_kv_head": 2, "window": WINDOW},
        {"model": "model_rope_gqa_swa", "n_kv_head": 1, "window": 1},
    ],
)
def test_a_rope_model_exported_as_starcoder2_has_its_logits_in_transformers(workdir, options, bias):
    vivid_run(**options, bias=bias, vocab_size=320)
    export("out/tiny", "exported")
    theirs, ids = AutoModelForCausalLM.from_pretrained("exported"), torch.randint(257, (2, 45))
    assert type(theirs).__name__ == "Starcoder2ForCausalLM" and theirs.config.vocab_size == 257
    assert (
        logits(load_model("out/tiny")[0], ids)[..., :257] - logits(theirs, ids)
    ).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [{"model": "model_rope"}, {"model": "model_rope_gqa_swa", "n_kv_head": 2, "window": 5}],
)
def test_transformers_writes_the_same_greedy_text_past_window_and_block_size(
    workdir, capsys, options
):
    vivid_run(**options)
    export("out/tiny", "exported")
    capsys.readouterr()
    how = ["--temperature=0", "--dtype=float32", "--max_new_tokens=100"]
    sample.main(["--init_from=out/tiny", "--prompt=def f1(x):", *how])
    ids = torch.tensor([list(b"def f1(x):")])
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False
    )
    text = bytes(id for id in expected[0].tolist() if id < 256).decode(errors="replace")
    assert len(set(text)) > 5 and capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("name", ["model_gqa", "model_swa"])
def test_a_model_without_a_format_is_not_exported_and_writes_nothing(workdir, name):
    train.main(arguments(model=name, n_head=4, max_steps=1))
    with pytest.raises(UserError, match=f"out/tiny.*{name}.*transformers.*model_rope"):
        export("out/tiny", "exported")
    assert not (workdir / "exported").exists()
