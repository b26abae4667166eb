import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.types import InputError

BUDGETS = st.builds(Schedule, st.integers(1, 10**9), st.integers(1, 10_000), decay=st.just(0.2))


def factors(schedule):
    return [schedule.lr_factor(step) for step in range(schedule.steps)]


def test_by_hand():
    """100 steps: 5 rise, 20 fall."""
    schedule = Schedule(1000, 10)
    assert (schedule.steps, schedule.warmup_steps) == (100, 5)
    assert factors(schedule)[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert factors(schedule)[79:83] == pytest.approx([1, 1, 0.95, 0.9])
    assert factors(schedule)[-1] == pytest.approx(0.05)
    assert schedule.lr_factor(100) == 0
    assert schedule.lr_factor(120) == 0  # beyond the end: never negative


def test_how_long_it_falls_is_a_share_of_the_run():
    linear, constant = Schedule(1000, 10, decay=1), Schedule(1000, 10, decay=0)
    assert factors(linear)[5:] == pytest.approx([1 - step / 100 for step in range(5, 100)])
    assert factors(linear)[:5] == factors(constant)[:5] == factors(Schedule(1000, 10))[:5]
    assert set(factors(constant)[5:]) == {1}
    assert factors(Schedule(1000, 10, decay=0.2)) == factors(Schedule(1000, 10))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"model.decay={wrong}"):
            Schedule.of(1000, 10, wrong)


def test_a_large_run_has_the_absolute_lengths():
    schedule = Schedule(300_000_000, 4096)
    assert schedule.warmup_steps == 1000
    assert schedule.dead_after_tokens == 10_000_000
    assert schedule.threshold_rate == pytest.approx(1 / 1000)
    assert schedule.start_tokens == 1_000_000


def test_a_small_run_has_shares_of_its_budget():
    schedule = Schedule(10_000_000, 1000)
    assert schedule.steps == 10_000
    assert schedule.warmup_steps == 500  # 5 %
    assert schedule.dead_after_tokens == 500_000  # 5 %
    assert schedule.threshold_rate == pytest.approx(1 / 200)  # 2 %
    assert schedule.start_tokens == 100_000  # 1 %


def test_a_tiny_run_has_lower_bounds():
    schedule = Schedule(1, 4096)
    assert schedule.steps == 1
    assert schedule.dead_after_tokens == 100_000
    assert schedule.threshold_rate == 1
    assert schedule.start_tokens == 65_536
    assert factors(schedule) == [1.0]


def test_a_last_partial_batch_is_a_step():
    assert [Schedule(tokens, 10).steps for tokens in (9, 10, 11)] == [1, 1, 2]


@given(BUDGETS)
def test_bounds_of_all_lengths(schedule):
    assert schedule.steps * schedule.batch >= schedule.tokens
    assert 0 <= schedule.warmup_steps <= min(1000, schedule.steps / 20)
    assert 100_000 <= schedule.dead_after_tokens <= 10_000_000
    assert 0.001 <= schedule.threshold_rate <= 1
    assert 65_536 <= schedule.start_tokens <= 1_000_000


@given(st.builds(Schedule, st.integers(1, 3000), st.integers(1, 7), decay=st.just(0.2)))
def test_the_rate_rises_holds_and_falls(schedule):
    rates = factors(schedule)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1
    top = rates.index(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert schedule.lr_factor(schedule.steps) == 0
