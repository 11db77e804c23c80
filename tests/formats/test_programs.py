"""Other programs compute the same with exported models: CTranslate2, ONNX Runtime and
lm-evaluation-harness.

    pip install ctranslate2 onnxruntime onnxscript "lm_eval[hf]"
    pytest -m slow tests/formats/test_programs.py

A test is skipped where its program is not installed. For llama.cpp see check_llama_cpp.py.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, arguments, write_dataset
from documents import block
from foreign import logits, max_difference

import train
from common.pretrained import load_model
from common.tokenizer import EOT, encode, get_tokenizer
from sample import generate
from tools.export import export

pytestmark = pytest.mark.slow

BYTE = {"tokenizer": "byte"}
CHAR = {"tokenizer": "char", "chars": [*sorted(set(TEXT)), EOT]}
METAS = {"gpt2": {"tokenizer": "gpt2"}, "byte": BYTE, "char": CHAR}
AS_GPT2 = [{"model": "model"}, {"model": "model_gqa", "n_kv_head": 2}]
AS_STARCODER2 = [
    {"model": "model_rope"},
    {"model": "model_rope_gqa_swa", "n_kv_head": 2, "window": 5},
]
AS_GPT_NEO = [{"model": "model_swa", "window": 5, "bias": False}]
PROMPT = "def "


def model_name(options):
    return options["model"]


def train_and_export(meta, options):
    """Train out/quickstart on TEXT with a tokenizer, and export it; return (model, tokenizer)."""
    tokenizer = get_tokenizer(meta)
    ids = encode(tokenizer, TEXT).tolist()
    write_dataset(Path("data/stdlib"), ids, ids, meta)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "total_batch_size": 256}
    learning = {"max_steps": 100, "dropout": 0.0, "grad_clip": 1.0, "eval_interval": 100}
    run = {"dataset": "stdlib", "out_dir": "out/quickstart"}
    train.main(arguments(**options, **sizes, **learning, **run))
    export("out/quickstart", "exported/quickstart")
    model, _ = load_model("out/quickstart")
    return model, tokenizer


def greedy(model, tokenizer):
    """Return the ids of PROMPT and of its most likely continuation, 50 in all."""
    prompt = tokenizer.encode(PROMPT)
    tokens = generate(model, torch.tensor([prompt]), 50 - len(prompt), temperature=0)
    return prompt + [token.item() for token in tokens]


def test_the_check_of_nanogpt_starts_and_asks_for_its_directory():
    script = Path(__file__).parent / "check_nanogpt.py"
    completed = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert completed.stderr.startswith("error: name a directory")


# CTranslate2 ----------------------------------------------------------------------------------


@pytest.fixture
def ctranslate2_code():
    """The Python of the page, for out/quickstart and PROMPT."""
    pytest.importorskip("ctranslate2")
    code = block("python", "import ctranslate2")
    return code.replace("exported/shakespeare", "exported/quickstart").replace("To be, ", PROMPT)


@pytest.mark.parametrize("meta", METAS.values(), ids=METAS)
@pytest.mark.parametrize("options", AS_GPT2, ids=model_name)
def test_ctranslate2_has_the_same_logits_and_greedy_text(
    ctranslate2_code, gpt2_tokenizer, workdir, meta, options
):
    model, tokenizer = train_and_export(meta, options)
    names = {}
    exec(ctranslate2_code, names)
    expected = greedy(model, tokenizer)
    assert len(set(expected)) > 5
    assert names["result"].sequences_ids[0][:50] == expected

    tokens = names["tokenizer"].convert_ids_to_tokens(expected)
    theirs = np.array(names["generator"].forward_batch([tokens]))
    difference = max_difference(logits(model, torch.tensor([expected])), torch.from_numpy(theirs))
    assert difference < 1e-4


@pytest.mark.parametrize("options", AS_STARCODER2 + AS_GPT_NEO, ids=model_name)
def test_ctranslate2_refuses_starcoder2_and_gpt_neo(ctranslate2_code, workdir, options):
    train_and_export(BYTE, options)
    with pytest.raises(ValueError, match=r"Starcoder2Config|GPTNeoConfig"):
        exec(ctranslate2_code, {})


# ONNX Runtime ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", AS_GPT2 + AS_STARCODER2 + AS_GPT_NEO, ids=model_name)
def test_onnx_runtime_has_the_same_logits_and_greedy_text(workdir, options):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, tokenizer = train_and_export(BYTE, options)
    exec(block("python", "torch.onnx.export"), {})
    session = onnxruntime.InferenceSession("quickstart.onnx")

    def their_logits(ids):
        [theirs] = session.run(["logits"], {"input_ids": ids.numpy()})
        return torch.from_numpy(theirs)

    ids = torch.randint(257, (3, 64))
    assert max_difference(logits(model, ids), their_logits(ids)) < 1e-4

    expected = greedy(model, tokenizer)
    text = tokenizer.encode(PROMPT)
    while len(text) < len(expected):
        text.append(their_logits(torch.tensor([text]))[0, -1].argmax().item())
    assert len(set(expected)) > 5
    assert text == expected


# lm-evaluation-harness ------------------------------------------------------------------------


PADDED = [{"model": "model", "vocab_size": 320}]


@pytest.mark.parametrize("options", AS_GPT2 + AS_STARCODER2 + AS_GPT_NEO + PADDED, ids=model_name)
def test_lm_eval_has_the_bits_per_byte_of_the_recipe(workdir, capsys, options):
    pytest.importorskip("lm_eval")
    train_and_export(BYTE, options)
    ids = [*TEXT[:500].encode(), 256, *TEXT[500:507].encode(), 256, *TEXT[507:600].encode()]
    np.array(ids, dtype="<u2").tofile("data/stdlib/val.bin")
    capsys.readouterr()
    exec(block("python", "own_text.jsonl"), {})
    ours = float(capsys.readouterr().out.split()[0])

    Path("own_text.yaml").write_text(block("yaml", "own_text"))
    command = block("text", "own_text.yaml")
    subprocess.run(
        [*shlex.split(command), "--device=cpu", "--output_path=results"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    [results] = Path("results").glob("**/results_*.json")
    [theirs] = re.findall(r'"bits_per_byte,none": ([\d.]+)', results.read_text())
    assert ours == round(float(theirs), 4)
