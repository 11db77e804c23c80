"""The exercises about training: the first test that fails names a mistake; no test hangs.

The tests of an idea run in their order on the file of an exercise with our lines and one change.
Most changes are made by `pytest -m slow` only.
"""

import multiprocessing
import time

import forked
import pytest
import torch
from forked import on_ranks
from ideas import failures, load, solved

from tools.exercise import EXERCISES, exercise_text

SYNC = "enabled=micro_step == micro_steps - 1"
STOPPING = "group.any_rank(run.stop.received)"
WITH_SYNC = f"        with parallel.gradient_sync(run.wrapped, {SYNC}):\n"
FORWARD = """\
            with run.autocast():
                micro_loss = run.wrapped(x, y) / micro_steps
"""
SYNC_AFTER_FORWARD = "        if True:\n" + FORWARD + WITH_SYNC
UNDER_DDP = "isinstance(wrapped, DistributedDataParallel)"
BLOCKS = """\
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
"""
CAST = "cast_forward_inputs=False"
ROOT_GROUP = "    fully_shard(model, mesh=mesh, mp_policy=policy)\n"
# exercise: what is replaced, by what, and a part of the sentence of the first test that fails
PLANTED = {
    "accumulate": [
        ("run.step * step_sequences + ", "", "in micro-step 0 of step 1"),
        ("+ micro_step * micro_sequences", "", "in micro-step 1 of step 1"),
        ("first += group.rank *", "first += 0 *", "rank 1 read the sequences of rank 0"),
        (" / micro_steps", "", "logged loss is 6 times too large"),
        ("loss += micro_loss", "loss = micro_loss", "add each one's to `loss`"),
        ("run.scaler.scale(micro_loss)", "micro_loss", "call run.scaler.scale(...)"),
        ("with run.autocast():", "if True:", "run.autocast() is missing"),
        (".detach()", "", "`loss` has a graph"),
        ("if micro_step > 0:", "if micro_step == 0:", "went on to the end"),
        ("run.zero_grad()  # drops", "pass  # drops", "those of 2 micro-steps remain"),
        (STOPPING, "group.broadcast(run.stop.received)", "only rank 1 has received a"),
        (STOPPING, "run.stop.received", "rank 1 has finished"),
        ("stopping = ", "stopping = group.rank == 0 and ", "is in line"),
        (SYNC, "enabled=True", "in micro-steps 0, 1 and 2, but must do so only"),
        (SYNC, "enabled=False", "the two ranks have different weights: no micro-step"),
        (SYNC, "enabled=micro_step == 0", "in micro-step 0, but not in the last one, 2"),
        (WITH_SYNC + FORWARD, SYNC_AFTER_FORWARD, "forward and backward pass within"),
        (SYNC, f"{SYNC} and run.step < 2", "with DDP on two ranks, grad_norm of step 3"),
    ],
    "ddp": [
        ("else:\n        yield", "else:\n        yield\n        wrapped.zero_grad()", "not 111"),
        (f"{UNDER_DDP} and not enabled", UNDER_DDP, "different weights: no micro-step"),
        (f"{UNDER_DDP} and not enabled", "False", "in micro-steps 0, 1 and 2, but must do so"),
        ("and not enabled", "and enabled", "in micro-steps 0 and 1, but not in the last one, 2"),
        ("sync(enabled)\n", "sync(True)\n", "reduced in the micro-steps 0, 1 and 2, but"),
        ("sync(enabled)\n", "sync(False)\n", "reduced in no micro-step, but"),
    ],
    "fsdp": [
        ("    policy =", "    return\n    policy =", "96 rows of h.0.attn.c_attn.weight"),
        (BLOCKS, ROOT_GROUP + BLOCKS, "the model is sharded before its blocks"),
        (BLOCKS, "", "block 0 is not sharded by itself, so all 3 blocks"),
        (ROOT_GROUP, "", "61 of the 61 rows of wte.weight, but must hold 31: the blocks"),
        ("param_dtype=dtype, ", "", "block 0 computes with torch.float32 parameters"),
        (CAST, "", "angles reach block 0 in torch.bfloat16"),
        ("reduce_dtype=torch.float32", "reduce_dtype=dtype", "reduced in bfloat16"),
        (ROOT_GROUP, "    fully_shard(model, mesh=mesh)\n", "float32 from the embedding"),
        (BLOCKS, BLOCKS[:-2] + ", reshard_after_forward=False)\n", "still holds all"),
        ("shard_degree = shard_degree or", "shard_degree = 0 or", "not [0, 1]"),
        ("(replicas, shard_degree), ", "(shard_degree, replicas), ", "must have both ranks in its"),
    ],
}
ROWS = [(name, *row) for name, rows in PLANTED.items() for row in rows]
IN_EVERY_RUN = (
    " / micro_steps",
    f"{UNDER_DDP} and not enabled",
    BLOCKS,
    "cast_forward_inputs=False",
)


def as_case(number, row):
    """Return a row of ROWS as a case of a test, slow unless its text is one of IN_EVERY_RUN."""
    _, old, _, _ = row
    marks = () if old in IN_EVERY_RUN else pytest.mark.slow
    return pytest.param(*row, id=f"{row[0]}-{number}", marks=marks)


@pytest.mark.parametrize("name", PLANTED)
def test_without_our_lines_each_test_fails_with_not_implemented_error(name, workdir):
    raised = list(failures(name, load(exercise_text(EXERCISES[name]), workdir)))
    assert raised
    assert {type(error) for error in raised} == {NotImplementedError}


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"), [as_case(number, row) for number, row in enumerate(ROWS)]
)
def test_the_first_failing_test_names_the_mistake(name, old, new, sentence, workdir):
    text = solved(name)
    assert text.count(old) == 1
    first = next(failures(name, load(text.replace(old, new), workdir)), None)
    assert isinstance(first, pytest.fail.Exception), repr(first)
    assert sentence in str(first)
    assert "\n" not in str(first)


# Ranks that fail ------------------------------------------------------------------------------


def reduce_on_rank_0():
    if torch.distributed.get_rank() == 0:
        torch.distributed.all_reduce(torch.ones(1))
    else:
        time.sleep(600)


def divide_by_the_rank():
    torch.distributed.all_reduce(torch.ones(1))
    1 / torch.distributed.get_rank()
    torch.distributed.all_reduce(torch.ones(1))


def failure_of_ranks(function):
    """Return the message with which on_ranks() fails, after the end of its processes."""
    before = multiprocessing.active_children()  # the background jobs, if any
    with pytest.raises(pytest.fail.Exception) as failure:
        on_ranks(2, function, case="a test")
    assert multiprocessing.active_children() == before
    return str(failure.value)


def test_a_rank_that_hangs_in_a_collective_ends_with_the_lines_of_both(monkeypatch):
    monkeypatch.setattr(forked, "LONGEST_WAIT", 0.5)
    message = failure_of_ranks(reduce_on_rank_0)
    assert message.startswith("a test: rank 0 waits for the other ranks in line")
    assert "all_reduce" in message and "rank 1 is in line" in message and "sleep" in message


def test_an_exception_of_one_rank_ends_both_with_its_traceback():
    message = failure_of_ranks(divide_by_the_rank)
    assert "1 / torch.distributed.get_rank()" in message
    assert message.rstrip().endswith("ZeroDivisionError: division by zero")
