"""train.py under torchrun: DDP, FSDP and replicated shards compute what one process computes."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log, write_tiny
from test_variants import MODELS

import train
from pretrained import load_model

ROOT = Path(train.__file__).parent
# Sizes that 2 and 4 divide and 3 does not, an odd vocabulary (257), two micro-steps for any number of ranks.
SHAPE = dict(n_head=4, n_embd=40, n_kv_head=2, window=5, total_batch_size=384, dropout=0.0, learning_rate=3e-3)
SHAPE |= dict(max_steps=50, eval_interval=25, checkpoint_interval=100, eval_tokens=400, log_interval=50)
MODES = {"ddp2": (2, {}), "fsdp2": (2, {"fsdp": True}), "fsdp3": (3, {"fsdp": True})}
MODES |= {"ddp4": (4, {}), "hsdp 2x2": (4, {"fsdp": True, "shard_size": 2})}
WEIGHED = MODES | {"fsdp4": (4, {"fsdp": True})}
WIDE = dict(n_layer=4, n_embd=128, max_steps=3)  # so wide that the parameters matter most
LOGGED = ["train_loss", "grad_norm", "val_loss"]


def command(name, ranks=1, model="model", **options):
    """The command line of a run for so many ranks."""
    own = train.model_module(model).GPTConfig.__dataclass_fields__
    shape = {key: value for key, value in SHAPE.items() if key not in ("n_kv_head", "window") or key in own}
    shape |= {"batch_size": 12 // ranks, "out_dir": f"out/{name}-{model}"}
    return arguments(model=model, **shape | options)


def torchrun(ranks, *argv, **options):
    """Start torchrun with so many ranks; returns the process."""
    flags = ["--standalone", f"--nproc_per_node={ranks}"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    line = [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, argv)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process, timeout=300):
    """Wait for a launch: (status, stdout, stderr). One that hangs is killed with all of its workers."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"hung: {out[-2000:]} {err[-2000:]}")
    return process.returncode, out, err


def launch(ranks, runs, **options):
    """Runs in one launch: what tests/launched.py notes, for each rank a list over the runs; and stderr."""
    Path("runs.json").write_text(json.dumps(runs))
    status, out, err = finish(torchrun(ranks, ROOT / "tests/launched.py", "runs.json", **options))
    assert status == 0, out[-2000:] + err[-4000:]
    return [json.loads(Path(f"runs.json.{rank}").read_text()) for rank in range(ranks)], err


def run_all(models=MODELS, more=True):
    """Models in all modes, 50 steps, and some more of `model`: {(mode, model): what each rank noted}."""
    for model in models:
        train.main(command("one", model=model))
    if more:
        train.main(command("bf16", dtype="bfloat16"))
    notes = {}
    for ranks in (2, 3, 4):
        runs = {}
        for mode, (size, options) in WEIGHED.items():
            if size == ranks and mode in MODES:
                runs |= {(mode, model): {"argv": command(mode, ranks, model, **options)} for model in models}
            if size == ranks and more:
                wide = command(f"wide-{mode}", ranks, **WIDE, **options)
                runs[f"wide-{mode}", "model"] = {"argv": wide, "weigh": True}
            if size == ranks == 2 and more:
                bf16 = command(f"bf16-{mode}", ranks, dtype="bfloat16", **options)
                runs[f"bf16-{mode}", "model"] = {"argv": bf16}
                again = command(f"again-{mode}", ranks, MODELS[-1], activation_checkpointing=True, **options)
                runs[f"again-{mode}", MODELS[-1]] = {"argv": again}
        noted, _ = launch(ranks, list(runs.values()))
        notes |= {name: [rank[i] for rank in noted] for i, name in enumerate(runs)}
    return notes


@pytest.fixture(scope="module")
def done(tmp_path_factory, request):
    """What run_all() returns, in its directory; pytest -k model_mine runs that model alone."""
    asked = [item.callspec.params if hasattr(item, "callspec") else {} for item in request.session.items]
    asked = [params for params, item in zip(asked, request.session.items, strict=True) if "done" in item.fixturenames]
    more = any("model" not in params for params in asked)
    models = [model for model in MODELS if more or any(model == params["model"] for params in asked)]
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("parallel"))
    write_tiny(Path())
    yield run_all(models, more)
    os.chdir(before)


def log(name, model="model"):
    return read_log(Path(f"out/{name}-{model}"))


def farthest(a, b, key):
    """The largest relative difference of two logs."""
    assert len(a) == len(b) == 51
    return max(abs(x[key] - y[key]) / abs(x[key]) for x, y in zip(a, b, strict=True) if key in x)


def weights_apart(mode, model):
    """The largest norm of a difference of weights over the norm, among the tensors."""
    ours, theirs = (load_model(f"out/{name}-{model}")[0] for name in ("one", mode))
    C, apart = ours.config.n_embd, []
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("c_attn.bias") and "rope" not in model:
            keys = slice(C, C + (len(a) - C) // 2)  # has no gradient but rounding's, which Adam scales up: see below
            a, b = (torch.cat([p[: keys.start], p[keys.stop :]]) for p in (a, b))
        apart.append(((a - b).norm() / a.norm()).item())
    return max(apart)


def held(notes, mode):
    """Bytes of the tensors of a rank before the last optimizer step of a wide run, at most."""
    return max(rank["bytes"][-1] for rank in notes[f"wide-{mode}", "model"])


each_mode_and_model = [(mode, model) for mode in MODES for model in MODELS]


@pytest.mark.parametrize(("mode", "model"), each_mode_and_model)
@pytest.mark.parametrize("key", LOGGED)
def test_every_step_is_that_of_one_process(done, mode, model, key):
    assert farthest(log("one", model), log(mode, model), key) < 1e-4


@pytest.mark.parametrize(("mode", "model"), each_mode_and_model)
def test_the_weights_are_those_of_one_process(done, mode, model):
    assert weights_apart(mode, model) < 1e-4


@pytest.mark.parametrize("model", ["model", "model_gqa", "model_swa"])
def test_a_key_bias_has_no_gradient_without_rotary_positions(done, model):
    gpt, C = load_model(f"out/one-{model}")[0], SHAPE["n_embd"]
    x = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(0))
    gpt(x, x).backward()
    for block in gpt.transformer.h:  # it adds the same to all scores of a query, which softmax does not see
        q, kv = block.attn.c_attn.bias.grad.tensor_split([C])
        k, v = kv.chunk(2)
        assert k.norm() < 1e-5 * min(q.norm(), v.norm())


@pytest.mark.parametrize("mode", ["again-ddp2", "again-fsdp2"])
def test_recomputing_activations_changes_nothing(done, mode):
    assert max(farthest(log("one", MODELS[-1]), log(mode, MODELS[-1]), key) for key in LOGGED) < 1e-4


@pytest.mark.parametrize("mode", ["bf16-ddp2", "bf16-fsdp2"])
def test_in_bf16_the_losses_are_within_one_percent(done, mode):
    assert farthest(log("bf16"), log(mode), "train_loss") < 0.01
    assert farthest(log("one"), log(mode), "train_loss") < 0.01


@pytest.mark.parametrize(("mode", "model"), [(mode, "model") for mode in MODES])
def test_the_ranks_share_out_the_same_global_batch_at_every_step(done, mode, model):
    steps = zip(*(rank["sequences"] for rank in done[mode, model]), strict=True)
    for step, shares in enumerate(steps):
        assert sorted(itertools.chain(*shares)) == list(range(24 * step, 24 * step + 24))
        assert {len(share) for share in shares} == {24 // len(shares)}


def test_fsdp_holds_at_most_0_55_of_what_ddp_holds_after_the_last_backward(done):
    assert held(done, "fsdp2") < 0.55 * held(done, "ddp2")


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2", "fsdp4"])
def test_saving_holds_no_more_than_the_step_before_it(done, mode):
    for rank in done[f"wide-{mode}", "model"]:  # which had gradients besides
        assert 0 < max(rank["saving"]) <= max(rank["bytes"])


def tables(notes):
    """The tables of docs/DISTRIBUTED.md, as {name: lines}."""
    parity = ["| largest difference: logged / weights | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for model in MODELS:
        cells = []
        for mode in MODES:
            logged = max(farthest(log("one", model), log(mode, model), key) for key in LOGGED)
            cells.append(f"{logged:.0e} / {weights_apart(mode, model):.0e}")
        parity.append(f"| `{model}.py` | " + " | ".join(cells) + " |")
    memory = ["| mode | MB per rank | of DDP's |", "|---|---|---|"]
    for mode in WEIGHED:
        share = held(notes, mode) / held(notes, "ddp2")
        memory.append(f"| {mode} | {held(notes, mode) / 1e6:.2f} | {share:.2f} |")
    return {"parity": parity, "memory": memory}


if __name__ == "__main__":  # write the tables into docs/DISTRIBUTED.md
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_tiny(Path())
        made = tables(run_all())
    path = ROOT / "docs/DISTRIBUTED.md"
    text = path.read_text(encoding="utf-8")
    for name, lines in made.items():
        print("\n".join(lines))
        table = "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])
        text = re.sub(rf"<!-- {name} -->(\n(.*\n)*?<!-- end -->)?", lambda match, table=table: table, text)
    path.write_text(text, encoding="utf-8")
