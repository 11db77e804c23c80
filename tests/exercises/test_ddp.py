"""The idea of the exercise ddp: the ranks average their gradients once per optimizer step."""

import pytest
import torch
from exercises import missing, version_fixture
from forked import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_exercises import check_averaged, compare_with_one_process, in_words

module = version_fixture("ddp")
pytestmark = pytest.mark.usefixtures("workdir")
MICRO_STEPS = 3
STEPS = 2
INPUTS = [[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]  # of each rank in each micro-step: its gradients


def gradients_after_micro_steps(gradient_sync, model, rank):
    """Return the gradient of the weight of a linear model after each micro-step of two steps.

    It is a list for each step. FSDP has no gradient, None, until it is reduced over the ranks.
    """
    of_steps = []
    for _ in range(STEPS):
        gradients = []
        for micro_step in range(MICRO_STEPS):
            x = torch.full((1, 2), INPUTS[rank][micro_step])
            with gradient_sync(model, enabled=micro_step == MICRO_STEPS - 1):
                model(x).sum().backward()
            [weight] = model.parameters()
            gradient = weight.grad
            if hasattr(gradient, "to_local"):
                gradient = gradient.to_local()
            gradients.append(None if gradient is None else gradient.flatten()[0].item())
        of_steps.append(gradients)
        model.zero_grad()
    return of_steps


def gradients_under_ddp(module):
    model = DistributedDataParallel(torch.nn.Linear(2, 2, bias=False))
    return gradients_after_micro_steps(module.gradient_sync, model, torch.distributed.get_rank())


def gradients_under_fsdp(module):
    model = fully_shard(torch.nn.Linear(2, 2, bias=False))  # a row on each rank
    return gradients_after_micro_steps(module.gradient_sync, model, torch.distributed.get_rank())


def check_mean(gradients):
    """Fail unless both ranks have the mean of their gradients, summed over the micro-steps."""
    __tracebackhide__ = True
    sums = [sum(inputs) for inputs in INPUTS]
    mean = sum(sums) / 2
    for rank, gradient in enumerate(gradients):
        if gradient != pytest.approx(mean):
            missing(
                f"after the last micro-step rank {rank} has the gradient {gradient:g}, but the "
                f"mean of the two ranks' sums, {sums[0]:g} and {sums[1]:g}, is {mean:g}"
            )


def test_one_process_computes_its_backward_pass_as_without_it(module):
    model = torch.nn.Linear(2, 2, bias=False)
    try:
        gradients = gradients_after_micro_steps(module.gradient_sync, model, rank=0)
    except NotImplementedError:
        raise
    except Exception as error:
        error.args = (f"{error}\nin one process, where wrapped is a plain model: only yield, once",)
        raise
    if gradients != [[1.0, 11.0, 111.0]] * STEPS:
        missing(
            "in one process the gradient after three micro-steps with the gradients 1, 10 and 100 "
            f"is {gradients[0][-1]}, not 111: yield once, and do no more"
        )


def test_ddp_averages_the_gradients_in_the_last_micro_step(module):
    ranks = on_ranks(2, gradients_under_ddp, module, case="DDP")
    last = MICRO_STEPS - 1
    for gradients, others in zip(*ranks, strict=True):
        averaged = [i for i in range(MICRO_STEPS) if gradients[i] == others[i]]
        check_averaged(
            averaged, last, "under DDP all micro-steps but the last run within wrapped.no_sync()"
        )
        check_mean([gradients[last], others[last]])


def test_fsdp_reduces_the_gradients_in_the_last_micro_step(module):
    ranks = on_ranks(2, gradients_under_fsdp, module, case="FSDP")
    last = MICRO_STEPS - 1
    for step, (gradients, others) in enumerate(zip(*ranks, strict=True)):
        reduced = [i for i in range(MICRO_STEPS) if gradients[i] is not None]
        if reduced != [last]:
            when = f"in the micro-steps {in_words(reduced)}" if reduced else "in no micro-step"
            missing(
                f"under FSDP the gradients of step {step} are reduced {when}, but must be only in "
                f"the last one, {last}: set_requires_gradient_sync(...) holds until it is called "
                "again"
            )
        check_mean([gradients[last], others[last]])


def test_a_run_of_two_ranks_is_that_of_one_process(module):
    compare_with_one_process(module, "DDP")
