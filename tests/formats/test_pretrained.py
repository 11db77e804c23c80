"""common/pretrained.py and tools/export.py: GPT-2's weights in, transformers' format out.

transformers is the oracle.
"""

import json
import os
import re
import types
from pathlib import Path

import pytest
import torch
from conftest import arguments, refused, write_dataset
from foreign import (
    assert_equal_logits,
    change_json,
    change_tensors,
    load_error,
    logits,
    max_difference,
    random_gpt2,
)
from hub import use_hub
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    pipeline,
)

import sample
import train
from common import pretrained
from common.errors import UserError
from common.pretrained import load_model
from tools.export import export
from tools.export import main as export_main

GPT2 = "openai-community/gpt2"


def as_released(model):
    """Return the tensors as the hub's files name them: no prefix, no lm_head, with mask buffers."""
    tensors = {}
    for name, p in model.state_dict().items():
        tensors[name.removeprefix("transformer.")] = p.contiguous()
    tensors.pop("lm_head.weight")
    size = model.config.n_positions
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(size, size).tril().view(1, 1, size, size)
    return tensors


@pytest.fixture
def served(hub, tmp_path, monkeypatch):
    """A random GPT-2, which the hub serves under the name of the released one."""
    monkeypatch.chdir(tmp_path)
    model = random_gpt2()
    save_file(as_released(model), tmp_path / "released.safetensors")
    hub.add(GPT2, "model.safetensors", (tmp_path / "released.safetensors").read_bytes())
    hub.add(GPT2, "config.json", model.config.to_json_string().encode())
    return model


# Weights in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layer, n_head, n_embd", [(1, 1, 8), (3, 4, 64), (2, 3, 96)])
def test_a_directory_that_transformers_saved_gives_its_logits(tmp_path, n_layer, n_head, n_embd):
    theirs = random_gpt2(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(str(tmp_path))
    assert_equal_logits(ours, theirs, length=37)


@pytest.mark.parametrize(
    ("meta", "vocab_size", "n_vocab", "start_token"),
    [
        ({"tokenizer": "byte"}, 320, 257, 256),
        ({"tokenizer": "byte", "vocab_size": 300}, 320, 257, 256),
        ({"tokenizer": "char", "chars": ["a", "b", "<|endoftext|>"], "vocab_size": 64}, 320, 3, 2),
        ({"tokenizer": "char", "chars": ["a", "b"]}, 2, 2, 0),
        ({"tokenizer": "gpt2"}, 301, 301, 0),  # too few for the id of <|endoftext|>
    ],
)
def test_a_model_knows_its_ids_without_padding_and_the_one_that_begins_a_document(
    meta, vocab_size, n_vocab, start_token, tmp_path
):
    random_gpt2(vocab_size=vocab_size).save_pretrained(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    model, _ = load_model(str(tmp_path))
    assert (model.n_vocab, model.start_token) == (n_vocab, start_token)


GPT2_WORDS = '{"\\u0120the": 262, "\\u0120gazed": 50255, "<|endoftext|>": 50256}'


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, ""),
        ({"vocab.json": GPT2_WORDS}, ""),
        ({"tokenizer.json": '{"model": {"vocab": {"Ġthe":262,"Ġgazed":50255}}}'}, ""),
        ({"vocab.json": GPT2_WORDS, "tokenizer_config.json": '{"tokenizer_class": "Mine"}'}, ""),
        ({"tokenizer_config.json": "{}"}, ""),
        ({"tokenizer_config.json": '{"tokenizer_class": "GPT2TokenizerFast"}'}, ""),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
            "tokenizer_config.json",
        ),
        ({"vocab.json": '{"<|endoftext|>": 50256, "Ġgazed": 3}'}, "vocab.json"),
        ({"vocab.txt": "[PAD]\n[UNK]\n"}, "vocab.txt"),
        ({"tokenizer.json": '{"model": {"vocab": [["a", -1.5]]}}'}, "tokenizer.json"),
    ],
)
def test_one_line_says_that_a_folder_has_another_tokenizer_than_gpt2s(
    tmp_path, capsys, files, word
):
    random_gpt2(vocab_size=50257, n_layer=1, n_embd=8).save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    capsys.readouterr()
    assert load_model(str(tmp_path))[1]["tokenizer"] == "gpt2"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(word)
    assert all("meta.json" in line and word in line for line in lines)


def test_one_line_says_that_a_vocabulary_is_too_small_for_gpt2s_tokenizer(tmp_path, capsys):
    random_gpt2().save_pretrained(tmp_path)
    capsys.readouterr()
    load_model(str(tmp_path))
    [line] = capsys.readouterr().err.splitlines()
    assert "meta.json" in line
    assert "301" in line


def test_no_line_is_printed_if_a_meta_json_names_gpt2s_tokenizer(tmp_path, capsys):
    random_gpt2().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (tmp_path / "meta.json").write_text('{"tokenizer": "gpt2"}')
    capsys.readouterr()
    load_model(str(tmp_path))
    assert capsys.readouterr().err == ""


def test_weights_in_several_files_are_joined(tmp_path):
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, _ = load_model(str(tmp_path))
    assert_equal_logits(ours, theirs)


def test_gpt2_by_name_or_repository_is_downloaded_once(served, hub):
    for name in ("gpt2", GPT2):
        ours, _ = load_model(name)
        assert_equal_logits(ours, served)
    assert hub.downloads() == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["gpt2", GPT2])
def test_the_name_of_a_released_model_that_is_a_folder_here_is_refused(served, name):
    random_gpt2(n_layer=1).save_pretrained(name)
    assert f"./{name}" in load_error(name)
    assert load_model(f"./{name}")[0].config.n_layer == 1


def save_in_cache(model, cache, repository):
    """Save a model as huggingface_hub keeps it: a snapshot of links, named by its commit."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    model.save_pretrained(folder / "blobs")
    snapshot = folder / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    for path in (folder / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123abc")


def test_gpt2_of_the_hugging_face_cache_is_used_without_a_request(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = random_gpt2()
    save_in_cache(theirs, tmp_path / "cache/hub", GPT2)
    for name in ("gpt2", GPT2):
        ours, _ = load_model(name)
        assert_equal_logits(ours, theirs)
    assert hub.requests == []


def test_transformers_reads_the_gpt2_that_was_downloaded(served, tmp_path):
    load_model("gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(GPT2, cache_dir=tmp_path / "cache/hub")
    ids = torch.randint(301, (1, 11))
    assert torch.equal(logits(theirs, ids), logits(served, ids))


def test_another_repository_is_read_from_the_cache_but_never_downloaded(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = random_gpt2(n_layer=1)
    save_in_cache(theirs, tmp_path / "cache/hub", "someone/small")
    ours, _ = load_model("someone/small")
    assert_equal_logits(ours, theirs)
    assert "someone/other" in load_error("someone/other")
    assert hub.requests == []


def test_gpt2_whose_download_was_interrupted_is_complete_after_the_next_call(served, hub):
    hub.cuts = [None, *[5_000] * 20]
    assert "model.safetensors" in load_error("gpt2")
    hub.cuts = []
    ours, _ = load_model("gpt2")
    assert_equal_logits(ours, served)


def test_gpt2_that_an_earlier_version_downloaded_is_used_without_a_request(served, hub):
    folder = pretrained.FOLDER / "gpt2"
    served.save_pretrained(folder)
    (folder / "model.safetensors.sha256").touch()
    ours, _ = load_model("gpt2")
    assert_equal_logits(ours, served)
    assert hub.requests == []


def test_gpt2_that_an_earlier_version_downloaded_in_part_is_downloaded_to_the_cache(served, hub):
    folder = pretrained.FOLDER / "gpt2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_text("x")
    load_model("gpt2")
    assert hub.downloads() == ["config.json", "model.safetensors"]


def test_weights_that_are_truncated_on_the_hub_are_refused_every_time(served, hub):
    hub.add(GPT2, "model.safetensors", Path("released.safetensors").read_bytes()[:-1000])
    for _ in range(2):
        assert "model.safetensors" in load_error("gpt2")


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (sample.main, ["--init_from=gpt2"]),
        (train.main, ["--dataset=tiny", "--init_from=gpt2", "--out_dir=out/new"]),
    ],
    ids=["sample.py", "train.py"],
)
@pytest.mark.parametrize(
    ("offline", "word"), [(False, "http://127.0.0.1:9"), (True, "HF_HUB_OFFLINE")]
)
def test_gpt2_without_a_network_is_one_line_and_writes_no_file(
    workdir, monkeypatch, capsys, main, argv, offline, word
):
    use_hub(monkeypatch, "http://127.0.0.1:9", workdir / "cache/hub", offline)
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    line = refused(capsys, argv, main)
    assert GPT2 in line
    assert word in line
    assert [path for path in workdir.glob("out/**/*") if path.is_file()] == []


FINETUNING = {
    "init_from": "gpt2",
    "n_head": None,
    "n_embd": None,
    "max_steps": 1,
    "batch_size": 1,
    "total_batch_size": 16,
    "eval_tokens": 64,
}


def test_training_starts_from_gpt2_with_a_shorter_context(served, workdir):
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    train.main(arguments(**FINETUNING, n_layer=None))
    assert load_model("out/tiny")[0].config.block_size == 16


def test_training_refuses_a_shape_other_than_that_of_gpt2(served, workdir):
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    with pytest.raises(UserError, match=r"gpt2 .*n_layer=2\b.*\b3\b"):
        train.main(arguments(**FINETUNING, n_layer=3))


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_model_that_is_not_gpt2_is_refused_with_the_value_that_differs(tmp_path, key, value):
    random_gpt2().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", {key: value})
    assert str(value) in load_error(tmp_path)


def test_a_missing_tensor_is_refused_with_its_name_and_shape(tmp_path):
    random_gpt2().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
    message = load_error(tmp_path)
    assert all(text in message for text in ("h.1.mlp.c_fc.bias", "(128,)", "model.py"))


def test_a_user_s_model_file_loads_weights_of_its_names_and_shapes(tmp_path, monkeypatch):
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path)
    model = pretrained.model_module("model")
    mine = types.ModuleType("model_mine")
    mine.GPT = model.GPT
    mine.GPTConfig = model.GPTConfig
    monkeypatch.setattr(pretrained, "model_module", {"model_mine": mine}.get)
    ours, _ = load_model(str(tmp_path), "model_mine")
    assert_equal_logits(ours, theirs)


def test_a_pickle_is_never_read(tmp_path):
    random_gpt2().save_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    assert ".safetensors" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "actual"),
    [
        ("n_layer", 3, 2),
        ("vocab_size", 99, 301),
        ("n_positions", 65, 64),
        ("n_inner", 100, 128),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, key, value, actual):
    random_gpt2().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", {key: value})
    message = load_error(tmp_path).replace(str(tmp_path), "")
    assert f"{key}={value}" in message
    assert re.search(rf"\b{actual}\b", message)


def test_an_n_inner_of_four_times_n_embd_is_accepted(tmp_path):
    random_gpt2(n_inner=128).save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].config.n_embd == 32


def test_only_the_files_of_the_model_are_read(tmp_path):
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, tmp_path / "model_old.safetensors")
    ours, _ = load_model(str(tmp_path))
    assert torch.equal(ours.transformer.ln_f.bias, theirs.transformer.ln_f.bias)


def test_quantized_weights_are_refused(tmp_path):
    random_gpt2().save_pretrained(tmp_path)

    def quantize(tensors):
        key = "transformer.h.0.mlp.c_fc.weight"
        tensors[key] = tensors[key].to(torch.int8)

    change_tensors(tmp_path, quantize)
    assert "quantized" in load_error(tmp_path)


def test_an_untied_head_is_refused(tmp_path):
    random_gpt2().save_pretrained(tmp_path)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    change_tensors(tmp_path, untie)
    message = load_error(tmp_path)
    assert "lm_head.weight" in message
    assert "wte.weight" in message


# Weights out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"vocab_size": 320}])
def test_an_exported_run_has_its_logits_in_transformers(workdir, options):
    train.main(arguments(**options, max_steps=3))
    export("out/tiny", "exported")
    ours, _ = load_model("out/tiny")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    ids = torch.randint(257, (2, 13))
    assert theirs.config.vocab_size == 257
    assert max_difference(logits(ours, ids)[..., :257], logits(theirs, ids)) < 1e-5


def test_an_exported_run_can_be_loaded_with_its_tokenizer(tiny_run):
    export("out/tiny", "exported")
    exported, meta = load_model("exported")
    trained, _ = load_model("out/tiny")
    ids = torch.randint(257, (1, 9))
    assert meta["tokenizer"] == "byte"
    assert torch.equal(logits(exported, ids), logits(trained, ids))


def test_an_exported_run_of_gpt2_tokens_includes_the_tokenizer(served, workdir, gpt2_tokenizer):
    (workdir / "data/tiny/meta.json").write_text('{"tokenizer": "gpt2"}')
    train.main(
        arguments(vocab_size=50304, max_steps=1, batch_size=1, total_batch_size=16, eval_tokens=64)
    )
    export("out/tiny", "exported")
    text = "Hello world, naïve café\n\n  don't"
    ids = AutoTokenizer.from_pretrained("exported")(text)["input_ids"]
    assert ids == gpt2_tokenizer.encode_ordinary(text)
    assert AutoModelForCausalLM.from_pretrained("exported").config.vocab_size == 50257


TEXTS = ["", "def f(x):\n\treturn x  , y .\r\n\n", " naïve café ☕ 𝕏\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS)
def test_auto_tokenizer_of_a_byte_model_gives_the_bytes_and_the_text(tiny_run, text):
    export("out/tiny", "exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_auto_tokenizer_of_a_byte_model_has_all_ids_and_the_end_of_text(tiny_run):
    export("out/tiny", "exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)
    assert tokenizer("a<|endoftext|>")["input_ids"] == [97, 256]


def test_auto_tokenizer_of_a_char_model_gives_its_ids_the_text_and_no_unknown_character(workdir):
    chars = [*"\n\t é☕𝕏.,zyxba", "<|endoftext|>"]  # in an order of their own
    ids = list(range(len(chars) - 1)) * 200
    write_dataset(workdir / "data/chars", ids, ids, {"tokenizer": "char", "chars": chars})
    train.main(arguments(dataset="chars", max_steps=1))
    export("out/tiny", "exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    text = "a  b ,é\n\n\t☕𝕏. xyz "
    ids = tokenizer(text)["input_ids"]
    assert ids == [chars.index(char) for char in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == len(chars) - 1
    with pytest.raises(Exception, match="vocabulary"):
        tokenizer("aQb")


def test_the_pipeline_of_transformers_continues_text_up_to_block_size(tiny_run):
    export("out/tiny", "exported")
    generate = pipeline("text-generation", model="exported")
    [generated] = generate("def ", return_tensors=True)
    ids = generated["generated_token_ids"]
    assert ids[:4] == list(b"def ")
    assert 4 < len(ids) <= 16


def test_an_export_names_block_size_as_llama_cpp_reads_it(tiny_run):
    export("out/tiny", "exported")
    assert json.loads(Path("exported/config.json").read_text())["n_ctx"] == 16


def test_an_export_does_not_contain_the_path_of_the_text(workdir):
    change_json("data/tiny/meta.json", {"source": "/home/me/private.txt"})
    train.main(arguments(max_steps=1))
    export("out/tiny", "exported")
    assert all(b"private" not in path.read_bytes() for path in Path("exported").iterdir())


def test_export_refuses_an_existing_directory(tiny_run, workdir):
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match="data"):
        export("out/tiny", "data")
    assert sorted(workdir.rglob("*")) == before


def test_export_as_a_program_prints_how_to_load_the_result(tiny_run, capsys):
    export_main(["--init_from=out/tiny", "--out_dir=exported"])
    assert 'from_pretrained("exported")' in capsys.readouterr().out


def test_export_without_out_dir_is_refused_with_the_option(tiny_run, capsys):
    assert "--out_dir" in refused(capsys, ["--init_from=out/tiny"], export_main)


@pytest.mark.network
def test_the_released_gpt2_continues_a_prompt_as_in_transformers(
    tmp_path, monkeypatch, capsys, gpt2_tokenizer
):
    monkeypatch.chdir(tmp_path)
    prompt = "The capital of France is"
    sampling = ["--temperature=0", "--dtype=float32"]
    try:
        sample.main(["--init_from=gpt2", f"--prompt={prompt}", *sampling])
    except UserError as error:
        pytest.skip(f"no network: {error}")
    ids = torch.tensor([gpt2_tokenizer.encode_ordinary(prompt)])
    theirs = GPT2LMHeadModel.from_pretrained("openai-community/gpt2").generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=False,
        pad_token_id=50256,
    )
    assert capsys.readouterr().out.startswith(gpt2_tokenizer.decode(theirs[0].tolist()))
