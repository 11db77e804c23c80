"""What grouped-query attention promises: transformers' multi-query GPTBigCode, and model.py with repeated heads."""

import pytest
import torch
import torch.nn.functional as F
from test_variants import close, feed, make_vivid, tokens
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

import model
import model_gqa
import model_rope_gqa_swa

# transformers ---------------------------------------------------------------------------------

# n_layer, n_head, n_embd, block_size, vocab_size, T
SHAPES = [
    (1, 1, 4, 8, 11, 8),
    (2, 3, 24, 17, 61, 13),
    (3, 4, 32, 33, 101, 33),
    (2, 8, 64, 64, 257, 1),
]


def gpt_bigcode(n_layer, n_head, n_embd, block_size, vocab_size, attention="eager"):
    """transformers' GPTBigCode, one head of keys and values, every parameter random and large; no dropout."""
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        multi_query=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    theirs = GPTBigCodeForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return theirs


def copy_of(theirs):
    """model_gqa.py with the weights of GPTBigCode, which has its names and its orientation."""
    c = theirs.config
    config = model_gqa.GPTConfig(
        c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, n_kv_head=1
    )
    ours = model_gqa.GPT(config).eval()
    ours.load_state_dict({name: p.detach().clone() for name, p in theirs.named_parameters()})
    return ours


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_with_one_kv_head_equal_those_of_transformers(shape, attention):
    *shape, T = shape
    theirs = gpt_bigcode(*shape, attention=attention)
    x = tokens(3, T, vocab_size=shape[-1])
    with torch.no_grad():
        torch.testing.assert_close(copy_of(theirs)(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_with_one_kv_head_equal_those_of_transformers(shape):
    *shape, T = shape
    theirs = gpt_bigcode(*shape)
    ours, text = copy_of(theirs), tokens(3, T, vocab_size=shape[-1])
    x, y = text[:, :-1], text[:, 1:]
    ours(x, y).backward()
    F.cross_entropy(theirs(x).logits.transpose(1, 2), y).backward()
    gradients = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert (gradients[name].grad - p.grad).norm() < 1e-3 * p.grad.norm(), name


def test_cached_logits_with_one_kv_head_equal_those_of_transformers():
    theirs, x = gpt_bigcode(2, 3, 24, 17, 61), tokens(2, 17)
    ours = copy_of(theirs)
    cached = feed(ours, ours.make_cache(2), *x.split([6, 4, 1, 1, 5], dim=1))
    with torch.no_grad():
        torch.testing.assert_close(
            cached, theirs(x).logits[:, [5, 9, 10, 11, 16]], atol=1e-4, rtol=0
        )


# model.py -------------------------------------------------------------------------------------


def repeated(rows, n_head, n_kv_head):
    """The rows of c_attn (of q, k, v; weight or bias) with a head of keys and of values for each query head:
    query heads 0 .. n_head / n_kv_head - 1 share the first, and so on."""
    D = rows.size(0) // (n_head + 2 * n_kv_head)
    heads = list(rows.split(D))
    q, k, v = heads[:n_head], heads[n_head : n_head + n_kv_head], heads[n_head + n_kv_head :]
    group = n_head // n_kv_head
    return torch.cat(
        q + [k[h // group] for h in range(n_head)] + [v[h // group] for h in range(n_head)]
    )


def with_repeated_heads(ours):
    """model.py, computing what a model of model_gqa.py does."""
    c = ours.config
    state = ours.state_dict()
    for name in state:
        if "c_attn" in name:
            state[name] = repeated(state[name], c.n_head, c.n_kv_head)
    base = model.GPT(
        model.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    ).eval()
    base.load_state_dict(state)
    return base


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_logits_equal_those_of_model_py_with_heads_of_keys_and_values_repeated(n_kv_head):
    ours, x = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(3, 16)
    close(ours(x), with_repeated_heads(ours)(x))


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
def test_cached_logits_equal_those_of_model_py_with_repeated_kv_heads(n_kv_head):
    ours, x = make_vivid(model_gqa, n_head=6, n_embd=48, n_kv_head=n_kv_head), tokens(3, 16)
    base, chunks = with_repeated_heads(ours), x.split([4, 1, 1, 6, 1, 3], dim=1)
    close(feed(ours, ours.make_cache(3), *chunks), feed(base, base.make_cache(3), *chunks))


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_the_gradient_of_a_shared_head_is_the_sum_over_the_query_heads_that_share_it(n_kv_head):
    ours, x, y = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(3, 16), tokens(3, 16, seed=2)
    base = with_repeated_heads(ours)
    ours(x, y).backward()
    base(x, y).backward()
    for mine, its in zip(ours.transformer.h, base.transformer.h, strict=True):
        q, k, v = its.attn.c_attn.weight.grad.unflatten(0, (3, n_kv_head, 4 // n_kv_head, 8))
        expected = torch.cat(
            [q.flatten(0, 2), k.sum(dim=1).flatten(0, 1), v.sum(dim=1).flatten(0, 1)]
        )
        assert (mine.attn.c_attn.weight.grad - expected).norm() < 1e-3 * expected.norm()


def as_many_kv_heads():
    """model_gqa.py with n_kv_head = n_head and model.py, with the same weights."""
    ours = make_vivid(model_gqa, n_kv_head=4)
    c = ours.config
    base = model.GPT(
        model.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    ).eval()
    base.load_state_dict(ours.state_dict())
    return ours, base


def test_with_n_kv_head_equal_n_head_logits_equal_those_of_model_py():
    ours, base = as_many_kv_heads()
    x = tokens(3, 16)
    close(ours.train()(x), base.train()(x))


def test_with_n_kv_head_equal_n_head_cached_logits_equal_those_of_model_py():
    ours, base = as_many_kv_heads()
    chunks = tokens(3, 16).split([5, 1, 1, 4, 1, 4], dim=1)
    close(feed(ours, ours.make_cache(3), *chunks), feed(base, base.make_cache(3), *chunks))


def test_with_n_kv_head_equal_n_head_a_seed_initializes_as_in_model_py():
    config = dict(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    base = model.GPT(model.GPTConfig(**config)).state_dict()
    torch.manual_seed(0)
    ours = model_gqa.GPT(model_gqa.GPTConfig(**config, n_kv_head=2)).state_dict()
    assert list(ours) == list(base) and all(torch.equal(ours[name], base[name]) for name in base)


# One token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("B", [1, 3])
def test_a_single_token_has_the_logits_that_it_has_as_the_last_of_two(B, n_kv_head):
    ours, x = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(B, 9)
    alone = feed(ours, ours.make_cache(B), x[:, :7], x[:, 7:8], x[:, 8:9])
    together = feed(ours, ours.make_cache(B), x[:, :7], x[:, 7:9])
    close(alone[:, -1], together[:, -1])


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_the_first_token_has_the_logits_that_it_has_in_a_longer_sequence(n_kv_head):
    ours, x = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(3, 9)
    close(ours(x[:, :1]), ours(x)[:, :1])


@pytest.mark.parametrize(
    "module", [model_gqa, model_rope_gqa_swa], ids=lambda module: module.__name__
)
def test_a_single_query_is_not_masked(module, monkeypatch):
    """Its rows are the queries of a group, to which is_causal must not apply."""
    ours, x = make_vivid(module, n_kv_head=2), tokens(2, 3)
    calls, attention = [], F.scaled_dot_product_attention

    def noting(q, k, v, **how):
        calls.append((q.size(2), k.size(2), how.get("is_causal", False), how.get("attn_mask")))
        return attention(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    feed(ours, ours.make_cache(2), *x.split(1, dim=1))
    group = ours.config.n_head // 2
    assert calls == [
        (group, keys, False, None) for keys in (1, 2, 3) for _ in range(ours.config.n_layer)
    ]


# The cache ------------------------------------------------------------------------------------


def test_the_cache_of_4_of_12_heads_is_a_third_of_model_py_s():
    with torch.device("meta"):
        ours, base = model_gqa.GPT(model_gqa.GPTConfig()), model.GPT(model.GPTConfig())
    by_hand = (
        2 * 12 * 1024 * 12 * 64 * 4
    )  # keys and values, layers, tokens, heads, head size, bytes of float32
    assert base.make_cache(1).nbytes == by_hand
    assert ours.make_cache(1).nbytes == by_hand // 3


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 4, 6, 12])
def test_the_bytes_of_the_cache_are_proportional_to_n_kv_head(n_kv_head):
    with torch.device("meta"):
        ours = model_gqa.GPT(model_gqa.GPTConfig(n_kv_head=n_kv_head, n_layer=2))
    assert ours.make_cache(5).nbytes == n_kv_head * 2 * 2 * 5 * 1024 * 64 * 4


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_head", [12, 7])
def test_an_n_kv_head_that_does_not_divide_n_head_is_refused(n_head):
    for n_kv_head in {5, n_head + 1, 2 * n_head}:
        with pytest.raises(ValueError) as error:
            model_gqa.GPTConfig(n_head=n_head, n_embd=84, n_kv_head=n_kv_head)
        assert f" n_head={n_head}" in str(error.value) and f"n_kv_head={n_kv_head}" in str(
            error.value
        )


def test_every_n_kv_head_that_divides_n_head_is_accepted():
    for n_kv_head in (1, 2, 3, 4, 6, 12):
        assert model_gqa.GPTConfig(n_kv_head=n_kv_head).n_kv_head == n_kv_head
