"""What the tests of the exercises about training share: a tiny run of train.py and its steps."""

import contextlib
import functools
import io
from pathlib import Path

from conftest import arguments, read_log
from exercises import missing
from forked import on_ranks
from runs import weights

import train
from training import parallel
from training.start import read_options

# A step has 12 sequences of 16 tokens: six micro-steps of one process, three of two ranks.
STEP_SEQUENCES = 12
BATCH_SIZE = 2
OPTIONS = {
    "model": "model_rope",  # without rotary positions the gradient of a key bias is rounding error
    "batch_size": BATCH_SIZE,
    "total_batch_size": STEP_SEQUENCES * 16,
    "dropout": 0.0,
    "max_steps": 4,
    "eval_interval": 4,
    "eval_tokens": 64,
}
LOGGED = ["train_loss", "grad_norm", "val_loss"]


@contextlib.contextmanager
def opened_run(**options):
    """Yield a new Run of train.py, of this process or, on forked ranks, of all of them."""
    argv = arguments(**OPTIONS | options)
    config, model_options, group = read_options(train.TrainConfig, argv, train.__doc__)
    with contextlib.ExitStack() as stack:
        yield train.setup(config, model_options, group, stack)


def use(module):
    """Let train.py use the function of an exercise's module in place of its own."""
    for owner, name in [
        (train, "train_step"),
        (parallel, "gradient_sync"),
        (parallel, "shard_model"),
    ]:
        if hasattr(module, name):
            setattr(owner, name, getattr(module, name))


def train_with(module, argv):
    """Train with the function of an exercise's module."""
    use(module)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(argv)


@functools.cache
def run_of_one_process():
    """Return the log and the weights of a run of one process, with one micro-step per step."""
    options = {"batch_size": STEP_SEQUENCES, "out_dir": "out/one"}
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(arguments(**OPTIONS | options))
    return read_log(Path("out/one")), weights(Path("out/one"))


def compare_with_one_process(module, mode, **options):
    """Fail unless a run on two ranks has the losses and the weights of a run of one process.

    module    has the function of an exercise
    mode      name of a run with these options, for messages
    """
    __tracebackhide__ = True
    one_log, one_weights = run_of_one_process()
    argv = arguments(**OPTIONS | {"out_dir": "out/two"} | options)
    on_ranks(2, train_with, module, argv, case=f"train.py with {mode} on two ranks")
    for one, two in zip(one_log, read_log(Path("out/two")), strict=True):
        for key in LOGGED:
            if key in one and abs(two[key] - one[key]) > 1e-4 * abs(one[key]):
                missing(
                    f"with {mode} on two ranks, {key} of step {one['step']} is {two[key]:.5f}, but "
                    f"in one process, with the same sequences, it is {one[key]:.5f}"
                )
    for name, weight in weights(Path("out/two")).items():
        difference = (weight - one_weights[name]).norm() / one_weights[name].norm()
        if difference > 1e-4:
            missing(
                f"with {mode} on two ranks, {name} differs after {OPTIONS['max_steps']} steps by "
                f"{difference:.1%} from that of one process, though the logged losses are equal"
            )


def in_words(numbers):
    """Return numbers as in "0, 1 and 2"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def check_averaged(averaged, last, cause):
    """Fail unless the ranks averaged their gradients in the last micro-step only.

    averaged   the micro-steps of one optimizer step after which the ranks had the same gradients
    cause      what to look at, in a few words
    """
    __tracebackhide__ = True
    if averaged == [last]:
        return
    if not averaged:
        missing(
            "after one step the two ranks have different weights: no micro-step averaged their "
            f"gradients, but the last one, {last}, must ({cause})"
        )
    steps = f"micro-step{'s' if len(averaged) > 1 else ''} {in_words(averaged)}"
    if last not in averaged:
        missing(
            f"the ranks average their gradients in {steps}, but not in the last one, {last}, so "
            f"that they take the step with different gradients ({cause})"
        )
    missing(
        f"the ranks average their gradients in {steps}, but must do so only in the last one, "
        f"{last}: each all-reduce sends the whole gradient ({cause})"
    )
