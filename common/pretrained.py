"""Load weights into any model: GPT-2's by name, a model in transformers' format, or a run.

GPT-2 (gpt2, gpt2-medium, gpt2-large, gpt2-xl) is read from the Hugging Face cache, which other
programs share, and downloaded to it once. GPT-2, StarCoder2 and GPT-Neo are converted by
common/transformers_format.py. A variant can start from the weights of another model file: sliding
windows take them as they are, grouped-query attention averages the KV heads of each group, and
rotary positions replace wpe, which is dropped.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import checkpoint, hub, run_dir
from common.errors import UserError, explain_malformed, prefix_errors
from common.files import check_regular, damaged, read_json, read_text
from common.models import check_shapes, make_config, model_module, to_float32
from common.nanogpt import GELU, read_checkpoint
from common.tokenizer import EOT, VOCAB_SIZES, check_meta, read_meta
from common.transformers_format import FORMATS, check_fields, complete_fields

HUB = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
FOLDER = Path("data/pretrained")  # to which earlier versions of this project downloaded GPT-2
ATTENTION_MASK = re.compile(r"(^|\.)h\.\d+\.attn\.(attention\.)?(bias|masked_bias)$")
SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
# Fields of config.json with which transformers loads another model or other files.
UNSUPPORTED = ("per_layer_config", "quantization_config", "transformers_weights")
WPE = "transformer.wpe.weight"
# Files of tokenizers, the decisive one first, and patterns by which they are GPT-2's.
GPT2_WORD = r'"(Ġ|\\u0120)gazed"\s*:\s*50255\b'
TOKENIZER_FILES = dict.fromkeys(("tokenizer.json", "vocab.json", "vocab.txt"), GPT2_WORD)
TOKENIZER_FILES["tokenizer_config.json"] = r'(?s)\A(?!.*"tokenizer_class"\s*:\s*"(?!GPT2Tokenizer))'


@dataclasses.dataclass
class Source:
    """Weights to load, with what is needed to build their model."""

    model: str  # the model file that they were made for, without .py
    shape: dict  # fields of its GPTConfig
    weights: dict  # by our parameter names, float32
    meta: dict  # names the tokenizer, as in a dataset's meta.json
    note: str = ""  # what the user should know about the model


def load_model(source, name=None, options=None):
    """Return (model, meta): a model with the weights of `source`, and its tokenizer's meta.json.

    source    a GPT-2 name, a repository in the Hugging Face cache, a run, one of its checkpoints,
              a directory in transformers' format, or nanoGPT's ckpt.pt
    name      the model file to load into; None: the one that the weights were made for
    options   fields of its GPTConfig that the user asked for. dropout and what the source does not
              know are free; n_kv_head and block_size may shrink; a model without learned positions
              takes any block_size; all others must agree

    The model is float32, on the CPU and in eval mode. Its n_vocab is the number of ids that its
    tokenizer has, without padding, and its start_token the id that begins a document. Prints to
    stderr how the weights had to change. Raises UserError if they do not fit or are not finite.
    """
    options = options or {}
    loaded = _read_source(source)
    name = name or loaded.model
    module = model_module(name)
    config = {field.name: field.default for field in dataclasses.fields(module.GPTConfig)}
    config |= {field: value for field, value in loaded.shape.items() if field in config}
    config |= options
    # On the meta device, to skip an initialization that would be overwritten.
    with prefix_errors(source), torch.device("meta"):
        model = module.GPT(make_config(module, config))
    expected = model.state_dict()
    _check_options(source, options, loaded.shape, has_wpe=WPE in expected)
    changes = _convert(source, loaded, expected, model.config)
    if changes:
        print(
            f"{source} in {name}: {' and '.join(changes)}; the model needs further training",
            file=sys.stderr,
        )
    check_shapes(source, name, loaded.weights, expected)
    if loaded.note:
        print(loaded.note, file=sys.stderr)
    model.load_state_dict(loaded.weights, assign=True)
    # A meta.json can name a tokenizer with more ids than the weights have.
    vocab_size = min(loaded.meta["vocab_size"], model.config.vocab_size)
    chars = loaded.meta.get("chars")
    n_ids = VOCAB_SIZES.get(loaded.meta["tokenizer"]) or len(chars)
    model.n_vocab = min(vocab_size, n_ids)  # ids from here on are padding, which is not sampled
    has_eot = n_ids <= model.n_vocab and (not chars or EOT in chars)
    model.start_token = n_ids - 1 if has_eot else 0
    return model.requires_grad_(True).eval(), loaded.meta | {"vocab_size": vocab_size}


def _read_source(source):
    path = Path(source)
    if source in (*HUB, *HUB.values()) and path.exists():  # which transformers would read
        raise UserError(f"{source} is a released model and a path: write ./{source}, or rename it")
    for name, repository in HUB.items():
        if source in (name, repository):
            return _read_transformers(_fetch(name))
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".bin"):
            raise UserError(f"{path} is one of a model's files: give its folder, {path.parent}")
        return _read_nanogpt(path)
    if not path.is_dir():
        cached = _cached_snapshot(source)
        if cached is not None:
            return _read_transformers(cached)
        raise UserError(
            f"{source} is neither one of {', '.join(HUB)}, nor a directory with a run or a model, "
            "nor a model in the Hugging Face cache, nor a ckpt.pt of nanoGPT"
        )
    if _is_transformers(path):
        return _read_transformers(path)
    if os.path.lexists(path / "ckpt.pt") and not run_dir.list_checkpoints(path):
        return _read_nanogpt(path / "ckpt.pt")
    return run_dir.load_best(path, _read_checkpoint)


def _is_transformers(directory):
    """Return whether config.json is transformers'; a checkpoint of ours has one too."""
    path = directory / "config.json"
    return path.exists() and '"model_type"' in read_text(path, errors="replace")


# Fit weights to a model -----------------------------------------------------------------------


def _check_options(source, options, shape, has_wpe):
    """Raise UserError for an option that contradicts the weights."""
    free = {"dropout", "n_kv_head"}  # n_kv_head is checked by _convert
    if not has_wpe or options.get("block_size", 0) < shape["block_size"]:
        free.add("block_size")
    for option, value in options.items():
        if option not in free and value != shape.get(option, value):
            raise UserError(f"{source} has {option}={shape[option]}, not {value}")


def _convert(source, loaded, expected, config):
    """Change the loaded weights in place so that they fit; return a clause for each change."""
    weights, shape = loaded.weights, loaded.shape
    changes = []
    window, source_window = getattr(config, "window", None), shape.get("window")
    if _attended(window, config) != _attended(source_window, config):
        changes.append(
            f"a token attends to {window or 'all'} tokens instead of {source_window or 'all'}"
        )
    if WPE in expected and WPE not in weights:
        raise UserError(
            f"{source} has no learned positions (wpe), which this model needs: choose another "
            "--model"
        )
    if WPE in expected:
        weights[WPE] = weights[WPE][: config.block_size].clone()
    elif WPE in weights:
        del weights[WPE]
        changes.append("learned positions (wpe) are dropped")
    source_kv_heads = shape.get("n_kv_head", shape["n_head"])
    n_kv_head = getattr(config, "n_kv_head", config.n_head)
    if source_kv_heads % n_kv_head:
        raise UserError(
            f"{source} has {source_kv_heads} KV heads: n_kv_head={n_kv_head} must divide that"
        )
    group_size = source_kv_heads // n_kv_head
    if group_size > 1:
        for key in list(weights):
            if ".c_attn." in key:
                weights[key] = _average_kv_heads(weights[key], n_kv_head, group_size, config)
        changes.append(f"{n_kv_head} KV heads are the means of {group_size} each")
    return changes


def _attended(window, config):
    """Return how many tokens a query attends to at most."""
    return min(window or config.block_size, config.block_size)


def _average_kv_heads(c_attn, n_kv_head, group_size, config):
    """Average keys and values over groups of heads (Ainslie et al. 2023, section 2.1).

    c_attn   weight or bias of the projection to queries, keys and values, along dim 0
    """
    head_dim = config.n_embd // config.n_head
    q, kv = c_attn.tensor_split([config.n_embd])
    # In float64, in which the mean of equal heads, as of an exported model_gqa, is exact.
    heads = kv.double().unflatten(0, (2 * n_kv_head, group_size, head_dim))
    return torch.cat([q, heads.mean(dim=1).float().flatten(0, 1)])


# Read weights ---------------------------------------------------------------------------------


def _fetch(name):
    """Return the folder of a released GPT-2: in the Hugging Face cache, or downloaded to it."""
    folder = FOLDER / name
    files = ("model.safetensors", "model.safetensors.sha256")  # the second was written last
    if all((folder / file).exists() for file in files):
        return folder
    cached = _cached_snapshot(HUB[name])
    if cached is not None and any(cached.glob("model*.safetensors")):
        print(f"{name}: reading {cached}", file=sys.stderr)
        return cached
    hub.download(HUB[name], "config.json")  # first: a snapshot with weights is complete
    print(f"downloading {name}", file=sys.stderr)
    return hub.download(HUB[name], "model.safetensors").parent


def _cached_snapshot(repository):
    """Return the folder of a model's files in the Hugging Face cache; None if it has none."""
    config = hub.cached_file(repository, "config.json")
    return None if config is None else config.parent


def _read_transformers(folder):
    """Return the Source of a model in one of transformers' formats."""
    config = _read_config(folder)
    model_type = config.get("model_type", "gpt2")
    model_format = FORMATS[model_type]
    tensors = _read_tensors(folder, model_format.prefix, model_format.embedding)
    name, shape, weights = model_format.convert(tensors, config, folder)
    # StarCoder2's own tokenizer is none of ours. A broken link is not the absence of a file.
    if model_type == "starcoder2" or os.path.lexists(folder / "meta.json"):
        return Source(name, shape, weights, read_meta(folder))
    vocab_size = min(shape["vocab_size"], VOCAB_SIZES["gpt2"])
    meta = {"tokenizer": "gpt2", "vocab_size": vocab_size}
    return Source(name, shape, weights, meta, _doubt_tokenizer(folder, vocab_size))


def _doubt_tokenizer(folder, vocab_size):
    """Return a note if something in a model's folder speaks against GPT-2's tokenizer, or ""."""
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if vocab_size < VOCAB_SIZES["gpt2"]:
        reason = f"its vocab_size is {vocab_size}, not {VOCAB_SIZES['gpt2']}"
    elif paths and not re.search(TOKENIZER_FILES[paths[0].name], read_text(paths[0], "replace")):
        reason = f"{paths[0].name} is not that of GPT-2"
    else:
        return ""
    return (
        f"warning: {folder} has no meta.json: its tokenizer is taken to be GPT-2's, although "
        f"{reason}; with a wrong one, samples make no sense"
    )


def _read_config(folder):
    """Return config.json with transformers' defaults; {} if it is missing, as for a GPT-2.

    Raises UserError for a model that no model file computes.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    theirs = read_json(path)
    with explain_malformed(path):
        model_type = theirs.get("model_type")
        model_format = FORMATS.get(model_type)
    if model_format is None:
        raise UserError(
            f"{path} describes a model of type {model_type}, not one of {', '.join(FORMATS)}"
        )
    config = complete_fields(theirs, model_format, path)
    check_fields(folder, config, model_format.fixed | dict.fromkeys(UNSUPPORTED))
    return config


def _read_tensors(folder, prefix, embedding):
    """Return the weights of a model in float32, each name with the prefix.

    Raises UserError if the token embedding is missing or the head is another matrix.
    """
    tensors = {}
    for name, w in _read_safetensors(folder).items():
        key = name.removeprefix(prefix)
        if prefix + key in tensors:
            raise UserError(f"{folder} has both {key} and {prefix}{key}")
        tensors[prefix + key] = w.contiguous()
    head = tensors.pop(prefix + "lm_head.weight", None)
    # safetensors.torch.save_model keeps one of two tied weights: the first by name, the head.
    wte = tensors.setdefault(prefix + embedding, head)
    if wte is None:
        raise UserError(f"{folder} has no model*.safetensors with {embedding}")
    if head is not None and not torch.equal(head, wte):
        raise UserError(
            f"{folder} has an lm_head.weight other than {embedding}, but the models here tie them"
        )
    return tensors


def _read_safetensors(folder):
    """Return all weights of model.safetensors or its shards, in float32."""
    tensors = {}
    for path, indexed in _weight_files(folder).items():
        check_regular(path)
        if not path.exists():
            raise UserError(f"{path} is missing: get it again")
        try:
            stored = load_file(path)
        except SafetensorError as error:
            message = f"{path} is truncated or altered ({error}): remove it and get it again"
            raise damaged(path, message, own_kind="a safetensors file") from error
        stray = stored.keys() & tensors.keys() if indexed is None else stored.keys() - indexed
        if stray:
            raise UserError(
                f"{path} has {min(stray)}, which belongs to another file: get all files again"
            )
        for key, w in stored.items():
            if not ATTENTION_MASK.search(key):
                tensors[key] = to_float32(path, key, w)
    return tensors


def _weight_files(folder):
    """Return the files to read, {path: names of the tensors in it, or None without an index}.

    As in transformers, that is model.safetensors, or else the files that the index names. Without
    these, a complete set of shards is read, too.
    """
    for shard in folder.glob("shard-*-model-*.safetensors"):
        raise UserError(
            f"{shard} is part of a distributed checkpoint, which transformers prefers to other "
            "files, and which is not read here: remove it, or save the model in the usual way"
        )
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(path):  # a broken link is not the absence of a file
        return {path: None}
    if os.path.lexists(index):
        return _read_index(index)
    shards = {path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)}
    if not shards:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:12])
        advice = "get that file, or a version of the model that has it"
        if any(folder.glob("pytorch_model*.bin")):
            advice = 'use AutoModelForCausalLM.from_pretrained("OLD").save_pretrained("NEW")'
        raise UserError(f"{folder} has no model.safetensors, only {names}: {advice}")
    total = max(SHARD.fullmatch(name)[1] for name in shards)
    complete = {f"model-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)}
    for name in sorted(shards - complete):
        raise UserError(f"{folder / name} is not one of the {total} files of a save: remove it")
    return {folder / name: None for name in sorted(complete)}


def _read_index(index):
    """Return {path: names of its tensors} of the files that an index names."""
    files = {}
    with explain_malformed(index):
        for key, name in read_json(index)["weight_map"].items():
            if name != Path(name).name:
                raise ValueError(f"{name} is a path, not the name of a file in this folder")
            files.setdefault(index.with_name(name), set()).add(key)
    return files


def _read_nanogpt(path):
    """Return the Source of a checkpoint of nanoGPT."""
    return Source("model", *read_checkpoint(path), note=f"{path}: {GELU}")


def _read_checkpoint(path, record):
    """Return the Source of a checkpoint of ours."""
    name, shape = record["options"]["model"], record["model_config"]
    meta = check_meta(record["meta"], path / "config.json")
    with prefix_errors(path / "config.json"), torch.device("meta"):
        module = model_module(name)
        model = module.GPT(make_config(module, shape))
    model.to_empty(device="cpu")
    checkpoint.load_checkpoint(path, model)
    weights = {key: to_float32(path, key, w) for key, w in model.state_dict().items()}
    return Source(name, shape, weights, meta)
