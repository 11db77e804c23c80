"""What do the model files compute? Functions that find out by calling them, for the explorer.

Each function has the arguments and the result of the function of that name in docs/explorer.html,
but no formula of it: a mask, for example, is what attend does to one-hot values. A window, or a
number of slots, that is None means a model without windows. In a `with make_mistakes(...)` block
the model files contain mistakes, as in docs/BREAK_IT.md.
"""

import contextlib
import importlib
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # many ranks in one process
from torch.utils._python_dispatch import TorchDispatchMode

from common.models import model_module
from experiments.drawing_data import group_heads
from tools import estimate_memory

CPU = torch.device("cpu")

# Mistakes -------------------------------------------------------------------------------------

INTERLEAVED = (
    ("a, b = x.chunk(2, dim=-1)", "a, b = x[..., 0::2], x[..., 1::2]"),
    (
        "torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)",
        "torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)",
    ),
)
ROUNDED = "(positions.bfloat16()[:, None] * frequencies).bfloat16().float()"
ALWAYS = "DistributedDataParallel)"  # no_sync in every micro-step, also in the last one
BLOCKS_SHARDED = """    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
"""
# {mistake: {module: edits (old, new) of its source}}
MISTAKES = {
    "lessOrEqual": {"model_swa": [("(i - W < j)", "(i - W <= j)")]},
    "topLeft": {
        "model": [("attn_mask=mask,", "is_causal=True,")],
        "model_swa": [("i = torch.arange(S - T, S,", "i = torch.arange(T,")],
    },
    "oneSlotOff": {"model_swa": [("self.pos % slots]", "(self.pos + 1) % slots]")]},
    "repeat": {"model_gqa": [("repeat_interleave(H // G, dim=1)", "repeat(1, H // G, 1, 1)")]},
    "bfloat16Angles": {"model_rope": [("positions[:, None] * frequencies", ROUNDED)]},
    "interleaved": {"model_rope": INTERLEAVED},
    "restart": {"model_rope": [("torch.arange(start, end,", "torch.arange(end - start,")]},
    "noSync": {"training.parallel": [("DistributedDataParallel) and not enabled", ALWAYS)]},
    "rootOnly": {"training.parallel": [(BLOCKS_SHARDED, "")]},
}


def edited_module(name, edits):
    """Return a new module from the source of the module `name`, with each old text replaced."""
    original = importlib.import_module(name)
    source = Path(original.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        if old not in source:
            raise ValueError(f"{name}.py has no text {old!r}, which a mistake replaces")
        source = source.replace(old, new)
    module = types.ModuleType(name)
    exec(compile(source, original.__file__, "exec"), vars(module))
    return module


@contextlib.contextmanager
def make_mistakes(mistakes):
    """Let imports in a `with` block find modules with these mistakes, {name: True}."""
    edits = {}
    for mistake in mistakes:
        for name, replacements in MISTAKES[mistake].items():
            edits.setdefault(name, []).extend(replacements)
    edited = {name: edited_module(name, replacements) for name, replacements in edits.items()}
    originals = {name: sys.modules[name] for name in edited}
    sys.modules.update(edited)
    try:
        yield
    finally:
        sys.modules.update(originals)


# Calls of torch -------------------------------------------------------------------------------


class Calls(TorchFunctionMode):
    """Collects the arguments of all calls of a torch function in a `with` block."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ == self.name:
            self.calls.append((args, kwargs))
        return func(*args, **kwargs)


# Masks, receptive fields, caches, angles ------------------------------------------------------


def one_head(window, head_dim):
    """Return the module of a model with or without windows, and a GPTConfig with one head."""
    options = {"n_layer": 1, "n_head": 1, "n_embd": head_dim}
    if window is None:
        module = model_module("model")
        return module, module.GPTConfig(**options)
    module = model_module("model_swa")
    return module, module.GPTConfig(**options, window=window)


def attention_mask(T, cached, window):
    """Return a bool matrix (T, cached + T): to which positions attend gives weight."""
    S = cached + T
    module, config = one_head(window, S)
    cache = module.KVCache(config, 1, S, CPU, torch.float32)
    values = torch.eye(S).view(1, 1, S, S)  # each position has a channel
    if cached:
        cache.extend(0, values[:, :, :cached], values[:, :, :cached])
        cache.pos = cached
    k, v = cache.extend(0, values[:, :, cached:], values[:, :, cached:])
    q = torch.zeros(1, 1, T, S)
    y = module.CausalSelfAttention(config, layer=0).attend(q, torch.zeros_like(k), v)
    return y[0, 0] > 0


def attends(i, j, window):
    return attention_mask(max(i, j) + 1, 0, window)[i, j].item()


def mask_of(T, cached, window):
    return attention_mask(T, cached, window).tolist()


def ring_after(slots, chunks):
    total = sum(chunks)
    module, config = one_head(slots, 1)
    cache = module.KVCache(config, 1, max(total, slots or 0), CPU, torch.float32)
    states = []
    for tokens in chunks:
        # The key of a token is its position + 1, because an empty slot holds 0.
        keys = 1.0 + torch.arange(cache.pos, cache.pos + tokens).view(1, 1, tokens, 1)
        returned, _ = cache.extend(0, keys, keys)
        cache.pos += tokens
        held = cache.k if slots else cache.k[:, :, :, : cache.pos]
        states.append({"slots": positions_of(held), "returned": positions_of(returned)})
    return states


def positions_of(keys):
    return [key - 1 if key else None for key in keys.flatten().int().tolist()]


def keys_held(T, cached, window):
    chunks = [cached, T] if cached else [T]
    return sorted(ring_after(window, chunks)[-1]["returned"])


def computed_scores(T, window, method):
    """Return the calls of torch's attention by a method of model_swa, as the page's blocks."""
    module, config = one_head(window or T, 1)
    attention = module.CausalSelfAttention(config, layer=0)
    positions = torch.arange(float(T)).view(1, 1, T, 1)
    with Calls("scaled_dot_product_attention") as recorder:
        getattr(attention, method)(positions, positions, positions)
    blocks = []
    for (q, k, _), options in recorder.calls:
        for queries, keys in zip(q[0, :, :, 0], k[0, :, :, 0], strict=True):
            blocks.append(
                {
                    "firstQuery": int(queries[0]),
                    "queries": len(queries),
                    "firstKey": int(keys[0]),
                    "keys": len(keys),
                    "isCausal": options.get("is_causal", False),
                }
            )
    return sorted(blocks, key=lambda block: block["firstQuery"])


def computed_blocks(T, window):
    return computed_scores(T, window, "attend")


def count_scores(T, window):
    def area(method):
        blocks = computed_scores(T, window, method)
        return sum(block["queries"] * block["keys"] for block in blocks)

    return {
        "needed": attention_mask(T, 0, window).sum().item(),
        "dense": area("attend_dense"),
        "causal": attention_mask(T, 0, None).sum().item(),
        "blocks": area("attend"),
    }


def receptive_field(T, window, layers, full_every, output):
    """Which inputs of each layer, from the last to the first, have a gradient."""
    torch.manual_seed(0)
    swa = model_module("model_swa")
    options = {"n_layer": layers, "n_head": 1, "n_embd": 8, "vocab_size": 5, "block_size": T}
    model = swa.GPT(swa.GPTConfig(**options, window=window or T)).double()
    inputs = []
    for number, block in enumerate(model.transformer.h, start=1):
        if full_every and number % full_every == 0:
            block.attn.window = T
        block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    logits = model(torch.zeros(1, T, dtype=torch.int64))
    gradients = torch.autograd.grad(logits[0, output, 0], inputs)  # (1, T, C) each
    return [(gradient[0].abs().sum(1) > 0).tolist() for gradient in reversed(gradients)]


def head_of(query_head, heads, kv_heads):
    used, _ = group_heads(heads, kv_heads)
    return used[query_head]


def cache_bytes(setup):
    window = setup["window"]
    options = {
        "n_layer": setup["layers"],
        "n_head": setup["kvHeads"],  # the number of query heads does not matter
        "n_kv_head": setup["kvHeads"],
        "n_embd": setup["kvHeads"] * setup["headDim"],
    }
    name = "model_gqa" if window is None else "model_rope_gqa_swa"
    options |= {} if window is None else {"window": window}
    module = model_module(name)
    dtype = {4: torch.float32, 2: torch.bfloat16}[setup["bytes"]]
    config = module.GPTConfig(**options)
    return module.KVCache(config, 1, setup["tokens"], torch.device("meta"), dtype).nbytes


def make_model(shape, device="meta"):
    """Return a model of a shape of the page: the model file that has its changes."""
    is_grouped = shape["kvHeads"] < shape["heads"]
    names = {
        (False, False): "model",
        (True, False): "model_rope",
        (False, True): "model_gqa",
        (True, True): "model_rope_gqa_swa",
    }
    module = model_module(names[shape["rope"], is_grouped])
    options = {
        "n_layer": shape["layers"],
        "n_head": shape["heads"],
        "n_embd": shape["heads"] * shape["headDim"],
        "vocab_size": shape["vocabSize"],
        "block_size": shape["blockSize"],
    }
    options |= {"n_kv_head": shape["kvHeads"]} if is_grouped else {}
    with torch.device(device):
        return module.GPT(module.GPTConfig(**options))


def parameters(shape):
    return sum(p.numel() for p in make_model(shape).parameters())


def bfloat16(x):
    return torch.tensor(x).bfloat16().item()


def rope_model(head_dim, theta):
    """Return the module model_rope, and a model of one layer with one head."""
    rope = model_module("model_rope")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": head_dim, "vocab_size": 1}
    return rope, rope.GPT(rope.GPTConfig(**shape, rope_theta=theta))


def angle(position, pair, head_dim, theta):
    _, model = rope_model(head_dim, theta)
    with Calls("cos") as recorder:
        model.rope_angles(torch.tensor([position]))
    [((angles,), _)] = recorder.calls  # (1, D/2)
    return angles[0, pair].item()


def rotate(x, position, theta):
    rope, model = rope_model(len(x), theta)
    cos, sin = model.rope_angles(torch.tensor([position]))
    return rope.rotate(torch.tensor(x).view(1, 1, 1, -1), cos, sin).flatten().tolist()


@torch.inference_mode()
def score(q, k, m, n, theta):
    """The score of a query that is decoded at position m, after a prompt of m tokens."""
    rope, model = rope_model(len(q), theta)
    block = model.transformer.h[0]
    angles = []  # cos and sin (1, D/2) of each position, as GPT.forward gives them to the block

    def record(module, arguments):
        _, cos, sin, _ = arguments
        angles.extend(zip(cos.split(1), sin.split(1), strict=True))

    block.register_forward_pre_hook(record)
    cache = model.make_cache(1, m + 1)
    if m > 0:
        model(torch.zeros(1, m, dtype=torch.int64), cache=cache)
    model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    query = rope.rotate(torch.tensor(q).double().view(1, 1, 1, -1), *angles[m])
    key = rope.rotate(torch.tensor(k).double().view(1, 1, 1, -1), *angles[n])
    # Beside a key of zeros, whose score is 0, softmax gives the key the weight sigmoid(score).
    keys = torch.cat([key, torch.zeros_like(key)], dim=2)
    values = torch.zeros_like(keys)
    values[0, 0, 0] = 1.0
    weight = block.attn.attend(query, keys, values)[0, 0, 0, 0]
    return torch.logit(weight).item()


# One training step ----------------------------------------------------------------------------


def camel_case(name):
    """Return the page's name of a row of tools/estimate_memory.py."""
    first, *others = name.removesuffix(" without activations").split()
    return first + "".join(word.capitalize() for word in others)


def step_bytes(setup):
    model = make_model(setup)
    dtype = getattr(torch, setup["dtype"])
    ranks = 1 if setup["mode"] == "one" else setup["ranks"]
    config = estimate_memory.EstimateConfig(world_size=ranks, micro_steps=setup["microSteps"])
    if setup["mode"] == "fsdp":
        column = estimate_memory.estimate_fsdp(model, config, dtype, ranks)
    else:
        column = estimate_memory.estimate_ddp(model, config, dtype)
    return {camel_case(name): value for name, value in estimate_memory.add_total(column).items()}


COLLECTIVES = {  # {operator: (what it does, which argument is the rank's shard)}
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 0),
}


class Collectives(TorchDispatchMode):
    """Calls record(what it does, the shard) for each collective of FSDP in a `with` block."""

    def __init__(self, record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in COLLECTIVES:
            does, argument = COLLECTIVES[func.name()]
            self.record(does, args[argument])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def process_group(ranks):
    """Make a process group whose ranks are all this process; its collectives transfer nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield SimpleNamespace(world_size=ranks)
    finally:
        dist.destroy_process_group()


class Step:
    """What rank 0 computes and sends in a step, as lines "microStep phase does part bytes".

    part is "root", "block 0", ..., or "all". A parameter of block i has the value i + 1, one of the
    root group 0, so that a gathered shard shows where it comes from.
    """

    def __init__(self, setup):
        self.setup = setup
        self.ranks = 1 if setup["mode"] == "one" else setup["ranks"]
        self.dtype = getattr(torch, setup["dtype"])
        self.parallel = importlib.import_module("training.parallel")
        self.model = make_model(setup, "cpu")
        self.parts = ["root", *(f"block {i}" for i in range(setup["layers"]))]
        self.shard_of_all = estimate_memory.shard_numel(self.model.parameters(), self.ranks)
        self.lines = []
        self.computed = None  # the part that was computed last

    def record(self, does, part, sent=0):
        self.lines.append(f"{self.micro_step} {self.phase} {does} {part} {sent:.0f}")

    def prepare(self, group):
        """Fill the model with the numbers of its parts, wrap it, and watch what it computes."""
        transformer = self.model.transformer
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
            for i, block in enumerate(transformer.h):
                for p in block.parameters():
                    p.fill_(i + 1)
        self.wrapped = self.model
        if self.setup["mode"] == "fsdp":
            self.parallel.shard_model(self.model, group, CPU, self.dtype, 0)
        elif self.setup["mode"] == "ddp":
            self.wrapped = self.parallel.wrap_ddp(self.model, CPU)
            self.wrapped.register_comm_hook(None, self.on_all_reduce)
        self.watch(transformer.wte, "root")
        for block, part in zip(transformer.h, self.parts[1:], strict=True):
            self.watch(block.ln_1, part)
        self.watch(transformer.ln_f, "root")

    def watch(self, module, part):
        """Record when a module computes its output, and when the gradient of that is computed."""

        def on_compute(*_):
            self.computed = part
            self.record("compute", part)

        def on_forward(module, arguments, output):
            on_compute()
            output.register_hook(on_compute)

        module.register_forward_hook(on_forward)

    def on_all_reduce(self, _, bucket):
        """Take the place of DDP's all-reduce, of which a ring sends the bucket almost twice."""
        sent = 2 * (self.ranks - 1) / self.ranks * bucket.buffer().nbytes
        self.record("all-reduce", "all", sent)
        reduced = torch.futures.Future()
        reduced.set_result(bucket.buffer())
        return reduced

    def on_collective(self, does, shard):
        """Record a collective of FSDP, of which the rank has a shard."""
        if shard.numel() == self.shard_of_all:
            part = "all"
        elif does == "all-gather":
            part = self.parts[int(shard[0])]
        else:  # gradients are reduced when they have been computed
            part = self.computed
        self.record(does, part, (self.ranks - 1) * shard.nbytes)

    def run(self):
        """Take a step without the optimizer, as train_step of train.py does."""
        tokens = torch.zeros(1, self.setup["blockSize"], dtype=torch.int64)
        last = self.setup["microSteps"] - 1
        for self.micro_step in range(last + 1):
            with self.parallel.gradient_sync(self.wrapped, enabled=self.micro_step == last):
                self.phase = "forward"
                loss = self.wrapped(tokens, tokens)
                self.phase = "backward"
                loss.backward()


def step_events(setup):
    with process_group(setup["ranks"]) as group:
        step = Step(setup)
        step.prepare(group)
        with Collectives(step.on_collective):
            step.run()  # in their first step the wrappers set themselves up
            step.lines.clear()
            step.run()
    return step.lines
