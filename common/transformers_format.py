"""Convert models to transformers' formats and back; both directions of a format stand together.

    GPT-2        model, and model_gqa with its KV heads repeated
    StarCoder2   model_rope, model_rope_gqa_swa
    GPT-Neo      model_swa, if it has no biases for queries, keys and values

`to_...(weights, config)` takes our state dict and GPTConfig; it returns the tensors and config.json
of transformers. `from_...(tensors, theirs, folder)` takes these two; it returns the name of our
model file, the fields of its GPTConfig and the state dict. The folder is named in errors, which are
UserError. Weights are float32 in both directions and keep their bits; see GPT-Neo for an exception.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.errors import UserError, explain_malformed, prefix_errors
from common.models import check_shapes, make_config, model_module

# Fields of config.json that need no default here, and that must not be null in transformers.
NEVER_NULL = (
    *("attention_layers", "rope_theta", "use_cache", "initializer_range", "classifier_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "resid_dropout", "embed_dropout"),
    *("attention_dropout", "residual_dropout", "embedding_dropout", "summary_first_dropout"),
    *("summary_type", "summary_use_proj", "summary_proj_to_labels", "is_causal"),
)

# What formats have in common ------------------------------------------------------------------


def with_biases(weights):
    """Return the weights with a bias of zeros wherever a bias is missing, as with bias=False."""
    biases = {}
    for key, w in weights.items():
        is_embedding = key.startswith("transformer.w")
        if key.endswith("weight") and not is_embedding:
            biases[key.removesuffix("weight") + "bias"] = w.new_zeros(len(w))
    return biases | weights


def without_zero_biases(weights):
    """Return the weights without biases if all of these are zero, as those of bias=False are."""
    biases = [key for key in weights if key.endswith("bias")]
    if any(weights[key].any() for key in biases):
        return weights
    return {key: w for key, w in weights.items() if key not in biases}


def rename(weights, names):
    """Replace parts of the keys, one part after the other."""
    renamed = {}
    for key, w in weights.items():
        for part, replacement in names.items():
            key = key.replace(part, replacement)
        renamed[key] = w
    return renamed


def inverse(names):
    """Return the names with which rename undoes rename(weights, names)."""
    return {replacement: part for part, replacement in reversed(names.items())}


def split_qkv(weights, config):
    """Replace c_attn by q_proj, k_proj and v_proj, which are rows of it."""
    n_kv_head = getattr(config, "n_kv_head", config.n_head)
    kv_rows = config.n_embd // config.n_head * n_kv_head
    split = {}
    for key, w in weights.items():
        if ".c_attn." not in key:
            split[key] = w
            continue
        q, k, v = w.split([config.n_embd, kv_rows, kv_rows])
        split[key.replace("c_attn", "q_proj")] = q.contiguous()
        split[key.replace("c_attn", "k_proj")] = k.contiguous()
        split[key.replace("c_attn", "v_proj")] = v.contiguous()
    return split


def join_qkv(weights):
    """Undo split_qkv."""
    joined = {}
    for key, w in weights.items():
        if ".q_proj." in key:
            qkv = [weights[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            joined[key.replace("q_proj", "c_attn")] = torch.cat(qkv)
        elif ".k_proj." not in key and ".v_proj." not in key:
            joined[key] = w
    return joined


def expected_tensors(to_theirs, name, shape, folder):
    """Return what our model of this shape has in a format, on the meta device.

    Raises UserError for a shape that no model has.
    """
    # Without biases: to_theirs adds those that the format has.
    with prefix_errors(folder / "config.json"), torch.device("meta"):
        module = model_module(name)
        model = module.GPT(make_config(module, shape | {"bias": False}))
        tensors, _ = to_theirs(model.state_dict(), model.config)
    return tensors


def check_fields(folder, theirs, supported):
    """Raise UserError if a field of config.json has another value than the supported one."""
    for key, value in supported.items():
        if theirs.get(key, value) != value:
            raise UserError(
                f"{folder}/config.json has {key}={theirs[key]} (given, or transformers' default), "
                f"but only {value} is supported for these weights"
            )


def complete_fields(theirs, model_format, path):
    """Return config.json with transformers' defaults, and each field under its first name.

    Raises UserError for a field of a type that transformers refuses, such as null.
    """
    defaults = model_format.defaults | model_format.fixed
    fields = dict(defaults)
    # Aliases last (False sorts before True), because they take precedence.
    for key in sorted(theirs, key=lambda key: key in model_format.aliases):
        field, value = model_format.aliases.get(key, key), theirs[key]
        has_other_type = type(value) is not type(defaults.get(field, value))
        if has_other_type or (value is None and key in NEVER_NULL):
            raise UserError(f"{path} has {key}={value!r}, which is not a valid value: correct it")
        if value is not None:  # otherwise null is the default
            fields[field] = value
    return fields


# GPT-2 ----------------------------------------------------------------------------------------

GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "reorder_and_upcast_attn": False,  # either value computes the same in float32
    "add_cross_attention": False,
}
GPT2_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
GPT2_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
# Stored as (in, out).
CONV1D = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
HEAD_SIZE = 64  # of all released GPT-2s; used if there is no config.json to give n_head


def to_gpt2(weights, config):
    """Return the tensors and the config.json of transformers' GPT2LMHeadModel."""
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
    tensors = {}
    for key, w in repeat_kv_heads(with_biases(weights), config).items():
        tensors[key] = w.t().contiguous() if CONV1D.fullmatch(key) else w
    return tensors, GPT2_FIXED | theirs


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


def from_gpt2(tensors, theirs, folder):
    """Return the name, GPTConfig fields and weights of a GPT2LMHeadModel.

    The shape is that of the tensors, with which config.json, if there is one, must agree.
    """
    weights = {}
    for key, w in tensors.items():
        is_conv1d = CONV1D.fullmatch(key) and w.dim() == 2
        weights[key] = w.t().contiguous() if is_conv1d else w
    wte = weights["transformer.wte.weight"]
    wpe = weights.get("transformer.wpe.weight")
    if wpe is None:
        raise UserError(f"{folder} has no model*.safetensors with wpe.weight")
    if wte.dim() != 2 or wpe.dim() != 2:
        raise UserError(f"{folder} has a wte.weight or a wpe.weight that is not a matrix")
    vocab_size, n_embd = wte.shape
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.h.")}
    shape = {
        "block_size": len(wpe),
        "vocab_size": vocab_size,
        "n_layer": len(layers),
        "n_head": theirs["n_head"] if theirs else n_embd // HEAD_SIZE,
        "n_embd": n_embd,
        "bias": True,
        "dropout": 0.0,
    }
    supported = {key: shape[key] for key in ("n_layer", "n_embd", "vocab_size")}
    supported |= {"n_positions": len(wpe), "n_inner": 4 * n_embd, "add_cross_attention": False}
    supported["is_causal"] = True  # if not, transformers attends to later tokens, too
    check_fields(folder, theirs, supported)
    return "model", shape, weights


# StarCoder2 -----------------------------------------------------------------------------------

STARCODER2_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
STARCODER2_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}
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


def to_starcoder2(weights, config):
    """Return the tensors and the config.json of transformers' Starcoder2ForCausalLM."""
    theirs = {
        "model_type": "starcoder2",
        "architectures": ["Starcoder2ForCausalLM"],
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": getattr(config, "n_kv_head", config.n_head),
        "sliding_window": getattr(config, "window", None),  # both include the token itself
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.block_size,
        "residual_dropout": config.dropout,
        "embedding_dropout": config.dropout,
        "attention_dropout": config.dropout,
    }
    tensors = rename(split_qkv(with_biases(weights), config), STARCODER2_NAMES)
    return tensors, STARCODER2_FIXED | theirs


def from_starcoder2(tensors, theirs, folder):
    """Return the name, GPTConfig fields and weights of a Starcoder2ForCausalLM.

    One with grouped queries and without a window gets one of block_size.
    """
    with explain_malformed(folder / "config.json"):
        n_embd, n_head = theirs["hidden_size"], theirs["num_attention_heads"]
        n_kv_head = theirs["num_key_value_heads"]
        window = theirs.get("sliding_window")
        # Versions before 5 have rope_scaling and rope_theta; transformers prefers rope_scaling.
        rope_key = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
        rope = {**theirs.get(rope_key, {})}
        rope_theta = rope.setdefault("rope_theta", theirs.get("rope_theta", 10000.0))
        rope.setdefault("rope_type", rope.pop("type", "default"))
        if not isinstance(rope_theta, (int, float)):
            raise TypeError(f"{rope_theta=}")
        shape = {
            "block_size": theirs["max_position_embeddings"],
            "vocab_size": theirs["vocab_size"],
            "n_layer": theirs["num_hidden_layers"],
            "n_head": n_head,
            "n_embd": n_embd,
            "rope_theta": float(rope_theta),
            "dropout": 0.0,
        }
    name = "model_rope"
    if n_kv_head != n_head or window is not None:
        name = "model_rope_gqa_swa"
        shape["n_kv_head"] = n_kv_head
        shape["window"] = shape["block_size"] if window is None else window
    expected = expected_tensors(to_starcoder2, name, shape, folder)
    supported = {
        "intermediate_size": 4 * n_embd,
        "head_dim": n_embd // n_head,
        "partial_rotary_factor": None,
        "is_causal": True,
        rope_key: {"rope_type": "default", "rope_theta": rope_theta},
    }
    check_fields(folder, theirs | {rope_key: rope}, supported)
    check_shapes(folder, name, tensors, expected)
    weights = join_qkv(rename(tensors, inverse(STARCODER2_NAMES)))
    weights = without_zero_biases(weights)
    shape["bias"] = "transformer.ln_f.bias" in weights
    return name, shape, weights


# GPT-Neo --------------------------------------------------------------------------------------
# It does not divide the scores q k^T by sqrt(head_dim), so its q_proj is ours divided by that:
# without rounding if head_dim is a power of 4, such as 16 and 64.

GPT_NEO_DEFAULTS = {
    "vocab_size": 50257,
    "hidden_size": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "max_position_embeddings": 2048,
    "window_size": 256,
}
GPT_NEO_ALIASES = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
GPT_NEO_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
GPT_NEO_NAMES = {".attn.c_proj.": ".attn.out_proj.", ".attn.": ".attn.attention."}


def to_gpt_neo(weights, config):
    """Return the tensors and the config.json of transformers' GPTNeoForCausalLM.

    Raises UserError if c_attn has biases other than zero.
    """
    if any(key.endswith(".c_attn.bias") and w.any() for key, w in weights.items()):
        raise UserError(
            "c_attn has biases, but q, k and v of GPT-Neo, the only model of transformers with "
            "these windows, have none: train the model with --bias=False"
        )
    theirs = {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "attention_types": all_local(config.n_layer),
        "window_size": config.window,  # both include the token itself
        "max_position_embeddings": config.block_size,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": config.dropout,
    }
    weights = with_biases(weights)
    weights = {key: w for key, w in weights.items() if not key.endswith(".c_attn.bias")}
    tensors = rename(split_qkv(weights, config), GPT_NEO_NAMES)
    tensors = scale_queries(tensors, (config.n_embd // config.n_head) ** -0.5)
    return tensors, GPT_NEO_FIXED | theirs


def from_gpt_neo(tensors, theirs, folder):
    """Return the name, GPTConfig fields and weights of a GPTNeoForCausalLM."""
    n_embd, n_head = theirs["hidden_size"], theirs["num_heads"]
    shape = {
        "block_size": theirs["max_position_embeddings"],
        "vocab_size": theirs["vocab_size"],
        "n_layer": theirs["num_layers"],
        "n_head": n_head,
        "n_embd": n_embd,
        "window": theirs["window_size"],
        "dropout": 0.0,
    }
    expected = expected_tensors(to_gpt_neo, "model_swa", shape, folder)
    supported = {
        "intermediate_size": 4 * n_embd,
        "attention_types": all_local(shape["n_layer"]),
        # If present, transformers uses it instead of attention_types.
        "attention_layers": ["local"] * shape["n_layer"],
    }
    # Without attention_types, GPT-Neo has a window in every second layer only.
    check_fields(folder, {"attention_types": None} | theirs, supported)
    check_shapes(folder, "model_swa", tensors, expected)
    tensors = scale_queries(tensors, (n_embd // n_head) ** 0.5)
    weights = join_qkv(rename(tensors, inverse(GPT_NEO_NAMES)))
    weights = without_zero_biases(weights)
    shape["bias"] = "transformer.ln_f.bias" in weights
    if shape["bias"]:
        weights = with_biases(weights)  # of c_attn
    return "model_swa", shape, weights


def all_local(n_layer):
    """Return the attention_types of a GPT-Neo with a window in each layer."""
    return [[["local"], n_layer]]


def scale_queries(tensors, factor):
    """Return the tensors with each q_proj multiplied by the factor."""
    return {key: w * factor if ".q_proj." in key else w for key, w in tensors.items()}


# All formats ----------------------------------------------------------------------------------


@dataclass
class Format:
    """What common/pretrained.py needs to read one of transformers' model types."""

    defaults: dict  # fields of config.json, with what transformers takes for one that is missing
    aliases: dict  # other names of fields
    fixed: dict  # fields whose default is the only value that our models have
    prefix: str  # of the names of tensors; some files leave it out
    embedding: str  # the token embedding, which is also the head
    convert: Callable  # from_...


# By model_type.
FORMATS = {
    "gpt2": Format(
        GPT2_DEFAULTS, GPT2_ALIASES, GPT2_FIXED, "transformer.", "wte.weight", from_gpt2
    ),
    "starcoder2": Format(
        STARCODER2_DEFAULTS, {}, STARCODER2_FIXED, "model.", "embed_tokens.weight", from_starcoder2
    ),
    "gpt_neo": Format(
        GPT_NEO_DEFAULTS, GPT_NEO_ALIASES, GPT_NEO_FIXED, "transformer.", "wte.weight", from_gpt_neo
    ),
}
