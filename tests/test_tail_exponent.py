"""The tail exponent of a spectrum is Hill's estimate over the upper half of its eigenvalues."""

import math

import numpy as np
import pytest

from rmsgd.reference import hill_alpha


def test_the_exponent_of_six_values_is_the_one_computed_by_hand():
    # Eigenvalues 1 to 6 e-folds: the upper half is 4, 5, 6, so that the logarithms over x_min are 0, 1, 2.
    gamma = np.exp(np.arange(1, 7) / 2)
    assert hill_alpha(gamma) == pytest.approx(1 + 3 / (0 + 1 + 2))
    assert hill_alpha(gamma[::-1]) == pytest.approx(2.0)
    # The upper half of an odd number of values has the middle one: 3, 4, 5.
    assert hill_alpha(gamma[:5]) == pytest.approx(1 + 3 / (0 + 1 + 2))


def test_the_exponent_does_not_depend_on_scale_and_finds_that_of_a_power_law():
    # Eigenvalues at the quantiles of a density x^-3 above 1.
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    gamma = np.sqrt((1 - quantiles) ** (-1 / 2))
    assert hill_alpha(gamma) == pytest.approx(3.0, abs=0.01)
    for scale in (1e-30, 1e30):
        assert hill_alpha(gamma * scale) == pytest.approx(hill_alpha(gamma), rel=1e-12)


def test_a_spectrum_without_a_tail_has_no_exponent():
    assert math.isinf(hill_alpha(np.ones(8)))
    assert math.isnan(hill_alpha(np.array([3.0, 2.0, 0.0, 0.0, 0.0])))
    assert math.isnan(hill_alpha(np.array([2.0, 1.0])))
    assert math.isnan(hill_alpha(np.array([])))
    assert math.isnan(hill_alpha(np.full(6, math.nan)))
    assert math.isfinite(hill_alpha(np.array([3.0, 2.0, 1.0, 0.0])))
