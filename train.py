"""Train a GPT: one loop for one CPU or GPU, and for several processes with DDP or FSDP.

    python train.py config/quickstart.py                a minute on two CPU cores, no download
    python train.py config/gpt2.py config/small_gpu.py  GPT-2 124M on FineWeb, a small GPU
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py               8 GPUs, DDP
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --fsdp=True   8 GPUs, FSDP
    python train.py config/quickstart.py --model=model_mine --n_layer=4

The same command, without --overwrite, resumes an interrupted run. On the same number of processes
the resumed run has the same bits as an uninterrupted one (on CUDA with --deterministic=True),
because the data order, the dropout masks and the learning rate are functions of the seed, the step
and the rank. out_dir/log.jsonl gets one line per optimizer step.

When a run is resumed, these options may have other values (docs/RELIABILITY.md lists all):

    always                      max_steps, and what keeps the results: batch_size, device, fsdp, ...
    with --allow_changes=True   learning_rate, muon_learning_rate, min_lr, warmup_steps, grad_clip,
                                lr_schedule, weight_decay, dropout, eval_tokens
    never                       model and the rest of its options, dataset, init_from, seed, dtype,
                                total_batch_size, optimizer, beta1, beta2

The file reads top to bottom: options, setup, one training step, the loop, main. torchrun starts
several processes that all run this file; each is a rank. Every rank must call a function that is
marked "Collective", because the ranks exchange values in it. `group` (common/distributed.py) sends
small values between the ranks. If one rank fails in a block `with group.exit_together():`, all
ranks end with one message.
"""

import contextlib
import dataclasses
import gc
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# OpenMP threads that busy-wait slow down everything else on their core, and each other; a short
# spin costs nothing. OpenMP reads this variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from common import run_dir
from common.checkpoint import load_checkpoint
from common.dataloader import Loader
from common.device import (
    keep_freed_memory,
    pick_device,
    pick_dtype,
    set_precision,
    to_device,
    use_cudnn_attention,
)
from common.distributed import ProcessGroup, full_tensor
from common.errors import run_program
from common.models import make_config, model_module
from prepare_data import open_dataset
from training import parallel, report
from training.optimizer import make_optimizer
from training.start import (
    check_batch,
    check_options,
    choose_start,
    identify_data,
    prepare_out_dir,
    read_options,
)
from training.stop import StopSignal
from training.tracker import open_tracker

WSD_DECAY = 0.2  # fraction of the steps; 10 to 20 % suffice (Hägele et al. 2024, section 3)
MAX_OVERFLOWS = 20  # float16 steps in a row with an infinite gradient before the run stops


@dataclass
class TrainConfig:
    # Run (the fields of the model's GPTConfig, such as n_layer and block_size, are options, too)
    out_dir: str | None = None  # for checkpoints and log; None: out/CONFIG, or out/CONFIG-MODEL
    model: str = "model"  # the model file, without .py
    dataset: str = "fineweb"  # folder of data/, made by prepare_data.py
    init_from: str = "scratch"  # scratch, gpt2 to gpt2-xl, a directory, or nanoGPT's ckpt.pt
    overwrite: bool = False  # delete the run in out_dir and start over
    allow_changes: bool = False  # resume with other learning rates and more, see the list above
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
    min_lr: float = 6e-5  # AdamW's final rate; Muon's falls by the same factor
    warmup_steps: int = 700  # steps of linear increase from 0
    lr_schedule: str = "cosine"  # cosine; wsd: constant, then linear decay over the last fifth
    weight_decay: float = 0.1  # each step scales matrices by 1 - lr * weight_decay
    beta1: float = 0.9  # decay of the mean of the gradient
    beta2: float = 0.95  # decay of the mean of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    # Evaluation, log, checkpoints
    eval_interval: int = 250  # steps between evaluations
    eval_tokens: int = 2**20  # validation tokens, rounded up to whole sequences
    eval_train: bool = False  # evaluate as many training tokens, too: overfitting shows
    log_interval: int = 10  # steps between lines on the console
    checkpoint_interval: int = 1000  # steps between checkpoints; a new best loss is always saved
    keep_checkpoints: int = 2  # recent checkpoints to keep; the best is always kept
    tracker: str | None = None  # wandb or tensorboard: send the log there, too
    # Device
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32, bfloat16, float16; auto: bfloat16 where it is fast
    compile: bool | str = "auto"  # torch.compile for training; auto: on CUDA
    activation_checkpointing: bool = False  # recompute activations: less memory, a third more work
    deterministic: bool = False  # bitwise reproducible on CUDA; slower
    # Several processes, started by torchrun
    fsdp: bool = False  # shard parameters, gradients and optimizer state (FSDP) instead of DDP
    shard_degree: int = 0  # with fsdp: number of ranks that share one copy of the model; 0: all
    dist_timeout: int = 600  # seconds that a rank waits for the others


# Setup ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """What setup() makes and the training loop uses."""

    config: TrainConfig  # with the dtype that "auto" stands for
    out_dir: Path
    record: dict  # for checkpoints: options, model_config, data (sizes, hash), meta (meta.json)
    group: ProcessGroup
    device: torch.device
    dtype: torch.dtype  # of the computation; weights and optimizer state are float32
    loader: Loader
    model: torch.nn.Module  # the plain model, under FSDP with sharded parameters
    wrapped: torch.nn.Module  # DDP around the model; without DDP the model itself
    optimizer: torch.optim.Optimizer | None  # None with eval_only
    scaler: torch.amp.GradScaler  # scales the loss in float16; does nothing in other dtypes
    step: int  # optimizer steps taken; the next one uses global batch number `step`
    metrics: dict  # of the last step: its line in log.jsonl
    best_loss: float  # lowest validation loss of a saved checkpoint
    stop: StopSignal = field(default_factory=StopSignal)  # SIGTERM or Ctrl-C
    overflows: int = 0  # float16 steps in a row with an infinite gradient
    track: Callable | None = None  # track(step, metrics) sends them to config.tracker; on rank 0

    def autocast(self):
        """Return a context in which matrix products compute in the run's dtype.

        Under FSDP it does nothing: the parameters are gathered in that dtype, and so the residual
        stream and the norms are in it, too. Logits and loss are float32 everywhere.
        """
        enabled = self.dtype != torch.float32 and not self.config.fsdp
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def zero_grad(self):
        """Drop the gradients; under DDP zero them in place, so that they stay views of its buckets.

        DDP keeps its buckets in any case. If the gradients were set to None, the micro-steps before
        the last one would allocate others beside the buckets.
        """
        uses_ddp = self.group.launched and not self.config.fsdp
        self.optimizer.zero_grad(set_to_none=not uses_ddp)


def setup(config, model_options, group, stack):
    """Collective. Return the Run: data, model and optimizer, new or resumed.

    model_options   the fields of the model's GPTConfig that were given, such as n_layer
    stack           ExitStack that holds the lock on out_dir and the tracker until the program ends

    In a new run rank 0 initializes the weights, or reads those of init_from, on its CPU, and sends
    them to the other ranks, so that one process, DDP and FSDP start with the same bits. Every rank
    reads from a checkpoint what it needs. Nothing of an earlier run is deleted here.
    """
    with group.exit_together():
        check_options(config, model_options, group)
        device = pick_device(config.device, group.local_rank)
        keep_freed_memory(device)  # on a CPU it saves a quarter of a step
        dtype = pick_dtype(config.dtype, device)
        if group.local_rank in (None, 0):  # the first rank of each machine
            open_dataset(config.dataset)  # prepares a small dataset that is missing
    with group.exit_together():
        folder, meta = open_dataset(config.dataset)
        if group.rank == 0 and not config.eval_only:
            stack.enter_context(run_dir.lock_run(config.out_dir))
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    # Rank 0 finds the run's last undamaged checkpoint. All ranks get start.checkpoint, its path,
    # and start.record, its config.json. In a new run both are None, and rank 0 has start.weights.
    # start.model_config has all options of the model.
    start = choose_start(config, model_options, meta, group)

    with group.exit_together():
        # On the meta device a model takes no memory: a GPU may only have room for its shard.
        with torch.device("meta"):
            module = model_module(config.model)
            model = module.GPT(make_config(module, start.model_config))
        loader = Loader(folder, model.config.block_size, model.config.vocab_size, config.seed)
        if not config.eval_only:
            check_batch(config, loader.block_size, group.world_size)
        data = identify_data(loader, config, start)
    options = dataclasses.asdict(config)
    group.check_equal(options | model_options | {"data": data})  # the same on all ranks

    set_precision(device, config.deterministic)
    # With a mask, which a window needs, cuDNN's gradients can be NaN.
    use_cudnn_attention(device, enabled=not hasattr(model.config, "window"))
    parallel.prepare_blocks(model, config, group, device, dtype)  # with fsdp, shards the model
    if start.checkpoint:
        model.to_empty(device=device)  # load_checkpoint fills it, below
    else:
        parallel.load_initial_weights(model, start.weights, group, device)
    optimizer = None
    if not config.eval_only:
        optimizer = make_optimizer(model, config, dtype)  # Muon orthogonalizes in this dtype
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, metrics = 0, {"tokens": 0, "seconds": 0.0}
    if start.checkpoint:
        load_checkpoint(start.checkpoint, model, optimizer, group)
        scaler.load_state_dict(start.record["scaler"])
        step, metrics = start.record["step"], start.record["metrics"]
    uses_ddp = group.launched and not config.fsdp
    wrapped = parallel.wrap_ddp(model, device) if uses_ddp else model
    run = Run(
        config=config,
        out_dir=Path(config.out_dir),
        record={"options": options, "meta": meta, "model_config": start.model_config, "data": data},
        group=group,
        device=device,
        dtype=dtype,
        loader=loader,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scaler=scaler,
        step=step,
        metrics=metrics,
        best_loss=start.best_loss,
    )
    with group.exit_together():
        if group.rank == 0 and config.tracker and not config.eval_only:
            run.track = open_tracker(run, stack)
    return run


# One step -------------------------------------------------------------------------------------


def train_step(run):
    """Collective. Take one optimizer step on global batch number run.step.

    Returns the numbers to log: the mean loss, the gradient norm before clipping, the learning rate.
    Returns None if a stop signal (SIGTERM, Ctrl-C) arrived between micro-steps; then the weights
    have not changed.
    """
    config, group, optimizer = run.config, run.group, run.optimizer
    # Numbers of sequences on all ranks together: in the whole step and in one micro-step.
    step_sequences = config.total_batch_size // run.loader.block_size
    micro_sequences = config.batch_size * group.world_size
    micro_steps = step_sequences // micro_sequences  # exactly, see check_batch
    seed_dropout(config.seed, run.step, group.rank, run.device)
    loss = torch.zeros((), device=run.device)
    for micro_step in range(micro_steps):
        if micro_step > 0:  # before micro-step 0, finish_step has asked the ranks for a stop
            stopping = group.any_rank(run.stop.received)
            if stopping:
                run.zero_grad()  # drops the unfinished step
                return None
        # Each rank takes its own part. Together they are the same batch for any world size.
        first = run.step * step_sequences + micro_step * micro_sequences
        first += group.rank * config.batch_size
        x, y = run.loader.train_batch(first, config.batch_size)
        if run.device.type == "cuda":
            # While the GPU computes, a thread reads the next batch into pinned memory.
            run.loader.prefetch(first + micro_sequences, config.batch_size, run.device)
        x, y = to_device(x, run.device), to_device(y, run.device)
        # Gradients add up over the micro-steps; the ranks average them in the last one.
        with parallel.gradient_sync(run.wrapped, enabled=micro_step == micro_steps - 1):
            with run.autocast():
                micro_loss = run.wrapped(x, y) / micro_steps
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()

    if run.step == 0:
        parallel.check_gradients(run)
    run.scaler.unscale_(optimizer)
    parameters = list(run.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Under FSDP the norm is a DTensor; its full tensor is the norm over all shards.
    grad_norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    loss = group.mean(loss)  # over the ranks; all have the same norm
    # Here the CPU waits for the GPU, once per step (in float16 with Muon also in scaler.step). The
    # optimizer's work on the GPU overlaps with the next step, and is part of that step's time.
    loss_value, norm_value = torch.stack([loss, grad_norm.to(loss.dtype)]).tolist()
    check_finite(run, loss_value, norm_value)
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, grad_norm)
    set_learning_rates(optimizer, config, run.step)
    run.scaler.step(optimizer)
    run.scaler.update()
    run.zero_grad()
    lr = learning_rate(config, run.step)
    return {"train_loss": loss_value, "grad_norm": norm_value, "lr": lr}


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
    """Return Muon's learning rate: its peak times AdamW's rate of the step over AdamW's peak."""
    if config.learning_rate == 0:  # avoid 0 / 0; as min_lr is 0, too, a peak of 1 will do
        config = dataclasses.replace(config, learning_rate=1.0)
    fraction = learning_rate(config, step) / config.learning_rate
    return config.muon_learning_rate * fraction


def set_learning_rates(optimizer, config, step):
    """Set the learning rates of an optimizer for step `step` (from 0)."""
    for param_group in optimizer.param_groups:
        param_group["lr"] = learning_rate(config, step)
    if config.optimizer == "muon":  # param_groups[0] holds the hidden matrices
        optimizer.param_groups[0]["lr"] = muon_learning_rate(config, step)


def seed_dropout(seed, step, rank, device):
    """Make dropout masks a function of (seed, step, rank): resuming needs no generator state."""
    number = zlib.crc32(f"{seed} {step} {rank}".encode())
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)  # torch.manual_seed also visits the GPUs: slow
    else:
        torch.manual_seed(number)


def check_finite(run, loss, grad_norm):
    """Collective. End the run if loss or gradient norm is not finite, before the weights change.

    Both are the same on all ranks, so that all end here together. In float16, which is refused with
    FSDP, the scaler skips such a step and halves its scale; only MAX_OVERFLOWS of them in a row end
    the run.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        run.overflows = 0
        return
    run.overflows += 1
    if run.dtype == torch.float16 and run.overflows < MAX_OVERFLOWS:
        return
    run.group.exit(
        f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}, not finite"
        + report.not_finite_advice(run)
    )


# The loop -------------------------------------------------------------------------------------
#
#                every rank                                     rank 0 alone
#
#   train_step   forward and backward on its own sequences
#                average the gradients (DDP, FSDP)
#                clip, update its parameters
#   step_report  measure the step                               print it, at log_interval
#   finish_step  evaluate its own part of the validation set    print the validation loss
#                                                               append to log.jsonl, track
#                write its part of the checkpoint               write config.json, rename, prune
#
# A stop signal between two micro-steps drops the step; the one before it is saved. During an
# evaluation, the step is logged and saved without its validation loss. A resumed run cuts the log
# before the line of the checkpoint's step, and begins with finish_step: it evaluates, if that is
# due and missing, and writes the line again.


def train_loop(run):
    """Collective. Train from run.step to max_steps, or to a stop signal."""
    step_report = report.StepReport(run)
    stopping = finish_step(run)  # step 0 of a new run, or the step that the checkpoint holds
    while run.step < run.config.max_steps and not stopping:
        begin = time.perf_counter()
        numbers = train_step(run)
        if numbers is None:  # a stop signal arrived: the unfinished step is dropped
            save(run)
            return
        seconds = time.perf_counter() - begin
        run.metrics = step_report.measure(run.step + 1, numbers, seconds)
        run.step += 1
        # The numbers again, because measure() made infinities None, for JSON.
        step_report.print(run.step, run.metrics | numbers)
        stopping = finish_step(run)


def finish_step(run):
    """Collective. Evaluate, log and save after run.step steps, as due; return whether to stop."""
    config, group = run.config, run.group
    is_last = run.step == config.max_steps
    evaluation_is_due = run.step % config.eval_interval == 0 or is_last
    if evaluation_is_due and "val_loss" not in run.metrics:  # a checkpoint may have it
        evaluation = evaluate(run)
        if evaluation is not None:
            run.metrics |= evaluation
            report.print_evaluation(run, evaluation, f"step {run.step}/{config.max_steps} | ")
    log_error = None
    if group.rank == 0:  # an error is returned, not raised, so that the run is saved before it ends
        log_error = report.log_step(run)
    stopping = group.any_rank(run.stop.received or log_error is not None)
    improved = run.metrics.get("val_loss", math.inf) < run.best_loss
    if improved or is_last or stopping or run.step % config.checkpoint_interval == 0:
        save(run)
    if stopping:  # by a signal, or because rank 0 cannot write the log
        log_error = group.broadcast(log_error)
        if log_error is not None:
            group.exit(log_error)
    return stopping


def evaluate(run):
    """Collective. Return the metrics of an evaluation; None after a stop signal.

    val_loss            mean over the validation targets, in nats per token
    val_bits_per_byte   the same loss in bits per byte of these targets, if their bytes are known
    train_eval_loss     with eval_train: mean over as many targets in the training split
    """
    val_loss, bytes_per_token = mean_loss(run, "val")
    if val_loss is None:
        return None
    metrics = {"val_loss": val_loss}
    if bytes_per_token > 0:  # false for NaN: the tokenizer is not available
        metrics["val_bits_per_byte"] = val_loss / math.log(2) / bytes_per_token
    if run.config.eval_train:
        train_loss, _ = mean_loss(run, "train")
        if train_loss is None:
            return None
        metrics["train_eval_loss"] = train_loss
    return metrics


@torch.no_grad()
def mean_loss(run, split):
    """Collective. Return the mean loss and the mean bytes per target of a split's fixed sequences.

    The loss is None after a stop signal.
    """
    config, group, loader = run.config, run.group, run.loader
    losses, counts = [], []  # of this rank's batches; counts of targets
    size = 0.0  # of this rank's targets in bytes
    run.model.eval()  # the module inside run.wrapped
    # All ranks get the same number of batches, because under FSDP a forward pass is a collective.
    # The last batches are filled up with targets of -1. For a batch of only such targets the model
    # returns a loss of 0 (a plain mean would be NaN), and its count is 0.
    tokens = min(config.eval_tokens, loader.n_val - 1)  # in both splits
    batches = loader.val_batches(tokens, config.batch_size, group.rank, group.world_size, split)
    for x, y in batches:
        stopping = group.any_rank(run.stop.received)
        if stopping:
            run.model.train()
            return None, 0
        counts.append(int((y != -1).sum()))
        size += float(loader.token_bytes[y.numpy()].sum())
        with run.autocast():
            losses.append(run.wrapped(to_device(x, run.device), to_device(y, run.device)))
        parallel.check_loss(run, losses[-1])
    run.model.train()
    losses = torch.stack(losses).tolist()  # waits for the device, once
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    total, count, size = group.all_reduce([total, sum(counts), size])
    if not math.isfinite(total):
        advice = report.not_finite_advice(run)
        group.exit(f"step {run.step}: the loss on {split}.bin is {total}, not finite" + advice)
    return total / count, size / count


def save(run):
    """Collective. Save the state after run.step steps; at step 0 there is nothing to save.

    If the step has a checkpoint already, at most the validation loss is added to it. Then older
    checkpoints are deleted.
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


# Main -----------------------------------------------------------------------------------------


def train(run):
    """Collective. Print what the run is, then evaluate it, or train it to the end."""
    config, group = run.config, run.group
    report.print_summary(run)
    if config.eval_only:
        report.print_evaluation(run, evaluate(run))
        return
    if run.step > config.max_steps:  # max_steps was lowered: leave the run as it is
        report.print_end(run)
        return
    # With overwrite, this deletes the earlier run, now that setup has succeeded. Else it deletes
    # checkpoints that are too many, and the lines of the log from run.step on.
    prepare_out_dir(config, run.step, group)
    # A finished run (the last step is taken and evaluated) only writes its last log line again.
    if not report.is_finished(run):
        parallel.prepare_forward(run)
    # Now and then Python's garbage collector looks through all objects, those of torch and of the
    # model among them: 0.2 s, in which the GPU waits, and with it all ranks. It skips frozen ones.
    gc.collect()
    gc.freeze()
    try:
        train_loop(run)
    except OSError:  # for example: stdout is a closed pipe
        # train_step does not print or write, so no step is half done: run.step, the metrics and
        # the weights agree.
        if group.world_size == 1:  # save is a collective; other ranks may be elsewhere
            save(run)
        raise
    finally:
        gc.unfreeze()
    report.print_end(run)


def main(argv):
    """Train as the options in argv say. Raises UserError for what the user can fix.

    Can be called from Python, as in a notebook; the same call resumes an interrupted run.
    """
    config, model_options, group = read_options(TrainConfig, argv, __doc__)  # the ranks connect
    run = None
    try:
        with contextlib.ExitStack() as stack:
            run = setup(config, model_options, group, stack)
            with run.stop:
                train(run)
    except (RuntimeError, MemoryError) as error:
        user_error = report.explain_error(error, config, run, group.world_size)
        if user_error is None:
            raise
        raise user_error from error
    group.destroy_at_exit()  # not in a finally: after an error on this rank alone it could hang
    run = None
    gc.collect()  # frees the model, which refers to its compiled functions, and they to it


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
