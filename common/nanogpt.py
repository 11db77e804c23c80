"""Read models and datasets of nanoGPT: its ckpt.pt and its meta.pkl.

nanoGPT's model has the parameters of model.py, by the same names and in the same orientation, and
lm_head.weight, which is wte. It computes GELU exactly, and model.py in its tanh approximation.

Both files are pickles, which can hold code. They are read so that only tensors, containers, strings
and numbers can come out of them.
"""

import os
import pickle
import zipfile

import torch

from common.errors import UserError, one_line
from common.files import check_regular, damaged
from common.models import to_float32
from common.tokenizer import VOCAB_SIZES, check_meta, read_meta

SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")
OLD_SHAPE = {"bias": True, "dropout": 0.0}  # what checkpoints without these fields have
GPT2_META = {"tokenizer": "gpt2", "vocab_size": VOCAB_SIZES["gpt2"]}
PADDED_VOCAB_SIZE = 50304  # of nanoGPT's models with GPT-2's tokenizer
# Measured with nanoGPT's example for CPUs, Shakespeare by characters, after 2000 iterations: the
# largest difference of a logit, and that of the validation loss. With exact GELU there is none.
GELU = (
    "nanoGPT computes GELU exactly and model.py in its tanh approximation: logits differ by about "
    "0.01, losses by 2e-5"
)


# Checkpoints ----------------------------------------------------------------------------------


def read_checkpoint(path):
    """Return (shape, weights, meta) of a ckpt.pt, as common.pretrained.Source has them.

    Raises UserError if the file is damaged, or not a checkpoint of nanoGPT's model.
    """
    checkpoint = _load(path)
    try:
        shape = OLD_SHAPE | checkpoint["model_args"]
        weights = _float32_weights(path, checkpoint["model"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT ({type(error).__name__}: {one_line(error)})"
        ) from error
    if shape.keys() != set(SHAPE):
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT's model: model_args has "
            f"{', '.join(map(str, shape))}, and must have {', '.join(SHAPE)}"
        )
    for key in ("lm_head.weight", "transformer.wte.weight"):
        if key not in weights:
            raise UserError(f"{path} is not a checkpoint of nanoGPT's model: it has no {key}")
    if not torch.equal(weights.pop("lm_head.weight"), weights["transformer.wte.weight"]):
        raise UserError(
            f"{path} has an lm_head.weight that differs from transformer.wte.weight; nanoGPT and "
            "model.py tie them"
        )
    return shape, weights, _read_tokenizer(path, shape["vocab_size"])


def _load(path):
    """Return what is in a file of torch.save: tensors, containers, strings and numbers."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            is_damaged = archive.testzip() is not None  # torch.load does not verify the CRCs
        if not is_damaged:
            # Mapped, because the optimizer state, two thirds of the file, is not needed.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds other objects than tensors, strings and numbers, which can be code, and "
            "is not loaded: save it again without them"
        ) from error
    except Exception as error:  # zipfile and torch.load raise many kinds
        raise _damaged(path) from error
    raise _damaged(path)


def _damaged(path):
    message = f"{path} is truncated or damaged, or not a file that torch.save wrote"
    return damaged(path, message, own_kind="a ZIP archive")


def _float32_weights(path, stored):
    """Return copies of nanoGPT's weights, by our names."""
    weights = {}
    for key, value in stored.items():
        key = key.removeprefix("_orig_mod.")  # of a compiled model
        if not key.endswith(".attn.bias"):  # the attention mask, with old versions of torch
            copy = value.detach().clone()  # the file, which is mapped, may change
            weights[key] = to_float32(path, key, copy)
    return weights


def _read_tokenizer(path, vocab_size):
    """Return the meta.json of a checkpoint's tokenizer; files beside it come first."""
    folder = path.parent
    if not isinstance(vocab_size, int):
        raise UserError(f"{path} has vocab_size={vocab_size!r}, not an int")
    if os.path.lexists(folder / "meta.json"):  # a broken link is not the absence of a file
        return read_meta(folder)
    if os.path.lexists(folder / "meta.pkl"):
        meta = read_meta_pkl(folder / "meta.pkl")
        if meta["vocab_size"] != vocab_size:  # nanoGPT takes the number of its meta.pkl
            raise UserError(
                f"{path} has vocab_size={vocab_size}, and the meta.pkl beside it "
                f"{meta['vocab_size']} characters: copy the meta.pkl of its dataset there"
            )
        return meta
    if VOCAB_SIZES["gpt2"] <= vocab_size <= PADDED_VOCAB_SIZE:
        return GPT2_META
    raise UserError(
        f"{path} has vocab_size={vocab_size}, which is not GPT-2's: copy the meta.pkl of "
        f"its dataset to {folder}, or name the tokenizer in a meta.json there"
    )


# Tokenizers -----------------------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    """Loads containers, strings and numbers, and nothing that has to be imported."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it imports {module}.{name}, which can be code")


def read_dataset_meta(folder):
    """Return the meta.json for bins of nanoGPT: they are GPT-2's tokens if no file names others."""
    if os.path.lexists(folder / "meta.pkl"):
        return read_meta_pkl(folder / "meta.pkl")
    if os.path.lexists(folder / "meta.json"):  # of this project
        meta = read_meta(folder)
        return {key: meta[key] for key in ("tokenizer", "chars", "vocab_size") if key in meta}
    return GPT2_META


def read_meta_pkl(path):
    """Return the meta.json that corresponds to a meta.pkl: a char tokenizer's."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            itos = PlainUnpickler(file).load()["itos"]
        chars = [itos[token_id] for token_id in range(len(itos))]
        "".join(chars)  # raises TypeError for bytes
    except OSError:
        raise
    except Exception as error:  # pickle raises many kinds
        message = f"{path} has no itos that gives a character for each token id from 0 on"
        message = f"{message} ({type(error).__name__}: {one_line(error)})"
        raise damaged(path, message, own_kind="a Python pickle") from error
    return check_meta({"tokenizer": "char", "chars": chars}, path)
