"""What torch runs faster on a CPU in another dtype or another layout.

use_float32_attention  for training in bfloat16: attention over short sequences in float32
prepare_for_sampling   pack_linear_layers: the weights in oneDNN's own layout
                       use_float32_cache: in bfloat16, the KV cache and attention in float32

None of these changes a model file, and all give the same results up to rounding. Where torch lacks
what they need, the model computes as usual.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Queries up to which attention in float32 is faster than in bfloat16, measured forward and backward
# on a CPU with AVX512-BF16.
MAX_FLOAT32_QUERIES = 128
# torch has no public functions for products with packed weights: these are in torch.ops.mkldnn.
PRIVATE_OPS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


def cpu_features():
    """Return what torch reports of this CPU, such as {"amx_bf16": True}; {} if nothing."""
    if not hasattr(torch.cpu, "get_capabilities"):  # not in every version of torch
        return {}
    return torch.cpu.get_capabilities()


def can_pack(dtype):
    """Return whether torch, on this CPU, has products with packed weights in this dtype.

    They need private functions of torch: if a version of torch lacks one, the answer is no.
    """
    has_ops = all(hasattr(torch.ops.mkldnn, name) for name in PRIVATE_OPS)
    if not (torch.backends.mkldnn.is_available() and has_ops):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class Float32Attention(TorchFunctionMode):
    """A context in which attention of few queries in bfloat16 is computed in float32, then rounded.

    torch's bfloat16 kernel is slow for few queries, above all its backward pass, unless the CPU has
    AMX.
    """

    def __init__(self, max_queries=MAX_FLOAT32_QUERIES):
        super().__init__()
        self.max_queries = max_queries

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        return function(*args, **kwargs)

    def attend(self, query, key, value, attn_mask=None, **options):
        """Compute F.scaled_dot_product_attention, in float32 if there are few queries."""
        dtype = query.dtype
        if dtype == torch.float32 or query.size(-2) > self.max_queries:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.float()
        query, key, value = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):  # it would convert them back
            y = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        return y.to(dtype)


def use_float32_attention(block, max_queries=MAX_FLOAT32_QUERIES):
    """Let a block of a model compute in the context Float32Attention."""
    forward = block.forward

    def forward_in_context(*inputs, **options):
        with Float32Attention(max_queries):
            return forward(*inputs, **options)

    block.forward = forward_in_context


def wants_float32_attention(device, dtype):
    """Return whether a run on this device, in this dtype, gains from Float32Attention."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return not cpu_features().get("amx_bf16", False)


def prepare_for_sampling(model, rows=1):
    """Make a model on a CPU decode faster; in place. On other devices it does nothing.

    rows   number of samples of a decode step to optimize for; others work as well

    The model is then for inference only: it cannot be trained, saved or moved. Call it after the
    last model.to(...).
    """
    weight, config = model.transformer.wte.weight, model.config
    has_kv_head_per_query_head = getattr(config, "n_kv_head", config.n_head) == config.n_head
    if has_kv_head_per_query_head and wants_float32_attention(weight.device, weight.dtype):
        use_float32_cache(model)
    pack_linear_layers(model, rows)


def use_float32_cache(model):
    """Let a bfloat16 model keep its KV cache, and compute attention, in float32; in place.

    torch's bfloat16 kernel is slow for a single query per KV head. With a float32 cache decoding is
    faster, the more so the more tokens and samples are in the cache, which takes twice the memory.
    With several queries per KV head (GQA) it gains nothing. A variant whose attention has no method
    attend(q, k, v) stays as it is.
    """
    attentions = [getattr(block, "attn", None) for block in model.transformer.h]
    if not all(hasattr(attention, "attend") for attention in attentions):
        return
    for attention in attentions:
        attend_in_float32(attention)
    make_cache = model.make_cache

    def make_float32_cache(*args, **kwargs):
        cache = make_cache(*args, **kwargs)
        for name, value in vars(cache).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
                setattr(cache, name, value.float())
                cache.nbytes += value.nbytes
        return cache

    model.make_cache = make_float32_cache


def attend_in_float32(attention):
    """Let an attention layer's attend(q, k, v) compute in float32, and round its result.

    Not by Float32Attention: that intercepts every function of torch, too slow for a decode step.
    """
    attend = attention.attend

    def attend_and_round(q, k, v):
        return attend(q.float(), k.float(), v.float()).to(q.dtype)

    attention.attend = attend_and_round


class PackedLinear(nn.Module):
    """y = x W^T + b with W in the layout that oneDNN multiplies by fastest; for inference only.

    W (out, in) in float32 or bfloat16. F.linear takes W in its ordinary layout: for one row of x
    the product then uses one thread, or half of the memory bandwidth.
    """

    def __init__(self, weight, bias, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x):
        # torch.compile calls the same function in bfloat16. The last three arguments could add an
        # activation.
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def pack_linear_layers(model, rows=1):
    """Replace a model's linear layers, and its output head, by packed ones; in place.

    rows   number of input rows to optimize for

    Layers are replaced one by one, so that memory grows by the head alone: wte stays as it is, for
    the embedding. Does nothing if the model is not on a CPU or can_pack says no.
    """
    wte = model.transformer.wte
    if wte.weight.device.type != "cpu" or not can_pack(wte.weight.dtype):
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # not a subclass, which may use its weight in other ways
                setattr(parent, name, PackedLinear(child.weight, child.bias, rows))
    if "head" not in dict(model.named_children()):  # a variant may have a head of its own
        model.head = PackedLinear(wte.weight, None, rows).forward
