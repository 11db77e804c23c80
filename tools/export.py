"""Export a model to transformers' format.

    python -m tools.export --init_from=out/quickstart --out_dir=exported

`model` becomes a GPT2LMHeadModel, and so does `model_gqa`, with each KV head repeated for its group
of query heads. `model_rope` and `model_rope_gqa_swa` become a Starcoder2ForCausalLM. `model_swa`
becomes a GPTNeoForCausalLM, if it was trained with --bias=False. The directory also gets the files
of its tokenizer, for AutoTokenizer, and meta.json, which names it for this project, whose
--init_from=DIR reads the model back.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.export")

import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from tiktoken.load import read_file_cached

from common.errors import UserError, prefix_errors, run_program
from common.files import fsync, name_in_errors, write_json
from common.pretrained import load_model
from common.tokenizer import EOT, get_tokenizer
from common.transformers_format import to_gpt2, to_gpt_neo, to_starcoder2
from configurator import configure

FORMATS = {
    "model": to_gpt2,
    "model_gqa": to_gpt2,
    "model_rope": to_starcoder2,
    "model_rope_gqa_swa": to_starcoder2,
    "model_swa": to_gpt_neo,
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
META_FIELDS = ("tokenizer", "vocab_size", "chars")  # of an exported meta.json


@dataclass
class ExportConfig:
    init_from: str | None = None  # a run, one of its checkpoints, or what train.py takes
    out_dir: str | None = None  # the directory to make


def export(source, out_dir):
    """Write the model of `source`, anything that load_model takes, to a new directory.

    The directory appears only when it is complete. Raises UserError if it exists already or if
    transformers has no such model.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already: choose a new directory")
    model, meta = load_model(source)
    name = type(model).__module__
    if name not in FORMATS:
        raise UserError(
            f"{source} is a {name}, which is not among the models of transformers: only "
            f"{', '.join(FORMATS)} can be exported"
        )
    part = out_dir.with_name(out_dir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        with name_in_errors(part), prefix_errors(source):
            write_model(part, model, meta)
        for path in (*part.iterdir(), part):
            fsync(path)
        part.replace(out_dir)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_model(folder, model, meta):
    """Write all files of a model in transformers' format."""
    weights, theirs = FORMATS[type(model).__module__](without_padding(model, meta), model.config)
    eot = get_tokenizer(meta).eot_token
    theirs |= {"vocab_size": meta["vocab_size"], "dtype": "float32"}
    theirs |= {"bos_token_id": eot, "eos_token_id": eot}
    # save_file would make a file that only its owner can read; written here, its mode follows the
    # umask.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", theirs)
    write_json(folder / "generation_config.json", generation_config(model, eot))
    # Without the rest, such as the path of the text.
    write_json(folder / "meta.json", {key: meta[key] for key in META_FIELDS if key in meta})
    write_tokenizer(folder, meta, eot, model.config.block_size)


def generation_config(model, eot):
    """Return the generation_config.json: where transformers' generate and its pipeline stop.

    Without max_length, they would look for positions after the last one.
    """
    config = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    if "wpe" in model.transformer:
        config["max_length"] = model.config.block_size
    return config


def without_padding(model, meta):
    """Return the state dict without padding tokens."""
    weights = model.state_dict()
    wte = weights["transformer.wte.weight"]
    return weights | {"transformer.wte.weight": wte[: meta["vocab_size"]]}


def write_tokenizer(folder, meta, eot, block_size):
    """Write the files from which transformers' AutoTokenizer makes the model's tokenizer."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # decode must not change spaces before punctuation
    }
    if eot is not None:
        # CTranslate2 needs an unk_token, though none of the tokenizers makes one.
        tokenizer_config |= {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
    if meta["tokenizer"] == "byte":
        write_json(folder / "tokenizer.json", byte_tokenizer_json())
    elif meta["tokenizer"] == "char":
        write_json(folder / "tokenizer.json", char_tokenizer_json(meta["chars"]))
    else:
        tokenizer_config["tokenizer_class"] = "GPT2Tokenizer"
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
