"""What changes over a run: the learning rate warms up, stays and decays; the penalty rises; k falls."""

from __future__ import annotations

import pytest

from routesae.train.optimiser import annealed_k, lr_factor, peak_lr, sparsity_factor


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


def test_auto_falls_with_the_root_of_the_latents_and_the_published_rate_does_not() -> None:
    assert peak_lr(2304) == 4e-3
    assert [peak_lr(latents) for latents in (4608, 9216, 36864)] == [0.00283, 2e-3, 1e-3]
    assert {peak_lr(latents, published=True) for latents in (64, 9216)} == {5e-4}


# ------------------------------------------------------------------------------------------- λ and the annealed k


def test_the_penalty_rises_linearly_over_its_share_of_the_steps_and_then_stays() -> None:
    factors = [sparsity_factor(step, 1000, 0.1) for step in range(1000)]
    assert factors[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert factors[99] < 1
    assert factors[100:] == [1.0] * 900


def test_without_a_warm_up_the_penalty_is_whole_from_the_first_step() -> None:
    assert [sparsity_factor(step, 10, 0) for step in range(10)] == [1.0] * 10
    assert sparsity_factor(0, 1, 0.1) == 1


def test_a_warm_up_of_the_whole_run_never_falls_and_never_starts_at_nothing() -> None:
    factors = [sparsity_factor(step, 10, 1) for step in range(10)]
    assert factors == sorted(set(factors))
    assert 0 < factors[0] < factors[-1] < 1


def test_k_falls_linearly_from_near_the_first_to_k_and_stays() -> None:
    found = [annealed_k(step, 100, 0.1, 64, 8) for step in range(100)]
    assert found[:10] == [round(64 - 56 * (step + 1) / 11) for step in range(10)]
    assert found[:10] == sorted(set(found[:10]), reverse=True)
    assert 8 < found[9] < found[0] < 64
    assert found[10:] == [8] * 90


def test_k_may_rise_as_well_and_never_leaves_its_ends() -> None:
    found = [annealed_k(step, 100, 0.5, 2, 9) for step in range(100)]
    assert found == sorted(found)
    assert (min(found), max(found), found[50]) == (2, 9, 9)


def test_without_a_first_k_it_is_k_all_along() -> None:
    assert {annealed_k(step, 100, 0.1, None, 8) for step in range(100)} == {8}
