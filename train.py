"""Train a GPT: one loop, on a CPU, a CUDA GPU or an Apple GPU, or many processes of them.

    python train.py config/quickstart.py                         a minute on a laptop, no download
    python train.py config/gpt2.py config/small_gpu.py           GPT-2 124M on FineWeb, fitted to a small GPU
    torchrun --standalone --nproc_per_node=8 train.py            the same on eight GPUs, as DDP; --fsdp=True: as FSDP
    python train.py config/quickstart.py --n_layer=8 --model=model_mine

The same command again goes on where it stopped: bit for bit what an uninterrupted run would have done (on CUDA with
--deterministic=True), because data order and dropout are functions of (seed, step), and the learning rate of the step.
out_dir/log.jsonl has a line for every step.
"""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass

# Threads that wait for each other in a spin lose a hundredfold where they share a core with anything else. Read when
# torch loads OpenMP: a short spin costs nothing where they do not.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException

import checkpoint
import machine
from configurator import UserError, at_least, configure, program
from optimizer import learning_rate
from parallel import Ranks, accumulate, whole
from pretrained import model_module, models_with
from start import compile_model, compiles, set_up


@dataclass
class TrainConfig:
    # Run
    out_dir: str | None = None  # for checkpoints and log.jsonl; None: out/ and the names of the configs, and --model
    model: str = "model"  # the model file, without .py
    dataset: str = "fineweb"  # folder of data/, made by prepare_data.py
    init_from: str = "scratch"  # weights to begin with: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory
    overwrite: bool = False  # delete the run that is in out_dir, and start over
    eval_only: bool = False  # evaluate, print, and write nothing
    seed: int = 1337  # of weights, data order and dropout
    # Steps
    batch_size: int = 16  # sequences in one forward
    total_batch_size: int = 2**19  # tokens in one optimizer step; gradient accumulation follows from it
    max_steps: int = 19_073  # optimizer steps: 10 billion tokens
    # Optimizer: AdamW, decay on matrices only
    learning_rate: float = 6e-4  # the highest
    min_lr: float = 6e-5  # where the schedule ends
    warmup_steps: int = 700  # steps of linear increase from 0
    lr_schedule: str = "cosine"  # cosine, or wsd: constant, then linear decay over the last fifth
    weight_decay: float = 0.1  # per unit of learning rate
    beta1: float = 0.9  # decay of the mean of the gradient
    beta2: float = 0.95  # decay of the mean of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    # Evaluation, log, checkpoints
    eval_interval: int = 250  # steps
    eval_tokens: int = 2**20  # validation tokens, rounded up to whole sequences
    log_interval: int = 10  # steps between lines on the console
    checkpoint_interval: int = 1000  # steps
    keep_checkpoints: int = 2  # the last ones; the best is kept beside them
    # Machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32, bfloat16, float16; auto: bfloat16 where the hardware is fast at it
    compile: bool | str = "auto"  # torch.compile, for training; auto: on CUDA
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work
    deterministic: bool = False  # the same bits on CUDA too, slower
    # Processes, where torchrun starts several
    fsdp: bool = False  # share parameters, gradients and optimizer state among them (FSDP); else each has all (DDP)
    shard_size: int = 0  # processes that share one copy of the model, with fsdp; 0: all of them
    timeout: int = 600  # seconds that one waits for another


AFTER_DIVERGENCE = (
    "; a run with a lower learning_rate, or in float32, can begin with a checkpoint from before: --init_from, --out_dir"
)
MAX_OVERFLOWS = 20  # float16 steps in a row without a finite gradient


# The loop -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run):
    """Mean validation loss in nats per token; None where a signal cut it short."""
    run.model.eval()
    config, ranks, stopping = run.config, run.ranks, False
    total, count = 0.0, 0
    # each rank has other windows, and as many forwards, which under FSDP all take part in
    for x, y in run.loader.val_batches(config.eval_tokens, config.batch_size, ranks.rank, ranks.size):
        if stopping := run.stopping():
            break
        targets = int((y != -1).sum())
        with run.autocast():
            total += run.forward(x.to(run.device), y.to(run.device)).item() * targets
        count += targets
    run.model.train()
    total, count = ranks.reduce([total, count])
    if not math.isfinite(total):
        ranks.fail(f"step {run.record['step']}: validation loss {total}, not finite{AFTER_DIVERGENCE}")
    return None if stopping else total / count


def train_step(run, step):
    """One optimizer step on the global batch of step `step` (from 0).

    Returns its mean loss and the norm of the gradient before clipping; None where a signal came, with nothing changed.
    """
    config, ranks, T = run.config, run.ranks, run.loader.block_size
    # A function of (seed, step, rank): dropout repeats on resume without any saved generator state.
    random = np.random.SeedSequence((config.seed, step, ranks.rank))
    torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
    sequences = config.total_batch_size // T
    micro_steps = sequences // (config.batch_size * ranks.size)
    loss = torch.zeros((), device=run.device)
    for micro_step in range(micro_steps):
        if run.stopping():
            run.optimizer.zero_grad()
            return None
        # the ranks share out the micro-step's sequences: together the same global batch, however many they are
        first = step * sequences + (micro_step * ranks.size + ranks.rank) * config.batch_size
        x, y = run.loader.train_batch(first, config.batch_size)
        if run.device.type == "cuda":  # from pinned memory the copy overlaps with the computation
            x, y = (t.pin_memory().to(run.device, non_blocking=True) for t in (x, y))
        else:  # an Apple GPU could read the source of such a copy after it is freed
            x, y = x.to(run.device), y.to(run.device)
        # gradients travel once, in the backward pass of the last micro-step
        with accumulate(run.wrapped, last=micro_step == micro_steps - 1):
            with run.autocast():
                micro_loss = run.forward(x, y) / micro_steps
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    parameters = list(run.model.parameters())
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    loss, grad_norm = torch.stack([loss, norm]).tolist()
    loss = ranks.reduce([loss])[0] / ranks.size
    if math.isfinite(loss) and math.isfinite(grad_norm):
        run.overflows = 0
    elif run.dtype == torch.float16 and run.overflows + 1 < MAX_OVERFLOWS:
        run.overflows += 1  # the scaler skips this step, and scales by half from the next
    else:
        ranks.fail(f"step {step + 1}: loss {loss}, norm of the gradient {grad_norm}, not finite{AFTER_DIVERGENCE}")
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return loss, grad_norm


def loop(run):
    """Train from the run's record on, to the end or to a signal."""
    config, ranks = run.config, run.ranks
    flops, peak = run.model.flops_per_token(run.loader.block_size), machine.peak_flops(run.device, run.dtype)
    started = time.perf_counter() - run.record["seconds"]
    with ranks.together():
        if ranks.rank == 0:
            checkpoint.keep_log(run.out_dir, run.record["step"])
    while True:
        step, last = run.record["step"], run.record["step"] == config.max_steps

        # once in a while: evaluate, save
        if (step % config.eval_interval == 0 or last) and "val_loss" not in run.record:
            val_loss = evaluate(run)
            if val_loss is not None:
                run.record["val_loss"] = val_loss
                print(f"step {step}/{config.max_steps} | {describe_loss(val_loss, run.loader.meta)}", flush=True)
        problem = write_log(run) if ranks.rank == 0 else None
        improved = "val_loss" in run.record and ranks.share(run.record["val_loss"] < checkpoint.best_loss(run.out_dir))
        stopping = ranks.any(run.stop.asked or problem is not None)
        if improved or last or stopping or step % config.checkpoint_interval == 0:
            save(run)
        if stopping and (problem := ranks.share(problem)):
            ranks.fail(problem)
        if last or stopping:
            return

        # train
        begun = time.perf_counter()
        result = train_step(run, step)
        if result is None:
            save(run)
            return
        loss, grad_norm = result
        memory = machine.peak_memory(run.device)
        now = time.perf_counter()
        speed = config.total_batch_size / (now - begun)
        run.record = {
            "step": step + 1,
            "train_loss": loss if math.isfinite(loss) else None,  # JSON knows no infinity
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": learning_rate(config, step),
            "tokens": (step + 1) * config.total_batch_size,
            "seconds": now - started,
            "tokens_per_second": speed,
            "mfu": flops * speed / peak / ranks.size if peak else None,
            "memory_gb": memory and ranks.reduce([memory], "max")[0],
        }
        if (step + 1) % config.log_interval == 0 or step + 1 == config.max_steps:
            print(
                f"step {step + 1}/{config.max_steps} | loss {loss:.4f} | norm {grad_norm:.2f} | "
                f"lr {run.record['lr']:.1e} | {1000 * (now - begun):.1f} ms | {speed / 1000:.1f}k tok/s",
                flush=True,
            )


def write_log(run):
    """Append the run's record to log.jsonl; returns what went wrong, or None."""
    try:
        with open(run.out_dir / "log.jsonl", "a", encoding="utf-8") as log:
            print(json.dumps(run.record), file=log)
    except OSError as error:
        return str(error)


def save(run):
    """Save the state after the last finished step; before the first there is nothing to save."""
    if run.record["step"] > 0:
        about = run.about | {"record": run.record, "scaler": run.scaler.state_dict()}
        checkpoint.save(run.out_dir, run.model, run.optimizer, about, run.config.keep_checkpoints, run.ranks)


def describe_loss(loss, meta):
    """Validation loss with perplexity and, where meta.json knows the bytes of val.bin, bits per byte."""
    val = meta.get("val", {})
    bits = f" | {loss / math.log(2) * val['tokens'] / val['bytes']:.3f} bits per byte" if "bytes" in val else ""
    return f"val loss {loss:.4f} | perplexity {math.exp(min(loss, 700)):.2f}{bits}"


# The program --------------------------------------------------------------------------------------------------------


@program
def main(argv):
    config, problem = None, None
    try:
        config, options = configure(
            TrainConfig, argv, __doc__, more=lambda config: model_module(config.model).GPTConfig, elsewhere=models_with
        )
        at_least(1, config, "timeout")
    except UserError as error:
        config, problem = None, error
    ranks = Ranks(config.timeout if config else 60)
    with ranks.together():
        if problem:
            raise problem
    if ranks.restarted:
        config.overwrite = False  # torchrun started this worker again: what is there is this very run
    machine.keep_freed_memory()
    run = None
    try:
        run = set_up(config, model_module(config.model), options, argv, ranks)
        train(run)
    except (RuntimeError, MemoryError) as error:
        if config.fsdp and isinstance(error, TorchDynamoException):
            raise UserError(f"not compiled, {type(error).__name__}: --compile=False does without") from error
        if not machine.is_out_of_memory(error):
            raise
        if run is None:
            raise UserError("out of memory: the model alone does not fit the device") from error
        raise UserError(machine.out_of_memory(config, run.loader.block_size, ranks.size)) from error
    finally:
        if run:
            run.stop.restore()


def train(run):
    """Say what the run is, and take it to its end, or evaluate it."""
    config, loader, size = run.config, run.loader, run.ranks.size
    on = f" on {size} processes" if size > 1 else ""
    print(" ".join(f"{name}={value}" for name, value in (run.about["options"] | run.about["model_config"]).items()))
    print(
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters | {loader.n_train:,} training tokens | "
        f"{config.total_batch_size:,} tokens a step: {config.batch_size} sequences of {loader.block_size}, "
        f"{config.total_batch_size // config.batch_size // loader.block_size // size} times{on} | "
        f"{machine.device_name(run.device)}, {run.about['options']['dtype']} | {run.out_dir}",
        flush=True,
    )
    if config.eval_only:
        val_loss = evaluate(run)
        print("stopped" if val_loss is None else describe_loss(val_loss, loader.meta))
        return
    if run.record["step"] >= config.max_steps and "val_loss" in run.record:
        print(f"{run.out_dir} is finished, at step {run.record['step']}: a larger --max_steps goes on")
        return
    with contextlib.ExitStack() as stack:
        with run.ranks.together():
            if run.ranks.rank == 0:
                run.out_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(checkpoint.alone_in(run.out_dir))
                if config.overwrite:
                    checkpoint.remove(run.out_dir)
        with run.ranks.together():
            if not run.out_dir.is_dir():
                raise UserError(f"{run.out_dir} is not there on all machines: they must share it")
        if compiles(config, run.device) and not config.fsdp:
            compile_model(run)
        try:
            loop(run)
        except OSError:  # who read our output may be gone
            if run.ranks.size == 1:
                save(run)
            raise
    if run.record["step"] < config.max_steps:
        print(f"stopped after step {run.record['step']}: the same command goes on from there")
    else:
        print(f"python sample.py --init_from={run.out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
