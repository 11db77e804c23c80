"""Exchange models and datasets with nanoGPT: its ckpt.pt and its meta.pkl.

nanoGPT's model has the parameters of model.py, by the same names and in the same orientation, and
lm_head.weight, which is wte. It computes GELU exactly, and model.py in its tanh approximation.

Both files are pickles, which can hold code. They are read so that only tensors, containers, strings
and numbers can come out of them.
"""

import io
import os
import pickle
import zipfile

import torch

from common.errors import DamagedError, UserError
from common.files import check_regular
from common.tokenizer import EOT, VOCAB_SIZES, check_meta, read_meta

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
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: it holds no dict")
    model_args, stored = checkpoint.get("model_args"), checkpoint.get("model")
    if not isinstance(model_args, dict) or not isinstance(stored, dict):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: it lacks model_args or model")
    shape = OLD_SHAPE | model_args
    is_number = [isinstance(value, (int, float)) for value in shape.values()]
    if shape.keys() != set(SHAPE) or not all(is_number):
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT's model: model_args has "
            f"{', '.join(map(str, shape))}, and must have the numbers {', '.join(SHAPE)}"
        )
    return shape, _read_weights(path, stored), _read_tokenizer(path, shape["vocab_size"])


def _load(path):
    """Return what is in a file of torch.save: tensors, containers, strings and numbers."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            is_damaged = size > os.path.getsize(path) or archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile raises many kinds
        raise _damaged(path) from error
    if is_damaged:
        raise _damaged(path)
    try:
        # Mapped, because the optimizer state, two thirds of the file, is not needed.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds other objects than tensors, strings and numbers, which can be code, and "
            "is not loaded: save it again without them"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds
        raise _damaged(path) from error


def _damaged(path):
    return DamagedError(f"{path} is truncated or damaged, or not a file that torch.save wrote")


def _read_weights(path, stored):
    """Return the weights by our names, in float32."""
    weights, size = {}, 0
    for key, value in stored.items():
        key = str(key).removeprefix("_orig_mod.")  # of a compiled model
        if key.endswith(".attn.bias"):  # the attention mask, with old versions of torch
            continue
        is_dense = torch.is_tensor(value) and value.is_cpu and value.layout == torch.strided
        if not is_dense or not value.is_floating_point():
            raise UserError(f"{path}: {key} is not a tensor of floating-point numbers")
        weights[key] = value.detach()
        size += value.nbytes
    if size > 2 * os.path.getsize(path):  # before they are copied; wte is there twice
        raise DamagedError(f"{path} has {os.path.getsize(path)} bytes, but weights of {size}")
    for key, value in weights.items():
        weights[key] = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    head, wte = weights.pop("lm_head.weight", None), weights.get("transformer.wte.weight")
    if head is None or wte is None or not torch.equal(head, wte):
        raise UserError(
            f"{path} has not the same lm_head.weight and transformer.wte.weight, which nanoGPT and "
            "model.py tie"
        )
    return weights


def _read_tokenizer(path, vocab_size):
    """Return the meta.json of a checkpoint's tokenizer; files beside it come first."""
    folder = path.parent
    if os.path.lexists(folder / "meta.json"):  # a broken link is not the absence of a file
        return read_meta(folder)
    if os.path.lexists(folder / "meta.pkl"):
        return read_meta_pkl(folder / "meta.pkl")
    if VOCAB_SIZES["gpt2"] <= vocab_size <= PADDED_VOCAB_SIZE:
        return GPT2_META
    raise UserError(
        f"{path} has vocab_size={vocab_size}, which is not GPT-2's: copy the meta.pkl of "
        f"its dataset to {folder}, or name the tokenizer in a meta.json there"
    )


def write_checkpoint(path, weights, config, dataset):
    """Write a ckpt.pt, from which nanoGPT can sample and train.

    weights   a state dict of model.py
    config    its GPTConfig, or one that has the same fields
    dataset   nanoGPT looks for the tokenizer in data/DATASET/meta.pkl
    """
    matrices = [w for w in weights.values() if w.dim() >= 2]
    vectors = [w for w in weights.values() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    checkpoint = {
        "model": weights | {"lm_head.weight": weights["transformer.wte.weight"]},
        "model_args": {name: getattr(config, name) for name in SHAPE},
        "optimizer": torch.optim.AdamW(groups, betas=(0.9, 0.95)).state_dict(),  # no moments yet
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {"dataset": dataset},
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.write_bytes(buffer.getbuffer())


# Tokenizers -----------------------------------------------------------------------------------


class PlainUnpickler(pickle._Unpickler):
    """Loads containers, strings and numbers, and nothing that has to be imported.

    It is the one that is written in Python: the one in C reserves as much memory as a file asks
    for.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it imports {module}.{name}, which can be code")


def read_dataset_meta(folder):
    """Return the meta.json for bins of nanoGPT: they are GPT-2's tokens if there is no meta.pkl."""
    path = folder / "meta.pkl"
    return read_meta_pkl(path) if os.path.lexists(path) else GPT2_META


def read_meta_pkl(path):
    """Return the meta.json that corresponds to a meta.pkl: a char tokenizer's."""
    check_regular(path)
    try:
        itos = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        chars = [itos[token_id] for token_id in range(len(itos))]
        "".join(chars).encode()
    except OSError:
        raise
    except Exception as error:  # of anything that is not as nanoGPT writes it
        reason = " ".join(str(error).split())
        raise DamagedError(
            f"{path} has no itos that gives a character for each token id from 0 on "
            f"({type(error).__name__}: {reason})"
        ) from error
    return check_meta({"tokenizer": "char", "chars": chars}, path)


def write_meta_pkl(path, meta):
    """Write the meta.pkl of a tokenizer; a byte is the character with its number."""
    chars = meta.get("chars", [*map(chr, range(256)), EOT])
    itos = dict(enumerate(chars))
    stoi = {char: token_id for token_id, char in itos.items()}
    path.write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": stoi}))
