"""pretrained.py: GPT-2 in, transformers' format out; transformers itself is the oracle."""

import json
import os
import types

import pytest
import torch
from conftest import arguments
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import sample
import train
from common import pretrained
from common.errors import UserError
from common.pretrained import load_model
from tools.export import export
from tools.export import main as export_main

FILE = "openai-community/gpt2/resolve/main/model.safetensors"


def random_gpt2(**shape):
    """A GPT-2 of transformers with random weights, larger than its initialization's so that errors show."""
    shape = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 128,
        "n_positions": 64,
        "vocab_size": 50257,
    } | shape
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    for name, p in model.named_parameters():
        p.data += (
            0.1 * torch.randn_like(p)
            if "ln_" in name or "bias" in name
            else 0.02 * torch.randn_like(p)
        )
    return model


def logits(model, ids):
    model.eval()
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def as_released(model):
    """The tensors of a model as the hub's files name them: no prefix, no lm_head, mask buffers."""
    tensors = {
        name.removeprefix("transformer."): p.contiguous() for name, p in model.state_dict().items()
    }
    tensors.pop("lm_head.weight")
    size = model.config.n_positions
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(size, size).tril().view(1, 1, size, size)
    return tensors


@pytest.fixture
def served(hub, tmp_path, monkeypatch):
    """A random GPT-2 with heads of 64, which the hub serves under the name of the released one."""
    monkeypatch.chdir(tmp_path)
    model = random_gpt2()
    save_file(as_released(model), tmp_path / "released.safetensors")
    hub.files[FILE] = (tmp_path / "released.safetensors").read_bytes()
    return model


# In


@pytest.mark.parametrize("n_layer, n_head, n_embd", [(1, 1, 8), (3, 4, 64), (2, 3, 96)])
def test_a_directory_that_transformers_saved_gives_its_logits(tmp_path, n_layer, n_head, n_embd):
    theirs = random_gpt2(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=301)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(301, (2, 37))
    assert (logits(load_model(str(tmp_path))[0], ids) - logits(theirs, ids)).abs().max() < 1e-4


def test_weights_in_several_files_are_joined(tmp_path):
    theirs = random_gpt2(vocab_size=301)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = torch.randint(301, (1, 9))
    assert (logits(load_model(str(tmp_path))[0], ids) - logits(theirs, ids)).abs().max() < 1e-4


def test_gpt2_by_name_is_downloaded_once(served, hub):
    ids = torch.randint(50257, (1, 11))
    for _ in range(2):
        assert (logits(load_model("gpt2")[0], ids) - logits(served, ids)).abs().max() < 1e-4
    assert [path for path, _ in hub.requests].count(FILE) == 1


def test_an_interrupted_download_of_gpt2_resumes(served, hub, monkeypatch):
    monkeypatch.setattr("common.download.RETRIES", 1)
    hub.break_after = 1_000_000
    with pytest.raises(UserError, match="the same command goes on from there"):
        load_model("gpt2")
    monkeypatch.setattr("common.download.RETRIES", 4)
    ids = torch.randint(50257, (1, 11))
    assert (logits(load_model("gpt2")[0], ids) - logits(served, ids)).abs().max() < 1e-4
    begun = [asked for path, asked in hub.requests if path == FILE]
    assert begun[0] is None and begun[-1].startswith("bytes=")


@pytest.mark.parametrize("change", ["cut off", "altered"])
def test_a_downloaded_file_that_changed_on_disk_is_refused(served, change):
    load_model("gpt2")
    path = pretrained.FOLDER / "gpt2/model.safetensors"
    content = bytearray(path.read_bytes())
    if change == "altered":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if change == "altered" else content[:-1000])
    with pytest.raises(UserError, match="remove data/pretrained/gpt2"):
        load_model("gpt2")


def test_a_file_that_is_cut_off_on_the_server_is_refused(served, hub):
    hub.files[FILE] = hub.files[FILE][:-1000]
    with pytest.raises(UserError, match="truncated or altered"):
        load_model("gpt2")
    with pytest.raises(UserError, match="truncated or altered"):
        load_model("gpt2")


def test_no_network_is_one_line_of_sample_and_of_train(workdir, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("common.download.RETRY_WAIT", 0.0)
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    training = ["--dataset=tiny", "--init_from=gpt2", "--out_dir=out/x"]
    for main, argv in ((sample.main, ["--init_from=gpt2"]), (train.main, training)):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        assert (
            "error: no answer from http://127.0.0.1:9/openai-community/gpt2"
            in capsys.readouterr().err
        )
    assert not (workdir / "out").exists() and not pretrained.FOLDER.exists()


def test_greedy_text_of_sample_is_that_of_transformers(tmp_path, capsys, gpt2_tokenizer):
    theirs = random_gpt2(n_positions=256)
    theirs.save_pretrained(tmp_path / "long")
    prompt = "Once upon a time"
    sample.main(
        [
            f"--init_from={tmp_path / 'long'}",
            f"--prompt={prompt}",
            "--temperature=0",
            "--dtype=float32",
        ]
    )
    ids = torch.tensor([gpt2_tokenizer.encode_ordinary(prompt)])
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=False,
        pad_token_id=50256,
    )
    text = capsys.readouterr().out
    assert text.startswith(gpt2_tokenizer.decode(expected[0].tolist()))


def test_training_goes_on_from_gpt2_with_a_shorter_context(served, workdir, capsys):
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    options = dict(
        init_from="gpt2",
        n_layer=None,
        n_head=None,
        n_embd=None,
        max_steps=1,
        batch_size=1,
        eval_tokens=64,
    )
    train.main(arguments(**options, total_batch_size=16))
    assert load_model("out/tiny")[0].config.block_size == 16
    with pytest.raises(SystemExit):
        train.main(arguments(**options | {"n_layer": 3, "out_dir": "out/x"}, total_batch_size=16))
    assert "gpt2 has n_layer=2, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_model_that_is_not_gpt2_is_refused_by_what_differs(tmp_path, key, value):
    random_gpt2(vocab_size=301).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(value)):
        load_model(str(tmp_path))


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    random_gpt2(vocab_size=301).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"h.1.mlp.c_fc.bias is nothing there, \(512,\) in model.py"
    ):
        load_model(str(tmp_path))


def test_a_model_file_of_the_user_s_own_loads_what_has_its_names_and_shapes(tmp_path, monkeypatch):
    theirs = random_gpt2(vocab_size=301)
    theirs.save_pretrained(tmp_path)
    mine = types.ModuleType("model_mine")
    mine.GPT, mine.GPTConfig = (
        pretrained.model_module("model").GPT,
        pretrained.model_module("model").GPTConfig,
    )
    monkeypatch.setattr(pretrained, "model_module", {"model_mine": mine}.get)
    ids = torch.randint(301, (1, 9))
    assert (
        logits(load_model(str(tmp_path), "model_mine")[0], ids) - logits(theirs, ids)
    ).abs().max() < 1e-4


def test_a_pickle_is_never_read(tmp_path):
    random_gpt2(vocab_size=301).save_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\*.safetensors"):
        load_model(str(tmp_path))


def changed(folder, how):
    """Change the tensors of a saved model in place."""
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"n_layer": 3}, "n_layer=3.* 2$"),
        ({"vocab_size": 99}, "vocab_size=99.* 301$"),
        ({"n_positions": 65}, "n_positions=65.* 64$"),
        ({"n_inner": 100}, "n_inner=100.* 512$"),
    ],
)
def test_a_config_that_disagrees_with_the_weights_is_refused(tmp_path, about, message):
    random_gpt2(vocab_size=301).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | about))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


def test_an_n_inner_that_says_what_is_usual_is_fine(tmp_path):
    random_gpt2(vocab_size=301, n_inner=512).save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].config.n_embd == 128


def test_only_the_model_s_own_files_are_read(tmp_path):
    theirs = random_gpt2(vocab_size=301)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model_old.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    changed(tmp_path, lambda tensors: tensors["transformer.ln_f.bias"].add_(1))
    os.rename(tmp_path / "model.safetensors", tmp_path / "swapped")
    os.rename(tmp_path / "model_old.safetensors", tmp_path / "model.safetensors")
    os.rename(tmp_path / "swapped", tmp_path / "model_old.safetensors")
    assert torch.equal(
        load_model(str(tmp_path))[0].transformer.ln_f.bias, theirs.transformer.ln_f.bias
    )


def test_quantized_weights_are_refused(tmp_path):
    random_gpt2(vocab_size=301).save_pretrained(tmp_path)
    key = "transformer.h.0.mlp.c_fc.weight"
    changed(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    with pytest.raises(UserError, match="quantized"):
        load_model(str(tmp_path))


def test_a_head_of_its_own_is_refused(tmp_path):
    random_gpt2(vocab_size=301).save_pretrained(tmp_path)
    changed(
        tmp_path,
        lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}),
    )
    with pytest.raises(UserError, match=r"lm_head.weight other than wte.weight"):
        load_model(str(tmp_path))


# Out


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"vocab_size": 320}])
def test_an_exported_run_has_its_logits_in_transformers(workdir, options):
    train.main(arguments(**options, max_steps=3))
    export("out/tiny", "exported")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    assert theirs.config.vocab_size == 257
    ids = torch.randint(257, (2, 13))
    assert (
        logits(load_model("out/tiny")[0], ids)[..., :257] - logits(theirs, ids)
    ).abs().max() < 1e-5


def test_an_export_can_be_loaded_back_with_its_tokenizer(tiny_run, capsys):
    export("out/tiny", "exported")
    model, meta = load_model("exported")
    ids = torch.randint(257, (1, 9))
    assert meta["tokenizer"] == "byte"
    assert torch.equal(logits(model, ids), logits(load_model("out/tiny")[0], ids))


def test_an_exported_gpt2_run_brings_its_tokenizer(served, workdir, gpt2_tokenizer):
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    train.main(
        arguments(vocab_size=50304, max_steps=1, batch_size=1, total_batch_size=16, eval_tokens=64)
    )
    export("out/tiny", "exported")
    text = "Hello world, naïve café\n\n  don't"
    assert AutoTokenizer.from_pretrained("exported")(text)[
        "input_ids"
    ] == gpt2_tokenizer.encode_ordinary(text)
    assert AutoModelForCausalLM.from_pretrained("exported").config.vocab_size == 50257


def test_an_existing_directory_is_not_written_over(tiny_run, workdir):
    with pytest.raises(UserError, match="data exists already"):
        export("out/tiny", "data")


def test_export_as_a_program_names_what_it_made(tiny_run, capsys):
    export_main(["--init_from=out/tiny", "--out_dir=exported"])
    assert 'from_pretrained("exported")' in capsys.readouterr().out


def test_export_asks_for_what_is_missing(tiny_run, capsys):
    with pytest.raises(SystemExit) as stopped:
        export_main(["--init_from=out/tiny"])
    assert stopped.value.code == 2 and "--out_dir" in capsys.readouterr().err


@pytest.mark.network
def test_the_released_gpt2_continues_a_prompt_as_in_transformers(
    tmp_path, monkeypatch, capsys, gpt2_tokenizer
):
    monkeypatch.chdir(tmp_path)
    try:
        sample.main(
            [
                "--init_from=gpt2",
                "--prompt=The capital of France is",
                "--temperature=0",
                "--dtype=float32",
            ]
        )
    except SystemExit:
        pytest.skip(f"no network: {capsys.readouterr().err}")
    theirs = GPT2LMHeadModel.from_pretrained("openai-community/gpt2")
    ids = torch.tensor([gpt2_tokenizer.encode_ordinary("The capital of France is")])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False
    )
    assert capsys.readouterr().out.startswith(gpt2_tokenizer.decode(expected[0].tolist()))
