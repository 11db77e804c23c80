"""common/nanogpt.py: ckpt.pt and meta.pkl of nanoGPT, and its bins as a dataset.

The files are written here in nanoGPT's layout, with torch.save and pickle.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from bomb import Bomb
from conftest import arguments, read_log
from foreign import load_error, max_difference, train_vivid
from nanogpt_files import CHAR_IDS, CHARS, meta_of_chars, write_pickle, write_their_data

import model as model_file
import prepare_data
import sample
import train
from common.dataloader import Loader
from common.pretrained import load_model
from common.tokenizer import get_tokenizer
from sample import generate_text
from tools import export

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.0}
GPT2_IDS = [*range(1000), 50256]


@pytest.fixture(autouse=True)
def cwd(workdir):
    """Run in an empty directory with data/tiny."""


def random_model(vocab_size=CHAR_IDS.stop, bias=True):
    """Return a model whose weights are so large that wrong ones change the logits."""
    torch.manual_seed(0)
    config = model_file.GPTConfig(**SHAPE, vocab_size=vocab_size, bias=bias)
    model = model_file.GPT(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def checkpoint_of(model, prefix=""):
    """Return what nanoGPT has in its ckpt.pt, for a model with these weights."""
    weights = {f"{prefix}{name}": w for name, w in model.state_dict().items()}
    weights[f"{prefix}lm_head.weight"] = model.transformer.wte.weight.data
    names = [*SHAPE, "vocab_size", "bias"]
    return {
        "model": weights,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {name: getattr(model.config, name) for name in names},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": False, "learning_rate": 1e-3},
    }


def write_checkpoint(checkpoint, chars=CHARS):
    """Write theirs/ckpt.pt and, for a char tokenizer, theirs/meta.pkl; return its path."""
    path = Path("theirs/ckpt.pt")
    path.parent.mkdir()
    torch.save(checkpoint, path)
    if chars is not None:
        write_pickle(path.with_name("meta.pkl"), meta_of_chars(chars))
    return path


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(w, second[name]) for name, w in first.items())


def prepare(*argv):
    prepare_data.main(list(argv))


def meta_json(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def refused(capsys, *argv):
    """Run prepare_data.py, which must refuse; return its one line."""
    return conftest.refused(capsys, list(argv), prepare_data.main)


# Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_gives_its_weights_bit_for_bit(bias):
    theirs = random_model(bias=bias)
    ours, _ = load_model(str(write_checkpoint(checkpoint_of(theirs))))
    assert ours.config == theirs.config
    assert_same_weights(ours, theirs)


def test_the_prefix_of_a_compiled_model_is_removed():
    theirs = random_model()
    ours, _ = load_model(str(write_checkpoint(checkpoint_of(theirs, prefix="_orig_mod."))))
    assert_same_weights(ours, theirs)


def test_attention_masks_of_old_versions_are_skipped():
    checkpoint = checkpoint_of(random_model())
    checkpoint["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    ours, _ = load_model(str(write_checkpoint(checkpoint)))
    assert_same_weights(ours, random_model())


def test_model_args_without_bias_have_biases_as_old_versions_did():
    checkpoint = checkpoint_of(random_model())
    del checkpoint["model_args"]["bias"]
    ours, _ = load_model(str(write_checkpoint(checkpoint)))
    assert_same_weights(ours, random_model())


def test_weights_in_half_precision_are_read_as_float32():
    theirs = random_model().bfloat16()
    ours, _ = load_model(str(write_checkpoint(checkpoint_of(theirs))))
    assert ours.transformer.wte.weight.dtype == torch.float32
    assert_same_weights(ours, theirs.float())


def test_a_directory_with_a_ckpt_pt_is_read():
    write_checkpoint(checkpoint_of(random_model()))
    ours, _ = load_model("theirs")
    assert_same_weights(ours, random_model())


def test_a_run_with_a_stray_ckpt_pt_is_still_the_run(tiny_run):
    expected, _ = load_model(str(tiny_run))
    torch.save(checkpoint_of(random_model()), tiny_run / "ckpt.pt")
    ours, _ = load_model(str(tiny_run))
    assert_same_weights(ours, expected)


def test_the_model_does_not_change_with_its_file():
    path = write_checkpoint(checkpoint_of(random_model()))
    ours, _ = load_model(str(path))
    with open(path, "r+b") as file:  # as torch.save does when it writes the file again
        file.write(bytes(path.stat().st_size))
    assert_same_weights(ours, random_model())


def test_loading_prints_one_line_about_gelu(capsys):
    path = write_checkpoint(checkpoint_of(random_model()))
    load_model(str(path))
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "GELU" in line


def test_a_checkpoint_that_is_refused_prints_no_line_about_gelu(capsys):
    checkpoint = checkpoint_of(random_model())
    del checkpoint["model"]["transformer.ln_f.weight"]
    load_error(write_checkpoint(checkpoint))
    assert capsys.readouterr().err == ""


def test_exact_gelu_changes_logits_by_at_most_0_01_and_the_loss_by_2e_5(monkeypatch):
    train_vivid(dataset="tiny", n_embd=64, n_head=2, bias=False)
    ours, _ = load_model("out/tiny")
    loader = Loader("data/tiny", block_size=16, vocab_size=257, seed=0)
    x, y = loader.train_batch(0, 500)
    with torch.no_grad():
        tanh_logits, tanh_loss = ours(x), ours(x, y)
        gelu = model_file.F.gelu
        monkeypatch.setattr(model_file.F, "gelu", lambda x, approximate: gelu(x))
        exact_logits, exact_loss = ours(x), ours(x, y)
    assert 0 < max_difference(tanh_logits, exact_logits) < 0.01
    assert abs(tanh_loss - exact_loss) < 2e-5


def test_training_starts_from_a_checkpoint():
    write_their_data(ids=[*CHAR_IDS] * 20, folder="data/theirs")
    prepare("theirs", "--import_nanogpt=data/theirs")
    path = write_checkpoint(checkpoint_of(random_model()))
    options = {"dataset": "theirs", "init_from": path, "out_dir": "out/tuned", "max_steps": 2}
    train.main(arguments(**options))
    loaded, _ = load_model(str(path))
    x, y = next(Loader("data/theirs", 16, len(CHARS), seed=0).val_batches(256, 16))
    assert read_log(Path("out/tuned"))[-1]["step"] == 2
    train.main(arguments(**options | {"out_dir": "out/none", "eval_only": True}))
    assert loaded(x, y).isfinite()


def test_sampling_from_a_checkpoint_has_the_greedy_text_of_its_weights(capsys):
    theirs = random_model()
    path = write_checkpoint(checkpoint_of(theirs))
    argv = [f"--init_from={path}", "--prompt=ab", "--temperature=0", "--max_new_tokens=12"]
    sample.main([*argv, "--device=cpu", "--dtype=float32"])
    tokenizer = get_tokenizer({"tokenizer": "char", "chars": CHARS})
    expected = generate_text(theirs, tokenizer, "ab", max_new_tokens=12, temperature=0)
    assert capsys.readouterr().out == expected + "\n"


# The tokenizer of a checkpoint ----------------------------------------------------------------


def test_a_meta_pkl_beside_a_checkpoint_gives_its_characters():
    _, meta = load_model(str(write_checkpoint(checkpoint_of(random_model()))))
    assert (meta["tokenizer"], meta["chars"]) == ("char", CHARS)


def test_a_meta_json_beside_a_checkpoint_comes_first():
    path = write_checkpoint(checkpoint_of(random_model(vocab_size=257)))
    path.with_name("meta.json").write_text('{"tokenizer": "byte"}')
    _, meta = load_model(str(path))
    assert meta == {"tokenizer": "byte", "vocab_size": 257}


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_without_meta_the_vocabulary_of_gpt2_padded_or_not_is_gpt2s(vocab_size):
    path = write_checkpoint(checkpoint_of(random_model(vocab_size)), chars=None)
    ours, meta = load_model(str(path))
    assert ours.config.vocab_size == vocab_size
    assert meta == {"tokenizer": "gpt2", "vocab_size": 50257}


@pytest.mark.parametrize("chars", [CHARS[:-1], [*CHARS, "ß"]])
def test_a_meta_pkl_of_another_number_of_characters_is_refused_with_both(chars):
    message = load_error(write_checkpoint(checkpoint_of(random_model()), chars))
    assert "meta.pkl" in message
    assert str(len(chars)) in message
    assert f"vocab_size={len(CHARS)}" in message


@pytest.mark.parametrize("vocab_size", [None, "50257", 1.5])
def test_a_vocab_size_that_is_no_number_is_refused(vocab_size):
    checkpoint = checkpoint_of(random_model())
    with_argument("vocab_size", vocab_size)(checkpoint)
    assert f"vocab_size={vocab_size!r}" in load_error(write_checkpoint(checkpoint, chars=None))


@pytest.mark.parametrize("vocab_size", [65, 50256, 50305])
def test_without_meta_another_vocabulary_asks_for_the_meta_pkl(vocab_size):
    path = write_checkpoint(checkpoint_of(random_model(vocab_size)), chars=None)
    message = load_error(path)
    assert f"vocab_size={vocab_size}" in message
    assert "meta.pkl" in message
    assert "meta.json" in message


# Files that are no checkpoints ----------------------------------------------------------------


def without(name):
    def change(checkpoint):
        del checkpoint[name]

    return change


def with_argument(name, value):
    return lambda checkpoint: checkpoint["model_args"].update({name: value})


def with_weight(name, value):
    return lambda checkpoint: checkpoint["model"].update({name: value})


def without_weight(name):
    return lambda checkpoint: checkpoint["model"].pop(name)


# case: (change of a checkpoint, what the error must contain)
BAD = {
    "no model": (without("model"), "model"),
    "no model_args": (without("model_args"), "model_args"),
    "model_args of another model": (with_argument("n_kv_head", 2), "n_kv_head"),
    "a size of another type": (with_argument("n_layer", "2"), "n_layer"),
    "a fraction of a layer": (with_argument("n_layer", 1.5), "n_layer=1.5"),
    "a layer less than its weights": (with_argument("n_layer", 1), "transformer.h.1"),
    "heads that do not divide": (with_argument("n_head", 3), "n_head=3"),
    "another head": (with_weight("lm_head.weight", torch.zeros(97, 16)), "lm_head.weight"),
    "no head": (without_weight("lm_head.weight"), "no lm_head.weight"),
    "no embedding": (without_weight("transformer.wte.weight"), "no transformer.wte.weight"),
    "no weight": (without_weight("transformer.ln_f.weight"), "transformer.ln_f.weight"),
    "a weight of another shape": (with_weight("transformer.wpe.weight", torch.zeros(9, 16)), "wpe"),
}


@pytest.mark.parametrize("change, expected", BAD.values(), ids=BAD.keys())
def test_another_checkpoint_is_refused_with_what_differs(change, expected):
    checkpoint = checkpoint_of(random_model())
    change(checkpoint)
    message = load_error(write_checkpoint(checkpoint))
    assert "theirs/ckpt.pt" in message
    assert expected in message


@pytest.mark.parametrize("value", [{}, [], 3, {"model": 1, "model_args": {}}])
def test_another_file_of_torch_save_is_refused(value):
    assert "theirs/ckpt.pt" in load_error(write_checkpoint(value))


def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run():
    checkpoint = checkpoint_of(random_model()) | {"config": Bomb("exploded")}
    message = load_error(write_checkpoint(checkpoint))
    assert "theirs/ckpt.pt" in message
    assert "code" in message
    assert not Path("exploded").exists()


def test_a_plain_pickle_with_code_is_refused_and_the_code_does_not_run():
    write_pickle(Path("theirs/ckpt.pt"), Bomb("exploded"))
    assert "theirs/ckpt.pt" in load_error("theirs")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_the_weights_is_noticed(position):
    path = write_checkpoint(checkpoint_of(random_model()))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size)
    start = content.index(random_model().transformer.wte.weight.detach().numpy().tobytes())
    content[start + int(position * weights.file_size)] ^= 1
    path.write_bytes(content)
    assert "theirs/ckpt.pt" in load_error(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(kept):
    path = write_checkpoint(checkpoint_of(random_model()))
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept)
    assert "theirs/ckpt.pt" in load_error(path)


def test_a_missing_file_is_refused_with_its_name():
    assert "theirs/ckpt.pt" in load_error("theirs/ckpt.pt")


# meta.pkl -------------------------------------------------------------------------------------

# case: what a meta.pkl may hold instead
BAD_META = {
    "code": Bomb("exploded"),
    "code inside": {"itos": {0: "a", 1: Bomb("exploded")}},
    "an array": {"itos": np.array(["a", "b"])},
    "no dict": 3,
    "no itos": {"stoi": {"a": 0}},
    "no characters": {"itos": {}},
    "a missing id": {"itos": {0: "a", 2: "b"}},
    "words": {"itos": {0: "a", 1: "word"}},
    "numbers": {"itos": {0: 1}},
    "a character twice": {"itos": {0: "a", 1: "a"}},
    "bytes": {"itos": {0: b"a", 1: b"b"}},
    "<|endoftext|> before a character": {"itos": {0: "a", 1: "<|endoftext|>", 2: "b"}},
}


@pytest.mark.parametrize("value", BAD_META.values(), ids=BAD_META.keys())
def test_another_meta_pkl_is_refused_and_code_does_not_run(capsys, value):
    write_their_data(chars=None)
    write_pickle(Path("theirs/meta.pkl"), value)
    assert "theirs/meta.pkl" in refused(capsys, "mine", "--import_nanogpt=theirs")
    assert not Path("exploded").exists()
    assert not Path("data/mine").exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"itos": {0: "a"}})[:-3]])
def test_a_damaged_meta_pkl_is_refused(capsys, content):
    write_their_data().joinpath("meta.pkl").write_bytes(content)
    assert "theirs/meta.pkl" in refused(capsys, "mine", "--import_nanogpt=theirs")


# Bins -----------------------------------------------------------------------------------------


def test_importing_copies_the_bins_and_makes_meta_json():
    theirs = write_their_data()
    prepare("mine", "--import_nanogpt=theirs")
    assert sorted(os.listdir("data/mine")) == ["meta.json", "train.bin", "val.bin"]
    for name in ("train.bin", "val.bin"):
        assert (Path("data/mine") / name).read_bytes() == (theirs / name).read_bytes()


def test_an_imported_meta_json_has_the_characters_the_counts_and_hashes(capsys):
    write_their_data()
    prepare("mine", "--import_nanogpt=theirs")
    meta = meta_json(Path("data/mine"))
    assert (meta["tokenizer"], meta["vocab_size"], meta["chars"]) == ("char", len(CHARS), CHARS)
    assert meta["train"]["tokens"] == len(CHARS)
    assert meta["train"]["largest_id"] == len(CHARS) - 1
    assert meta["train"]["bytes"] == len("".join(CHARS).encode())
    prepare("mine", "--verify=True")


def test_bins_without_a_meta_pkl_have_the_tokens_of_gpt2(gpt2_tokenizer):
    write_their_data(chars=None, ids=GPT2_IDS)
    prepare("mine", "--import_nanogpt=theirs")
    meta = meta_json(Path("data/mine"))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    text = [gpt2_tokenizer.decode_single_token_bytes(token_id) for token_id in range(1000)]
    assert meta["val"]["bytes"] == len(b"".join(text))


def test_bins_in_the_folder_of_the_dataset_stay_and_get_a_meta_json():
    theirs = write_their_data(folder="data/mine")
    before = os.stat(theirs / "train.bin")
    prepare("mine", "--import_nanogpt=data/mine")
    assert os.stat(theirs / "train.bin") == before
    assert sorted(os.listdir(theirs)) == ["meta.json", "meta.pkl", "train.bin", "val.bin"]
    prepare("mine", "--verify=True")


def test_training_on_bins_with_a_meta_pkl_only_names_the_command_that_helps(capsys):
    write_their_data(folder="data/mine")
    line = conftest.refused(capsys, arguments(dataset="mine"))
    assert "meta.pkl" in line
    assert "python prepare_data.py mine --import_nanogpt=data/mine" in line


def test_the_same_import_again_reads_changed_bins():
    theirs = write_their_data()
    prepare("mine", "--import_nanogpt=theirs")
    np.array([1, 2, 3], dtype="<u2").tofile(theirs / "val.bin")
    prepare("mine", "--import_nanogpt=theirs/")
    assert meta_json(Path("data/mine"))["val"]["tokens"] == 3


@pytest.mark.parametrize("folder", ["theirs", "data/mine"])
def test_a_dataset_from_another_source_is_refused_and_kept(capsys, folder):
    Path("text.txt").write_text("some text " * 100)
    prepare("mine", "--input=text.txt", "--tokenizer=byte")
    if folder == "theirs":
        write_their_data()
    else:
        write_pickle(Path("data/mine/meta.pkl"), meta_of_chars(map(chr, range(256))))
    before = {path.name: path.read_bytes() for path in Path("data/mine").iterdir()}
    line = refused(capsys, "mine", f"--import_nanogpt={folder}")
    assert "text.txt" in line
    assert "--overwrite=True" in line
    assert {path.name: path.read_bytes() for path in Path("data/mine").iterdir()} == before


def test_overwrite_replaces_a_dataset_from_another_source():
    Path("text.txt").write_text("some text " * 100)
    prepare("mine", "--input=text.txt", "--tokenizer=byte")
    write_their_data()
    prepare("mine", "--import_nanogpt=theirs", "--overwrite=True")
    assert meta_json(Path("data/mine"))["source"] == "theirs"


ID_BEYOND = np.array([1, len(CHARS)], dtype="<u2").tobytes()


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("val.bin", b"\0" * 5, ["theirs/val.bin", "5"]),
        ("val.bin", b"", ["theirs/val.bin", "0"]),
        ("train.bin", None, ["theirs/train.bin", "--import_nanogpt"]),  # None: there is no file
        ("train.bin", ID_BEYOND, ["theirs/train.bin", str(len(CHARS)), "char", "meta.pkl"]),
    ],
)
def test_bins_that_do_not_fit_are_refused_and_nothing_is_made(capsys, name, content, expected):
    path = write_their_data() / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, "mine", "--import_nanogpt=theirs")
    assert [text for text in expected if text not in line] == []
    assert not Path("data/mine").exists()


@pytest.mark.parametrize("option", ["--input=a.txt", "--tokenizer=char", "--val_fraction=0.1"])
def test_options_that_do_not_apply_to_an_import_are_refused(capsys, option):
    write_their_data()
    line = refused(capsys, "mine", "--import_nanogpt=theirs", option)
    assert option.partition("=")[0] in line


# Export --------------------------------------------------------------------------------------


def test_an_export_for_transformers_of_a_checkpoint_has_its_weights():
    theirs = random_model()
    path = write_checkpoint(checkpoint_of(theirs))
    export.main([f"--init_from={path}", "--out_dir=exported"])
    back, _ = load_model("exported")
    assert_same_weights(back, theirs)
