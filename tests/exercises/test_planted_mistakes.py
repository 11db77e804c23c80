"""The first test that fails names a mistake in one sentence: our code, with mistakes planted in it.

The tests of an idea run in their order on the file of an exercise with our lines and one change.
"""

import pytest
from ideas import failures, load, solved

# exercise: what is replaced, by what, and a part of the sentence of the first test that fails
PLANTED = {
    "cache": [
        (
            "self.pos : end] =",
            ":T] =",
            "positions 3 4 2 - - -, but must be those of 0 1 2 3 4 -",
        ),
        ("        return self", "        self.pos = end\n        return self", "pos from 0 to 3"),
        (
            "return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]",
            "return k, v",
            "positions 3 4, but must be those of 0 1 2 3 4: the 3 cached tokens, then the 2 new",
        ),
        (":B, :, :end]", ":B]", "positions 0 1 2 - - -, but must be those of 0 1 2:"),
        ("self.pos : end] = v", "self.pos : end] = k", "keys are where values must be"),
        ("layer, :, :, self", "0, :, :, self", "layer 1 has 2 tokens"),
        ("layer, :, :, self", "layer, :B, :, self", "a batch of 1 is stored in every row"),
        (":B, :, :end]", ":, :, :end]", "must be (B, H, S, D) = (1, 2, S, 4), but is (3, 2, 2, 4)"),
        ("if end > self.max_len", "if T > self.max_len", "2 tokens at pos = 5 do not fit"),
    ],
    "rope": [
        (
            "a, b = x.chunk(2, dim=-1)",
            "a, b = x[..., 0::2], x[..., 1::2]",
            "must move channel 1 to 5, but move it to 0: channels i and i + D/2 are a pair",
        ),
        (
            "torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)",
            "torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
            "must make channel 4 +1 times channel 0, but make it -1 times that",
        ),
        ("return rotated.to", "rotated.to", "must be a tensor, but is None: a return is missing"),
        ("rotated.to(x.dtype)", "rotated", "must be bfloat16, but is float32"),
        (
            "a, b = x.chunk(2, dim=-1)",
            "a, b, cos, sin = *x.chunk(2, dim=-1), cos.to(x.dtype), sin.to(x.dtype)",
            "compute with the float32 cos and sin",
        ),
        (
            "angles = positions[:, None]",
            "angles = torch.arange(len(positions), device=positions.device)[:, None]",
            "must go on from position 5, but begin at 0",
        ),
        (
            "dtype=torch.float32",
            "dtype=self.transformer.wte.weight.dtype",
            "a bfloat16 model: cos must be float32 in every dtype, but is bfloat16",
        ),
        (
            "positions[:, None] * frequencies",
            "positions[:, None].float() @ frequencies[None]",
            "autocast to bfloat16: cos must be float32 in every dtype, but is bfloat16",
        ),
        (
            "angles = positions[:, None]",
            "angles = positions.to(self.transformer.wte.weight.dtype)[:, None]",
            "a bfloat16 model: the angles of position 257 are rounded",
        ),
        ("-2 * pair / D", "-pair / D", "pair 1 must rotate by rope_theta^(-2i / D) = 10000^(-2/8)"),
        ("self.config.rope_theta", "10000.0", "= 100^(-2/8) = 0.3162 radians, but rotates by 0.1"),
        (
            "self.config.n_embd // self.config.n_head",
            "self.config.n_embd",
            "cos of rope_angles must be (T, D/2) = (3, 4), but is (3, 8)",
        ),
        ("angles.cos(), angles.sin()", "angles.sin(), angles.cos()", "must return cos, then sin"),
        ("device=positions.device, ", "", "rope_angles makes a tensor on the CPU"),
    ],
    "gqa": [
        (
            "repeat_interleave(H // G, dim=1)",
            "repeat(1, H // G, 1, 1)",
            "training: query head 1 must use KV head 0: heads 0 to 2 share it",
        ),
        # `repeat` everywhere, decode too
        (
            "if T == 1:",
            "k, v = k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1)\n        G = H\n"
            "        if T == 1:",
            "training: query head 1 must use KV head 0: heads 0 to 2 share it",
        ),
        # in decode alone
        (
            "q = q.reshape(B, G, H // G, D)",
            "q, k, v = q, k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1)",
            "decode: query head 1 must use KV head 0: heads 0 to 2 share it",
        ),
        (
            "v = v.repeat_interleave(H // G, dim=1)",
            "v = v.repeat(1, H // G, 1, 1)",
            "it uses the values of KV head 1",
        ),
        (
            "k = k.repeat_interleave(H // G, dim=1)",
            "k = k.repeat(1, H // G, 1, 1)",
            "it uses the keys of KV head 1",
        ),
        (
            "q = q.reshape(B, G, H // G, D)",
            "q = q.reshape(B, H // G, G, D).transpose(1, 2)",
            "decode: the result of query head 1 must be that of its own query",
        ),
        ("if T == S:", "if True:", "does not attend to key 1, but must attend to keys 0 to 4"),
        (
            "torch.arange(S - T, S, device=q.device)",
            "torch.arange(T, device=q.device)",
            "the queries are at the last 2 of the 6 positions",
        ),
        ("is_causal=True", "is_causal=False", "at position 0 attends to key 1, which comes later"),
        ("p=dropout", "p=dropout, scale=1.0", "the scores must be divided by sqrt(D): with D = 6"),
        (
            "self.dropout if self.training else 0.0",
            "self.dropout",
            "attention drops probabilities in evaluation",
        ),
        (
            "self.dropout if self.training else 0.0",
            "0.0",
            "attention drops no probability in training",
        ),
        ("torch.arange(S, device=q.device)", "torch.arange(S)", "attend makes a tensor on the CPU"),
        # a cache that stores repeated heads
        (
            "k, v = cache.extend(self.layer, k, v)",
            "k, v = [x.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for x in (k, v)]\n"
            "            k, v = cache.extend(self.layer, k, v)",
            "the cache must store 2 KV heads, but k has 6 heads",
        ),
        ("cache.extend(self.layer", "cache.extend(0", "must call cache.extend(1, k, v)"),
        ("k, v = cache.extend", "cache.extend", "gets the 3 new ones only"),
        (
            "k = k.view(B, T, self.n_kv_head, -1).transpose(1, 2)",
            "k = k.reshape(B, self.n_kv_head, T, -1)",
            "k of head 0 at position 1 must be channels 24 to 27 of c_attn's output there",
        ),
        (
            "self.n_kv_head, -1).transpose(1, 2)",
            "self.n_kv_head, -1)",
            "must be (B, G, T, D) = (2, 2, 3, 4), but is (2, 3, 2, 4)",
        ),
        ("y.transpose(1, 2).reshape", "y.reshape", "must be channel 0 of head 1 there"),
        (
            "F.dropout(self.c_proj(y), self.dropout, self.training)",
            "self.c_proj(y)",
            "must apply dropout to the output of c_proj in training",
        ),
    ],
    "window": [
        (
            "i - W < j",
            "i - W <= j",
            "position 3 attends to key 0, which has left the window: its window is keys 1 to 3",
        ),
        ("i - W < j", "i - W + 1 < j", "position 2 does not attend to key 0"),
        ("j <= i", "j <= i + 1", "the query at position 0 attends to key 1, which comes later"),
        ("if T == S <= W", "if T == S", "attends to key 0, which has left the window"),
        (
            "torch.arange(S - T, S, device=q.device)",
            "torch.arange(T, device=q.device)",
            "after 2 cached tokens, does not attend to key 1, but must attend to keys 0 to 2",
        ),
        (
            "(i - W < j) & (j <= i)",
            "(i - W - int(S > T) < j) & (j <= i)",
            "the query at position 3, after 2 cached tokens, attends to key 0, which has left",
        ),
        (
            "dropout = self.dropout if self.training else 0.0\n        if T == S",
            "dropout = 0.0\n        if T == S",
            "with 3 queries and 3 keys attention drops no probability in training",
        ),
        (
            "torch.arange(S, device=q.device)",
            "torch.arange(S)",
            "attend_dense makes a tensor on the CPU",
        ),
    ],
    "ring": [
        (
            "self.pos % slots",
            "(self.pos + 1) % slots",
            "after position 0: the keys are those of positions - 0 -, but must be those of 0 - -",
        ),
        (
            "last % slots",
            "(last + 1) % slots",
            "a first chunk of 2: the keys are those of positions - 0 1, but must be those of 0 1 -",
        ),
        (
            "self.pos % slots]",
            "min(self.pos, slots - 1)]",
            "positions 0 1 3, but must be those of 3 1 2: position p is in slot p % 3",
        ),
        (
            "return layer_k[:B, :, :end], layer_v[:B, :, :end]",
            "return layer_k[:B], layer_v[:B]",
            "positions 0 - -, but must be those of 0: the token attends to all slots in use",
        ),
        ("return keys, values", "return k, v", "positions 1 2, but must be those of 0 1 2"),
        (
            "return keys, values",
            "return layer_k[:B, :, :end], layer_v[:B, :, :end]",
            "positions 6 4 5, but must be those of 0 1 2 3 4 5 6: its first queries attend to",
        ),
        (
            "self.pos - slots + 1)",
            "self.pos - slots)",
            "positions 0 1 2 3 4, but must be those of 1 2 3 4: in this order, since its first",
        ),
        (
            "past % slots",
            "torch.arange(len(past))",
            "positions 0 1 3 4, but must be those of 1 2 3 4",
        ),
        # the new tokens are stored before the past is read
        (
            "        past = ",
            "        stored = torch.arange(max(self.pos, end - slots), end)\n"
            "        layer_k[:, :, stored % slots] = k[:, :, -slots:]\n"
            "        layer_v[:, :, stored % slots] = v[:, :, -slots:]\n"
            "        past = ",
            "read them before they are replaced",
        ),
        ("if end > self.max_len", "if False", "5 tokens at pos = 0 do not fit into max_len = 4"),
        ("self.k[layer], self.v[layer]", "self.k[0], self.v[0]", "layer 1 alone was extended"),
        (
            "self.k[layer], self.v[layer]",
            "self.k[layer, :B], self.v[layer, :B]",
            "row 1 after a chunk of 1: the keys are those of positions - - -",
        ),
    ],
    "blocks": [
        (
            "n_before = (window - 1 + size - 1) // size",
            "n_before = (window - 1) // size",
            "the query at position 6 does not attend to key 0, but must attend to keys 0 to 6",
        ),
        (
            "n_before = (window - 1 + size - 1) // size",
            "n_before = min(window - 1, 1)",
            "(size = 256, n_before = 2): the query at position",
        ),
        ("if n_blocks < 1", "if True", "computes 65,536 scores, but at most 32,768 are needed"),
        (
            "n_blocks = min(T, S - n_before * size) // size",
            "n_blocks = T // size",
            "need keys at 128 positions: leave more of the first queries over",
        ),
        (
            "torch.cat([y_rest, y], dim=2)",
            "torch.cat([y, y_rest], dim=2)",
            "the query at position 0 does not attend to key 0",
        ),
        (
            "torch.cat([y_rest, y], dim=2)",
            "y",
            "must be (B, H, T, D) = (1, 1, 128, 128), but is (1, 1, 64, 128)",
        ),
        (
            "k[:, :, :S_rest], v[:, :, :S_rest]",
            "k[:, :, :T_rest], v[:, :, :T_rest]",
            "the query at position 63, after 63 cached tokens, does not attend to key 1",
        ),
        (
            "q[:, :, T_rest:].unflatten",
            "q[:, :, : n_blocks * size].unflatten",
            "the result of the query at position 64 must be that of its own query",
        ),
        (
            "y = y.reshape(B, H, n_blocks * size, D)",
            "y = y.reshape(H, B, n_blocks * size, D).transpose(0, 1)",
            "query 64 of row 0, head 1 gets values of row 0, head 2",
        ),
    ],
}
ROWS = [(name, *row) for name, rows in PLANTED.items() for row in rows]


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"), ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)]
)
def test_the_first_failing_test_names_the_mistake(name, old, new, sentence, tmp_path):
    text = solved(name)
    assert old in text
    first = next(failures(name, load(text.replace(old, new), tmp_path)), None)
    assert isinstance(first, pytest.fail.Exception), repr(first)
    assert sentence in str(first)
    assert "\n" not in str(first)
