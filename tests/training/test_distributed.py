"""train.py in several processes: DDP, FSDP and HSDP compute, save and refuse what one process does.

Starting Python and torch takes longer than a tiny run. So tests/helpers/launched.py forks the
ranks of each world size from one process, they do many runs one after the other, and the tests look
at the runs' directories and at what the ranks recorded. These runs are a job of
tests/helpers/background.py. test_launches.py tests torchrun itself.

    pytest -k model_mine          trains that model alone
    PYTHONPATH=.:tests:tests/helpers python tests/training/test_distributed.py
                                  writes docs/DISTRIBUTED.md's tables
"""

import itertools
import os
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TEXT, read_log, write_dataset, write_tiny
from ranks import ROOT, SHORT, command, fork, losses, same_weights
from runs import stop_in_step
from save_memory import save_memory
from transformers import AutoModelForCausalLM
from variants import MODELS

import sample
import train
from common import checkpoint
from common.pretrained import load_model
from tools.export import export

# mode: world size, options
MODES = {
    "ddp2": (2, {}),
    "fsdp2": (2, {"fsdp": True}),
    "fsdp3": (3, {"fsdp": True}),
    "ddp4": (4, {}),
    "hsdp 2x2": (4, {"fsdp": True, "shard_degree": 2}),
}
ALL_MODES = MODES | {"fsdp4": (4, {"fsdp": True})}
WIDE = {"n_layer": 4, "n_embd": 128, "max_steps": 3}  # parameters need most of the memory
NARROW = {"n_embd": 2, "n_head": 1, "max_steps": 12}  # vectors of 2 elements, for 4 ranks
# One run that each mode resumes from the checkpoint of the mode before it, in launch order.
CHAIN = ["fsdp2", "ddp2", "fsdp3", "hsdp 2x2", "ddp4", "fsdp4"]
LOGGED = ["train_loss", "grad_norm", "val_loss", "val_bits_per_byte", "train_eval_loss"]
MUON = {"optimizer": "muon"}
MUON_STEPS = {"max_steps": 20}
MUON_MODEL = "model_rope_gqa_swa"  # c_attn has fewer rows for k and v than for q


def is_slow(mode, model):
    """Return whether only `pytest -m slow` trains a model in a mode.

    A mode shards and sums parameters, whatever they compute. model_rope_gqa_swa has those of each
    variant, so it and model.py are enough for the modes of three and four ranks.
    """
    world_size, _ = MODES[mode]
    return world_size > 2 and model in ("model_rope", "model_gqa", "model_swa")


# Launches -------------------------------------------------------------------------------------


# The runs -------------------------------------------------------------------------------------


def refused(**options):
    """Return a run of two ranks with options that are refused."""
    return {"argv": command("refused", 2, **options)}


# Runs of two ranks that are refused, and the options, numbers and names in the one line of stderr.
REFUSED = {
    "a shard_degree that does not divide": (
        refused(fsdp=True, shard_degree=3),
        ["shard_degree=3", "2"],
    ),
    "float16 with fsdp": (refused(fsdp=True, dtype="float16"), ["dtype=float16", "fsdp"]),
    "a batch that the ranks cannot divide": (
        refused(total_batch_size=288, batch_size=6),
        ["total_batch_size=288", "192", "384"],
    ),
    "a missing dataset": (refused(dataset="none"), ["data/none", "prepare_data.py"]),
    "a dataset that cannot be prepared": (
        refused(dataset="shakespeare_char") | {"folders": ["undecodable", "undecodable"]},
        ["tinyshakespeare.txt", "UTF-8"],
    ),
    "more ranks than GPUs": (
        refused(device="cuda"),
        ["--nproc_per_node" if torch.cuda.is_available() else "cuda:0"],
    ),
    "an unknown option": (refused(lr=1), ["lr", "learning_rate"]),
    "ranks with other options": (
        {"argv": [command("refused", 2, seed=1), command("refused", 2, seed=2)]},
        ["rank 0", "seed=1", "rank 1", "seed=2"],
    ),
    "ranks with other data": (
        {"argv": command("refused", 2), "folders": [".", "other"]},
        ["rank 0", "9080", "rank 1", "8980"],
    ),
    "a parameter without gradient, DDP": (
        refused() | {"unused": [8, 8]},
        ["model.py", "transformer.h.0.unused"],
    ),
    "a parameter without gradient, FSDP": (
        {"argv": command("late", 2, fsdp=True), "unused": [8, 8]},
        ["model.py", "transformer.h.0.unused"],
    ),
    "a parameter without dimension, FSDP": (
        refused(fsdp=True) | {"unused": []},
        ["model.py", "transformer.h.0.unused", "fsdp=True"],
    ),
    "machines with different out_dirs": (
        {"argv": command("apart", 2), "folders": [".", "apart"]},
        ["out/apart-model"],
    ),
}


def write_other_folders():
    """Make folders: `other` with shorter data, `apart` with the same, `undecodable` with bad text.

    Also write the text of a dataset that is not yet prepared.
    """
    ids = list(TEXT.encode())
    write_dataset(Path("other/data/tiny"), ids[:-700], ids[-600:], {"tokenizer": "byte"})
    os.makedirs("apart")
    os.symlink(Path("data").absolute(), "apart/data")
    for folder, content in ((".", TEXT.encode()), ("undecodable", b"\xff")):
        path = Path(folder, "data/download/tinyshakespeare.txt")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)


def memory_runs(world_size):
    runs = {}
    for mode, (ranks, options) in ALL_MODES.items():
        if ranks == world_size:
            argv = command(f"wide-{mode}", world_size, **WIDE, **options)
            runs[f"wide-{mode}"] = {"argv": argv, "measure_bytes": True}
    return runs


def chain_runs(world_size, name, **changed):
    """Return the runs of CHAIN: each ends with a signal, two steps after the one before."""
    runs = {}
    for i, mode in enumerate(CHAIN):
        ranks, options = ALL_MODES[mode]
        if ranks == world_size:
            argv = command(name, world_size, **options, **changed, max_steps=16)
            step = 2 * i + 4
            runs[f"{name}-{mode}"] = {"argv": argv, "signal": "SIGTERM", "rank": 0, "step": step}
    return runs


def two_rank_runs(mode):
    """Return runs in bf16, with recomputed activations, with loaded weights, and interrupted."""
    _, options = MODES[mode]
    bf16 = command(f"bf16-{mode}", 2, dtype="bfloat16", **options)
    recompute = command(
        f"recompute-{mode}", 2, MODELS[-1], activation_checkpointing=True, **options
    )
    init_from = {"init_from": f"out/{mode}-model", "max_steps": 1}
    loaded = command(f"loaded-{mode}", 2, **SHORT | init_from, **options)
    return {
        f"bf16-{mode}": {"argv": bf16},
        f"recompute-{mode}": {"argv": recompute},
        f"loaded-{mode}": {"argv": loaded},
        **interrupted_runs(mode),
    }


def interrupted_runs(mode, name="", **changed):
    """Return a run that is stopped by a signal and resumed, and one that is not."""
    world_size, options = MODES[mode]
    name = name or mode
    options = options | SHORT | changed
    stopped = command(f"stopped-{name}", world_size, **options)
    uninterrupted = command(f"uninterrupted-{name}", world_size, **options)
    return {
        f"stopped-{name}": {"argv": stopped, "signal": "SIGTERM", "rank": 1, "step": 7},
        f"resumed-{name}": {"argv": stopped},
        f"uninterrupted-{name}": {"argv": uninterrupted},
    }


def muon_runs(world_size):
    """Return a run with Muon in each mode, a chain of them, and an interrupted one under FSDP."""
    runs = chain_runs(world_size, "muon-chain", **MUON)
    for mode, (ranks, options) in MODES.items():
        if ranks == world_size:
            argv = command(f"muon-{mode}", world_size, MUON_MODEL, **options, **MUON | MUON_STEPS)
            runs[f"muon-{mode}"] = {"argv": argv}
    if world_size == 2:
        runs.update(interrupted_runs("fsdp2", "muon-fsdp2", **MUON))
    return runs


def runs_of(world_size, pairs, with_others):
    """Return {name: run} for a world size.

    The runs are those of the (mode, model) pairs and, with_others, all that other tests look at.
    """
    runs = {}
    for mode, model in pairs:
        ranks, options = MODES[mode]
        if ranks == world_size:
            argv = command(mode, world_size, model, **options)
            runs[f"{mode}-{model}"] = {"argv": argv}
    if not with_others:
        return runs
    runs.update(memory_runs(world_size))
    runs.update(chain_runs(world_size, "chain"))
    runs.update(muon_runs(world_size))
    if world_size == 2:
        runs.update(two_rank_runs("ddp2"))
        runs.update(two_rank_runs("fsdp2"))
        argv = command("unprepared", 2, dataset="shakespeare_char", max_steps=1)
        runs["unprepared"] = {"argv": argv}
        for name, (run, _) in REFUSED.items():
            runs[f"refused: {name}"] = run
    if world_size == 4:
        runs.update(interrupted_runs("ddp4"))  # three and more ranks sum in an order of their own
        argv = command("narrow", 4, fsdp=True, **NARROW)
        runs["narrow-fsdp4"] = {"argv": argv, "signal": "SIGTERM", "rank": 0, "step": 5}
    return runs


def run_all(pairs, with_others):
    """Do all runs in the working directory.

    Returns {name: the record of each rank}, and the stderr of the ranks.
    """
    for model in dict.fromkeys(model for _, model in pairs):
        train.main(command("one", model=model))
    if with_others:
        train.main(command("bf16", dtype="bfloat16"))
        write_other_folders()
        train.main(command("muon", model=MUON_MODEL, **MUON | MUON_STEPS))
        stop_in_step(2, command("chain", max_steps=16))
        stop_in_step(2, command("muon-chain", **MUON, max_steps=16))
    runs = {}
    for world_size in (2, 3, 4):
        named = runs_of(world_size, pairs, with_others)
        if named:
            runs[world_size] = named
    by_world_size, stderr = fork({size: list(named.values()) for size, named in runs.items()})
    records = {}
    for world_size, of_ranks in by_world_size.items():
        for i, name in enumerate(runs[world_size]):
            records[name] = [of_rank[i] for of_rank in of_ranks]
    if with_others:
        resumed = {
            "chain": {"max_steps": 16},
            "muon-chain": MUON | {"max_steps": 16},
            "narrow": NARROW,
        }
        for name, options in resumed.items():
            train.main(command(name, **options))
            train.main(command(f"uninterrupted-{name}", **options))
    return records, stderr


def do_selected_runs(tests):
    """Do the runs that the selected tests look at: those of their modes and models, or all."""
    pairs = []
    with_others = False
    for test in tests:
        params = test.callspec.params if hasattr(test, "callspec") else {}
        if "mode" in params and "model" in params:
            pairs.append((params["mode"], params["model"]))
        else:
            with_others = True
    if with_others:
        pairs += [pair for pair in itertools.product(MODES, MODELS) if not is_slow(*pair)]
    return run_all(list(dict.fromkeys(pairs)), with_others)


BACKGROUND = {"launches": do_selected_runs}


@pytest.fixture(scope="module")
def launches(background):
    """Return what run_all() returned for the selected tests, in its working directory."""
    with background.result("launches") as result:
        yield result


@pytest.fixture
def records(launches):
    """Return {name of a run: the record of each rank}."""
    return launches[0]


@pytest.fixture
def stderr(launches):
    return launches[1]


def log(name, model="model"):
    return read_log(Path(f"out/{name}-{model}"))


def largest_difference(log_a, log_b, key):
    """Return the largest relative difference of a logged number in two logs of the same steps."""
    assert [a["step"] for a in log_a] == [b["step"] for b in log_b]
    differences = []
    for a, b in zip(log_a, log_b, strict=True):
        if key in a:
            differences.append(abs(a[key] - b[key]) / abs(a[key]))
    return max(differences)


def without_key_bias(bias, C):
    """Return a c_attn.bias without the elements for the keys."""
    kv_size = (len(bias) - C) // 2
    q, _, v = bias.split([C, kv_size, kv_size])
    return torch.cat([q, v])


def weight_difference(mode, model, one="one"):
    """Return the largest difference of a tensor from that of one process, relative in norm.

    The key biases of models without rotary positions are left out. Their gradient is rounding
    error, see below, which Adam scales up to full steps.
    """
    one, _ = load_model(f"out/{one}-{model}")
    other, _ = load_model(f"out/{mode}-{model}")
    differences = []
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if name.endswith("c_attn.bias") and "rope" not in model:
            a = without_key_bias(a, one.config.n_embd)
            b = without_key_bias(b, one.config.n_embd)
        difference = (a - b).norm() / a.norm()
        differences.append(difference.item())
    return max(differences)


# The same numbers in every mode ---------------------------------------------------------------

each_mode_and_model = pytest.mark.parametrize(
    ("mode", "model"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if is_slow(*pair) else ())
        for pair in itertools.product(MODES, MODELS)
    ],
)


@each_mode_and_model
@pytest.mark.parametrize("key", LOGGED)
def test_every_step_is_that_of_one_process(launches, mode, model, key):
    assert len(log(mode, model)) == 51
    assert largest_difference(log("one", model), log(mode, model), key) < 1e-4


@each_mode_and_model
def test_the_weights_are_those_of_one_process(launches, mode, model):
    assert weight_difference(mode, model) < 1e-4


@pytest.mark.parametrize("model", ["model", "model_gqa", "model_swa"])
def test_a_key_bias_has_no_gradient_without_rotary_positions(launches, model):
    """It adds the same to all scores of a query, which softmax does not change."""
    gpt, _ = load_model(f"out/one-{model}")
    x = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(0))
    gpt(x, x).backward()
    for block in gpt.transformer.h:
        q, kv = block.attn.c_attn.bias.grad.tensor_split([gpt.config.n_embd])
        k, v = kv.chunk(2)
        assert k.norm() < 1e-5 * min(q.norm(), v.norm())


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
@pytest.mark.parametrize("key", LOGGED)
def test_recomputing_activations_changes_nothing(launches, mode, key):
    one, recompute = log("one", MODELS[-1]), log(f"recompute-{mode}", MODELS[-1])
    assert largest_difference(one, recompute, key) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", LOGGED)
def test_every_step_of_muon_is_that_of_one_process(launches, mode, key):
    one, other = log("muon", MUON_MODEL), log(f"muon-{mode}", MUON_MODEL)
    assert len(other) == 21
    assert largest_difference(one, other, key) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_the_weights_of_muon_are_those_of_one_process(launches, mode):
    assert weight_difference(f"muon-{mode}", MUON_MODEL, one="muon") < 1e-4


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
@pytest.mark.parametrize("one", ["bf16", "one"])
def test_in_bf16_the_losses_are_within_one_percent(launches, mode, one):
    assert largest_difference(log(one), log(f"bf16-{mode}"), "train_loss") < 0.01


@pytest.mark.parametrize(("mode", "model"), [(mode, "model") for mode in MODES])
def test_the_ranks_divide_the_same_global_batch_at_every_step(records, mode, model):
    of_ranks = [record["sequences"] for record in records[f"{mode}-{model}"]]
    for step, sequences in enumerate(zip(*of_ranks, strict=True)):
        assert sorted(itertools.chain(*sequences)) == list(range(24 * step, 24 * step + 24))
        assert {len(of_rank) for of_rank in sequences} == {24 // len(sequences)}


# Memory ---------------------------------------------------------------------------------------


def memory_per_rank(records, mode):
    """Return the most bytes that a rank's tensors have before the last step of a wide run."""
    return max(record["step_bytes"][-1] for record in records[f"wide-{mode}"])


def test_fsdp_needs_at_most_0_55_of_the_memory_of_ddp_after_the_last_backward(records):
    assert memory_per_rank(records, "fsdp2") < 0.55 * memory_per_rank(records, "ddp2")


@pytest.mark.parametrize("mode", ["ddp2", "ddp4"])
def test_the_gradients_of_ddp_stay_in_its_buckets_from_step_to_step(launches, records, mode):
    """Between the steps they are zero, and have no memory of their own."""
    model, _ = load_model(f"out/wide-{mode}-model")
    expected = sum(p.nbytes for p in model.parameters())
    for record in records[f"wide-{mode}"]:
        assert set(record["kept_bytes"]) == {expected}


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2", "fsdp4"])
def test_saving_needs_no_more_memory_than_the_step_before_it(records, mode):
    for record in records[f"wide-{mode}"]:  # a save needs no gradients, a step does
        assert 0 < max(record["saving_bytes"]) <= max(record["step_bytes"])


# Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "muon-chain", "narrow"])
@pytest.mark.parametrize("key", LOGGED)
def test_a_run_resumed_in_other_modes_is_the_uninterrupted_one(launches, name, key):
    """chain: each mode resumes another. narrow: four ranks shard vectors of two elements."""
    assert largest_difference(log(f"uninterrupted-{name}"), log(name), key) < 1e-4


@pytest.mark.parametrize("mode", CHAIN)
@pytest.mark.parametrize("name", ["chain", "muon-chain"])
def test_every_mode_resumed_the_chain_where_the_previous_one_had_stopped(records, name, mode):
    for record in records[f"{name}-{mode}"]:
        assert len(record["sequences"]) == 3  # two steps were finished, the third was dropped


def test_four_ranks_finished_five_steps_of_the_narrow_run(records):
    for record in records["narrow-fsdp4"]:
        assert len(record["sequences"]) == 6  # the sixth was dropped


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
@pytest.mark.parametrize(("name", "steps"), [("stopped", 8), ("resumed", 5), ("uninterrupted", 12)])
def test_a_signal_to_one_rank_stops_all_in_the_same_step(records, mode, name, steps):
    for record in records[f"{name}-{mode}"]:  # 8: seven steps were finished, the eighth was dropped
        assert len(record["sequences"]) == steps
        assert record["status"] == 0


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2"])
def test_several_ranks_start_from_the_weights_of_a_run(launches, mode):
    before, after = log(mode)[-1], log(f"loaded-{mode}")[0]
    assert after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-5)


@pytest.mark.parametrize("mode", ["ddp2", "fsdp2", "ddp4", "muon-fsdp2"])
def test_resuming_after_a_signal_gives_the_same_bits(launches, mode):
    stopped, uninterrupted = f"stopped-{mode}", f"uninterrupted-{mode}"
    assert [step for step, *_ in losses(stopped)] == list(range(13))
    assert losses(stopped) == losses(uninterrupted)
    assert same_weights(stopped, uninterrupted)


def shard_sizes(mode):
    """Return the sizes of the files of tensors in a checkpoint, in bytes."""
    path = Path(f"out/uninterrupted-{mode}-model/step_00000012")
    return [file.stat().st_size for file in path.glob("*.safetensors")]


def test_a_checkpoint_of_fsdp_has_a_file_per_rank(launches):
    assert len(shard_sizes("fsdp2")) == 2


def test_a_checkpoint_of_ddp_has_the_size_of_one_of_fsdp(launches):
    """It has one copy of each tensor; only the headers of the files differ."""
    assert sum(shard_sizes("fsdp2")) == pytest.approx(sum(shard_sizes("ddp2")), rel=0.1)


def test_one_process_exports_a_checkpoint_of_fsdp(launches):
    export("out/uninterrupted-fsdp2-model", "exported")
    assert AutoModelForCausalLM.from_pretrained("exported").config.n_embd == 40


def test_one_process_samples_from_a_checkpoint_of_fsdp(launches, capsys):
    init_from = "--init_from=out/uninterrupted-fsdp2-model"
    sample.main([init_from, "--max_new_tokens=5", "--prompt=def "])
    assert capsys.readouterr().out.startswith("def ")


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_ends_both_ranks_with_status_2(records, name):
    assert [record["status"] for record in records[f"refused: {name}"]] == [2, 2]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_that_names_its_reason(stderr, name):
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(REFUSED)
    line = lines[list(REFUSED).index(name)]
    _, expected = REFUSED[name]
    assert [text for text in expected if text not in line] == []


def test_a_refused_run_writes_no_file(launches):
    written = Path("out/refused-model").rglob("*")
    assert [path for path in written if path.is_file()] == []


def test_two_ranks_prepare_a_small_dataset_that_is_missing(records):
    assert [record["status"] for record in records["unprepared"]] == [0, 0]
    files = sorted(path.name for path in Path("data/shakespeare_char").iterdir())
    assert files == ["meta.json", "train.bin", "val.bin"]


# docs/DISTRIBUTED.md --------------------------------------------------------------------------


def parity_table():
    rows = [
        "| largest difference: logged / weights | " + " | ".join(MODES) + " |",
        "|---" * (len(MODES) + 1) + "|",
    ]
    for model in MODELS:
        cells = []
        for mode in MODES:
            one, other = log("one", model), log(mode, model)
            logged = max(largest_difference(one, other, key) for key in LOGGED)
            cells.append(f"{logged:.0e} / {weight_difference(mode, model):.0e}")
        rows.append(f"| `{model}.py` | " + " | ".join(cells) + " |")
    return rows


def memory_table(records):
    rows = ["| mode | MB per rank | of DDP's |", "|---|---|---|"]
    ddp = memory_per_rank(records, "ddp2")
    for mode in ALL_MODES:
        memory = memory_per_rank(records, mode)
        rows.append(f"| {mode} | {memory / 1e6:.2f} | {memory / ddp:.2f} |")
    return rows


def saving_table():
    state, extra = save_memory(Path(), n_layer=12, n_embd=768, file_bytes=checkpoint.FILE_BYTES)
    return [
        "| one process | GB of state | GB more while it saves |",
        "|---|---|---|",
        f"| GPT-2 124M | {state / 1e9:.2f} | {extra / 1e9:.2f} |",
    ]


def measure_tables():
    """Return the tables as {name: rows}."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_tiny(Path())
        records, _ = run_all(list(itertools.product(MODES, MODELS)), with_others=True)
        return {
            "parity": parity_table(),
            "memory": memory_table(records),
            "saving": saving_table(),
        }


def write_tables():
    """Measure the tables and write them into docs/DISTRIBUTED.md, between their markers."""
    path = ROOT / "docs/DISTRIBUTED.md"
    text = path.read_text(encoding="utf-8")
    for name, rows in measure_tables().items():
        print("\n".join(rows))
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        start = text.index(begin) + len(begin)
        text = text[:start] + "\n".join(rows) + "\n" + text[text.index(end, start) :]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    write_tables()
