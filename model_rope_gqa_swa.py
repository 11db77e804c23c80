"""GPT-2 with RoPE, grouped-query attention (GQA) and sliding-window attention (SWA).

The block of StarCoder2 (Lozhkov et al. 2024, section 6.1), whose format other programs load.
model_rope.py, model_gqa.py and model_swa.py explain the ideas one by one. Together they generate
without end: positions have no limit (until, at some ten million, float32 rounds neighboring ones
to the same number), and the cache holds `window` tokens of n_kv_head heads.

Differences from model.py are marked RoPE, GQA and SWA. An optimization for long sequences,
attend_blocks, is at the end of this file; a first reading can skip it.

Shapes: B batch, T new tokens, S keys (at most W - 1 from the cache, then T new; in decode, where
T = 1, all slots of the ring buffer that are in use), C channels, H query heads, G KV heads,
D = C / H channels of a head, V vocabulary, W window.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 small with 4 KV heads, 114M parameters."""

    block_size: int = 1024  # RoPE: training length, in tokens; positions have no limit
    vocab_size: int = 50257  # token ids are 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability, while training
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    rope_theta: float = 10000.0  # RoPE: base of the frequencies; larger: longer periods
    n_kv_head: int = 4  # GQA: KV heads, each shared by n_head / n_kv_head query heads
    window: int = 256  # SWA: tokens that a token attends to, itself included

    def __post_init__(self):
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "window")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} must divide n_embd={self.n_embd}")
        if (self.n_embd // self.n_head) % 2:  # RoPE
            raise ValueError(
                f"n_embd={self.n_embd} / n_head={self.n_head} must be even: RoPE rotates pairs"
            )
        if not 0 < self.rope_theta < float("inf"):  # RoPE
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0 and finite")
        if self.n_head % self.n_kv_head:  # GQA
            raise ValueError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")


class KVCache:
    """The keys and values of all layers for the last `window` tokens: a preallocated ring buffer.

    GQA, SWA: k and v are (n_layer, batch_size, G, slots, D), with slots = min(window, max_len).
    """

    def __init__(self, config, batch_size, max_len, device, dtype):
        head_dim = config.n_embd // config.n_head
        slots = min(config.window, max_len)  # SWA
        shape = (config.n_layer, batch_size, config.n_kv_head, slots, head_dim)  # GQA, SWA
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.max_len = max_len
        self.pos = 0  # tokens processed: the position of the next one; GPT.forward advances it

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, G, T, D); return those needed (B, G, S, D).

        B is batch_size; or 1, to prefill a prompt once for several samples: its keys and values
        are then stored in every row of the cache, and returned in one row.
        Raises ValueError if the tokens do not fit.
        """
        B, T = k.size(0), k.size(2)
        end = self.pos + T
        # SWA: with max_len < window, keys that are still attended to would be replaced. A larger
        # max_len is only a limit, as in model.py.
        if end > self.max_len:
            raise ValueError(
                f"the cache has room for {self.max_len} tokens, not for {end}: "
                f"make it with make_cache(batch_size, max_len={end})"
            )
        # SWA: position p is in slot p % slots. The comments at the right show the positions if the
        # cache has 3 slots and pos is 4.
        layer_k, layer_v = self.k[layer], self.v[layer]  # 3 1 2
        slots = layer_k.size(2)
        if T == 1:  # decode
            layer_k[:, :, self.pos % slots] = k[:, :, 0]  # 3 4 2
            layer_v[:, :, self.pos % slots] = v[:, :, 0]
            return layer_k[:B, :, :end], layer_v[:B, :, :end]  # those in use: all, or `end` slots
        # A chunk, for example of T = 7, also needs the slots - 1 positions before its first query.
        past = torch.arange(max(0, self.pos - slots + 1), self.pos, device=k.device)  # 2 3
        keys = torch.cat([layer_k[:B, :, past % slots], k], dim=2)  # 2 3 4 5 6 7 8 9 10: S = 9
        values = torch.cat([layer_v[:B, :, past % slots], v], dim=2)
        n = min(T, slots)  # new positions to store, the last ones
        last = torch.arange(end - n, end, device=k.device)  # 8 9 10
        layer_k[:, :, last % slots] = keys[:, :, -n:]  # 9 10 8
        layer_v[:, :, last % slots] = values[:, :, -n:]
        return keys, values


def rotate(x, cos, sin):
    """RoPE: rotate the pairs of channels of x (B, H, T, D); cos and sin are (T, D/2), float32."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rotated.to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Causal grouped-query attention: softmax(QK^T / sqrt(D)) V with fewer heads in K and V."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head  # GQA
        self.window = config.window  # SWA
        self.dropout = config.dropout
        self.kv_channels = config.n_kv_head * (config.n_embd // config.n_head)  # GQA: of k or v
        qkv_channels = config.n_embd + 2 * self.kv_channels
        self.c_attn = nn.Linear(config.n_embd, qkv_channels, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos, sin, cache=None):  # RoPE
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split([C, self.kv_channels, self.kv_channels], dim=2)  # GQA
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # GQA: (B, G, T, D)
        v = v.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # GQA: (B, G, T, D)
        q = rotate(q, cos, sin)  # RoPE
        k = rotate(k, cos, sin)  # RoPE
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, G, S, D)
        y = self.attend(q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v):
        """Let each query attend to its own position and the W - 1 before it.

        The queries are at the last T of S positions. For a chunk of T = 3 tokens after two cached
        ones, S = 5, with W = 3 (x: attends to):

               keys 0 1 2 3 4
        query 2     x x x . .
        query 3     . x x x .
        query 4     . . x x x
        """
        B, H, T, D = q.shape
        G = k.size(1)
        dropout = self.dropout if self.training else 0.0
        if T == 1:  # decode: one query, which attends to all keys
            # GQA: the H / G queries that share a KV head become the rows of one matrix, as if they
            # were queries of several tokens. So the KV head is read once for all of them.
            q = q.reshape(B, G, H // G, D)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            return y.reshape(B, H, T, D)
        # GQA: copy each KV head for the query heads that share it. (enable_gqa=True would spare the
        # copies, but not all of torch's attention kernels support it.)
        k = k.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
        v = v.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
        if T > MAX_DENSE_QUERIES:  # SWA: the same result, faster
            return attend_blocks(self.attend_dense, q, k, v, self.window)
        return self.attend_dense(q, k, v)  # SWA

    def attend_dense(self, q, k, v):
        """SWA: compute all T x S scores, and mask those outside of the windows."""
        T, S, W = q.size(2), k.size(2), self.window
        dropout = self.dropout if self.training else 0.0
        if T == S <= W:  # all earlier keys are in every window, as in full attention
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        i = torch.arange(S - T, S, device=q.device)[:, None]  # positions of the queries, (T, 1)
        j = torch.arange(S, device=q.device)  # positions of the keys, (S,)
        mask = (i - W < j) & (j <= i)  # (T, S): 0 <= i - j < W
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class MLP(nn.Module):
    """Two linear layers with GELU (Hendrycks & Gimpel 2016, section 2, tanh form) in between."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):  # RoPE
        x = x + self.attn(self.ln_1(x), cos, sin, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token embedding, n_layer blocks, a final LayerNorm, a head tied to wte."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialize as transformers' GPT-2 does: weights normal with std 0.02, biases 0.

        Each block adds to the residual stream twice, through its two c_proj layers. Their std is
        divided by sqrt(2 n_layer), so that the variance of the sum does not depend on n_layer.
        LayerNorm's weights stay 1.
        """
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=residual_std)
            elif p.dim() == 2:
                p.normal_(std=0.02)
            elif name.endswith("bias"):
                p.zero_()

    def rope_angles(self, positions):
        """RoPE: return cos and sin (T, D/2) of the angles by which positions (T,) are rotated.

        In float32, whatever the model's dtype: bfloat16 has 8 significant bits, so above 256 it
        rounds neighboring positions to the same number.
        """
        D = self.config.n_embd // self.config.n_head
        pair = torch.arange(D // 2, device=positions.device, dtype=torch.float32)
        frequencies = self.config.rope_theta ** (-2 * pair / D)  # (D/2,)
        angles = positions[:, None] * frequencies  # (T, D/2)
        return angles.cos(), angles.sin()

    def forward(self, idx, targets=None, cache=None):
        """Return logits or, with targets, the loss; both in float32, whatever the model's dtype.

        idx (B, T)           -> logits (B, T, V)
        idx, targets (B, T)  -> loss, a scalar: the mean over the targets other than -1 (0 if none)
        idx, cache           -> logits of the last position (B, 1, V); idx is added to the cache
        """
        start = 0 if cache is None else cache.pos
        end = start + idx.size(1)
        positions = torch.arange(start, end, device=idx.device)  # (T,)
        cos, sin = self.rope_angles(positions)  # RoPE
        x = self.transformer.wte(idx)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.pos = end
            x = x[:, -1:]  # sampling needs the last position only
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.head(x).float()  # (B, T or 1, V)
        return self.loss(x, targets)

    def head(self, x):
        """Return the logits of the final hidden states x (B, T, C), by the matrix of wte."""
        return F.linear(x, self.transformer.wte.weight)

    def loss(self, x, targets):
        """Return the mean loss of the final hidden states x (B, T, C) for targets (B, T)."""
        logits = self.head(x).float().flatten(0, 1)  # (BT, V)
        targets = targets.flatten()  # (BT,)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return loss / (targets != -1).sum().clamp(min=1)  # reduction="mean" is nan without targets

    def make_cache(self, batch_size, max_len=None):
        """Return an empty KVCache for max_len tokens (no limit if None), in the model's dtype."""
        max_len = max_len or float("inf")  # RoPE and SWA: neither positions nor slots run out
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_len, weight.device, weight.dtype)


# SWA, an optimization: attention in blocks ----------------------------------------------------
#
# A first reading can skip the rest of this file. model_swa.py explains the blocks, and what to
# expect of them on a GPU. The constants were measured on a CPU by python -m tools.bench attention.
MIN_BLOCK, MAX_BLOCK = 64, 256  # a block has as many queries as the window, within these bounds
MAX_DENSE_QUERIES = 256  # with more queries, blocks are faster than attend_dense


def attend_blocks(attend_dense, q, k, v, window):
    """SWA: return attend_dense(q, k, v), computed in O(T max(window, MIN_BLOCK)) time and memory.

    q is (B, H, T, D), k and v are (B, H, S, D). The last queries form n_blocks blocks. Each block
    attends to its own keys and to those of the n_before blocks before it. The first T_rest queries
    are left over: they have too few keys before them, or do not fill a block.
    """
    B, H, T, D = q.shape
    S = k.size(2)
    size = min(max(window, MIN_BLOCK), MAX_BLOCK)  # queries in a block
    n_before = (window - 1 + size - 1) // size  # (window - 1) / size, rounded up
    n_blocks = min(T, S - n_before * size) // size  # with n_before blocks of keys before the first
    if n_blocks < 1:
        return attend_dense(q, k, v)
    T_rest = T - n_blocks * size
    S_rest = S - n_blocks * size  # keys up to the last of the T_rest queries
    q_blocks = q[:, :, T_rest:].unflatten(2, (n_blocks, size)).flatten(0, 1)
    k_blocks = with_earlier_blocks(k, n_blocks, n_before, size)
    v_blocks = with_earlier_blocks(v, n_blocks, n_before, size)
    y = attend_dense(q_blocks, k_blocks, v_blocks)  # (BH, n_blocks, size, D): blocks act as heads
    y = y.reshape(B, H, n_blocks * size, D)
    if T_rest == 0:
        return y
    y_rest = attend_dense(q[:, :, :T_rest], k[:, :, :S_rest], v[:, :, :S_rest])
    return torch.cat([y_rest, y], dim=2)  # (B, H, T, D)


def with_earlier_blocks(x, n_blocks, n_before, size):
    """SWA: join each of the last n_blocks blocks of x (B, H, S, D) with the n_before before it.

    With blocks a b c d, n_blocks = 3 and n_before = 1: ab, bc and cd. Returns
    (BH, n_blocks, (n_before + 1) size, D).
    """
    n = n_blocks + n_before
    x = x[:, :, -n * size :].unflatten(2, (n, size)).flatten(0, 1)  # [a b c d]: (BH, n, size, D)
    shifted = [x[:, i : i + n_blocks] for i in range(n_before + 1)]  # [a b c] and [b c d]
    return torch.cat(shifted, dim=2)  # [ab bc cd]
