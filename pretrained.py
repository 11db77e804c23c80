"""Weights from elsewhere in, trained models out.

    python pretrained.py --export=out/run --to=DIR      what transformers loads

In: GPT-2 by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl: downloaded once from the Hugging Face hub, as safetensors), a
directory in transformers' format, or a run of ours. Names are the same everywhere but for the prefix "transformer.";
GPT-2 stores its Linear weights as Conv1D, (in, out), and so they are transposed. A variant can begin with them too:
sliding windows take them as they are, grouped queries average keys and values, rotary positions have no use for wpe.

Out: model as GPT2LMHeadModel, model_rope and model_rope_gqa_swa as Starcoder2ForCausalLM.
"""

import contextlib
import dataclasses
import importlib
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiktoken.load import read_file_cached

import checkpoint
from configurator import UserError, configure, program
from download import download, file_sha256, hub_url
from tokenizer import EOT, VOCAB_SIZES, get_tokenizer, read_meta, write_json

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
FOLDER = Path("data/pretrained")
HEAD_SIZE = 64  # of all released GPT-2s, where there is no config.json to tell n_head
CONV1D = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
NOT_WEIGHTS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")  # masks; the head is wte
# What a GPT-2 config.json may say otherwise, and model.py then could not compute.
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
FIXED |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
# Parts of our names, and StarCoder2's. Its q_proj, k_proj and v_proj are the rows of our c_attn.
STARCODER2 = {"transformer.": "model.", ".wte.": ".embed_tokens.", ".ln_f.": ".norm.", ".h.": ".layers."}
STARCODER2 |= {".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm.", ".attn.": ".self_attn."}
STARCODER2 |= {"attn.c_proj": "attn.o_proj"}
# The files of GPT-2's tokenizer, as OpenAI published them and as tiktoken caches them: address, SHA-256.
GPT2_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "merges.txt": ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "vocab.json": ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}


def model_module(name):
    """The model file `name`.py, as a module; UserError where there is none."""
    there = sorted(path.stem for path in Path(__file__).parent.glob("model*.py"))
    if name not in there:
        raise UserError(f"no model {name}: there are {', '.join(there)}")
    return importlib.import_module(name)


def models_with(option):
    """For an option that the chosen model does not have: the model files that do, as a sentence, or nothing."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("model*.py"))
    having = [n for n in names if option in {field.name for field in dataclasses.fields(model_module(n).GPTConfig)}]
    return f"it is an option of {', '.join(having)} (--model)" if having else ""


def load_model(source, name=None, options=None):
    """A model with the weights of `source`: a GPT-2 name, a run, one of its checkpoints, or transformers' format.

    name      the model file to load into, by parameter names; None: the run's own, `model` for GPT-2
    options   fields of its GPTConfig that were asked for: dropout and what the source does not know are free, n_kv_head
              and block_size may shrink, rotary positions take any block_size, the rest must agree

    Returns the model (CPU, float32) and the meta.json that names its tokenizer. Says on stderr which weights could not
    be taken as they are. UserError where they do not fit at all.
    """
    directory = _fetch(source) if source in HUB else Path(source)
    if not directory.is_dir():
        raise UserError(f"{source} is neither one of {', '.join(HUB)} nor a directory with a run or a model")
    is_run = source not in HUB and not _says_model_type(directory / "config.json")
    own_name, shape, weights, meta = _read_run(directory) if is_run else _read_transformers(directory)
    name, options = name or own_name, options or {}
    module = model_module(name)
    fields = {field.name: field.default for field in dataclasses.fields(module.GPTConfig)}
    config = fields | {field: value for field, value in shape.items() if field in fields} | options
    with torch.device("meta"):  # no time for an initialization that is overwritten
        try:
            model = module.GPT(module.GPTConfig(**config))
        except (TypeError, ValueError) as error:
            raise UserError(f"{source} has a configuration that {name}.py refuses: {error}") from error
    expected = model.state_dict()
    free = {"dropout", "n_kv_head"}
    if "transformer.wpe.weight" not in expected or options.get("block_size", 0) < shape["block_size"]:
        free.add("block_size")
    for option, value in options.items():
        if option not in free and value != shape.get(option, value):
            raise UserError(f"{source} has {option}={shape[option]}, not {value}")
    changed = _fit(source, weights, expected, model.config, shape)
    if changed:
        print(f"{source} in {name}: {' and '.join(changed)}; the model must be trained on", file=sys.stderr)
    for key in sorted(expected.keys() | weights.keys()):
        ours, theirs = (tuple(d[key].shape) if key in d else "nothing" for d in (expected, weights))
        if ours != theirs:
            raise UserError(f"{source}: {key} is {theirs} there, {ours} in {name}.py")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True), meta


def _fit(source, weights, expected, config, shape):
    """Change weights of a model of this shape in place, so that they fit those expected, where that can be; returns a
    clause for each change in what the model computes."""
    changed = []
    wpe, n_kv_head = "transformer.wpe.weight", getattr(config, "n_kv_head", config.n_head)
    kv_heads = shape.get("n_kv_head", shape["n_head"])
    window, before = getattr(config, "window", None), shape.get("window")
    if window != before and min(window or config.block_size, before or config.block_size) < config.block_size:
        changed.append(f"a token sees {window or 'all'} tokens, not {before or 'all'}")
    if wpe in expected and wpe not in weights:
        raise UserError(f"{source} has rotary positions, the model to load it into learned ones: --model names another")
    if kv_heads % n_kv_head:
        raise UserError(f"{source} has {kv_heads} heads of keys and values: {n_kv_head} cannot be made of them")
    if wpe in weights and wpe in expected:
        weights[wpe] = weights[wpe][: config.block_size].clone()
    elif weights.pop(wpe, None) is not None:
        changed.append("learned positions (wpe) are dropped")
    if n_kv_head < kv_heads:  # means of each group (Ainslie et al. 2023, section 2.1)
        group, head_dim = kv_heads // n_kv_head, config.n_embd // config.n_head
        for key in [key for key in weights if ".c_attn." in key]:
            q, kv = weights[key].tensor_split([config.n_embd])
            kv = kv.unflatten(0, (2 * n_kv_head, group, head_dim)).mean(dim=1).flatten(0, 1)
            weights[key] = torch.cat([q, kv])
        changed.append(f"{n_kv_head} heads of keys and values are the means of {group} each")
    return changed


def _says_model_type(path):
    """Whether a config.json is transformers'; a checkpoint of ours has one too."""
    return path.exists() and '"model_type"' in path.read_text(encoding="utf-8", errors="replace")


def _fetch(name):
    """The folder of a released GPT-2, downloaded once; its weights are checked against the hash of that download."""
    folder = FOLDER / name
    weights, sums = folder / "model.safetensors", folder / "model.safetensors.sha256"
    if not (weights.exists() and sums.exists()):
        print(f"downloading {name} to {folder}", file=sys.stderr)
        download(hub_url(f"{HUB[name]}/resolve/main/model.safetensors"), weights)
        with contextlib.suppress(UserError):  # a mirror of the weights alone will do: see HEAD_SIZE
            download(hub_url(f"{HUB[name]}/resolve/main/config.json"), folder / "config.json")
        _read_transformers(folder)  # before its hash makes it trusted
        sums.write_text(f"{file_sha256(weights)}  model.safetensors\n")
    elif file_sha256(weights) != sums.read_text().split()[0]:
        raise UserError(f"{weights} is not what was downloaded: remove {folder}, and it is downloaded again")
    return folder


def _read_transformers(folder):
    """(model file, shape, weights by our names, meta) of a GPT-2 in transformers' format."""
    try:
        path = folder / "config.json"
        about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model_type": "gpt2"}
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("model_type") != "gpt2":
        kind = about.get("model_type") if isinstance(about, dict) else about
        raise UserError(f"{folder}/config.json is of a model of type {kind}, not gpt2")
    for key, value in FIXED.items():
        if about.get(key, value) != value:
            raise UserError(f"{folder}/config.json has {key}={about[key]}, but model.py computes {value}")
    raw, whole = {}, folder / "model.safetensors"
    try:
        for path in [whole] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors")):
            raw |= load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or altered ({error}): remove it and get it again") from error
    raw = {key.removeprefix("transformer."): value for key, value in raw.items()}
    weights = {
        f"transformer.{key}": (value.t() if CONV1D.fullmatch(key) else value).contiguous()
        for key, value in raw.items()
        if not NOT_WEIGHTS.fullmatch(key)
    }
    if "wte.weight" not in raw or "wpe.weight" not in raw:
        raise UserError(f"{folder} has no model*.safetensors with wte.weight and wpe.weight")
    if not all(value.is_floating_point() for value in weights.values()):
        raise UserError(f"{folder} has quantized weights: take the model in float32, bfloat16 or float16")
    if not torch.equal(raw.get("lm_head.weight", raw["wte.weight"]), raw["wte.weight"]):
        raise UserError(f"{folder} has an lm_head.weight other than wte.weight, but model.py ties them")
    weights = {key: value.float() for key, value in weights.items()}
    (vocab_size, n_embd), block_size = raw["wte.weight"].shape, len(raw["wpe.weight"])
    shape = {"block_size": block_size, "vocab_size": vocab_size, "n_embd": n_embd, "bias": True, "dropout": 0.0}
    shape["n_layer"] = 1 + max(int(key.split(".")[1]) for key in raw if key.startswith("h."))
    shape["n_head"] = about.get("n_head") or n_embd // HEAD_SIZE
    there = shape | {"n_positions": block_size, "n_inner": 4 * n_embd}
    for key in ("n_layer", "n_embd", "vocab_size", "n_positions", "n_inner"):
        if about.get(key) not in (None, there[key]):
            raise UserError(f"{folder}/config.json has {key}={about[key]}, the weights beside it {there[key]}")
    if (folder / "meta.json").exists():
        return "model", shape, weights, read_meta(folder)
    return "model", shape, weights, {"tokenizer": "gpt2", "vocab_size": min(vocab_size, VOCAB_SIZES["gpt2"])}


def _read_run(directory):
    """(model file, shape, weights, meta) of a run's checkpoint."""
    path = checkpoint.find(directory)
    about = checkpoint.read_config(path)
    name, shape = about["options"]["model"], about["model_config"]
    module = model_module(name)
    with torch.device("meta"):
        model = module.GPT(module.GPTConfig(**shape))
    model.to_empty(device="cpu")
    checkpoint.load(path, model)
    return name, shape, model.state_dict(), about["meta"]


def _as_gpt2(weights, config):
    """Weights and config.json of transformers' GPT2LMHeadModel."""
    about = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | FIXED
    about |= {key: getattr(config, key) for key in ("n_embd", "n_layer", "n_head")}
    about |= {key: config.dropout for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    about["n_positions"] = config.block_size
    return {key: w.t().contiguous() if CONV1D.fullmatch(key) else w for key, w in weights.items()}, about


def _as_starcoder2(weights, config):
    """Weights and config.json of transformers' Starcoder2ForCausalLM."""
    n_kv_head = getattr(config, "n_kv_head", config.n_head)
    about = {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]}
    about |= {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True}
    about |= {"hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd}
    about |= {"num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head}
    about |= {"num_key_value_heads": n_kv_head, "sliding_window": getattr(config, "window", None)}
    about |= {"rope_theta": config.rope_theta, "max_position_embeddings": config.block_size}
    about |= {key: config.dropout for key in ("residual_dropout", "embedding_dropout", "attention_dropout")}
    kv_rows = n_kv_head * config.n_embd // config.n_head
    theirs = {}
    for key, w in weights.items():
        for our_part, their_part in STARCODER2.items():
            key = key.replace(our_part, their_part)
        parts = zip("qkv", w.split([config.n_embd, kv_rows, kv_rows]), strict=True) if ".c_attn." in key else ()
        theirs |= {key.replace("c_attn", f"{part}_proj"): rows.contiguous() for part, rows in parts} or {key: w}
    return theirs, about


NO_EXPORT = {"model_gqa": "no GPT-2 with grouped-query attention", "model_swa": "no GPT-2 with a sliding window"}
EXPORTS = {"model": _as_gpt2, "model_rope": _as_starcoder2, "model_rope_gqa_swa": _as_starcoder2}


def export(source, to):
    """Write the model of `source` to the directory `to`, in transformers' format, with its tokenizer."""
    model, meta = load_model(source)
    name, config = type(model).__module__, model.config
    if name not in EXPORTS:
        reason = NO_EXPORT.get(name, "no such model")
        raise UserError(f"{source} is a {name}, and transformers has {reason}; {', '.join(EXPORTS)} can be exported")
    if Path(to).exists():
        raise UserError(f"{to} exists already: name a new directory")
    weights = model.state_dict()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: meta["vocab_size"]]  # padding goes
    for key in [key for key in weights if key.endswith("weight") and not key.startswith("transformer.w")]:
        weights.setdefault(key.removesuffix("weight") + "bias", torch.zeros(len(weights[key])))  # for bias=False
    weights, about = EXPORTS[name](weights, config)
    about |= {"vocab_size": meta["vocab_size"], "dtype": "float32"}
    eot = get_tokenizer(meta).eot_token
    about |= {"bos_token_id": eot, "eos_token_id": eot}
    files = {"config.json": about, "meta.json": meta}
    if meta["tokenizer"] == "gpt2":
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
        of_tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size} | special
        files["tokenizer_config.json"] = of_tokenizer
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=Path(to).name + ".part", dir=Path(to).parent))
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    for file, value in files.items():
        write_json(part / file, value)
    if meta["tokenizer"] == "gpt2":
        for file, (original, sha256) in GPT2_FILES.items():
            (part / file).write_bytes(read_file_cached(GPT2_BPE + original, sha256))
    part.chmod(0o755)  # a temporary directory is its owner's alone
    part.replace(to)


@dataclass
class ExportConfig:
    export: str | None = None  # a run, one of its checkpoints, or any other model that --init_from takes
    to: str | None = None  # the directory to make


@program
def main(argv):
    config = configure(ExportConfig, argv, __doc__)
    if not config.export or not config.to:
        raise UserError("python pretrained.py --export=RUN --to=DIR")
    export(config.export, config.to)
    print(f'{config.to}: transformers.AutoModelForCausalLM.from_pretrained("{config.to}")')


if __name__ == "__main__":
    main(sys.argv[1:])
