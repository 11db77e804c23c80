"""GPT-2 with rotary position embedding (RoPE): model.py without learned positions; queries and keys are turned instead.

"RoFormer" (Su et al. 2021, section 3.2.2, equations 14 to 16): the product of a query and a key depends on positions
only through their distance, and no position runs out. Pairs are (i, i + D/2) as in Llama and StarCoder2, where the
paper has (2i, 2i + 1): the same up to the order of the elements. What differs from model.py says RoPE.

    x[i + D/2]
       |     * turned by the angle t theta^(-2i / D)
       |    /
       |   /   . * a query or key at position t
       |  / . '
       |/.'__________ x[i]

Shapes: B batch, T new tokens, S keys in sight (S - T cached), C channels, H heads, D = C / H, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 small, 124M parameters. ValueError for numbers that do not fit."""

    block_size: int = 1024  # RoPE: length of the training sequences, in tokens; the model takes any
    vocab_size: int = 50257  # token ids are 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability, while training
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has them
    rope_theta: float = 10000.0  # RoPE: pair i makes a full turn in 2 pi theta^(2i / D) tokens

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            near = self.n_embd + -self.n_embd % self.n_head
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; n_embd={near} is")
        if self.n_embd // self.n_head % 2:  # RoPE
            near = self.n_embd + self.n_head
            raise ValueError(
                f"RoPE turns pairs, but n_embd={self.n_embd} / n_head={self.n_head} is odd; n_embd={near} fits"
            )
        if not 0 < self.rope_theta < float("inf"):
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0 and finite")


class KVCache:
    """The keys and values of the tokens seen so far, preallocated: (n_layer, B, H, max_len, D) each."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.max_len = max_len
        self.pos = 0  # tokens seen: the position of the next one; GPT.forward advances it

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, H, T, D); return all that the new queries may need (B, H, S, D).
        A batch of one fills every row: samples of one prompt need one prefill. ValueError where the cache is full."""
        B, end = k.size(0), self.pos + k.size(2)
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, not {end}: make_cache(batch_size, max_len={end})")
        self.k[layer, :, :, self.pos : end] = k
        self.v[layer, :, :, self.pos : end] = v
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]


def rotate(x, cos, sin):
    """RoPE: turn the pairs of x (B, H, T, D) by angles whose cosines and sines are (T, D/2), in float32."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past (Vaswani et al. 2017, section 3.2): softmax(QK^T / sqrt(D)) V."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, cache=None):  # RoPE
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3 * self.n_head, -1).transpose(1, 2)  # (B, 3H, T, D)
        q, k, v = qkv.split(self.n_head, dim=1)
        q, k = rotate(q, *rope), rotate(k, *rope)  # RoPE
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, D)
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v):
        """The queries are the last T of S keys: training, prefill, a later chunk, decoding are one path.

               keys 0 1 2 3 4
        query 2     x x x . .      T = 3 new tokens, S = 5 keys: two from the cache
        query 3     x x x x .
        query 4     x x x x x      x attends, . the future
        """
        T, S = q.size(2), k.size(2)
        # is_causal counts from the upper left corner, right for T = S alone; a single query sees all, without a mask.
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
        causal = True if T == S else False  # a plain bool, also where torch.compile has T as a symbol
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


class MLP(nn.Module):
    """Two linear maps, four times as wide in between, with GELU (Hendrycks & Gimpel 2016, section 2, tanh form)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on the normed stream and added to it (pre-norm)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache=None):  # RoPE
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model: token embedding, n_layer blocks, a last LayerNorm, and the head on the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: normal with std 0.02, 0.02 / sqrt(2 n_layer) where a block adds to the stream (twice); biases 0."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T) to float32 logits: (B, T, V), or with a cache, which then holds idx too, the last (B, 1, V).
        With targets (B, T) to the loss, float32: the mean over those that are not -1, 0 without any."""
        start = 0 if cache is None else cache.pos
        end = start + idx.size(1)
        # RoPE: in float32 whatever the model's dtype, as bfloat16 rounds positions from 256 on; once for all blocks
        D = self.config.n_embd // self.config.n_head
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=idx.device, dtype=torch.float32) / D)
        angles = torch.arange(start, end, device=idx.device)[:, None] * frequency  # (T, D/2)
        rope = angles.cos(), angles.sin()
        x = F.dropout(self.transformer.wte(idx), self.config.dropout, self.training)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, rope, cache)
        if cache is not None:
            cache.pos = end
            x = x[:, -1:]
        logits = F.linear(self.transformer.ln_f(x), self.transformer.wte.weight).float()  # (B, T, V)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return loss / (targets != -1).sum().clamp(min=1)

    def make_cache(self, batch_size, max_len=None):
        """An empty cache for max_len tokens (block_size by default), on the model's device and in its dtype."""
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_len or self.config.block_size, weight.device, weight.dtype)

    def flops_per_token(self, T):
        """Operations per token of a training step on sequences of T: 6 for a weight of matrix products, 12 D for a key
        in a head's sight (PaLM, Chowdhery et al. 2022, appendix B, which counts future keys too)."""
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 6 * weights + 6 * self.config.n_layer * self.config.n_embd * (T + 1)  # (T + 1) / 2 keys on average
