"""A file of a model that is something else: one line that says so."""

import gzip
import pickle

import pytest
import torch
from foreign import load_error, random_gpt2
from nanogpt_files import CHARS, meta_of_chars, write_pickle

import model as model_file
from common.pretrained import load_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 577123456\n" % 5
HTML = b"<!DOCTYPE html>\n<html><body>404</body></html>\n"
INDEX = "model.safetensors.index.json"


def save_single(folder):
    random_gpt2().save_pretrained(folder)
    (folder / "meta.json").write_text('{"tokenizer": "gpt2"}')


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
    (save_single, "config.json"),
    (save_single, "meta.json"),
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


def test_json_that_is_nested_too_deeply_is_one_line(tmp_path):
    save_single(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ' + 100_000 * "[")
    assert "config.json" in load_error(tmp_path)


def test_a_pickle_of_another_object_as_meta_pkl_is_refused(tmp_path):
    save_nanogpt(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps([1, 2]))
    assert "meta.pkl" in load_error(tmp_path)
