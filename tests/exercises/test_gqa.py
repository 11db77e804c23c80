"""The idea of the exercise gqa: groups of query heads share a KV head."""

import pytest
import torch
from checks import (
    by_loops,
    check_device,
    check_dropout,
    check_equal,
    check_mask,
    check_scale,
    check_shape,
    random_qkv,
    with_shapes,
)
from exercises import missing, version_fixture
from oracles import copy_of_gpt_bigcode, gpt_bigcode
from variants import feed, last_logits, make_vivid, tokens

module = version_fixture("gqa")
H, G, D = 6, 2, 4  # query heads, KV heads, channels of a head
C = H * D
HEADS = H, G
CASES = {"training": (6, 6), "decode": (1, 6), "a chunk after cached tokens": (2, 6)}  # T, S
each_case = pytest.mark.parametrize("case", CASES)


def make(module, dropout=0.0):
    """Return an attention layer of 6 query heads and 2 KV heads, in evaluation mode."""
    config = module.GPTConfig(n_head=H, n_embd=C, n_kv_head=G, dropout=dropout)
    layer = module.CausalSelfAttention(config, layer=1).eval()
    layer.attend, layer.forward = with_shapes(layer.attend), with_shapes(layer.forward)
    return layer


# attend ---------------------------------------------------------------------------------------


def check_groups(case, what, used):
    """Fail with a sentence unless the 6 query heads use the KV heads 0, 0, 0, 1, 1, 1."""
    for head in range(H):
        group = head // (H // G)
        if not abs(used[head] - group) < 1e-3:
            first = group * (H // G)
            missing(
                f"{case}: query head {head} must use KV head {group}: heads {first} to "
                f"{first + H // G - 1} share it; but it uses the {what} of KV head {used[head]:.3g}"
            )


@each_case
def test_each_query_head_uses_the_values_of_its_group(module, case):
    T, S = CASES[case]
    v = torch.arange(G).view(1, G, 1, 1).expand(1, G, S, D).float()  # the number of the KV head
    y = make(module).attend(torch.zeros(1, H, T, D), torch.zeros(1, G, S, D), v)
    check_shape(f"{case}: the result of attend", y, "(B, H, T, D)", (1, H, T, D))
    check_groups(case, "values", y[0, :, -1, 0])


@each_case
def test_each_query_attends_to_its_own_key_and_those_before_it(module, case):
    check_mask(make(module).attend, HEADS, *CASES[case], case=f"{case}: ")


@each_case
def test_each_query_head_uses_the_keys_of_its_group(module, case):
    T, S = CASES[case]
    k = torch.zeros(1, G, S, D)
    for group in range(G):
        k[0, group, group] = 100.0  # KV head 0 attends to position 0, KV head 1 to position 1
    v = torch.arange(S).view(1, 1, S, 1).expand(1, G, S, D).float()  # the position
    y = make(module).attend(torch.ones(1, H, T, D), k, v)
    check_groups(case, "keys", y[0, :, -1, 0])


@each_case
def test_the_result_of_each_query_head_is_in_its_own_place(module, case):
    T, S = CASES[case]  # S is H: query head h attends to position h
    q = 100 * torch.eye(H).view(1, H, 1, H).expand(1, H, T, H)
    k = torch.eye(S).expand(1, G, S, S)
    v = torch.arange(S).view(1, 1, S, 1).expand(1, G, S, S).float()  # the position
    came = make(module).attend(q, k, v)[0, :, -1, 0]
    for head in range(H):
        if not abs(came[head] - head) < 1e-3:
            missing(
                f"{case}: the result of query head {head} must be that of its own query, "
                f"but is that of query head {came[head]:.3g}"
            )


@each_case
def test_scores_are_divided_by_the_root_of_the_head_dim(module, case):
    check_scale(make(module).attend, HEADS, *CASES[case])


@each_case
def test_probabilities_are_dropped_in_training_only(module, case):
    attention = make(module, dropout=0.5)
    check_dropout(attention, attention.attend, HEADS, *CASES[case])


@each_case
def test_masks_are_on_the_device_of_the_queries(module, case):
    check_device(make(module).attend, *random_qkv(HEADS, *CASES[case]))


@each_case
def test_attention_equals_a_loop_over_heads_and_queries(module, case):
    q, k, v = random_qkv(HEADS, *CASES[case])
    y = make(module).attend(q, k, v)
    check_equal(f"{case}: attend's result [row, head, query, channel]", y, by_loops(q, k, v))


# forward --------------------------------------------------------------------------------------


def numbered_attention(module):
    """Return a layer whose c_attn gives 100 * position + the number of the channel.

    Its attend records q, k and v in `layer.received`, and returns its q.
    """
    layer = make(module)
    with torch.no_grad():
        layer.c_attn.weight.zero_()[:, 0] = 100.0
        layer.c_attn.bias.copy_(torch.arange(C + 2 * G * D))

    def attend(q, k, v):
        layer.received = q, k, v
        return q

    layer.attend = attend
    return layer


def positions_as_input(B=2, T=3):
    """Return x (B, T, C) that is the number of the position."""
    return torch.arange(T).view(1, T, 1).expand(B, T, C).float()


NAMES = ("q", H, 0), ("k", G, C), ("v", G, C + G * D)  # name, heads, first channel of c_attn


def test_forward_splits_c_attn_into_heads(module):
    layer = numbered_attention(module)
    layer(positions_as_input())
    if not hasattr(layer, "received"):
        missing("forward must call self.attend(q, k, v)")
    for (name, heads, first), x in zip(NAMES, layer.received, strict=True):
        letters = "(B, H, T, D)" if name == "q" else "(B, G, T, D)"
        check_shape(f"{name}, which forward gives to attend,", x, letters, (2, heads, 3, D))
        for head in range(heads):
            channels = first + head * D + torch.arange(D)
            expected = 100 * torch.arange(3)[:, None] + channels  # (T, D)
            if not torch.equal(x[1, head], expected.float()):
                number = int((x[1, head] != expected).flatten().nonzero()[0])
                t, channel = divmod(number, D)
                position, came = divmod(int(x[1, head, t, channel]), 100)
                missing(
                    f"{name} of head {head} at position {t} must be channels {channels[0]} to "
                    f"{channels[-1]} of c_attn's output there, but its channel {channel} is "
                    f"channel {came} of position {position}"
                )


def test_forward_joins_the_heads_in_their_order(module):
    layer, received = numbered_attention(module), []
    layer.c_proj.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    y = layer(positions_as_input())
    if not received:
        missing("forward must apply self.c_proj to what attend returns")
    check_shape("the input of c_proj", received[0], "(B, T, C)", (2, 3, C))
    expected = 100 * torch.arange(3)[:, None] + torch.arange(C)  # (T, C)
    wrong = received[0][1] != expected
    if wrong.any():
        t, channel = wrong.nonzero()[0].tolist()
        came = int(received[0][1, t, channel]) % 100
        missing(
            f"channel {channel} of c_proj's input at position {t} must be channel {channel % D} "
            f"of head {channel // D} there, but it is channel {came % D} of head {came // D} of "
            f"position {int(received[0][1, t, channel]) // 100}"
        )
    check_shape("the result of forward", y, "(B, T, C)", (2, 3, C))


class RecordingCache:
    """A cache that records what it gets, and returns two earlier positions and that."""

    stored = None

    def extend(self, layer, k, v):
        self.stored = layer, k, v
        past = torch.full_like(k[:, :, :1], -1.0).expand(-1, -1, 2, -1)
        return torch.cat([past, k], dim=2), torch.cat([past, v], dim=2)


def test_the_cache_stores_kv_heads(module):
    layer, cache = numbered_attention(module), RecordingCache()
    layer(positions_as_input(), cache)
    if cache.stored is None:
        missing("with a cache, forward must call cache.extend(self.layer, k, v)")
    number, *stored = cache.stored
    if number != 1:
        missing(f"forward of layer 1 must call cache.extend(1, k, v), but its layer is {number}")
    for name, x in zip("kv", stored, strict=True):
        if x.dim() == 4 and x.size(1) == H:
            missing(
                f"the cache must store {G} KV heads, but {name} has {H} heads: "
                f"repeat them in attend, after the cache"
            )
        check_shape(f"{name}, which the cache stores,", x, "(B, G, T, D)", (2, G, 3, D))


def test_attend_gets_what_the_cache_returns(module):
    layer = numbered_attention(module)
    layer(positions_as_input(), RecordingCache())
    for name, x in zip("kv", layer.received[1:], strict=True):
        if x.size(2) == 3:
            missing(
                f"attend must get all 5 positions of {name} that cache.extend returns, "
                f"2 cached and 3 new, but gets the 3 new ones only"
            )
        check_shape(f"{name}, which forward gives to attend,", x, "(B, G, S, D)", (2, G, 5, D))
        if not (x[:, :, :2] == -1).all():
            missing(f"attend must get {name} as cache.extend returns it, cached positions first")


def test_forward_drops_its_output_in_training_only(module):
    layer = make(module, dropout=0.5)
    x = torch.randn(2, 3, C)
    zeros = [(layer.train(is_training)(x) == 0).float().mean() for is_training in (False, True)]
    if zeros[0] > 0:
        missing("forward drops outputs of c_proj in evaluation: use dropout in training only")
    if zeros[1] < 0.2:
        missing("forward must apply dropout to the output of c_proj in training")


# Independent computations ---------------------------------------------------------------------


def test_cached_logits_equal_those_without_cache(module):
    model, x = make_vivid(module), tokens(2, 16)
    cached = feed(model, model.make_cache(2), *x.split([5, 1, 1, 6, 3], dim=1))
    expected = last_logits(model, x)[:, [4, 5, 6, 12, 15]]
    check_equal("with a cache, logits [row, chunk, token id]", cached, expected)


def test_logits_with_one_kv_head_equal_those_of_transformers(module):
    theirs, x = gpt_bigcode(2, 3, 24, 17, 61), tokens(2, 17)
    ours = copy_of_gpt_bigcode(theirs, module)
    with torch.no_grad():
        logits, expected = ours(x), theirs(x).logits
    check_equal("against transformers, logits [row, position, token id]", logits, expected)
    cached = feed(ours, ours.make_cache(2), *x.split([6, 4, 1, 1, 5], dim=1))
    expected = expected[:, [5, 9, 10, 11, 16]]
    check_equal("with a cache, logits [row, chunk, token id]", cached, expected)
