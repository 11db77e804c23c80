"""GPT-2 with sliding-window attention (SWA): a token attends to the last `window` tokens only.

"Longformer" (Beltagy et al. 2020, section 3.1) without dilation and global tokens; "Mistral 7B"
(Jiang et al. 2023, section 2), which also has the ring buffer. The window includes the token
itself: query i attends to key j if 0 <= i - j < window. The mask for window = 3:

           keys 0 1 2 3 4 5
    query 0     x . . . . .
    query 1     x x . . . .
    query 2     x x x . . .
    query 3     . x x x . .
    query 4     . . x x x .
    query 5     . . . x x x      x: attends to

Stacked windows reach further: the receptive field of L layers is L (window - 1) tokens into the
past.

No later query attends to a key that has left the window. So the KV cache is a ring buffer: it has
`window` slots, and position p is in slot p % window, where it replaces position p - window. With
window = 3:

    slot                0 1 2
    after position 4    3 4 2
    after position 5    3 4 5      the order of the keys does not matter to softmax(QK^T) V
    after position 6    6 4 5

Differences from model.py, marked SWA: the mask and the ring buffer. An optimization for long
sequences, attend_blocks, is at the end of this file; a first reading can skip it.

Shapes: B batch, T new tokens, S keys (at most W - 1 from the cache, then T new; in decode, where
T = 1, all slots of the ring buffer that are in use), C channels, H heads, D = C / H channels of a
head, V vocabulary, W window.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 small, 124M parameters."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257  # token ids are 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability, while training
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    window: int = 256  # SWA: tokens that a token attends to, itself included

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} must divide n_embd={self.n_embd}")


class KVCache:
    """The keys and values of all layers for the last `window` tokens: a preallocated ring buffer.

    SWA: k and v are (n_layer, batch_size, H, slots, D), with slots = min(window, max_len).
    """

    def __init__(self, config, batch_size, max_len, device, dtype):
        head_dim = config.n_embd // config.n_head
        slots = min(config.window, max_len)  # SWA
        shape = (config.n_layer, batch_size, config.n_head, slots, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.max_len = max_len
        self.pos = 0  # tokens processed: the position of the next one; GPT.forward advances it

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, H, T, D); return those needed (B, H, S, D).

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


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017, section 3.2): softmax(QK^T / sqrt(D)) V."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.window = config.window  # SWA
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, D)
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
        T = q.size(2)
        dropout = self.dropout if self.training else 0.0
        if T == 1:  # decode: one query, which attends to all keys
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
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

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final LayerNorm, a head tied to wte."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
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

    def forward(self, idx, targets=None, cache=None):
        """Return logits or, with targets, the loss; both in float32, whatever the model's dtype.

        idx (B, T)           -> logits (B, T, V)
        idx, targets (B, T)  -> loss, a scalar: the mean over the targets other than -1 (0 if none)
        idx, cache           -> logits of the last position (B, 1, V); idx is added to the cache

        Raises ValueError beyond block_size, where the learned positions end.
        """
        start = 0 if cache is None else cache.pos
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
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
        """Return an empty KVCache for max_len tokens (block_size if None), in the model's dtype."""
        max_len = max_len or self.config.block_size
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_len, weight.device, weight.dtype)


# SWA, an optimization: attention in blocks ----------------------------------------------------
#
# A first reading can skip the rest of this file.
#
# A mask alone saves nothing: all T x S scores are computed before it applies. Therefore
# attend_blocks computes the queries in blocks, each with only those keys that its windows reach.
# (These blocks have nothing to do with the class Block and with block_size.) With window = 3 and
# blocks of 3 queries:
#
#     queries    keys
#     0 1 2      0 1 2                left over: they have no block before them
#     3 4 5      0 1 2 3 4 5          a block attends to its own keys
#     6 7 8            3 4 5 6 7 8    and to those of the n_before = 1 block before it
#
# The first query of a block attends to the window - 1 keys before it, so n_before is
# (window - 1) / size, rounded up: 1 for windows of 2 to 257, more for longer ones, because a block
# has at most 256 queries. Every block has `size` queries at the end of (n_before + 1) * size keys,
# so one mask serves all.
#
# With T = 1024 and window = 256, 229,504 scores are needed. A mask computes 1,048,576, full causal
# attention 524,800, and blocks 458,752.
#
# The constants were measured on a CPU by python -m tools.bench attention. Two of them equal the
# default window by chance. On a GPU nothing was measured, and less is expected: a mask excludes the
# kernels of FlashAttention and cuDNN, so blocks should be slower than full attention at T = 1024,
# and about twice as fast at T = 8192. The same benchmark times torch's flash kernel with a window.
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
