"""Call a function of a test on several ranks, which are forked from the process of the tests.

A rank that fails ends the others. If a rank waits in a collective that another does not call, both
are ended after some seconds, and the test fails with one sentence: the line of each rank.
"""

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch._dynamo  # torch would import it in the first optimizer step of each forked rank

from common.distributed import describe_lost_rank

ROOT = Path(__file__).parents[2]
LONGEST_WAIT = 10  # seconds without computing until a rank counts as hung in a collective
LONGEST_CALL = 300  # seconds until a rank counts as hung that computes, on a busy machine
LAST_WORDS = 2  # seconds in which the other ranks say where they are


def on_ranks(world_size, function, *args, case):
    """Return what function(*args) returns on each rank: the list of their values, in rank order.

    case   what the ranks do, for the message of ranks that wait for each other

    Raises NotImplementedError if a rank does. After any other exception the test fails, with the
    traceback of the rank, or with the sentence of pytest.fail().
    """
    __tracebackhide__ = True
    context = multiprocessing.get_context("fork")
    processes, receivers = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, world_size, folder, sender, function, args)
            process = context.Process(target=run_rank, args=arguments)
            process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        try:
            outcomes = receive_all(processes, receivers, folder)
        finally:
            for process in processes:
                process.kill()
                process.join()
    for rank, (kind, value) in enumerate(outcomes):
        if kind == "not written":
            raise NotImplementedError(f"rank {rank}: {value}")
        if kind == "raised":
            pytest.fail(value, pytrace=False)
    for rank, (kind, _) in enumerate(outcomes):
        if kind == "waits":
            pytest.fail(describe_wait(rank, outcomes, case), pytrace=False)
    return [value for _, value in outcomes]


def receive_all(processes, receivers, folder):
    """Return the outcome that each rank sent, (kind, value), or one for it. See run_rank()."""
    outcomes = [None] * len(receivers)
    pending = {receiver: rank for rank, receiver in enumerate(receivers)}
    deadline = time.monotonic() + LONGEST_CALL
    while pending:
        ready = wait(list(pending), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            rank = pending.pop(receiver)
            try:
                outcomes[rank] = receiver.recv()
            except EOFError:  # gloo ends a process that receives data of another collective
                outcomes[rank] = ("waits", describe_line(written_stack(folder, rank)))
            if outcomes[rank][0] == "waits":
                for other in pending.values():
                    os.kill(processes[other].pid, signal.SIGUSR1)  # then it writes its stack
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
        if {"not written", "raised"} & {outcome[0] for outcome in outcomes if outcome}:
            break
    for rank, outcome in enumerate(outcomes):
        if outcome is None:
            outcomes[rank] = ("waits", describe_line(written_stack(folder, rank)))
    return outcomes


def run_rank(rank, world_size, folder, sender, function, args):
    """Call a function as a rank, and send its outcome, (kind, value).

    The kinds are "returned", with what the function returned; "not written", with the line of
    the reader's NotImplementedError; "raised", with a text for the reader; and "waits", with the
    line in which the rank waits for others.
    """
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}.items():
        os.environ[name] = str(value)
    stack = open(f"{folder}/stack{rank}", "w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack)
    watch = threading.Thread(target=send_wait, args=(threading.get_ident(), sender), daemon=True)
    watch.start()
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=LONGEST_CALL),
        )
        outcome = ("returned", function(*args))
    except BaseException as error:
        stack = traceback.extract_tb(error.__traceback__)
        if isinstance(error, NotImplementedError) and not str(error):  # torch's have a text
            outcome = ("not written", describe_line(stack))
        elif describe_lost_rank(error):
            outcome = ("waits", describe_line(stack))
        elif isinstance(error, pytest.fail.Exception):
            outcome = ("raised", str(error))
        else:
            frames = [frame for frame in stack if is_ours(frame)][1:]  # without this function
            text = "".join(traceback.format_list(frames))
            text += "".join(traceback.format_exception_only(error))
            outcome = ("raised", f"rank {rank} of {world_size}:\n{text}")
    sys.stdout.flush()  # what the reader prints; the process will be killed
    sender.send(outcome)


def send_wait(main_thread, sender):
    """Send the line of this rank once it has computed nothing for LONGEST_WAIT seconds."""
    tick = LONGEST_WAIT / 10
    idle_ticks = 0
    while idle_ticks < 10:
        before = time.process_time()
        time.sleep(tick)
        is_idle = time.process_time() - before < 0.01 * tick
        idle_ticks = idle_ticks + 1 if is_idle else 0
    stack = traceback.extract_stack(sys._current_frames()[main_thread])
    sender.send(("waits", describe_line(stack)))


def written_stack(folder, rank):
    """Return the stack that faulthandler wrote on a rank, the innermost frame last."""
    text = Path(folder, f"stack{rank}").read_text()
    lines = re.findall(r'  File "(.*)", line (\d+)', text)
    return [traceback.FrameSummary(file, int(number), "") for file, number in reversed(lines)]


def is_ours(frame):
    """Return whether a frame of a stack is in this repository, and not in a .venv inside it."""
    path = Path(frame.filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def describe_line(stack):
    """Return the innermost line of a stack in this repository, but none of common/ or this file."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if is_ours(frame) and path.parent.name != "common" and path != Path(__file__):
            return f"line {frame.lineno} of {path.relative_to(ROOT)} ({frame.line})"
    return "a line that is not known"


def describe_wait(rank, outcomes, case):
    """Return one sentence: where a rank waits, and where the others are."""
    others = []
    for other, (kind, value) in enumerate(outcomes):
        if other != rank:
            others.append(
                f"rank {other} {'has finished' if kind == 'returned' else f'is in {value}'}"
            )
    return (
        f"{case}: rank {rank} waits for the other ranks in {outcomes[rank][1]}, but "
        f"{', '.join(others)}: every rank must make the same collective calls in the same order"
    )
