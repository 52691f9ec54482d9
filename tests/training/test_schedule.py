import math

import pytest

from lightning_knnmt.training.schedule import inverse_sqrt, linear


def test_inverse_sqrt_rises_then_falls() -> None:
    factor = inverse_sqrt(5)
    assert [factor(step) for step in (0, 4, 19)] == pytest.approx([1 / 5, 1.0, math.sqrt(5 / 20)])


def test_inverse_sqrt_without_warm_up_is_constant() -> None:
    assert [inverse_sqrt(0)(step) for step in (0, 1000)] == [1.0, 1.0]


def test_linear_rises_to_the_peak_and_falls_to_zero() -> None:
    factor = linear(2, 6)
    assert [factor(step) for step in range(8)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    )


def test_linear_without_warm_up_begins_at_the_peak() -> None:
    assert [linear(0, 4)(step) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_linear_survives_a_warm_up_that_outlasts_the_training() -> None:
    assert [linear(8, 4)(step) for step in (0, 3, 9)] == pytest.approx([1 / 8, 4 / 8, 0.0])
