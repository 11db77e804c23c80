"""GPT-2 with grouped-query attention (GQA): model.py, but n_head query heads share n_kv_head heads of keys and values.

"GQA" (Ainslie et al. 2023, section 2.2, figure 2): the cache shrinks to n_kv_head / n_head, and with it what decoding
reads for each token. n_kv_head = n_head is multi-head attention, 1 is multi-query attention (Shazeer 2019, section 3).
What differs from model.py says GQA: the config, the cache, the attention.

    queries   0 1 2   3 4 5   6 7 8   9 10 11      n_head = 12, n_kv_head = 4:
              '-+-'   '-+-'   '-+-'    '-+-'       a cache a third as large
    keys        0       1       2        3         and as many heads of values

Shapes: B batch, T new tokens, S keys in sight (S - T cached), C channels, H heads, G of keys, D = C / H, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 small, 124M parameters. ValueError for numbers that do not fit."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257  # token ids are 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability, while training
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has them
    n_kv_head: int = 4  # GQA: heads of keys and values, each for n_head / n_kv_head query heads

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            near = self.n_embd + -self.n_embd % self.n_head
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; n_embd={near} is")
        if self.n_head % self.n_kv_head:  # GQA
            fit = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}; by {fit} it is")


class KVCache:
    """The keys and values of the tokens seen so far, preallocated: (n_layer, B, G, max_len, D) each."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.n_embd // config.n_head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.max_len = max_len
        self.pos = 0  # tokens seen: the position of the next one; GPT.forward advances it

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, G, T, D); return all that the new queries may need (B, G, S, D).
        A batch of one fills every row: samples of one prompt need one prefill. ValueError where the cache is full."""
        B, end = k.size(0), self.pos + k.size(2)
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, not {end}: make_cache(batch_size, max_len={end})")
        self.k[layer, :, :, self.pos : end] = k
        self.v[layer, :, :, self.pos : end] = v
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]


class CausalSelfAttention(nn.Module):
    """Grouped-query attention over the past: softmax(QK^T / sqrt(D)) V, with fewer heads in K and V than in Q."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # GQA: of q, k, v
        self.c_attn = nn.Linear(config.n_embd, config.n_embd // config.n_head * sum(self.heads), bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # GQA: (B, H, T, D) and two (B, G, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, G, S, D)
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v):
        """The queries are the last T of S keys: training, prefill, a later chunk, decoding are one path.

               keys 0 1 2 3 4
        query 2     x x x . .      T = 3 new tokens, S = 5 keys: two from the cache
        query 3     x x x x .
        query 4     x x x x x      x attends, . the future
        """
        (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
        dropout = self.dropout if self.training else 0.0
        if T == 1:  # GQA: a single query needs no mask, so the queries of a group can be the rows of one small matrix
            y = F.scaled_dot_product_attention(q.view(B, G, H // G, D), k, v, dropout_p=dropout)
            return y.reshape(B, H, T, D)
        if G < H:  # as fast as enable_gqa=True, which for some devices, dtypes and masks takes slow kernels
            k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))  # (B, H, S, D)
        # is_causal counts from the upper left corner, right for T = S alone; a single query sees all, without a mask.
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
        causal = True if T == S else False  # a plain bool, also where torch.compile has T as a symbol
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

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model: token and position embeddings, n_layer blocks, a last LayerNorm, and the head on the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
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
        With targets (B, T) to the loss, float32: the mean over those that are not -1, 0 without any.
        ValueError past block_size, where learned positions end."""
        start = 0 if cache is None else cache.pos
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(start, end, device=idx.device))  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
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
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2) - self.transformer.wpe.weight.numel()
        return 6 * weights + 6 * self.config.n_layer * self.config.n_embd * (T + 1)  # (T + 1) / 2 keys on average
