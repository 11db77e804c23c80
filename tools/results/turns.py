"""Take turns: what is compared runs alternately, because the speed of a machine varies over time.

A contestant is a function that returns the seconds of one turn. Each round calls every contestant
once, so a slow minute of the machine falls on all of them.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from common.errors import UserError

MOST_ROUNDS = 100  # more do not change a median


def synchronize(device):
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def stopwatch(device, run, *arguments, calls=1):
    """Return a contestant: it calls run(*arguments), waits for the device, and returns seconds.

    calls   in one turn, whose mean is returned: starting a call and waiting for a GPU takes longer
            than some calls
    """

    def turn():
        start = time.perf_counter()
        for _ in range(calls):
            run(*arguments)
        synchronize(device)
        return (time.perf_counter() - start) / calls

    return turn


# A deadline is a time of time.monotonic(), a clock that all processes of a machine share.


def split(deadline, weights):
    """Yield the deadline of each of several parts: a part of the time that is left when it begins.

    weights   of the parts. What one does not use, or overuses, changes what is left for the others.
    """
    for i, weight in enumerate(weights):
        now = time.monotonic()
        yield now + (deadline - now) * weight / sum(weights[i:])


class Budget:
    """The time for the rounds of a comparison; a round that would not fit is not begun."""

    def __init__(self, deadline, least=2):
        self.deadline = deadline
        self.least = least  # rounds that are made in any case
        self.start = None  # of the first round

    def allows(self, rounds):
        """Return whether another round may begin after this many."""
        now = time.monotonic()
        if rounds == 0:
            self.start = now
        if rounds < self.least:
            return True
        if rounds >= MOST_ROUNDS:
            return False
        return now + (now - self.start) / rounds <= self.deadline


def time_turns(contestants, is_allowed):
    """Return {name: [what each round returned]} of the contestants {name: function}.

    is_allowed   function from the number of finished rounds to whether another one begins
    """
    turns = {name: [] for name in contestants}
    rounds = 0
    while is_allowed(rounds):
        for name, turn in contestants.items():
            turns[name].append(turn())
        rounds += 1
    return turns


def warm_up(contestants):
    """Call each contestant once: the first call loads kernels, compiles and allocates."""
    for turn in contestants.values():
        turn()


def take_turns(rounds, device, functions):
    """Return the median seconds of each function of {name: function}; each round calls all once."""
    contestants = {name: stopwatch(device, run) for name, run in functions.items()}
    warm_up(contestants)
    seconds = time_turns(contestants, lambda done: done < rounds)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(deadline, contestants, programs=None):
    """Warm up, then return {name: [seconds of each round]}: as many rounds as end by the deadline.

    programs   further contestants, which start processes: for them there is nothing to warm up
    """
    warm_up(contestants)
    return time_turns(contestants | (programs or {}), Budget(deadline).allows)


def spread(values):
    """Return the median and the range of some numbers, as a result file stores them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def milliseconds(times):
    return spread([1000 * t for t in times])


def ratio(times, other_times):
    """Return how many times as long the first takes: the quotient of the medians."""
    return statistics.median(times) / statistics.median(other_times)


def run_in_new_process(function, *arguments):
    """Return function(*arguments), called in a process of its own.

    A process's peak memory never decreases, and its settings of malloc last. Raises UserError if
    the process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process of {function.__name__} ended early: perhaps the memory ran out"
            ) from error
