"""transformers' StarCoder2: an oracle for models with rotary positions."""

import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

# StarCoder2's names -> GPT-2's. The rows of c_attn are those of q_proj, k_proj and v_proj.
NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "model.norm.": "transformer.ln_f.",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
}


def starcoder2(
    n_layer,
    n_head,
    n_embd,
    vocab_size,
    n_kv_head=None,
    rope_theta=10000.0,
    window=None,
    attention="eager",
):
    """Return transformers' StarCoder2 with large random parameters, without dropout."""
    torch.manual_seed(0)
    config = Starcoder2Config(
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        num_key_value_heads=n_kv_head or n_head,
        hidden_size=n_embd,
        intermediate_size=4 * n_embd,
        vocab_size=vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        sliding_window=window,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    model = Starcoder2ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def with_our_names(tensors):
    """Rename StarCoder2's weights or gradients (name -> tensor), with q, k and v as c_attn."""
    parts = {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        parts.setdefault(name, []).append(tensor)  # in the order q, k, v
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def loaded(module, theirs, **options):
    """Return the module's model with all weights of StarCoder2."""
    c = theirs.config
    config = module.GPTConfig(
        vocab_size=c.vocab_size,
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads,
        n_embd=c.hidden_size,
        rope_theta=c.rope_parameters["rope_theta"],
        **options,
    )
    model = module.GPT(config).eval()
    weights = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    model.load_state_dict(with_our_names(weights))
    return model


def relative_errors(model, theirs, text):
    """Return the relative error of each parameter's gradient, in norm, as {name: error}.

    The loss is that of predicting the next token of text (B, T + 1).
    """
    x, y = text[:, :-1], text[:, 1:]
    model(x, y).backward()
    torch.nn.functional.cross_entropy(theirs(x).logits.transpose(1, 2), y).backward()
    expected = with_our_names({name: p.grad for name, p in theirs.named_parameters()})
    errors = {}
    for name, p in model.named_parameters():
        error = (p.grad - expected[name]).norm() / expected[name].norm()
        errors[name] = error.item()
    return errors
