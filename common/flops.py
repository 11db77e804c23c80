"""Count the FLOPs of training, per token: exactly, or by the convention behind reported MFU.

Both counts cover a forward and a backward pass over sequences of T tokens: 6 FLOPs per weight of
a matrix product, and 12 * n_embd per layer and attended key. They differ in which weights and
which keys they count.
"""


def flops_per_token(model, T):
    """Return the FLOPs per token of all matrix products, as an int.

    A token attends to itself and all earlier tokens, or to the last `window` of them. The count is
    exact for the model files of this project. For another file it is right if all of its weights
    with two dimensions, except wpe, multiply each token once, and if it attends to these keys.
    """
    config = model.config
    # wte counts, as the output head; wpe is only looked up
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    weights = sum(p.numel() for p in matrices)
    # Token i attends to min(i + 1, W) keys. Over T tokens the sum is 1 + 2 + ... + W, then W each.
    W = min(getattr(config, "window", T), T)
    keys = W * (W + 1) // 2 + (T - W) * W
    return 6 * weights + 12 * config.n_layer * config.n_embd * keys // T


def mfu_flops_per_token(model, T):
    """Return the FLOPs per token that model FLOPs utilization (MFU) counts by convention.

    All parameters count except position embeddings, and each token counts T keys, or `window` if
    that is less, although causal attention needs only half of T on average: "PaLM" (Chowdhery et
    al. 2022, appendix B), as nanoGPT and llm.c report it.
    """
    config = model.config
    parameters = [p for name, p in model.named_parameters() if "wpe" not in name]
    n_parameters = sum(p.numel() for p in parameters)
    keys = min(T, getattr(config, "window", T))
    return 6 * n_parameters + 12 * config.n_layer * config.n_embd * keys
