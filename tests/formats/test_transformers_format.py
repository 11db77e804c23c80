"""common/transformers_format.py: StarCoder2 and GPT-Neo, in and out. transformers is the oracle."""

import json
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log
from foreign import (
    assert_equal_logits,
    change_json,
    change_tensors,
    load_error,
    logits,
    max_difference,
    random_gpt2,
    random_gpt_neo,
    train_vivid,
)
from safetensors.torch import load_file, save_file
from starcoder2 import starcoder2
from transformers import AutoModelForCausalLM

import sample
import train
from common.errors import UserError
from common.pretrained import load_model
from tools.export import export

STARCODER2_RUNS = [
    {"model": "model_rope"},
    {"model": "model_rope", "rope_theta": 500.0, "bias": False},
    {"model": "model_rope_gqa_swa", "n_kv_head": 2, "window": 5},
    {"model": "model_rope_gqa_swa", "n_kv_head": 1, "window": 1, "bias": False},
    {"model": "model_rope_gqa_swa", "n_kv_head": 4, "window": 100, "bias": False},
]
GPT_NEO_RUNS = [  # head_dim 16, 4 and 1: powers of 4
    {"model": "model_swa", "window": 5, "bias": False, "n_head": 2},
    {"model": "model_swa", "window": 1, "bias": False, "n_head": 8},
    {"model": "model_swa", "window": 100, "bias": False, "n_head": 32},
]
BOTH = [STARCODER2_RUNS[0], GPT_NEO_RUNS[0]]


def train_and_export(options):
    train_vivid(**options)
    export("out/tiny", "exported")


def tiny_starcoder2():
    return starcoder2(2, 4, 32, 61)


def save(theirs, folder, **options):
    """Save a model of transformers with a meta.json."""
    theirs.save_pretrained(folder, **options)
    Path(folder, "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 61}')


# Ours, transformers, ours ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [*STARCODER2_RUNS, *GPT_NEO_RUNS], ids=str)
def test_an_export_has_equal_logits_in_transformers_and_the_same_bits_here(
    workdir, capsys, options
):
    train_and_export(options)
    ours, _ = load_model("out/tiny")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    is_rotary = options in STARCODER2_RUNS
    assert type(theirs).__name__ == ("Starcoder2" if is_rotary else "GPTNeo") + "ForCausalLM"
    assert_equal_logits(ours, theirs, length=45 if is_rotary else 16)  # 45 exceeds block_size

    capsys.readouterr()
    back, meta = load_model("exported")
    assert capsys.readouterr().err == ""
    assert type(back) is type(ours)
    assert back.config == ours.config
    assert meta["tokenizer"] == "byte"
    expected = ours.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, p in back.state_dict().items():
        assert torch.equal(p.view(torch.int32), expected[name].view(torch.int32)), name


@pytest.mark.parametrize(
    "options",
    [
        {"model": "model_rope", "vocab_size": 320},
        {"model": "model_swa", "window": 5, "bias": False, "n_head": 4},  # head_dim 8
        {"model": "model_swa", "window": 5, "bias": False, "n_embd": 30, "n_head": 3},  # 10
        {"model": "model_swa", "window": 5, "bias": False, "vocab_size": 320},
    ],
    ids=str,
)
def test_an_export_of_another_vocabulary_or_head_dim_has_equal_logits(workdir, options):
    train_and_export(options)
    ours, _ = load_model("out/tiny")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    back, _ = load_model("exported")
    ids = torch.randint(257, (2, 16))
    expected = logits(ours, ids)[..., :257]
    assert theirs.config.vocab_size == 257
    assert max_difference(expected, logits(theirs, ids)) < 1e-4
    assert max_difference(expected, logits(back, ids)) < 1e-5


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_an_export_of_an_export_has_the_same_files(workdir, options):
    train_and_export(options)
    export("exported", "again")
    for path in Path("exported").iterdir():
        assert Path("again", path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_fine_tuning_an_export_has_the_losses_of_fine_tuning_its_run(workdir, options):
    train_and_export(options)
    unset = dict.fromkeys(["n_layer", "n_head", "n_embd", "block_size", "dropout"])
    losses = []
    for number, source in enumerate(("out/tiny", "exported")):
        run = {"model": options["model"], "init_from": source, "out_dir": f"out/{number}"}
        train.main(arguments(**unset, **run, max_steps=2))
        log = read_log(Path(f"out/{number}"))
        losses.append([log[0]["val_loss"], *(line["train_loss"] for line in log[1:])])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "options", [{"name": "model_rope"}, {"name": "model_rope_gqa_swa", "options": {"n_kv_head": 2}}]
)
def test_starcoder2_can_be_loaded_into_another_model_file(workdir, options):
    train_and_export({"model": "model_rope_gqa_swa", "n_kv_head": 4, "window": 5})
    model, _ = load_model("exported", **options)
    assert type(model).__module__ == options["name"]


# Out ------------------------------------------------------------------------------------------


def greedy_texts(source, capsys):
    """Return the text that sample.py writes past a window of 5, and that of transformers."""
    prompt = "0123456"  # the random models have 61 byte tokens
    capsys.readouterr()
    sampling = ["--temperature=0", "--dtype=float32", "--max_new_tokens=40"]
    sample.main([f"--init_from={source}", f"--prompt={prompt}", *sampling])
    ours = capsys.readouterr().out
    ids = torch.tensor([list(prompt.encode())])
    generated = AutoModelForCausalLM.from_pretrained(source).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    return ours, bytes(generated[0].tolist()).decode() + "\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: random_gpt2(vocab_size=61),
        lambda: starcoder2(2, 4, 32, 61, 2, window=5),
        random_gpt_neo,
    ],
    ids=["gpt2", "starcoder2", "gpt_neo"],
)
def test_greedy_text_is_that_of_transformers_before_and_after_an_export(workdir, capsys, make):
    save(make(), "released")
    export("released", "exported")
    texts = {*greedy_texts("released", capsys), *greedy_texts("exported", capsys)}
    assert len(texts) == 1
    assert len(set(texts.pop())) > 12


# In -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_kv_head", "window", "name"),
    [
        (4, None, "model_rope"),
        (4, 5, "model_rope_gqa_swa"),
        (2, 5, "model_rope_gqa_swa"),
        (1, None, "model_rope_gqa_swa"),
    ],
)
def test_starcoder2_of_transformers_has_its_logits_here(tmp_path, n_kv_head, window, name):
    theirs = starcoder2(2, 4, 32, 61, n_kv_head, rope_theta=777.0, window=window)
    save(theirs, tmp_path)
    ours, _ = load_model(str(tmp_path))
    assert type(ours).__module__ == name
    assert_equal_logits(ours, theirs, length=400)


@pytest.mark.parametrize(("n_head", "window"), [(2, 5), (4, 5), (2, 100)])
def test_gpt_neo_of_transformers_has_its_logits_here(tmp_path, n_head, window):
    theirs = random_gpt_neo(n_head=n_head, window=window)
    save(theirs, tmp_path)
    ours, _ = load_model(str(tmp_path))
    assert type(ours).__module__ == "model_swa"
    assert_equal_logits(ours, theirs, length=48)


def test_gpt_neo_with_biases_is_read_and_exported_with_the_same_tensors(workdir):
    save(random_gpt_neo(), "released")
    export("released", "exported")
    expected = load_file("released/model.safetensors")
    exported = load_file("exported/model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in exported.items())


@pytest.mark.parametrize("make", [tiny_starcoder2, random_gpt_neo])
def test_a_model_in_several_files_is_joined(tmp_path, make):
    theirs = make()
    save(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_logits(load_model(str(tmp_path))[0], theirs)


@pytest.mark.parametrize("make", [tiny_starcoder2, random_gpt_neo])
def test_a_stored_head_must_equal_the_embedding(tmp_path, make):
    theirs = make()
    save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = theirs.lm_head.weight.detach()
    save_file(tensors | {"lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    assert_equal_logits(load_model(str(tmp_path))[0], theirs)
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    assert "lm_head.weight" in load_error(tmp_path)


def test_starcoder2_in_bfloat16_is_read_in_float32(tmp_path):
    save(tiny_starcoder2().bfloat16(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, _ = load_model(str(tmp_path))
    assert ours.transformer.wte.weight.dtype == torch.float32
    assert_equal_logits(ours, theirs)


def test_rope_theta_is_read_where_transformers_4_has_it(tmp_path):
    theirs = starcoder2(2, 4, 32, 61, rope_theta=777.0)
    save(theirs, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_theta": 777.0, "rope_scaling": None}))
    assert load_model(str(tmp_path))[0].config.rope_theta == 777.0


def test_starcoder2_without_a_meta_json_is_refused_because_of_its_tokenizer(tmp_path):
    tiny_starcoder2().save_pretrained(tmp_path)
    message = load_error(tmp_path)
    assert "meta.json" in message
    assert "tokenizer" in message


def test_gpt_neo_without_a_meta_json_has_the_tokenizer_of_gpt2(tmp_path):
    random_gpt_neo().save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1] == {"tokenizer": "gpt2", "vocab_size": 61}


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "key", "value", "supported"),
    [
        (tiny_starcoder2, "hidden_act", "relu", "gelu_pytorch_tanh"),
        (tiny_starcoder2, "norm_epsilon", 1e-6, "1e-05"),
        (tiny_starcoder2, "use_bias", False, "True"),
        (tiny_starcoder2, "tie_word_embeddings", False, "True"),
        (tiny_starcoder2, "intermediate_size", 100, "128"),
        (tiny_starcoder2, "head_dim", 16, "8"),
        (tiny_starcoder2, "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "default"),
        (tiny_starcoder2, "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "default"),
        (tiny_starcoder2, "rope_parameters", {"partial_rotary_factor": 0.5}, "default"),
        (random_gpt_neo, "activation_function", "relu", "gelu_new"),
        (random_gpt_neo, "layer_norm_epsilon", 1e-6, "1e-05"),
        (random_gpt_neo, "tie_word_embeddings", False, "True"),
        (random_gpt_neo, "intermediate_size", 100, "128"),
        (random_gpt_neo, "attention_types", [[["global", "local"], 1]], "[[['local'], 2]]"),
    ],
)
def test_a_model_with_other_settings_is_refused_with_both_values(
    tmp_path, make, key, value, supported
):
    save(make(), tmp_path)
    change_json(tmp_path / "config.json", {key: value})
    message = load_error(tmp_path)
    assert key in message
    assert str(next(iter(value.values())) if isinstance(value, dict) else value) in message
    assert supported in message


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny_starcoder2, "model.layers.1.self_attn.k_proj.weight"),
        (random_gpt_neo, "transformer.h.1.attn.attention.k_proj.weight"),
    ],
)
@pytest.mark.parametrize("shape", [None, (), (7,), (32, 7), (7, 32)])
def test_a_tensor_that_is_missing_or_has_another_shape_is_refused_by_name(
    tmp_path, make, name, shape
):
    save(make(), tmp_path)

    def change(tensors):
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.ones(shape)

    change_tensors(tmp_path, change)
    assert name in load_error(tmp_path)


# A field that is absent is MISSING.
MISSING = "(missing)"
OTHER_VALUES = [MISSING, None, -1, 0, 1.5, "x", [[]], {"rope_theta": "x"}]


@pytest.mark.parametrize(
    "make", [lambda: starcoder2(1, 4, 32, 61, 2, window=5), lambda: random_gpt_neo(n_layer=1)]
)
def test_each_field_of_config_json_with_another_value_is_refused_or_harmless(tmp_path, make):
    theirs = make()
    save(theirs, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    refused = 0
    for key in config:
        for value in OTHER_VALUES:
            changed = config | {key: value}
            if value is MISSING:
                del changed[key]
            (tmp_path / "model/config.json").write_text(json.dumps(changed))
            try:
                load_model(str(tmp_path / "model"))
            except UserError as error:
                assert "\n" not in str(error)
                assert "model" in str(error)
                refused += 1
    assert refused > 80


def test_an_export_without_its_weights_is_refused(workdir):
    train_and_export({"model": "model_rope"})
    Path("exported/model.safetensors").unlink()
    assert ".safetensors" in load_error("exported")
