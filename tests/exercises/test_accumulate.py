"""The idea of the exercise accumulate: the micro-steps of one optimizer step."""

import functools

import pytest
import torch
from exercises import missing, version_fixture
from forked import on_ranks
from training_exercises import (
    BATCH_SIZE,
    STEP_SEQUENCES,
    check_averaged,
    compare_with_one_process,
    in_words,
    opened_run,
)

module = version_fixture("accumulate")
pytestmark = pytest.mark.usefixtures("workdir")
STEP = 1  # of which the sequences do not begin at 0
MICRO_STEPS = STEP_SEQUENCES // BATCH_SIZE  # in one process
SCALE = 8.0  # of the loss, in place of a float16 run's


def take_step(module, run):
    """Take a step with the train_step of a module; return the numbers to log."""
    run.step = STEP
    numbers = module.train_step(run)
    if numbers is None:
        missing("train_step returned None, but no rank had received a stop signal")
    return numbers


def record_reads(run, before_read=lambda: None):
    """Return a list, to which each micro-step will append the sequences that it reads."""
    reads = []
    train_batch = run.loader.train_batch

    def recording_train_batch(first, count):
        before_read()
        reads.append(list(range(first, first + count)))
        return train_batch(first, count)

    run.loader.train_batch = recording_train_batch
    return reads


def check_reads(reads, rank, world_size):
    """Fail unless a rank read its own sequences of the step."""
    __tracebackhide__ = True
    micro_steps = MICRO_STEPS // world_size
    if len(reads) != micro_steps:
        missing(f"a step must read {micro_steps} batches, one per micro-step, not {len(reads)}")
    for micro_step, read in enumerate(reads):
        first = STEP * STEP_SEQUENCES + (micro_step * world_size + rank) * BATCH_SIZE
        expected = list(range(first, first + BATCH_SIZE))
        if read == expected:
            continue
        if rank > 0 and read == [number - rank * BATCH_SIZE for number in expected]:
            missing(
                f"rank {rank} read the sequences of rank 0: in micro-step {micro_step} of step "
                f"{STEP} it must read {in_words(expected)}, not {in_words(read)}"
            )
        who = f"rank {rank} of {world_size}" if world_size > 1 else "one process"
        missing(
            f"in micro-step {micro_step} of step {STEP}, {who} must read the sequences "
            f"{in_words(expected)}, not {in_words(read)}: a step has {STEP_SEQUENCES} sequences, a "
            f"micro-step {BATCH_SIZE} for each rank, first those of rank 0"
        )


def mean_loss_and_norm(run):
    """Return the loss of all sequences of the step, and the norm of its gradient."""
    loss = run.model(*run.loader.train_batch(STEP * STEP_SEQUENCES, STEP_SEQUENCES))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm()
    run.model.zero_grad()
    return loss.item(), norm.item()


def test_each_micro_step_reads_the_next_sequences_of_the_step(module):
    with opened_run() as run:
        reads = record_reads(run)
        take_step(module, run)
    check_reads(reads, rank=0, world_size=1)


def test_loss_and_gradient_are_the_means_over_the_micro_steps(module):
    with opened_run() as run:
        loss, norm = mean_loss_and_norm(run)
        numbers = take_step(module, run)
    if numbers["train_loss"] == pytest.approx(MICRO_STEPS * loss, rel=1e-3):
        missing(
            f"each micro-step's loss must be divided by micro_steps = {MICRO_STEPS}: the logged "
            f"loss is {MICRO_STEPS} times too large"
        )
    if numbers["train_loss"] != pytest.approx(loss, rel=1e-4):
        missing(
            f"the logged loss is {numbers['train_loss']:.4f}, but the mean of the losses of the "
            f"{MICRO_STEPS} micro-steps is {loss:.4f}: add each one's to `loss`"
        )
    if numbers["grad_norm"] == pytest.approx(MICRO_STEPS * norm, rel=1e-3):
        missing(
            f"each micro-step's loss must be divided by micro_steps = {MICRO_STEPS} before its "
            f"backward pass: the gradient is {MICRO_STEPS} times too large"
        )
    if numbers["grad_norm"] != pytest.approx(norm, rel=1e-4):
        missing(
            f"the norm of the gradient is {numbers['grad_norm']:.4f}, but that of the gradient of "
            f"the mean loss is {norm:.4f}: each micro-step's backward pass must add to it"
        )


def test_the_loss_is_scaled_for_the_backward_pass_alone(module):
    with opened_run() as run:
        loss, norm = mean_loss_and_norm(run)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        run.scaler.scale(torch.zeros(()))  # from now on it scales
        numbers = take_step(module, run)
    if numbers["grad_norm"] != pytest.approx(norm, rel=1e-4):
        missing(
            f"in float16 the gradient has the norm {numbers['grad_norm']:.4f}, not {norm:.4f}: "
            f"call run.scaler.scale(...).backward(), because it is divided by the scale, "
            f"{SCALE:g}, afterwards"
        )
    if numbers["train_loss"] != pytest.approx(loss, rel=1e-4):
        missing(
            f"in float16 the logged loss is {numbers['train_loss']:.4f}, not {loss:.4f}: add the "
            f"loss before it is scaled, here by {SCALE:g}"
        )


def test_the_forward_pass_computes_in_the_dtype_of_the_run(module):
    used = []
    with opened_run(dtype="bfloat16") as run:
        run.model.register_forward_pre_hook(
            lambda *_: used.append(torch.is_autocast_enabled(run.device.type))
        )
        take_step(module, run)
    if not all(used):
        missing("the forward pass of a bfloat16 run computes in float32: run.autocast() is missing")


def test_the_sum_of_the_losses_keeps_no_graph(module):
    with opened_run() as run:
        summed = []
        run.group.mean = lambda loss: summed.append(loss) or loss
        take_step(module, run)
    if summed[0].requires_grad:
        missing(
            "`loss` has a graph, which keeps memory of every micro-step: add the loss's detach()"
        )


def test_a_stop_signal_between_micro_steps_drops_the_step(module):
    with opened_run() as run:
        before = [p.detach().clone() for p in run.model.parameters()]

        def stop_in_micro_step_1():
            run.stop.received = len(reads) == 1

        reads = record_reads(run, stop_in_micro_step_1)
        run.step = STEP
        numbers = module.train_step(run)
        after = list(run.model.parameters())
    rule = "a stop signal between micro-steps must drop the step"
    if numbers is not None:
        missing(f"{rule}: one arrived in micro-step 1, but train_step went on to the end")
    if len(reads) > 2:
        missing(f"{rule} at once: one arrived in micro-step 1, but {len(reads)} were computed")
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        missing(f"{rule}, but the weights changed: return None without a step of the optimizer")
    if any(p.grad is not None and p.grad.any() for p in after):
        missing(f"{rule} and its gradients, but those of {len(reads)} micro-steps remain")


def step_of_rank(module):
    """Take a step on a rank; return the sequences and the gradients of each micro-step."""
    with opened_run() as run:
        gradients = []
        mean = run.group.mean

        def note_gradient():
            gradient = run.model.transformer["ln_f"].weight.grad
            gradients.append(None if gradient is None else gradient.tolist())

        def noting_mean(loss):
            note_gradient()
            return mean(loss)

        reads = record_reads(run, note_gradient)
        run.group.mean = noting_mean
        take_step(module, run)
    return reads, gradients[1:]


@functools.cache
def two_ranks(module):
    """Return step_of_rank() of each of two ranks."""
    return on_ranks(2, step_of_rank, module, case="a step on two ranks")


def test_each_rank_reads_its_own_sequences(module):
    for rank, (reads, _) in enumerate(two_ranks(module)):
        check_reads(reads, rank, world_size=2)


def test_the_ranks_average_their_gradients_in_the_last_micro_step(module):
    (_, gradients), (_, others) = two_ranks(module)
    last = len(gradients) - 1
    averaged = [i for i in range(last + 1) if gradients[i] == others[i]]
    check_averaged(
        averaged,
        last,
        "run forward and backward pass within parallel.gradient_sync(run.wrapped, enabled=...)",
    )


def stop_of_one_rank(module):
    """Take a step on a rank, rank 1 of which gets a stop signal; return whether it was dropped."""
    with opened_run() as run:
        run.step = STEP

        def stop_rank_1():
            run.stop.received = run.group.rank == 1

        record_reads(run, stop_rank_1)
        return module.train_step(run) is None


def test_a_stop_signal_of_one_rank_drops_the_step_on_both(module):
    dropped = on_ranks(2, stop_of_one_rank, module, case="a stop signal for rank 1 alone")
    if dropped != [True, True]:
        missing(
            "only rank 1 has received a stop signal, and both ranks must drop the step: ask "
            "group.any_rank(run.stop.received)"
        )


def test_a_run_of_two_ranks_is_that_of_one_process(module):
    compare_with_one_process(module, "DDP")
