"""Paired differences between models, with 95 % confidence intervals.

Two models are compared seed by seed: runs with the same seed see the same batches in the same
order, so what one seed changes for both cancels out in the difference. The interval is that of a
paired t-test: mean(d) +- t * stdev(d) / sqrt(n) over the n differences d.

The words of the tables follow the interval: "better" or "worse" if it excludes 0, otherwise
"within +-x", where x is the largest difference that the interval leaves possible.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev

# Quantiles 0.975 of Student's t distribution, by degrees of freedom.
T_975 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}


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


def interval_of(values):
    """Return the Interval of the mean of independent values, one for each seed (at most 10)."""
    n = len(values)
    if n == 1:
        return Interval(values[0], math.inf)
    return Interval(mean(values), T_975[n - 1] * stdev(values) / math.sqrt(n))


def paired_difference(values, reference):
    """Return the Interval of values - reference; both have one value per seed, in one order."""
    return interval_of([a - b for a, b in zip(values, reference, strict=True)])


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
