"""What a run tells its user: the summary, the metrics of each step, and advice after an error."""

import math
import shlex
import sys
import time

import torch.distributed as dist

from common import run_dir
from common.device import device_name, is_out_of_memory, peak_flops, peak_memory
from common.distributed import describe_lost_rank
from common.errors import UserError
from common.flops import mfu_flops_per_token
from training.start import smaller_batch_size

# Metrics that the functions below format or omit; describe_others prints all others by their names.
OWN_FORMAT = (
    *("train_loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "mfu"),
    *("memory_gb", "val_loss", "val_bits_per_byte", "train_eval_loss"),
)

# Before the first step ------------------------------------------------------------------------


def print_summary(run):
    """Print all options, and what the run is: model, data, steps, device, directory.

    run   a Run of train.py, here and below
    """
    config, loader, world_size = run.config, run.loader, run.group.world_size
    options = run.record["options"] | run.record["model_config"]
    run.group.print(" ".join(f"{name}={value}" for name, value in options.items()))
    n_parameters = sum(p.numel() for p in run.model.parameters())
    parts = [f"{n_parameters:,} parameters", f"{loader.n_train:,} training tokens"]
    if not config.eval_only:  # which accepts a total_batch_size that micro-steps do not divide
        micro_steps = config.total_batch_size // (
            config.batch_size * loader.block_size * world_size
        )
        plural = "s" if micro_steps > 1 else ""
        processes = f" on {world_size} processes" if world_size > 1 else ""
        parts.append(
            f"{config.total_batch_size:,} tokens per step: {config.batch_size} sequences of "
            f"{loader.block_size} tokens x {micro_steps} micro-step{plural}{processes}"
        )
    parts += [f"{device_name(run.device)}, {options['dtype']}", str(run.out_dir)]
    run.group.print(" | ".join(parts))


# Steps ----------------------------------------------------------------------------------------


class StepReport:
    """Measures each step, for log.jsonl, and prints a line at every log_interval-th step.

    run   for the options, the device and the model; its metrics are those of the step before
    """

    def __init__(self, run):
        self.config = run.config
        self.group = run.group
        self.device = run.device
        self.flops_per_token = mfu_flops_per_token(run.model, run.loader.block_size)
        self.peak_flops = peak_flops(run.device, run.dtype)  # of one device; None: not known
        self.memory = None  # peak memory in GB, when it was last read
        self.start = time.perf_counter() - run.metrics["seconds"]  # as if never interrupted

    def measure(self, step, numbers, seconds):
        """Collective. Return the metrics of a step: its line in log.jsonl.

        step      number of steps taken, this one included
        numbers   what train_step returned
        seconds   its duration
        """
        if self._is_printed(step) or self.memory is None:  # at each step it would take too long
            self.memory = self._largest_memory()
        tokens_per_second = self.config.total_batch_size / seconds
        mfu = None
        if self.peak_flops is not None:
            flops = self.flops_per_token * tokens_per_second
            mfu = flops / (self.peak_flops * self.group.world_size)
        # JSON has no infinity.
        finite = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        return finite | {
            "tokens": step * self.config.total_batch_size,
            "seconds": time.perf_counter() - self.start,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "memory_gb": self.memory,
        }

    def print(self, step, metrics):
        """Print a line about a step, if it is one of those that are printed."""
        if not self._is_printed(step):
            return
        max_steps = self.config.max_steps
        milliseconds = 1000 * self.config.total_batch_size / metrics["tokens_per_second"]
        seconds_left = (max_steps - step) * metrics["seconds"] / step
        parts = [
            f"step {step}/{max_steps}",
            f"loss {metrics['train_loss']:.4f}",
            f"norm {metrics['grad_norm']:.2f}",
            f"lr {metrics['lr']:.1e}",
            f"{milliseconds:.1f} ms",
            f"{metrics['tokens_per_second'] / 1000:.1f}k tok/s",
        ]
        if metrics["mfu"] is not None:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        parts += describe_others(metrics)
        parts.append(f"{describe_duration(seconds_left)} left")
        self.group.print(" | ".join(parts))

    def _is_printed(self, step):
        return step % self.config.log_interval == 0 or step == self.config.max_steps

    def _largest_memory(self):
        """Collective. Return the largest peak memory of a rank in GB; None if it is not known."""
        memory = peak_memory(self.device)
        if memory is None:  # on all ranks or on none
            return None
        return self.group.all_reduce([memory], dist.ReduceOp.MAX)[0]


def describe_duration(seconds):
    """Return a time as text, in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def describe_others(metrics):
    """Return name and value of each metric without an own format, a list of str."""
    return [f"{name} {metrics[name]:.4g}" for name in metrics if name not in OWN_FORMAT]


def print_evaluation(run, evaluation, prefix=""):
    """Print what evaluate() returned, and the perplexity; print "stopped" for None."""
    if evaluation is None:
        run.group.print("stopped")
        return
    loss = evaluation["val_loss"]
    perplexity = math.exp(min(loss, 700))  # exp overflows above 709
    parts = [f"val loss {loss:.4f}", f"perplexity {perplexity:.2f}"]
    if "val_bits_per_byte" in evaluation:
        parts.append(f"{evaluation['val_bits_per_byte']:.3f} bits per byte")
    if "train_eval_loss" in evaluation:
        parts.append(f"train loss {evaluation['train_eval_loss']:.4f}")
    run.group.print(prefix + " | ".join(parts + describe_others(evaluation)))


# Log ------------------------------------------------------------------------------------------


def log_step(run):
    """Append the last step's metrics to log.jsonl and send them to the tracker. Rank 0 only.

    Returns an error message, or None.
    """
    if run.track is not None:
        try:
            run.track(run.step, {name: n for name, n in run.metrics.items() if n is not None})
        except Exception as error:  # each package raises its own types
            warning = f"{run.config.tracker} failed ({error!r}); training continues without it"
            print(f"warning: {warning}", file=sys.stderr)
            run.track = None
    return run_dir.append_log(run.out_dir, run.step, run.metrics)


def is_finished(run):
    """Return whether the last step of a run has been taken and evaluated."""
    return run.step == run.config.max_steps and "val_loss" in run.metrics


def print_end(run):
    """Print where a run has ended, and how to continue it or sample from it."""
    if run.step > run.config.max_steps:
        text = (
            f"{run.out_dir} is at step {run.step}, past max_steps={run.config.max_steps}: "
            "nothing to do; a larger --max_steps continues the run"
        )
    elif is_finished(run):
        text = (
            f"{run.out_dir} is finished, at step {run.step}: a larger --max_steps continues it\n"
            f"python sample.py --init_from={shlex.quote(str(run.out_dir))}"
        )
    else:
        text = (
            f"stopped after step {run.step}: the same command, without --overwrite, resumes the run"
        )
    run.group.print(text)


# After an error -------------------------------------------------------------------------------


def not_finite_advice(run):
    """Return what to try after a loss that is not finite, to be appended to the error."""
    rates = "--learning_rate"
    if run.config.optimizer == "muon":
        rates = "--learning_rate and --muon_learning_rate"
    remedy = f"with a lower {rates} or --dtype=float32"
    if not run_dir.list_checkpoints(run.out_dir):
        return f"; start a new run {remedy}"
    # The last checkpoint may be of a step that had diverged; init_from=out_dir loads the best.
    weights = f"--init_from={shlex.quote(str(run.out_dir))} --out_dir=NEW"
    return f"; start a new run from the best checkpoint by {weights}, {remedy}"


def explain_error(error, config, run, world_size):
    """Return a UserError for an error of torch that the user can fix, else None.

    run   None if the error happened before there was one
    """
    # Not imported at the top: Dynamo takes a second to import, which --help would pay too.
    from torch._dynamo.exc import TorchDynamoException

    lost_rank = describe_lost_rank(error)
    if lost_rank is not None:
        return UserError(
            f"another rank does not answer ({lost_rank}): the same command, without --overwrite, "
            "resumes the run"
        )
    if is_out_of_memory(error):
        if run is None:
            return UserError("out of memory: the model alone does not fit on the device")
        return UserError(out_of_memory_advice(config, run.loader.block_size, world_size))
    # Of a graph that compile_model has not tried. If the trial fails, the run continues uncompiled.
    if isinstance(error, TorchDynamoException):
        name = type(error).__name__
        return UserError(f"torch.compile failed ({name}): --compile=False trains without it")
    return None


def out_of_memory_advice(config, block_size, world_size=1):
    """Return what to do when memory ran out: a batch_size that keeps total_batch_size."""
    smaller = smaller_batch_size(config, block_size, world_size)
    remedies = []
    if smaller:
        remedies.append(f"--batch_size={smaller} keeps total_batch_size={config.total_batch_size}")
    if not config.activation_checkpointing:
        remedies.append("--activation_checkpointing=True")
    if not remedies:
        remedies.append("use a smaller block_size")
    return f"out of memory with batch_size={config.batch_size}: {', or '.join(remedies)}"
