"""A file of a model that is something else, or holds no numbers: one line that says so."""

import gzip
import math
import pickle
from pathlib import Path

import pytest
import torch
from conftest import arguments, refused
from foreign import change_tensors, load_error, random_gpt2, train_vivid
from nanogpt_files import CHARS, meta_of_chars, write_pickle
from safetensors.torch import load_file, save_file

import model as model_file
import sample
import train
from common.errors import UserError
from common.pretrained import load_model
from tools.export import export
from tools.export import main as export_main

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 577123456\n" % 5
HTML = b"<!DOCTYPE html>\n<html><body>404</body></html>\n"
INDEX = "model.safetensors.index.json"


def save_single(folder):
    random_gpt2().save_pretrained(folder)
    (folder / "meta.json").write_text('{"tokenizer": "gpt2"}')


def save_shards(folder):
    random_gpt2().save_pretrained(folder, max_shard_size="50KB")


def save_nanogpt(folder):
    config = model_file.GPTConfig(
        n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=len(CHARS)
    )
    model = model_file.GPT(config)
    weights = model.state_dict() | {"lm_head.weight": model.transformer.wte.weight.data}
    args = vars(config)
    torch.save({"model": weights, "model_args": args}, folder / "ckpt.pt")
    write_pickle(folder / "meta.pkl", meta_of_chars(CHARS))


# Each file of a model, with the kind of folder that has it.
PLACES = [
    (save_single, "model.safetensors"),
    (save_single, "config.json"),
    (save_single, "meta.json"),
    (save_shards, "model-00002-of-00004.safetensors"),
    (save_shards, INDEX),
    (save_nanogpt, "ckpt.pt"),
    (save_nanogpt, "meta.pkl"),
]
WRONG = {
    "pointer": (lambda path: path.write_bytes(POINTER), "LFS"),
    "html": (lambda path: path.write_bytes(HTML), "HTML"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "gzip"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), ""),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "regular file"),
    "missing link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), ""),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("save", "name"), PLACES)
def test_a_file_that_is_something_else_is_named_with_what_it_is(tmp_path, save, name, wrong):
    save(tmp_path)
    load_model(str(tmp_path))
    change, word = WRONG[wrong]
    change(tmp_path / name)
    try:
        message = load_error(tmp_path)
    except FileNotFoundError as error:  # which programs print as one line
        assert wrong == "missing link"
        message = str(error)
    assert name in message.replace(str(tmp_path), "")
    assert word in message


def test_a_text_in_place_of_weights_is_called_text(tmp_path):
    save_single(tmp_path)
    (tmp_path / "model.safetensors").write_text("This is no model. " * 20)
    assert "is text" in load_error(tmp_path)


def test_json_that_is_nested_too_deeply_is_one_line(tmp_path):
    save_single(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ' + 100_000 * "[")
    assert "config.json" in load_error(tmp_path)


def test_a_folder_with_a_pickle_only_is_refused_with_the_conversion(tmp_path):
    save_single(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = load_error(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "x.gguf",
        "pytorch_model.bin.incomplete",
    ],
)
def test_a_folder_without_weights_is_refused_with_its_files_and_no_conversion(tmp_path, name):
    save_single(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    message = load_error(tmp_path)
    assert "no model.safetensors" in message
    assert name in message
    assert "save_pretrained" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_model_is_refused_with_its_folder(tmp_path, name):
    save_single(tmp_path)
    message = load_error(tmp_path / name)
    assert "folder" in message
    assert str(tmp_path) in message.replace(str(tmp_path / name), "")


# Weights that are not finite ------------------------------------------------------------------

WPE = "transformer.wpe.weight"


def spoil(folder, value, key=WPE):
    change_tensors(Path(folder), lambda tensors: tensors[key].view(-1)[3:4].fill_(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["transformer.ln_f.bias", WPE, "transformer.wte.weight"])
def test_a_weight_that_is_not_finite_is_refused_with_file_and_tensor(tmp_path, value, key):
    save_single(tmp_path)
    spoil(tmp_path, value, key)
    message = load_error(tmp_path)
    assert str(tmp_path) in message
    assert key in message
    assert "finite" in message


def test_weights_whose_sum_overflows_are_read(tmp_path):
    save_single(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors["transformer.ln_f.bias"].fill_(3e38))
    assert load_model(str(tmp_path))[0].transformer.ln_f.bias[0] > 2e38


def test_float64_that_is_infinite_in_float32_is_refused(tmp_path):
    save_single(tmp_path)
    tensors = {key: w.double() for key, w in load_file(tmp_path / "model.safetensors").items()}
    tensors["transformer.ln_f.bias"][3] = 1e300
    save_file(tensors, tmp_path / "model.safetensors")
    assert "transformer.ln_f.bias" in load_error(tmp_path)


@pytest.fixture
def spoiled(workdir):
    """An export with a NaN."""
    train.main(arguments(max_steps=1))
    export("out/tiny", "spoiled")
    spoil("spoiled", math.nan)
    return workdir


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (sample.main, ["--init_from=spoiled"]),
        (sample.main, ["--init_from=spoiled", "--temperature=0"]),
        (export_main, ["--init_from=spoiled", "--out_dir=again"]),
        (train.main, arguments(init_from="spoiled", out_dir="out/new")),
        (train.main, arguments(init_from="spoiled", out_dir="out/new", eval_only=True)),
    ],
    ids=["sample", "greedy", "export", "train", "eval_only"],
)
def test_each_program_refuses_a_nan_with_the_tensor_and_no_other_advice(
    spoiled, capsys, main, argv
):
    line = refused(capsys, argv, main)
    assert WPE in line
    assert "learning_rate" not in line
    assert not Path("again").exists()


def test_a_checkpoint_of_ours_with_a_nan_is_refused_with_the_tensor(workdir, monkeypatch):
    train_vivid()
    load_state_dict = torch.nn.Module.state_dict

    def with_nan(self, *args, **options):
        state = load_state_dict(self, *args, **options)
        return state | {WPE: torch.full_like(state[WPE], math.nan)}

    monkeypatch.setattr(model_file.GPT, "state_dict", with_nan)
    with pytest.raises(UserError, match=WPE):
        load_model("out/tiny")


def test_nanogpt_with_a_nan_in_the_tied_embedding_is_called_not_finite(tmp_path):
    save_nanogpt(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    checkpoint["model"]["transformer.wte.weight"][0, 0] = math.nan
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "finite" in load_error(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_nanogpt_with_weights_of_another_type_is_refused_by_name(tmp_path, dtype):
    save_nanogpt(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    for key in ("transformer.wte.weight", "lm_head.weight"):
        checkpoint["model"][key] = checkpoint["model"][key].to(dtype)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    message = load_error(tmp_path)
    assert "transformer.wte.weight" in message
    assert str(dtype).removeprefix("torch.") in message


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda w: w.to("meta")])
def test_nanogpt_with_weights_that_are_sparse_or_without_data_is_refused(tmp_path, change):
    save_nanogpt(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    checkpoint["model"]["transformer.wpe.weight"] = change(checkpoint["model"][WPE])
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "transformer.wpe.weight" in load_error(tmp_path)


def test_nanogpt_in_the_old_format_of_torch_save_is_refused_by_name(tmp_path):
    save_nanogpt(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    assert "old format" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "TypeError"),
        ({"stoi": {"a": 0}}, "KeyError: 'itos'"),
        ({"itos": {"0": "a"}}, "KeyError: 0"),
        ({"itos": [b"a", b"b"]}, "bytes"),
    ],
)
def test_a_pickle_of_another_object_as_meta_pkl_is_refused_with_the_reason(tmp_path, value, reason):
    save_nanogpt(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(value))
    message = load_error(tmp_path)
    assert "meta.pkl" in message
    assert reason in message
