"""train.py in several processes: DDP, FSDP and HSDP compute, save and refuse what one process does.

Starting Python and torch takes longer than a tiny run. So the ranks of every world size are forked from one process,
they do many runs one after the other (tests/launched.py), and the tests look at what these left. test_launches.py has
torchrun itself. pytest -k model_mine does the runs of that model alone.
"""

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
import test_resume
import torch
from conftest import TEXT, arguments, read_log, write_dataset, write_tiny
from test_checkpoint import save_memory
from test_variants import MODELS
from transformers import AutoModelForCausalLM

import sample
import train
from common import checkpoint
from common.pretrained import load_model
from tools.export import export

ROOT = Path(train.__file__).parent
# Sizes that 2 and 4 divide and 3 does not, an odd vocabulary (257), two micro-steps for any number of ranks.
SHAPE = dict(
    n_head=4,
    n_embd=40,
    n_kv_head=2,
    window=5,
    total_batch_size=384,
    dropout=0.0,
    learning_rate=3e-3,
)
SHAPE |= dict(
    max_steps=50, eval_interval=25, checkpoint_interval=100, eval_tokens=400, log_interval=50
)
# mode: world size, options
MODES = {"ddp2": (2, {}), "fsdp2": (2, {"fsdp": True}), "fsdp3": (3, {"fsdp": True})}
MODES |= {"ddp4": (4, {}), "hsdp 2x2": (4, {"fsdp": True, "shard_degree": 2})}
ALL_MODES = MODES | {"fsdp4": (4, {"fsdp": True})}
WIDE = dict(
    n_layer=4, n_embd=128, max_steps=3
)  # so wide that the parameters are most of the memory
NARROW = dict(n_embd=2, n_head=1, max_steps=12)  # vectors of 2 elements: fewer than ranks
SHORT = dict(max_steps=12, eval_interval=6, dropout=0.1)
# A run that each mode resumes from the checkpoint of the mode before it, in the order of the launches.
CHAIN = ["fsdp2", "ddp2", "fsdp3", "hsdp 2x2", "ddp4", "fsdp4"]
LOGGED = ["train_loss", "grad_norm", "val_loss"]


def command(name, ranks=1, model="model", **options):
    """The command line of a run for so many ranks."""
    own = train.model_module(model).GPTConfig.__dataclass_fields__
    shape = {
        key: value
        for key, value in SHAPE.items()
        if key not in ("n_kv_head", "window") or key in own
    }
    shape |= {"batch_size": 12 // ranks, "out_dir": f"out/{name}-{model}"}
    return arguments(model=model, **shape | options)


def torchrun(ranks, *argv, **options):
    """Start torchrun with so many ranks; returns the process."""
    flags = ["--standalone", f"--nproc_per_node={ranks}"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    line = [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, argv)]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, timeout=300):
    """Wait for a launch: (status, stdout, stderr). One that hangs is killed with all of its workers."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"hung: {out[-2000:]} {err[-2000:]}")
    return process.returncode, out, err


def notes_of(ranks, path):
    """What tests/launched.py noted: for each rank a list over the runs."""
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(ranks)]


def launch(ranks, runs, **options):
    """Runs in one launch of torchrun: for each rank what it noted of the runs."""
    Path("runs.json").write_text(json.dumps(runs))
    status, out, err = finish(torchrun(ranks, ROOT / "tests/launched.py", "runs.json", **options))
    assert status == 0, out[-2000:] + err[-4000:]
    return notes_of(ranks, "runs.json")


def fork(runs):
    """{world size: runs}, in forked processes: {world size: for each rank what it noted}, and stderr."""
    for ranks in runs:
        Path(f"runs{ranks}.json").write_text(json.dumps(runs[ranks]))
    line = [
        sys.executable,
        ROOT / "tests/launched.py",
        *(f"{ranks}:runs{ranks}.json" for ranks in runs),
    ]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    status, out, err = finish(process)
    assert status == 0, out[-2000:] + err[-4000:]
    return {ranks: notes_of(ranks, f"runs{ranks}.json") for ranks in runs}, err


def stop_in_step(step, argv):
    """Train in this process until a signal comes in a step (from 0)."""
    original = train.train_step

    def stopping(run):
        if run.step == step:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    train.train_step = stopping
    try:
        train.main(argv)
    finally:
        train.train_step = original


# The runs -------------------------------------------------------------------------------------

# What all ranks refuse together: options, and what the one line must name.
REFUSED = {
    "a shard_degree that does not divide": (
        dict(fsdp=True, shard_degree=3),
        ["shard_degree=3", "2"],
    ),
    "float16 with fsdp": (dict(fsdp=True, dtype="float16"), ["dtype=float16", "fsdp"]),
    "a batch that the ranks cannot divide": (
        dict(total_batch_size=288, batch_size=6),
        ["batch_size x block_size x processes = 6 x 16 x 2 = 192", "192 and 384"],
    ),
    "a missing dataset": (dict(dataset="shakespeare"), ["python prepare_data.py shakespeare"]),
    "more ranks than GPUs": (
        dict(device="cuda"),
        ["cuda:0" if not torch.cuda.is_available() else "--nproc_per_node"],
    ),
    "an unknown option": (dict(lr=1), ["lr", "learning_rate"]),
    "ranks with other options": ("ranks differ", ["rank 1 has seed=2", "rank 0 has seed=1"]),
    "ranks with other data": (
        "data differ",
        ["rank 1 has data=", "8980", "rank 0 has data=", "9080"],
    ),
    "machines without a shared out_dir": ("folders differ", ["out/apart-model"]),
}


def refused_run(options):
    """A run for two ranks that must be refused."""
    if options == "ranks differ":
        return {"argv": [command("refused", 2, seed=seed) for seed in (1, 2)]}
    if options == "data differ":
        return {"argv": command("refused", 2), "folders": [".", "other"]}
    if options == "folders differ":
        return {"argv": command("apart", 2), "folders": [".", "apart"]}
    return {"argv": command("refused", 2, **options)}


def write_other_folders():
    """Two more working directories: with shorter data, and with the same data but another out/."""
    ids = list(TEXT.encode())
    write_dataset(Path("other/data/tiny"), ids[:-700], ids[-600:], {"tokenizer": "byte"})
    os.makedirs("apart")
    os.symlink(Path("data").absolute(), "apart/data")


def runs_of(ranks, pairs, more):
    """{name: run} for one launch: the (mode, model) pairs, and with `more` all else that a test looks at."""
    runs = {}
    for mode, model in pairs:
        size, options = MODES[mode]
        if size == ranks:
            runs[mode, model] = {"argv": command(mode, ranks, model, **options)}
    if not more:
        return runs
    for mode, (size, options) in ALL_MODES.items():
        if size == ranks:
            runs[f"wide-{mode}"] = {
                "argv": command(f"wide-{mode}", ranks, **WIDE, **options),
                "weigh": True,
            }
    for mode in CHAIN:
        size, options = ALL_MODES[mode]
        if size == ranks:
            argv = command("chain", ranks, **options, max_steps=16)
            step = 2 * CHAIN.index(mode) + 4
            runs[f"chain-{mode}"] = {"argv": argv, "signal": "SIGTERM", "rank": 0, "step": step}
    if ranks == 2:
        for mode in ("ddp2", "fsdp2"):
            options = MODES[mode][1]
            runs[f"bf16-{mode}"] = {"argv": command(f"bf16-{mode}", 2, dtype="bfloat16", **options)}
            recompute = dict(activation_checkpointing=True, **options)
            runs[f"again-{mode}"] = {"argv": command(f"again-{mode}", 2, MODELS[-1], **recompute)}
            stopped, whole = (
                command(f"{name}-{mode}", 2, **options, **SHORT) for name in ("stopped", "whole")
            )
            runs[f"stopped-{mode}"] = {"argv": stopped, "signal": "SIGTERM", "rank": 1, "step": 7}
            runs[f"resumed-{mode}"] = {"argv": stopped}
            runs[f"whole-{mode}"] = {"argv": whole}
        runs |= {f"refused: {name}": refused_run(options) for name, (options, _) in REFUSED.items()}
    if ranks == 4:
        argv = command("narrow", 4, fsdp=True, **NARROW)
        runs["narrow-fsdp4"] = {"argv": argv, "signal": "SIGTERM", "rank": 0, "step": 5}
    return runs


def run_all(pairs, more):
    """All runs, in the working directory: {name: what each rank noted}, and stderr of the ranks."""
    for model in dict.fromkeys(model for _, model in pairs):
        train.main(command("one", model=model))
    if more:
        train.main(command("bf16", dtype="bfloat16"))
        write_other_folders()
        stop_in_step(2, command("chain", max_steps=16))
    runs = {ranks: runs_of(ranks, pairs, more) for ranks in (2, 3, 4)}
    noted, errors = fork({ranks: list(runs[ranks].values()) for ranks in runs if runs[ranks]})
    notes = {}
    for ranks in noted:
        notes |= {name: [rank[i] for rank in noted[ranks]] for i, name in enumerate(runs[ranks])}
    if more:
        for name, options in (("chain", dict(max_steps=16)), ("narrow", NARROW)):
            train.main(command(name, **options))
            train.main(command(f"unbroken-{name}", **options))
    return notes, errors


def wanted(session):
    """The (mode, model) pairs that the chosen tests look at, and whether one of them looks at more."""
    params = [
        item.callspec.params if hasattr(item, "callspec") else {}
        for item in session.items
        if "done" in item.fixturenames
    ]
    pairs = [(p["mode"], p["model"]) for p in params if "mode" in p and "model" in p]
    more = len(pairs) < len(params)
    if more:
        pairs = itertools.product(MODES, MODELS)
    return list(dict.fromkeys(pairs)), more


@pytest.fixture(scope="module")
def done(tmp_path_factory, request):
    """What run_all() returns, in its directory, for what the chosen tests look at."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("distributed"))
    write_tiny(Path())
    yield run_all(*wanted(request.session))
    os.chdir(before)


def log(name, model="model"):
    return read_log(Path(f"out/{name}-{model}"))


def losses(name):
    return test_resume.losses(Path(f"out/{name}-model"))


def farthest(a, b, key):
    """The largest relative difference of two logs."""
    assert [x["step"] for x in a] == [y["step"] for y in b]
    return max(abs(x[key] - y[key]) / abs(x[key]) for x, y in zip(a, b, strict=True) if key in x)


def weights_apart(mode, model):
    """The largest norm of a difference of weights over the norm, among the tensors."""
    ours, theirs = (load_model(f"out/{name}-{model}")[0] for name in ("one", mode))
    C, apart = ours.config.n_embd, []
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("c_attn.bias") and "rope" not in model:
            keys = slice(
                C, C + (len(a) - C) // 2
            )  # has no gradient but rounding's, which Adam scales up: see below
            a, b = (torch.cat([p[: keys.start], p[keys.stop :]]) for p in (a, b))
        apart.append(((a - b).norm() / a.norm()).item())
    return max(apart)


def same_weights(a, b):
    a, b = (load_model(f"out/{name}-model")[0].state_dict() for name in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


# The same numbers in every mode ---------------------------------------------------------------

each_mode_and_model = pytest.mark.parametrize(
    ("mode", "model"), list(itertools.product(MODES, MODELS))
)


@each_mode_and_model
@pytest.mark.parametrize("key", LOGGED)
def test_every_step_is_that_of_one_process(done, mode, model, key):
    assert len(log(mode, model)) == 51
    assert farthest(log("one", model), log(mode, model), key) < 1e-4


@each_mode_and_model
def test_the_weights_are_those_of_one_process(done, mode, model):
    assert weights_apart(mode, model) < 1e-4


@pytest.mark.parametrize("model", ["model", "model_gqa", "model_swa"])
def test_a_key_bias_has_no_gradient_without_rotary_positions(done, model):
    gpt, C = load_model(f"out/one-{model}")[0], SHAPE["n_embd"]
    x = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(0))
    gpt(x, x).backward()
    for block in (
        gpt.transformer.h
    ):  # it adds the same to all scores of a query, which softmax does not change
        q, kv = block.attn.c_attn.bias.grad.tensor_split([C])
        k, v = kv.chunk(2)
        assert k.norm() < 1e-5 * min(q.norm(), v.norm())


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_recomputing_activations_changes_nothing(done, mode):
    assert (
        max(
            farthest(log("one", MODELS[-1]), log(f"again-{mode}", MODELS[-1]), key)
            for key in LOGGED
        )
        < 1e-4
    )


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_in_bf16_the_losses_are_within_one_percent(done, mode):
    assert farthest(log("bf16"), log(f"bf16-{mode}"), "train_loss") < 0.01
    assert farthest(log("one"), log(f"bf16-{mode}"), "train_loss") < 0.01


@pytest.mark.parametrize(("mode", "model"), [(mode, "model") for mode in MODES])
def test_the_ranks_divide_the_same_global_batch_at_every_step(done, mode, model):
    notes, _ = done
    steps = zip(*(rank["sequences"] for rank in notes[mode, model]), strict=True)
    for step, shards in enumerate(steps):
        assert sorted(itertools.chain(*shards)) == list(range(24 * step, 24 * step + 24))
        assert {len(shard) for shard in shards} == {24 // len(shards)}


# Memory ---------------------------------------------------------------------------------------


def held(notes, mode):
    """Bytes of the tensors of a rank before the last optimizer step of a wide run, at most."""
    return max(rank["bytes"][-1] for rank in notes[f"wide-{mode}"])


def test_fsdp_holds_at_most_0_55_of_what_ddp_holds_after_the_last_backward(done):
    assert held(done[0], "fsdp2") < 0.55 * held(done[0], "ddp2")


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2", "fsdp4"])
def test_saving_holds_no_more_tensors_than_the_step_before_it(done, mode):
    for rank in done[0][f"wide-{mode}"]:  # which had gradients besides
        assert 0 < max(rank["saving"]) <= max(rank["bytes"])


# Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "narrow"])
def test_a_run_resumed_in_other_modes_is_the_unbroken_one(done, name):
    """chain: every mode resumes from the checkpoint of another. narrow: four ranks shard vectors of two elements."""
    assert max(farthest(log(f"unbroken-{name}"), log(name), key) for key in LOGGED) < 1e-4


def test_every_mode_resumed_the_chain_where_the_one_before_it_had_stopped(done):
    for mode in CHAIN:
        assert {len(rank["sequences"]) for rank in done[0][f"chain-{mode}"]} == {
            3
        }  # the third was dropped
    assert {len(rank["sequences"]) for rank in done[0]["narrow-fsdp4"]} == {6}


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(done, mode):
    for name, steps in (
        ("stopped", 8),
        ("resumed", 5),
        ("whole", 12),
    ):  # the eighth was begun, seven were finished
        for rank in done[0][f"{name}-{mode}"]:
            assert (len(rank["sequences"]), rank["status"]) == (steps, 0)


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_resuming_after_a_signal_gives_the_same_bits(done, mode):
    assert [step for step, *_ in losses(f"stopped-{mode}")] == list(range(13))
    assert losses(f"stopped-{mode}") == losses(f"whole-{mode}") and same_weights(
        f"stopped-{mode}", f"whole-{mode}"
    )


def test_a_sharded_checkpoint_has_a_file_per_rank_and_a_replicated_one_has_one_copy(done):
    files = {
        mode: list(Path(f"out/whole-{mode}-model/step_00000012").glob("*.safetensors"))
        for mode in ("ddp2", "fsdp2")
    }
    assert len(files["fsdp2"]) == 2
    sizes = {mode: sum(path.stat().st_size for path in paths) for mode, paths in files.items()}
    assert sizes["fsdp2"] == pytest.approx(sizes["ddp2"], rel=0.1)  # the headers differ


def test_a_sharded_checkpoint_is_sampled_and_exported_in_one_process(done, capsys):
    export("out/whole-fsdp2-model", "exported")
    assert AutoModelForCausalLM.from_pretrained("exported").config.n_embd == 40
    capsys.readouterr()
    sample.main(["--init_from=out/whole-fsdp2-model", "--max_new_tokens=5", "--prompt=def "])
    assert capsys.readouterr().out.startswith("def ")


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_ends_both_ranks_with_status_2_and_one_line_that_says_why(done, name):
    notes, errors = done
    assert [rank["status"] for rank in notes[f"refused: {name}"]] == [2, 2]
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(REFUSED)
    line = lines[list(REFUSED).index(name)]
    assert [text for text in REFUSED[name][1] if text not in line] == []
    assert not Path("out/refused-model").exists()


# docs/DISTRIBUTED.md --------------------------------------------------------------------------


def tables(notes):
    """The tables of docs/DISTRIBUTED.md, as {name: lines}."""
    parity = [
        "| largest difference: logged / weights | " + " | ".join(MODES) + " |",
        "|---" * (len(MODES) + 1) + "|",
    ]
    for model in MODELS:
        cells = []
        for mode in MODES:
            logged = max(farthest(log("one", model), log(mode, model), key) for key in LOGGED)
            cells.append(f"{logged:.0e} / {weights_apart(mode, model):.0e}")
        parity.append(f"| `{model}.py` | " + " | ".join(cells) + " |")
    memory = ["| mode | MB per rank | of DDP's |", "|---|---|---|"]
    for mode in ALL_MODES:
        fraction = held(notes, mode) / held(notes, "ddp2")
        memory.append(f"| {mode} | {held(notes, mode) / 1e6:.2f} | {fraction:.2f} |")
    saving = ["| one process | GB of state | GB more while it saves |", "|---|---|---|"]
    for name, n_layer, n_embd in (("GPT-2 124M", 12, 768), ("GPT-2 medium, 355M", 24, 1024)):
        state, extra = (
            number / 1e9 for number in save_memory(n_layer, n_embd, checkpoint.FILE_BYTES)
        )
        saving.append(f"| {name} | {state:.2f} | {extra:.2f} |")
    return {"parity": parity, "memory": memory, "saving": saving}


if __name__ == "__main__":  # write the tables into docs/DISTRIBUTED.md
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_tiny(Path())
        made = tables(run_all(list(itertools.product(MODES, MODELS)), more=True)[0])
    path = ROOT / "docs/DISTRIBUTED.md"
    text = path.read_text(encoding="utf-8")
    for name, lines in made.items():
        print("\n".join(lines))
        table = "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])
        text = re.sub(
            rf"<!-- {name} -->(\n(.*\n)*?<!-- end -->)?", lambda match, table=table: table, text
        )
    path.write_text(text, encoding="utf-8")
