"""experiments/intervals.py: intervals, the words that follow from them, signs, enough seeds."""

import itertools
import math
import re

import numpy as np
import pytest

from experiments.intervals import (
    enough_seeds,
    format_difference,
    format_mean,
    interval_of,
    paired_difference,
    signs,
    t_quantile,
    verdict,
)


def t_distribution_between(low, high, degrees):
    """Integrate the density of Student's t distribution numerically."""
    t = np.linspace(low, high, 200_001)
    constant = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
    constant /= math.sqrt(degrees * math.pi)
    density = constant * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    return float(((density[1:] + density[:-1]) / 2 * np.diff(t)).sum())  # the trapezoidal rule


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("p", [0.8, 0.975])
def test_a_quantile_has_its_probability_below_it(degrees, p):
    quantile = t_quantile(p, degrees)
    assert t_distribution_between(0, quantile, degrees) == pytest.approx(p - 0.5, abs=1e-6)


def test_95_percent_of_the_intervals_hold_the_true_mean():
    generator = np.random.default_rng(0)
    samples = generator.normal(3.0, 2.0, size=(4000, 4))
    intervals = [interval_of(sample.tolist()) for sample in samples]
    held = [interval.low < 3.0 < interval.high for interval in intervals]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_95_percent_of_nine_corrected_intervals_hold_all_true_means():
    generator = np.random.default_rng(0)
    studies = generator.normal(3.0, 2.0, size=(1000, 9, 4))
    held = []
    for study in studies:
        intervals = [interval_of(sample.tolist(), comparisons=9) for sample in study]
        held.append(all(interval.low < 3.0 < interval.high for interval in intervals))
    assert np.mean(held) == pytest.approx(0.955, abs=0.015)  # (1 - 0.05 / 9)^9 = 0.951, or more


def test_the_interval_of_four_values_by_hand():
    interval = interval_of([1.0, 2.0, 3.0, 4.0])  # standard deviation 1.29099
    assert interval.mean == 2.5
    assert interval.half_width == pytest.approx(3.18245 * 1.29099 / 2, rel=1e-5)


def test_what_a_seed_does_to_both_models_cancels_out():
    interval = paired_difference([1.5, 2.5, 9.5, 4.5], [1.0, 2.0, 9.0, 4.0])
    assert interval.mean == pytest.approx(0.5)
    assert interval.half_width == pytest.approx(0, abs=1e-12)


def test_a_difference_needs_the_same_seeds_in_both():
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


REFERENCE = [1.0, 1.1, 1.2, 1.3]


@pytest.mark.parametrize(
    "shifts, words",
    [
        ([-0.10, -0.11, -0.09, -0.10], "better"),
        ([0.10, 0.11, 0.09, 0.10], "worse"),
        ([0.10, -0.11, 0.09, -0.10], "within"),
    ],
)
def test_the_words_follow_the_interval(shifts, words):
    values = [value + shift for value, shift in zip(REFERENCE, shifts, strict=True)]
    assert verdict(values, REFERENCE).startswith(words)


def test_within_names_the_largest_difference_that_is_possible():
    values = [1.12, 1.08, 1.32, 1.28]
    interval = paired_difference(values, REFERENCE)
    (bound,) = re.findall(r"within ±(\S+)", verdict(values, REFERENCE))
    assert float(bound) == pytest.approx(max(-interval.low, interval.high), abs=1e-4)


def test_one_seed_has_no_interval():
    assert format_mean([1.5]) == "1.5000"
    assert format_difference([1.5], [1.0]) == "+0.5000"
    assert verdict([1.5], [1.0]) == "one seed"


def test_the_sign_test_counts_the_ways_in_which_as_many_signs_agree():
    for differences in itertools.product([-0.5, 0.5], repeat=5):
        at_least_as_many = [
            other
            for other in itertools.product([-1, 1], repeat=5)
            if abs(sum(other)) >= abs(2 * sum(differences))
        ]
        (p,) = re.findall(r"p = (.*)", signs(differences, [0.0] * 5))
        assert float(p) == pytest.approx(len(at_least_as_many) / 2**5, rel=0.01)


def test_the_sign_test_says_how_many_seeds_agree_and_leaves_equal_losses_out():
    assert signs([1.0, 2.0, 3.0], [1.5, 2.5, 2.5]).startswith("2 of 3 lower")
    assert signs([1.0, 2.0, 3.0], [0.5, 1.5, 3.0]).startswith("2 of 2 higher")
    assert signs([1.0], None) == ""


@pytest.mark.parametrize("difference", [1.0, 1.5, 3.0])
def test_enough_seeds_show_a_difference_in_four_of_five_studies(difference):
    spread = [-1.0, 1.0, -1.0, 1.0]
    n = enough_seeds(spread, [0.0] * 4, difference)
    generator = np.random.default_rng(0)
    shown = {n: 0, n - 1: 0}  # studies of a model that is worse by the difference
    for seeds in shown:
        if seeds > 1:
            studies = generator.normal(difference, np.std(spread, ddof=1), size=(1000, seeds))
            shown[seeds] = np.mean([interval_of(study.tolist()).low > 0 for study in studies])
    assert shown[n] > 0.77  # the formula takes another spread for the true one: about 0.8
    assert shown[n - 1] < shown[n]
