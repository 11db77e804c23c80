"""The programs that read files, and folders in which they find all of them.

Tests damage those files. A template is a folder in which some of the programs succeed; a test
changes a file in a copy of it.
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import torch
from conftest import TEXT, TINY, arguments
from safetensors.torch import save_file

import prepare_data
import sample
import train
from common.transformers_format import to_gpt2
from model import GPT, GPTConfig
from tools import plot_loss

STEP = "out/tiny/step_00000012"
SHARD = "shard-00001-model-00001-of-00001.safetensors"

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


def print_curves(argv):
    plot_loss.draw = lambda runs, *_: print(runs)
    plot_loss.main(argv)


SAMPLE_OPTIONS = ["--prompt=def ", "--max_new_tokens=8", "--device=cpu", "--dtype=float32"]
# name: (main, argv, result of a folder and of what was printed)
PROGRAMS = {
    "resume": (train.main, arguments(max_steps=13), trained),
    "eval_only": (train.main, arguments(eval_only=True), last_line),
    "sample": (sample.main, ["--init_from=out/tiny", *SAMPLE_OPTIONS], printed),
    "plot_loss": (print_curves, ["out/tiny"], printed),
    "verify": (prepare_data.main, ["tiny", "--verify=True"], printed),
    "sample gpt": (sample.main, ["--init_from=gpt", *SAMPLE_OPTIONS], printed),
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


def write_foreign_model(folder):
    """Write a random GPT-2 in transformers' format."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
    tensors, theirs = to_gpt2(GPT(config).state_dict(), config)
    tensors = {name.removeprefix("transformer."): w.clone() for name, w in tensors.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(theirs | {"vocab_size": 257}))
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 257}))


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
    write_foreign_model(foreign / "gpt")

    return root


def copy_template(templates, name, parent):
    """Return a new copy of a template, in the folder `parent`."""
    return Path(shutil.copytree(templates / name, parent / name, symlinks=True))
