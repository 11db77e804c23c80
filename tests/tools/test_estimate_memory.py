"""tools/estimate_memory.py against real tensors, a real optimizer and a real fully_shard.

Nothing here knows the formulas, except where a test's name says "by hand".
"""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import refused
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # many ranks in one process
from torch.utils._python_dispatch import TorchDispatchMode

import model as gpt2
from common.models import model_module
from tools import estimate_memory
from train import TrainConfig
from training.optimizer import make_adamw, make_optimizer
from training.parallel import gradient_sync, shard_model

CONFIGS = sorted((Path(__file__).parents[2] / "config").glob("[!_]*.py"))
# 8 ranks split 33 and 20 unevenly.
ODD = {"block_size": 24, "vocab_size": 33, "n_layer": 3, "n_head": 2, "n_embd": 20}
ADAMW = SimpleNamespace(weight_decay=0.1, learning_rate=1e-3, beta1=0.9, beta2=0.95)


def estimated(**options):
    """Return the estimate's columns by mode."""
    argv = [f"--{name}={value}" for name, value in (ODD | options).items()]
    return estimate_memory.main(argv)


def state_bytes(optimizer):
    """Return the bytes of the optimizer's state on this rank, without the counts of steps."""
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            shard = value.to_local() if isinstance(value, DTensor) else value
            total += shard.nbytes if name != "step" else 0
    return total


def make_model(name="model", **options):
    module = model_module(name)
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(**(ODD | options)))


def live_bytes():
    """Return the bytes of all live CPU tensors, each storage once."""
    gc.collect()
    storages = {}
    for tensor in gc.get_objects():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # a subclass has no storage
            continue
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# DDP ------------------------------------------------------------------------------------------


def test_ddp_holds_what_a_real_model_its_gradients_and_adamw_hold():
    model = make_model()
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    optimizer = make_adamw(model.parameters(), ADAMW)
    model(tokens, tokens).backward()
    optimizer.step()
    column = estimated()["DDP"]
    assert column["parameters"] == sum(p.nbytes for p in model.parameters())
    assert column["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    states = [optimizer.state[p] for p in model.parameters()]
    assert column["optimizer state"] == sum(
        state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states
    )


def test_muon_has_one_momentum_where_adamw_has_two():
    model = make_model("model_gqa", n_kv_head=1)
    muon = make_optimizer(model, TrainConfig(optimizer="muon"))
    model(*torch.zeros(2, 1, 24, dtype=torch.int64)).backward()
    muon.step()
    column = estimated(model="model_gqa", n_kv_head=1, optimizer="muon")["DDP"]
    assert column["optimizer state"] == state_bytes(muon)


def test_autocast_copies_the_matrices_that_multiply():
    matrices = [
        p for name, p in make_model().named_parameters() if p.dim() == 2 and "wpe" not in name
    ]
    assert estimated()["DDP"]["parameters in dtype"] == 2 * sum(p.numel() for p in matrices)
    assert estimated(dtype="float32")["DDP"]["parameters in dtype"] == 0


def test_float16_takes_what_bfloat16_takes():
    assert estimated(dtype="float16") == estimated()


# FSDP and HSDP --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 50])
def test_a_shard_has_the_size_of_torch_chunks_first_piece(ranks):
    for shape in [(33, 20), (20,), (7,), (60, 20)]:
        tensor = torch.empty(shape)
        assert estimate_memory.shard_numel([tensor], ranks) == tensor.chunk(ranks)[0].numel()


class SentBytes(TorchDispatchMode):
    """Counts the bytes that a rank sends in the collectives of a `with` block, all by rings."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            self._count(func.name(), args)
        if func.name() == "_c10d_functional::all_gather_into_tensor":  # of a DTensor
            shard, ranks, _ = args
            self.total += (ranks - 1) * shard.nbytes
        return func(*args, **(kwargs or {}))

    def _count(self, name, args):
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        ranks = dist.ProcessGroup.unbox(groups[0]).size()
        values = [arg[0] if isinstance(arg, list) else arg for arg in args]
        largest = max(value.nbytes for value in values if isinstance(value, torch.Tensor))
        passes = 2 if "allreduce" in name else 1
        self.total += passes * (ranks - 1) / ranks * largest


@pytest.fixture(params=[(8, 0), (8, 4)], ids=["FSDP", "HSDP"])
def group(request):
    """Stands for common.distributed.ProcessGroup, with ranks that are all in this process."""
    world_size, shard_degree = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    yield SimpleNamespace(world_size=world_size, shard_degree=shard_degree)
    dist.destroy_process_group()


@pytest.fixture
def sharded(group):
    """A model, sharded as train.py does, with float32 shards on the CPU."""
    with torch.device("meta"):
        model = make_model()
    shard_model(model, group, torch.device("cpu"), torch.bfloat16, group.shard_degree)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.ones_(p.to_local())
    return model


def estimated_column(group, **options):
    """Return the estimate's column for the mode of the fixture `group`."""
    options |= {"world_size": group.world_size, "shard_degree": group.shard_degree}
    columns = estimated(fsdp=True, **options)
    if group.shard_degree == 0:
        return columns["FSDP"]
    return columns[f"HSDP {group.world_size // group.shard_degree} x {group.shard_degree}"]


def train_micro_steps(model, n, sync_last=True):
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    for micro_step in range(n):
        with gradient_sync(model, enabled=sync_last and micro_step == n - 1):
            model(tokens, tokens).backward()


def test_fsdp_holds_what_a_sharded_model_its_gradients_and_adamw_hold(group, sharded):
    optimizer = make_adamw(sharded.parameters(), ADAMW)
    train_micro_steps(sharded, 1)
    optimizer.step()
    column = estimated_column(group)
    parameters = list(sharded.parameters())
    shards = [p.to_local().untyped_storage().nbytes() for p in parameters]
    assert column["parameters"] == sum(shards)
    gradients = [p.grad.to_local().nbytes for p in parameters]
    assert column["gradients"] == column["parameters"] >= sum(gradients)
    states = [optimizer.state[p] for p in parameters]
    moments = [state[key].to_local() for state in states for key in ("exp_avg", "exp_avg_sq")]
    assert column["optimizer state"] == sum(moment.nbytes for moment in moments)


def test_fsdp_gathers_the_root_group_and_two_blocks_in_dtype(group, sharded):
    gathered = 0
    for module in (sharded, *sharded.transformer.h[:2]):
        module.unshard()
        full = [p for p in module.parameters() if not isinstance(p, DTensor)]  # of this group
        gathered += sum(p.untyped_storage().nbytes() for p in full)
        module.reshard()
    assert estimated_column(group)["parameters in dtype"] == gathered


def test_fsdp_keeps_unsharded_gradients_between_micro_steps(group, sharded):
    train_micro_steps(sharded, 1)  # FSDP sets itself up in its first step
    sharded.zero_grad()
    before = live_bytes()
    train_micro_steps(sharded, 1, sync_last=False)
    between = live_bytes() - before
    root = sum(p.numel() for p in make_model(n_layer=1).parameters())  # and one block, in dtype
    assert estimated_column(group, micro_steps=1)["unsharded gradients"] == 2 * root
    assert estimated_column(group, micro_steps=3)["unsharded gradients"] == 2 * root + between


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_fsdp_sends_what_the_collectives_of_a_step_send(group, sharded, micro_steps):
    with SentBytes() as sent:
        train_micro_steps(sharded, micro_steps)
    column = estimated_column(group, micro_steps=micro_steps)
    assert column["sent per step"] == pytest.approx(sent.total)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_muon_under_fsdp_holds_and_gathers_what_is_estimated(group, sharded, dtype):
    muon = make_optimizer(sharded, TrainConfig(optimizer="muon"), getattr(torch, dtype))
    train_micro_steps(sharded, 1)
    with SentBytes() as sent:
        muon.step()
    column = estimated_column(group, optimizer="muon", dtype=dtype)
    without = estimated_column(group, dtype=dtype)
    assert column["sent per step"] - without["sent per step"] == pytest.approx(sent.total)
    assert column["optimizer state"] == state_bytes(muon)


def test_two_ranks_send_what_is_counted_by_hand():
    options = {"n_embd": 20, "vocab_size": 34, "n_layer": 1, "n_head": 1, "block_size": 8}
    options |= {"world_size": 2, "micro_steps": 3}
    root = (34 + 8 + 2) * 20
    block = 12 * 20 * 20 + 13 * 20
    columns = estimated(**options)
    assert columns["DDP"]["sent per step"] == 4 * (root + block)
    assert columns["FSDP"]["sent per step"] == 3 * (root + 2 * block) + 2 * (root + block)
    columns = estimated(fsdp=True, shard_degree=1, **options)  # two replicas, nothing sharded
    assert columns["HSDP 2 x 1"]["sent per step"] == columns["DDP"]["sent per step"]


# The program ----------------------------------------------------------------------------------


def test_the_total_is_the_sum_of_what_is_held():
    for column in estimated(fsdp=True, shard_degree=2, micro_steps=2).values():
        held = column["parameters"] + column["gradients"] + column["optimizer state"]
        held += column["parameters in dtype"] + column["unsharded gradients"]
        assert column["total without activations"] == held


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_of_train_is_accepted(path):
    estimate_memory.main([str(path), "--n_layer=2", "--micro_steps=1"])


def test_micro_steps_follow_from_total_batch_size_unless_they_are_given():
    tokens = 8 * 2 * 24  # of a micro-step, over all ranks
    columns = estimated(batch_size=2, total_batch_size=3 * tokens)
    assert columns == estimated(batch_size=2, micro_steps=3)
    assert columns == estimated(batch_size=2, micro_steps=3, total_batch_size=5000)


def test_billions_of_parameters_take_no_memory(monkeypatch):
    made = []

    class GPT(gpt2.GPT):
        def __init__(self, config):
            super().__init__(config)
            made.append(self)

    monkeypatch.setattr(gpt2, "GPT", GPT)
    before = live_bytes()
    column = estimated(n_layer=3, n_embd=16384, n_head=128, vocab_size=50257)["DDP"]
    assert column["parameters"] > 40e9
    assert made and all(p.is_meta for model in made for p in model.parameters())
    assert live_bytes() - before < 1e6


def test_the_mode_that_the_options_choose_is_marked(capsys):
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
        (["--total_batch_size=5000"], ["total_batch_size=5000", "131072", "world_size"]),
        (["--world_size=0"], ["world_size=0", "at least 1"]),
        (["--model=mine"], ["model=mine"]),
    ],
)
def test_impossible_options_are_refused_in_one_line(capsys, options, words):
    line = refused(capsys, options, estimate_memory.main)
    assert all(word in line for word in words)
