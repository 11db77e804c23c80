"""Weights in several files, some of another save, or of other types: those of transformers.

transformers is the oracle: load_model reads the same model, or raises UserError.
"""

import itertools
import json
import shutil

import pytest
import torch
from foreign import (
    assert_equal_logits,
    change_tensors,
    load_error,
    random_gpt2,
    random_gpt_neo,
    read_as_there,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_model
from starcoder2 import starcoder2

from common.pretrained import load_model

INDEX = "model.safetensors.index.json"


# Shards ---------------------------------------------------------------------------------------


FIRST, SECOND, THIRD = NAMES = [
    f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")
]


def other_model():
    """Return a model with the same names and shapes, and other weights."""
    model = random_gpt2()
    for p in model.parameters():
        p.data += 0.1
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model in three files, another one in three files of the same names, and in other files."""
    folder = tmp_path_factory.mktemp("sources")
    random_gpt2().save_pretrained(folder / "shards", max_shard_size="60KB")
    other_model().save_pretrained(folder / "other", max_shard_size="60KB")
    other_model().save_pretrained(folder / "more", max_shard_size="35KB")
    assert sorted(path.name for path in (folder / "other").glob("model-*")) == NAMES
    assert not (folder / "more" / FIRST).exists()
    return folder


@pytest.fixture
def folder(sources, tmp_path):
    """A copy of the model in three files."""
    return shutil.copytree(sources / "shards", tmp_path / "model")


def change_index(folder, change):
    """Change the files in an index, by a function of each file's name."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: change(name) for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def test_files_that_the_index_does_not_name_are_not_read(sources, folder):
    for path in (sources / "more").glob("model-*"):
        shutil.copy(path, folder)
    shutil.copy(sources / "other" / FIRST, folder / "model-old.safetensors")
    assert read_as_there(folder)


def test_model_safetensors_has_precedence_over_an_index(folder, tmp_path):
    other_model().save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single/model.safetensors", folder)
    assert read_as_there(folder)


def test_a_distributed_checkpoint_is_not_overlooked(sources, folder):
    shard = folder / "shard-00001-model-00001-of-00001.safetensors"
    shutil.copy(sources / "other" / FIRST, shard)
    assert shard.name in load_error(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(folder, name, with_index):
    (folder / name).unlink()
    if not with_index:
        (folder / INDEX).unlink()
    assert f"{folder / name} is missing" in load_error(folder)


def test_a_complete_set_without_an_index_is_the_model(folder):
    (folder / INDEX).unlink()
    assert_equal_logits(load_model(str(folder))[0], random_gpt2())


def test_two_sets_without_an_index_are_refused(sources, folder):
    for path in (sources / "more").glob("model-*"):
        shutil.copy(path, folder)
    (folder / INDEX).unlink()
    assert FIRST in load_error(folder)


def test_a_tensor_in_two_shards_without_an_index_is_refused(sources, folder):
    shutil.copy(sources / "other" / FIRST, folder / SECOND)
    (folder / INDEX).unlink()
    assert SECOND in load_error(folder)


@pytest.mark.parametrize(
    "extra", ["model-00000-of-00003.safetensors", "model-00004-of-00003.safetensors"]
)
def test_a_shard_beyond_its_set_is_refused_by_name(folder, extra):
    shutil.copy(folder / FIRST, folder / extra)
    (folder / INDEX).unlink()
    assert extra in load_error(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/x", "..", "", 7, None]
)
def test_an_index_that_leaves_its_folder_is_refused(folder, tmp_path, name):
    shutil.move(folder / FIRST, tmp_path / "other.safetensors")
    change_index(folder, lambda file: name if file == FIRST else file)
    assert str(folder) in load_error(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, 3, "x", None])
def test_an_index_that_is_none_is_refused(folder, index):
    (folder / INDEX).write_text(json.dumps(index))
    assert str(folder) in load_error(folder)


KINDS = st.sampled_from(["delete", "swap", "copy", "stale", "index"])
CHANGES = st.tuples(KINDS, st.sampled_from(NAMES), st.sampled_from(NAMES))


@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=HealthCheck,
)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_permuted_shards_are_the_model_of_transformers_or_refused(sources, tmp_path, changes):
    folder = tmp_path / "permuted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources / "shards", folder)
    for kind, first, second in changes:
        first_path, second_path = folder / first, folder / second
        if kind == "stale":
            shutil.copy(sources / "other" / first, second_path)
        elif kind == "index":
            change_index(folder, {first: second, second: first}.get)
        elif not first_path.exists():
            continue
        elif kind == "delete":
            first_path.unlink()
        elif kind == "swap" and second_path.exists():
            kept = first_path.read_bytes()
            first_path.write_bytes(second_path.read_bytes())
            second_path.write_bytes(kept)
        elif first != second:
            shutil.copy(first_path, second_path)
    read_as_there(folder)


# Types and values -----------------------------------------------------------------------------

READ = ["float64", "float32", "bfloat16", "float16"]
REFUSED = ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64", "bool", "complex64"]
PARTS = {"all": "", "embedding": "wte.weight", "norm": "ln_f.weight", "head": "lm_head"}


def save_with(folder, change):
    """Save a GPT-2 whose tensors a function of their dict has changed."""
    random_gpt2(n_positions=48).save_pretrained(folder)
    change_tensors(folder, change)


@pytest.mark.parametrize(("dtype", "part"), [*itertools.product([*READ, *REFUSED], PARTS)])
def test_a_type_of_float_is_read_as_in_transformers_and_others_are_refused(tmp_path, dtype, part):
    def change(tensors):
        if part == "head":  # equal, and without rounding in each type of float
            tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].sign()
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        for key, w in tensors.items():
            if PARTS[part] in key:
                tensors[key] = w.to(getattr(torch, dtype))

    save_with(tmp_path, change)
    if dtype in READ:
        assert read_as_there(tmp_path)
    else:
        assert PARTS[part] in load_error(tmp_path)
        assert dtype in load_error(tmp_path)


@pytest.mark.parametrize("make", [random_gpt2, random_gpt_neo, lambda: starcoder2(2, 2, 32, 61)])
def test_a_tied_head_without_its_embedding_is_read_as_in_transformers(tmp_path, make):
    model = make()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 61}')
    save_model(model, str(tmp_path / "model.safetensors"))
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert read_as_there(tmp_path)


def test_a_file_of_which_some_names_have_the_prefix_is_read_as_in_transformers(tmp_path):
    name = "ln_f.weight"
    save_with(tmp_path, lambda tensors: tensors.update({name: tensors.pop(f"transformer.{name}")}))
    assert read_as_there(tmp_path)


def test_a_tensor_by_two_names_is_refused(tmp_path):
    save_with(tmp_path, lambda tensors: tensors.update({"ln_f.weight": torch.ones(32)}))
    assert "ln_f.weight" in load_error(tmp_path)
