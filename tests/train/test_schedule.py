"""The learning rate: warm-up over the first 5 % of steps, constant, decay over the last 20 %."""

from __future__ import annotations

import pytest

from routesae.train.schedule import lr_factor


def test_the_rate_warms_up_stays_and_decays_at_the_stated_borders() -> None:
    factors = [lr_factor(step, 1000) for step in range(1000)]
    assert factors[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert factors[49:801] == [1.0] * 752
    assert factors[800:] == pytest.approx([(1000 - step) / 200 for step in range(800, 1000)])


def test_the_first_step_moves_and_the_last_still_does() -> None:
    assert lr_factor(0, 1000) == pytest.approx(1 / 50)
    assert lr_factor(999, 1000) == pytest.approx(1 / 200)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 5, 10, 39, 101])
def test_every_step_of_any_run_has_a_rate_above_zero_and_the_peak_is_reached(total_steps: int) -> None:
    factors = [lr_factor(step, total_steps) for step in range(total_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_a_run_of_one_step_takes_it_at_the_full_rate() -> None:
    assert lr_factor(0, 1) == 1
