"""torch.compile in training: what is compiled, and what happens where that fails.

The graphs are those that torch.compile hands to its backend; a backend of these tests runs them as
they are. test_gpu.py has compiled kernels.
"""

import re
import sys

import pytest
import torch
from conftest import arguments, read_log, refused, write_tiny
from ranks import command, fork
from runs import losses, same_weights
from variants import MODELS

import train
from common import models, run_dir

EVERY_STEP = {"max_steps": 4, "eval_interval": 2}
MODES = {"ddp2": {}, "fsdp2": {"fsdp": True}}
GRAPHS = {"ddp2": 4, "fsdp2": 8}  # a block and the loss, in training and in evaluation; FSDP: twice
each_mode = pytest.mark.parametrize("mode", MODES)
LAYERS_THAT_DIFFER = """
import torch
import model
from model import *


class Block(model.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.factor = 1 / (layer + 1)

    def forward(self, x, cache=None):
        return x + self.factor * (super().forward(x, cache) - x)


class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(config)
        blocks = (Block(config, i) for i in range(config.n_layer))
        self.transformer.h = torch.nn.ModuleList(blocks)
        self.init_weights()
"""
WITHOUT_METHOD = """
import torch.nn.functional as F
import model
from model import GPTConfig


class GPT(model.GPT):
    loss = {loss}

    def forward(self, idx, targets=None, cache=None):
        logits = super().forward(idx, cache=cache)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def compile_by(monkeypatch):
    """Return a function that lets torch.compile use another backend."""
    torch_compile = torch.compile
    torch._dynamo.reset()

    def use(backend):
        monkeypatch.setattr(
            torch,
            "compile",
            lambda function, **options: torch_compile(function, backend=backend, **options),
        )

    yield use
    torch._dynamo.reset()


@pytest.fixture
def graphs(compile_by):
    """Return a list that gets each graph that is compiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_by(backend)
    return compiled


# One process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_block_and_the_loss_are_a_graph_each(workdir, graphs, model, recomputes):
    """One for training and one for evaluation; all blocks share theirs."""
    shape = {"model": model, "n_layer": 3, "n_head": 4, "activation_checkpointing": recomputes}
    train.main(arguments(compile=True, **shape, **EVERY_STEP))
    assert len(graphs) == 4
    assert sum(calls(graph, "scaled_dot_product_attention") for graph in graphs) == 2
    assert sum(calls(graph, "cross_entropy") for graph in graphs) == 2


def calls(graph, function):
    """Return whether a graph, or one inside of it, calls a function."""
    inside = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    return any(function in module.code for module in inside)


def test_nothing_is_compiled_after_the_trial(workdir, graphs, monkeypatch):
    counts = []
    train_loop = train.train_loop

    def counting_loop(run):
        counts.append(len(graphs))
        train_loop(run)

    monkeypatch.setattr(train, "train_loop", counting_loop)
    train.main(arguments(compile=True, **EVERY_STEP))
    assert counts == [len(graphs)]


def test_the_compiled_run_has_the_losses_of_the_uncompiled_one(workdir, graphs):
    options = {"max_steps": 50, "dropout": 0.0}
    train.main(arguments(out_dir="out/compiled", compile=True, **options))
    train.main(arguments(out_dir="out/plain", **options))
    assert len(graphs) > 0
    expected = train_losses(workdir / "out/plain")
    assert train_losses(workdir / "out/compiled") == pytest.approx(expected, rel=1e-5)


def test_blocks_that_differ_are_all_compiled(workdir, graphs, monkeypatch, capsys):
    write_model(monkeypatch, workdir, "model_differing", LAYERS_THAT_DIFFER)
    train.main(arguments(model="model_differing", n_layer=12, compile=True, **EVERY_STEP))
    assert len(graphs) == 12 * 2 + 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("loss", ["None", "0.5", "property(lambda model: model.forward)"])
def test_a_model_without_a_method_loss_trains_with_its_blocks_compiled(
    workdir, graphs, monkeypatch, loss
):
    text = WITHOUT_METHOD.format(loss=loss)
    write_model(monkeypatch, workdir, "model_without_loss", text)
    options = {"dropout": 0.0} | EVERY_STEP
    train.main(arguments(model="model_without_loss", compile=True, out_dir="out/mine", **options))
    train.main(arguments(out_dir="out/base", **options))
    assert len(graphs) == 2
    expected = train_losses(workdir / "out/base")
    assert train_losses(workdir / "out/mine") == pytest.approx(expected, rel=1e-5)


def write_model(monkeypatch, folder, name, text):
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(models, "model_names", lambda: ["model", name])
    monkeypatch.delitem(sys.modules, name, raising=False)


def train_losses(run):
    return [record["train_loss"] for record in read_log(run)[1:]]


# Failures -------------------------------------------------------------------------------------


def test_a_graph_of_the_evaluation_that_fails_leaves_all_uncompiled(
    tiny_run, workdir, compile_by, capsys
):
    def backend(graph, inputs):
        if not torch.is_grad_enabled():
            raise RuntimeError("no compiler")
        return graph.forward

    compile_by(backend)
    train.main(arguments(out_dir="out/uncompiled", compile=True))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "no compiler" in line
    assert losses(workdir / "out/uncompiled") == losses(tiny_run)


def test_out_of_memory_while_compiling_is_not_a_failed_compilation(workdir, compile_by, capsys):
    def backend(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    compile_by(backend)
    line = refused(capsys, arguments(compile=True))
    assert re.search(r"--batch_size=2\b", line)
    assert run_dir.list_checkpoints(workdir / "out/tiny") == []


def test_a_device_that_fails_while_compiling_ends_the_run(workdir, compile_by):
    """After a device-side assert every call fails: the run cannot go on without torch.compile."""

    def backend(graph, inputs):
        def failing(*inputs):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        return failing

    compile_by(backend)
    with pytest.raises(torch.AcceleratorError):
        train.main(arguments(compile=True))


# Several ranks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Return {name: the record of each rank} of runs on two ranks, and their stderr."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("compiled")
        write_tiny(folder)
        patch.chdir(folder)
        runs = {}
        for mode, options in MODES.items():
            options = options | {"max_steps": 12, "eval_interval": 6}
            plain = command(f"plain-{mode}", 2, **options)
            compiled = command(f"compiled-{mode}", 2, compile=True, **options)
            failed = command(f"failed-{mode}", 2, compile=True, **options)
            runs[f"plain-{mode}"] = {"argv": plain}
            runs[f"compiled-{mode}"] = {"argv": compiled, "no_compiler": []}
            runs[f"failed-{mode}"] = {"argv": failed, "no_compiler": [1]}
        by_world_size, stderr = fork({2: list(runs.values())})
        records = {}
        for i, name in enumerate(runs):
            records[name] = [of_rank[i] for of_rank in by_world_size[2]]
        yield folder / "out", records, stderr


@each_mode
def test_every_rank_compiles_blocks_and_loss(launches, mode):
    """The graphs do not depend on the mode. Under FSDP the trial's model is another one."""
    _, records, _ = launches
    graphs = [record["graphs"] for record in records[f"compiled-{mode}"]]
    assert graphs == 2 * [GRAPHS[mode]]


@each_mode
def test_compiled_ranks_have_the_losses_of_uncompiled_ones(launches, mode):
    out, _, _ = launches
    expected = train_losses(out / f"plain-{mode}-model")
    assert len(expected) == 12
    actual = train_losses(out / f"compiled-{mode}-model")
    assert actual == pytest.approx(expected, rel=1e-5)


@each_mode
def test_no_rank_compiles_if_it_fails_on_one(launches, mode):
    out, records, stderr = launches
    assert same_weights(out / f"failed-{mode}-model", out / f"plain-{mode}-model")
    assert [record["status"] for record in records[f"failed-{mode}"]] == [0, 0]
    lines = [line for line in stderr.splitlines() if line.startswith("warning: training unc")]
    assert len(lines) == len(MODES)
    assert all("no compiler" in line for line in lines)
