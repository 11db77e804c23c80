"""tools/estimate_memory.py against real tensors, a real optimizer and a real fully_shard.

Nothing here knows the formulas, except where a test's name says "by hand".
"""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
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

MODELS = ("model", "model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa")
CONFIGS = sorted((Path(__file__).parents[2] / "config").glob("[!_]*.py"))
# 8 ranks split 33 and 20 unevenly.
ODD = {"block_size": 24, "vocab_size": 33, "n_layer": 3, "n_head": 2, "n_embd": 20}
ADAMW = SimpleNamespace(weight_decay=0.1, learning_rate=1e-3, beta1=0.9, beta2=0.95)


def estimated(**options):
    """Return the estimate's columns by mode."""
    argv = [f"--{name}={value}" for name, value in (ODD | options).items()]
    return estimate_memory.main(argv)


def variant_options(name, window=100):
    """Return options for the variants that fit ODD's two heads and short sequences."""
    options = {"window": window, "n_kv_head": 1}
    config = model_module(name).GPTConfig
    return {option: value for option, value in options.items() if hasattr(config, option)}


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


def kept_bytes(model, batch_size, dtype, autocast):
    """Return the bytes that a real forward pass keeps for the backward pass.

    Parameters do not count, nor do autocast's copies of them, recognized by their values, nor
    scalars.
    """
    size = (batch_size, model.config.block_size)
    tokens, targets = torch.randint(33, size), torch.randint(33, size)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=autocast):
            model(tokens, targets)

    matrices = [p.detach() for p in model.parameters() if p.dim() == 2]
    matrices += [matrix.T for matrix in matrices]
    copies = {(matrix.shape, matrix.to(dtype).sum().item()) for matrix in matrices}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}
    for tensor in saved:
        storage = tensor.untyped_storage()
        is_copy = tensor.dtype == dtype and (tensor.shape, tensor.sum().item()) in copies
        if tensor.dim() == 0 or is_copy or storage.data_ptr() in parameters:
            continue
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


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


# Activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["DDP", "FSDP"])
@pytest.mark.parametrize(("batch_size", "block_size", "window"), [(2, 400, 100), (1, 200, 7)])
def test_activations_are_what_a_real_forward_keeps(
    name, dtype, mode, batch_size, block_size, window
):
    options = {"block_size": block_size} | variant_options(name, window)
    dtype_name = str(dtype).removeprefix("torch.")
    column = estimated(model=name, dtype=dtype_name, batch_size=batch_size, **options)[mode]
    model = make_model(name, **options)
    if mode == "FSDP":
        model = model.to(dtype)
    autocast = mode == "DDP" and dtype != torch.float32
    assert column["activations"] == kept_bytes(model, batch_size, dtype, autocast)


@pytest.mark.parametrize("name", [name for name in MODELS if "swa" in name])
@pytest.mark.parametrize("block_size", [256, 257, 400])
@pytest.mark.parametrize("window", [1, 64, 65, 256, 320, 400])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_windows_of_all_kinds_keep_what_a_real_forward_keeps(name, block_size, window, batch_size):
    options = {"block_size": block_size, "n_layer": 1} | variant_options(name, window)
    column = estimated(model=name, dtype="float32", batch_size=batch_size, **options)["DDP"]
    model = make_model(name, **options)
    assert column["activations"] == kept_bytes(model, batch_size, torch.float32, autocast=False)


class SwiGLU(nn.Module):
    """An MLP that a reader may write: silu(gate(x)) * up(x), then c_proj."""

    def __init__(self, n_embd):
        super().__init__()
        self.gate = nn.Linear(n_embd, 8 * n_embd // 3, bias=False)
        self.up = nn.Linear(n_embd, 8 * n_embd // 3, bias=False)
        self.c_proj = nn.Linear(8 * n_embd // 3, n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("mode", ["DDP", "FSDP"])
def test_a_model_of_ones_own_is_estimated_within_15_percent(monkeypatch, mode):
    class GPT(gpt2.GPT):
        def __init__(self, config):
            super().__init__(config)
            for block in self.transformer.h:
                block.mlp = SwiGLU(config.n_embd)

    mine = SimpleNamespace(GPT=GPT, GPTConfig=gpt2.GPTConfig)
    monkeypatch.setattr(estimate_memory, "model_module", {"model_mine": mine}.get)
    options = {"block_size": 64, "n_embd": 48}
    column = estimated(model="model_mine", batch_size=2, **options)[mode]
    model = GPT(gpt2.GPTConfig(**(ODD | options)))
    if mode == "FSDP":
        model = model.to(torch.bfloat16)
    kept = kept_bytes(model, 2, torch.bfloat16, autocast=mode == "DDP")
    assert column["activations"] == pytest.approx(kept, rel=0.15)


def test_a_block_of_gpt2_keeps_34_bytes_per_channel_counted_by_hand():
    """Korthikanti et al. 2022, section 4.1; besides, means, deviations and logsumexp."""
    column = estimated(batch_size=2, dropout=0.1)["FSDP"]
    assert column["activations of one block"] == 2 * 24 * (34 * 20 + 8 + 4 * 2)


def test_dropout_keeps_masks_of_one_byte_counted_by_hand():
    without, masked = estimated(batch_size=2), estimated(batch_size=2, dropout=0.1)
    masks = 2 * 3 + 1  # two in each of three blocks, one after the embeddings
    for mode in without:
        added = masked[mode]["activations"] - without[mode]["activations"]
        assert added == masks * 2 * 24 * 20


def test_attention_keeps_no_matrix_of_t_by_t():
    short = estimated(block_size=256, batch_size=1)["DDP"]["activations"] / 256
    long = estimated(block_size=4096, batch_size=1)["DDP"]["activations"] / 4096
    assert long == pytest.approx(short, rel=0.001)


@pytest.mark.parametrize("name", MODELS)
def test_with_checkpointing_a_further_block_keeps_its_input_only(name):
    options = {"model": name, "batch_size": 2, "dtype": "float32"} | variant_options(name)
    one, few, more = (estimated(n_layer=n_layer, **options) for n_layer in (1, 3, 4))
    key = "activations, checkpointed"
    for mode in few:
        assert more[mode][key] - few[mode][key] == 2 * 24 * 20 * 4
        assert more[mode][key] < more[mode]["activations"]
        assert one[mode][key] == one[mode]["activations"]


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


@pytest.fixture(params=[(8, 0), (8, 4), (8, 2), (2, 0)], ids=lambda param: f"{param[0]}-{param[1]}")
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


def test_totals_are_the_sum_of_their_rows_counted_by_hand():
    for column in estimated(fsdp=True, shard_degree=2, micro_steps=2).values():
        held = column["parameters"] + column["gradients"] + column["optimizer state"]
        held += column["parameters in dtype"] + column["unsharded gradients"]
        for how in ("", ", checkpointed"):
            assert column[f"total{how}"] == held + column[f"activations{how}"]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_of_train_is_accepted(path):
    estimate_memory.main([str(path), "--n_layer=2", "--micro_steps=1"])


def test_micro_steps_follow_from_total_batch_size():
    tokens = 8 * 2 * 24  # of a micro-step, over all ranks
    columns = estimated(batch_size=2, total_batch_size=3 * tokens)
    assert columns == estimated(batch_size=2, micro_steps=3)


def test_micro_steps_that_are_given_replace_those_of_total_batch_size():
    columns = estimated(micro_steps=3, total_batch_size=5000)
    assert columns == estimated(micro_steps=3)


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
