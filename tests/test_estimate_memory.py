"""tools/estimate_memory.py: what it computes is what real tensors, a real optimizer and fully_shard take."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensor
from torch.testing._internal.distributed.fake_pg import (
    FakeStore,  # collectives of many ranks in one process
)
from torch.utils._python_dispatch import TorchDispatchMode

from common.distributed import gradient_sync, shard_model
from common.models import model_module, model_names
from common.optimizer import make_optimizer
from tools import estimate_memory

MODELS = model_names()
ODD = {
    "block_size": 24,
    "vocab_size": 33,
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 20,
}  # 33 and 20 are cut unevenly by 8
ADAMW = SimpleNamespace(weight_decay=0.1, learning_rate=1e-3, beta1=0.9, beta2=0.95)
BF16, FP32 = torch.bfloat16, torch.float32


def estimated(**options):
    """The columns of the estimate, by mode, without the mark."""
    columns = estimate_memory.main([f"--{k}={v}" for k, v in (ODD | options).items()])
    return {column["mode"].removeprefix("* "): column for column in columns}


def small(name):
    """The options of a model that ODD's two heads, and short texts, need."""
    known = {"window": 100, "n_kv_head": 1}
    return {
        option: n for option, n in known.items() if hasattr(model_module(name).GPTConfig, option)
    }


def gpt(name="model", **options):
    module = model_module(name)
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(**(ODD | options)))


def kept(model, dtype, autocast):
    """Bytes of what a real forward of two sequences keeps; copies of weights, known by their values, aside."""
    tokens = torch.randint(33, (2, model.config.block_size))
    saved, weights = [], list(model.parameters())
    values = {
        (tuple(w.shape), w.detach().to(dtype).sum().item())
        for p in weights
        if p.dim() == 2
        for w in (p, p.T)
    }
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", dtype, enabled=autocast):
            model(tokens, tokens)
    places = {p.data_ptr() for p in weights}
    storages = {}
    for t in saved:
        copy = (tuple(t.shape), t.detach().sum().item()) in values and t.dtype == dtype
        if t.untyped_storage().data_ptr() not in places and not copy:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


def test_ddp_holds_what_a_real_model_gradient_and_adamw_do():
    model = gpt()
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    optimizer = make_optimizer(model, ADAMW)
    model(tokens, tokens).backward()
    optimizer.step()
    column = estimated()["DDP"]
    assert column["parameters"] == sum(p.nbytes for p in model.parameters())
    assert column["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [
        t for state in optimizer.state.values() for name, t in state.items() if name != "step"
    ]
    assert column["AdamW's moments"] == sum(t.nbytes for t in moments)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 50])
def test_a_share_is_the_first_piece_of_torch_chunk(ranks):
    for shape in [(33, 20), (20,), (7,), (60, 20)]:
        assert (
            estimate_memory.shard_numel([torch.empty(shape)], ranks)
            == torch.empty(shape).chunk(ranks)[0].numel()
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("mode", ["DDP", "FSDP"])
def test_activations_are_what_a_real_forward_keeps(name, dtype, mode):
    sizes = {"block_size": 400, "batch_size": 2} | small(name)
    dtype_name = str(dtype).removeprefix("torch.")
    column = estimated(model=name, dtype=dtype_name, **sizes)[mode]
    del sizes["batch_size"]
    model = gpt(name, **sizes) if mode == "DDP" else gpt(name, **sizes).to(dtype)
    assert column["activations"] == kept(model, dtype, autocast=mode == "DDP" and dtype != FP32)
    assert column["  per token"] == column["activations"] / 800


def test_autocast_copies_the_matrices_that_multiply():
    matrices = [p for name, p in gpt().named_parameters() if p.dim() == 2 and "wpe" not in name]
    assert estimated()["DDP"]["weights in dtype"] == 2 * sum(p.numel() for p in matrices)
    assert estimated(dtype="float32")["DDP"]["weights in dtype"] == 0


def test_float16_takes_what_bfloat16_takes():
    assert estimated(dtype="float16") == estimated()


def test_attention_keeps_no_matrix_of_t_by_t():
    short, long = (estimated(block_size=T, batch_size=1)["DDP"]["  per token"] for T in (256, 4096))
    assert long == pytest.approx(short, rel=0.001)


@pytest.mark.parametrize("name", MODELS)
def test_with_checkpointing_a_further_block_keeps_its_input_alone(capsys, tmp_path, name):
    options = {"model": name, "batch_size": 2, "dtype": "float32"} | small(name)
    one, few, more = (estimated(n_layer=n, **options) for n in (1, 3, 4))
    for mode in few:
        further = more[mode]["activations, checkpointed"] - few[mode]["activations, checkpointed"]
        assert further == 2 * 24 * 20 * 4
        assert more[mode]["activations, checkpointed"] < more[mode]["activations"]
        assert one[mode]["activations, checkpointed"] == one[mode]["activations"]


class Sent(TorchDispatchMode):
    """Bytes that a rank sends through the collectives of a forward and backward, as rings do."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, tensors = func.name(), [a[0] if isinstance(a, list) else a for a in args]
        if name.startswith("c10d::"):
            group = next(
                dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
            )
            N = group.size()
            largest = max(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            self.bytes += (2 if "allreduce" in name else 1) * (N - 1) / N * largest
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[(8, 0), (8, 4), (8, 2), (2, 0)])
def ranks(request):
    size, shard_degree = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    yield SimpleNamespace(world_size=size, launched=True, shard_degree=shard_degree)
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_fsdp_holds_and_sends_what_fully_shard_does(ranks, micro_steps):
    with torch.device("meta"):
        model = gpt()
    shard_model(model, ranks, torch.device("cpu"), BF16, ranks.shard_degree)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.ones_(p.to_local())
    optimizer = make_optimizer(model, ADAMW)
    groups = [
        module._get_fsdp_state()._fsdp_param_group for module in (*model.transformer.h, model)
    ]
    tokens, whole = torch.zeros(1, 24, dtype=torch.int64), 0
    with Sent() as sent:
        for step in range(micro_steps):
            with gradient_sync(model, enabled=step == micro_steps - 1):
                model(tokens, tokens).backward()
            left = [p.unsharded_accumulated_grad for group in groups for p in group.fsdp_params]
            whole = max(whole, sum(g.nbytes for g in left if g is not None))
    optimizer.step()
    options = {
        "world_size": ranks.world_size,
        "fsdp": True,
        "shard_degree": ranks.shard_degree,
        "micro_steps": micro_steps,
    }
    columns = estimated(**options)
    column = columns[
        f"HSDP {ranks.world_size // ranks.shard_degree} x {ranks.shard_degree}"
        if ranks.shard_degree
        else "FSDP"
    ]
    local = [p.to_local() for p in model.parameters()]
    assert column["parameters"] == sum(p.untyped_storage().nbytes() for p in local)
    assert (
        column["gradients"] == column["parameters"]
        and column["AdamW's moments"] == 2 * column["parameters"]
    )
    moments = [
        t.to_local() for state in optimizer.state.values() for n, t in state.items() if n != "step"
    ]
    assert column["AdamW's moments"] == sum(t.nbytes for t in moments)
    blocks = [
        sum(t.nbytes for p in group.fsdp_params for t in group_outputs(p)) for group in groups
    ]
    assert column["weights in dtype"] == sum(blocks[-3:])
    one = [
        sum(p.numel() for p in module.parameters()) for module in (gpt(), gpt().transformer.h[0])
    ]
    assert column["unsharded gradients"] == whole + 2 * (one[0] - 2 * one[1])
    assert column["sent per step"] == pytest.approx(sent.bytes)


def group_outputs(param):
    """What a parameter is gathered into; freed outside its use, so the size is that of its shape."""
    return [torch.empty(t.shape, dtype=t.dtype) for t in param.all_gather_outputs]


def test_on_two_ranks_the_wire_carries_what_is_counted_by_hand():
    even = {
        "n_embd": 20,
        "vocab_size": 34,
        "n_layer": 1,
        "n_head": 1,
        "block_size": 8,
        "world_size": 2,
    }
    outside, block = (34 + 8 + 2) * 20, 12 * 20 * 20 + 13 * 20
    columns = estimated(micro_steps=3, **even)
    assert columns["DDP"]["sent per step"] == 4 * (outside + block)
    assert columns["FSDP"]["sent per step"] == 3 * (outside + 2 * block) + 2 * (outside + block)
    columns = estimated(fsdp=True, shard_degree=1, **even)
    assert (
        columns["HSDP 2 x 1"]["sent per step"] == columns["DDP"]["sent per step"]
    )  # R = 2 copies, nothing shared


def test_billions_of_parameters_take_no_memory(monkeypatch):
    seen, activations = [], estimate_memory.activations
    monkeypatch.setattr(
        estimate_memory,
        "activations",
        lambda model, *rest: seen.append(model) or activations(model, *rest),
    )
    column = estimated(n_layer=3, n_embd=8192, n_head=64, vocab_size=50257)["DDP"]
    assert column["parameters"] > 10e9
    assert len(seen) == 2 and all(
        isinstance(p, FakeTensor) for model in seen for p in model.parameters()
    )


def test_the_mode_that_is_asked_for_is_marked(capsys):
    for options, marked in [
        ([], "DDP"),
        (["--fsdp=True"], "FSDP"),
        (["--fsdp=True", "--shard_degree=2"], "HSDP 4 x 2"),
    ]:
        estimate_memory.main(["--n_layer=1", *options])
        header = capsys.readouterr().out.splitlines()[1]
        assert header.count("*") == 1 and f"* {marked}" in header


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fsdp=True", "--shard_degree=3"], ["shard_degree=3", "world_size=8"]),
        (["--shard_degree=4"], ["shard_degree=4", "fsdp=True"]),
        (["--dtype=int8"], ["dtype=int8", "bfloat16"]),
        (["--n_embd=100", "--n_head=3"], ["n_embd=100", "n_head=3"]),
        (["--window=3"], ["window", "model_swa"]),
        (["--world_size=0"], ["world_size=0", "at least 1"]),
        (["--model=mine"], ["model=mine"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        estimate_memory.main(options)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words)
