"""Seconds and bytes from past runs: exact where a run repeats, wide where it does not, nothing where nothing is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobs.quotes import PastRun, host_of
from jobs.quoting import Rates, peak, phase_speedups, said, timed, whole_speedup

PHASES = [
    {"flops": 100, "dense_flops": 100, "omission_rate_mlp": 0.0, "omission_rate_attention": 0.0},
    {"flops": 60, "dense_flops": 100, "omission_rate_mlp": 0.5, "omission_rate_attention": 0.0},
]
CONFIG = {"shape": {"hidden": 8}, "batch_size": 4}
FLOPS = {"sat": 160, "dense": 200, "probe": 0, "ratio": 0.8}
QUOTE = {"phases": PHASES, "flops": FLOPS, "memory_bytes": {"peak": 500}, "width": 40}
UNSAID = {"calibrated": False, "seconds": None}
# Dense and sparse steps took as long for a FLOP.
RUN = PastRun(
    job_id="ftjob-1",
    config=CONFIG,
    quote=QUOTE | {"said": UNSAID},
    summary={"training_seconds": 16.0, "flops": 160, "dense_flops": 200, "steps": 10},
    host="here",
    memory_bytes=1000,
    energy_joules=None,
)


def result(**more: Any) -> dict[str, Any]:
    return {"config": CONFIG, "quote": QUOTE, "hardware": {"host": "here"}} | more


def took(seconds: float) -> PastRun:
    return replace(RUN, summary=RUN.summary | {"training_seconds": seconds})


def told(seconds: float, *, dense: float, sparse: float, steps: int = 10) -> PastRun:
    """A run that measured a dense run's seconds, and those of a sparse FLOP by so many steps."""
    measured = {
        "training_seconds": seconds,
        "dense_seconds_estimate": dense,
        "sparse_seconds_per_flop": sparse,
        "steps": 2 * steps,
        "mean_omission_rate_mlp": 0.25,
    }
    return replace(RUN, summary=RUN.summary | measured)


def test_nothing_known_is_no_time():
    assert timed(result(), []).seconds is None
    assert timed(result(), [replace(RUN, host="there")]).seconds is None


def test_the_same_run_takes_as_long_as_it_took():
    found = timed(result(), [RUN])
    assert found.calibrated
    assert found.seconds == pytest.approx((16 / 1.5, 16, 16 * 1.5))
    assert found.errors == ()


def test_past_quotes_are_judged_by_what_was_said_then():
    calibrated = QUOTE | {"said": {"calibrated": True, "seconds": [15, 16, 17]}}
    found = timed(result(), [replace(took(20), quote=calibrated), took(16), took(16)])
    assert found.errors == pytest.approx((16 / 20 - 1,))
    low, expected, high = found.seconds or (0, 0, 0)
    assert (low, expected, high) == pytest.approx((16 / 1.15, 16, 20 * 1.15))


def test_another_shape_gives_a_wide_range():
    other = replace(RUN, config=CONFIG | {"batch_size": 8})
    found = timed(result(), [other])
    assert not found.calibrated
    assert found.seconds == pytest.approx((16 / 3, 16, 48))
    assert not timed(result(quote=QUOTE | {"width": 48}), [RUN]).calibrated


def test_a_run_that_measured_nothing_is_left_out():
    assert timed(result(), [took(0)]).seconds is None


def test_a_speedup_is_said_only_where_both_rates_are_known():
    both = Rates(dense=1.0, sparse=1.25)
    assert phase_speedups(PHASES, both) == pytest.approx([1.0, 100 / 75])
    assert whole_speedup(PHASES, both) == pytest.approx(200 / 175)
    assert phase_speedups(PHASES, Rates(dense=1.0, sparse=None)) == [1.0, None]
    assert whole_speedup(PHASES, Rates(dense=1.0, sparse=None)) is None
    assert whole_speedup(PHASES, None) is None


def test_no_speedup_is_said_above_the_bound_of_its_flops():
    quick = Rates(dense=1.0, sparse=0.5)
    assert phase_speedups(PHASES, quick) == pytest.approx([1.0, 100 / 60])
    assert whole_speedup(PHASES, quick) == pytest.approx(200 / 160)


def test_few_sparse_steps_tell_nothing_and_a_run_is_compared_with_itself():
    guarded = told(16, dense=20.0, sparse=0.01, steps=9)
    rates = timed(result(), [guarded]).rates
    assert (rates, whole_speedup(PHASES, rates)) == (Rates(dense=0.1, sparse=None), None)
    slow = told(34, dense=40.0, sparse=0.24)
    fast = told(17, dense=20.0, sparse=0.12)
    rates = timed(result(), [fast, slow, slow, guarded, guarded]).rates
    assert rates is not None
    assert (rates.dense, rates.sparse) == pytest.approx((0.1, 0.12))


def test_a_measured_peak_replaces_the_counted_one():
    assert peak(result(), []) == (False, pytest.approx((350, 500, 750)))
    assert peak(result(), [RUN]) == (True, pytest.approx((950, 1000, 1050)))
    assert peak(result(), [replace(RUN, memory_bytes=None)])[0] is False


def test_what_a_phase_costs_once_does_not_grow_with_its_length():
    run = told(18.6, dense=20.0, sparse=0.11)
    # 100 FLOPs at .1, 60 at .11, and 2 s to begin two phases.
    assert timed(result(), [run]).seconds == pytest.approx((18.6 / 1.5, 18.6, 18.6 * 1.5))
    longer = [{**p, "flops": 10 * p["flops"], "dense_flops": 1000} for p in PHASES]
    (_, expected, _) = timed(result(quote=QUOTE | {"phases": longer}), [run]).seconds or (0, 0, 0)
    assert expected == pytest.approx(100 + 66 + 2)
    dense = [PHASES[0] | {"flops": 200, "dense_flops": 200}]
    (_, expected, _) = timed(result(quote=QUOTE | {"phases": dense}), [run]).seconds or (0, 0, 0)
    assert expected == pytest.approx(20 + 1)


def test_energy_is_said_only_where_a_meter_has_told_of_it():
    assert said(result(), [RUN])["joules"] is None
    measured = replace(RUN, energy_joules=3200.0)
    longer = result(quote=QUOTE | {"phases": 2 * PHASES})
    assert said(longer, [measured, RUN])["joules"] == pytest.approx(2 * 3200)
    assert said(result(config=CONFIG | {"batch_size": 8}), [measured])["joules"] is None


def test_the_host_of_a_worker_may_hold_dashes():
    assert host_of("gpu-node-7-4242-abc123") == "gpu-node-7"
