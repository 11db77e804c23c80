"""What experiments/drawings.py draws: masks, ring buffers, blocks, rotations, heads, one step.

The masks follow the rule 0 <= i - j < window. The rest of the models is computed by the code of the
model files. The training step is written down here as train.train_step and training/parallel.py do
it; a test compares its collectives with those of two real ranks.
"""

from dataclasses import dataclass, field

import torch

from common.models import model_module

# The models -----------------------------------------------------------------------------------


def window_mask(tokens, window):
    """Return a bool matrix (tokens, tokens): whether query i attends to key j."""
    i = torch.arange(tokens)[:, None]
    j = torch.arange(tokens)
    return (0 <= i - j) & (i - j < window)


def reach_of_two_layers(mask):
    """Return a bool matrix: whether output i of two layers depends on input j."""
    paths = mask.long() @ mask.long()  # from j to any position in one layer, from there to i
    return paths > 0


def ring_steps(window, chunks):
    """Return what model_swa stores and attends to in each forward pass with a KVCache.

    chunks   the number of tokens of each pass; 1 is a decode step

    Two lists with one element for each pass: the position in each slot after it, None in an empty
    slot; and the positions to which each of its queries attends.
    """
    swa = model_module("model_swa")
    config = swa.GPTConfig(n_layer=1, n_head=1, n_embd=1, window=window)
    attention = swa.CausalSelfAttention(config, layer=0)
    cache = swa.KVCache(config, 1, sum(chunks), "cpu", torch.float32)
    held, attended = [], []
    for T in chunks:
        # The key of a token is its position + 1, because an empty slot holds 0.
        new = 1.0 + torch.arange(cache.pos, cache.pos + T).view(1, 1, T, 1)
        keys, _ = cache.extend(0, new, new)
        cache.pos += T
        stored = cache.k.flatten().int().tolist()
        held.append([key - 1 if key else None for key in stored])
        positions = keys.flatten().int() - 1  # (S,)
        # All scores are 0. With one-hot values the output of a query is its weights.
        zeros = torch.zeros_like(new)
        one_hot = torch.eye(len(positions))[None, None]
        weights = attention.attend(zeros, torch.zeros_like(keys), one_hot)[0, 0]  # (T, S)
        attended.append([sorted(positions[row > 0].tolist()) for row in weights])
    return held, attended


def computed_blocks(tokens, window):
    """Return, for each block of model_swa's attend_blocks, the positions of its queries and keys.

    In the order of the queries. Queries that are left over before the blocks count as one block.
    """
    swa = model_module("model_swa")
    blocks = []

    def record(q, k, v):
        """Take the place of attend_dense; q and k are (1, blocks, positions, 1)."""
        blocks.extend(zip(q[0, :, :, 0], k[0, :, :, 0], strict=True))
        return q

    positions = torch.arange(tokens).view(1, 1, tokens, 1)
    swa.attend_blocks(record, positions, positions, positions, window)
    return sorted(blocks, key=lambda block: block[0][0])


def rotate_vector(x, positions):
    """Return a query or key x (D,) as model_rope rotates it at these positions: (T, D)."""
    rope = model_module("model_rope")
    model = rope.GPT(rope.GPTConfig(n_layer=1, n_head=1, n_embd=len(x), vocab_size=1))
    cos, sin = model.rope_angles(positions)
    return rope.rotate(x.expand(1, 1, len(positions), -1), cos, sin)[0, 0]


def rotate_pair(pair, positions, head_dim):
    """Return the vector (1, 0) in a pair of channels, rotated at these positions: (T, 2)."""
    x = torch.zeros(head_dim)
    x[pair] = 1
    return rotate_vector(x, positions)[:, [pair, pair + head_dim // 2]]


def rope_scores(query_positions, key_positions, head_dim):
    """Return the scores of a random query and a random key at these pairs of positions: (T,)."""
    q, k = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(0))
    queries = rotate_vector(q, query_positions)  # (T, D)
    keys = rotate_vector(k, key_positions)  # (T, D)
    return (queries * keys).sum(1) / head_dim**0.5


def group_heads(n_head, n_kv_head):
    """Return which KV head each query head of model_gqa uses, and the bytes of a cached token."""
    gqa = model_module("model_gqa")
    config = gqa.GPTConfig(n_layer=1, n_head=n_head, n_embd=n_head, n_kv_head=n_kv_head)
    T = 2  # with one token, attend would decode
    q = torch.zeros(1, n_head, T, 1)
    v = torch.arange(float(n_kv_head)).repeat_interleave(T).view(1, n_kv_head, T, 1)
    y = gqa.CausalSelfAttention(config, layer=0).attend(q, torch.zeros_like(v), v)
    cache = gqa.KVCache(config, 1, 1, "cpu", torch.float32)
    return y[0, :, 0, 0].int().tolist(), cache.nbytes


# A training step ------------------------------------------------------------------------------

ROOT = "embeddings, norm"  # FSDP's root group; its matrix wte is the head, too
PARTS = (ROOT, "block 0", "block 1")
# What computes in a forward pass, and the part whose parameters it uses.
FORWARD = (
    ("embeddings", ROOT),
    ("block 0", "block 0"),
    ("block 1", "block 1"),
    ("norm, head and loss", ROOT),
)
BACKWARD = FORWARD[::-1]
MICRO_STEPS = 2


@dataclass
class Moment:
    """A part of the model computes, or the ranks exchange a number; what a rank holds meanwhile."""

    phase: str  # such as "micro-step 0, forward"
    computes: str | None = None
    part: str | None = None  # whose parameters are used
    before: list = field(default_factory=list)  # collectives (name, what) that begin before it
    after: list = field(default_factory=list)  # collectives that begin after it
    gathered: set = field(default_factory=set)  # FSDP: parts with full parameters on every rank
    own: set = field(default_factory=set)  # parts with the gradient of the rank's own sequences
    mean: set = field(default_factory=set)  # parts with the mean of all ranks' gradients


def training_step(fsdp):
    """Return the Moments of a step of two micro-steps, under DDP or FSDP.

    They are the same for all ranks, and as many for DDP as for FSDP. DDP has a bucket of gradients
    for each part here; in a run, the size of a bucket is a number of bytes.
    """
    moments = [Moment("before the step")]
    own = set()
    for micro_step in range(MICRO_STEPS):
        is_last = micro_step == MICRO_STEPS - 1
        if micro_step > 0:
            stop = [("all-reduce", "stop?")]
            moments.append(Moment("did a rank get a signal to stop?", after=stop, own=set(PARTS)))
        moments += forward_pass(fsdp, f"micro-step {micro_step}, forward", own)
        moments += backward_pass(fsdp, f"micro-step {micro_step}, backward", own, is_last)
    norm = [("all-reduce", "norm")] if fsdp else []  # with DDP every rank has the full gradient
    moments.append(Moment("norm of the gradient", after=norm, mean=set(PARTS)))
    loss = [("all-reduce", "loss")]
    moments.append(Moment("mean of the ranks' losses", after=loss, mean=set(PARTS)))
    moments.append(Moment("optimizer step: a rank updates what it keeps", mean=set(PARTS)))
    return moments


def forward_pass(fsdp, phase, own):
    """Return the Moments of a forward pass; FSDP gathers the root group once, and each block."""
    moments = []
    for computes, part in FORWARD:
        moment = Moment(phase, computes, part, own=set(own))
        if fsdp:
            moment.gathered = {ROOT, part}
            if computes != "norm, head and loss":  # ROOT is still gathered
                moment.before.append(("all-gather", part))
        moments.append(moment)
    return moments


def backward_pass(fsdp, phase, own, is_last):
    """Return the Moments of a backward pass, and add its gradients to `own`.

    FSDP gathers each block again, when what comes before it in this order begins. Only the last
    micro-step communicates gradients, as soon as those of a part are complete.
    """
    moments = []
    mean = set()
    following = [part for _, part in BACKWARD[1:]] + [ROOT]
    for (computes, part), next_part in zip(BACKWARD, following, strict=True):
        own.add(part)
        moment = Moment(phase, computes, part, own=own - mean, mean=set(mean))
        if fsdp:
            moment.gathered = {ROOT, part, next_part}
            if next_part != ROOT:
                moment.before.append(("all-gather", next_part))
        is_complete = computes != "norm, head and loss"  # the embeddings add to ROOT's gradient
        if is_last and is_complete:
            moment.after.append(("reduce-scatter" if fsdp else "all-reduce", part))
            mean.add(part)
        moments.append(moment)
    return moments
