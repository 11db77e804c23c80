"""Paired differences between models: 95 % intervals, a sign test, and how many seeds they need.

Two models are compared seed by seed: runs with the same seed see the same batches in the same
order, so what one seed changes for both cancels out in the difference. The interval is that of a
paired t-test: mean(d) +- t * stdev(d) / sqrt(n) over the n differences d.

The words of the tables follow the interval: "better" or "worse" if it excludes 0, otherwise
"within +-x", where x is the largest difference that the interval leaves possible.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95
POWER = 0.8  # probability with which enough_seeds() lets a study show a difference


@dataclass
class Interval:
    """A mean over seeds and half the width of its 95 % interval; inf with a single seed."""

    mean: float
    half_width: float

    @property
    def low(self):
        return self.mean - self.half_width

    @property
    def high(self):
        return self.mean + self.half_width

    def format(self, digits, sign=""):
        """Return the interval as text, 1.5297 ± 0.0120; of a single seed only the value."""
        text = f"{self.mean:{sign}.{digits}f}"
        if self.half_width == math.inf:
            return text
        return f"{text} ± {self.half_width:.{digits}f}"


def interval_of(values, comparisons=1):
    """Return the Interval of the mean of independent values, one for each seed.

    comparisons   whose intervals are all to hold their true values with a probability of 95 % or
                  more: each is made wider (Bonferroni's correction)
    """
    n = len(values)
    if n == 1:
        return Interval(values[0], math.inf)
    outside = (1 - CONFIDENCE) / comparisons
    t = t_quantile(1 - outside / 2, degrees=n - 1)
    return Interval(mean(values), t * stdev(values) / math.sqrt(n))


def paired_difference(values, reference, comparisons=1):
    """Return the Interval of values - reference; both have one value per seed, in one order."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    return interval_of(differences, comparisons)


def format_mean(values, digits=4):
    """Return the mean of values and its interval as text: 1.5297 ± 0.0120."""
    return interval_of(values).format(digits)


def format_difference(values, reference, digits=4):
    """Return the paired difference of two losses and its interval as text.

    "" without a reference: a study of some rows may lack it.
    """
    if reference is None:
        return ""
    return paired_difference(values, reference).format(digits, sign="+")


def verdict(values, reference, digits=4):
    """Return what the paired difference of two losses shows: better, worse, or within ±x."""
    if reference is None:
        return ""
    interval = paired_difference(values, reference)
    if interval.half_width == math.inf:
        return "one seed"
    if interval.high < 0:
        return "better"
    if interval.low > 0:
        return "worse"
    return f"within ±{max(-interval.low, interval.high):.{digits}f}"


def signs(values, reference):
    """Return how many seeds agree on the sign of the difference, and the sign test's p: text.

    p is the probability that so many or more of n seeds agree by chance. It takes no normal
    distribution, but many seeds: with four, it is never below 2 / 2^4 = 0.125. Equal losses do not
    count. "" without a reference.
    """
    if reference is None:
        return ""
    lower = sum(a < b for a, b in zip(values, reference, strict=True))
    higher = sum(a > b for a, b in zip(values, reference, strict=True))
    n, most = lower + higher, max(lower, higher)
    ways = sum(math.comb(n, k) for k in range(most, n + 1))
    p = min(1.0, 2 * ways / 2**n)
    return f"{most} of {n} {'lower' if lower > higher else 'higher'}, p = {p:.3g}"


def enough_seeds(values, reference, difference):
    """Return how many seeds a study needs to show a difference of two losses with POWER.

    The smallest n for which difference >= (t_0.975 + t_0.8) stdev / sqrt(n), where the t are
    quantiles with n - 1 degrees of freedom and stdev is that of the paired differences seen.
    """
    spread = stdev(a - b for a, b in zip(values, reference, strict=True))
    for n in itertools.count(2):
        t = t_quantile((1 + CONFIDENCE) / 2, n - 1) + t_quantile(POWER, n - 1)
        if difference >= t * spread / math.sqrt(n):
            return n


# Student's t distribution ---------------------------------------------------------------------


@functools.cache
def t_quantile(p, degrees):
    """Return the t below which Student's t distribution has the probability p, for 0.5 < p < 1."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < p:
        high *= 2
    for _ in range(60):  # each halves the error
        middle = (low + high) / 2
        if t_probability(middle, degrees) < p:
            low = middle
        else:
            high = middle
    return high


def t_probability(t, degrees):
    """Return the probability that Student's t distribution gives the values below t.

    A finite sum for a whole number of degrees (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(2 + is_odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (i - 1) / i
        total += term
    total *= math.sin(angle)
    if is_odd:
        total = 2 / math.pi * (angle + total)
    return (1 + total) / 2
