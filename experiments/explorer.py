"""What do the model files compute? Constants and results for docs/explorer.html.

    python -m experiments.explorer

The page has the same things in JavaScript, so that a reader can move them. This program calls the
model files, training/parallel.py and tools/estimate_memory.py, and writes what they return into the
page, as cases [function, arguments, result]. The page compares its functions with all cases when it
is opened, and tests/tools/test_explorer.py does in node. No formula of the page is repeated here:
an attention mask, for example, is what attend does to one-hot values.

The page also has switches that make mistakes. Their cases come from copies of the model files in
which a text is replaced (MISTAKES), as in docs/BREAK_IT.md.
"""

import contextlib
import importlib
import json
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # many ranks in one process
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import run_program
from common.models import make_config, model_module, models_with_option
from configurator import configure, configure_with_model
from experiments.drawings import group_heads
from experiments.intervals import interval_of, paired_difference
from experiments.quality import final_losses
from experiments.report import read_experiment
from experiments.runs import variants
from tools import estimate_memory

PAGE = Path("docs/explorer.html")
BLOCK = re.compile(r'(<script type="application/json" id="data">\n).*?(</script>)', re.DOTALL)
CPU = torch.device("cpu")
IN_FLOAT32 = ("angle", "rotate", "score")  # by the model files; the page computes in float64
QUALITY = ("cpu", "cpu_long", "cpu_long_gcide")  # presets of experiments/quality.py
CONFIGS = {  # of GPT-2's sizes
    "gpt2": "config/gpt2.py",
    "gpt2-medium": "config/gpt2_medium.py",
    "gpt2-large": "config/gpt2_large.py",
    "gpt2-xl": "config/gpt2_xl.py",
}


@dataclass
class ExplorerConfig:
    """No options."""


# Mistakes -------------------------------------------------------------------------------------

INTERLEAVED = (
    ("a, b = x.chunk(2, dim=-1)", "a, b = x[..., 0::2], x[..., 1::2]"),
    (
        "torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)",
        "torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)",
    ),
)
ROUNDED = "(positions.bfloat16()[:, None] * frequencies).bfloat16().float()"
NEVER = "DistributedDataParallel)"  # and so without a condition
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
    "noSync": {"training.parallel": [("DistributedDataParallel) and not enabled", NEVER)]},
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


# What the model files compute -----------------------------------------------------------------
#
# The functions below have the arguments of the page's functions, without `mistakes`. A window or a
# number of slots that is None means a model without windows.


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
    """Make a process group of ranks that are all in this process, and receive nothing."""
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


# The cases ------------------------------------------------------------------------------------

FUNCTIONS = {
    "angle": angle,
    "attends": attends,
    "bfloat16": bfloat16,
    "cacheBytes": cache_bytes,
    "computedBlocks": computed_blocks,
    "countScores": count_scores,
    "headOf": head_of,
    "keysHeld": keys_held,
    "maskOf": mask_of,
    "parameters": parameters,
    "receptiveField": receptive_field,
    "ringAfter": ring_after,
    "rotate": rotate,
    "score": score,
    "stepBytes": step_bytes,
    "stepEvents": step_events,
}


def vector(size, seed):
    """Return a list of random numbers with one digit behind the point."""
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return [round(number, 1) for number in numbers.tolist()]


def cache_setup(layers, kv_heads, head_dim, tokens, window, bytes_per_number):
    return {
        "layers": layers,
        "kvHeads": kv_heads,
        "headDim": head_dim,
        "tokens": tokens,
        "window": window,
        "bytes": bytes_per_number,
    }


def shape(layers, heads, kv_heads, head_dim, vocab_size, block_size, rope=False):
    return {
        "layers": layers,
        "heads": heads,
        "kvHeads": kv_heads,
        "headDim": head_dim,
        "vocabSize": vocab_size,
        "blockSize": block_size,
        "rope": rope,
    }


def step_setup(mode, ranks, micro_steps, dtype, *model_shape):
    setup = {"mode": mode, "ranks": ranks, "microSteps": micro_steps, "dtype": dtype}
    return setup | shape(*model_shape)


GPT2 = (12, 12, 12, 64, 50257, 1024)
SMALL = (2, 2, 2, 4, 33, 8)  # 2, 4 and 8 ranks split 33 and 9 unevenly

# {function: [arguments]}
ARGUMENTS = {
    "attends": [
        *((i, j, 4) for i, j in ((0, 0), (3, 0), (4, 0), (7, 4), (7, 3), (2, 5))),
        *((i, j, None) for i, j in ((0, 0), (9, 0), (2, 3))),
        (5, 5, 1),
        (5, 4, 1),
        (7, 3, 4, {"lessOrEqual": True}),
        (7, 2, 4, {"lessOrEqual": True}),
        (3, 4, 4, {"lessOrEqual": True}),
    ],
    "keysHeld": [
        *((T, 0, 4) for T in (1, 4, 9)),
        *((T, 5, 4) for T in (1, 3, 6)),
        *((T, 2, 4) for T in (1, 2)),
        *((T, 3, None) for T in (1, 4)),
        (6, 0, None),
        (1, 7, 1),
        (3, 7, 1),
        (4, 3, 20),
    ],
    "maskOf": [
        *((T, 0, 3) for T in (1, 3, 7)),
        *((T, cached, 3) for T, cached in ((1, 1), (1, 2), (1, 6), (2, 1), (3, 2), (4, 5))),
        *((T, cached, None) for T, cached in ((1, 0), (6, 0), (1, 5), (3, 4))),
        *((T, cached, 1) for T, cached in ((4, 0), (1, 3), (3, 2))),
        *((T, cached, 9) for T, cached in ((5, 0), (1, 4), (3, 3))),
        *((T, cached, 3, {"topLeft": True}) for T, cached in ((5, 0), (1, 5), (3, 2), (4, 5))),
        *((T, cached, None, {"topLeft": True}) for T, cached in ((5, 0), (1, 5), (3, 2), (2, 6))),
        *((T, cached, 3, {"lessOrEqual": True}) for T, cached in ((6, 0), (1, 5), (3, 4), (2, 1))),
        (3, 4, 3, {"lessOrEqual": True, "topLeft": True}),
    ],
    "countScores": [
        *((12, window) for window in (1, 4, 12, 13, None)),
        (1, 4),
        *((T, 4) for T in (256, 257, 300)),
        *((T, 256) for T in (511, 512, 1024)),
        (1024, 16),
        (1024, 400),
        (600, None),
    ],
    "computedBlocks": [
        *((T, 4) for T in (1, 12, 256, 257, 300)),
        *((T, 64) for T in (257, 320)),
        *((T, 65) for T in (257, 260)),
        *((512, window) for window in (1, 256, 257, 511, 512)),
        (700, 400),
        (300, None),
        (12, None),
    ],
    "receptiveField": [
        *((12, 4, layers, 0, 11) for layers in (1, 2, 3, 4)),
        *((12, 3, 4, full_every, 11) for full_every in (1, 2, 3, 4, 5)),
        *((10, 2, 3, full_every, 7) for full_every in (0, 2, 3)),
        *((8, 1, 3, full_every, 5) for full_every in (0, 2)),
        *((8, window, 2, 0, 5) for window in (8, 20, None)),
        (8, 3, 2, 0, 0),
        (1, 4, 3, 0, 0),
    ],
    "ringAfter": [
        *((4, chunks) for chunks in ([3, 1, 1, 1], [1] * 6, [4, 1], [9], [9, 1], [2, 3, 4])),
        *((3, chunks) for chunks in ([4, 7], [1, 2, 1, 5, 1], [4, 7, 1, 2])),
        *((1, chunks) for chunks in ([1, 1], [3, 1, 2])),
        (20, [3, 1, 2]),
        *((None, chunks) for chunks in ([1], [3, 1, 2], [1, 1, 1])),
        *(
            (slots, chunks, {"oneSlotOff": True})
            for slots, chunks in (
                (4, [3, 1, 1, 1]),
                (4, [9, 1, 3]),
                (4, [2, 1, 3, 1]),
                (3, [1, 1, 1, 1, 5]),
                (1, [2, 1]),
                (4, [5, 3]),
            )
        ),
    ],
    "headOf": [
        *((head, 12, 4) for head in (0, 1, 2, 3, 11)),
        *((head, 8, 2) for head in (3, 4)),
        *((head, 6, 1) for head in (0, 5)),
        *((head, 6, 6) for head in (0, 5)),
        *((head, 12, 4, {"repeat": True}) for head in (0, 1, 4, 11)),
        (5, 6, 1, {"repeat": True}),
        (5, 6, 6, {"repeat": True}),
    ],
    "cacheBytes": [
        *((cache_setup(12, kv, 64, 1023, None, 4),) for kv in (12, 4, 1)),
        *((cache_setup(12, 12, 64, 1023, window, 4),) for window in (1, 256, 1023, 5000)),
        *((cache_setup(48, 25, 64, tokens, 1024, 2),) for tokens in (1, 1024, 8192)),
        (cache_setup(1, 1, 2, 1, 1, 2),),
        (cache_setup(24, 4, 64, 32768, 256, 2),),
    ],
    "parameters": [
        (shape(*GPT2),),
        (shape(24, 16, 16, 64, 50257, 1024),),
        (shape(36, 20, 20, 64, 50257, 1024),),
        (shape(48, 25, 25, 64, 50257, 1024),),
        (shape(12, 12, 4, 64, 50257, 1024),),
        (shape(12, 12, 1, 64, 50257, 1024),),
        (shape(*GPT2, True),),
        (shape(12, 12, 4, 64, 50257, 1024, True),),
        (shape(1, 1, 1, 2, 1, 1),),
    ],
    "angle": [
        *((position, pair, 64, 10000) for position in (0, 1, 1023) for pair in (0, 6, 31)),
        (5, 0, 2, 10000),
        (100, 7, 16, 500000),
        (7, 3, 8, 1),
        *((position, 0, 64, 10000, {"bfloat16Angles": True}) for position in (256, 257, 1001)),
        *((100, pair, 64, 10000, {"bfloat16Angles": True}) for pair in (6, 31)),
    ],
    "bfloat16": [
        *((x,) for x in (0.0, 1.0, -1.0, 0.1, 3.14159, -2.71828, 1e-5, 256.0, 257.0, 258.0, 259.0)),
        *((x,) for x in (1.00390625, 1.01171875, 65535.0, 1e30)),
    ],
    "rotate": [
        *(([1.0, 0.0], position, 10000) for position in (0, 1, 100)),
        *((vector(4, 1), position, 10000) for position in (0, 3, 1023)),
        (vector(8, 2), 50, 500000),
        (vector(16, 3), 7, 10000),
        (vector(8, 2), 5, 10000, {"interleaved": True}),
        (vector(2, 4), 9, 10000, {"interleaved": True}),
        *((vector(8, 2), position, 10000, {"bfloat16Angles": True}) for position in (50, 1001)),
        (vector(8, 5), 300, 10000, {"interleaved": True, "bfloat16Angles": True}),
    ],
    "score": [
        *(
            (vector(8, 1), vector(8, 2), m, n, 10000)
            for m, n in ((0, 0), (5, 5), (9, 2), (107, 100))
        ),
        *((vector(2, 3), vector(2, 4), m, n, 10000) for m, n in ((1, 0), (40, 7))),
        (vector(16, 5), vector(16, 6), 300, 20, 500000),
        *(
            (vector(8, 1), vector(8, 2), m, n, 10000, {"restart": True})
            for m, n in ((0, 0), (5, 5), (9, 2), (107, 100))
        ),
        (vector(8, 1), vector(8, 2), 9, 2, 10000, {"interleaved": True}),
        (vector(8, 1), vector(8, 2), 300, 257, 10000, {"bfloat16Angles": True}),
    ],
    "stepBytes": [
        *((step_setup("ddp", ranks, 1, "bfloat16", *GPT2),) for ranks in (2, 4, 8)),
        *((step_setup("fsdp", ranks, 1, "bfloat16", *GPT2),) for ranks in (2, 4, 8)),
        *((step_setup(mode, 4, 3, "float32", *GPT2),) for mode in ("one", "ddp", "fsdp")),
        *((step_setup(mode, 8, 2, "bfloat16", *SMALL),) for mode in ("one", "ddp", "fsdp")),
        (step_setup("fsdp", 8, 2, "bfloat16", 1, 2, 1, 6, 33, 8),),
        (step_setup("fsdp", 4, 2, "float32", 3, 4, 2, 6, 33, 8, True),),
        (step_setup("ddp", 4, 1, "bfloat16", 3, 4, 2, 6, 33, 8, True),),
    ],
    "stepEvents": [
        *((step_setup("one", 2, micro_steps, "float32", *SMALL),) for micro_steps in (1, 2)),
        *((step_setup("ddp", 4, micro_steps, "float32", *SMALL),) for micro_steps in (1, 2)),
        *((step_setup("fsdp", 4, micro_steps, "bfloat16", *SMALL),) for micro_steps in (1, 2)),
        (step_setup("fsdp", 2, 1, "float32", 1, 2, 1, 4, 33, 8, True),),
        (step_setup("fsdp", 8, 1, "bfloat16", 3, 2, 2, 4, 33, 8, True),),
        (step_setup("ddp", 2, 2, "float32", *SMALL), {"noSync": True}),
        *(
            (step_setup("fsdp", 2, steps, "bfloat16", *SMALL), {"rootOnly": True})
            for steps in (1, 2)
        ),
    ],
}


def make_case(name, arguments):
    """Return [function, arguments, result] with the result of the model files."""
    inputs, mistakes = arguments, {}
    has_mistakes = isinstance(arguments[-1], dict) and arguments[-1].keys() <= MISTAKES.keys()
    if has_mistakes:
        *inputs, mistakes = arguments
    with make_mistakes(mistakes):
        result = FUNCTIONS[name](*inputs)
    if name in IN_FLOAT32:
        result = rounded(result)
    return [name, list(arguments), as_whole_numbers(result)]


def make_cases():
    return [make_case(name, case) for name, cases in ARGUMENTS.items() for case in cases]


def rounded(value):
    """Return a number, or all of a list, with the seven digits that float32 has."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}")


def as_whole_numbers(value):
    """Return a result in which bytes are integers where they are whole, as in JavaScript."""
    if isinstance(value, dict):
        return {key: as_whole_numbers(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The constants --------------------------------------------------------------------------------


def gpt2_sizes():
    """Return {name: {layers, heads, headDim}} of the files that train GPT-2's sizes."""
    sizes = {}
    for name, path in CONFIGS.items():
        _, options = configure_with_model(
            estimate_memory.EstimateConfig,
            [path],
            __doc__,
            model_config=lambda config: model_module(config.model).GPTConfig,
            hint=models_with_option,
        )
        config = make_config(model_module("model"), options)
        head_dim = config.n_embd // config.n_head
        sizes[name] = {"layers": config.n_layer, "heads": config.n_head, "headDim": head_dim}
    return sizes


def quality(preset):
    """Return the losses of a study of quality, with 95 % intervals, and what the page says of it.

    halfWidth         of the interval of the mean loss over the seeds
    difference        from the base, seed by seed, with an interval of its own
    kvHeadFraction    KV heads of the variant over query heads
    windowFraction    window of the variant over the sequence length
    """
    result, path = read_experiment("quality", preset)
    run = result["config"]["run"]
    H, T = run["n_head"], run["block_size"]
    final = final_losses(result)
    rows = []
    for name, losses in final.items():
        options = variants(run)[name]
        loss = interval_of(losses)
        difference = paired_difference(losses, final["base"])
        rows.append(
            {
                "name": name,
                "loss": rounded(loss.mean),
                "halfWidth": rounded(loss.half_width),
                "difference": rounded(difference.mean),
                "differenceHalfWidth": rounded(difference.half_width),
                "kvHeadFraction": options.get("n_kv_head", H) / H,
                "windowFraction": options.get("window", T) / T,
                "rope": "rope" in options["model"],
            }
        )
    return {
        "file": path.name,
        "dataset": run["dataset"],
        "layers": run["n_layer"],
        "heads": H,
        "channels": run["n_embd"],
        "blockSize": T,
        "tokens": run["max_steps"] * run["total_batch_size"],
        "seeds": len(result["config"]["seeds"]),
        "variants": rows,
    }


def make_constants():
    gpt2, swa = model_module("model").GPTConfig(), model_module("model_swa")
    return {
        "MIN_BLOCK": swa.MIN_BLOCK,
        "MAX_BLOCK": swa.MAX_BLOCK,
        "MAX_DENSE_QUERIES": swa.MAX_DENSE_QUERIES,
        "vocabSize": gpt2.vocab_size,
        "blockSize": gpt2.block_size,
        "sizes": gpt2_sizes(),
        "quality": {preset: quality(preset) for preset in QUALITY},
    }


# The page -------------------------------------------------------------------------------------


def to_json(value, width=160):
    """Return a value as JSON in as few lines as have at most `width` characters."""
    line = json.dumps(value, separators=(",", ":"))
    if len(line) <= width or not isinstance(value, dict | list):
        return line
    if isinstance(value, list):
        return "[\n" + ",\n".join(to_json(item) for item in value) + "\n]"
    items = [f"{json.dumps(key)}:{to_json(item)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n}"


def make_block(constants, cases):
    """Return the JSON of the page, with one case in a line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    return f'{{"constants":{to_json(constants)},\n"cases":[\n{lines}\n]}}\n'


def read_block(text):
    """Return {constants, cases} of the page."""
    [block] = BLOCK.finditer(text)
    return json.loads(block[0].removeprefix(block[1]).removesuffix(block[2]))


def fill(text, block):
    """Return the page with another JSON block."""
    return BLOCK.sub(lambda match: match[1] + block + match[2], text)


def main(argv):
    configure(ExplorerConfig, argv, __doc__)
    block = make_block(make_constants(), make_cases())
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), block), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
