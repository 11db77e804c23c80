"""The programs that read files, and folders in which they find all of them.

test_mutants.py and test_hostile.py damage those files. A template is a folder in which some of the
programs succeed; a test changes a file in a copy of it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from conftest import TEXT, TINY, arguments
from safetensors.torch import save_file

import prepare_data
import sample
import train
from common.pretrained import load_model
from common.transformers_format import to_gpt2
from model import GPT, GPTConfig
from tools import export, plot_loss

STEP = "out/tiny/step_00000012"
SHARD = "shard-00001-model-00001-of-00001.safetensors"

# What can take the place of a file -----------------------------------------------------------


def make_folder(path):
    path.mkdir()
    (path / "file").write_text("x")


def make_unreadable(path):
    path.write_text("x")
    path.chmod(0)


REPLACEMENTS = {
    "missing": lambda path: None,
    "an empty folder": Path.mkdir,
    "a folder": make_folder,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}
if os.geteuid() != 0:  # root reads everything
    REPLACEMENTS["not readable"] = make_unreadable

# Programs and their results -------------------------------------------------------------------


def digest(paths):
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(paths)]


def trained(folder, out):
    """Return the losses and the tensors of the last checkpoint that a command wrote."""
    last = sorted(folder.glob("out/tiny/step_????????"))[-1]
    metrics = json.loads((last / "config.json").read_text())["metrics"]
    return metrics["train_loss"], metrics["val_loss"], digest(last.glob("*.safetensors"))


def printed(folder, out):
    return out


def last_line(folder, out):
    return out.splitlines()[-1]


def exported(folder, out):
    return digest((folder / "exported").iterdir())


def print_weights(argv):
    """Load a model as the programs do, and print the hash of its weights."""
    model, meta = load_model(*argv)
    sha256 = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha256.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    print(sha256.hexdigest(), model.config, meta)


def print_curves(argv):
    plot_loss.draw = lambda runs, path: print(runs)
    plot_loss.main(argv)


SAMPLE_OPTIONS = ["--prompt=def ", "--max_new_tokens=8", "--device=cpu", "--dtype=float32"]
# name: (main, argv, result of a folder and of what was printed)
PROGRAMS = {
    "resume": (train.main, arguments(max_steps=13), trained),
    "eval_only": (train.main, arguments(eval_only=True), last_line),
    "sample": (sample.main, ["--init_from=out/tiny", *SAMPLE_OPTIONS], printed),
    "export": (export.main, ["--init_from=out/tiny", "--out_dir=exported"], exported),
    "load_model": (print_weights, ["out/tiny"], printed),
    "plot_loss": (print_curves, ["out/tiny"], printed),
    "verify": (prepare_data.main, ["tiny", "--verify=True"], printed),
    "sample gpt": (sample.main, ["--init_from=gpt", *SAMPLE_OPTIONS], printed),
    "export gpt": (export.main, ["--init_from=gpt", "--out_dir=exported"], exported),
    "fine-tune gpt": (
        train.main,
        arguments(
            init_from="gpt", max_steps=1, n_layer=None, n_head=None, n_embd=None, eval_tokens=64
        ),
        trained,
    ),
    "config": (train.main, ["tiny.py", "--eval_only=True"], last_line),
}


# Templates ------------------------------------------------------------------------------------


def foreign_model(**shape):
    """Return the tensors and the config.json of a random GPT-2 in transformers' format."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=257, **shape)
    weights, theirs = to_gpt2(GPT(config).state_dict(), config)
    return {name.removeprefix("transformer."): w.clone() for name, w in weights.items()}, theirs


def write_model(folder, weights, theirs):
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(theirs | {"vocab_size": 257}))


def make_templates(root):
    """Make the templates in a folder; return it."""
    run = root / "run"
    run.mkdir()
    (run / "text.txt").write_text(TEXT)
    options = TINY | {"max_steps": 1}
    config = "".join(f"{name} = {value!r}\n" for name, value in options.items())
    (run / "tiny.py").write_text(config)
    with contextlib.chdir(run):
        options = ["--input=text.txt", "--tokenizer=byte", "--val_fraction=0.06"]
        prepare_data.main(["tiny", *options])
        train.main(arguments())

    foreign = root / "foreign"
    shutil.copytree(run / "data", foreign / "data")
    weights, theirs = foreign_model(n_layer=2, n_head=2, n_embd=16)
    write_model(foreign / "gpt", weights, theirs)
    (foreign / "gpt/meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 257}))

    sharded = root / "sharded"
    shutil.copytree(foreign, sharded)
    (sharded / "gpt/model.safetensors").unlink()
    names = sorted(weights)
    for number, half in ((1, names[::2]), (2, names[1::2])):
        path = sharded / f"gpt/model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, path)
    return root


def copy_template(templates, name, parent):
    """Return a new copy of a template, in the folder `parent`."""
    return Path(shutil.copytree(templates / name, parent / name, symlinks=True))
