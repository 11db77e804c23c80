"""Trackers: send what a run logs to Weights & Biases or TensorBoard, which are optional packages.

Each open_NAME(run, options, stack) returns a function track(step, metrics); the ExitStack closes
the tracker. To add a service, write another one and name it in TRACKERS.
"""

import contextlib
import secrets

from common.errors import UserError, one_line


def open_tracker(run, stack):
    """Return a function track(step, metrics) for config.tracker, which the ExitStack closes.

    Raises UserError if its package is missing or refuses to start. Rank 0 only.
    """
    name = run.config.tracker
    try:
        return TRACKERS[name](run, run.record["options"] | run.record["model_config"], stack)
    except ImportError as error:
        raise UserError(f"tracker={name} ({error}): pip install {name}") from error
    except Exception as error:  # each package raises its own types
        raise UserError(f"tracker={name}: {type(error).__name__}: {one_line(error)}") from error


def open_wandb(run, options, stack):
    """Begin a run of Weights & Biases, or continue it; its own variables, WANDB_*, configure it."""
    from wandb import init  # "import wandb" would also accept a folder wandb

    id_file = run.out_dir / "wandb_id"
    is_new = run.step == 0 or not id_file.exists()
    run_id = secrets.token_hex(8) if is_new else id_file.read_text()
    session = init(  # without an account it fails, except with WANDB_MODE=offline
        id=run_id,
        resume="allow",
        name=run.out_dir.name,
        dir=run.out_dir,
        config=options,
        allow_val_change=True,  # a resumed run may have another max_steps
    )
    id_file.write_text(run_id)

    def finish(error_type, *_):  # "with session" would print the traceback as well
        # The end of a run must not fail because of its tracker.
        with contextlib.suppress(Exception):
            session.finish(exit_code=int(error_type is not None))

    stack.push(finish)

    def track(step, metrics):
        if step >= session.step:  # W&B has the earlier steps from before the interruption
            session.log(metrics, step=step)

    return track


def open_tensorboard(run, options, stack):
    """Write events for TensorBoard into out_dir; those from run.step on are hidden, if any."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run.out_dir, purge_step=run.step, flush_secs=10)

    def close():
        with contextlib.suppress(Exception):  # as above
            writer.close()

    stack.callback(close)
    lines = [f"    {name}={value}" for name, value in options.items()]
    writer.add_text("options", "\n".join(lines), run.step)

    def track(step, metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return track


TRACKERS = {"wandb": open_wandb, "tensorboard": open_tensorboard}
