"""Export a model to transformers' format.

    python -m tools.export --init_from=out/quickstart --out_dir=exported

`model` becomes a GPT2LMHeadModel, and so does `model_gqa`, with each KV head repeated for its group
of query heads. `model_rope` and `model_rope_gqa_swa` become a Starcoder2ForCausalLM.
The directory also gets the files of its tokenizer, for AutoTokenizer, and meta.json, which names it
for this project.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.export")

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from tiktoken.load import read_file_cached

from common.errors import UserError, run_program
from common.files import fsync, lock, name_in_errors, write_json
from common.pretrained import CONV1D, FIXED, load_model
from common.tokenizer import EOT, get_tokenizer
from configurator import configure

# Parts of our parameter names, and StarCoder2's. Its q_proj, k_proj and v_proj are rows of c_attn.
STARCODER2_NAMES = {
    "transformer.": "model.",
    ".wte.": ".embed_tokens.",
    ".ln_f.": ".norm.",
    ".h.": ".layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.": ".self_attn.",
    "attn.c_proj": "attn.o_proj",
}
# The files of GPT-2's tokenizer, as OpenAI published them and as tiktoken caches them.
GPT2_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {  # name in transformers: (name there, SHA-256)
    "merges.txt": (
        "vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "vocab.json": (
        "encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
}
EXPORTED_META = ("tokenizer", "vocab_size", "chars")  # fields of meta.json


@dataclass
class ExportConfig:
    init_from: str | None = (
        None  # a run, one of its checkpoints, or what train.py's init_from takes
    )
    out_dir: str | None = None  # the directory to make


def gpt2_format(weights, config):
    """Return the weights and the config.json of transformers' GPT2LMHeadModel."""
    theirs = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # for llama.cpp's converter
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }
    weights = repeat_kv_heads(weights, config)
    weights = {
        key: w.t().contiguous() if CONV1D.fullmatch(key) else w for key, w in weights.items()
    }
    return weights, FIXED | theirs


def repeat_kv_heads(weights, config):
    """Return the weights of the model with one KV head per query head that computes the same."""
    n_kv_head = getattr(config, "n_kv_head", config.n_head)
    if n_kv_head == config.n_head:
        return weights
    head_dim = config.n_embd // config.n_head
    repeated = dict(weights)
    for key, w in weights.items():
        if ".c_attn." in key:
            q, kv = w.tensor_split([config.n_embd])
            kv_heads = kv.unflatten(0, (2 * n_kv_head, head_dim))  # those of k, then those of v
            kv_heads = kv_heads.repeat_interleave(config.n_head // n_kv_head, dim=0)
            repeated[key] = torch.cat([q, kv_heads.flatten(0, 1)])
    return repeated


def starcoder2_format(weights, config):
    """Return the weights and the config.json of transformers' Starcoder2ForCausalLM."""
    n_kv_head = getattr(config, "n_kv_head", config.n_head)
    head_dim = config.n_embd // config.n_head
    theirs = {
        "model_type": "starcoder2",
        "architectures": ["Starcoder2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": n_kv_head,
        "sliding_window": getattr(config, "window", None),
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.block_size,
        "residual_dropout": config.dropout,
        "embedding_dropout": config.dropout,
        "attention_dropout": config.dropout,
    }
    renamed = {}
    for key, w in weights.items():
        for our_part, their_part in STARCODER2_NAMES.items():
            key = key.replace(our_part, their_part)
        if ".c_attn." not in key:
            renamed[key] = w
            continue
        q, k, v = w.split([config.n_embd, n_kv_head * head_dim, n_kv_head * head_dim])
        renamed[key.replace("c_attn", "q_proj")] = q.contiguous()
        renamed[key.replace("c_attn", "k_proj")] = k.contiguous()
        renamed[key.replace("c_attn", "v_proj")] = v.contiguous()
    return renamed, theirs


FORMATS = {
    "model": gpt2_format,
    "model_gqa": gpt2_format,
    "model_rope": starcoder2_format,
    "model_rope_gqa_swa": starcoder2_format,
}
# The class of transformers that comes closest, and why it is not written here.
NO_FORMAT = {
    "model_swa": "GPT-2 with windows everywhere is not among its models (GPT-Neo lacks biases)",
}


def export(source, out_dir):
    """Write the model of `source`, anything that load_model takes, to a new directory.

    The directory appears only when it is complete. Raises UserError if it exists already or if
    transformers has no such model.
    """
    out_dir = Path(out_dir)

    def refuse():
        raise UserError(f"another process exports to {out_dir}: choose another directory")

    with lock(out_dir.with_name(out_dir.name + ".lock"), on_busy=refuse):
        if out_dir.exists():
            raise UserError(f"{out_dir} exists already: choose a new directory")
        model, meta = load_model(source)
        name = type(model).__module__
        if name not in FORMATS:
            reason = NO_FORMAT.get(name, "it is not among its models")
            raise UserError(
                f"{source} is a {name}, which cannot be exported to transformers: {reason}; "
                f"{', '.join(FORMATS)} can"
            )
        part = out_dir.with_name(out_dir.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir()
        try:
            with name_in_errors(part):
                write_model(part, model, meta)
            for path in (*part.iterdir(), part):
                fsync(path)
            part.replace(out_dir)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def write_model(folder, model, meta):
    """Write all files of a model in transformers' format."""
    weights, theirs = FORMATS[type(model).__module__](exported_weights(model, meta), model.config)
    eot = get_tokenizer(meta).eot_token
    theirs |= {"vocab_size": meta["vocab_size"], "dtype": "float32"}
    theirs |= {"bos_token_id": eot, "eos_token_id": eot}
    # save_file would make a file that only its owner can read; written here, its mode follows the
    # umask.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", theirs)
    write_json(folder / "generation_config.json", generation_config(model, eot))
    # Not the rest, such as the path of the text.
    write_json(folder / "meta.json", {key: meta[key] for key in EXPORTED_META if key in meta})
    write_tokenizer(folder, meta, eot, model.config.block_size)


def generation_config(model, eot):
    """Return the generation_config.json: where transformers' generate and its pipeline stop.

    Without max_length, they would look for positions after the last one.
    """
    config = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    if "wpe" in model.transformer:
        config["max_length"] = model.config.block_size
    return config


def exported_weights(model, meta):
    """Return the state dict without padding tokens, and with zero biases for bias=False."""
    weights = model.state_dict()
    wte = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = wte[: meta["vocab_size"]]
    for key in list(weights):
        is_embedding = key.startswith("transformer.w")
        if key.endswith("weight") and not is_embedding:
            bias = key.removesuffix("weight") + "bias"
            weights.setdefault(bias, torch.zeros(len(weights[key])))
    return weights


def write_tokenizer(folder, meta, eot, block_size):
    """Write the files from which transformers' AutoTokenizer makes the model's tokenizer."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # decode must not change spaces before punctuation
    }
    if eot is not None:
        tokenizer_config |= {"bos_token": EOT, "eos_token": EOT}
    if meta["tokenizer"] == "byte":
        write_json(folder / "tokenizer.json", byte_tokenizer_json())
    elif meta["tokenizer"] == "char":
        write_json(folder / "tokenizer.json", char_tokenizer_json(meta["chars"]))
    else:
        tokenizer_config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": EOT}
        for name, (original, sha256) in GPT2_FILES.items():
            (folder / name).write_bytes(read_file_cached(GPT2_BPE + original, sha256))
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def byte_tokenizer_json():
    """Return the tokenizer.json of the byte tokenizer: byte-level BPE without merges."""
    # Byte-level BPE writes each byte as a printable character: most as the one with this code
    # point, and those that are not printable as the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [added_token(256)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def char_tokenizer_json(chars):
    """Return the tokenizer.json of a char tokenizer; it refuses characters that it does not know.

    chars   as in meta.json
    """
    return {
        "version": "1.0",
        "added_tokens": [added_token(i) for i, char in enumerate(chars) if char == EOT],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {char: i for i, char in enumerate(chars)},
            "unk_token": "an unknown character",  # not in vocab: it is an error
        },
    }


def added_token(token_id):
    """Return the entry of <|endoftext|> in a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": EOT, "special": True} | flags


def main(argv):
    config = configure(ExportConfig, argv, __doc__)
    if not config.init_from or not config.out_dir:
        raise UserError(
            "name a model and a new directory: python -m tools.export --init_from=RUN --out_dir=DIR"
        )
    export(config.init_from, config.out_dir)
    load = f'transformers.AutoModelForCausalLM.from_pretrained("{config.out_dir}")'
    print(f"{config.out_dir}: {load}")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
