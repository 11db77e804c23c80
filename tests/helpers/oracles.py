"""Models of transformers with random weights, and a model file's model with the same weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM

# GPT-2 ----------------------------------------------------------------------------------------


def gpt2(n_layer, n_head, n_embd, block_size, vocab_size, attention="eager"):
    """Return transformers' GPT-2 with every parameter random, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation=attention,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def in_our_orientation(name, tensor):
    """Return a tensor of transformers' GPT-2 in model.py's orientation.

    A Conv1D weight is (in, out), a Linear weight (out, in).
    """
    is_conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.T if is_conv1d else tensor


def copy_of_gpt2(theirs, module):
    """Return the model of a model file with the weights of transformers' GPT-2."""
    c = theirs.config
    config = module.GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    with torch.device("meta"):
        model = module.GPT(config)
    parameters = theirs.named_parameters()
    weights = {name: in_our_orientation(name, p.detach().clone()) for name, p in parameters}
    model.load_state_dict(weights, assign=True)
    return model


# GPTBigCode -----------------------------------------------------------------------------------


def gpt_bigcode(n_layer, n_head, n_embd, block_size, vocab_size, attention="eager"):
    """Return transformers' GPTBigCode: one KV head, large random parameters, no dropout."""
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        multi_query=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    theirs = GPTBigCodeForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return theirs


def copy_of_gpt_bigcode(theirs, module):
    """Return the model of a model file with GPTBigCode's weights, which have the same names."""
    c = theirs.config
    config = module.GPTConfig(
        c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, n_kv_head=1
    )
    ours = module.GPT(config).eval()
    ours.load_state_dict({name: p.detach().clone() for name, p in theirs.named_parameters()})
    return ours


# GPT-Neo --------------------------------------------------------------------------------------


def copy_of_gpt_neo(theirs, module):
    """Return the model of a model file with the weights of foreign.random_gpt_neo.

    GPT-Neo has no biases of queries, keys and values, and does not divide scores by sqrt(D).
    """
    c = theirs.config
    sizes = c.max_position_embeddings, c.vocab_size, c.num_layers, c.num_heads, c.hidden_size
    ours = module.GPT(module.GPTConfig(*sizes, window=c.window_size)).eval()
    tensors = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for i in range(c.num_layers):
        attention = f"transformer.h.{i}.attn.attention."
        q, k, v = [tensors.pop(f"{attention}{name}_proj.weight") for name in ("q", "k", "v")]
        weight = torch.cat([q * (c.hidden_size / c.num_heads) ** 0.5, k, v])
        tensors[f"{attention}c_attn.weight"] = weight
        tensors[f"{attention}c_attn.bias"] = torch.zeros(len(weight))
    for name in list(tensors):
        our_name = name.replace(".attention.", ".").replace("out_proj", "c_proj")
        tensors[our_name] = tensors.pop(name)
    ours.load_state_dict(tensors)
    return ours
