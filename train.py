"""Train a GPT: one loop for one CPU or GPU, and for several processes with DDP or FSDP.

    python train.py config/quickstart.py                a minute on two CPU cores, no download
    python train.py config/gpt2.py config/small_gpu.py  GPT-2 124M on FineWeb, a GPU of 8 to 16 GB
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py               8 GPUs, DDP
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --fsdp=True   8 GPUs, FSDP
    python train.py config/quickstart.py --model=model_mine --n_layer=4

The same command resumes an interrupted run. On the same number of processes the resumed run is bit
for bit the uninterrupted one (on CUDA with --deterministic=True), because the data order, the
dropout masks and the learning rate are functions of the seed, the step and the rank.
out_dir/log.jsonl gets one line per optimizer step.

The file reads top to bottom: options, setup, one training step, the loop, main. Every rank must
call a function that is marked "Collective". `group` (common/distributed.py) has the collectives:
an error on any rank inside `with group.exit_together()` ends all ranks with one message, and
`group.exit(message)`, called by all ranks, ends the run.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the other imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

# OpenMP threads that busy-wait slow down everything else on their core, and each other, up to a
# hundredfold; a short spin costs nothing. OpenMP reads this variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch._dynamo.exc import TorchDynamoException

from common import checkpoint, run_dir
from common.dataloader import Loader
from common.device import (
    device_name,
    is_out_of_memory,
    keep_freed_memory,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
    set_float32_precision,
    to_device,
    use_cudnn_attention,
)
from common.distributed import ProcessGroup, describe_lost_rank, full_tensor
from common.errors import UserError, run_program
from common.files import name_in_errors
from common.flops import mfu_flops_per_token
from common.models import make_config, model_module, models_with_option
from common.pretrained import load_model
from configurator import check_minimum, configure_with_model
from prepare_data import open_dataset
from training.optimizer import OPTIMIZERS, make_optimizer
from training.parallel import (
    compile_forward,
    gradient_sync,
    load_initial_weights,
    prepare_blocks,
    settle_ddp_buckets,
    uses_compile,
    wrap_ddp,
)

MAX_TIMEOUT = 10**7  # seconds, four months
WSD_DECAY = 0.2  # fraction of the steps; 10 to 20 % suffice (Hägele et al. 2024, section 3)
MAX_OVERFLOWS = 20  # float16 steps in a row with an infinite gradient before the run stops


# Options that may differ when a run is resumed: they say at which steps something is saved or
# printed, or how the same global batch is computed. The results stay equal up to rounding, with two
# exceptions: max_steps stretches the learning rate schedule, and with dropout > 0 the masks depend
# on the rank and on batch_size. dtype may not differ: if "auto" would now choose another one, pass
# the first one by --dtype.
RESUMABLE_CHANGES = {
    "out_dir",
    "overwrite",
    "eval_only",
    "batch_size",
    "max_steps",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "device",
    "compile",
    "activation_checkpointing",
    "deterministic",
    "fsdp",
    "shard_degree",
    "dist_timeout",
}


@dataclass
class TrainConfig:
    # Run
    out_dir: str | None = None  # for checkpoints and log; None: out/CONFIG, or out/CONFIG-MODEL
    model: str = "model"  # the model file, without .py
    dataset: str = "fineweb"  # folder of data/, made by prepare_data.py
    init_from: str = "scratch"  # scratch, gpt2 to gpt2-xl, a directory, or nanoGPT's ckpt.pt
    overwrite: bool = False  # delete the run in out_dir and start over
    eval_only: bool = False  # evaluate, print the loss, write nothing
    seed: int = 1337  # of weights, data order and dropout
    # Steps
    batch_size: int = 16  # sequences per forward pass and process
    total_batch_size: int = 2**19  # tokens per optimizer step, over all processes and micro-steps
    max_steps: int = 19_073  # optimizer steps: 10 billion tokens
    # Optimizer: weight decay on matrices (embeddings included) only
    optimizer: str = "adamw"  # adamw; muon: the matrices in blocks by Muon, the rest by AdamW
    learning_rate: float = 6e-4  # AdamW's peak, after the warmup
    muon_learning_rate: float = 0.02  # Muon's peak, on the same schedule
    min_lr: float = 6e-5  # AdamW's at the end; Muon's ends at the same fraction of its peak
    warmup_steps: int = 700  # steps of linear increase from 0
    lr_schedule: str = "cosine"  # cosine; wsd: constant, then linear decay over the last fifth
    weight_decay: float = 0.1  # a step multiplies matrices by 1 - their rate * weight_decay
    beta1: float = 0.9  # decay of the mean of the gradient
    beta2: float = 0.95  # decay of the mean of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    # Evaluation, log, checkpoints
    eval_interval: int = 250  # steps between evaluations
    eval_tokens: int = 2**20  # validation tokens, rounded up to whole sequences
    log_interval: int = 10  # steps between lines on the console
    checkpoint_interval: int = 1000  # steps between checkpoints; each new best loss is saved, too
    keep_checkpoints: int = 2  # the last ones; the best is kept besides
    # Device
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32, bfloat16, float16; auto: bfloat16 where it is fast
    compile: bool | str = "auto"  # torch.compile for training; auto: on CUDA
    activation_checkpointing: bool = False  # recompute activations: less memory, a third more work
    deterministic: bool = False  # the same bits on CUDA too; slower
    # Several processes, started by torchrun
    fsdp: bool = False  # shard parameters, gradients and optimizer state (FSDP) instead of DDP
    shard_degree: int = 0  # with fsdp: ranks that share a copy of the model; 0: all, one copy
    dist_timeout: int = 600  # seconds that a rank waits for the others


# Setup ----------------------------------------------------------------------------------------


class StopSignal:
    """Remembers the first SIGTERM or SIGINT inside a `with` block; a second one exits at once.

    In another thread than the main one it does nothing: Python sets signal handlers there only.
    """

    def __init__(self):
        self.received = False
        self._time = 0.0
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self.received:
            self.received = True
            self._time = time.monotonic()
            with contextlib.suppress(OSError):  # stderr is a closed pipe
                os.write(2, b"\nstopping at the next micro-step; a second signal exits at once\n")
            return
        # Ctrl-C in a terminal reaches torchrun and every rank, and torchrun sends it to them again.
        is_echo = "RANK" in os.environ and time.monotonic() - self._time < 1
        if not is_echo:
            os._exit(128 + number)


@dataclass
class Run:
    """What setup() makes and the training loop uses."""

    config: TrainConfig
    out_dir: Path
    record: dict  # for checkpoints: options, model_config, data (sizes, hash), meta (meta.json)
    group: ProcessGroup
    device: torch.device
    dtype: torch.dtype  # of the computation; weights and optimizer state are float32
    loader: Loader
    model: torch.nn.Module  # no prefix of DDP or torch.compile in names; under FSDP sharded
    wrapped: torch.nn.Module  # the module to call: the model, or DDP around it
    forward: Callable  # `wrapped`, compiled or not
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales the loss in float16; does nothing in other dtypes
    step: int  # optimizer steps taken; the next one uses global batch number `step`
    metrics: dict  # of the last step: its line in log.jsonl
    best_loss: float  # lowest validation loss of a saved checkpoint
    stop: StopSignal = field(default_factory=StopSignal)
    overflows: int = 0  # float16 steps in a row with an infinite gradient

    def autocast(self):
        """Return a context that computes in the run's dtype; FSDP gathers parameters in it."""
        enabled = self.dtype != torch.float32 and not self.config.fsdp
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)


def check_config(config, group):
    """Raise UserError for options that make no sense, for this number of ranks."""
    check_minimum(config, 1, "batch_size", "total_batch_size", "max_steps")
    check_minimum(config, 1, "eval_interval", "eval_tokens", "log_interval")
    check_minimum(config, 1, "checkpoint_interval", "keep_checkpoints")
    check_minimum(config, 0, "seed", "learning_rate", "muon_learning_rate", "min_lr")
    check_minimum(config, 0, "warmup_steps", "weight_decay", "grad_clip", "shard_degree")
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer={config.optimizer} must be {' or '.join(OPTIMIZERS)}")
    if config.min_lr > config.learning_rate:
        raise UserError(
            f"min_lr={config.min_lr} must not exceed learning_rate={config.learning_rate}"
        )
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} must be at least 0 and below 1")
    if config.lr_schedule not in ("cosine", "wsd"):
        raise UserError(f"lr_schedule={config.lr_schedule} must be cosine or wsd")
    if config.compile not in (True, False, "auto"):
        raise UserError(f"compile={config.compile} must be auto, True or False")
    if config.fsdp and not group.launched:
        raise UserError(
            "fsdp=True needs torchrun: torchrun --standalone --nproc_per_node=2 train.py ..."
        )
    if config.shard_degree and not config.fsdp:
        raise UserError(f"shard_degree={config.shard_degree} needs --fsdp=True; DDP does not shard")
    if config.shard_degree and group.world_size % config.shard_degree:
        raise UserError(
            f"shard_degree={config.shard_degree} must divide the number of processes, "
            f"{group.world_size}"
        )


def default_out_dir(argv):
    """Return out/ and the stems of the config files, and the model if the command line names one.

    Without a config file it is out/default.
    """
    names = [Path(arg).stem for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    names = names or ["default"]
    names += [arg.partition("=")[2] for arg in argv if arg.startswith("--model=")]
    return "out/" + "-".join(names)


def check_batch(config, block_size, world_size):
    """Raise UserError if an optimizer step is not a whole number of micro-steps."""
    tokens = config.batch_size * block_size * world_size  # of one micro-step on all ranks
    if config.total_batch_size % tokens == 0:
        return
    lower = config.total_batch_size // tokens * tokens
    nearest = [str(n) for n in (lower, lower + tokens) if n > 0]
    names = "batch_size x block_size"
    numbers = f"{config.batch_size} x {block_size}"
    if world_size > 1:
        names += " x processes"
        numbers += f" x {world_size}"
    raise UserError(
        f"total_batch_size={config.total_batch_size} is not a multiple of {names} = "
        f"{numbers} = {tokens}: the nearest are {' and '.join(nearest)}"
    )


def initial_model(config, module, model_options, meta):
    """Return the model of a new run, on the CPU: initialized, or with loaded weights.

    meta   the dataset's meta.json: tokenizer, vocab_size, and more
    """
    data_vocab_size = meta["vocab_size"]
    if model_options.get("vocab_size", data_vocab_size) < data_vocab_size:
        raise UserError(
            f"vocab_size={model_options['vocab_size']} is below the {data_vocab_size} of "
            f"data/{config.dataset}"
        )
    if config.init_from == "scratch":
        torch.manual_seed(config.seed)
        return module.GPT(make_config(module, scratch_options(model_options, meta)))
    model, source_meta = load_model(config.init_from, config.model, model_options)
    if source_meta["tokenizer"] != meta["tokenizer"]:
        raise UserError(
            f"{config.init_from} was trained with the tokenizer {source_meta['tokenizer']}, "
            f"data/{config.dataset} has {meta['tokenizer']}"
        )
    if source_meta.get("chars") != meta.get("chars"):
        raise UserError(
            f"{config.init_from} was trained with a char tokenizer of other characters than "
            f"data/{config.dataset}"
        )
    return model


def scratch_options(model_options, meta):
    """Return the model options of a run from scratch; the vocabulary is by default the data's."""
    return {"vocab_size": meta["vocab_size"]} | model_options


def find_checkpoint_to_resume(config, out_dir):
    """Return the path and the record of the checkpoint to resume from, or (None, None)."""
    if config.overwrite:
        return None, None
    path, stored = run_dir.checkpoint_to_resume(out_dir, rename_damaged=not config.eval_only)
    if config.eval_only and stored is not None:
        # The run is evaluated if init_from is the default or what the run began with. Any other
        # init_from asks for those weights, for example GPT-2's.
        if config.init_from not in ("scratch", stored["options"]["init_from"]):
            return None, None
    if stored is not None:  # an option that is newer than the run had its default
        stored["options"] = asdict(TrainConfig()) | stored["options"]
    return path, stored


def resumed_model_config(config, module, model_options, meta, stored):
    """Return the model config that the options ask for; the caller compares it with `stored`."""
    if config.init_from == "scratch":
        return asdict(make_config(module, scratch_options(model_options, meta)))
    # Model options that are not given were taken from init_from's weights when the run began.
    return stored["model_config"] | model_options


def choose_start(config, module, model_options, record, out_dir):
    """Choose what a run starts from, on rank 0: its last checkpoint or, for a new run, weights.

    Returns (path, stored, model_config, weights): the checkpoint to resume from with its record,
    the model's config, and None; or None, None, the config, and the state dict of the new model.
    """
    path, stored = find_checkpoint_to_resume(config, out_dir)
    if stored is None:
        model = initial_model(config, module, model_options, record["meta"])
        return None, None, asdict(model.config), model.state_dict()
    model_config = resumed_model_config(config, module, model_options, record["meta"], stored)
    check_same_options(record | {"model_config": model_config}, stored, out_dir)
    return path, stored, model_config, None


def check_same_options(now, stored, out_dir):
    """Raise UserError if the run in out_dir was started with other options or another model.

    now, stored   dicts with "options" and "model_config": of this command, of the checkpoint
    """
    options_before = stored["options"] | stored["model_config"]
    options_now = now["options"] | now["model_config"]
    changes = [
        f"{name} was {options_before.get(name)}, is {value}"
        for name, value in options_now.items()
        if name not in RESUMABLE_CHANGES and options_before.get(name) != value
    ]
    if changes:
        _refuse_other_run(out_dir, "; ".join(changes))


def check_same_data(data, stored, out_dir, folder):
    """Raise UserError if the dataset of the run in out_dir, in `folder`, has changed."""
    if data != stored["data"]:
        before = stored["data"]["tokens"]
        now = data["tokens"]
        if now == before:
            _refuse_other_run(out_dir, f"the SHA-256 in {folder}/meta.json has changed")
        _refuse_other_run(out_dir, f"{folder} had {before} tokens [train.bin, val.bin], has {now}")


def _refuse_other_run(out_dir, difference):
    raise UserError(
        f"{out_dir} holds another run ({difference}): choose another --out_dir, or start over "
        "with --overwrite=True"
    )


def setup(config, model_options, argv, group, stack):
    """Collective. Prepare all that the loop needs: data, model, optimizer, the state to resume.

    model_options   those of the command line and the config files
    stack           ExitStack that holds the lock on out_dir until the program ends

    Returns a Run. A run without torchrun prepares a missing dataset if it is one of
    prepare_data.SMALL_DATASETS. Unless eval_only, what an interrupted save left in out_dir is
    removed, and damaged checkpoints are renamed; --overwrite deletes nothing before train(). Rank 0
    initializes or reads the weights, on its CPU, and the other ranks receive them, so that one
    process, DDP and FSDP start with the same bits.
    """
    module = model_module(config.model)
    out_dir = Path(config.out_dir or default_out_dir(argv))
    start = None
    with group.exit_together():
        check_config(config, group)
        device = pick_device(config.device, group.local_rank)
        dtype = pick_dtype(config.dtype, device)
        if config.fsdp and dtype == torch.float16:
            raise UserError("dtype=float16 does not work with fsdp=True: use bfloat16 or float32")
        if config.init_from == "scratch":
            make_config(module, model_options)  # check it before what takes long
        folder, meta = open_dataset(config.dataset, prepare_missing=not group.launched)
        # record["options"] are train.py's own; the model's go into record["model_config"] below.
        resolved = {"out_dir": str(out_dir), "dtype": str(dtype).removeprefix("torch.")}
        record = {"options": asdict(config) | resolved, "meta": meta}
        if group.rank == 0 and not config.eval_only:
            stack.enter_context(run_dir.lock_run(out_dir))
            run_dir.remove_unfinished(out_dir)
        if group.rank == 0:
            *start, weights = choose_start(config, module, model_options, record, out_dir)
        else:
            weights = None  # rank 0 sends them
    path, stored, model_config = group.broadcast(start)

    with group.exit_together():
        # No memory yet: under FSDP a device may have room for its shard only.
        with torch.device("meta"):
            model = module.GPT(make_config(module, model_config))
        loader = Loader(folder, model.config.block_size, model.config.vocab_size, config.seed)
        tokens = [loader.n_train, loader.n_val]
        data = {"tokens": tokens, "sha256": meta.get("train", {}).get("sha256")}
        if not config.eval_only:
            check_batch(config, loader.block_size, group.world_size)
        if stored is not None:
            check_same_data(data, stored, out_dir, folder)
    # End the run if the ranks were started with different options or data.
    group.check_equal(record["options"] | model_options | {"data": data})

    set_float32_precision(device, config.deterministic)
    use_cudnn_attention(device, not hasattr(model.config, "window"))  # windows need masks
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    prepare_blocks(model, config, group, device, dtype)  # with fsdp, shards the model
    if stored is None:
        load_initial_weights(model, weights, group, device)  # allocates; sends rank 0's weights
    else:
        model.to_empty(device=device)  # load_checkpoint fills these tensors in place, below
    wrapped = wrap_ddp(model, device) if group.launched and not config.fsdp else model
    optimizer = make_optimizer(model, config, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, metrics, best_loss = 0, {"tokens": 0, "seconds": 0.0}, math.inf
    if stored is not None:
        checkpoint.load_checkpoint(path, model, optimizer)
        scaler.load_state_dict(stored["scaler"])
        step, metrics = stored["step"], stored["metrics"]
        _, best_loss = group.broadcast(run_dir.best_checkpoint(out_dir))
    return Run(
        config=config,
        out_dir=out_dir,
        record=record | {"model_config": model_config, "data": data},
        group=group,
        device=device,
        dtype=dtype,
        loader=loader,
        model=model,
        wrapped=wrapped,
        forward=wrapped,
        optimizer=optimizer,
        scaler=scaler,
        step=step,
        metrics=metrics,
        best_loss=best_loss,
    )


# One step -------------------------------------------------------------------------------------


def train_step(run):
    """Collective. Take one optimizer step on global batch number run.step.

    Returns the mean loss and the gradient norm before clipping, or None if a stop signal arrived
    between micro-steps; then the weights have not changed.
    """
    config, group = run.config, run.group
    sequences = config.total_batch_size // run.loader.block_size  # in the global batch
    micro_steps = sequences // (config.batch_size * group.world_size)
    seed_dropout(config.seed, run.step, group.rank, run.device)
    loss = torch.zeros((), device=run.device)
    for micro_step in range(micro_steps):
        # Before the first micro-step the loop has just checked. Each check is a collective.
        if micro_step > 0:
            stopping = group.any_rank(run.stop.received)
            if stopping:
                run.optimizer.zero_grad()
                return None
        # Each rank takes its own sequences; all ranks together take the same global batch,
        # whatever the world size.
        first = (
            run.step * sequences + (micro_step * group.world_size + group.rank) * config.batch_size
        )
        x, y = run.loader.train_batch(first, config.batch_size)
        if run.device.type == "cuda":
            # The GPU computes while a thread reads the rank's next batch. On a CPU the thread would
            # gain nothing: reading takes 0.1 % of a step of the quickstart, waking a thread more.
            run.loader.prefetch(
                first + group.world_size * config.batch_size, config.batch_size, run.device
            )
        x, y = to_device(x, run.device), to_device(y, run.device)
        with gradient_sync(run.wrapped, enabled=micro_step == micro_steps - 1):
            with run.autocast():
                micro_loss = run.forward(x, y) / micro_steps
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()

    run.scaler.unscale_(run.optimizer)
    parameters = list(run.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Under FSDP the norm is a DTensor; its full tensor is the norm over all shards.
    grad_norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    # Only here does the CPU wait for the GPU in a step (in float16 with Muon, also in scaler.step):
    # both numbers must be finite before the weights change.
    loss_value, grad_norm_value = torch.stack([loss, grad_norm]).tolist()
    loss_value = group.all_reduce([loss_value])[0] / group.world_size
    check_finite(run, loss_value, grad_norm_value)
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, grad_norm)
    set_learning_rates(run.optimizer, config, run.step)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return loss_value, grad_norm_value


def learning_rate(config, step):
    """Return the learning rate of optimizer step `step` (from 0).

    Linear warmup, then a cosine decay (lr_schedule=cosine), or a constant rate with a linear decay
    over the last fifth of the steps (wsd). Both end at min_lr.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_start = config.warmup_steps
    if config.lr_schedule == "wsd":
        decay_start = max(decay_start, config.max_steps * (1 - WSD_DECAY))
    progress = (step - decay_start) / max(1, config.max_steps - decay_start)
    progress = min(1.0, max(0.0, progress))
    if config.lr_schedule == "wsd":
        coeff = 1 - progress
    else:
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


def muon_learning_rate(config, step):
    """Return Muon's rate of a step: its peak, scaled by AdamW's rate over AdamW's peak."""
    if config.learning_rate == 0:  # then min_lr is 0 too, and any other peak has the same fractions
        config = dataclasses.replace(config, learning_rate=1.0)
    return config.muon_learning_rate * (learning_rate(config, step) / config.learning_rate)


def set_learning_rates(optimizer, config, step):
    """Set the learning rates of an optimizer for step `step` (from 0)."""
    for param_group in optimizer.param_groups:
        param_group["lr"] = learning_rate(config, step)
    if config.optimizer == "muon":  # param_groups[0] holds the hidden matrices
        optimizer.param_groups[0]["lr"] = muon_learning_rate(config, step)


def seed_dropout(seed, step, rank, device):
    """Make dropout masks a function of (seed, step, rank): resuming needs no generator state."""
    # Not numpy's SeedSequence, which takes 0.4 % of a step of the quickstart.
    number = zlib.crc32(f"{seed} {step} {rank}".encode())
    if device.type == "cpu":
        # torch.manual_seed would note the seed for GPUs too: 1.5 % of a step of the quickstart.
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


def check_finite(run, loss, grad_norm):
    """Collective. End the run if loss or gradient norm is not finite, before the weights change.

    Loss and norm are the same on all ranks, so all ranks end here together.

    In float16 the scaler skips such a step and halves its scale; only MAX_OVERFLOWS of them in a
    row end the run.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        run.overflows = 0
        return
    run.overflows += 1
    if run.dtype == torch.float16 and run.overflows < MAX_OVERFLOWS:
        return
    run.group.exit(
        f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}, not finite" + advice(run)
    )


def advice(run):
    """Return what to try after a loss that is not finite."""
    rates = "--learning_rate"
    if run.config.optimizer == "muon":
        rates = "--learning_rate and --muon_learning_rate"
    remedy = f"with a lower {rates} or --dtype=float32"
    checkpoints = run_dir.list_checkpoints(run.out_dir)
    if not checkpoints:
        return f"; start a new run {remedy}"
    weights = f"--init_from={shlex.quote(str(checkpoints[-1]))} --out_dir=NEW"
    return f"; start a new run from earlier weights, such as {weights}, {remedy}"


# The loop -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run):
    """Collective. Return the mean validation loss in nats per token; None after a stop signal."""
    config, group = run.config, run.group
    losses, counts = [], []  # of this rank's batches; counts of targets
    run.model.eval()
    # Each rank has its own sequences. All have the same number of batches, because under FSDP every
    # forward pass is a collective: val_batches fills up the last ones with targets -1.
    batches = run.loader.val_batches(
        config.eval_tokens, config.batch_size, group.rank, group.world_size
    )
    for x, y in batches:
        stopping = group.any_rank(run.stop.received)
        if stopping:
            run.model.train()
            return None
        counts.append(int((y != -1).sum()))
        with run.autocast():
            losses.append(run.forward(to_device(x, run.device), to_device(y, run.device)))
    run.model.train()
    losses = torch.stack(losses).tolist()  # waits for the device, once
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    total, count = group.all_reduce([total, sum(counts)])
    if not math.isfinite(total):
        group.exit(f"step {run.step}: validation loss {total}, not finite" + advice(run))
    return total / count


def train_loop(run):
    """Collective. Train from run.step to max_steps, or to a stop signal."""
    config, group = run.config, run.group
    flops_per_token = mfu_flops_per_token(run.model, run.loader.block_size)
    peak = peak_flops(run.device, run.dtype)
    start = time.perf_counter() - run.metrics["seconds"]  # as if the run had never stopped
    memory = None  # peak memory in GB, when it was last read
    with group.exit_together():
        if group.rank == 0:
            run_dir.truncate_log(run.out_dir, run.step)

    while True:
        is_last = run.step == config.max_steps

        # First finish the step just taken or, on resuming, that of the checkpoint: evaluate it if
        # due, log it, save it if due. On resuming, truncate_log has removed that step's line, and
        # run.metrics has its val_loss if it was evaluated before the save.
        if (run.step % config.eval_interval == 0 or is_last) and "val_loss" not in run.metrics:
            val_loss = evaluate(run)
            if val_loss is not None:
                run.metrics["val_loss"] = val_loss
                text = describe_loss(val_loss, run.loader.meta)
                group.print(f"step {run.step}/{config.max_steps} | {text}")
        log_error = append_log(run) if group.rank == 0 else None
        stopping = group.any_rank(run.stop.received or log_error is not None)
        improved = run.metrics.get("val_loss", math.inf) < run.best_loss
        if improved or is_last or stopping or run.step % config.checkpoint_interval == 0:
            save(run)
        if stopping:  # by a signal, or because rank 0 could not write the log: saved all the same
            log_error = group.broadcast(log_error)
            if log_error is not None:
                group.exit(log_error)
        if is_last or stopping:
            return

        # One optimizer step.
        begin = time.perf_counter()
        result = train_step(run)
        if result is None:
            save(run)
            return
        now = time.perf_counter()
        run.step += 1
        to_print = run.step % config.log_interval == 0 or run.step == config.max_steps
        if to_print or memory is None:
            # Not at every step: reading it takes 0.7 % of a step of the quickstart.
            memory = peak_memory(run.device)
            if memory is not None:  # None on all ranks or on none
                memory = group.all_reduce([memory], dist.ReduceOp.MAX)[0]
        loss, grad_norm = result
        tokens_per_second = config.total_batch_size / (now - begin)
        run.metrics = {
            "train_loss": loss if math.isfinite(loss) else None,  # JSON has no infinity
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": learning_rate(config, run.step - 1),
            "tokens": run.step * config.total_batch_size,
            "seconds": now - start,
            "tokens_per_second": tokens_per_second,
            "mfu": flops_per_token * tokens_per_second / (peak * group.world_size)
            if peak
            else None,
            "memory_gb": memory,
        }
        if to_print:
            mfu = f" | MFU {run.metrics['mfu']:.1%}" if run.metrics["mfu"] is not None else ""
            seconds_left = (config.max_steps - run.step) * run.metrics["seconds"] / run.step
            time_left = describe_duration(seconds_left)
            group.print(
                f"step {run.step}/{config.max_steps} | loss {loss:.4f} | norm {grad_norm:.2f} | "
                f"lr {run.metrics['lr']:.1e} | {1000 * (now - begin):.1f} ms | "
                f"{tokens_per_second / 1000:.1f}k tok/s{mfu} | {time_left} left"
            )


def append_log(run):
    """Append run.metrics to log.jsonl; return an error message, or None."""
    path = run.out_dir / "log.jsonl"
    try:
        with name_in_errors(path), open(path, "a", encoding="utf-8") as log:
            print(json.dumps({"step": run.step} | run.metrics), file=log)
    except OSError as error:
        return str(error)
    return None


def rewrite_last_line(run):
    """Write the log's last line again: it is missing if the disk was full when the run finished."""
    run_dir.truncate_log(run.out_dir, run.step)
    log_error = append_log(run)
    if log_error is not None:
        raise UserError(log_error)


def save(run):
    """Collective. Save the state after the last finished step, if there is one.

    If the step has a checkpoint, only a new validation loss is added to it.
    """
    if run.step == 0:
        return
    state = {"step": run.step, "metrics": run.metrics, "scaler": run.scaler.state_dict()}
    run_dir.save_step(
        run.out_dir,
        run.model,
        run.optimizer,
        record=run.record | state,
        keep=run.config.keep_checkpoints,
        group=run.group,
    )
    run.best_loss = min(run.best_loss, run.metrics.get("val_loss", math.inf))


def describe_duration(seconds):
    """Return a time as text, in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def describe_loss(loss, meta):
    """Return a validation loss as text, with perplexity and, if known, bits per byte."""
    perplexity = math.exp(min(loss, 700))  # exp overflows above 709
    text = f"val loss {loss:.4f} | perplexity {perplexity:.2f}"
    val = meta.get("val", {})
    if val.get("bytes") and "tokens" in val:
        bits_per_byte = loss / math.log(2) * val["tokens"] / val["bytes"]
        text += f" | {bits_per_byte:.3f} bits per byte"
    return text


def train(run):
    """Collective. Print what the run is, then evaluate it, or train it to the end."""
    print_summary(run)
    if run.config.eval_only:
        val_loss = evaluate(run)
        run.group.print("stopped" if val_loss is None else describe_loss(val_loss, run.loader.meta))
        return
    with run.group.exit_together():
        if run.group.rank == 0 and run.config.overwrite:
            run_dir.remove_run(run.out_dir)
        elif run.group.rank == 0:
            run_dir.prune_checkpoints(run.out_dir, run.config.keep_checkpoints)
    if run.step > run.config.max_steps:
        run.group.print(
            f"{run.out_dir} is at step {run.step}, past max_steps={run.config.max_steps}: "
            "nothing to do; a larger --max_steps continues the run"
        )
        return
    if run.step == run.config.max_steps and "val_loss" in run.metrics:
        with run.group.exit_together():
            if run.group.rank == 0:
                rewrite_last_line(run)
        run.group.print(
            f"{run.out_dir} is finished, at step {run.step}: a larger --max_steps continues it"
        )
        return
    with run.group.exit_together():
        if not run.out_dir.is_dir():  # rank 0 has made it, in lock_run
            raise UserError(f"{run.out_dir} must be a directory that all machines share")
    if uses_compile(run.config, run.device) and not run.config.fsdp:
        compile_forward(run)
    if run.wrapped is not run.model:
        settle_ddp_buckets(run)
    try:
        train_loop(run)
    except OSError:  # for example: stdout is a closed pipe
        if run.group.world_size == 1:  # save is a collective; other ranks may be elsewhere
            save(run)
        raise
    if run.step < run.config.max_steps:
        run.group.print(
            f"stopped after step {run.step}: the same command, without --overwrite, resumes the run"
        )
    else:
        run.group.print(f"python sample.py --init_from={shlex.quote(str(run.out_dir))}")


def print_summary(run):
    config, loader = run.config, run.loader
    world_size = run.group.world_size
    options = run.record["options"] | run.record["model_config"]
    run.group.print(" ".join(f"{name}={value}" for name, value in options.items()))
    n_parameters = sum(p.numel() for p in run.model.parameters())
    parts = [f"{n_parameters:,} parameters", f"{loader.n_train:,} training tokens"]
    if not config.eval_only:  # then total_batch_size need not be a number of micro-steps
        tokens = config.batch_size * loader.block_size * world_size
        micro_steps = config.total_batch_size // tokens
        plural = "s" if micro_steps > 1 else ""
        processes = f" on {world_size} processes" if world_size > 1 else ""
        parts.append(
            f"{config.total_batch_size:,} tokens per step: {config.batch_size} sequences of "
            f"{loader.block_size} tokens x {micro_steps} micro-step{plural}{processes}"
        )
    parts += [f"{device_name(run.device)}, {options['dtype']}", str(run.out_dir)]
    run.group.print(" | ".join(parts))


# Main -----------------------------------------------------------------------------------------


def main(argv):
    """Train as the options in argv say. Raises UserError for what the user can fix.

    Can be called from Python, as in a notebook; the same call resumes an interrupted run.
    """
    config = model_options = option_error = None
    try:
        config, model_options = configure_with_model(
            TrainConfig,
            argv,
            __doc__,
            model_config=lambda config: model_module(config.model).GPTConfig,
            hint=models_with_option,  # for the error about an unknown option
        )
        check_minimum(config, 1, "dist_timeout")
        if config.dist_timeout > MAX_TIMEOUT:
            raise UserError(f"dist_timeout={config.dist_timeout} must be at most {MAX_TIMEOUT}")
    except UserError as error:
        config, option_error = None, error
    group = ProcessGroup(timeout=config.dist_timeout if config else 60)
    with group.exit_together():  # every rank reads the options; one prints what is wrong with them
        if option_error:
            raise option_error
    if group.restarted:
        config.overwrite = False  # torchrun restarted this worker: out_dir holds this very run
    keep_freed_memory()  # malloc keeps freed pages, which saves a quarter of a step on a CPU
    run = None
    try:
        with contextlib.ExitStack() as stack:
            run = setup(config, model_options, argv, group, stack)
            with run.stop:
                train(run)
    except (RuntimeError, MemoryError) as error:
        user_error = explain_error(error, config, run, group.world_size)
        if user_error is None:
            raise
        raise user_error from error


def explain_error(error, config, run, world_size):
    """Return a UserError for an error of torch that the user can cure, else None."""
    # Without FSDP, compile_forward has caught it, and the run goes on uncompiled.
    if config.fsdp and isinstance(error, TorchDynamoException):
        name = type(error).__name__
        return UserError(f"torch.compile failed ({name}): --compile=False trains without it")
    lost_rank = describe_lost_rank(error)
    if lost_rank is not None:
        return UserError(
            f"another rank does not answer ({lost_rank}): the same command, without --overwrite, "
            "resumes the run"
        )
    if not is_out_of_memory(error):
        return None
    if run is None:
        return UserError("out of memory: the model alone does not fit on the device")
    return UserError(out_of_memory_advice(config, run.loader.block_size, world_size))


def out_of_memory_advice(config, block_size, world_size=1):
    """Return what to do when memory ran out: a batch_size that keeps total_batch_size."""
    sequences = config.total_batch_size // block_size // world_size  # per rank and step
    largest = min(config.batch_size - 1, sequences)
    smaller = next((n for n in range(largest, 0, -1) if sequences % n == 0), None)
    remedies = []
    if smaller:
        remedies.append(f"--batch_size={smaller} keeps total_batch_size={config.total_batch_size}")
    if not config.activation_checkpointing:
        remedies.append("--activation_checkpointing=True")
    if not remedies:
        remedies.append("use a smaller block_size")
    return f"out of memory with batch_size={config.batch_size}: {', or '.join(remedies)}"


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
