"""How long a thread polls before it sleeps."""

from __future__ import annotations

from poolray.local.channel import Spinner

SPIN_S = 250e-6


def spinner_after(*waits_s: float) -> Spinner:
    spinner = Spinner(SPIN_S)
    for waited_s in waits_s:
        spinner.note(waited_s)
    return spinner


def test_a_new_one_polls() -> None:
    assert spinner_after().limit_s() == SPIN_S


def test_short_waits_are_polled_for_and_long_ones_slept_through() -> None:
    assert spinner_after(*[30e-6] * 20).limit_s() == SPIN_S
    assert spinner_after(*[5e-3] * 20).limit_s() == 0.0


def test_waits_of_two_sleepers_are_short_enough_to_be_tried() -> None:
    assert spinner_after(*[400e-6] * 20).limit_s() == SPIN_S


def test_one_pause_of_the_program_changes_nothing() -> None:
    assert spinner_after(*[30e-6] * 20, 3600.0).limit_s() == SPIN_S


def test_calls_of_a_millisecond_are_not_polled_for_and_short_ones_are_again() -> None:
    assert spinner_after(*[1e-3] * 20).limit_s() == 0.0
    assert spinner_after(*[1e-3] * 20, *[130e-6] * 10).limit_s() == SPIN_S


def test_where_workers_need_every_core_only_a_fifth_is_spent_and_only_on_short_waits() -> None:
    assert spinner_after(*[30e-6] * 20).limit_s(crowded=True) == SPIN_S * 0.2
    assert spinner_after(*[400e-6] * 20).limit_s(crowded=True) == 0.0


def test_nothing_is_polled_for_when_that_is_switched_off() -> None:
    spinner = Spinner(0.0)
    spinner.note(1e-6)
    assert spinner.limit_s() == 0.0
