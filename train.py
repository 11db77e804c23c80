"""Train a GPT: one loop, on a CPU, a CUDA GPU or an Apple GPU.

    python train.py config/quickstart.py                         a minute on a laptop, no download
    python train.py config/gpt2.py config/small_gpu.py           GPT-2 124M on FineWeb, fitted to a small GPU
    python train.py config/quickstart.py --n_layer=8 --model=model_mine

The same command again goes on where it stopped: bit for bit what an uninterrupted run would have done (on CUDA with
--deterministic=True), because data order and dropout are functions of (seed, step), and the learning rate of the step.
out_dir/log.jsonl has a line for every step.
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that wait for each other in a spin lose a hundredfold where they share a core with anything else. Read when
# torch loads OpenMP: a short spin costs nothing where they do not.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import checkpoint
import machine
from configurator import UserError, at_least, configure, program
from loader import Loader, open_dataset
from optimizer import learning_rate, make_optimizer
from pretrained import load_model, model_module, models_with


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


AFTER_DIVERGENCE = (
    "; a run with a lower learning_rate, or in float32, can begin with a checkpoint from before: --init_from, --out_dir"
)
MAX_OVERFLOWS = 20  # float16 steps in a row without a finite gradient


# Before the first step ----------------------------------------------------------------------------------------------


def check(config):
    """UserError for a TrainConfig that makes no sense."""
    at_least(1, config, "batch_size", "total_batch_size", "max_steps", "eval_interval", "eval_tokens", "log_interval")
    at_least(1, config, "checkpoint_interval", "keep_checkpoints")
    at_least(0, config, "seed", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip")
    if config.min_lr > config.learning_rate:
        raise UserError(f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}")
    if not (0 <= config.beta1 < 1 and 0 <= config.beta2 < 1):
        raise UserError(f"beta1={config.beta1}, beta2={config.beta2} must be at least 0 and below 1")
    if config.lr_schedule not in ("cosine", "wsd"):
        raise UserError(f"lr_schedule={config.lr_schedule} is neither cosine nor wsd")
    if config.compile not in (True, False, "auto"):
        raise UserError(f"compile={config.compile} is none of auto, True, False")


def make_model(config, module, options, meta):
    """The model that a new run begins with, on the CPU."""
    if options.get("vocab_size", meta["vocab_size"]) < meta["vocab_size"]:
        raise UserError(
            f"vocab_size={options['vocab_size']} is below the {meta['vocab_size']} of data/{config.dataset}"
        )
    if config.init_from != "scratch":
        model, own = load_model(config.init_from, config.model, options)
        if (own["tokenizer"], own.get("chars")) != (meta["tokenizer"], meta.get("chars")):
            raise UserError(
                f"{config.init_from} was trained with the tokenizer {own['tokenizer']}, data/{config.dataset} has "
                f"{meta['tokenizer']}" + (" of other characters" if own["tokenizer"] == meta["tokenizer"] else "")
            )
        return model
    torch.manual_seed(config.seed)
    return module.GPT(module.GPTConfig(**({"vocab_size": meta["vocab_size"]} | options)))


# The loop -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the loop works with."""

    config: TrainConfig
    out_dir: Path
    about: dict  # what checkpoints say of the run: options, model_config, meta, data
    record: dict  # the log record of the last finished step, whose state the model and the optimizer have
    model: torch.nn.Module
    forward: Callable  # the model, compiled or not
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss in float16; in other dtypes it does nothing
    loader: Loader
    device: torch.device
    dtype: torch.dtype
    stop: machine.Stop
    overflows: int = 0  # float16 steps in a row without a finite gradient

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@torch.no_grad()
def evaluate(run):
    """Mean validation loss in nats per token; None where a signal cut it short."""
    run.model.eval()
    total, count = 0.0, 0
    for x, y in run.loader.val_batches(run.config.eval_tokens, run.config.batch_size):
        if run.stop.asked:
            break
        targets = int((y != -1).sum())
        with run.autocast():
            total += run.forward(x.to(run.device), y.to(run.device)).item() * targets
        count += targets
    run.model.train()
    if not math.isfinite(total):
        raise UserError(f"step {run.record['step']}: validation loss {total}, not finite{AFTER_DIVERGENCE}")
    return None if run.stop.asked else total / count


def train_step(run, step):
    """One optimizer step on the global batch of step `step` (from 0).

    Returns its mean loss and the norm of the gradient before clipping; None where a signal came, with nothing changed.
    """
    config, T = run.config, run.loader.block_size
    # A function of (seed, step): dropout repeats on resume without any saved generator state.
    torch.manual_seed(int(np.random.SeedSequence((config.seed, step)).generate_state(1, np.uint64)[0]))
    sequences = config.total_batch_size // T
    micro_steps = sequences // config.batch_size
    loss = torch.zeros((), device=run.device)
    for micro_step in range(micro_steps):
        if run.stop.asked:
            run.optimizer.zero_grad()
            return None
        x, y = run.loader.train_batch(step * sequences + micro_step * config.batch_size, config.batch_size)
        if run.device.type == "cuda":  # from pinned memory the copy overlaps with the computation
            x, y = (t.pin_memory().to(run.device, non_blocking=True) for t in (x, y))
        else:  # an Apple GPU could read the source of such a copy after it is freed
            x, y = x.to(run.device), y.to(run.device)
        with run.autocast():
            micro_loss = run.forward(x, y) / micro_steps
        run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    parameters = list(run.model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    loss, grad_norm = torch.stack([loss, norm]).tolist()
    if math.isfinite(loss) and math.isfinite(grad_norm):
        run.overflows = 0
    elif run.dtype == torch.float16 and run.overflows + 1 < MAX_OVERFLOWS:
        run.overflows += 1  # the scaler skips this step, and scales by half from the next
    else:
        raise UserError(f"step {step + 1}: loss {loss}, norm of the gradient {grad_norm}, not finite{AFTER_DIVERGENCE}")
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
    config = run.config
    flops, peak = run.model.flops_per_token(run.loader.block_size), machine.peak_flops(run.device, run.dtype)
    started = time.perf_counter() - run.record["seconds"]
    checkpoint.keep_log(run.out_dir, run.record["step"])
    while True:
        step, last = run.record["step"], run.record["step"] == config.max_steps

        # once in a while: evaluate, save
        if (step % config.eval_interval == 0 or last) and "val_loss" not in run.record:
            val_loss = evaluate(run)
            if val_loss is not None:
                run.record["val_loss"] = val_loss
                print(f"step {step}/{config.max_steps} | {describe_loss(val_loss, run.loader.meta)}", flush=True)
        with open(run.out_dir / "log.jsonl", "a", encoding="utf-8") as log:
            print(json.dumps(run.record), file=log)
        improved = "val_loss" in run.record and run.record["val_loss"] < checkpoint.best_loss(run.out_dir)
        if improved or last or run.stop.asked or step % config.checkpoint_interval == 0:
            save(run)
        if last or run.stop.asked:
            return

        # train
        begun = time.perf_counter()
        result = train_step(run, step)
        if result is None:
            save(run)
            return
        loss, grad_norm = result
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
            "mfu": flops * speed / peak if peak else None,
            "memory_gb": machine.peak_memory(run.device),
        }
        if (step + 1) % config.log_interval == 0 or step + 1 == config.max_steps:
            print(
                f"step {step + 1}/{config.max_steps} | loss {loss:.4f} | norm {grad_norm:.2f} | "
                f"lr {run.record['lr']:.1e} | {1000 * (now - begun):.1f} ms | {speed / 1000:.1f}k tok/s",
                flush=True,
            )


def save(run):
    """Save the state after the last finished step; before the first there is nothing to save."""
    if run.record["step"] > 0:
        about = run.about | {"record": run.record, "scaler": run.scaler.state_dict()}
        checkpoint.save(run.out_dir, run.model, run.optimizer, about, run.config.keep_checkpoints)


def describe_loss(loss, meta):
    """Validation loss with perplexity and, where meta.json knows the bytes of val.bin, bits per byte."""
    val = meta.get("val", {})
    bits = f" | {loss / math.log(2) * val['tokens'] / val['bytes']:.3f} bits per byte" if "bytes" in val else ""
    return f"val loss {loss:.4f} | perplexity {math.exp(min(loss, 700)):.2f}{bits}"


# The program --------------------------------------------------------------------------------------------------------


def default_out_dir(argv):
    """out/ and the stems of the config files; and the model, where the command line names one."""
    names = [Path(arg).stem for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    names += [arg.partition("=")[2] for arg in argv if arg.startswith("--model=")]
    return "out/" + ("-".join(names) or "gpt2")


def set_up(config, module, options, argv):
    """Everything before the loop: data, model, optimizer, and the state of the run that is in out_dir.

    Writes nothing but a small dataset that is missing. Returns the Run.
    """
    check(config)
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    out_dir = Path(config.out_dir or default_out_dir(argv))
    steps = [] if config.overwrite else checkpoint.all_steps(out_dir)
    stored = checkpoint.read_config(steps[-1]) if steps else None
    try:
        module.GPTConfig(**options)  # before anything that takes time
    except ValueError as error:
        raise UserError(str(error)) from error
    folder, meta = open_dataset(config.dataset)
    about = {"options": asdict(config) | {"out_dir": str(out_dir), "dtype": str(dtype).removeprefix("torch.")}}
    if stored:
        from_scratch = asdict(module.GPTConfig(**({"vocab_size": meta["vocab_size"]} | options)))
        about["model_config"] = (from_scratch if config.init_from == "scratch" else stored["model_config"]) | options
        checkpoint.check_same(about, stored, out_dir)  # again below, when the data are known too
        model = module.GPT(module.GPTConfig(**stored["model_config"]))
    else:
        model = make_model(config, module, options, meta)
        about["model_config"] = asdict(model.config)
    loader = Loader(folder, model.config.block_size, model.config.vocab_size, config.seed)
    about["data"] = {"tokens": [loader.n_train, loader.n_val], "sha256": meta.get("train", {}).get("sha256")}
    about["meta"] = meta
    unit = config.batch_size * loader.block_size
    if config.total_batch_size % unit:
        lower = config.total_batch_size // unit * unit
        raise UserError(
            f"total_batch_size={config.total_batch_size} is not a multiple of batch_size x block_size = "
            f"{config.batch_size} x {loader.block_size} = {unit}: the nearest are "
            + " and ".join(str(n) for n in (lower, lower + unit) if n)
        )
    model.to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    record = {"step": 0, "tokens": 0, "seconds": 0.0}
    if stored:
        checkpoint.check_same(about, stored, out_dir)
        checkpoint.load(steps[-1], model, optimizer)
        scaler.load_state_dict(stored["scaler"])
        record = stored["record"]
    if config.activation_checkpointing:
        for block in model.transformer.h:
            block.forward = functools.partial(recompute_in_backward, block.forward, use_reentrant=False)
    return Run(config, out_dir, about, record, model, model, optimizer, scaler, loader, device, dtype, machine.Stop())


def compile_model(run):
    """Have the run use torch.compile's model, where that works: a first pass compiles forward and backward."""
    print("compiling, which takes a minute or so (--compile=False does without)", flush=True)
    run.forward = torch.compile(run.model)  # checkpoints keep run.model's plain names
    x, y = (t.to(run.device) for t in run.loader.train_batch(0, run.config.batch_size))
    try:
        with run.autocast():
            loss = run.forward(x, y)
        loss.backward()
    except Exception as error:  # each backend and compiler has its own
        if machine.is_out_of_memory(error):
            raise
        print(f"warning: not compiled, {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        run.forward = run.model
    run.optimizer.zero_grad()


@program
def main(argv):
    config, options = configure(
        TrainConfig, argv, __doc__, more=lambda config: model_module(config.model).GPTConfig, elsewhere=models_with
    )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("train.py runs in one process: start it with python, not with torchrun")
    machine.keep_freed_memory()
    run = None
    try:
        run = set_up(config, model_module(config.model), options, argv)
        train(run)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        if run is None:
            raise UserError("out of memory: the model alone does not fit the device") from error
        raise UserError(machine.out_of_memory(config, run.loader.block_size)) from error
    finally:
        if run:
            run.stop.restore()


def train(run):
    """Say what the run is, and take it to its end, or evaluate it."""
    config, loader = run.config, run.loader
    print(" ".join(f"{name}={value}" for name, value in (run.about["options"] | run.about["model_config"]).items()))
    print(
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters | {loader.n_train:,} training tokens | "
        f"{config.total_batch_size:,} tokens a step: {config.batch_size} sequences of {loader.block_size}, "
        f"{config.total_batch_size // config.batch_size // loader.block_size} times | "
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
    run.out_dir.mkdir(parents=True, exist_ok=True)
    with checkpoint.alone_in(run.out_dir):
        if config.overwrite:
            checkpoint.remove(run.out_dir)
        if config.compile is True or (config.compile == "auto" and run.device.type == "cuda"):
            compile_model(run)
        try:
            loop(run)
        except OSError:
            save(run)  # what the last finished step computed, if there is still room for it
            raise
    if run.record["step"] < config.max_steps:
        print(f"stopped after step {run.record['step']}: the same command goes on from there")
    else:
        print(f"python sample.py --init_from={run.out_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
