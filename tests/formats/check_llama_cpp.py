"""Compare exported models with llama.cpp: weights in the GGUF file, token ids, logits, greedy text.

    pip install -r requirements-dev.txt gguf llama-cpp-python
    python tests/formats/check_llama_cpp.py LLAMA_CPP/convert_hf_to_gguf.py

LLAMA_CPP is llama.cpp's source tree; the source distribution of llama-cpp-python has a copy in
vendor/llama.cpp. For each model the script trains a tiny run with GPT-2's tokenizer, exports and
converts it, and prints one line. It ends with status 1 if a model differs. pytest does not collect
this file.

llama.cpp does not know StarCoder2's window. model_rope_gqa_swa is therefore compared up to `window`
tokens and, beyond, with the same weights without a window.
"""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # for conftest
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import gguf
import numpy as np
import torch
from conftest import TEXT, arguments, write_dataset
from llama_cpp import GGML_TYPE_F32, Llama
from safetensors.torch import load_file
from torch.nn import functional as F

import train
from common.models import model_module
from common.pretrained import load_model
from common.tokenizer import encode, get_tokenizer
from common.transformers_format import CONV1D
from sample import generate_text
from tools.export import export

MODELS = {
    "model": {},
    "model_gqa": {"n_kv_head": 2},
    "model_rope": {},
    "model_rope_gqa_swa": {"n_kv_head": 2, "window": 32},
}
BLOCK_SIZE = 128
TOLERANCE = 0.005  # of logits up to 14: llama.cpp computes GELU in float16 on a CPU
PROMPT = "def f7(x):"
NEW_TOKENS = 40


def train_and_export(name):
    """Train a run of a model file in out/NAME, and export it to NAME."""
    sizes = {"n_head": 4, "n_embd": 32, "block_size": BLOCK_SIZE, "total_batch_size": 512}
    learning = {"max_steps": 100, "dropout": 0.0, "grad_clip": 1.0, "eval_interval": 100}
    run = {"model": name, "out_dir": f"out/{name}"}
    train.main(arguments(**MODELS[name], **sizes, **learning, **run))
    export(f"out/{name}", name)


def has_equal_weights(path, folder):
    """Return whether a GGUF file has the tensors of an export, under llama.cpp's names."""
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], 2)  # layers
    ours = {}
    for key, w in load_file(folder / "model.safetensors").items():
        w = w.T if kind == "gpt2" and CONV1D.fullmatch(key) else w
        ours[names.get_name(key, (".weight", ".bias"))] = w.numpy()
    return ours.keys() == theirs.keys() and all(
        np.array_equal(w, theirs[key]) for key, w in ours.items()
    )


def without_window(model):
    """Return a model with the same weights whose tokens attend to all before them."""
    config = dataclasses.replace(model.config, window=BLOCK_SIZE)
    other = model_module("model_rope_gqa_swa").GPT(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
def compare(name, converter):
    """Convert an exported model; print a line and return whether llama.cpp agrees."""
    path = Path(f"{name}.gguf")
    convert = [sys.executable, converter, name, "--outtype=f32", f"--outfile={path}"]
    subprocess.run(convert, check=True, capture_output=True)
    ours, meta = load_model(f"out/{name}")
    tokenizer = get_tokenizer(meta)
    theirs = Llama(
        str(path),
        n_ctx=BLOCK_SIZE,
        n_threads=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    ids = encode(tokenizer, TEXT).tolist()[:BLOCK_SIZE]
    theirs.eval(ids)
    their_logits = torch.tensor(theirs.scores[:BLOCK_SIZE])  # (T, V)
    idx = torch.tensor([ids])
    logits = ours(idx)[0]  # (T, V)
    checks = {
        "weights": has_equal_weights(path, Path(name)),
        "token ids": theirs.tokenize(TEXT.encode(), add_bos=False)[:BLOCK_SIZE] == ids,
    }
    window = MODELS[name].get("window", BLOCK_SIZE)
    error = (their_logits - logits)[:window].abs().max().item()
    line = f"{name}: largest logit {logits.abs().max():.1f}, largest error {error:.1e}"
    checks["logits"] = error < TOLERANCE
    if window < BLOCK_SIZE:
        beyond = (their_logits - logits)[window:].abs().max().item()
        our_loss, their_loss = [
            F.cross_entropy(x[window:-1], idx[0, window + 1 :]) for x in (logits, their_logits)
        ]
        unwindowed = without_window(ours)(idx)[0]
        error = (their_logits - unwindowed).abs().max().item()
        checks["logits without a window"] = error < TOLERANCE
        line += (
            f" in the first {window} tokens, {beyond:.1e} beyond (loss {our_loss:.3f} here, "
            f"{their_loss:.3f} there), {error:.1e} without a window"
        )
        ours = without_window(ours)
    text = generate_text(ours, tokenizer, PROMPT, NEW_TOKENS, temperature=0)
    completion = theirs(PROMPT, max_tokens=NEW_TOKENS, temperature=0)
    checks["greedy text"] = PROMPT + completion["choices"][0]["text"] == text
    failed = [what for what, is_equal in checks.items() if not is_equal]
    print(f"{line}; {' and '.join(failed) + ' differ' if failed else 'all equal'}", flush=True)
    return not failed


def main(argv):
    if len(argv) != 1 or not Path(argv[0]).is_file():
        sys.exit("error: name llama.cpp's converter: .../convert_hf_to_gguf.py")
    converter = Path(argv[0]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        meta = {"tokenizer": "gpt2"}
        ids = encode(get_tokenizer(meta), TEXT)
        write_dataset(Path("data/tiny"), ids, ids, meta)
        with contextlib.redirect_stdout(io.StringIO()):
            for name in MODELS:
                train_and_export(name)
        agrees = [compare(name, converter) for name in MODELS]
        os.chdir("/")  # Windows does not remove a working directory
    sys.exit(0 if all(agrees) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
