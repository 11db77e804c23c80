"""GPT-2 with rotary position embedding (RoPE) instead of learned positions.

"RoFormer" (Su et al. 2021, section 3.2.2, equations 14 to 16). Queries and keys are rotated by
angles proportional to their positions. Rotations satisfy R_m^T R_n = R_(n-m), so the score of a
query at position m and a key at position n depends on the positions only through their distance:

    (R_m q) . (R_n k) = q . R_(n-m) k

The D channels of a head form D/2 pairs. Pair i has a frequency of its own, rope_theta^(-2i / D):

    x[i + D/2]
       |      * rotated
       |     /  .
       |    /     .  angle = position * rope_theta^(-2i / D)
       |   /       .
       |  /     _--* before
       | /  _--
       |/_--____________ x[i]

High frequencies (small i) distinguish neighboring positions, low ones distinguish positions that
are far apart.

Pairs are (i, i + D/2), as in Llama and StarCoder2. The paper has (2i, 2i + 1): the same up to the
order of the channels. To load weights of that convention, put the D channels of each head of q and
of k into the order 0, 2, 4, .., 1, 3, 5, .. (The first C rows of c_attn.weight and c_attn.bias make
q, the next C make k; each head has D of them.)

Differences from model.py, marked RoPE: there is no wpe, so block_size does not limit the length of
a sequence; queries and keys are rotated before the keys enter the cache; the angles are computed
once for all blocks, in float32.

Shapes: B batch, T new tokens, S keys (S - T from the cache, then T new), C channels, H heads,
D = C / H channels of a head, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 small, 124M parameters."""

    block_size: int = 1024  # RoPE: training length, in tokens; positions have no limit
    vocab_size: int = 50257  # token ids are 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability, while training
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    rope_theta: float = 10000.0  # RoPE: base of the frequencies; larger: longer periods

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
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


class KVCache:
    """The keys and values of all layers for the tokens processed so far, preallocated.

    k and v are (n_layer, batch_size, H, max_len, D).
    """

    def __init__(self, config, batch_size, max_len, device, dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, max_len, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.max_len = max_len
        self.pos = 0  # tokens processed: the position of the next one; GPT.forward advances it

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, H, T, D); return all so far (B, H, S, D).

        B is batch_size; or 1, to prefill a prompt once for several samples: its keys and values
        are then stored in every row of the cache, and returned in one row.
        Raises ValueError if the tokens do not fit.
        """
        B, T = k.size(0), k.size(2)
        end = self.pos + T
        if end > self.max_len:
            raise ValueError(
                f"the cache has room for {self.max_len} tokens, not for {end}: "
                f"make it with make_cache(batch_size, max_len={end})"
            )
        self.k[layer, :, :, self.pos : end] = k
        self.v[layer, :, :, self.pos : end] = v
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]  # (B, H, S, D) each


def rotate(x, cos, sin):
    """RoPE: rotate the pairs of channels of x (B, H, T, D); cos and sin are (T, D/2), float32."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rotated.to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017, section 3.2): softmax(QK^T / sqrt(D)) V."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos, sin, cache=None):  # RoPE
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        q = rotate(q, cos, sin)  # RoPE
        k = rotate(k, cos, sin)  # RoPE
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, D)
        y = self.attend(q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v):
        """Let each query attend to its own position and all earlier ones.

        The queries are at the last T of S positions. For a chunk of T = 3 tokens after two cached
        ones, S = 5 (x: attends to):

               keys 0 1 2 3 4      is_causal=True would mean
        query 2     x x x . .          x . . . .
        query 3     x x x x .          x x . . .
        query 4     x x x x x          x x x . .
        """
        T, S = q.size(2), k.size(2)
        dropout = self.dropout if self.training else 0.0
        if T == 1:  # decode: one query, which attends to all keys
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        if T == S:  # training, or prefill of a whole prompt
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        # chunked prefill
        i = torch.arange(S - T, S, device=q.device)[:, None]  # positions of the queries, (T, 1)
        j = torch.arange(S, device=q.device)  # positions of the keys, (S,)
        mask = j <= i  # (T, S)
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
        """Return an empty KVCache for max_len tokens (block_size if None), in the model's dtype."""
        max_len = max_len or self.config.block_size
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_len, weight.device, weight.dtype)
