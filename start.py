"""How a run starts: from options to data, model, optimizer and the state of the checkpoint to go on from.

Rank 0 alone initializes a model, or reads the weights to begin with; the others get them from it, so that one process,
DDP and FSDP start with the same numbers, and no rank needs room for more than it trains.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as checkpointed

import checkpoint
import machine
from configurator import UserError, at_least
from loader import Loader, open_dataset
from optimizer import make_optimizer
from parallel import Ranks, accumulate, place
from pretrained import load_model

COMPILING = "compiling, which takes a minute or so (--compile=False does without)"


@dataclass
class Run:
    """What the loop works with."""

    config: object  # train.TrainConfig
    out_dir: Path
    about: dict  # what checkpoints say of the run: options, model_config, meta, data
    record: dict  # the log record of the last finished step, whose state the model and the optimizer have
    model: torch.nn.Module  # with plain names, under FSDP this rank's share of it
    wrapped: torch.nn.Module  # what is called: the model, or DDP around it
    forward: Callable  # that, compiled or not
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss in float16; in other dtypes it does nothing
    loader: Loader
    device: torch.device
    dtype: torch.dtype
    stop: machine.Stop
    ranks: Ranks
    overflows: int = 0  # float16 steps in a row without a finite gradient

    def autocast(self):
        """Computes in the run's dtype; under FSDP the parameters themselves have it."""
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32 and not self.config.fsdp
        )

    def stopping(self):
        """Whether a signal came, to any rank: all stop at the same place."""
        return self.ranks.any(self.stop.asked)


def check(config, ranks):
    """UserError for a TrainConfig that makes no sense, for these ranks."""
    at_least(1, config, "batch_size", "total_batch_size", "max_steps", "eval_interval", "eval_tokens", "log_interval")
    at_least(1, config, "checkpoint_interval", "keep_checkpoints")
    at_least(0, config, "seed", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "shard_size")
    if config.min_lr > config.learning_rate:
        raise UserError(f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}")
    if not (0 <= config.beta1 < 1 and 0 <= config.beta2 < 1):
        raise UserError(f"beta1={config.beta1}, beta2={config.beta2} must be at least 0 and below 1")
    if config.lr_schedule not in ("cosine", "wsd"):
        raise UserError(f"lr_schedule={config.lr_schedule} is neither cosine nor wsd")
    if config.compile not in (True, False, "auto"):
        raise UserError(f"compile={config.compile} is none of auto, True, False")
    if config.fsdp and not ranks.launched:
        raise UserError(
            "fsdp=True shares a model among processes: torchrun --standalone --nproc_per_node=2 train.py ..."
        )
    if config.shard_size and not config.fsdp:
        raise UserError(f"shard_size={config.shard_size} is for --fsdp=True: DDP shares nothing")
    if config.shard_size and ranks.size % config.shard_size:
        raise UserError(f"{ranks.size} processes are not a multiple of shard_size={config.shard_size}")


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


def check_batch(config, block_size, size):
    """UserError where the tokens of a step cannot be shared out evenly."""
    unit = config.batch_size * block_size * size
    if config.total_batch_size % unit:
        lower = config.total_batch_size // unit * unit
        names, numbers = ("", "") if size == 1 else (" x processes", f" x {size}")
        raise UserError(
            f"total_batch_size={config.total_batch_size} is not a multiple of batch_size x block_size{names} = "
            f"{config.batch_size} x {block_size}{numbers} = {unit}: the nearest are "
            + " and ".join(str(n) for n in (lower, lower + unit) if n)
        )


def default_out_dir(argv):
    """out/ and the stems of the config files; and the model, where the command line names one."""
    names = [Path(arg).stem for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    names += [arg.partition("=")[2] for arg in argv if arg.startswith("--model=")]
    return "out/" + ("-".join(names) or "gpt2")


def begin(config, module, options, meta, about, out_dir):
    """What the run begins with: (checkpoint, its config.json, model_config, None) where out_dir has one to go on from,
    else (None, None, model_config, weights)."""
    steps = [] if config.overwrite else checkpoint.all_steps(out_dir)
    if not steps:
        model = make_model(config, module, options, meta)
        return None, None, asdict(model.config), model.state_dict()
    stored = checkpoint.read_config(steps[-1])
    from_scratch = asdict(module.GPTConfig(**({"vocab_size": meta["vocab_size"]} | options)))
    model_config = (from_scratch if config.init_from == "scratch" else stored["model_config"]) | options
    checkpoint.check_same(about | {"model_config": model_config}, stored, out_dir)
    return steps[-1], stored, model_config, None


def set_up(config, module, options, argv, ranks):
    """Everything before the loop: data, model, optimizer, and the state of the run that is in out_dir.

    Writes nothing but a small dataset that is missing. Returns the Run.
    """
    out_dir = Path(config.out_dir or default_out_dir(argv))
    checkpoint_path = stored = model_config = weights = None
    with ranks.together():
        check(config, ranks)
        device = machine.pick_device(config.device, ranks.local_rank)
        dtype = machine.pick_dtype(config.dtype, device)
        if config.fsdp and dtype == torch.float16:
            raise UserError("dtype=float16 is for one process and DDP: with fsdp take bfloat16 or float32")
        try:
            module.GPTConfig(**options)  # before anything that takes time
        except ValueError as error:
            raise UserError(str(error)) from error
        folder, meta = open_dataset(config.dataset, prepare_missing=not ranks.launched)
        about = {"options": asdict(config) | {"out_dir": str(out_dir), "dtype": str(dtype).removeprefix("torch.")}}
        if ranks.rank == 0:  # the others get its weights
            checkpoint_path, stored, model_config, weights = begin(config, module, options, meta, about, out_dir)
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    checkpoint_path, stored, about["model_config"] = ranks.share((checkpoint_path, stored, model_config))
    with ranks.together():
        with torch.device("meta"):  # without memory: a rank may have room for its share only
            model = module.GPT(module.GPTConfig(**about["model_config"]))
        loader = Loader(folder, model.config.block_size, model.config.vocab_size, config.seed)
        about["data"] = {"tokens": [loader.n_train, loader.n_val], "sha256": meta.get("train", {}).get("sha256")}
        about["meta"] = meta
        check_batch(config, loader.block_size, ranks.size)
        if stored:
            checkpoint.check_same(about, stored, out_dir)  # again, now that the data are known too
    ranks.same(about["options"] | options | {"data": about["data"]})
    if config.activation_checkpointing:
        for block in model.transformer.h:
            recompute(block)
    if config.fsdp and compiles(config, device):  # block by block, as gathering them is not a graph's matter
        print(COMPILING, flush=True)
        for block in model.transformer.h:
            block.compile()
    wrapped = place(model, None if stored else weights or {}, ranks, device, dtype, config.fsdp, config.shard_size)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    record = {"step": 0, "tokens": 0, "seconds": 0.0}
    if stored:
        checkpoint.load(checkpoint_path, model, optimizer)
        scaler.load_state_dict(stored["scaler"])
        record = stored["record"]
    state = (model, wrapped, wrapped, optimizer, scaler, loader, device, dtype, machine.Stop(), ranks)
    return Run(config, out_dir, about, record, *state)


def recompute(block):
    """Have a block forget its activations, and compute them anew in the backward pass."""
    forward = block.forward  # a function around it, as torch.compile does not look into functools.partial
    block.forward = lambda *inputs: checkpointed(forward, *inputs, use_reentrant=False)


def compiles(config, device):
    """Whether torch.compile is wanted."""
    return config.compile is True or (config.compile == "auto" and device.type == "cuda")


def compile_model(run):
    """Have the run use torch.compile's model, where that works: a first pass compiles forward and backward."""
    print(COMPILING, flush=True)
    run.forward = torch.compile(run.wrapped)  # checkpoints keep run.model's plain names
    x, y = (t.to(run.device) for t in run.loader.train_batch(0, run.config.batch_size))
    failed = None
    try:
        with accumulate(run.wrapped, last=False):  # nothing is sent: it may fail on one rank alone
            with run.autocast():
                loss = run.forward(x, y)
            loss.backward()
    except Exception as error:  # each backend and compiler has its own
        if machine.is_out_of_memory(error):
            raise
        failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    failed = next((text for text in run.ranks.gather(failed) if text), None)
    if failed:
        run.forward = run.wrapped
        if run.ranks.rank == 0:
            print(f"warning: not compiled, {failed}", file=sys.stderr)
    run.optimizer.zero_grad()
